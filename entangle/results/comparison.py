"""What a comparison found: its tables, and the expansions beside plain methods of their size."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.results.base import Result
from entangle.runs.provenance import read_table, special_tokens_of
from entangle.runs.sealing import integers, reals, shares, texts
from entangle.runs.tables import described
from entangle.seeding import numpy_rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "comparison"
DENSE = "dense"
UNIFORM = "uniform"
COMPARED_METHODS: Mapping[str, tuple[str, Literal["single", "kmeans", "random"]]] = {
    "magnitude": ("magnitude", "single"),
    "wanda": ("wanda", "single"),
    "sparsegpt": ("sparsegpt", "single"),
    "expansion": ("sparsegpt", "kmeans"),
    "expansion-random": ("sparsegpt", "random"),
}
"""Pruner and router of each method; those with a router are built for every number of experts."""
KEY = ("method", "sparsity", "experts", "allocation")
"""Columns that tell arms apart."""
OUTSIDE = "outside the range"

_ARM = {
    "method": texts(), "sparsity": shares(null=False), "experts": integers(1),
    "allocation": texts(optional=True),
}  # fmt: skip
_FRAME = {
    **_ARM, "perplexity": reals(0), "ratio": reals(0), "ratio_low": reals(0),
    "ratio_high": reals(0), "flops": reals(0), "nonzeros": reals(0), "bytes": reals(0),
    "relative_error": reals(0), "density": reals(0, optional=True),
    "token_bytes": reals(0, optional=True),
    "uniform_ratio": reals(0, optional=True),
    "uniform_low": reals(0, optional=True), "uniform_high": reals(0, optional=True),
}  # fmt: skip
_WINDOWS = {**_ARM, "window": integers(), "loss": reals(0)}
_SECONDS = {**_ARM, "seconds": reals(0)}
_EQUAL_COLUMNS = {
    "method": "str", "sparsity": "float64", "experts": "int64", "nonzeros": "float64",
    "perplexity": "float64", "competitor": "str", "competitor_perplexity": "float64",
    "ratio": "float64", "allocation": "str",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """A tidy table, and every window's loss for later tests.

    In its folder the seconds of every arm are in ``seconds.parquet``, so that the other tables are
    the same for every run of the same settings; `at_equal_nonzeros` is ``equal_nonzeros.parquet``.
    """

    KIND, _TITLE, _SHOWN = KIND, "Comparison of", 20
    _TABLES = {"comparison": _FRAME, "windows": _WINDOWS}  # noqa: RUF012

    frame: pd.DataFrame
    """One row an arm: method, sparsity, experts, allocation, perplexity, ratio to dense with its
    95 % interval, flops, nonzeros, bytes (multiples of dense), relative_error (mean over layers),
    density (multiply-adds a token of the layers in scope over the dense ones, routers, turns and
    low-rank rests included), token_bytes (of weights that a token reads, over the dense model's),
    seconds. NaN perplexity and costs: the method does not apply to the
    model, or cannot be that sparse. With allocations also uniform_ratio with uniform_low and
    uniform_high: the ratio to the
    perplexity of the same method, sparsity and experts without the allocation, with its paired
    interval."""
    windows: pd.DataFrame
    """One row an arm and window: method, sparsity, experts, allocation, window, loss (nats, summed
    over the window's predicted tokens)."""
    manifest: Mapping[str, object] = field(default_factory=dict)
    """Model, calibration set, evaluation protocol, arms, versions, seconds and peak memory."""

    @property
    def window_tokens(self) -> list[float]:
        """Tokens scored in each window: those of the manifest, or all alike."""
        evaluation = self.manifest.get("evaluation")
        known = evaluation.get("window_tokens") if isinstance(evaluation, Mapping) else None
        if known:
            return [float(one) for one in known]
        dense = self.frame[self.frame["method"] == DENSE].iloc[0]
        losses = self.windows.loc[self.windows["method"] == DENSE, "loss"]
        return [float(losses.sum()) / math.log(dense["perplexity"]) / len(losses)] * len(losses)

    @property
    def masks(self) -> bool:
        """Whether densities were measured, of methods that mask activations."""
        frame = self.frame
        if "density" not in frame.columns:
            return False
        less = frame["flops"] < frame["nonzeros"] - 1e-9
        return bool((less & (frame["experts"] == 1) & frame["density"].notna()).any())

    def plot(self, **options: Any) -> "Figure":
        """Draw perplexities at equal FLOPs and at equal memory; see `figure_comparison`."""
        from entangle.plotting import figure_comparison

        return figure_comparison(self.frame, **options)

    def write(self, folder: Path) -> None:
        """Write the files of `save` into a folder that exists."""
        seconds, equal = self.frame[[*KEY, "seconds"]], at_equal_nonzeros(self.frame)
        seconds.to_parquet(folder / "seconds.parquet", index=False)
        equal.to_parquet(folder / "equal_nonzeros.parquet", index=False)
        Result.write(replace(self, frame=self.frame.drop(columns="seconds")), folder)

    def _summed(self) -> pd.DataFrame:
        costs = ("flops", "nonzeros", "bytes")
        return self._told()[1].rename(columns={name: f"{name} / dense" for name in costs})

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        text = described(self.manifest, "evaluation", "source")
        lines = [
            f"{len(self.frame) - 1:,} models and the dense one, measured on {text}, "
            f"special tokens: {special_tokens_of(self.manifest, 'evaluation')}"
        ]
        return lines, self.frame.drop(columns="relative_error")

    @classmethod
    def _completed(
        cls, folder: Path, fields: dict[str, Any], _manifest: Mapping[str, object]
    ) -> dict[str, Any]:
        frame, windows = (_with_allocation(fields[name]) for name in ("frame", "windows"))
        if "seconds" not in frame.columns:
            seconds = read_table(folder / "seconds.parquet", _SECONDS)
            joined = frame[list(KEY)].merge(seconds, on=list(KEY), how="left")
            place = list(frame.columns).index("relative_error") + 1
            frame.insert(place, "seconds", joined["seconds"])
        return {"frame": frame, "windows": windows}

    def _fault(self) -> str | None:
        return "an arm is there twice" if self.frame.duplicated(list(KEY)).any() else None


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
    missing = [name for name in (*KEY[:3], "perplexity", "nonzeros") if name not in frame.columns]
    if missing:
        raise InvalidInput(f"`frame` must be a table of `compare`; got one without {missing[0]!r}.")
    frame = _with_allocation(frame)
    dense = frame[frame["method"] == DENSE]
    if len(dense) != 1:
        raise InvalidInput(f"`frame` must have one row of the dense model; got {len(dense)}.")
    on_top = frame["method"].str.contains(":") & frame["method"].map(made_with).isna()
    routed = (frame["experts"] > 1) & ~on_top
    rows = [_competition(row, frame) for _, row in frame[routed].iterrows()]
    return pd.DataFrame(rows, columns=list(_EQUAL_COLUMNS)).astype(_EQUAL_COLUMNS)


def _competition(row: pd.Series, frame: pd.DataFrame) -> dict[str, object]:
    plain = plain_method(str(row["method"]))
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


_SAVED = ("method", "experts", "allocation")
DEARER = (0.01, 0.05, 0.10)
"""Increases of perplexity at which `flops_saved` is told."""


def flops_saved(
    comparison: "Comparison", *, at: Sequence[float] = DEARER, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return how many of the dense model's FLOPs each method saves at some higher perplexities.

    The logarithm of a method's perplexity ratio is interpolated linearly in its FLOPs between
    neighbouring arms, from the dense model on; from there to the first arm that is dearer. Windows
    are resampled, the same for all arms, for a percentile interval of 95 %.

    Parameters
    ----------
    comparison
        Of at least one arm beside the dense one.
    at
        Increases of perplexity, 0.05 for 5 %.
    resamples
        Of the bootstrap over windows.
    seed
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        One row a method, number of experts, allocation and increase: method, experts, allocation,
        increase, saved (share of the dense model's FLOPs of all linear layers; 0 where even the
        densest arm is dearer and saves nothing), low, high, reached (whether an arm is dearer, so
        that nothing is extrapolated: otherwise ``saved`` is that of the sparsest arm, a lower
        bound).
    """
    frame, windows = comparison.frame, comparison.windows
    table = windows.pivot_table(index="window", columns=list(KEY), values="loss", sort=False)
    weights = np.ones((1 + resamples, len(table)))
    rng = numpy_rng(seed, "flops saved")
    weights[1:] = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), resamples)
    counts = np.asarray(comparison.window_tokens, np.float64)
    means = weights @ table.to_numpy() / (weights @ counts)[:, None]
    place: dict[object, int] = {key: i for i, key in enumerate(table.columns)}
    dense = means[:, place[_key(frame[frame["method"] == DENSE].iloc[0])]]
    rows = []
    for names, arms in frame[frame["method"] != DENSE].groupby(list(_SAVED), sort=False):
        arms = arms[np.isfinite(arms["perplexity"])].sort_values("flops", ascending=False)
        arms = arms[[_key(arm) in place for _, arm in arms.iterrows()]]
        if arms.empty:
            continue
        logs = np.stack([means[:, place[_key(a)]] - dense for _, a in arms.iterrows()], 1)
        flops = arms["flops"].to_numpy(np.float64)
        for increase in at:
            found = [_saved(one, flops, math.log1p(increase)) for one in logs]
            low, high = np.percentile(found[1:], [2.5, 97.5]) if resamples else (np.nan, np.nan)
            rows.append(
                {**dict(zip(_SAVED, names, strict=True)),
                 "increase": increase, "saved": found[0], "low": low, "high": high,
                 "reached": bool(logs[0].max() >= math.log1p(increase))}
            )  # fmt: skip
    columns = [*_SAVED, "increase", "saved", "low", "high", "reached"]
    return pd.DataFrame(rows, columns=columns)


def knees(frame: pd.DataFrame, *, most: float = 0.1) -> pd.DataFrame:
    """Return where perplexity begins to rise sharply with sparsity, for every method.

    The paper on essential sparsity (arXiv 2306.03805) reads a sharp drop off its figures; this is
    our definition, meant for a grid of 5 % steps.

    Parameters
    ----------
    frame
        `Comparison.frame`.
    most
        Rise of the logarithm of perplexity over the dense model's that is still none.

    Returns
    -------
    pandas.DataFrame
        One row a method, number of experts and allocation with at least 3 sparsities: method,
        experts, allocation, within (the largest sparsity up to which no arm has risen by more than
        ``most``; 0 if the first has), doubling (the largest sparsity not above ``within`` after
        which the slope is at least twice that before it, and rises; NaN if there is none), step
        (the largest gap between neighbours).
    """
    rows = []
    frame = _with_allocation(frame)
    for names, arms in frame[frame["method"] != DENSE].groupby(list(_SAVED), sort=False):
        arms = arms[np.isfinite(arms["ratio"]) & (arms["ratio"] > 0)].sort_values("sparsity")
        if len(arms) < 3:
            continue
        s = np.concatenate([[0.0], arms["sparsity"].to_numpy(np.float64)])
        logs = np.concatenate([[0.0], np.log(arms["ratio"].to_numpy(np.float64))])
        s, first = np.unique(s, return_index=True)
        logs = logs[first]
        risen = np.flatnonzero(logs > most)
        last = int(risen[0]) - 1 if len(risen) else len(s) - 1
        slopes = np.diff(logs) / np.diff(s)
        turns = [
            i for i in range(1, len(slopes))
            if i <= last and slopes[i] > 0 and slopes[i] >= 2 * slopes[i - 1]
        ]  # fmt: skip
        rows.append(
            {**dict(zip(_SAVED, names, strict=True)), "within": s[max(last, 0)],
             "doubling": s[turns[-1]] if turns else np.nan, "step": float(np.diff(s).max())}
        )  # fmt: skip
    return pd.DataFrame(rows, columns=[*_SAVED, "within", "doubling", "step"])


def _key(row: "pd.Series[Any]") -> tuple[object, ...]:
    return tuple(row[name] for name in KEY)


def _saved(logs: NDArray[np.float64], flops: NDArray[np.float64], limit: float) -> float:
    """Return 1 − the FLOPs at which a curve from (0, 1) first passes a limit."""
    before, at = 0.0, 1.0
    for value, cost in zip(logs.tolist(), flops.tolist(), strict=True):
        if cost >= 1.0 and value <= limit:
            continue
        if value > limit:
            if value <= before or cost >= at:
                return max(0.0, 1.0 - at)
            return float(1.0 - (at + (cost - at) * (limit - before) / (value - before)))
        before, at = value, cost
    return 1.0 - at


def made_with(method: str) -> tuple[str, str] | None:
    """Return pruner and router of a method of weights; None of others.

    ``expansion:NAME`` is an expansion by the router of this name.
    """
    if method in COMPARED_METHODS:
        return COMPARED_METHODS[method]
    first, _, router = method.partition(":")
    return (COMPARED_METHODS[first][0], router) if first == "expansion" and router else None


def plain_method(method: str) -> str:
    """Return the method with the same pruner and one expert."""
    if method.startswith("expansion:"):
        method = "expansion"
    method = choice("method", method, COMPARED_METHODS)
    wanted = (COMPARED_METHODS[method][0], "single")
    return next(name for name, made in COMPARED_METHODS.items() if made == wanted)


def load_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Load a comparison that `Comparison.save` wrote; errors as `Result.load`."""
    return Comparison.load(path)


def _with_allocation(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the column that tables made without allocations may lack."""
    return frame if "allocation" in frame.columns else frame.assign(allocation=UNIFORM)
