"""Bootstrap intervals of correlation coefficients."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from entangle.errors import InvalidInput
from entangle.seeding import numpy_rng

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile bootstrap interval; NaN where it is undefined."""

    value: float
    """The estimate from all data."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Number of pairs used."""


def spearman_interval(
    x: Vector, y: Vector, *, seed: int = 0, n_boot: int = 500, level: float = 0.95
) -> Interval:
    """Return Spearman's rank correlation with a bootstrap interval over the pairs.

    Parameters
    ----------
    x, y
        Values of shape (n,); pairs with a NaN or infinity are left out.
    seed
        Seed of the resampling.
    n_boot
        Number of resamples; ranks are taken anew in each.
    level
        Probability that the interval covers.

    Returns
    -------
    Interval
        NaN below three pairs or where ``x`` or ``y`` does not vary.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise InvalidInput(f"`x` and `y` must be vectors of one length; got {x.shape}, {y.shape}.")
    if not 0 < level < 1 or n_boot < 1:
        raise InvalidInput(f"`level` must be in (0, 1), `n_boot` ≥ 1; got {level}, {n_boot}.")
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Interval(np.nan, np.nan, np.nan, len(x))
    index = numpy_rng(seed, "bootstrap").integers(len(x), size=(n_boot, len(x)))
    with np.errstate(invalid="ignore"):  # a resample may hold one value only
        resampled = _rank_correlation(x[index], y[index])
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    value = _rank_correlation(x[None], y[None])[0]
    return Interval(float(value), float(low), float(high), len(x))


def _rank_correlation(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Vector:
    """Return Spearman's coefficient of every row."""
    ranks = [rankdata(values, axis=1) for values in (x, y)]
    first, second = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    norm = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    result: Vector = (first * second).sum(axis=1) / norm
    return result
