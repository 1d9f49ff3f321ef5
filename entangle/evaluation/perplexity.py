"""Perplexity of a language model on a text."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from entangle.calibration import Source
from entangle.checks import whole
from entangle.errors import InvalidInput
from entangle.evaluation.affix_effect import AffixEffect, affix_effect, tell
from entangle.evaluation.forward import (
    as_causal_model,
    memory_limit,
    next_token_logits,
)
from entangle.evaluation.text import EvaluationText, as_evaluation
from entangle.memory import give_back
from entangle.models.evaluating import evaluates
from entangle.models.loading import AnyModel, LanguageModel
from entangle.progress import ProgressBar

LOGITS_IN_A_PASS = 2**27
TOKENS_IN_A_PASS = 2**14
"""By default as many windows run in one forward pass as give so many logits, and tokens at most."""


@dataclass(frozen=True, eq=False)
class Perplexity:
    """The loss of a model on every window of a text, and what follows from it."""

    window_losses: NDArray[np.float64]
    """Summed negative log-likelihood of each window in nats, shape (n_windows,)."""
    protocol: Mapping[str, object]
    """`EvaluationText.describe` of the text."""
    n_tokens: int
    """Tokens counted."""
    n_words: int | None
    """Words of their text; None where unknown."""
    n_bytes: int | None
    """Bytes of their text; None where unknown."""
    special_tokens_effect: AffixEffect | None = None
    """How much the special tokens in front of a window matter; None where that was not measured."""

    @classmethod
    def of(cls, losses: Float[Tensor, " n_windows"], text: EvaluationText) -> "Perplexity":
        """Return the perplexity that the windows' losses (from `window_losses`) amount to.

        For models that are run in parts, such as block by block.
        """
        if losses.shape != (text.n_windows,):
            raise InvalidInput(
                f"`losses` must have one value for each of {text.n_windows} windows; got shape "
                f"{tuple(losses.shape)}."
            )
        values = losses.detach().cpu().double().numpy().copy()
        values.setflags(write=False)
        return cls(values, text.describe(), text.n_tokens, text.n_words, text.n_bytes)

    @property
    def value(self) -> float:
        """Perplexity: exp(total loss / tokens). NaN or infinite where ``flag`` says so."""
        return self._exponential(self.n_tokens)

    @property
    def word_perplexity(self) -> float | None:
        """exp(total loss / words), comparable between tokenizers; None if words are unknown."""
        return self._exponential(self.n_words) if self.n_words else None

    @property
    def bits_per_byte(self) -> float | None:
        """Total loss in bits / bytes of text; None where bytes are unknown."""
        return float(self._total / np.log(2.0) / self.n_bytes) if self.n_bytes else None

    @property
    def flag(self) -> str:
        """``"nan"`` or ``"infinite"`` where that is the perplexity, else empty."""
        if np.isnan(self.value):
            return "nan"
        return "infinite" if np.isinf(self.value) else ""

    @property
    def n_bad_windows(self) -> int:
        """Windows whose loss is NaN or infinite."""
        return int(np.count_nonzero(~np.isfinite(self.window_losses)))

    @property
    def window_tokens(self) -> NDArray[np.float64]:
        """Tokens counted in each window, shape (n_windows,): all alike where none was padded."""
        known, n = self.protocol.get("window_tokens"), len(self.window_losses)
        if known is None:
            return np.full(n, self.n_tokens / n)
        return np.array(known, dtype=np.float64)

    @property
    def _total(self) -> float:
        return float(self.window_losses.sum())

    def _exponential(self, count: int) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(np.float64(self._total / count)))


@evaluates
def perplexity(
    model: AnyModel,
    text: Source,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Perplexity:
    """Measure a causal language model's perplexity on a text.

    Before that the first window runs with the other choice of special tokens (see `affix_effect`);
    where its loss differs by more than 5 %, one line on standard error says so.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. A module maps token ids (windows, tokens) to logits (windows, tokens,
        vocabulary), or to an object that has them as ``logits``.
    text
        From `load_evaluation`, or whatever else that takes, with its default settings.
    batch_size
        Windows in one forward pass, which only rounding depends on; by default as many as give
        2²⁷ logits, of 2¹⁴ tokens at most.
    progress
        Show a progress bar on standard error; by default if that is a terminal. With False nothing
        is written there, the note on special tokens neither.

    Returns
    -------
    Perplexity
        NaN logits give a NaN perplexity with ``flag`` ``"nan"``, not an error.

    Raises
    ------
    InvalidInput
        If the model does not predict next tokens, or the text does not fit it.
    MemoryLimit
        If memory runs out.
    """
    language_model = as_causal_model(model)
    text = as_evaluation(text, language_model)
    effect = affix_effect(language_model, text.rows.sequence(0), text.settings)
    if progress is not False:
        tell(effect)
    found = measure_perplexity(language_model, text, batch_size=batch_size, progress=progress)
    return replace(found, special_tokens_effect=effect)


@evaluates
def measure_perplexity(
    model: AnyModel,
    text: EvaluationText,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Perplexity:
    """Measure as `perplexity`, without looking at the other choice of special tokens.

    For one model that is measured many times, changed or not.
    """
    language_model = as_causal_model(model)
    text = as_evaluation(text, language_model)
    per_pass = windows_in_a_pass(batch_size, language_model, text)
    losses = []
    with ProgressBar("perplexity", enabled=progress) as bar, window_memory(per_pass):
        bar.start(text.n_windows, "windows")
        for _, ids in text.rows.batches(per_pass):
            losses.append(text.losses(next_token_logits(language_model, ids), ids))
            give_back()
            bar.advance(len(ids))
    return Perplexity.of(torch.cat(losses), text)


def windows_in_a_pass(asked: int | None, model: LanguageModel, text: EvaluationText) -> int:
    """Return the batch size asked for, or `windows_by_default`."""
    if asked is None:
        return windows_by_default(text.seq_len, model.vocab_size)
    return whole("batch_size", asked, least=1)


def windows_by_default(seq_len: int, vocab_size: int) -> int:
    """Return how many windows give `LOGITS_IN_A_PASS` logits, of `TOKENS_IN_A_PASS` at most."""
    return max(1, min(LOGITS_IN_A_PASS // vocab_size, TOKENS_IN_A_PASS) // seq_len)


def window_memory(per_pass: int) -> AbstractContextManager[None]:
    """Turn the end of memory, with this many windows in a pass, into a `MemoryLimit`."""
    lower = "--batch-size (batch_size) or --seq-len (seq_len)"
    return memory_limit(f"{per_pass} window(s)", lower=lower)
