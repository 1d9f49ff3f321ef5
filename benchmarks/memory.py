"""What a budget of memory costs: seconds of an expansion and an arm of `compare`, at some budgets.

``python -m benchmarks.memory MODEL --calibration TEXT`` prints one table. Without a budget half of
what is free is taken, and no budget should be faster by more than a tenth. Every budget is timed
once after a first run that is not (kernels are compiled, the allocator grows).
"""

import argparse
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch

from entangle.calibration import CalibrationSet, load_calibration
from entangle.evaluation import EvaluationText, load_evaluation
from entangle.expansion import expand
from entangle.expansion.arms import arms
from entangle.expansion.compare import compare
from entangle.memory import memory_for
from entangle.models.loading import LanguageModel, load_model
from entangle.provenance import package_versions

GIB = 2**30
BUDGETS = (2 * GIB, None, 40 * GIB)


def seconds(work: Callable[[], object]) -> float:
    """Return the time of a call, a GPU's queue drained."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    model: LanguageModel,
    calibration: CalibrationSet,
    text: EvaluationText,
    *,
    experts: int,
    sparsity: float,
) -> pd.DataFrame:
    """Time an expansion, and a comparison of the dense model and one arm, at every budget."""
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


def main() -> int:
    """Print the table; return 1 where the default is slower than 1.1 × the best budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="demo", metavar="SOURCE")
    parser.add_argument("--data", metavar="SOURCE", help="text to evaluate on (default: the same)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--n-seq", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--eval-windows", type=int, default=40)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.7)
    asked = parser.parse_args()
    model = load_model(asked.model, device=asked.device)
    calibration = load_calibration(
        asked.calibration,
        model.tokenizer,
        n_seq=asked.n_seq,
        seq_len=asked.seq_len,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
    )
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


if __name__ == "__main__":
    sys.exit(main())
