"""Next-token losses from logits, in bounded memory."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from entangle.errors import InvalidInput

LOGITS_AT_ONCE = 2**24
"""Logits that are held in float32 at a time."""


def window_losses(
    logits: Float[Tensor, "windows tokens vocabulary"],
    ids: Int64[Tensor, "windows tokens"],
    *,
    around: tuple[int, int] = (0, 0),
) -> Float[Tensor, " windows"]:
    """Return the summed next-token loss of every window.

    The logits at a position predict the token after it, so ``tokens − 1`` are predicted and the
    last logits are not used; special tokens around the text are not counted. Each loss is computed
    in float32 and summed in float64, a window at a time, so that it does not depend on the other
    windows of the batch.

    Parameters
    ----------
    logits
        Shape (windows, tokens, vocabulary), any floating-point dtype and device.
    ids
        The tokens that went in, shape (windows, tokens).
    around
        Special tokens at the beginning and at the end of every window.

    Returns
    -------
    Float[Tensor, " windows"]
        Negative log-likelihood of a window in nats, float64, on the CPU. NaN where a logit is.

    Raises
    ------
    InvalidInput
        If no token of a window is predicted or an id is outside the vocabulary.
    """
    windows, tokens, vocabulary = logits.shape
    first, last = max(around[0], 1), tokens - around[1]
    if windows == 0 or last <= first:
        raise InvalidInput(
            f"`ids` must hold at least 1 window of {1 + first + around[1]} tokens; got shape "
            f"({windows}, {tokens})."
        )
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocabulary:
        raise InvalidInput(
            f"token ids must lie in [0, {vocabulary}), as many as there are logits; "
            f"got {low if low < 0 else high}."
        )
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    targets = ids[:, first:last].to(logits.device)
    losses = [
        functional.cross_entropy(part.float(), target, reduction="none")
        for window, target_row in zip(logits[:, first - 1 : last - 1], targets, strict=True)
        for part, target in zip(window.split(rows), target_row.split(rows), strict=True)
    ]
    return torch.cat(losses).cpu().double().view(windows, last - first).sum(1)
