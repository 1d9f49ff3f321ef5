"""Density and modes in plain loops, written from the definitions."""

import math
from collections.abc import Sequence
from itertools import pairwise


def density_at(point: float, values: Sequence[float], *, center: float, scale: float) -> float:
    """Average a Gaussian over the values, on the axis ``asinh((y − center) / (2 · scale))``."""
    unit = 2 * scale
    width = 0.9 * scale * len(values) ** -0.2 / unit
    place = math.asinh((point - center) / unit)
    total = 0.0
    for value in values:
        step = (place - math.asinh((value - center) / unit)) / width
        total += math.exp(-0.5 * step * step) / (width * math.sqrt(2 * math.pi))
    slope = 1 / (unit * math.sqrt(1 + ((point - center) / unit) ** 2))
    return total / len(values) * slope


def joined_peaks(height: Sequence[float], noise: Sequence[float], least: float) -> list[int]:
    """Return peaks left after joining the least prominent pair again and again."""
    peaks = [
        i
        for i in range(1, len(height) - 1)
        if height[i - 1] < height[i] and height[i] >= height[i + 1]
    ]
    while len(peaks) > 1:
        found = []
        for left, right in pairwise(peaks):
            low = min(range(left, right + 1), key=lambda i: height[i])
            found.append(
                min(
                    (math.sqrt(height[p]) - math.sqrt(height[low])) / (math.sqrt(2) * noise[p])
                    for p in (left, right)
                )
            )
        worst = found.index(min(found))
        if found[worst] >= least:
            break
        left, right = peaks[worst], peaks[worst + 1]
        peaks.remove(right if height[left] >= height[right] else left)
    return peaks
