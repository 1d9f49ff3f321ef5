"""Memory of every command as the text grows, and what a budget of memory costs in time.

``python -m benchmarks.memory tokens`` makes a model of few features, runs every command in a
process of its own on 1 ×, 4 ×, 16 × and 48 × the tokens under one small budget, and prints one
table: how far the peak of resident memory lies above that of the same command on the smallest text
(which has the libraries, the model and the result's tables), less the token ids themselves, which
stay in memory (8 bytes a token, in their own column). It returns 1 where that is not within a tenth
of 1 ×.

``python -m benchmarks.memory budgets MODEL --calibration TEXT`` times an expansion and an arm of
`compare` at some budgets. Without a budget half of what is free is taken, and no budget should be
faster by more than a tenth. Every budget is timed once after a first run that is not (kernels are
compiled, the allocator grows).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from entangle.evaluation import EvaluationText
    from entangle.models.loading import LanguageModel
    from entangle.texts.calibration_set import CalibrationSet

GIB = 2**30
MIB = 2**20
BUDGETS = (2 * GIB, None, 40 * GIB)
BUDGET = "32M"
TOKENS = 2**15
"""Tokens of 1 ×, on which every command fills the budget."""
LENGTH = 512
TIMES = (1, 4, 16, 48)
FLAT = 0.1
_FEW = 4
"""Sequences of the smallest text."""
_EVALUATED = ("--eval-seq-len", str(LENGTH), "--evaluation")
_EXPERTS = ("--experts", "4", "--sparsity", "0.5")
COMMANDS: dict[str, tuple[str, ...]] = {
    "score": (
        "--method", "exact", "--proj", "o_proj,down_proj", "--memory", BUDGET, "--calibration",
    ),
    "evaluate": ("--evaluation",),
    "expand": (*_EXPERTS, "--memory", BUDGET, "--calibration"),
    "ablate": (
        "--select", "top,random", "--seeds", "1", "--strength", "0.5", "--memory", BUDGET,
        *_EVALUATED, "TEXT", "--calibration",
    ),
    "compare": (
        "--methods", "expansion", *_EXPERTS, "--memory", BUDGET, *_EVALUATED,
        "TEXT", "--calibration",
    ),
    "decompose": (
        "--layer", "1", "--proj", "up_proj", "--neurons", "0", "--experts", "4", "--memory", "192M",
        "--calibration",
    ),
}  # fmt: skip
"""Options of each command, up to the text that is calibrated on (``TEXT``: the same)."""


def make_model(folder: Path) -> None:
    """Write a model of few features: 2 blocks, 32 features, 256 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_ids(path: Path, n_seq: int) -> None:
    """Write random token ids, and how long they are."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    save_file({"ids": torch.randint(256, (n_seq, LENGTH), generator=generator)}, path)


def command_line(command: str, model: Path, text: Path, out: Path) -> list[str]:
    """Return the arguments of a command on a text."""
    given = [str(text) if one == "TEXT" else one for one in COMMANDS[command]]
    return [command, str(model), *given, str(text), "--out", str(out), "--force", "--quiet"]


def peak(arguments: list[str]) -> int:
    """Return the peak of resident memory, in bytes, of a process that runs a command."""
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "run", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"^VmHWM: (\d+)$", ran.stdout, re.MULTILINE)
    if ran.returncode or found is None:
        raise RuntimeError(f"entangle {' '.join(arguments)} failed:\n{ran.stderr[-2000:]}")
    return int(found[1])


def run(arguments: list[str]) -> int:
    """Run a command in this process, then print its peak of resident memory."""
    from entangle.cli.main import main as entangle

    status = entangle(arguments) or 0
    content = Path("/proc/self/status").read_text()
    match = re.search(r"^VmHWM:\s+(\d+) kB$", content, re.MULTILINE)
    print(f"VmHWM: {int(match[1]) * 1024 if match else 0}")
    return status


def above(command: str, model: Path, folder: Path, times: int) -> float:
    """Return the peak of a command in MiB; ``times`` 0 is the smallest text."""
    n_seq = times * TOKENS // LENGTH if times else _FEW
    text = folder / f"{n_seq}.safetensors"
    if not text.exists():
        write_ids(text, n_seq)
    begin = time.perf_counter()
    found = peak(command_line(command, model, text, folder / f"{command}-{times}")) / MIB
    print(
        f"{command} {times} ×: {found:.1f} MiB, {time.perf_counter() - begin:.0f} s",
        file=sys.stderr,
    )
    return found


def growth(commands: list[str], times: list[int], folder: Path) -> pd.DataFrame:
    """Measure commands on texts of growing length; one row a command."""
    model = folder / "model"
    make_model(model)
    rows = []
    for command in commands:
        least = above(command, model, folder, 0)
        ids = {n: 8 * (n * TOKENS - _FEW * LENGTH) / MIB for n in times}
        beyond = {n: above(command, model, folder, n) - least - ids[n] for n in times}
        row: dict[str, object] = {"command": command, "smallest": least}
        row |= {f"{n} ×": beyond[n] for n in times}
        row |= {f"{n} × / {times[0]} ×": beyond[n] / beyond[times[0]] for n in times[1:]}
        rows.append(row)
    return pd.DataFrame(rows)


def tokens(asked: argparse.Namespace) -> int:
    """Print the table of memory by tokens; return 1 where it is not flat."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.keep or temporary)
        table = growth(asked.commands.split(","), [int(n) for n in asked.times.split(",")], folder)
    ids = ", ".join(f"{n} ×: {8 * int(n) * TOKENS / MIB:g}" for n in asked.times.split(","))
    print(f"MiB at the peak above the smallest text, less the ids ({ids} MiB); budget {BUDGET};")
    print(f"1 × is {TOKENS:,} tokens; {os.cpu_count()} cores")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    ratios = table[[name for name in table.columns if "/" in name]].to_numpy()
    return int(bool((abs(ratios - 1) > FLAT).any()))


def seconds(work: Callable[[], object]) -> float:
    """Return the time of a call, a GPU's queue drained."""
    import torch

    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    model: "LanguageModel",
    calibration: "CalibrationSet",
    text: "EvaluationText",
    *,
    experts: int,
    sparsity: float,
) -> pd.DataFrame:
    """Time an expansion, and a comparison of the dense model and one arm, at every budget."""
    from entangle.experiments.compare import compare
    from entangle.experiments.compare_arms import arms
    from entangle.experts.expand import expand
    from entangle.memory import memory_for

    chosen = arms(["expansion"], [sparsity], [experts])

    def expanded(memory: int | None) -> object:
        return expand(
            model, calibration, experts=experts, sparsity=sparsity, memory=memory, keep=False,
            progress=False,
        )  # fmt: skip

    def compared(memory: int | None) -> object:
        return compare(model, calibration, text, chosen, memory=memory)

    expanded(None)
    rows = []
    for budget in BUDGETS:
        given = memory_for(budget, model.module) / GIB
        rows.append(
            {
                "budget": "default" if budget is None else f"{budget / GIB:g} GiB",
                "GiB": f"{given:.1f}",
                "expand, s": seconds(lambda b=budget: expanded(b)),  # type: ignore[misc]
                "compare, s": seconds(lambda b=budget: compared(b)),  # type: ignore[misc]
            }
        )
    table = pd.DataFrame(rows)
    for name in ("expand", "compare"):
        table[f"{name}, × best"] = table[f"{name}, s"] / table[f"{name}, s"].min()
    return table


def budgets(asked: argparse.Namespace) -> int:
    """Print the table of seconds; return 1 where the default is slower than 1.1 × the best."""
    import torch

    from entangle.evaluation import load_evaluation
    from entangle.models.loading import load_model
    from entangle.runs.provenance import package_versions
    from entangle.texts.calibration import load_calibration

    model = load_model(asked.model, device=asked.device)
    calibration = load_calibration(
        asked.calibration, model.tokenizer, n_seq=asked.n_seq, seq_len=asked.seq_len,
        context_length=model.context_length, vocab_size=model.vocab_size,
    )  # fmt: skip
    text = load_evaluation(
        asked.data or asked.calibration, model.tokenizer, seq_len=asked.seq_len,
        n_windows=asked.eval_windows, context_length=model.context_length,
        vocab_size=model.vocab_size,
    )  # fmt: skip
    table = measure(model, calibration, text, experts=asked.experts, sparsity=asked.sparsity)
    gpu = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    print(f"{model.name}, {asked.n_seq} × {asked.seq_len} tokens, {gpu}; {package_versions()}")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    default = table[table["budget"] == "default"]
    return int(default[["expand, × best", "compare, × best"]].to_numpy().max() > 1.1)


def main() -> int:
    """Measure what was asked for."""
    if sys.argv[1:2] == ["run"]:
        return run(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(required=True)
    of_tokens = kinds.add_parser("tokens")
    of_tokens.add_argument("--commands", default=",".join(COMMANDS))
    of_tokens.add_argument("--times", default=",".join(map(str, TIMES)))
    of_tokens.add_argument("--keep", metavar="DIR", help="keep texts and results here")
    of_tokens.set_defaults(work=tokens)
    of_budgets = kinds.add_parser("budgets")
    of_budgets.add_argument("model", nargs="?", default="demo")
    of_budgets.add_argument("--calibration", default="demo", metavar="SOURCE")
    of_budgets.add_argument("--data", metavar="SOURCE", help="text to evaluate on (default: same)")
    of_budgets.add_argument("--device", default="auto")
    of_budgets.add_argument("--n-seq", type=int, default=128)
    of_budgets.add_argument("--seq-len", type=int, default=2048)
    of_budgets.add_argument("--eval-windows", type=int, default=40)
    of_budgets.add_argument("--experts", type=int, default=16)
    of_budgets.add_argument("--sparsity", type=float, default=0.7)
    of_budgets.set_defaults(work=budgets)
    asked = parser.parse_args()
    return int(asked.work(asked))


if __name__ == "__main__":
    sys.exit(main())
