"""What a comparison found: its tables, and the expansions beside plain methods of their size."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.results.base import Result
from entangle.runs.provenance import read_table, special_tokens_of
from entangle.runs.sealing import integers, reals, shares, texts
from entangle.runs.tables import described

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
    "relative_error": reals(0), "uniform_ratio": reals(0, optional=True),
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
    seconds. With allocations also uniform_ratio with uniform_low and uniform_high: the ratio to the
    perplexity of the same method, sparsity and experts without the allocation, with its paired
    interval."""
    windows: pd.DataFrame
    """One row an arm and window: method, sparsity, experts, allocation, window, loss (nats, summed
    over the window's predicted tokens)."""
    manifest: Mapping[str, object] = field(default_factory=dict)
    """Model, calibration set, evaluation protocol, arms, versions, seconds and peak memory."""

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
    rows = [_competition(row, frame) for _, row in frame[frame["experts"] > 1].iterrows()]
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


def plain_method(method: str) -> str:
    """Return the method with the same pruner and one expert."""
    method = choice("method", method, COMPARED_METHODS)
    wanted = (COMPARED_METHODS[method][0], "single")
    return next(name for name, made in COMPARED_METHODS.items() if made == wanted)


def load_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Load a comparison that `Comparison.save` wrote; errors as `Result.load`."""
    return Comparison.load(path)


def _with_allocation(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the column that tables made without allocations may lack."""
    return frame if "allocation" in frame.columns else frame.assign(allocation=UNIFORM)
