"""Log-probabilities of minimal pairs under a language model."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.calibration.calibration_set import check_ids
from entangle.calibration.special_tokens import (
    DEFAULT_POLICY,
    affixes,
    check_policy,
    describe_tokenizer,
)
from entangle.checks import whole
from entangle.errors import InvalidInput
from entangle.evaluation.forward import as_causal_model, memory_limit, next_token_logits
from entangle.evaluation.losses import window_losses
from entangle.evaluation.pair_scores import PairScores
from entangle.evaluation.pairs import MinimalPairs
from entangle.models.evaluating import evaluates
from entangle.models.loading import AnyModel, LanguageModel
from entangle.models.pretrained import broken_as
from entangle.progress import ProgressBar

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
