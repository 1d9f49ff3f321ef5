"""Look for the smallest value of an expensive function on an interval."""

import math
from collections.abc import Callable

GRID = 5
_RATIO = (math.sqrt(5.0) - 1.0) / 2.0

Tried = list[tuple[float, float]]
"""Every (x, value), in the order of the evaluations."""


def minimise(
    function: Callable[[float], float], low: float, high: float, *, evaluations: int
) -> Tried:
    """Evaluate a grid with both ends, then close in on its best point by golden section.

    The grid has `GRID` points, or fewer if there are fewer evaluations. The rest go into the
    interval between the neighbours of the best point, where the function is taken to have one
    minimum; a NaN counts as infinite.

    Parameters
    ----------
    function
        What to minimise.
    low, high
        The interval.
    evaluations
        How often the function is called, at least 2.

    Returns
    -------
    list of (x, value)
        All evaluations; the minimum is the smallest of them.
    """
    tried: Tried = []

    def at(x: float) -> float:
        value = function(x)
        tried.append((x, math.inf if math.isnan(value) else value))
        return tried[-1][1]

    points = min(GRID, evaluations)
    grid = [low + (high - low) * i / (points - 1) for i in range(points)]
    values = [at(x) for x in grid]
    best = values.index(min(values))
    left, right = grid[max(0, best - 1)], grid[min(points - 1, best + 1)]
    inner: dict[float, float] = {}
    while len(tried) < evaluations:
        first, second = right - _RATIO * (right - left), left + _RATIO * (right - left)
        for x in (first, second):
            known = [value for other, value in inner.items() if math.isclose(other, x)]
            if known:
                inner[x] = known[0]
            elif len(tried) < evaluations:
                inner[x] = at(x)
        if first not in inner or second not in inner:
            break
        if inner[first] <= inner[second]:
            right = second
        else:
            left = first
    return tried
