"""Slow, obvious versions of the distance of a sample from a Gaussian.

They integrate |F − Φ| along the x axis, where the package integrates quantile functions.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]


def standardised(y: Array) -> Array:
    """Subtract the mean and divide by the population standard deviation."""
    y = np.asarray(y, dtype=np.float64)
    deviations = y - y.mean()
    scaled: Array = deviations / np.sqrt(np.mean(deviations**2))
    return scaled


def _density(x: float) -> float:
    return float(np.exp(-x * x / 2) / np.sqrt(2 * np.pi))


def _quadrature(level: float, start: float, end: float) -> float:
    """Integrate |level − Φ| from start to end; the sign changes where Φ reaches the level."""
    crossing = float(ndtri(level))
    points = [start, crossing, end] if start < crossing < end else [start, end]
    total = 0.0
    for a, b in pairwise(points):
        value, _ = quad(lambda x: abs(level - ndtr(x)), a, b, epsabs=1e-14, epsrel=1e-13)
        total += value
    return total


def w1_by_quadrature(z: Array) -> float:
    """Integrate |F_n − Φ| numerically, one interval between neighbouring values at a time."""
    ordered = np.sort(np.asarray(z, dtype=np.float64))
    below, _ = quad(ndtr, -np.inf, ordered[0], epsabs=1e-14)
    above, _ = quad(lambda x: ndtr(-x), ordered[-1], np.inf, epsabs=1e-14)
    total = float(below + above)
    for i in range(1, len(ordered)):
        total += _quadrature(i / len(ordered), float(ordered[i - 1]), float(ordered[i]))
    return total


def w1_along_x(z: Array, weights: Array | None = None) -> float:
    """Integrate |F_n − Φ| with the antiderivative xΦ(x) + φ(x), for large or weighted samples."""
    z = np.asarray(z, dtype=np.float64)
    order = np.argsort(z)
    z = z[order]
    weights = np.full(len(z), 1 / len(z)) if weights is None else weights[order] / weights.sum()
    level = np.cumsum(weights)[:-1].clip(0, 1)
    start, end = z[:-1], z[1:]
    middle = ndtri(level).clip(start, end)

    def primitive(x: Array) -> Array:
        value: Array = x * ndtr(x) + np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
        return value

    left = level * (middle - start) - (primitive(middle) - primitive(start))
    right = level * (end - middle) - (primitive(end) - primitive(middle))
    first, last = float(z[0]), float(z[-1])
    tails = first * ndtr(first) + _density(first) - last * ndtr(-last) + _density(last)
    return float(np.abs(left).sum() + np.abs(right).sum() + tails)


def w1_of_histogram(counts: Array, edges: Array, *, steps: int = 4000) -> float:
    """Integrate |F − Φ| where each bin's mass is spread evenly, by the midpoint rule."""
    cumulative = np.concatenate([[0.0], np.cumsum(counts / counts.sum())])
    total = 0.0
    for i in range(len(counts)):
        x = edges[i] + (np.arange(steps) + 0.5) / steps * (edges[i + 1] - edges[i])
        distribution = np.interp(x, edges[i : i + 2], cumulative[i : i + 2])
        total += float(np.abs(distribution - ndtr(x)).mean() * (edges[i + 1] - edges[i]))
    below, _ = quad(ndtr, -np.inf, edges[0])
    above, _ = quad(lambda x: ndtr(-x), edges[-1], np.inf)
    return total + float(below + above)


def exact_wd(y: Array) -> float:
    """WD of raw outputs: standardise, then integrate along x."""
    return w1_along_x(standardised(y))


def jackknife(y: Array, groups: NDArray[np.int64]) -> float:
    """Return the standard error of WD, leaving out each group in turn."""
    present = np.unique(groups)
    without = [exact_wd(y[groups != g]) for g in present]
    centre = sum(without) / len(present)
    factor = (len(present) - 1) / len(present)
    return float(np.sqrt(factor * sum((value - centre) ** 2 for value in without)))
