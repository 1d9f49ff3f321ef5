"""A smooth density of many values on a grid that widens towards the tails."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.ndimage import gaussian_filter1d

BANDWIDTH = 0.9
"""Silverman's factor: the bandwidth at the centre is 0.9 · scale · n^(−1/5)."""
LINEAR = 2.0
"""The bandwidth grows beyond so many scales from the median."""

_NORMAL_IQR = 1.3489795003921634
_NORMAL_TENTH = 0.25132269371  # 2 Φ⁻¹(0.55)
_NARROWEST = 4
_ROUGHNESS = 1 / (2 * math.sqrt(math.pi))  # ∫K² of the Gaussian kernel
_CELLS = 16  # a bandwidth
_MARGIN = 5  # bandwidths beyond the outermost values
_MOST_CELLS = 2**18


@dataclass(frozen=True, eq=False)
class Density:
    """A kernel density estimate at the points of a grid."""

    x: Float64[np.ndarray, " cells"]
    """Grid points in ascending order, in the values' units."""
    height: Float64[np.ndarray, " cells"]
    """Density, per unit of the values."""
    noise: Float64[np.ndarray, " cells"]
    """Standard deviation of the square root of the density, were the values independent."""


def kernel_density(ordered: Float64[np.ndarray, " values"]) -> Density:
    """Estimate the density of values that are not all equal.

    The values are mapped by ``u = asinh((y − median) / (2 · scale))``, counted in cells of a
    sixteenth of a bandwidth, smoothed by a Gaussian, and mapped back. In the values' units the
    bandwidth is therefore ``0.9 · scale · n^(−1/5)`` (Silverman's rule) at the median and grows in
    proportion to the distance from it in the tails, where values lie thin.

    ``scale`` is the least of the standard deviation, the interquartile range / 1.349 and the length
    of the shortest interval with a tenth of the values / 0.2513, all of which are σ of a Gaussian;
    the last one, which sees the width of a single group among several, counts as a quarter of the
    second at least. It is the standard deviation where half of the values are equal.

    Parameters
    ----------
    ordered
        Finite values in ascending order, at least two of them different.

    References
    ----------
    B. W. Silverman, Density Estimation for Statistics and Data Analysis, 1986, eq. 3.31. The
    variance of the root of the density, ``∫K² / (4 n h)``, follows from that of the density,
    ``f ∫K² / (n h)``.
    """
    n = len(ordered)
    median = np.quantile(ordered, 0.5)
    unit = LINEAR * bandwidth_scale(ordered)
    u = np.arcsinh((ordered - median) / unit)
    width = BANDWIDTH / LINEAR * n**-0.2
    cell = max(width / _CELLS, (u[-1] - u[0]) / _MOST_CELLS)
    start = u[0] - _MARGIN * width
    cells = math.ceil((u[-1] + _MARGIN * width - start) / cell)
    counts = np.bincount(((u - start) / cell).astype(np.int64), minlength=cells).astype(np.float64)
    smooth = gaussian_filter1d(counts, width / cell, mode="constant")
    grid = start + (np.arange(len(counts)) + 0.5) * cell
    stretch = unit * np.cosh(grid)  # of the values' axis
    return Density(
        x=median + unit * np.sinh(grid),
        height=smooth / (n * cell * stretch),
        noise=np.sqrt(_ROUGHNESS / (4 * n * width * stretch)),
    )


def bandwidth_scale(ordered: Float64[np.ndarray, " values"]) -> float:
    """Return the scale that sets the bandwidth, in the values' units; see `kernel_density`."""
    n, deviation = len(ordered), float(ordered.std())
    low, high = np.quantile(ordered, [0.25, 0.75])
    core = float(high - low) / _NORMAL_IQR
    if core <= 0:
        return deviation
    tenth = max(n // 10, 1)
    group = float((ordered[tenth:] - ordered[:-tenth]).min()) / _NORMAL_TENTH
    return min(deviation, core, max(group, core / _NARROWEST))
