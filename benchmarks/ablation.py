"""What the ablation engine adds to the forward passes that a sweep contains.

``python -m benchmarks.ablation`` runs the demo's sweep on the demo model (dense, top, bottom and
five random selections at two strengths: 15 evaluations) beside its bare parts, and prints a table.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch

from entangle.cli.demo import ABLATED, EVAL_SEQ_LEN, EVAL_WINDOWS, SEEDS, STRENGTHS
from entangle.evaluation import load_evaluation, perplexity
from entangle.experiments.ablate import ablate
from entangle.models.loading import load_model
from entangle.runs.provenance import package_versions
from entangle.texts import N_SEQ, SEQ_LEN
from entangle.texts.calibration import load_calibration


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def sweep(n_seq: int, windows: int, repeats: int) -> list[dict[str, object]]:
    """Time the sweep, the bare calibration pass and the bare evaluations, one after the other."""
    model = load_model("demo")
    calibration = load_calibration(
        "demo", model.tokenizer, n_seq=n_seq, seq_len=SEQ_LEN, split="train"
    )
    text = load_evaluation(
        "demo", model.tokenizer, split="test", seq_len=EVAL_SEQ_LEN, n_windows=windows
    )
    body = model.module.get_submodule("model")

    def bare() -> None:
        with torch.inference_mode():
            for _, ids in calibration.batches(calibration.per_pass):
                body(ids.to(model.device), use_cache=False)

    evaluations = 1 + (2 + SEEDS) * len(STRENGTHS)
    one_pass = statistics.median(seconds(bare) for _ in range(repeats))
    one = statistics.median(seconds(lambda: perplexity(model, text)) for _ in range(repeats))
    floor = one_pass + evaluations * one
    arms = 0

    def whole() -> None:
        nonlocal arms
        result = ablate(
            model, calibration, evaluation=text, layers=ABLATED, proj=None, strengths=STRENGTHS,
            seeds=SEEDS, md=False, progress=False,
        )  # fmt: skip
        arms = result.frame.drop_duplicates(["selection", "seed", "strength"]).shape[0]

    took = seconds(whole)
    assert arms == evaluations, f"{arms} arms were run, {evaluations} were expected"
    return [
        {"work": f"bare pass over {n_seq} × {SEQ_LEN} tokens", "seconds": f"{one_pass:.1f}"},
        {"work": f"one evaluation of {windows} × {EVAL_SEQ_LEN} tokens", "seconds": f"{one:.1f}"},
        {"work": f"pass and {evaluations} evaluations", "seconds": f"{floor:.1f}", "ratio": "1"},
        {
            "work": "the sweep: scores, grams, solves, evaluations", "seconds": f"{took:.1f}",
            "ratio": f"{took / floor:.2f}", "goal": "≤ 1.25",
        },
    ]  # fmt: skip


def main() -> None:
    """Run the sweep and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n-seq", type=int, default=N_SEQ)
    parser.add_argument("--windows", type=int, default=EVAL_WINDOWS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = sweep(arguments.n_seq, arguments.windows, arguments.repeats)
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}")
    print(pd.DataFrame(rows).fillna("").to_string(index=False))


if __name__ == "__main__":
    main()
