"""Rank correlation of two quantities beyond what others explain of both."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from entangle.checks import bootstrap
from entangle.errors import InvalidInput
from entangle.seeding import numpy_rng
from entangle.stats.intervals import Interval, percentiles

Floats = NDArray[np.float64]

_NOTHING_LEFT = 1e-8  # share of the spread of ranks below which residuals are rounding


def partial_spearman(
    x: Floats,
    y: Floats,
    given: Floats,
    *,
    n_boot: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the partial rank correlation of ``x`` and ``y`` with a bootstrap interval.

    All columns are replaced by their ranks (ties share their mean rank), the ranks of ``given`` are
    regressed out of those of ``x`` and ``y`` by least squares with an intercept, and the residuals
    are correlated. Points are resampled with replacement and ranked anew.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).
    given
        What is held fixed, shape (points, columns); columns may depend on one another.
    n_boot
        Number of resamples. Those in which ``given`` determines the ranks of ``x`` or ``y`` have no
        coefficient and are passed over.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Raises
    ------
    InvalidInput
        Shapes that do not fit, fewer than 3 points more than columns, a value that is not finite,
        an ``x`` or ``y`` whose ranks ``given`` determines, or an option out of range.

    Notes
    -----
    Kendall and Stuart, The Advanced Theory of Statistics, volume 2, chapter 27 (partial
    correlation); percentile interval as in `entangle.stats.intervals.spearman_interval`.
    """
    _check(x, y, given, n_boot=n_boot, level=level)
    found = partial_interval(x, y, given, n_boot=n_boot, seed=seed, level=level)
    if np.isnan(found.value):
        raise InvalidInput(
            "a partial correlation must have `x` and `y` that `given` does not determine; got one "
            f"that it does, over {len(x)} points: leave a column of `given` out."
        )
    return found


def partial_interval(
    x: Floats, y: Floats, given: Floats, *, n_boot: int, seed: int, level: float
) -> Interval:
    """As `partial_spearman`, unchecked; all is NaN where ``given`` determines ``x`` or ``y``."""
    table = np.column_stack([x, y, given])
    value = _coefficient(table)
    if np.isnan(value):
        return Interval(value, np.nan, np.nan)
    rng, n = numpy_rng(seed, "partial bootstrap"), len(x)
    draws = [_coefficient(table[rng.integers(n, size=n)]) for _ in range(n_boot)]
    return Interval(value, *percentiles(draws, level, otherwise=value))


def _coefficient(table: Floats) -> float:
    """Correlate the ranks of the first two columns given the others; NaN if they are determined."""
    ranks = rankdata(table, axis=0) - 0.5 * (len(table) + 1)
    pair, given = ranks[:, :2], ranks[:, 2:]
    left = pair - given @ np.linalg.lstsq(given, pair, rcond=None)[0]
    before, after = np.linalg.norm(pair, axis=0), np.linalg.norm(left, axis=0)
    if (after <= _NOTHING_LEFT * before).any():
        return np.nan
    return float(left[:, 0] @ left[:, 1] / after.prod())


def _check(x: Floats, y: Floats, given: Floats, *, n_boot: int, level: float) -> None:
    n_boot, level = bootstrap(n_boot, level)
    if x.ndim != 1 or x.shape != y.shape or given.ndim != 2 or len(given) != len(x):
        raise InvalidInput(
            "`x`, `y` and `given` must have shapes (points,), (points,) and (points, columns); "
            f"got {x.shape}, {y.shape} and {given.shape}."
        )
    if len(x) < given.shape[1] + 3:
        raise InvalidInput(
            f"a partial correlation given {given.shape[1]} columns must have at least "
            f"{given.shape[1] + 3} points; got {len(x)}: score more neurons."
        )
    if not all(np.isfinite(values).all() for values in (x, y, given)):
        raise InvalidInput("values to correlate must be finite; got NaN or infinity: drop them.")
