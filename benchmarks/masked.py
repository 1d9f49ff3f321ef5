"""How long a forward pass takes with masked activations: ``python -m benchmarks.masked``.

CPU time over that of the dense model, on one thread, the least of some repeats. Masks are
simulated, so that all products are made; what sparse execution gains is not told here.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import pandas as pd
import torch

from entangle.activation import ACTIVATION_METHODS, FORMS, fit
from entangle.activation.methods import InputMethod
from entangle.errors import EntangleError
from entangle.models.loading import load_model
from entangle.recording.hooks import forward
from entangle.texts.calibration import load_calibration


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every method in every form, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--level", type=float, default=0.4)
    parser.add_argument("--scope", default="all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default=",".join(ACTIVATION_METHODS))
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load_model(given.model, device="cpu")
    text = load_calibration(
        "demo", model.tokenizer, n_seq=1, seq_len=given.tokens, split="train",
        context_length=model.context_length, vocab_size=model.vocab_size,
    )  # fmt: skip
    ids = next(iter(text.batches(1)))[1]
    dense = _least(lambda: forward(model.module, ids), given.repeats)
    rows = []
    for method in given.methods.split(","):
        if method.endswith("-greedy"):  # the rules of the method without a search
            continue
        for form in FORMS if issubclass(ACTIVATION_METHODS[method], InputMethod) else (None,):
            prefix = given.tokens // 2 if method in ("griffin", "coreinfer") else 0
            try:
                made = fit(
                    model, text, method, scope=given.scope, form=form, dense_prefix=prefix
                ).at(given.level)
            except EntangleError as error:
                print(f"{method}: {error}")
                continue
            with made.applied():
                took = _least(lambda: forward(model.module, ids), given.repeats)
            dense = min(dense, _least(lambda: forward(model.module, ids), 1))
            rows.append({"method": method, "form": form or "", "seconds": took})
            print(method, form, f"{took / dense:.2f}", flush=True)
    found = pd.DataFrame(rows)
    found["ratio"] = found["seconds"] / dense
    print(found.pivot(index="method", columns="form", values="ratio").round(2).to_string())


def _least(run: Callable[[], object], repeats: int) -> float:
    took = []
    for _ in range(repeats):
        clock = time.process_time()
        run()
        took.append(time.process_time() - clock)
    return min(took)


if __name__ == "__main__":
    main()
