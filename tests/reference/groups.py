"""The n:m choice with a number of zeros for every row, one row and one group after the other."""

import math
from collections.abc import Sequence


def kept(saliency: Sequence[Sequence[float]], zeros: Sequence[int], group: int) -> list[list[bool]]:
    """Return True where a weight stays: each row loses ``zeros`` of every ``group`` neighbours.

    The last columns, where they are fewer, keep their share, rounded up.
    """
    stays = []
    for row, count in zip(saliency, zeros, strict=True):
        line = [True] * len(row)
        for start in range(0, len(row), group):
            stop = min(start + group, len(row))
            lost = stop - start - math.ceil((group - count) * (stop - start) / group)
            for _ in range(lost):
                left = [j for j in range(start, stop) if line[j]]
                line[min(left, key=lambda j: row[j])] = False
        stays.append(line)
    return stays
