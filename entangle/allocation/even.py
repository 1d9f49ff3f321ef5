"""The same budget, spread evenly: what an allocation is compared with."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from entangle.allocation.allocation import Allocation
from entangle.allocation.rows import Counts
from entangle.allocation.steps import ROW, step_size


def even(allocation: Allocation) -> Allocation:
    """Spread an allocation's zeros evenly over its rows: every row as near to the mean as can be.

    The sum is the same to the weight. Where the mean is no whole number of zeros a row, the rows
    take turns in rounding up and down. With an n:m pattern, which stays, they do so in its steps;
    where the sum cannot be met otherwise, rows of one width lie off the mean together.

    Returns
    -------
    Allocation
        Without numbers of experts; its manifest says rule ``uniform``.
    """
    counts = [allocation.rows(name) for name in allocation.zeros]
    widths = np.repeat(list(allocation.in_features.values()), counts)
    if allocation.pattern == ROW:
        upto = np.cumsum(widths.astype(np.float64)) * (allocation.n_zeros / widths.sum())
        spread = np.diff(np.rint(upto).astype(np.int64), prepend=0)
    else:
        spread = _in_steps(allocation, counts)
    zeros = torch.from_numpy(spread).split(counts)
    return Allocation(
        zeros=dict(zip(allocation.zeros, zeros, strict=True)),
        in_features=allocation.in_features,
        experts=None,
        manifest=dict(allocation.manifest) | {"settings": {"rule": "uniform"}},
        blocks=allocation.blocks,
        pattern=allocation.pattern,
    )


def _in_steps(allocation: Allocation, counts: list[int]) -> Counts:
    """Return the zeros of each row, whole steps of an n:m pattern."""
    layers = allocation.in_features.items()
    sizes = [step_size(name, width, allocation.pattern) for name, width in layers]
    steps = np.repeat(sizes, counts)
    rows = {size: int((steps == size).sum()) for size in sorted(set(sizes), reverse=True)}
    handed = _handed_out(rows, allocation.n_zeros)
    group = next(iter(allocation.in_features.values())) // sizes[0]
    if any(not 0 <= handed[size] <= rows[size] * group for size in rows):
        zeros = torch.cat(list(allocation.zeros.values())).numpy()
        handed = {size: int(zeros[steps == size].sum()) // size for size in rows}
    spread = np.zeros_like(steps)
    for size, number in handed.items():
        upto = np.rint(np.arange(1, rows[size] + 1) * (number / rows[size])).astype(np.int64)
        spread[steps == size] = size * np.diff(upto, prepend=0)
    return spread


def _handed_out(rows: Mapping[int, int], total: int) -> dict[int, int]:
    """Return how many steps of each size add up to the total, each number near to an even share.

    Parameters
    ----------
    rows
        Rows of each size of a step, the largest first.
    total
        Zeros, a sum of such steps.
    """
    handed: dict[int, int] = {}
    sizes = list(rows)
    for place, size in enumerate(sizes):
        mean = total * rows[size] / sum(one * rows[one] for one in sizes[place:])
        rest = math.gcd(*sizes[place + 1 :])  # what smaller steps can add up to; 0 without any
        near = range(round(mean) - rest, round(mean) + rest + 1)
        fitting = [number for number in near if rest and (total - number * size) % rest == 0]
        off = [abs(number - mean) for number in fitting]
        handed[size] = fitting[off.index(min(off))] if fitting else total // size
        total -= handed[size] * size
    return handed
