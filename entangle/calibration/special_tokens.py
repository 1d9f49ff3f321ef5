"""Which special tokens stand around a text: the policy, and the model's habit.

A model that was trained with a token in front of every text is in another regime without it. The
policy ``model`` therefore puts around every sequence what the model's tokenizer puts around a text;
``none`` puts nothing; ``published`` is the protocol of the SparseGPT, GPTQ and Wanda codes, which
tokenise the joined documents once, with the tokenizer's special tokens, and cut windows from that,
so that the tokens in front are in the first window of the text only.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.affixes import POLICIES
from entangle.calibration.habit import Habit, model_habit
from entangle.errors import InvalidInput, unknown_name


class DefaultPolicy(str):
    """A policy that nobody asked for: it has no meaning for token ids, and is not refused there."""

    __slots__ = ()


DEFAULT_POLICY = DefaultPolicy("model")


@dataclass(frozen=True)
class Affixes:
    """The special tokens around every sequence, or around the whole text if ``published``."""

    policy: str
    """``model``, ``none`` or ``published``."""
    before: tuple[int, ...]
    """Ids in front."""
    after: tuple[int, ...]
    """Ids behind."""
    settings: Mapping[str, object]
    """What a manifest records: policy, ids and texts of both, the model's habit and what tells it,
    and what could stand in front in their place (the alternative; None if nothing could)."""

    @property
    def once(self) -> bool:
        """Whether they stand around the whole text, not around every sequence."""
        return self.policy == "published"

    @property
    def around(self) -> tuple[Sequence[int], Sequence[int]]:
        """The ids before and after every sequence."""
        return ((), ()) if self.once else (self.before, self.after)

    def enclose(self, ids: Int64[Tensor, " tokens"], *, complete: bool) -> Int64[Tensor, " more"]:
        """Put ``published`` ones around a text's ids, those behind only if it is ``complete``."""
        if not self.once:
            return ids
        ends = self.before, self.after if complete else ()
        first, last = (torch.tensor(end, dtype=torch.int64) for end in ends)
        return torch.cat([first, ids, last])


def check_policy(special_tokens: str, add_special_tokens: bool | None = None) -> str:
    """Return the policy that was asked for.

    Parameters
    ----------
    special_tokens
        ``model``, ``none`` or ``published``.
    add_special_tokens
        The older option, accepted for one more release: True means ``model``, False ``none``.

    Raises
    ------
    UnknownName
        If there is no such policy.
    InvalidInput
        If both are given and contradict each other.
    """
    if special_tokens not in POLICIES:
        raise unknown_name("special_tokens", str(special_tokens), POLICIES)
    if add_special_tokens is None:
        return special_tokens
    older = "model" if add_special_tokens else "none"
    if not isinstance(special_tokens, DefaultPolicy) and special_tokens != older:
        raise InvalidInput(
            f"`special_tokens` {special_tokens!r} contradicts `add_special_tokens` "
            f"{add_special_tokens!r}, which means {older!r}; leave the second one out."
        )
    return older


def no_policy(special_tokens: str, add_special_tokens: bool | None) -> dict[str, str | bool | None]:
    """Return the options that were given and have no meaning for token ids, None for the others."""
    silent = special_tokens == "none" or isinstance(special_tokens, DefaultPolicy)
    return {
        "special_tokens": None if silent else special_tokens,
        "add_special_tokens": add_special_tokens or None,
    }


def affixes(tokenizer: PreTrainedTokenizerBase, policy: str) -> Affixes:
    """Return the special tokens that a policy puts around the sequences of one tokenizer.

    Raises
    ------
    InvalidInput
        As `entangle.calibration.habit.model_habit`, unless the policy is ``none``.
    """
    habit = _habit(tokenizer, needed=policy != "none")
    before, after = ((), ()) if policy == "none" else (habit.before, habit.after)
    settings = {
        "policy": policy,
        "before": list(before),
        "after": list(after),
        "before_tokens": _texts(tokenizer, before),
        "after_tokens": _texts(tokenizer, after),
        "habit": {
            "before": list(habit.before),
            "after": list(habit.after),
            "evidence": habit.evidence,
        },
        "alternative": _alternative(tokenizer, before, habit),
    }
    return Affixes(policy, before, after, settings)


def _alternative(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], habit: Habit
) -> dict[str, object] | None:
    """Return what could be in front instead: nothing, or the habit's tokens, or BOS."""
    bos = tokenizer.bos_token_id
    other = () if before else habit.before or (() if bos is None else (bos,))
    if not before and not other:
        return None
    return {"before": list(other), "before_tokens": _texts(tokenizer, other)}


def _habit(tokenizer: PreTrainedTokenizerBase, *, needed: bool) -> Habit:
    try:
        return model_habit(tokenizer)
    except InvalidInput:
        if needed:
            raise
        return Habit((), (), "unknown")


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return class, name, size and SHA-256 of the vocabulary (token and id pairs, sorted)."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "class": type(tokenizer).__name__,
        "name": str(tokenizer.name_or_path),
        "n_tokens": len(tokenizer),
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }
