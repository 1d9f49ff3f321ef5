"""Perplexity of a language model on a text, and of several beside the first.

How much the special tokens in front of a text matter to a model: its first window, both ways.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.checks import whole
from entangle.errors import InvalidInput
from entangle.evaluation.logits import (
    Parts,
    as_causal_model,
    memory_limit,
    next_tokens_in_parts,
)
from entangle.models.blocks import evaluates, evaluating
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.ranks import current
from entangle.runs.progress import ProgressBar
from entangle.runs.progress import tell as tell_line
from entangle.runs.provenance import recorded, special_tokens_of
from entangle.stats.intervals import Interval, perplexity_ratio_interval
from entangle.texts.evaluation import EvaluationText, as_evaluation, losses_in_parts
from entangle.texts.given import Source

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
    probe = _Fronts.of(model, row, settings)
    if probe is None:
        return None
    try:
        return probe.effect(next_tokens_in_parts(as_causal_model(model), probe.rows))
    except InvalidInput:  # an encoder, or no head: nothing is predicted
        return None


@dataclass(frozen=True, eq=False)
class _Fronts:
    """The start of a text with the special tokens used, and with the other choice."""

    text: Int64[Tensor, " tokens"]
    fronts: tuple[list[int], list[int]]
    names: tuple[str, str]

    @classmethod
    def of(
        cls, model: LanguageModel, row: Int64[Tensor, " tokens"], settings: Mapping[str, Any]
    ) -> "_Fronts | None":
        """Return both; None where there is no other choice, or too little text."""
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
        first, second = (" ".join(one["before_tokens"]) or "none" for one in (known, other))
        return cls(text, (used, other["before"]), (first, second))

    @property
    def rows(self) -> list[Int64[Tensor, "1 _"]]:
        """Token ids of both, each a batch."""
        fronts = (torch.tensor(front, dtype=torch.int64) for front in self.fronts)
        return [torch.cat([front, self.text])[None] for front in fronts]

    def effect(self, found: Iterator[tuple[Tensor, Parts]]) -> AffixEffect:
        """Return the mean losses of all tokens but the first; ids and logits of both come next."""
        count = len(self.text) - 1
        losses = [
            float(losses_in_parts(parts, ids, around=(len(front) + 1, 0))[0]) / count
            for front, (ids, parts) in zip(self.fronts, found, strict=False)
        ]
        return AffixEffect(*self.names, losses[0], losses[1], count)


def tell(effect: AffixEffect | None) -> None:
    """Print the note, if there is one, on standard error."""
    if effect is not None and effect.note is not None:
        tell_line(effect.note)


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
    def of(
        cls, losses: Float[Tensor, " n_windows"], text: EvaluationText, *, prefix: int = 0
    ) -> "Perplexity":
        """Return the perplexity that the windows' losses (from `window_losses`) amount to.

        ``prefix`` first tokens of every window are not scored.

        For models that are run in parts, such as block by block.
        """
        if losses.shape != (text.n_windows,):
            raise InvalidInput(
                f"`losses` must have one value for each of {text.n_windows} windows; got shape "
                f"{tuple(losses.shape)}."
            )
        values = losses.detach().cpu().double().numpy().copy()
        values.setflags(write=False)
        if prefix:
            protocol = {**text.describe(), "prefix": prefix}
            n_tokens = len(values) * (text.seq_len - prefix)
            return cls(values, protocol, n_tokens, None, None)
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
    probe = _Fronts.of(language_model, text.rows.sequence(0), text.settings)
    found, effect = _measure(
        language_model, text, batch_size=batch_size, progress=progress, probe=probe
    )
    if progress is not False:
        tell(effect)
    return replace(found, special_tokens_effect=effect)


def measure_perplexity(
    model: AnyModel,
    text: EvaluationText,
    *,
    batch_size: int | None = None,
    prefix: int = 0,
    progress: bool | None = None,
) -> Perplexity:
    """Measure as `perplexity`, without looking at the other choice of special tokens.

    For one model that is measured many times, changed or not. The first ``prefix`` tokens of every
    window are read but not scored.
    """
    language_model = as_causal_model(model)
    text = as_evaluation(text, language_model)
    check_prefix(prefix, text)
    return _measure(
        language_model, text, batch_size=batch_size, progress=progress, probe=None, prefix=prefix
    )[0]


def _measure(
    model: LanguageModel,
    text: EvaluationText,
    *,
    batch_size: int | None,
    progress: bool | None,
    probe: _Fronts | None,
    prefix: int = 0,
) -> tuple[Perplexity, AffixEffect | None]:
    """Measure a text, and before it both choices of special tokens in front, in one go."""
    per_pass = windows_in_a_pass(batch_size, model, text)
    probes = [] if probe is None else probe.rows
    held, effect = evaluating(model.module), None
    with held, ProgressBar("perplexity", enabled=progress) as bar, window_memory(per_pass):
        bar.start(text.n_windows + len(probes), "windows")
        every, ranks = [ids for _, ids in text.rows.batches(per_pass)], current()
        batches = [*probes, *(every[i] for i in ranks.part(len(every)))]
        found = next_tokens_in_parts(model, batches, report=bar.advance)
        if probe is not None:
            effect = probe.effect(found)
        losses = [torch.zeros(0, dtype=torch.float64)]
        around = (prefix, 0) if prefix else text.around
        losses += [losses_in_parts(parts, ids, around=around) for ids, parts in found]
        joined = ranks.joined(torch.cat(losses))
    return Perplexity.of(joined, text, prefix=prefix), effect


def check_prefix(prefix: int, text: EvaluationText) -> int:
    """Return the number of first tokens that are not scored, if tokens are left to score.

    Raises
    ------
    InvalidInput
        If none are, or windows are padded.
    """
    prefix = whole("prefix", prefix, least=0)
    if prefix and (prefix >= text.seq_len - 1 or text.mask is not None):
        raise InvalidInput(
            f"`prefix` must leave tokens to score, in windows without pads; got {prefix} of "
            f"windows of {text.seq_len}{'' if text.mask is None else ', padded'}."
        )
    return prefix


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


def evaluate_models(
    models: Iterable[tuple[str, AnyModel]],
    text: Source,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, Perplexity]:
    """Measure the perplexity of several models on one text.

    How much special tokens matter is measured of the first one (see `perplexity`).

    Parameters
    ----------
    models
        Label and model (as in `perplexity`), the dense one first. They are asked for one at a time,
        so that a generator may load, or change the weights, in between.
    text, batch_size, progress
        As in `perplexity`.

    Returns
    -------
    dict
        Result of each label, in the order given.

    Raises
    ------
    InvalidInput
        If two models have the same label; and as `perplexity`.
    """
    results: dict[str, Perplexity] = {}
    for label, model in models:
        if label in results:
            raise InvalidInput(f"every model must have a label of its own; got {label!r} twice.")
        text = as_evaluation(text, as_language_model(model))
        measure = measure_perplexity if results else perplexity
        results[label] = measure(model, text, batch_size=batch_size, progress=progress)
    return results


def perplexity_table(
    results: Mapping[str, Perplexity], *, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return one row a model; ratios are to the first, which is the dense baseline.

    Parameters
    ----------
    results
        From `evaluate_models`, all on one text.
    n_boot, seed
        Of the interval of the ratio, as in `perplexity_ratio`.

    Returns
    -------
    pandas.DataFrame
        Columns ``model``, ``perplexity``, ``ratio`` with its 95 % interval ``ratio_low`` and
        ``ratio_high``, ``word_perplexity``, ``bits_per_byte``, ``windows``, ``tokens``,
        ``special_tokens`` (those around every window, in words), ``flag``.

    Raises
    ------
    InvalidInput
        If there is no result, or two are not on the same text.
    """
    if not results:
        raise InvalidInput("`results` must hold at least one result; got none.")
    baseline = next(iter(results.values()))
    rows = []
    for label, result in results.items():
        ratio = perplexity_ratio(result, baseline, n_boot=n_boot, seed=seed)
        rows.append(
            {
                "model": label,
                "perplexity": result.value,
                "ratio": ratio.value,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "word_perplexity": result.word_perplexity,
                "bits_per_byte": result.bits_per_byte,
                "windows": len(result.window_losses),
                "tokens": result.n_tokens,
                "special_tokens": special_tokens_of(result.protocol),
                "flag": result.flag,
            }
        )
    return pd.DataFrame(rows).astype({"word_perplexity": float, "bits_per_byte": float})


def perplexity_ratio(
    result: Perplexity,
    baseline: Perplexity,
    *,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the ratio of two perplexities with a paired percentile bootstrap interval.

    Windows are resampled with replacement, the same ones for both models: what a window's text
    makes easy or hard cancels.

    Parameters
    ----------
    result, baseline
        On the same text; the ratio is result / baseline.
    n_boot
        Number of resamples.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Returns
    -------
    Interval
        Ends are NaN if there is one window only. All is NaN if a loss is NaN or both are infinite.

    Raises
    ------
    InvalidInput
        If the texts differ or a value is out of range.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    if result.protocol["digest"] != baseline.protocol["digest"]:
        raise InvalidInput(
            "perplexities must be of the same windows to be compared; got digests "
            f"{result.protocol['digest']} and {baseline.protocol['digest']}."
        )
    return perplexity_ratio_interval(
        result.window_losses, baseline.window_losses, result.window_tokens, result.n_tokens,
        n_boot=n_boot, seed=seed, level=level,
    )  # fmt: skip
