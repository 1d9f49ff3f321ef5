"""From wished-for sparsities to whole zeros that add up to the budget."""

from dataclasses import dataclass

import numpy as np

from entangle.allocation.allocation import Counts, Reals
from entangle.errors import InvalidInput

_HALVINGS = 110
"""Bisection steps: doubles are exhausted after about 60 from any start."""
_WHOLE = 1e-9
"""A count this close to an integer is that integer."""


class InfeasibleBudget(InvalidInput):
    """No choice of zeros within the clips adds up to the budget; the message says what can."""


@dataclass(frozen=True, eq=False)
class Wish:
    """Sparsities wished for neurons (or layers), and how they give way to meet a budget."""

    sparsity: Reals
    """Wished-for share of zeros, one an item."""
    gain: Reals
    """How far an item moves for each unit of the common shift, at least 0: 1 for all shifts the
    wishes, the wish itself scales them."""
    low: Reals
    """Least share of zeros of each item, in [0, 1]."""
    high: Reals
    """Greatest share of zeros of each item, in [0, 1]; ``low`` itself where an item is fixed."""


def whole_bounds(wish: Wish, units: Counts) -> tuple[Counts, Counts]:
    """Return the least and greatest whole number of zeros of each item of so many ``units``.

    Clips are rounded inward; a range that holds no integer becomes the integer nearest to its
    lower end (an item that is fixed at a share).
    """
    low = np.ceil(wish.low * units - _WHOLE)
    high = np.floor(wish.high * units + _WHOLE)
    fixed = low > high
    low[fixed] = high[fixed] = np.rint(wish.low * units)[fixed]
    return low.astype(np.int64), high.astype(np.int64)


def fill(
    wish: Wish, weights: Counts, low: Reals, high: Reals, *, starts: Counts, totals: Reals
) -> Reals:
    """Move the wishes of every segment by a common shift until the segment adds up to its total.

    Water-filling: item i gets ``clip(weights_i · (sparsity_i + c · gain_i), low_i, high_i)`` with
    one c a segment, so that what a clipped item cannot take is handed on to the others of its
    segment. c is found by bisection, all segments at once.

    Parameters
    ----------
    wish
        Sparsities and gains.
    weights
        Weights of each item.
    low, high
        Clips of the number of zeros of each item.
    starts
        Index of the first item of each segment.
    totals
        Zeros of each segment, within the sums of ``low`` and ``high``.

    Returns
    -------
    ndarray
        Zeros of each item, not yet whole.
    """
    sizes = np.diff(np.append(starts, len(weights)))
    slope = weights * wish.gain
    base = weights * wish.sparsity
    with np.errstate(divide="ignore", invalid="ignore"):  # an item of no gain stays where it is
        first = np.where(slope > 0, (low - base) / slope, 0.0)
        last = np.where(slope > 0, (high - base) / slope, 0.0)
    left = np.minimum.reduceat(first, starts) - 1.0
    right = np.maximum.reduceat(last, starts) + 1.0
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        if np.all((middle <= left) | (middle >= right)):
            break
        zeros = np.clip(base + np.repeat(middle, sizes) * slope, low, high)
        short = np.add.reduceat(zeros, starts) < totals
        left, right = np.where(short, middle, left), np.where(short, right, middle)
    return np.clip(base + np.repeat(right, sizes) * slope, low, high)


def round_zeros(
    zeros: Reals, low: Counts, high: Counts, *, steps: Counts, budget: int
) -> tuple[Counts, int]:
    """Round to whole steps, each item up or down, so that the sum is the budget.

    Items of one step size take turns: fractions are added up along the items and a step is handed
    out whenever the running sum passes a half, so that every layer's sum is right to about one
    step. What is still missing goes, spread evenly, to items of the smallest step that have room.

    Parameters
    ----------
    zeros
        Zeros of each item, within the clips.
    low, high
        Clips of each item, in steps.
    steps
        Size of a step of each item, in weights: 1, or ``in_features / m`` for n:m.
    budget
        Sum to be met: exactly with steps of 1, else to within half of the smallest step (unless
        clips leave no room).

    Returns
    -------
    zeros : ndarray
        Whole zeros, multiples of ``steps``.
    remainder : int
        Budget minus their sum.
    """
    wanted = zeros / steps
    near = np.rint(wanted)
    wanted = np.clip(np.where(np.abs(wanted - near) < _WHOLE, near, wanted), low, high)
    counts = np.floor(wanted)
    rest = wanted - counts
    for step in np.unique(steps):
        own = steps == step
        running = np.cumsum(rest[own])
        offset = 0.5 + np.ceil(running[-1] - 0.5) - running[-1]  # in [0, 1)
        counts[own] += np.diff(np.floor(running + offset), prepend=0.0)
    whole = counts.astype(np.int64)
    _settle(whole, low, high, steps, budget - int((whole * steps).sum()))
    whole *= steps
    return whole, budget - int(whole.sum())


def _settle(whole: Counts, low: Counts, high: Counts, steps: Counts, missing: int) -> None:
    """Hand ``missing`` zeros to items of the smallest step, in place, one step each at a time."""
    smallest = int(steps.min())
    left = round(missing / smallest)
    while left != 0:
        sign = 1 if left > 0 else -1
        room = (whole < high) if left > 0 else (whole > low)
        able = np.flatnonzero(room & (steps == smallest))
        if not len(able):
            return
        count = min(abs(left), len(able))
        whole[able[np.arange(count) * len(able) // count]] += sign
        left -= sign * count


def check_reachable(low: int, high: int, budget: int, weights: int, described: str) -> None:
    """Raise unless the budget lies within what the clips allow.

    Raises
    ------
    InfeasibleBudget
        With the range that can be met.
    """
    if low <= budget <= high:
        return
    raise InfeasibleBudget(
        f"a budget of {budget:,} zeros in {weights:,} weights (sparsity {budget / weights:.6g}) "
        f"cannot be met with {described}: that allows {low:,} to {high:,} zeros, a sparsity from "
        f"{low / weights:.6g} to {high / weights:.6g}; change `sparsity` or the clips."
    )
