"""Perplexity and word counts, slow and obvious."""

import math

import torch
from torch import Tensor


def window_loss(logits: Tensor, ids: list[int]) -> float:
    """Negative log-likelihood in nats of one window, in float64; logits (tokens, vocabulary)."""
    total = 0.0
    for position, target in enumerate(ids[1:]):
        scores = logits[position].double().tolist()
        top = max(scores)
        normaliser = top + math.log(sum(math.exp(score - top) for score in scores))
        total += normaliser - scores[target]
    return total


def perplexity(logits: list[Tensor], windows: list[list[int]]) -> float:
    """Perplexity of windows, each with its logits."""
    total = sum(window_loss(a, b) for a, b in zip(logits, windows, strict=True))
    return math.exp(total / sum(len(ids) - 1 for ids in windows))


def words_begun(text: str, spans: list[tuple[int, int]]) -> int:
    """Words of ``text`` whose first character lies in one of the spans."""
    first = [i for i, c in enumerate(text) if not c.isspace() and (i == 0 or text[i - 1].isspace())]
    return sum(begin <= i < end for i in first for begin, end in spans)


def rolled(module: torch.nn.Module, windows: list[list[int]]) -> list[Tensor]:
    """Logits of each window, run alone."""
    with torch.no_grad():
        return [module(torch.tensor([ids])).logits[0] for ids in windows]
