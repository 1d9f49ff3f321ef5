"""Log-probabilities of minimal pairs under a language model.

Minimal pairs: sentences that differ in one point, one acceptable and the other not.

What the log-probabilities of minimal pairs amount to: accuracies with intervals.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.checks import bootstrap, whole
from entangle.errors import InvalidInput
from entangle.evaluation.logits import as_causal_model, memory_limit, next_token_logits
from entangle.models.blocks import evaluates
from entangle.models.loading import AnyModel, LanguageModel
from entangle.models.pretrained import broken_as
from entangle.runs.progress import ProgressBar
from entangle.stats.intervals import Interval, pairs_interval, share_interval
from entangle.texts.calibration_set import check_ids
from entangle.texts.evaluation import window_losses
from entangle.texts.special_tokens import DEFAULT_POLICY, affixes, check_policy, describe_tokenizer

RESERVED = ("overall", "macro")
"""Names of rows over all paradigms in tables of accuracies."""


@dataclass(frozen=True, eq=False)
class MinimalPairs:
    """Pairs of sentences, each of a paradigm (one kind of contrast, such as ``wh_island``)."""

    good: tuple[str, ...]
    """Acceptable sentence of each pair, shape (n_pairs,)."""
    bad: tuple[str, ...]
    """Unacceptable sentence of each pair, shape (n_pairs,)."""
    paradigms: tuple[str, ...]
    """Paradigm of each pair, shape (n_pairs,)."""
    source: str
    """What the user gave: ``blimp``, a data set's id or a path."""
    settings: Mapping[str, object]
    """Everything else that decided the pairs; JSON-serialisable."""

    def __post_init__(self) -> None:
        sizes = {len(self.good), len(self.bad), len(self.paradigms)}
        if len(sizes) > 1 or not self.good:
            raise InvalidInput(
                "`good`, `bad` and `paradigms` must have one value for each of at least 1 pair; "
                f"got {len(self.good)}, {len(self.bad)} and {len(self.paradigms)}."
            )
        for number, (good, bad) in enumerate(zip(self.good, self.bad, strict=True)):
            check_pair(good, bad, f"pair {number}")
        for name in set(self.paradigms) & set(RESERVED):
            raise InvalidInput(
                f"a paradigm must not be called {name!r}, which names a row over all paradigms; "
                "rename it."
            )
        copied = json.loads(json.dumps(dict(self.settings)))
        object.__setattr__(self, "settings", MappingProxyType(copied))

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return len(self.good)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Number of pairs of every paradigm, in the order in which they come first."""
        return MappingProxyType(dict(Counter(self.paradigms)))

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of paradigm, good and bad sentence, as one JSON list a line."""
        rows = zip(self.paradigms, self.good, self.bad, strict=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        return hashlib.sha256(lines.encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        """Return source, counts, digest and settings, JSON-serialisable, for a run's manifest."""
        return {
            "source": self.source,
            "n_pairs": self.n_pairs,
            "paradigms": dict(self.counts),
            "digest": self.digest,
            "settings": dict(self.settings),
        }


def check_pair(good: str, bad: str, where: str) -> None:
    """Raise `InvalidInput` if a sentence is empty or no Unicode text, or both are the same."""
    if not good.strip() or not bad.strip():
        raise InvalidInput(f"both sentences of a pair must hold text; one of {where} is empty.")
    if any("\ud800" <= character <= "\udfff" for character in good + bad):
        raise InvalidInput(
            f"both sentences of a pair must be Unicode text; one of {where} has half a surrogate "
            "pair: mend it."
        )
    if good == bad:
        raise InvalidInput(f"the sentences of a pair must differ; both of {where} are {good!r}.")


Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PairScores:
    """Log-probabilities that one model gives to the sentences of minimal pairs."""

    good: Floats
    """Summed log-probability of each acceptable sentence in nats, shape (n_pairs,)."""
    bad: Floats
    """Summed log-probability of each unacceptable sentence in nats, shape (n_pairs,)."""
    pairs: MinimalPairs
    """The pairs."""
    settings: Mapping[str, object]
    """How sentences were scored; JSON-serialisable."""

    def __post_init__(self) -> None:
        for name in ("good", "bad"):
            values = np.array(getattr(self, name), dtype=np.float64)
            if values.shape != (self.pairs.n_pairs,):
                raise InvalidInput(
                    f"`{name}` must have one value for each of {self.pairs.n_pairs} pairs; got "
                    f"shape {values.shape}."
                )
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the good sentence is the more probable one, shape (n_pairs,).

        False where both are equal and where one is NaN.
        """
        right: NDArray[np.bool_] = self.good > self.bad
        return right

    @property
    def accuracy(self) -> float:
        """Share of all pairs that are correct."""
        return float(self.correct.mean())

    @property
    def margins(self) -> Floats:
        """Log-probability of the good minus that of the bad sentence in nats, shape (n_pairs,)."""
        with np.errstate(invalid="ignore"):  # both impossible: NaN
            return self.good - self.bad

    @property
    def n_ties(self) -> int:
        """Pairs whose sentences are equally probable; they count as wrong."""
        return int(np.count_nonzero(self.good == self.bad))

    @property
    def flag(self) -> str:
        """``"nan"`` where a log-probability is NaN, else empty."""
        return "nan" if np.isnan([self.good, self.bad]).any() else ""

    def describe(self) -> dict[str, object]:
        """Return the pairs' description and how they were scored, JSON-serialisable."""
        return {"pairs": self.pairs.describe(), "scoring": dict(self.settings)}

    def table(self, *, level: float = 0.95, seed: int = 0, n_boot: int = 1000) -> pd.DataFrame:
        """Return one row a paradigm, then ``overall`` (all pairs) and ``macro``.

        Parameters
        ----------
        level
            Probability mass of the intervals, in (0, 1).
        seed, n_boot
            Of the bootstrap of ``macro``.

        Returns
        -------
        pandas.DataFrame
            Columns ``paradigm``, ``n_pairs``, ``n_ties``, ``accuracy``, ``low``, ``high``,
            ``mean_margin`` (nats). ``macro`` is the mean over paradigms. Intervals are Wilson's;
            that of ``macro`` is a percentile bootstrap over the pairs, NaN where these are few
            (`entangle.stats.intervals.pairs_interval`).

        Raises
        ------
        InvalidInput
            If an option is out of range.

        Notes
        -----
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
        """
        _check(n_boot, level)
        columns = {"n_ties": self.good == self.bad, "right": self.correct, "margin": self.margins}
        frame = pd.DataFrame({"paradigm": self.pairs.paradigms, **columns})
        groups = frame.groupby("paradigm", sort=False)
        rows = [_row(str(name), part, level) for name, part in groups]
        paradigms, right = np.array(self.pairs.paradigms), self.correct.astype(np.float64)
        found = pairs_interval(right, paradigms, macro=True, n_boot=n_boot, seed=seed, level=level)
        macro = {
            "paradigm": "macro",
            "n_pairs": len(frame),
            "n_ties": self.n_ties,
            "accuracy": found.value,
            "low": found.low,
            "high": found.high,
            "mean_margin": float(np.mean([row["mean_margin"] for row in rows])),
        }
        return pd.DataFrame([*rows, _row("overall", frame, level), macro])


def accuracy_difference(
    a: PairScores, b: PairScores, *, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the difference of two models' accuracies, a − b, with a paired bootstrap interval.

    Pairs are resampled with replacement, the same ones for both models: within each paradigm, or
    all together where one has few; ends are NaN where there are few in all
    (`entangle.stats.intervals.pairs_interval`).

    Parameters
    ----------
    a, b
        Scores of the same pairs; the accuracy is that over all pairs.
    n_boot
        Number of resamples.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Raises
    ------
    InvalidInput
        If the pairs differ or an option is out of range.
    """
    _check(n_boot, level)
    if a.pairs.digest != b.pairs.digest:
        raise InvalidInput(
            "accuracies must be of the same pairs to be compared; got digests "
            f"{a.pairs.digest} and {b.pairs.digest}."
        )
    gaps, paradigms = a.correct.astype(np.float64) - b.correct, np.array(a.pairs.paradigms)
    return pairs_interval(gaps, paradigms, n_boot=n_boot, seed=seed, level=level)


def _row(name: str, part: pd.DataFrame, level: float) -> dict[str, object]:
    right = int(part["right"].sum())
    interval = share_interval(right, len(part), level=level)
    return {
        "paradigm": name,
        "n_pairs": len(part),
        "n_ties": int(part["n_ties"].sum()),
        "accuracy": interval.value,
        "low": interval.low,
        "high": interval.high,
        "mean_margin": float(part["margin"].to_numpy().mean()),
    }


def _check(n_boot: int, level: float) -> None:
    n_boot, level = bootstrap(n_boot, level)


BATCH_TOKENS = 4096
LOGITS_IN_A_PASS = 2**27
"""Logits of one forward pass, unless one sentence alone has more."""

_BEFORE = " "  # the harness puts its `target_delimiter` between the empty context and a sentence


@evaluates
def minimal_pair_scores(
    model: AnyModel,
    pairs: MinimalPairs,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    special_tokens: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> PairScores:
    """Measure the log-probability of both sentences of every pair.

    A sentence, with a space before it, is tokenised without special tokens and put after those
    that ``special_tokens`` says; the log-probabilities of the sentence's own tokens are added. With
    nothing in front, the sentence's first token is not counted.

    Parameters
    ----------
    model
        As in `perplexity`.
    pairs
        From `load_minimal_pairs`.
    tokenizer
        Replaces the model's own.
    special_tokens
        ``"model"``: those that the model's tokenizer puts before a text or, if it puts none there,
        as ``"published"``, which is the harness's rule: the BOS token, or the EOS token of a
        tokenizer without BOS; ``"none"``: nothing; by default as the pairs were loaded. No token
        is put behind: the rule scores the sentence alone.
    batch_tokens
        Tokens in one forward pass, which only rounding depends on; fewer where they would give
        more than 2²⁷ logits. Sentences of equal length run together, so that there is no padding.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Returns
    -------
    PairScores
        Log-probabilities in nats, NaN where logits are; ``settings`` has the rule.

    Raises
    ------
    InvalidInput
        If the model does not predict next tokens, there is no tokenizer or it does not fit the
        model, or a sentence is longer than the context or has no token to predict.
    MemoryLimit
        If memory runs out.

    Notes
    -----
    The rule is that of EleutherAI's lm-evaluation-harness for its task ``blimp``: a multiple
    choice whose context is empty, so that the BOS or EOS token takes its place, and whose choices
    come after the default delimiter, a space. As there, a sentence whose own first token is that
    token does not get it twice.
    """
    language_model = as_causal_model(model, tokenizer)
    own = language_model.tokenizer
    if own is None:
        raise InvalidInput("minimal pairs need a tokenizer; pass the model's as `tokenizer`.")
    batch_tokens = whole("batch_tokens", batch_tokens, least=1)
    asked = pairs.settings.get("special_tokens", DEFAULT_POLICY)
    policy = check_policy(str(asked) if special_tokens is None else special_tokens)
    front = _front(own, policy)
    sentences = [*pairs.good, *pairs.bad]
    sequences = _encode(sentences, own, front)
    _check_sequences(sequences, sentences, language_model, max(len(front), 1))
    per_pass = min(batch_tokens, LOGITS_IN_A_PASS // language_model.vocab_size)
    scores = _score(language_model, sequences, len(front), per_pass, progress)
    settings = {
        "rule": "summed log-probability, as lm-evaluation-harness's blimp",
        "before_sentence": _BEFORE,
        "special_tokens": policy,
        "before_tokens": [str(own.convert_ids_to_tokens(token)) for token in front],
        "first_token": front[0] if front else None,
        "sentence_token_not_counted": not front,
        "tokenizer": describe_tokenizer(own),
    }
    return PairScores(scores[: pairs.n_pairs], scores[pairs.n_pairs :], pairs, settings)


def _front(tokenizer: PreTrainedTokenizerBase, policy: str) -> list[int]:
    """Return the special tokens in front of every sentence."""
    if policy == "none":
        return []
    habit = affixes(tokenizer, policy).before if policy == "model" else ()
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    return list(habit) or [token for token in ends if token is not None][:1]


def _encode(
    sentences: Sequence[str], tokenizer: PreTrainedTokenizerBase, front: list[int]
) -> list[list[int]]:
    """Return the token ids of each sentence after those in front."""
    with broken_as(f"tokenizer {str(tokenizer.name_or_path)!r}", verb="used"):
        encoded: Any = tokenizer(
            [_BEFORE + sentence for sentence in sentences],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
    ids: list[list[int]] = encoded["input_ids"]
    return [row if row[: len(front)] == front else [*front, *row] for row in ids]


def _check_sequences(
    sequences: Sequence[Sequence[int]],
    sentences: Sequence[str],
    model: LanguageModel,
    n_first: int,
) -> None:
    limit = model.context_length
    for row, sentence in zip(sequences, sentences, strict=True):
        if len(row) <= n_first:
            raise InvalidInput(
                f"a sentence must have a token to predict; {sentence!r} has {len(row)} token(s) "
                f"in all, and the first {n_first} is not predicted."
            )
        if limit is not None and len(row) > limit:
            raise InvalidInput(
                f"a sentence must fit into the model's context of {limit} tokens; got {len(row)} "
                f"tokens in {sentence!r}."
            )
    check_ids(torch.tensor([[token for row in sequences for token in row]]), model.vocab_size)


def _score(
    model: LanguageModel,
    sequences: Sequence[Sequence[int]],
    n_front: int,
    per_pass: int,
    progress: bool | None,
) -> NDArray[np.float64]:
    scores, around = np.empty(len(sequences)), (n_front, 0)
    lower = "batch_tokens"
    with ProgressBar("minimal pairs", enabled=progress) as bar:
        bar.start(len(sequences), "sentences")
        for places, ids in _batches(sequences, per_pass):
            with memory_limit(f"{ids.numel()} tokens", lower=lower):
                logits = next_token_logits(model, ids)
                scores[places] = -window_losses(logits, ids, around=around).numpy()
            bar.advance(len(places))
    return scores


def _batches(
    sequences: Sequence[Sequence[int]], per_pass: int
) -> Iterator[tuple[list[int], Int64[Tensor, "sentences tokens"]]]:
    """Yield places and ids of sentences of one length, the longest first."""
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(sequences):
        by_length.setdefault(len(row), []).append(place)
    for length, places in sorted(by_length.items(), reverse=True):
        size = max(1, per_pass // length)
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            yield chosen, torch.tensor([sequences[place] for place in chosen])
