"""Divergence of two models' next-token distributions, slow and obvious."""

import math

from torch import Tensor


def distribution(scores: list[float]) -> list[float]:
    """Probabilities from the logits of one position."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def window(dense: Tensor, changed: Tensor) -> tuple[float, int]:
    """Summed KL(dense ‖ changed) in nats and the number of equal favourites, of one window.

    Logits have shape (tokens, vocabulary); those of the last token predict nothing.
    """
    divergence, agreements = 0.0, 0
    for a, b in zip(dense.double().tolist()[:-1], changed.double().tolist()[:-1], strict=True):
        p, q = distribution(a), distribution(b)
        divergence += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)
        agreements += a.index(max(a)) == b.index(max(b))
    return divergence, agreements
