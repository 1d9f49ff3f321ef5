"""SparseGPT one weight at a time, from the optimal-brain-surgeon equations, in NumPy float64.

Write ``G_j`` for the inverse of the damped gram restricted to the columns from j on. Changing
weight j of a row by ``-d``, with the columns left of it settled, costs ``d**2 / G_j[0, 0]`` at
best, and that best changes the columns from j on by ``-d * G_j[0] / G_j[0, 0]``. ``G_j`` is
computed anew for every column; no factorisation, no matrix update.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Cell = tuple[int, int]


def _inverses(gram: Array, damping: float) -> list[Array]:
    cols = len(gram)
    damped = gram.copy()
    for j in range(cols):
        damped[j, j] = (gram[j, j] or 1.0) + damping * np.trace(gram) / cols
    return [np.asarray(np.linalg.inv(damped[j:, j:]), dtype=np.float64) for j in range(cols)]


def _grids(weight: Array, bits: int | None, span: int | None) -> list[list[Array]] | None:
    """Return the values of every row's grids, one for each ``span`` columns."""
    if bits is None:
        return None
    grids = []
    for row in weight:
        if span is not None:
            grids.append(_symmetric(row, bits, span))
            continue
        low, high = min(row.min(), 0.0), max(row.max(), 0.0)
        step = (high - low) / (2**bits - 1)
        below = round(-low / step)
        grids.append([np.array([step * (k - below) for k in range(2**bits)])])
    return grids


def _symmetric(row: Array, bits: int, span: int) -> list[Array]:
    half = 2 ** (bits - 1)
    wanted = [
        max([w / (half - 1) if w > 0 else -w / half for w in row[start : start + span]])
        for start in range(0, len(row), span)
    ]
    scale = float(np.float32(max(wanted) / 255))
    steps = [min(max(int(np.ceil(one / scale)), 1), 255) for one in wanted]
    return [np.array([scale * step * k for k in range(-half, half)]) for step in steps]


def _mark(
    cost: Callable[[Cell], float], weight: Array, start: int, stop: int, rule: str, left: list[int]
) -> set[Cell]:
    """Choose the cells to prune in the columns [start, stop) and take them off the budgets."""
    rows, cols = weight.shape
    if rule == "row":
        chosen = set()
        for r in range(rows):
            order = sorted(range(start, cols), key=lambda c: cost((r, c)))
            chosen |= {(r, c) for c in order[: left[r]] if c < stop}
            left[r] -= sum(cell[0] == r for cell in chosen)
        return chosen
    if rule == "layer":
        every = sorted(((r, c) for r in range(rows) for c in range(start, cols)), key=cost)
        chosen = {(r, c) for r, c in every[: left[0]] if c < stop}
        left[0] -= len(chosen)
        return chosen
    cells = [(r, c) for r in range(rows) for c in range(start, stop)]
    threshold = sorted(map(cost, cells))[int(len(cells) * left[0] / 1_000_000)]
    return {cell for cell in cells if cost(cell) <= max(threshold, 0.0)}


def sparsegpt(
    weight: Array,
    gram: Array,
    *,
    rule: str = "row",
    sparsity: float | list[float] = 0.5,
    group: tuple[int | list[int], int] | None = None,
    damping: float = 0.01,
    block: int = 128,
    bits: int | None = None,
    span: int | None = None,
) -> tuple[Array, NDArray[np.bool_]]:
    """Return the sparse weight and the mask (True where kept); ``group`` is (kept, of).

    ``kept`` may be a list, one number a row. ``span`` columns share a symmetric grid.
    """
    rows, cols = weight.shape
    inverse, grids, w = _inverses(gram, damping), _grids(weight, bits, span), weight.copy()

    def cost(cell: Cell) -> float:
        value, j = float(w[cell]), cell[1]
        return -1 / abs(value) if gram[j, j] == 0 else value**2 / float(inverse[j][0, 0])

    shares = sparsity if isinstance(sparsity, list) else [sparsity] * rows
    if rule == "row":
        left = [round(share * cols) for share in shares]
    else:
        left = [round(shares[0] * (rows * cols if rule == "layer" else 1_000_000))]
    pruned: set[Cell] = set()
    for j in range(cols):
        if group is None and j % block == 0:
            pruned |= _mark(cost, w, j, min(j + block, cols), rule, left)
        if group is not None and j % group[1] == 0:
            for r in range(rows):
                order = sorted(range(j, min(j + group[1], cols)), key=lambda c: cost((r, c)))
                stay = group[0][r] if isinstance(group[0], list) else group[0]
                stay = math.ceil(stay * len(order) / group[1])
                pruned |= {(r, c) for c in order[: len(order) - stay]}
        for r in range(rows):
            final = 0.0 if (r, j) in pruned else float(w[r, j])
            if grids is not None and (r, j) not in pruned:
                grid = grids[r][0 if span is None else j // span]
                final = float(grid[np.abs(grid - final).argmin()])
            w[r, j:] -= (w[r, j] - final) * inverse[j][0] / inverse[j][0, 0]
            w[r, j] = final
    kept = np.array([[(r, c) not in pruned for c in range(cols)] for r in range(rows)])
    return w, kept
