"""How far two rankings of the same things agree, with bootstrap intervals.

Spearman's and Kendall's coefficients, and the share that the two top sets have in common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entangle.checks import bootstrap, share
from entangle.seeding import numpy_rng
from entangle.stats.intervals import Floats, Interval, percentiles, weighted_spearman

NOTHING = Interval(np.nan, np.nan, np.nan)
"""What cannot be computed: fewer than 3 points, or all of them equal on a side."""


@dataclass(frozen=True)
class Agreement:
    """How far two rankings agree."""

    spearman: Interval
    """Rank correlation ρ, in [-1, 1]."""
    kendall: Interval
    """τ-b: how much likelier a pair is in the same order than in the other one, in [-1, 1]."""
    overlaps: Mapping[float, Interval]
    """Share of the top set of the one that is in that of the other, by the share of all things
    that is taken for the top; by chance it would be that share."""


def rank_agreement(
    x: Floats,
    y: Floats,
    *,
    tops: Sequence[float] = (0.01, 0.03, 0.1),
    n_boot: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Agreement:
    """Measure how far two rankings agree; all intervals are of the same resamples.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,); the largest rank first.
    tops
        Shares in (0, 1] of the points that are taken for the top, at least one point.
    n_boot, seed, level
        Resamples of the points with replacement, what seeds them, and the probability mass of the
        percentile intervals.

    Returns
    -------
    Agreement
        All NaN below 3 points or where a side has one value only.

    Raises
    ------
    InvalidInput
        If an option is out of range.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Kendall's numerator
    is a mean over pairs; its resamples are taken to first order, by every point's own mean over the
    pairs that it is in (Hoeffding, 1948), which is right up to terms of 1 / points; its ties are
    resampled as they are.
    """
    n_boot, level = bootstrap(n_boot, level)
    tops = [share("tops", top, zero=False) for top in tops]
    n = len(x)
    if n < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return Agreement(NOTHING, NOTHING, dict.fromkeys(tops, NOTHING))
    groups = [np.unique(values, return_inverse=True)[1] for values in (x, y)]
    kendall, leading = _Kendall.of(*groups), _Leading.of(x, y)

    def measured(repeats: NDArray[np.float64]) -> list[float]:
        found = [weighted_spearman(groups, repeats), kendall.of_resample(repeats)]
        return [*found, *leading.overlaps(repeats, tops)]

    values = measured(np.ones(n))
    rng = numpy_rng(seed, "agreement")
    draws = np.array(
        [
            measured(np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64))
            for _ in range(n_boot)
        ]
    )
    spearman, tau, *overlaps = (
        _around(value, *percentiles(column, level, otherwise=value))
        for value, column in zip(values, draws.T, strict=True)
    )
    return Agreement(spearman, tau, dict(zip(tops, overlaps, strict=True)))


def _around(value: float, low: float, high: float) -> Interval:
    """Return an interval that holds its value: repeated points tie, which lowers a ρ near 1."""
    return Interval(value, min(low, value), max(high, value))


@dataclass(frozen=True, eq=False)
class _Kendall:
    """What Kendall's τ-b of resamples is made of."""

    groups: Sequence[NDArray[np.intp]]
    balance: Floats
    """Of every point: other points that are in order with it, less those that are not."""

    @classmethod
    def of(cls, x: NDArray[np.intp], y: NDArray[np.intp]) -> "_Kendall":
        return cls((x, y), pair_balance(x, y))

    def of_resample(self, repeats: Floats) -> float:
        n = len(repeats)
        numerator = float((repeats - 0.5) @ self.balance)  # at repeats 1: each pair once
        pairs = 0.5 * n * (n - 1)
        loose = [pairs - _tied(group, repeats) for group in self.groups]
        if min(loose) <= 0.0:
            return np.nan
        return float(np.clip(numerator / np.sqrt(np.prod(loose)), -1.0, 1.0))


def _tied(group: NDArray[np.intp], repeats: Floats) -> float:
    """Return how many pairs of different points are equal, to first order in the repeats."""
    size = np.bincount(group)
    if size.max() == 1:
        return 0.0
    return float((repeats - 0.5) @ (size[group] - 1.0))


def pair_balance(x: NDArray[np.intp], y: NDArray[np.intp]) -> Floats:
    """Return for every point how many others are in order with it, less those that are not.

    Parameters
    ----------
    x, y
        Whole numbers from 0 on that order the points, shape (points,); equal ones are ties, which
        count for neither.

    Notes
    -----
    Two different ``y`` part at one binary digit. For every digit the points are put in classes of
    equal higher digits and in the order of ``x`` within; running sums count the points of the class
    with the other digit and a smaller or larger ``x``: O(points · log points).
    """
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    n_x, found = int(x[-1]) + 1, np.zeros(len(x))
    for digit in range(int(y.max()).bit_length()):
        high = y >> (digit + 1)
        places = np.argsort(high, kind="stable")
        one = (y[places] >> digit) & 1
        key, start = high[places] * n_x + x[places], high[places] * n_x
        ones = np.concatenate([[0], np.cumsum(one)])
        first, last = np.searchsorted(key, start), np.searchsorted(key, start + n_x)
        low, high_end = np.searchsorted(key, key), np.searchsorted(key, key, "right")
        ones_before, ones_after = ones[low] - ones[first], ones[last] - ones[high_end]
        zeros_before, zeros_after = low - first - ones_before, last - high_end - ones_after
        found[places] += np.where(one, zeros_before - zeros_after, ones_after - ones_before)
    balance = np.empty_like(found)
    balance[order] = found
    return balance


@dataclass(frozen=True, eq=False)
class _Leading:
    """Two rankings from the top."""

    first: tuple[NDArray[np.intp], NDArray[np.intp]]
    """Points of both, the largest first; of equal ones that which comes first."""
    place: NDArray[np.intp]
    """Place of every point in the second."""

    @classmethod
    def of(cls, x: Floats, y: Floats) -> "_Leading":
        a, b = np.argsort(-x, kind="stable"), np.argsort(-y, kind="stable")
        place = np.empty_like(b)
        place[b] = np.arange(len(b))
        return cls((a, b), place)

    def overlaps(self, repeats: Floats, tops: Sequence[float]) -> list[float]:
        """Return the share of the top sets that is in both, points counted by their repeats."""
        sums, found = [np.cumsum(repeats[order]) for order in self.first], []
        for top in tops:
            wanted = max(1, round(top * len(repeats)))
            ends = [int(np.searchsorted(one, wanted)) + 1 for one in sums]
            leading = self.first[0][: ends[0]]
            both = repeats[leading[self.place[leading] < ends[1]]].sum()
            sizes = [one[end - 1] for one, end in zip(sums, ends, strict=True)]
            found.append(float(both / (0.5 * sum(sizes))))
        return found
