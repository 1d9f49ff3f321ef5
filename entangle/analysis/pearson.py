"""Pearson's correlation with a bootstrap interval."""

import numpy as np
from numpy.typing import NDArray

from entangle.checks import bootstrap
from entangle.errors import InvalidInput
from entangle.seeding import numpy_rng
from entangle.stats.intervals import Interval, percentiles

Floats = NDArray[np.float64]

_AT_ONCE = 2**20  # numbers drawn at a time
_NOTHING_LEFT = 1e-12  # share of the variance below which that of a resample is rounding


def pearson_interval(
    x: Floats, y: Floats, *, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return Pearson's correlation with a percentile bootstrap interval.

    Points are resampled with replacement.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).
    n_boot
        Number of resamples. Those in which ``x`` or ``y`` is constant are passed over.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Returns
    -------
    Interval
        NaN where there are fewer than 3 points, or ``x`` or ``y`` is constant.

    Raises
    ------
    InvalidInput
        Unequal lengths, or an option out of range.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    if x.ndim != 1 or x.shape != y.shape:
        raise InvalidInput(
            f"`x` and `y` must have one value for each point; got shapes {x.shape} and {y.shape}."
        )
    n_boot, level = bootstrap(n_boot, level)
    n = len(x)
    if n < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return Interval(np.nan, np.nan, np.nan)
    a, b = ((values - values.mean()) / values.std() for values in (x, y))
    rng, draws = numpy_rng(seed, "bootstrap"), []
    per_draw = max(1, _AT_ONCE // n)
    for start in range(0, n_boot, per_draw):
        chosen = rng.integers(n, size=(min(per_draw, n_boot - start), n))
        draws.append(_coefficients(a[chosen], b[chosen]))
    value = float(np.clip(a @ b / n, -1.0, 1.0))
    return Interval(value, *percentiles(np.concatenate(draws), level, otherwise=value))


def _coefficients(a: Floats, b: Floats) -> Floats:
    """Correlate the rows of two matrices; NaN where one is constant."""
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (a, b))
    squares = np.square(a).mean(axis=1), np.square(b).mean(axis=1)
    norm = np.sqrt(squares[0] * squares[1])
    norm[(squares[0] <= _NOTHING_LEFT) | (squares[1] <= _NOTHING_LEFT)] = np.nan
    found: Floats = (a * b).mean(axis=1) / norm
    return found
