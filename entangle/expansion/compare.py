"""Compare pruning methods and expansions at several sparsities, on one text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput, unknown_name
from entangle.evaluation import EvaluationText, Perplexity, perplexity, perplexity_ratio
from entangle.expansion.expand import Expansion, expand
from entangle.models.loading import LanguageModel

METHODS = {
    "magnitude": ("magnitude", "single"),
    "wanda": ("wanda", "single"),
    "sparsegpt": ("sparsegpt", "single"),
    "expansion": ("sparsegpt", "kmeans"),
    "expansion-random": ("sparsegpt", "random"),
}
"""Pruner and router of each method; those with a router are built for every number of experts."""


@dataclass(frozen=True)
class Arm:
    """One model to build."""

    method: str
    """A key of `METHODS`."""
    sparsity: float
    """Share of zeros in every row."""
    experts: int
    """Experts a layer; 1 without a router."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A tidy table, and every window's loss for later tests."""

    frame: pd.DataFrame
    """One row an arm: method, sparsity, experts, perplexity, ratio to dense with its 95 % interval,
    flops, nonzeros, bytes (multiples of dense), relative_error (mean over layers), seconds."""
    windows: pd.DataFrame
    """One row an arm and window: method, sparsity, experts, window, loss (nats)."""


def arms(methods: Sequence[str], sparsities: Sequence[float], experts: Sequence[int]) -> list[Arm]:
    """Return the models to build: methods without a router once, others for every count above 1."""
    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
    if not sparsities or not experts:
        raise InvalidInput("`sparsity` and `experts` must list at least one value.")
    found = []
    for sparsity in sparsities:
        for method in methods:
            routed = METHODS[method][1] != "single"
            counts = [k for k in experts if k > 1] if routed else [1]
            found += [Arm(method, sparsity, k) for k in counts]
    return found


def compare(
    model: LanguageModel,
    calibration: CalibrationSet,
    text: EvaluationText,
    chosen: Sequence[Arm],
    *,
    seed: int = 0,
    memory: int,
    told: Callable[[str], None] = lambda _line: None,
) -> Comparison:
    """Build every arm from the dense weights and measure its perplexity; experts are not kept.

    Parameters
    ----------
    model
        Dense model; left unchanged.
    calibration
        Text that the arms are fitted on.
    text
        Text to evaluate on.
    chosen
        From `arms`.
    seed
        Seed of the routers and of the bootstrap.
    memory
        As in `entangle.expand`.
    told
        Called with one line after each arm.
    """
    dense = perplexity(model, text)
    rows, losses = [], []
    for arm, expanded, result in _built(model, calibration, text, chosen, seed, memory, dense):
        ratio = perplexity_ratio(result, dense, seed=seed)
        row: dict[str, object] = {
            "method": arm.method,
            "sparsity": arm.sparsity,
            "experts": arm.experts,
            "perplexity": result.value,
            "ratio": ratio.value,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "flops": 1.0,
            "nonzeros": 1.0,
            "bytes": 1.0,
        }
        if expanded is not None:
            row |= dict(expanded.costs)
            row["relative_error"] = float(expanded.layers["relative_error"].mean())
            row["seconds"] = expanded.run["seconds"]
        rows.append(row)
        key = {name: row[name] for name in ("method", "sparsity", "experts")}
        window = pd.DataFrame({**key, "loss": result.window_losses})
        losses.append(window.rename_axis("window").reset_index())
        told(f"{arm.method} {arm.sparsity:g} k={arm.experts}: perplexity {result.value:.3f}")
    return Comparison(pd.DataFrame(rows), pd.concat(losses, ignore_index=True))


def _built(
    model: LanguageModel,
    calibration: CalibrationSet,
    text: EvaluationText,
    chosen: Sequence[Arm],
    seed: int,
    memory: int,
    dense: Perplexity,
) -> Iterator[tuple[Arm, Expansion | None, Perplexity]]:
    yield Arm("dense", 0.0, 1), None, dense
    for arm in chosen:
        pruner, router = METHODS[arm.method]
        expanded = expand(
            model,
            calibration,
            experts=arm.experts,
            sparsity=arm.sparsity,
            pruner=pruner,
            router=router,  # type: ignore[arg-type]
            seed=seed,
            memory=memory,
            evaluation=text,
            keep=False,
            progress=False,
        )
        if expanded.perplexity is not None:
            yield arm, expanded, expanded.perplexity
