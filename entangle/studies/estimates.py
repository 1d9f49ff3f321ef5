"""Intervals of what a study measures over layers, rows and pairs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student

from entangle.errors import InvalidInput
from entangle.seeding import numpy_rng
from entangle.stats.intervals import Interval, percentiles

Floats = NDArray[np.float64]


def student_mean(values: Floats) -> Interval:
    """Return a mean with Student's interval; no ends from a single value."""
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, np.nan, np.nan)
    half = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half)


def over_layers(
    values: "pd.Series[float]", seed: int, other: "pd.Series[float] | None" = None
) -> Interval:
    """Return a median, less that of others, with a bootstrap over whole layers.

    Rows of one layer share its inputs, so that layers are resampled; of one layer, its rows are.
    No ends from a single row.
    """
    parts = [_by_layer(one) for one in (values, other) if one is not None]
    names = [name for name in parts[0] if all(name in part for part in parts)]
    if not names:
        raise InvalidInput("no row has a value to compare; measure more tokens or layers.")

    def statistic(of: Sequence[list[Floats]]) -> float:
        medians = [float(np.median(np.concatenate(one))) for one in of]
        return medians[0] - (medians[1] if len(medians) > 1 else 0.0)

    value = statistic([[part[name] for name in names] for part in parts])
    if len(names) == 1 and min(len(part[names[0]]) for part in parts) < 2:
        return Interval(value, np.nan, np.nan)
    rng, draws = numpy_rng(seed, "study", "layers"), []
    for _ in range(1000):
        if len(names) > 1:
            drawn = rng.integers(len(names), size=len(names))
            draws.append(statistic([[part[names[i]] for i in drawn] for part in parts]))
        else:
            rows = [part[names[0]] for part in parts]
            again = [[one[rng.integers(len(one), size=len(one))]] for one in rows]
            draws.append(statistic(again))
    return Interval(value, *percentiles(draws, 0.95))


def _by_layer(values: "pd.Series[float]") -> dict[str, Floats]:
    groups = values.groupby(level="layer", sort=False)
    return {str(name): np.asarray(one, np.float64) for name, one in groups}


def less(a: Interval, b: Interval) -> Interval:
    """Return the difference of two independent estimates, half widths added in squares."""
    low = np.hypot(a.value - a.low, b.high - b.value)
    high = np.hypot(a.high - a.value, b.value - b.low)
    value = a.value - b.value
    return Interval(value, float(value - low), float(value + high))


def welch(a: Floats, b: Floats) -> Interval:
    """Return the difference of two means with Welch's interval; no ends from a single value."""
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Interval(value, np.nan, np.nan)
    parts = np.array([one.var(ddof=1) / len(one) for one in (a, b)])
    if parts.sum() == 0:
        return Interval(value, value, value)
    free = parts.sum() ** 2 / (parts**2 / np.array([len(a) - 1, len(b) - 1])).sum()
    half = float(student.ppf(0.975, free) * np.sqrt(parts.sum()))
    return Interval(value, value - half, value + half)
