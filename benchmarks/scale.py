"""Models larger than memory: what reading their weights block by block costs.

``python -m benchmarks.scale laptop`` makes an 8B-shaped model of bfloat16 (the shapes of
Llama-3.1-8B, random weights, 16 GB of shards), scores it by sketch over 2 × 256 tokens, evaluates
it on one window, and expands two of its blocks to 2 experts, each in a process of its own whose
anonymous memory is limited (``RLIMIT_DATA``: heap and anonymous maps count, the page cache of the
shards does not), and prints one table. Beside scoring stand, measured just before it in a process
of its own, the time to read all shards and that of the bare products of the model's linears over
as many tokens; and scoring the first half of the blocks alone, from which follows what a block
takes, and the 32 of the whole shape. Both quotients are of CPU seconds, which do not grow as fast
as others' work on the machine. The disk's cache is not emptied; the model is deleted in the end.

``--layers 4`` makes a smaller one; ``--keep`` leaves it.

``python -m benchmarks.scale dry`` asks commands on the demo model what they will take
(``--dry-run``), runs them, and prints both beside one another; ``--model``, ``--checkpoints`` and
``--mixture`` name what is studied, traced and asked about experts.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    import torch

GIB = 2**30
SHAPES: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "rope_theta": 500000.0, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
N_SEQ, SEQ_LEN = 2, 256
LIMIT = 8 * GIB
EXPANDED = 2


def make_model(folder: Path, *, layers: int) -> None:
    """Write a model of random weights, a shard a block."""
    import torch
    import transformers as hf
    from safetensors.torch import save_file

    config = hf.LlamaConfig(**SHAPES, num_hidden_layers=layers, dtype="bfloat16")
    with torch.device("meta"):
        empty = hf.LlamaForCausalLM(config)
    shards: dict[str, list[str]] = {}
    for name in empty.state_dict():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else parts[-2], []).append(name)
    index: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            shape = empty.state_dict()[name].shape
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:  # a number drawn for a row and one for a column: as good for time, and fast
                own = torch.randn(shape[1] + 4099, generator=generator).bfloat16() * 0.02
                starts = torch.arange(shape[0]) % 4099
                tensors[name] = own.unfold(0, shape[1], 1)[starts].contiguous()
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def bare(folder: Path) -> None:
    """Print the CPU seconds of reading all shards, and of the products over as many tokens."""
    import torch

    from entangle.models.shards import Shards

    shards, taken = Shards(sorted(folder.glob("*.safetensors"))), dict[str, float]()
    tokens: dict[int, torch.Tensor] = {}
    begin = time.perf_counter()
    for name, slab in shards.slabs.items():
        in_block = ".layers." in name
        start = time.process_time()
        weight = shards.read(name)
        end = time.process_time()
        _add(taken, f"read {'blocks' if in_block else 'rest'}", end - start)
        if len(slab.shape) == 2 and in_block:
            width = slab.shape[1]
            rows = tokens.setdefault(width, torch.randn(N_SEQ * SEQ_LEN, width).bfloat16())
            start = time.process_time()
            rows @ weight.T
            _add(taken, "products", time.process_time() - start)
    _report(**taken, wall=time.perf_counter() - begin)


def _add(taken: dict[str, float], name: str, seconds: float) -> None:
    taken[name] = taken.get(name, 0.0) + seconds


def _calibration() -> "torch.Tensor":
    import torch

    return torch.randint(0, 1000, (N_SEQ, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def score(folder: Path, *, share: float = 1.0) -> None:
    """Score the layers of the blocks, or of a share of them, by sketch."""
    from entangle.models.layers import find_blocks
    from entangle.models.loading import load_model
    from entangle.scoring.score import score as score_model

    start, before = time.perf_counter(), time.process_time()
    model = load_model(folder, stream=True, dtype="auto")
    blocks = int(share * len(find_blocks(model.module)[1]))
    scores = score_model(model, _calibration(), method="sketch", memory=GIB, progress=False,
                         layers=list(range(blocks)))  # fmt: skip
    _report(wall=time.perf_counter() - start, work=time.process_time() - before, blocks=blocks,
            neurons=len(scores.frame))  # fmt: skip


def half(folder: Path) -> None:
    """Score the first half of the blocks."""
    score(folder, share=0.5)


def evaluate(folder: Path) -> None:
    """Measure the perplexity of one window."""
    from entangle.evaluation import perplexity
    from entangle.models.loading import load_model

    start = time.perf_counter()
    found = perplexity(load_model(folder, stream=True), _calibration(), progress=False)
    _report(wall=time.perf_counter() - start, perplexity=found.value)


def expand(folder: Path) -> None:
    """Expand two blocks to two experts."""
    from entangle.experts.expand import expand as expand_model
    from entangle.models.loading import load_model

    start = time.perf_counter()
    expand_model(
        load_model(folder, stream=True), _calibration(), experts=2, sparsity=0.5, restarts=1,
        layers=list(range(EXPANDED)), memory=GIB, progress=False,
    )  # fmt: skip
    _report(wall=time.perf_counter() - start)


def _report(**numbers: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    numbers |= {"cpu": time.process_time(), "peak GiB": peak / GIB}
    print(json.dumps(numbers))


TEXT = "--n-seq 8 --seq-len 256"
EVALUATED = "--evaluation demo --evaluation-split test --eval-seq-len 512 --eval-windows 4"
COMMANDS = (
    f"score {TEXT}",
    f"score {TEXT} --layer 0,1,2,3 --method exact",
    f"prune {TEXT} --layer 0,1,2,3 {EVALUATED}",
    f"expand {TEXT} --layer 0,1 --experts 8",
    "evaluate --eval-windows 4 --eval-seq-len 1024",
    f"ablate {TEXT} --layer 0,1 --seeds 2 --strength 0.9,0.95 {EVALUATED}",
    f"compare {TEXT} --methods wanda,sparsegpt --sparsity 0.5 {EVALUATED}",
    f"decompose {TEXT} --layer 1 --proj gate_proj --experts 1,2,4,8",
    f"anchor {TEXT} --layer 1 --proj gate_proj",
    "study MODEL --small --claims non-gaussian,wd-md",
    f"study MODEL --small --claims pruning {TEXT} --eval-windows 4",
    f"study MODEL --small --claims single-neuron,allocation {TEXT} --eval-windows 4",
    "study MODEL --small",
    "trace CHECKPOINTS",
    f"experts MIXTURE {TEXT}",
)
"""Of `dry`, on the demo model unless another is named; those that lack theirs are left out."""


def _ran(command: list[str]) -> tuple[str, dict[str, float]]:
    """Run a command; return what it printed, and what its process took."""
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "entangle", *command], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command} ended with {child.returncode}")
    took = {
        "wall s": time.perf_counter() - begin, "CPU s": used.ru_utime + used.ru_stime,
        "peak GiB": used.ru_maxrss * 1024 / GIB,
    }  # fmt: skip
    return printed, took


def dry(only: str, places: dict[str, str | None]) -> pd.DataFrame:
    """Return what ``--dry-run`` tells of every command, what then happens, and the quotient."""
    rows = []
    for line in (one for one in COMMANDS if one.startswith(only)):
        if any(name in line and value is None for name, value in places.items()):
            continue
        with tempfile.TemporaryDirectory() as place:
            words = [str(places.get(word, word)) for word in line.split()]
            command = [*words, "--quiet", "--json", "--out", f"{place}/made"]
            printed, measuring = _ran([*command, "--dry-run"])
            told = json.loads(printed)
            _, took = _ran(command)
            took["disk MiB"] = sum(f.stat().st_size for f in Path(place).rglob("*")) / 2**20
        said = {
            "wall s": told["seconds"], "CPU s": told["cpu_seconds"],
            "peak GiB": told["peak_memory_bytes"] / GIB, "disk MiB": told["disk_bytes"] / 2**20,
        }  # fmt: skip
        row: dict[str, object] = {"command": line, "dry run CPU s": measuring["CPU s"]}
        for name, found in took.items():
            row |= {
                f"told {name}": said[name],
                name: found,
                f"{name} told/took": said[name] / found,
            }
        rows.append(row)
        print(pd.Series(row).to_string(), "\n", file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


PARTS = {one.__name__: one for one in (bare, score, half, evaluate, expand)}


def run_part(part: str, folder: Path) -> dict[str, float]:
    """Run one part in a process of its own, with limited memory."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scale", part, str(folder)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{part} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def laptop(folder: Path, *, layers: int) -> pd.DataFrame:
    """Return seconds and peaks of all parts."""
    if not (folder / "config.json").is_file():
        make_model(folder, layers=layers)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rows = []
    for part in PARTS:
        rows.append({"part": part, "shards GB": size / 1e9, **run_part(part, folder)})
        print(rows[-1], file=sys.stderr, flush=True)
    by_part = {str(row["part"]): row for row in rows}
    print(pd.Series(quotients(by_part)).to_string())
    return pd.DataFrame(rows)


def quotients(by_part: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return CPU seconds of scoring over those of reading and products: measured, and of 32 blocks.

    Beside the blocks is what does not grow with them: embedding and head, what is imported and
    compiled at first use. Imports that come before are left out on both sides.
    """
    bare_, whole, part = (by_part[name] for name in ("bare", "score", "half"))
    blocks = whole["blocks"]
    block = (whole["work"] - part["work"]) / (blocks - part["blocks"])
    least = (bare_["read blocks"] + bare_["products"]) / blocks
    rest = whole["work"] - blocks * block
    return {
        "CPU s of a block": block,
        "its reading and products": least,
        "quotient of a block": block / least,
        f"quotient of {blocks:.0f} blocks": whole["work"] / (blocks * least + bare_["read rest"]),
        "quotient of 32 blocks": (rest + 32 * block) / (32 * least + bare_["read rest"]),
    }


def main() -> None:
    """Run the benchmark, or one part of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("laptop", "dry", *PARTS))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default="", help="commands of `dry` that begin so")
    parser.add_argument("--model", default="demo", help="that `dry` studies")
    parser.add_argument("--checkpoints", help="a folder of them, which `dry` traces")
    parser.add_argument("--mixture", help="a mixture of experts, for `dry`")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    if arguments.part == "dry":
        places = {name.upper(): getattr(arguments, name)
                  for name in ("model", "checkpoints", "mixture")}  # fmt: skip
        print(dry(arguments.only, places).to_string(index=False))
        return
    if arguments.part != "laptop":
        PARTS[arguments.part](arguments.folder)
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="entangle-scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(laptop(folder, layers=arguments.layers).to_string(index=False))
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
