"""Compare pruning methods and expansions at several sparsities, on one text."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput, unknown_name
from entangle.evaluation import EvaluationText, Perplexity, perplexity, perplexity_ratio
from entangle.expansion.expand import Expansion, expand
from entangle.models.loading import LanguageModel
from entangle.provenance import expanded as expanded_path
from entangle.provenance import read_manifest, read_table

KIND = "comparison"
DENSE = "dense"
OUTSIDE = "outside the range"
METHODS = {
    "magnitude": ("magnitude", "single"),
    "wanda": ("wanda", "single"),
    "sparsegpt": ("sparsegpt", "single"),
    "expansion": ("sparsegpt", "kmeans"),
    "expansion-random": ("sparsegpt", "random"),
}
"""Pruner and router of each method; those with a router are built for every number of experts."""

_COLUMNS = (
    "method", "sparsity", "experts", "perplexity", "ratio", "ratio_low", "ratio_high", "flops",
    "nonzeros", "bytes", "relative_error", "seconds",
)  # fmt: skip
_WINDOW_COLUMNS = ("method", "sparsity", "experts", "window", "loss")
_EQUAL_COLUMNS = {
    "method": "str", "sparsity": "float64", "experts": "int64", "nonzeros": "float64",
    "perplexity": "float64", "competitor": "str", "competitor_perplexity": "float64",
    "ratio": "float64",
}  # fmt: skip


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
    """One row an arm and window: method, sparsity, experts, window, loss (nats, summed over
    the window's predicted tokens)."""


def arms(methods: Sequence[str], sparsities: Sequence[float], experts: Sequence[int]) -> list[Arm]:
    """Return the models to build: methods without a router once, others for every count above 1.

    What is listed twice is built once. One expert of a method with a router is the plain method.

    Raises
    ------
    InvalidInput, UnknownName
        A method that does not exist, a number out of range, or nothing to build.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
    for sparsity in sparsities:
        if not 0.0 <= sparsity <= 1.0:
            raise InvalidInput(f"`sparsity` must be in [0, 1]; got {sparsity}.")
    for k in experts:
        if k < 1:
            raise InvalidInput(f"`experts` must be at least 1; got {k}.")
    routed = {method for method in methods if METHODS[method][1] != "single"}
    found = [
        Arm(method, sparsity, k)
        for sparsity in sparsities
        for method in methods
        for k in ([k for k in experts if k > 1] if method in routed else [1])
    ]
    if not found:
        raise InvalidInput(
            "there is nothing to build: name at least one method, one `sparsity` and, for methods "
            f"with a router, a number of `experts` above 1; got methods {list(methods)}, "
            f"sparsity {list(sparsities)} and experts {list(experts)}."
        )
    return list(dict.fromkeys(found))


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
    yield Arm(DENSE, 0.0, 1), None, dense
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


def at_equal_nonzeros(frame: pd.DataFrame) -> pd.DataFrame:
    """Compare every expansion with the plain method that stores as many non-zeros.

    The plain method (the same pruner, one expert) is known at some sparsities, and at sparsity 0 it
    is the dense model. In between, the logarithm of its perplexity is interpolated linearly in the
    stored non-zeros. An expansion that stores as many as the dense model, or more, is compared with
    the dense model.

    Parameters
    ----------
    frame
        `Comparison.frame`.

    Returns
    -------
    pandas.DataFrame
        One row an expansion: method, sparsity, experts, nonzeros (multiple of dense), perplexity,
        competitor (the plain method, ``dense``, or ``outside the range`` where the expansion stores
        fewer non-zeros than the sparsest plain model), competitor_perplexity (NaN outside the
        range), ratio (perplexity / competitor_perplexity).

    Raises
    ------
    InvalidInput
        Missing columns, or not exactly one row of the dense model.
    """
    missing = [name for name in (*_COLUMNS[:4], "nonzeros") if name not in frame.columns]
    if missing:
        raise InvalidInput(f"`frame` must be a table of `compare`; got one without {missing[0]!r}.")
    dense = frame[frame["method"] == DENSE]
    if len(dense) != 1:
        raise InvalidInput(f"`frame` must have one row of the dense model; got {len(dense)}.")
    rows = [_competition(row, frame) for _, row in frame[frame["experts"] > 1].iterrows()]
    return pd.DataFrame(rows, columns=list(_EQUAL_COLUMNS)).astype(_EQUAL_COLUMNS)


def _competition(row: pd.Series, frame: pd.DataFrame) -> dict[str, object]:
    plain = _plain_method(str(row["method"]))
    known = (frame["experts"] == 1) & np.isfinite(frame["perplexity"])
    curve = frame[known & frame["method"].isin([plain, DENSE])].sort_values("nonzeros")
    dense = frame[frame["method"] == DENSE].iloc[0]
    if row["nonzeros"] >= dense["nonzeros"]:
        competitor, value = DENSE, float(dense["perplexity"])
    elif curve.empty or row["nonzeros"] < curve["nonzeros"].iloc[0]:
        competitor, value = OUTSIDE, float("nan")
    else:
        logs = np.log(curve["perplexity"].to_numpy(np.float64))
        interpolated = np.interp(row["nonzeros"], curve["nonzeros"].to_numpy(np.float64), logs)
        competitor, value = plain, float(np.exp(interpolated))
    kept = {name: row[name] for name in ("method", "sparsity", "experts", "nonzeros", "perplexity")}
    ratio = float(row["perplexity"]) / value
    return {**kept, "competitor": competitor, "competitor_perplexity": value, "ratio": ratio}


def _plain_method(method: str) -> str:
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    wanted = (METHODS[method][0], "single")
    return next(name for name, made in METHODS.items() if made == wanted)


def load_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Load what ``entangle compare --out`` wrote.

    Raises
    ------
    InvalidInput
        If the folder is missing, of another kind or schema, incomplete or corrupt.
    """
    read_manifest(path, KIND)
    folder = expanded_path(path)
    return Comparison(
        read_table(folder / "comparison.parquet", _COLUMNS),
        read_table(folder / "windows.parquet", _WINDOW_COLUMNS),
    )
