"""Are entangled neurons damaged more by masked activations? ``python -m benchmarks.masked_rows``.

The relative error of every neuron's output under each method, on the dense model's inputs, against
its WD: Spearman's coefficient in every layer, its mean over layers with Student's 95 %, and the
same with weight norm and variance of the output held fixed. Of the first blocks of the model.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from entangle.activation import fit
from entangle.experiments.interventions import layer_statistics
from entangle.experiments.predictors import predictor_table
from entangle.models.layers import find_blocks, find_layers
from entangle.models.loading import LanguageModel, load_model
from entangle.pruning import PRUNERS, prune
from entangle.texts.calibration import load_calibration
from entangle.texts.calibration_set import CalibrationSet


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every method, and print the coefficients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--n-seq", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument(
        "--methods", default="teal,column-norm,cats,chess,rsparse,larosa,magnitude,wanda,sparsegpt"
    )
    given = parser.parse_args(argv)
    model = load_model(given.model, device=given.device)
    _, blocks = find_blocks(model.module)
    del blocks[given.blocks :]  # later ones change nothing before them
    text = load_calibration(
        "demo", model.tokenizer, n_seq=given.n_seq, seq_len=given.seq_len, split="train",
        context_length=model.context_length, vocab_size=model.vocab_size,
    )  # fmt: skip
    tables = []
    for method, frame in _errors(model, text, given.methods.split(","), given.density):
        found = predictor_table(
            frame, "relative_error", predictors=["wd", "weight_norm", "variance"],
            given=["weight_norm", "variance"], n_boot=100,
        ).assign(method=method, median=frame["relative_error"].median())  # fmt: skip
        found["top"] = _top(frame)
        tables.append(found[found["scope"] == "mean of layers"])
        print(pd.concat(tables)[_SHOWN].round(2).to_string(index=False), flush=True)


_SHOWN = [
    "method", "median", "top", "predictor", "n_layers", "spearman", "spearman_low",
    "spearman_high", "partial", "partial_low", "partial_high",
]  # fmt: skip


def _top(frame: pd.DataFrame, share: float = 0.03) -> float:
    """Return the median error of every layer's top rows by WD over that of the others, mean."""
    ratios = []
    for _, part in frame.groupby("layer"):
        top = part["wd"] >= part["wd"].quantile(1 - share)
        error = part["relative_error"]
        ratios.append(error[top].median() / error[~top].median())
    return float(np.mean(ratios))


def _errors(
    model: LanguageModel, text: CalibrationSet, methods: Sequence[str], density: float
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield every method's errors beside the scores."""
    layers = find_layers(model.module, "all", "mlp")
    scored = layer_statistics(model, text, layers, md=False)
    scores = scored.scores.frame
    for method in methods:
        if method not in PRUNERS:
            errors = fit(model, text, method).at_density(density).row_errors()
            yield method, scores.merge(errors, on=["layer", "neuron"])
            continue
        parts = []
        for layer in layers:
            weight = layer.weight.float()
            gram = scored.grams[layer.name].gram.to(weight)
            made = prune(weight, gram, method=method, sparsity=1 - density, loss=False).weight
            wrong = ((weight - made) @ gram * (weight - made)).sum(1).detach().cpu().numpy()
            own = scores[scores["layer"] == layer.name]
            error = wrong / (own["std"].to_numpy() ** 2 * text.n_tokens)
            parts.append(own.assign(relative_error=error))
        yield method, pd.concat(parts, ignore_index=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
