"""Compare pruning methods and expansions at several sparsities, on one text."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pandas as pd

from entangle.allocation.allocation import Allocation
from entangle.allocation.even import even
from entangle.allocation.experts import mean_experts
from entangle.allocation.labels import nominal_sparsity
from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput, unknown_name
from entangle.evaluation import EvaluationText, Perplexity, perplexity, perplexity_ratio
from entangle.expansion.expand import Expansion, expand
from entangle.models.loading import LanguageModel
from entangle.provenance import expanded as expanded_path
from entangle.provenance import read_manifest, read_table
from entangle.stats.intervals import Interval

KIND = "comparison"
DENSE = "dense"
UNIFORM = "uniform"
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
    "ratio": "float64", "allocation": "str",
}  # fmt: skip
_EVEN = ("uniform_ratio", "uniform_low", "uniform_high")
_KEY = ("method", "sparsity", "experts", "allocation")

Named = tuple[str, Allocation]
"""What an allocation is called in the tables, and the allocation. Those of several sparsities may
have one name."""


@dataclass(frozen=True)
class Arm:
    """One model to build."""

    method: str
    """A key of `METHODS`."""
    sparsity: float
    """Share of zeros: in every row, or of all layers together with an allocation."""
    experts: int
    """Experts a layer (on average with an allocation that has its own); 1 without a router."""
    allocation: str = UNIFORM
    """Name of the allocation, or ``uniform``: ``sparsity`` in every row."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A tidy table, and every window's loss for later tests."""

    frame: pd.DataFrame
    """One row an arm: method, sparsity, experts, allocation, perplexity, ratio to dense with its
    95 % interval, flops, nonzeros, bytes (multiples of dense), relative_error (mean over layers),
    seconds. With allocations also uniform_ratio with uniform_low and uniform_high: the ratio to the
    perplexity of the same method, sparsity and experts without the allocation, with its paired
    interval."""
    windows: pd.DataFrame
    """One row an arm and window: method, sparsity, experts, allocation, window, loss (nats, summed
    over the window's predicted tokens)."""


def arms(
    methods: Sequence[str],
    sparsities: Sequence[float],
    experts: Sequence[int],
    *,
    allocations: Sequence[Named] = (),
) -> list[Arm]:
    """Return the models to build: methods without a router once, others for every count above 1.

    What is listed twice is built once. One expert of a method with a router is the plain method.

    Parameters
    ----------
    methods
        Keys of `METHODS`.
    sparsities
        Shares of zeros in [0, 1], the same in every row.
    experts
        Numbers of experts a layer.
    allocations
        Every method is built with each of them too. One that has numbers of experts of its own is
        built with those, in place of ``experts``.

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
    levels: list[tuple[float, str, Allocation | None]]
    levels = [(sparsity, UNIFORM, None) for sparsity in sparsities]
    levels += [(sparsity, name, one) for (name, sparsity), one in _by_name(allocations).items()]
    found = [
        Arm(method, sparsity, k, name)
        for sparsity, name, allocation in levels
        for method in methods
        for k in (_counts(allocation, experts) if method in routed else [1])
    ]
    if not found:
        raise InvalidInput(
            "there is nothing to build: name at least one method, one `sparsity` and, for methods "
            f"with a router, a number of `experts` above 1; got methods {list(methods)}, "
            f"sparsity {list(sparsities)} and experts {list(experts)}."
        )
    return list(dict.fromkeys(found))


def _by_name(allocations: Sequence[Named]) -> dict[tuple[str, float], Allocation]:
    """Return allocations by name and sparsity, which must tell them apart."""
    found: dict[tuple[str, float], Allocation] = {}
    for name, allocation in allocations:
        key = name, nominal_sparsity(allocation)
        if name == UNIFORM:
            raise InvalidInput(f"an allocation must not be called {UNIFORM!r}; rename it.")
        if key in found:
            raise InvalidInput(
                f"two allocations of sparsity {key[1]:g} are called {name!r} and could not be told "
                "apart; rename one."
            )
        found[key] = allocation
    return found


def _counts(allocation: Allocation | None, experts: Sequence[int]) -> list[int]:
    if allocation is None or allocation.experts is None:
        return [k for k in experts if k > 1]
    return [round(mean_experts(allocation))]


def compare(
    model: LanguageModel,
    calibration: CalibrationSet,
    text: EvaluationText,
    chosen: Sequence[Arm],
    *,
    allocations: Sequence[Named] = (),
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
    allocations
        Those that the arms were made with. All must be for the same layers, which all arms prune;
        the MLP linears without allocations. Uniform arms of an allocation's sparsity spread its
        very number of zeros evenly.
    seed
        Seed of the routers and of the bootstrap.
    memory
        As in `entangle.expand`.
    told
        Called with one line after each arm.
    """
    dense = perplexity(model, text)
    built = _built(
        model, calibration, text, chosen, seed=seed, memory=memory, allocations=allocations
    )
    rows, losses, known = [], [], dict[Arm, Perplexity]()
    for arm, expanded, result in chain([(Arm(DENSE, 0.0, 1), None, dense)], built):
        row = _row(arm, expanded, result, perplexity_ratio(result, dense, seed=seed))
        known[arm] = result
        even = known.get(replace(arm, allocation=UNIFORM))
        if arm.allocation != UNIFORM and even is not None:
            ratio = perplexity_ratio(result, even, seed=seed)
            row |= dict(zip(_EVEN, (ratio.value, ratio.low, ratio.high), strict=True))
        rows.append(row)
        key = {name: row[name] for name in _KEY}
        window = pd.DataFrame({**key, "loss": result.window_losses})
        losses.append(window.rename_axis("window").reset_index())
        told(f"{_label(arm)}: perplexity {result.value:.3f}")
    return Comparison(pd.DataFrame(rows), pd.concat(losses, ignore_index=True))


def _row(
    arm: Arm, expanded: Expansion | None, result: Perplexity, ratio: Interval
) -> dict[str, object]:
    row: dict[str, object] = {
        "method": arm.method,
        "sparsity": arm.sparsity,
        "experts": arm.experts,
        "allocation": arm.allocation,
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
    return row


def _label(arm: Arm) -> str:
    allocated = "" if arm.allocation == UNIFORM else f" {arm.allocation}"
    return f"{arm.method} {arm.sparsity:g} k={arm.experts}{allocated}"


Built = tuple[Arm, Expansion | None, Perplexity]
"""An arm, what was built for it, and its perplexity."""


def _built(
    model: LanguageModel,
    calibration: CalibrationSet,
    text: EvaluationText,
    chosen: Sequence[Arm],
    *,
    seed: int,
    memory: int,
    allocations: Sequence[Named],
) -> Iterator[Built]:
    layers, by_name = _layers(allocations), _by_name(allocations)
    evenly = {sparsity: even(one) for (_, sparsity), one in by_name.items()}
    for arm in chosen:
        pruner, router = METHODS[arm.method]
        allocation = by_name.get((arm.allocation, arm.sparsity), evenly.get(arm.sparsity))
        if allocation is not None and router == "single":
            allocation = replace(allocation, experts=None)
        expanded = expand(
            model,
            calibration,
            experts=arm.experts,
            sparsity=arm.sparsity,
            pruner=pruner,
            layers="all" if layers is None else layers,
            proj="mlp" if layers is None else None,
            allocation=allocation,
            router=router,  # type: ignore[arg-type]
            seed=seed,
            memory=memory,
            evaluation=text,
            keep=False,
            progress=False,
        )
        if expanded.perplexity is not None:
            yield arm, expanded, expanded.perplexity


def _layers(allocations: Sequence[Named]) -> list[str] | None:
    """Return the layers of all allocations, None without any."""
    first: tuple[str, list[str]] | None = None
    for name, allocation in allocations:
        layers = list(allocation.zeros)
        first = first or (name, layers)
        if layers != first[1]:
            raise InvalidInput(
                f"allocations that are compared must be for the same layers; {first[0]!r} has "
                f"{len(first[1])} and {name!r} has {len(layers)}, or others."
            )
    return None if first is None else first[1]


def at_equal_nonzeros(frame: pd.DataFrame) -> pd.DataFrame:
    """Compare every expansion with the plain method that stores as many non-zeros.

    The plain method (the same pruner, one expert) is known at some sparsities, and at sparsity 0 it
    is the dense model. In between, the logarithm of its perplexity is interpolated linearly in the
    stored non-zeros. An expansion that stores as many as the dense model, or more, is compared with
    the dense model. Plain models made with an allocation are not on the curve.

    Parameters
    ----------
    frame
        `Comparison.frame`; without a column ``allocation``, all its rows are uniform.

    Returns
    -------
    pandas.DataFrame
        One row an expansion: method, sparsity, experts, nonzeros (multiple of dense), perplexity,
        competitor (the plain method, ``dense``, or ``outside the range`` where the expansion stores
        fewer non-zeros than the sparsest plain model), competitor_perplexity (NaN outside the
        range), ratio (perplexity / competitor_perplexity), allocation (of the expansion).

    Raises
    ------
    InvalidInput
        Missing columns, or not exactly one row of the dense model.
    """
    missing = [name for name in (*_COLUMNS[:4], "nonzeros") if name not in frame.columns]
    if missing:
        raise InvalidInput(f"`frame` must be a table of `compare`; got one without {missing[0]!r}.")
    frame = _with_allocation(frame)
    dense = frame[frame["method"] == DENSE]
    if len(dense) != 1:
        raise InvalidInput(f"`frame` must have one row of the dense model; got {len(dense)}.")
    rows = [_competition(row, frame) for _, row in frame[frame["experts"] > 1].iterrows()]
    return pd.DataFrame(rows, columns=list(_EQUAL_COLUMNS)).astype(_EQUAL_COLUMNS)


def _competition(row: pd.Series, frame: pd.DataFrame) -> dict[str, object]:
    plain = _plain_method(str(row["method"]))
    known = (frame["experts"] == 1) & np.isfinite(frame["perplexity"])
    known &= frame["allocation"] == UNIFORM
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
    found = {"competitor": competitor, "competitor_perplexity": value, "ratio": ratio}
    return {**kept, **found, "allocation": row["allocation"]}


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
        _with_allocation(read_table(folder / "comparison.parquet", _COLUMNS)),
        _with_allocation(read_table(folder / "windows.parquet", _WINDOW_COLUMNS)),
    )


def _with_allocation(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the column that tables made without allocations may lack."""
    return frame if "allocation" in frame.columns else frame.assign(allocation=UNIFORM)
