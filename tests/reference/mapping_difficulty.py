"""Mapping difficulty in plain loops, as the paper's equation 2 and the published code state it."""

import math
from collections.abc import Sequence


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the Euclidean distance of two inputs."""
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the middle two."""
    ordered = sorted(values)
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def mapping_difficulty(
    outputs: Sequence[float],
    inputs: Sequence[Sequence[float]],
    pairs: Sequence[tuple[int, int]],
    *,
    output_norm: str = "median",
    input_norm: str = "max",
) -> float:
    """Return MD of one neuron; pairs with identical inputs are left out."""
    kept = [(a, b) for a, b in pairs if distance(inputs[a], inputs[b]) > 0]
    dy = [abs(outputs[a] - outputs[b]) for a, b in kept]
    dx = [distance(inputs[a], inputs[b]) for a, b in kept]
    n_y = {"median": median(dy), "max": max(dy), "mean": sum(dy) / len(dy)}[output_norm]
    n_x = {"max": max(dx), "mean": sum(dx) / len(dx)}[input_norm]
    return sum((y / n_y) / (x / n_x) for y, x in zip(dy, dx, strict=True)) / len(kept)
