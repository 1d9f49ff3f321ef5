"""Log-probabilities of sentences and bootstraps of their accuracies, slow and obvious."""

import math

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


def log_probability(module: nn.Module, ids: list[int]) -> float:
    """Log-probability in nats of all tokens after the first, token by token, in float64."""
    with torch.no_grad():
        logits = module(torch.tensor([ids])).logits[0].double().tolist()
    total = 0.0
    for scores, target in zip(logits, ids[1:], strict=False):
        top = max(scores)
        total += scores[target] - top - math.log(sum(math.exp(s - top) for s in scores))
    return total


def sentence_score(module: nn.Module, tokenizer: PreTrainedTokenizerBase, sentence: str) -> float:
    """Score of one sentence, run alone, after the BOS token and a space."""
    assert tokenizer.bos_token_id is not None
    ids = tokenizer.encode(" " + sentence, add_special_tokens=False)
    return log_probability(module, [tokenizer.bos_token_id, *ids])


def resampled(values: list[list[float]], n_boot: int, *, macro: bool) -> list[float]:
    """Bootstrap means: values are resampled one by one within each stratum.

    ``macro`` takes the mean of the strata's means, otherwise that of all values.
    """
    rng = np.random.default_rng(12345)
    found = []
    for _ in range(n_boot):
        drawn = [[row[i] for i in rng.integers(len(row), size=len(row))] for row in values]
        if macro:
            found.append(sum(sum(row) / len(row) for row in drawn) / len(drawn))
        else:
            found.append(sum(map(sum, drawn)) / sum(map(len, drawn)))
    return found


def wilson(right: int, n: int, z: float) -> tuple[float, float]:
    """Ends of Wilson's interval: the shares p at which |right/n − p| is z standard errors."""
    share = right / n
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)
