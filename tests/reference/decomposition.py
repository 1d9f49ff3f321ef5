"""What a decomposition measures, in plain loops over tokens."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def count_between(values: Sequence[float], left: float, right: float) -> int:
    """Count the values in [left, right)."""
    return sum(1 for value in values if left <= value < right)


def components_needed(tokens: Array, share: float) -> int:
    """Add up squared singular values of the centred tokens until they hold the share."""
    if len(tokens) < 2:
        return 0
    squares = np.linalg.svd(tokens - tokens.mean(axis=0), compute_uv=False) ** 2
    if squares.sum() <= 1e-20:
        return 0
    held, count = 0.0, 0
    for square in squares:
        held, count = held + square, count + 1
        if held >= share * squares.sum() * (1 - 1e-12):
            break
    return count


def relative_error(dense: Array, sparse: Array) -> float:
    """Compare outputs (tokens, neurons) with their own spread around the mean."""
    mean = dense.mean(axis=0)
    lost = spread = 0.0
    for y, q in zip(dense, sparse, strict=True):
        lost += float(((q - y) ** 2).sum())
        spread += float(((y - mean) ** 2).sum())
    return lost / spread if spread else float("nan")


def near_pairs(tokens: Array, radius: float) -> list[tuple[int, int]]:
    """Return all pairs of different tokens within a radius."""
    found = []
    for a in range(len(tokens)):
        for b in range(a + 1, len(tokens)):
            distance = float(np.sqrt(((tokens[a] - tokens[b]) ** 2).sum()))
            if 0 < distance <= radius:
                found.append((a, b))
    return found


def farthest(outputs: Sequence[float], pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort pairs by falling output distance and drop those with a token already used."""
    order = sorted(pairs, key=lambda pair: -abs(outputs[pair[0]] - outputs[pair[1]]))
    used: set[int] = set()
    kept = []
    for a, b in order:
        if a not in used and b not in used and outputs[a] != outputs[b]:
            kept.append((a, b) if outputs[a] < outputs[b] else (b, a))
            used |= {a, b}
    return kept
