"""Perplexity of a language model on a text."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import transformers as hf
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from entangle.calibration.calibration_set import check_ids
from entangle.errors import InvalidInput, MemoryLimit
from entangle.evaluation.losses import window_losses
from entangle.evaluation.text import EvaluationText
from entangle.models.loading import LanguageModel, as_language_model
from entangle.progress import ProgressBar

LOGITS_IN_A_PASS = 2**27
"""By default as many windows run in one forward pass as give this many logits."""


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
    def _total(self) -> float:
        return float(self.window_losses.sum())

    def _exponential(self, count: int) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(np.float64(self._total / count)))


def perplexity(
    model: LanguageModel | nn.Module,
    text: EvaluationText,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Perplexity:
    """Measure a causal language model's perplexity on a text.

    Parameters
    ----------
    model
        A model from `entangle.load_model`, or a module that maps token ids (windows, tokens) to
        logits (windows, tokens, vocabulary) or to an object that has them as ``logits``.
    text
        From `load_evaluation`.
    batch_size
        Windows in one forward pass, which only rounding depends on; by default as many as give
        2²⁷ logits.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

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
    language_model = as_language_model(model)
    _check_causal(language_model)
    _check_fits(language_model, text)
    per_pass = _batch_size(batch_size, language_model, text)
    losses = []
    with ProgressBar("perplexity", enabled=progress) as bar, _memory_limit(per_pass):
        bar.start(text.n_windows, "windows")
        for ids in text.windows.split(per_pass):
            losses.append(window_losses(_logits(language_model, ids), ids))
            bar.advance(len(ids))
    return Perplexity.of(torch.cat(losses), text)


def _check_causal(model: LanguageModel) -> None:
    config = getattr(model.module, "config", None)
    masked = type(config) in hf.MODEL_FOR_MASKED_LM_MAPPING
    if masked and not getattr(config, "is_decoder", False):
        raise InvalidInput(
            f"perplexity needs a model that predicts the next token; {model.name!r} "
            f"({type(model.module).__name__}) is an encoder: give a causal language model."
        )


def _check_fits(model: LanguageModel, text: EvaluationText) -> None:
    limit = model.context_length
    if limit is not None and text.seq_len > limit:
        raise InvalidInput(
            f"`seq_len` must be at most the model's context, {limit}; got {text.seq_len}."
        )
    check_ids(text.windows, model.vocab_size)


def _batch_size(asked: int | None, model: LanguageModel, text: EvaluationText) -> int:
    if asked is None:
        return max(1, LOGITS_IN_A_PASS // (text.seq_len * model.vocab_size))
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise InvalidInput(f"`batch_size` must be an integer of at least 1; got {asked!r}.")
    return asked


def _logits(
    model: LanguageModel, ids: Int64[Tensor, "windows tokens"]
) -> Float[Tensor, "windows tokens vocabulary"]:
    accepted = inspect.signature(model.module.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    with torch.no_grad():
        output = model.module(ids.to(model.device), **options)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise InvalidInput(
            f"perplexity needs logits of shape (windows, tokens, vocabulary); {model.name!r} "
            f"({type(model.module).__name__}) returns none: give a model with a "
            "language-modelling head."
        )
    return logits


@contextmanager
def _memory_limit(per_pass: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        named = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not named and "you tried to allocate" not in str(error):
            raise
        raise MemoryLimit(
            f"memory ran out with {per_pass} window(s) in one forward pass; lower --batch-size "
            "(batch_size) or --seq-len (seq_len)."
        ) from error
