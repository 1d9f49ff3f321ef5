"""A model with packed experts beside its dense one: ``python -m benchmarks.sparse model DIR``.

Milliseconds a generated token (greedy, the prompt apart), in turns, medians; the greedy tokens are
those of the plain products, or the first that differs is told. Memory is what loading adds to the
process, in one of its own. ``--graph`` times one decoding step as a CUDA graph over a static cache,
on every side.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor, nn

from entangle.experts.checkpoint import load_base, load_expanded
from entangle.kernels.dispatch import OPERATIONS
from entangle.models.loading import LanguageModel
from entangle.packed import linear as modules

PROMPT = "The river rises in the mountains and"
LOADED = """
import sys, torch
from entangle.experts.checkpoint import load_expanded
if sys.argv[2] != "cpu":
    model = load_expanded(sys.argv[1], device="cuda")
    held = torch.cuda.memory_allocated()
    with torch.no_grad():
        model.module(torch.arange(8, device="cuda")[None] + 5)
    print(held, torch.cuda.max_memory_allocated())
    sys.exit()
def here(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024
torch.zeros(1) @ torch.zeros(1)
before = here("VmRSS")
model = load_expanded(sys.argv[1], device="cpu")
ids = torch.arange(8)[None] + 5
with torch.no_grad():
    model.module(ids)
print(here("VmRSS") - before, here("VmHWM") - before)
"""


@contextmanager
def plain_products() -> Iterator[None]:
    """Let the modules call the plain versions inside the ``with`` block."""
    named = {n: OPERATIONS[f"entangle.packed.products.{n}"][0] for n in ("linear", "gated")}
    with (
        mock.patch.object(modules, "linear", named["linear"]),
        mock.patch.object(modules, "gated", named["gated"]),
    ):
        yield


def generate(model: LanguageModel, count: int) -> tuple[Tensor, float]:
    """Return the greedy tokens and milliseconds a token after the prompt and the first."""
    assert model.tokenizer is not None
    module: nn.Module = model.module
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    found = []
    with torch.no_grad():
        out = module(ids, use_cache=True)
        start = time.perf_counter()
        for _ in range(count):
            token = out.logits[:, -1:].argmax(-1)
            found.append(token)
            out = module(token, past_key_values=out.past_key_values, use_cache=True)
        int(out.logits[0, -1].argmax())
        seconds = time.perf_counter() - start
    return torch.cat(found, 1)[0].cpu(), 1e3 * seconds / count


def step_of(model: LanguageModel, length: int = 512) -> Callable[[], object]:
    """Return one decoding step over a static cache of some positions."""
    from transformers import StaticCache

    module: Any = model.module
    cache = StaticCache(config=module.config, max_cache_len=length)
    prompt = torch.arange(5, 25, device=model.device)[None]
    token = torch.full((1, 1), 7, device=model.device)
    at = torch.full((1, 1), 20, device=model.device)

    def step() -> object:
        with torch.no_grad():
            return module(token, past_key_values=cache, position_ids=at, use_cache=True).logits

    with torch.no_grad():
        module(prompt, past_key_values=cache, use_cache=True)
    step()
    return step


def graphed(models: dict[str, LanguageModel], rounds: int) -> None:
    """Print microseconds of a decoding step as a CUDA graph, in turns."""
    from benchmarks.sparse_gpu import timed

    steps = {name: step_of(model) for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(timed([step])[0])
    middle = {name: statistics.median(values) for name, values in found.items()}
    first = middle["dense bfloat16"]
    for name, value in middle.items():
        print(f"graph of one step, {Path(name).name}: {value:.0f} us ({first / value:.2f})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table for folders of one dense model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse model")
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="of the packed models' dense rest (default: as stored)")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--graph", action="store_true", help="CUDA graphs of one step too")
    given = parser.parse_args(arguments)
    models: dict[str, LanguageModel] = {}
    for dtype in (torch.float32, torch.bfloat16):
        dense = load_base(given.folders[0], device=given.device)
        dense.module.to(dtype)
        models[f"dense {str(dtype).removeprefix('torch.')}"] = dense
    seconds = dict.fromkeys(models, float("nan"))
    for folder in given.folders:
        start = time.perf_counter()
        models[folder] = load_expanded(folder, device=given.device)
        if given.dtype is not None:
            models[folder].module.to(getattr(torch, given.dtype))
        seconds[folder] = time.perf_counter() - start
    same = {}
    for folder in given.folders:
        tokens = generate(models[folder], given.tokens)[0]
        with plain_products():
            wanted = generate(models[folder], given.tokens)[0]
        differs = (tokens != wanted).nonzero()
        same[folder] = "all" if not len(differs) else str(int(differs[0]))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(given.rounds):
        for name, model in models.items():
            times[name].append(generate(model, given.tokens)[1])
    middle = {name: statistics.median(t) for name, t in times.items()}
    first, second = list(middle.values())[:2]
    rows = []
    for name, value in middle.items():
        row: dict[str, object] = {
            "model": Path(name).name, "ms a token": round(value, 1),
            "× float32": round(first / value, 2), "× bfloat16": round(second / value, 2),
            "tokens as plain": same.get(name, ""), "load s": round(seconds[name], 2),
        }  # fmt: skip
        if name in given.folders:
            size = sum(f.stat().st_size for f in Path(name).glob("*.safetensors"))
            command = [sys.executable, "-c", LOADED, name, models[name].device.type]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            held, peak = map(int, text.split())
            row |= {"file MB": round(size / 1e6), "held × file": round(held / size, 3),
                    "peak × file": round(peak / size, 3)}  # fmt: skip
        rows.append(row)
    device = models[given.folders[0]].device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{kind}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(pd.DataFrame(rows).to_string(index=False), flush=True)
    if given.graph:
        graphed(models, given.rounds)


if __name__ == "__main__":
    main()
