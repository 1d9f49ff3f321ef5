"""Which special tokens stand around a text: the policy, and the model's habit.

A model that was trained with a token in front of every text is in another regime without it. The
policy ``model`` therefore puts around every sequence what the model's tokenizer puts around a text;
``none`` puts nothing; ``published`` is the protocol of the SparseGPT, GPTQ and Wanda codes, which
tokenise the joined documents once, with the tokenizer's special tokens, and cut windows from that,
so that the tokens in front are in the first window of the text only.

A model's habit: the special tokens that its tokenizer puts before and after a text.

Two places tell it. The tokenizer's settings may say ``add_bos_token`` and ``add_eos_token``; and
the tokenizer itself adds tokens to an encoded text, by its post-processor. Where both are there and
contradict each other the settings are right: files that were converted lose the post-processor, and
others (Phi-3) keep one that the settings switch off. A mere ``bos_token`` is no evidence.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Int64
from tokenizers import Encoding, Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.errors import InvalidInput, unknown_name
from entangle.runs.provenance import POLICIES
from entangle.runs.reading import READ_ERRORS, no_pickles

FLAGS = ("add_bos_token", "add_eos_token")
_SETTINGS = "tokenizer_config.json"
_TEXT = -1  # stands for a text; no token has this id

Sides = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Habit:
    """The special tokens around one text."""

    before: tuple[int, ...]
    """Ids in front of a text."""
    after: tuple[int, ...]
    """Ids behind it."""
    evidence: str
    """What tells so: ``add_bos_token = True``, ``post-processor``, or ``none``."""


def model_habit(tokenizer: PreTrainedTokenizerBase) -> Habit:
    """Return the special tokens that a model expects around a text.

    In this order: what the tokenizer's settings say by ``add_bos_token`` and ``add_eos_token``
    (those it was made with, or of a GGUF file, or of its ``tokenizer_config.json``); what the
    tokenizer adds by itself; none. A setting speaks of the BOS or EOS token alone: others, such as
    BERT's ``[CLS]``, stay.

    Raises
    ------
    InvalidInput
        If the tokenizer puts special tokens elsewhere than before and after a text.
    """
    own = added_by_itself(tokenizer)
    stored = _stored_flags(tokenizer)
    given = [_given_flag(tokenizer, name) for name in FLAGS]
    said = [
        stored.get(name) if flag is None else flag for name, flag in zip(FLAGS, given, strict=True)
    ]
    sides = _as_said(own, said, tokenizer)
    if sides != own and _as_said(own, given, tokenizer) == own and _was_changed(tokenizer, own):
        sides, said = own, [None, None]  # by hand, after it was loaded: the latest word
    evidence = [
        f"{name} = {flag}" for name, flag in zip(FLAGS, said, strict=True) if flag is not None
    ]
    if any(own) and sides == own:
        evidence.append("post-processor")
    return Habit(tuple(sides[0]), tuple(sides[1]), ", ".join(evidence) or "none")


def added_by_itself(tokenizer: PreTrainedTokenizerBase) -> Sides:
    """Return the ids that a tokenizer adds before and after a text.

    No text is tokenised: a stand-in for one goes through the post-processor, so that it does not
    matter which letters the vocabulary has.

    Raises
    ------
    InvalidInput
        If it puts them elsewhere.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    if isinstance(backend, Tokenizer):
        processor = backend.post_processor
        if processor is None:
            return [], []
        done = processor.process(_stand_in(), None, add_special_tokens=True)
        marks = done.special_tokens_mask
        ids = [token if mark else _TEXT for token, mark in zip(done.ids, marks, strict=True)]
    else:
        ids = _built(tokenizer)
    if ids.count(_TEXT) != 1:
        raise InvalidInput(
            "`special_tokens` 'model' and 'published' need a tokenizer that puts them only before "
            f"and after a text; got {type(tokenizer).__name__}: choose 'none'."
        )
    place = ids.index(_TEXT)
    return ids[:place], ids[place + 1 :]


@cache
def _stand_in() -> Encoding:
    """Return an encoded text of one token, of a vocabulary of its own."""
    return Tokenizer(models.WordLevel({"text": 0}, "text")).encode("text")


def _built(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what a tokenizer in Python makes of a text, which is `_TEXT`."""
    build = getattr(tokenizer, "build_inputs_with_special_tokens", None)
    if build is not None:
        return list(build([_TEXT]))
    added: Any = tokenizer("", add_special_tokens=True)
    return [_TEXT] if not added["input_ids"] else []


def _as_said(own: Sides, said: list[bool | None], tokenizer: PreTrainedTokenizerBase) -> Sides:
    """Return both sides as the settings say: with or without the BOS and the EOS token."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    before, after = (_side(*one) for one in zip(own, said, ids, strict=True))
    return before, after


def _side(own: list[int], said: bool | None, token: int | None) -> list[int]:
    if said is None or token is None:
        return own
    if said:
        return own if token in own else [token]
    return [one for one in own if one != token]


def _given_flag(tokenizer: PreTrainedTokenizerBase, name: str) -> bool | None:
    """Return a setting that the tokenizer was made with, or that was switched on since.

    The default of its class is nobody's word.
    """
    given, now = getattr(tokenizer, "init_kwargs", {}).get(name), getattr(tokenizer, name, None)
    if now is True and given is not True:
        return True
    parameters = inspect.signature(type(tokenizer).__init__).parameters
    by_default = name in parameters and parameters[name].default == given
    return None if given is None or by_default else bool(given)


def _stored_flags(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return the settings in the tokenizer's own file, which transformers drops on loading."""
    name = str(tokenizer.name_or_path or "")
    try:
        beside = Path(name) / _SETTINGS if name else None
        if beside is not None and not beside.is_file():
            cached = try_to_load_from_cache(name, _SETTINGS)
            beside = Path(cached) if isinstance(cached, str) else None
        settings = {} if beside is None else json.loads(beside.read_text("utf-8"))
    except READ_ERRORS:  # no name of a model, or no file that can be read
        return {}
    if not isinstance(settings, dict):
        return {}
    return {name: settings[name] for name in FLAGS if isinstance(settings.get(name), bool)}


def _was_changed(tokenizer: PreTrainedTokenizerBase, own: Sides) -> bool:
    """Tell whether a tokenizer adds other tokens than when its files are loaded afresh."""
    try:
        with no_pickles("the tokenizer"):
            fresh = type(tokenizer).from_pretrained(tokenizer.name_or_path, local_files_only=True)
    except Exception:  # the tokenizers library raises the bare class
        return False
    return added_by_itself(fresh) != own


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
        As `entangle.texts.special_tokens.model_habit`, unless the policy is ``none``.
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
