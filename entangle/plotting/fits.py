"""Straight lines through points, with bootstrap intervals: small functions, no drawing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entangle.errors import InvalidInput
from entangle.plotting.summaries import Floats
from entangle.seeding import numpy_rng
from entangle.stats.intervals import Interval, percentiles, spearman_interval


@dataclass(frozen=True)
class LineFit:
    """A least-squares line, and how sure it is."""

    x: Floats
    """(places,) where the line is drawn, ascending."""
    y: Floats
    """(places,) its height."""
    low: Floats
    """(places,) lower end of the bootstrap interval of the height."""
    high: Floats
    """(places,) upper end."""
    slope: float
    """Of the line."""
    r2: Interval
    """Pearson's coefficient squared."""
    spearman: Interval
    """Spearman's rank correlation."""
    n: int
    """Points."""


def fit_line(
    x: Floats, y: Floats, *, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> LineFit:
    """Fit a line by least squares, with percentile bootstrap intervals over points.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).
    n_boot, seed, level
        Of the bootstrap, as in `entangle.stats.intervals.spearman_interval`.

    Raises
    ------
    InvalidInput
        Fewer than 3 points, a constant ``x`` or ``y``, or an option out of range.
    """
    spearman = spearman_interval(x, y, n_boot=n_boot, seed=seed, level=level)
    places = np.linspace(x.min(), x.max(), 50)
    rng, n = numpy_rng(seed, "line bootstrap"), len(x)
    z, t = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    slopes, middles, squares = np.empty((3, n_boot))
    for draw in range(n_boot):
        chosen = rng.integers(n, size=n)
        slopes[draw], middles[draw], squares[draw] = _line(z[chosen], t[chosen])
    slope, middle, r2 = _line(z, t)
    grid = (places - x.mean()) / x.std()
    heights = middles[:, None] + slopes[:, None] * grid
    tail = 50.0 * (1.0 - level)
    low, high = np.nanpercentile(heights, [tail, 100.0 - tail], axis=0)
    return LineFit(
        x=places,
        y=y.mean() + y.std() * (middle + slope * grid),
        low=y.mean() + y.std() * low,
        high=y.mean() + y.std() * high,
        slope=slope * y.std() / x.std(),
        r2=Interval(r2, *percentiles(squares, level, otherwise=r2)),
        spearman=spearman,
        n=n,
    )


def _line(x: Floats, y: Floats) -> tuple[float, float, float]:
    """Return slope, intercept and R²; NaN where ``x`` or ``y`` is constant."""
    dx, dy = x - x.mean(), y - y.mean()
    xx, yy, xy = dx @ dx, dy @ dy, dx @ dy
    if xx <= 0.0 or yy <= 0.0:
        return np.nan, np.nan, np.nan
    slope = xy / xx
    return float(slope), float(y.mean() - slope * x.mean()), float(xy * xy / (xx * yy))


def lower_front(x: Floats, y: Floats) -> NDArray[np.intp]:
    """Return which points no other one beats: none has a ``y`` as low at an ``x`` as high.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).

    Returns
    -------
    numpy.ndarray
        Indices of the points of the front by ascending ``x``; of equal points the first.
    """
    order = np.lexsort((np.arange(len(x)), y, -x))  # from the right, the lowest first
    best = np.minimum.accumulate(y[order])
    first = np.append(True, y[order][1:] < best[:-1])
    front: NDArray[np.intp] = order[first][::-1]
    return front


def power_law(x: Floats, y: Floats) -> tuple[float, float]:
    """Return scale and exponent of ``y = scale * x ** exponent``, least squares of logarithms.

    Raises
    ------
    InvalidInput
        Fewer than 2 different ``x``, or a value that is not positive.
    """
    if len(np.unique(x)) < 2 or not (x > 0.0).all() or not (y > 0.0).all():
        raise InvalidInput(
            "a power law must have positive values at 2 different places or more; got "
            f"{len(np.unique(x))} places and a smallest value of {min(x.min(), y.min()):.4g}."
        )
    exponent, log_scale = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_scale)), float(exponent)
