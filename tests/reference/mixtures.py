"""Gaussian mixtures by plain expectation maximisation in Python floats, from given means."""

import math


def density(x: float, mean: float, variance: float) -> float:
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def best_bic(values: list[float], means: list[float], steps: int = 100) -> float:
    """Return the BIC that a mixture reaches from components around ``means``."""
    k, n = len(means), len(values)
    weights, variances = [1 / k] * k, [0.05] * k
    means = list(means)
    likelihood = 0.0
    for _ in range(steps):
        likelihood, shares = 0.0, []
        for x in values:
            parts = [
                w * density(x, m, v) for w, m, v in zip(weights, means, variances, strict=True)
            ]
            likelihood += math.log(sum(parts))
            shares.append([part / sum(parts) for part in parts])
        for j in range(k):
            own = sum(share[j] for share in shares)
            weights[j] = own / n
            means[j] = sum(s[j] * x for s, x in zip(shares, values, strict=True)) / own
            squares = sum(s[j] * (x - means[j]) ** 2 for s, x in zip(shares, values, strict=True))
            variances[j] = squares / own
    return (3 * k - 1) * math.log(n) - 2 * likelihood
