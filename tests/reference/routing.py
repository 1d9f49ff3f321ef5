"""Slow, obvious versions of routing: loops over plain numbers, no code shared with the package."""

import itertools
import struct

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gram(tokens: Array) -> Array:
    """Sum the outer products of the tokens, one after the other."""
    total = np.zeros((tokens.shape[1], tokens.shape[1]))
    for token in tokens:
        total += np.outer(token, token)
    return total


def nearest(tokens: Array, mean: Array, components: Array, centroids: Array) -> list[int]:
    """Project every token and measure its distance to every centroid."""
    answer = []
    for token in tokens:
        point = [sum(c * (t - m)) for c in components for t, m in [(token, mean)]]
        distances = [sum((p - q) ** 2 for p, q in zip(point, c, strict=True)) for c in centroids]
        answer.append(distances.index(min(distances)))
    return answer


def inertia(points: Array, labels: list[int]) -> float:
    """Sum the squared distances to the mean of each cluster."""
    total = 0.0
    for label in set(labels):
        members = points[[i for i, other in enumerate(labels) if other == label]]
        total += float(((members - members.mean(0)) ** 2).sum())
    return total


def best_inertia(points: Array, k: int) -> float:
    """Try every assignment of the points to k clusters."""
    everything = itertools.product(range(k), repeat=len(points))
    return min(inertia(points, list(labels)) for labels in everything)


def hash_cluster(token: list[float], key: list[int], k: int) -> int:
    """Hash one token with Python's own integers."""
    mask = 2**64 - 1
    total = 0
    for value, multiplier in zip(token, key, strict=True):
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
        total = (total + bits * multiplier) & mask
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & mask
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & mask
    total ^= total >> 31
    return ((total >> 33) * k) >> 31
