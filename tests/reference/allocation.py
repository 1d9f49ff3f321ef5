"""Slow, obvious versions of the allocation rules' parts."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def shifted(
    wish: Sequence[float],
    gain: Sequence[float],
    weights: Sequence[int],
    bounds: Sequence[tuple[float, float]],
    total: float,
) -> list[float]:
    """Meet a total by trying every set of clipped items in the order in which they clip."""

    def at(shift: float) -> list[float]:
        moved = [n * (s + shift * g) for s, g, n in zip(wish, gain, weights, strict=True)]
        return [min(max(x, low), high) for x, (low, high) in zip(moved, bounds, strict=True)]

    corners = sorted(
        (end / n - s) / g
        for s, g, n, ends in zip(wish, gain, weights, bounds, strict=True)
        for end in ends
    )
    previous = corners[0]
    for corner in corners:
        if sum(at(corner)) >= total:
            low, high = sum(at(previous)), sum(at(corner))
            part = 0.0 if high == low else (total - low) / (high - low)
            return at(previous + part * (corner - previous))
        previous = corner
    return at(previous)


def outlier_share(weights: Sequence[Tensor], inputs: Sequence[Tensor], times: float) -> float:
    """Count weights whose |w| times input norm exceeds a multiple of the mean, one at a time."""
    saliency = []
    for weight, tokens in zip(weights, inputs, strict=True):
        for j in range(weight.shape[1]):
            norm = math.sqrt(sum(float(x) ** 2 for x in tokens[:, j]))
            saliency += [abs(float(weight[i, j])) * norm for i in range(weight.shape[0])]
    mean = sum(saliency) / len(saliency)
    return sum(one > times * mean for one in saliency) / len(saliency)


def exponent(weight: Tensor) -> float:
    """Fit a power law to each candidate tail of a spectrum; keep the closest one."""
    values = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    counts, edges = np.histogram(np.log10(values), bins=100)
    peak = 10 ** edges[int(np.argmax(counts))]
    best = (math.inf, math.nan)
    for i, start in enumerate(values[:-1]):
        if not math.log10(0.95 * peak) <= start <= 1.5 * peak:
            continue
        tail = values[i:]
        n = len(tail)
        alpha = 1 + n / sum(math.log(x / start) for x in tail)
        gaps = [abs(1 - (x / start) ** (1 - alpha) - k / n) for k, x in enumerate(tail)]
        best = min(best, (max(gaps), alpha))
    return best[1]


def trim(weight: Tensor, inputs: Tensor, target: float) -> NDArray[np.float64]:
    """Run TRIM on real outputs, row by row."""
    dense = (inputs.double() @ weight.double().T).numpy()
    norms = inputs.double().norm(dim=0).numpy()
    saliency = np.abs(weight.double().numpy()) * norms
    order = np.argsort(saliency, axis=1, kind="stable")
    rows, cols = weight.shape

    def pruned(sparsity: NDArray[np.float64]) -> NDArray[np.float64]:
        kept = weight.double().numpy().copy()
        for i in range(rows):
            kept[i, order[i, : max(0, int(cols * sparsity[i]))]] = 0
        outputs: NDArray[np.float64] = inputs.double().numpy() @ kept.T
        return outputs

    def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float((a * b).sum()) / norm if norm else 0.0

    def walk(rate: float) -> tuple[NDArray[np.float64], float]:
        sparsity = np.full(rows, target)
        outputs = pruned(sparsity)
        best, quality = sparsity, cosine(dense, outputs)
        for _ in range(10):
            q = np.array([cosine(dense[:, i], outputs[:, i]) for i in range(rows)])
            moved = (q - q.min()) / (q.max() - q.min() + 1e-6) * rate * 2
            sparsity = np.clip(sparsity + moved - moved.mean(), 0, 0.95)
            sparsity = sparsity - sparsity.mean() + target
            outputs = pruned(sparsity)
            if cosine(dense, outputs) > quality:
                best, quality = sparsity, cosine(dense, outputs)
        return best, quality

    start = np.full(rows, target)
    baseline = cosine(dense, pruned(start))
    best, quality = start, baseline
    for rates in ((0.01, 0.02, 0.04, 0.08, 0.12, 0.16), (-0.01, -0.02, -0.04)):
        if quality > baseline:
            break
        reached = -math.inf
        for rate in rates:
            tried, similarity = walk(rate)
            if similarity > quality:
                best, quality = tried, similarity
            if similarity <= reached:
                break
            reached = similarity
    return best


def marginal(
    losses: Sequence[tuple[float, float]],
    ends: tuple[float, float],
    width: int,
    importance: Sequence[float],
    total: float,
) -> list[float]:
    """Meet a total of sparsities at one price of the last zero, by bisection on its logarithm.

    Losses grow at least by the factor e from sparsity 0 to 2 (a slope of 0.5).
    """
    slopes = [max(0.5, math.log(b / a) / (ends[1] - ends[0])) for a, b in losses]

    def at(log_price: float) -> list[float]:
        found = []
        for (a, _), slope, weight in zip(losses, slopes, importance, strict=True):
            s = ends[0] + (log_price + math.log(width / (weight * slope * a))) / slope
            found.append(min(max(s, ends[0]), ends[1]))
        return found

    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    return at(high)
