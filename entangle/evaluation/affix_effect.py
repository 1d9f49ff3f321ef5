"""How much the special tokens in front of a text matter to a model: its first window, both ways."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from entangle.affixes import recorded
from entangle.errors import InvalidInput
from entangle.evaluation.forward import as_causal_model, next_token_logits
from entangle.evaluation.losses import window_losses
from entangle.models.loading import LanguageModel
from entangle.progress import tell as tell_line

MOST_TOKENS = 512
"""Tokens of the first window that are looked at, special ones included."""
WORTH_A_NOTE = 0.05
"""Relative difference of the losses from which on it is told."""


@dataclass(frozen=True)
class AffixEffect:
    """The loss of the same tokens of a text with the special tokens used, and otherwise."""

    used: str
    """Special tokens in front, as they are used; ``none``."""
    other: str
    """Special tokens in front in the other choice; ``none``."""
    loss: float
    """Mean loss with those used, nats a token."""
    other_loss: float
    """Mean loss of the same tokens in the other choice, nats a token."""
    n_tokens: int
    """Tokens predicted."""

    @property
    def difference(self) -> float:
        """The other loss over the one used, minus 1. NaN where a loss is."""
        return self.other_loss / self.loss - 1.0 if self.loss > 0 else math.nan

    @property
    def note(self) -> str | None:
        """One line where the losses differ by more than 5 %, else None."""
        if not abs(self.difference) > WORTH_A_NOTE:
            return None
        return (
            f"special tokens matter to this model: the first window's loss is {self.loss:.3f} "
            f"nats a token with {self.used} in front, as chosen, and {self.other_loss:.3f} with "
            f"{self.other} ({100 * self.difference:+.0f} %); choose with --special-tokens "
            "(special_tokens)."
        )

    def describe(self) -> dict[str, object]:
        """Return everything as JSON values, None where a number is not finite."""
        numbers = {
            "loss": self.loss, "other_loss": self.other_loss, "difference": self.difference,
        }  # fmt: skip
        finite = {name: one if math.isfinite(one) else None for name, one in numbers.items()}
        return {"used": self.used, "other": self.other, "n_tokens": self.n_tokens, **finite}


def affix_effect(
    model: LanguageModel, row: Int64[Tensor, " tokens"], settings: Mapping[str, Any]
) -> AffixEffect | None:
    """Compare the special tokens in front of a text with the other choice, in two short passes.

    Where there are some, the other choice is none. Where there are none, it is those that the
    model's tokenizer puts before a text, or its BOS token.

    Parameters
    ----------
    model
        The model.
    row
        The first window, pads left out; its first 512 tokens are used.
    settings
        Of the text: `EvaluationText.settings` or `CalibrationSet.settings`.

    Returns
    -------
    AffixEffect or None
        None where there is no other choice, too little text, or the model predicts no tokens.
    """
    known = recorded(settings) or {}
    other = known.get("alternative")
    if other is None:
        return None
    used = known["before"]
    end = len(row) - (0 if known["policy"] == "published" else len(known["after"]))
    limit = min(MOST_TOKENS, model.context_length or MOST_TOKENS)
    text = row[len(used) : end][: limit - max(len(used), len(other["before"]))]
    if len(text) < 2:
        return None
    try:
        model = as_causal_model(model)
        losses = [_loss(model, front, text) for front in (used, other["before"])]
    except InvalidInput:  # an encoder, or no head: nothing is predicted
        return None
    first, second = (" ".join(one["before_tokens"]) or "none" for one in (known, other))
    return AffixEffect(first, second, losses[0], losses[1], len(text) - 1)


def tell(effect: AffixEffect | None) -> None:
    """Print the note, if there is one, on standard error."""
    if effect is not None and effect.note is not None:
        tell_line(effect.note)


def _loss(model: LanguageModel, front: list[int], text: Int64[Tensor, " tokens"]) -> float:
    """Return the mean loss of all tokens of the text but its first."""
    ids = torch.cat([torch.tensor(front, dtype=torch.int64), text])[None]
    losses = window_losses(next_token_logits(model, ids), ids, around=(len(front) + 1, 0))
    return float(losses[0]) / (len(text) - 1)
