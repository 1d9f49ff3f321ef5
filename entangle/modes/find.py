"""The modes of a distribution: peaks of a smooth density, parted at its valleys."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.signal import find_peaks

from entangle.checks import whole
from entangle.errors import InvalidInput
from entangle.modes.density import Density, kernel_density

Floats = NDArray[np.float64]

PROMINENCE = 4.0
"""Standard errors by which a valley lies below both its peaks, on the root of the density."""
DEPTH = 0.1
"""Share of the lower peak by which a valley lies below it."""
LEAST_SHARE = 0.005
"""Share of the values that a mode holds."""


def find_modes(outputs: Float[np.ndarray, " values"], *, max_modes: int = 4) -> pd.DataFrame:
    """Part values into the modes of their distribution.

    The density is estimated by `entangle.modes.density.kernel_density`. Its local maxima are joined
    across a valley, the least prominent one first, until every valley left (1) lies at least 4
    standard errors below both peaks beside it, measured on the root of the density, whose noise
    does not depend on its height, (2) lies at least 10 % below the lower of them, (3) parts modes
    with at least 0.5 % of the values each, and (4) there are at most ``max_modes`` modes.

    Parameters
    ----------
    outputs
        Finite values, such as a neuron's outputs on all tokens, in any order.
    max_modes
        Largest number of modes.

    Returns
    -------
    pandas.DataFrame
        One row a mode, in ascending order, at least one: ``mode`` (from 0), ``center`` (where the
        density peaks), ``left`` and ``right`` (the deepest points of the valleys beside it; ∓∞ at
        the ends; a value on a border belongs to the mode on its right), ``tokens`` (values inside)
        and ``share`` (of all values). Values that are equal, or differ by rounding only, are one
        mode.

    Raises
    ------
    InvalidInput
        If there is no value, or one is not finite, or ``max_modes`` is below 1.

    Notes
    -----
    The standard error takes the values for independent. Of 1,000 independent values a mode is found
    from about 2 % on, of 10,000 or more from 0.5 % on.
    """
    max_modes = whole("max_modes", max_modes, least=1)
    ordered = np.sort(np.asarray(outputs, dtype=np.float64))
    if ordered.size == 0:
        raise InvalidInput("`outputs` must hold at least one value; got none.")
    bad = int(np.count_nonzero(~np.isfinite(ordered)))
    if bad:
        raise InvalidInput(
            f"`outputs` must be finite to have modes; {bad} of {len(ordered)} are NaN or infinite."
        )
    rounding = 4 * np.finfo(outputs.dtype).eps * abs(ordered.mean())
    if ordered[0] == ordered[-1] or ordered.std() <= rounding:
        return _table(ordered, ordered[[len(ordered) // 2]], np.empty(0))
    density = kernel_density(ordered)
    split = _Split.of(density)
    split.join_shallow()
    split.join_small(ordered, max_modes)
    return _table(ordered, density.x[split.peaks], density.x[split.valleys])


def mode_of(outputs: Float[np.ndarray, " values"], modes: pd.DataFrame) -> NDArray[np.int64]:
    """Return the mode that every value lies in, by a table of `find_modes`."""
    borders = modes["left"].to_numpy(np.float64)[1:]
    return np.searchsorted(borders, outputs.astype(np.float64), side="right")


def _table(ordered: Floats, centers: Floats, borders: Floats) -> pd.DataFrame:
    ends = np.concatenate([[0], np.searchsorted(ordered, borders, side="left"), [len(ordered)]])
    tokens = np.diff(ends)
    return pd.DataFrame(
        {
            "mode": np.arange(len(centers)),
            "center": centers,
            "left": np.concatenate([[-np.inf], borders]),
            "right": np.concatenate([borders, [np.inf]]),
            "tokens": tokens,
            "share": tokens / len(ordered),
        }
    )


@dataclass(eq=False)
class _Split:
    """Peaks of a density and the valleys between neighbours, which are joined step by step."""

    density: Density
    peaks: list[int]
    """Grid indices, ascending."""
    valleys: list[int]
    """Grid indices, one fewer."""
    prominence: list[float]
    """Of every valley below the peaks beside it, in standard errors; the smaller of the two."""

    @classmethod
    def of(cls, density: Density) -> "_Split":
        height = density.height
        peaks: list[int] = find_peaks(height)[0].tolist() or [int(height.argmax())]
        valleys = [_lowest(height, a, b) for a, b in pairwise(peaks)]
        split = cls(density, peaks, valleys, [])
        split.prominence = [split._prominence(i) for i in range(len(valleys))]
        return split

    def join_shallow(self) -> None:
        """Join the least prominent valley's modes until all valleys are prominent."""
        while self.valleys:
            least = int(np.argmin(self.prominence))
            if self.prominence[least] >= PROMINENCE:
                return
            self._join(least)

    def join_small(self, ordered: Floats, max_modes: int) -> None:
        """Join modes that are too small, then valleys too flat, then modes that are too many."""
        while self.valleys:
            height, n = self.density.height, len(self.valleys)
            borders = np.searchsorted(ordered, self.density.x[self.valleys])
            tokens = np.diff(np.concatenate([[0], borders, [len(ordered)]]))
            flatness = [
                height[v] / min(height[self.peaks[i : i + 2]]) for i, v in enumerate(self.valleys)
            ]
            smallest = int(tokens.argmin())
            if tokens[smallest] < LEAST_SHARE * len(ordered):
                beside = [i for i in (smallest - 1, smallest) if 0 <= i < n]
                self._join(max(beside, key=lambda i: float(height[self.valleys[i]])))
            elif max(flatness) > 1 - DEPTH:
                self._join(int(np.argmax(flatness)))
            elif n >= max_modes:
                self._join(int(np.argmin(self.prominence)))
            else:
                return

    def _join(self, valley: int) -> None:
        """Remove a valley and the lower of its peaks."""
        height = self.density.height
        lower = valley + int(height[self.peaks[valley]] >= height[self.peaks[valley + 1]])
        del self.peaks[lower], self.valleys[valley], self.prominence[valley]
        for i in (valley - 1, valley):
            if 0 <= i < len(self.valleys):
                self.prominence[i] = self._prominence(i)

    def _prominence(self, valley: int) -> float:
        """Compare a valley with both its peaks, at the resolution of the peak."""
        beside = self.peaks[valley : valley + 2]
        depth = np.sqrt(self.density.height[beside]) - np.sqrt(
            self.density.height[self.valleys[valley]]
        )
        return float((depth / (math.sqrt(2) * self.density.noise[beside])).min())


def _lowest(height: Floats, first: int, last: int) -> int:
    """Return the middle of the lowest points between two peaks."""
    between = height[first : last + 1]
    lowest = np.flatnonzero(between == between.min())
    return first + int(lowest[len(lowest) // 2])
