"""Texts to evaluate on: tokenised once, cut into windows that do not overlap.

Next-token losses from logits, in bounded memory.

Cutting tokens into windows that lie end to end, for evaluation.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from entangle.checks import check_seq_len, whole
from entangle.errors import InvalidInput
from entangle.models.loading import LanguageModel
from entangle.runs.provenance import around_each, of_saved, shown
from entangle.texts.calibration import (
    GivenText,
    JoinedText,
    empty_rows,
    first_tokens,
    given_tokens_or_text,
)
from entangle.texts.calibration_set import CalibrationSet, check_ids, is_running
from entangle.texts.documents import TextSource, as_path, open_texts
from entangle.texts.given import Source, Wanted, label_of
from entangle.texts.special_tokens import DEFAULT_POLICY, describe_tokenizer
from entangle.texts.token_files import TokenFile, TokenRows, first_columns, real_rows
from entangle.texts.words import count_predicted

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
    return losses_in_parts([(0, logits)], ids, around=around)


def losses_in_parts(
    parts: Iterable[tuple[int, Float[Tensor, "windows part vocabulary"]]],
    ids: Int64[Tensor, "windows tokens"],
    *,
    around: tuple[int, int] = (0, 0),
) -> Float[Tensor, " windows"]:
    """As `window_losses`, to the bit, of logits that come a part of the tokens after the other.

    With each part, in order, goes the place of its first token.
    """
    windows, tokens = ids.shape
    first, last = max(around[0], 1), tokens - around[1]
    if windows == 0 or last <= first:
        raise InvalidInput(
            f"`ids` must hold at least 1 window of {1 + first + around[1]} tokens; got shape "
            f"({windows}, {tokens})."
        )
    low, high = (int(bound) for bound in torch.aminmax(ids))
    found: list[list[Tensor]] = [[] for _ in range(windows)]
    for start, logits in parts:
        _check_vocabulary(low, high, logits.shape[-1])
        begin, end = max(first - 1, start), min(last - 1, start + logits.shape[1])
        rows = max(1, LOGITS_AT_ONCE // logits.shape[-1])
        targets = ids[:, begin + 1 : end + 1].to(logits.device)
        counted = logits[:, begin - start : max(begin, end) - start]
        for own, window, target_row in zip(found, counted, targets, strict=True):
            own += [
                functional.cross_entropy(part.float(), target, reduction="none")
                for part, target in zip(window.split(rows), target_row.split(rows), strict=True)
            ]
    losses = torch.cat([loss for own in found for loss in own])
    return losses.cpu().double().view(windows, last - first).sum(1)


def _check_vocabulary(low: int, high: int, vocabulary: int) -> None:
    if low < 0 or high >= vocabulary:
        raise InvalidInput(
            f"token ids must lie in [0, {vocabulary}), as many as there are logits; "
            f"got {low if low < 0 else high}."
        )


DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How long the windows are, and how many of them are taken."""

    seq_len: int | None
    """Tokens in a window; None for `DEFAULT_SEQ_LEN` or the context, or a table's columns."""
    n_windows: int | None
    """Windows taken, from the first on; None for all."""
    context_length: int | None
    """Longest sequence that the model accepts."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("n_windows", 1)):
            value = getattr(self, name)
            counted = None if value is None else whole(name, value, least=least)
            object.__setattr__(self, name, counted)
        self._check_context(self.seq_len or 2)

    @property
    def window(self) -> int:
        """Tokens in a window of a text, special ones included."""
        return self.seq_len or min(DEFAULT_SEQ_LEN, self.context_length or DEFAULT_SEQ_LEN)

    def running_text(
        self,
        tokens: Int64[Tensor, " tokens"],
        *,
        where: str,
        around: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> Int64[Tensor, "n_windows seq_len"]:
        """Return a text's windows, each between the ids ``around`` it; the rest is dropped.

        Raises
        ------
        InvalidInput
            If the text is too short; the message has the largest size that fits.
        """
        head, foot = (torch.tensor(ids, dtype=torch.int64) for ids in around)
        n_special = len(head) + len(foot)
        length = self.window - n_special
        if length < 1:
            raise InvalidInput(
                f"`seq_len` must leave room for text beside {n_special} special tokens; "
                f"got {self.window}."
            )
        available = len(tokens) // length
        if available == 0:
            longest = len(tokens) + n_special
            remedy = f"lower `seq_len` to at most {longest} or " if longest > 1 else ""
            raise InvalidInput(
                f"{where} has {len(tokens)} tokens, but one window of `seq_len` {self.window} "
                f"needs {length}; {remedy}give a longer text."
            )
        taken = self._taken(available, where)
        text = tokens[: taken * length].view(taken, length)
        return torch.cat([head.expand(taken, -1), text, foot.expand(taken, -1)], dim=1)

    def rows(
        self,
        table: Int64[Tensor, "rows columns"],
        *,
        where: str,
        mask: Bool[Tensor, "rows columns"] | None = None,
    ) -> tuple[Int64[Tensor, "n_windows seq_len"], Bool[Tensor, "n_windows seq_len"] | None, int]:
        """Return the first rows and columns of a table of ids, all of them if not asked.

        Rows with fewer than 2 tokens beside their pads are left out, as nothing is predicted in
        them; their number comes last. A row that is cut keeps its first tokens.

        Raises
        ------
        InvalidInput
            If the table has fewer, or its rows are longer than the model's context.
        """
        table, mask, left_out = real_rows(table, mask, least=2)
        rows, columns = table.shape
        length = self.seq_len or columns
        whole("seq_len", length, least=2)
        self._check_context(length if mask is None else min(length, int(mask.sum(1).max())))
        if length > columns:
            raise InvalidInput(
                f"`seq_len` must be at most {columns}, the columns of {where}; got {length}."
            )
        taken = self._taken(rows, where)
        ids, mask = first_columns(table[:taken], None if mask is None else mask[:taken], length)
        return ids.clone(), mask, left_out

    def _taken(self, available: int, where: str) -> int:
        taken = self.n_windows or available
        if taken > available:
            raise InvalidInput(
                f"`n_windows` must be at most {available}, as many as {where} has; got {taken}."
            )
        return taken

    def _check_context(self, seq_len: int) -> None:
        check_seq_len(seq_len, self.context_length)


DEFAULT_SPLIT = "test"
_OTHERWISE = "validation"
"""The split of a data set that has no split ``test``."""
_SPLITS = {"c4": _OTHERWISE}  # it has no test split


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """Windows of token ids, made once for all models that share a tokenizer."""

    windows: Int64[Tensor, "n_windows seq_len"]
    """Token ids, shape (n_windows, seq_len), int64, on the CPU; all but a window's first token
    are predicted, and of special tokens ``around`` the text none."""
    source: str
    """What the user gave: a name, a data set's id, a path, or the kind of an array."""
    settings: Mapping[str, object]
    """Everything else that decided the windows; JSON-serialisable."""
    n_words: int | None = None
    """Words (between white space) that begin in predicted tokens; None where unknown."""
    n_bytes: int | None = None
    """Bytes of the predicted tokens' text in UTF-8; None where unknown."""
    mask: Bool[Tensor, "n_windows seq_len"] | None = None
    """As `CalibrationSet.mask`: False where an id is a pad, which is neither read nor predicted."""
    around: tuple[int, int] = (0, 0)
    """Special tokens at the beginning and at the end of every window: read, but not predicted. The
    window does not end where its text ends, so one at its end says nothing of the model."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise InvalidInput(
                f"`windows` must have at least 2 tokens each; got shape {tuple(self.windows.shape)}"
                ": nothing would be predicted."
            )
        checked = CalibrationSet(self.windows, self.source, self.settings, self.mask)
        object.__setattr__(self, "settings", MappingProxyType(dict(checked.settings)))
        object.__setattr__(self, "windows", checked.ids)
        object.__setattr__(self, "mask", checked.mask)
        needed = 1 + self.first_predicted + self.around[1]
        if (shortest := min(self.rows.lengths)) < needed:
            raise InvalidInput(
                f"every window must have at least {needed} tokens beside its pads; got {shortest}."
            )

    @property
    def n_windows(self) -> int:
        """Number of windows."""
        return self.windows.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in a window, special ones and pads included."""
        return self.windows.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens that are predicted and counted: all but each window's first.

        Special ones around the text and pads are left out.
        """
        return int(self.window_tokens.sum())

    @property
    def window_tokens(self) -> NDArray[np.int64]:
        """Tokens that are predicted and counted in each window, shape (n_windows,)."""
        unpredicted = self.first_predicted + self.around[1]
        return np.array(self.rows.lengths, dtype=np.int64) - unpredicted

    @property
    def first_predicted(self) -> int:
        """Place in a window of the first token that is predicted, pads left out."""
        return max(self.around[0], 1)

    @property
    def special_tokens(self) -> str:
        """The special tokens around the text in words: ``<s> …``, ``none``, ``unknown`` of ids."""
        return shown(self.settings)

    def losses(
        self, logits: Float[Tensor, "windows tokens _"], ids: Int64[Tensor, "windows tokens"]
    ) -> Float[Tensor, " windows"]:
        """Return the summed loss of the predicted tokens of some windows, as `window_losses`."""
        return window_losses(logits, ids, around=self.around)

    def losses_in_parts(
        self, parts: Iterable[tuple[int, Tensor]], ids: Int64[Tensor, "windows tokens"]
    ) -> Float[Tensor, " windows"]:
        """As `losses`, of logits that come in parts (`losses_in_parts`)."""
        return losses_in_parts(parts, ids, around=self.around)

    @property
    def longest(self) -> int:
        """Tokens of the longest window, pads left out."""
        return max(self.rows.lengths)

    @cached_property
    def rows(self) -> TokenRows:
        """The windows without their pads."""
        return TokenRows(self.windows, self.mask)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the windows, in hexadecimal, as `CalibrationSet.digest`."""
        return CalibrationSet(self.windows, self.source, {}, self.mask).digest

    def describe(self) -> dict[str, object]:
        """Return the protocol: source, sizes, counts, digest and settings, JSON-serialisable.

        Where there are pads, ``window_tokens`` has the predicted tokens of every window.
        """
        padded = {} if self.mask is None else {"window_tokens": self.window_tokens.tolist()}
        return {
            "source": self.source,
            "seq_len": self.seq_len,
            "stride": self.seq_len,
            "n_windows": self.n_windows,
            "n_tokens": self.n_tokens,
            **padded,
            "n_words": self.n_words,
            "n_bytes": self.n_bytes,
            "digest": self.digest,
            "settings": dict(self.settings),
        }


def load_evaluation(
    source: Source = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seq_len: int | None = None,
    n_windows: int | None = None,
    split: str | None = None,
    config: str | None = None,
    column: str | None = None,
    join: str = "\n\n",
    special_tokens: str = DEFAULT_POLICY,
    add_special_tokens: bool | None = None,
    context_length: int | None = None,
    vocab_size: int | None = None,
) -> EvaluationText:
    """Cut a text into windows to evaluate on, by the protocol of the SparseGPT and GPTQ codes.

    The documents are joined by ``join``, tokenised as one text, and cut into windows that lie end
    to end from the first token on; the incomplete last one is dropped. Every window stands between
    the special tokens that the model expects around a text.

    Parameters
    ----------
    source
        As in `entangle.texts.calibration.load_calibration`. Ids of shape (tokens,), and one row
        that is longer than ``seq_len`` or the context, are cut like a text; the rows of ids of
        shape (rows, columns) are windows, without those in which there is nothing to predict.
    tokenizer
        Needed for a text, not used for token ids.
    seq_len
        Tokens in a window, special ones included. If not given 2048 or ``context_length``,
        whichever is less, or all columns of a table of ids.
    n_windows
        Take only the first windows, and read no more of the text than they need; None for all.
    split
        Split of a data set, or of a folder whose files are named by splits; if not given ``test``,
        or ``validation`` where there is no ``test``, which is said.
    config, column
        As in `entangle.texts.documents.load_texts`.
    join
        Put between documents, taken as it is.
    special_tokens
        As in `entangle.texts.calibration.load_calibration`. Those in front of a window are not
        predicted, its first token of text is. Those behind it are in the window, but not counted:
        it does not end where a text ends. With ``"published"`` windows are cut from the text and
        the special tokens around it, and all but each window's first token are predicted, as in
        that code.
    add_special_tokens
        The older option: True means ``"model"``, False ``"none"``.
    context_length, vocab_size
        The model's: longer windows and ids outside [0, vocab_size) are refused.

    Returns
    -------
    EvaluationText
        ``settings`` has the options and the number of tokens dropped at the end (None with
        ``n_windows``). Words and bytes are counted where the tokenizer is a fast one, which knows
        every token's place.

    Raises
    ------
    InvalidInput
        If a size is out of range, the text is shorter than asked, or the tokenizer is missing or
        does not fit the model.
    Unavailable, UnknownName
        As in `entangle.texts.documents.load_texts`.

    Notes
    -----
    To count words, all text that is read stays in memory, with some 170 bytes for a character
    while the tokens' places are looked up.
    """
    cut = Cut(seq_len=seq_len, n_windows=n_windows, context_length=context_length)
    wanted = Wanted(split, config, column, (DEFAULT_SPLIT, _OTHERWISE), cut.n_windows)
    found = given_tokens_or_text(
        source, tokenizer, wanted, special_tokens=special_tokens,
        add_special_tokens=add_special_tokens, opened=_open,
    )  # fmt: skip
    if isinstance(found, TokenFile):
        text = _from_ids(found, cut, label_of(source))
    else:
        text = _from_text(found, cut, join, label_of(source))
    check_ids(text.windows, vocab_size)
    return text


def as_evaluation(source: Source, model: LanguageModel) -> EvaluationText:
    """Return a text to evaluate on that fits a model.

    Parameters
    ----------
    source
        A text, which is returned as it is, or whatever else `load_evaluation` takes, with its
        default settings.
    model
        Its tokenizer makes the tokens of a text.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If a window is longer than the model's context or an id no token of it; and as
        `load_evaluation`.
    """
    limit = model.context_length
    if not isinstance(source, EvaluationText):
        return load_evaluation(
            source, model.tokenizer, context_length=limit, vocab_size=model.vocab_size
        )
    check_seq_len(source.longest, limit)
    check_ids(source.windows, model.vocab_size)
    return source


def _from_ids(stored: TokenFile, cut: Cut, label: str) -> EvaluationText:
    if not is_running(stored.ids, cut.seq_len or cut.context_length):
        windows, mask, left_out = cut.rows(stored.ids, where=label, mask=stored.mask)
        known = of_saved(stored.origin, whole=windows.shape[1] == stored.ids.shape[1])
        settings = {"cut": "rows", **known, **empty_rows(left_out, label, least=2)}
        return EvaluationText(windows, label, settings, mask=mask, around=around_each(known))
    ids = stored.ids if stored.mask is None else stored.ids[stored.mask]
    ids = ids.flatten()
    windows = cut.running_text(ids, where=label)
    return EvaluationText(windows, label, {"cut": "contiguous", **_dropped(cut, ids, windows)})


class _KeptText(JoinedText):
    """A joined text that stays in memory, to look up the tokens' places in it."""

    def forget(self, begin: int) -> None:
        """Keep everything."""


def _from_text(given: GivenText, cut: Cut, join: str, label: str) -> EvaluationText:
    where, tokenizer, specials = repr(label), given.tokenizer, given.specials
    n_around = (len(specials.around[0]), len(specials.around[1]))
    text = _KeptText(given.texts.documents, join)
    length = max(cut.window - sum(n_around), 1)
    wanted = sys.maxsize if cut.n_windows is None else cut.n_windows * length
    tokens = first_tokens(text, tokenizer, wanted)
    if not text.holds_text:
        raise InvalidInput(f"{where} holds no text: every document in it is empty.")
    running = specials.enclose(tokens.ids, complete=tokens.whole_text and len(tokens.ids) < wanted)
    windows = cut.running_text(running, where=where, around=specials.around)
    n_first = len(specials.before) if specials.once else 0
    n_taken = min(len(windows) * length - n_first, len(tokens.ids))
    counts = count_predicted(
        text.span(0, tokens.n_characters),
        tokens.ids[:n_taken],
        tokenizer,
        n_windows=len(windows),
        skipped=0 if n_around[0] else 1,
        ends_of_text=(n_first, len(windows) * length - n_first - n_taken),
    )
    settings = {
        **given.texts.settings,
        "cut": "contiguous",
        "join": join,
        "special_tokens": dict(specials.settings),
        "tokenizer": describe_tokenizer(tokenizer),
        "n_documents": text.n_documents,
        **_dropped(cut, running, windows[:, : windows.shape[1] - sum(n_around)]),
    }
    return EvaluationText(windows, label, settings, counts.n_words, counts.n_bytes, around=n_around)


def _open(source: str | Path, wanted: Wanted) -> TextSource:
    """Open a named text at the split asked for, or else the first that there is."""
    split, splits = _split(source, wanted), tuple[str, ...]()
    if wanted.split is None and source != "demo":
        splits = tuple(dict.fromkeys((split or DEFAULT_SPLIT, _OTHERWISE)))
    return open_texts(
        source, split=split, config=wanted.config, column=wanted.column, splits=splits
    )


def _split(source: str | Path, wanted: Wanted) -> str | None:
    """Return the split asked for, or the default one where the `datasets` library reads."""
    path = as_path(source)
    local = path is not None and (path.is_file() or wanted.config is None)
    if wanted.split is not None or local or source == "demo":
        return wanted.split
    return _SPLITS.get(str(source), DEFAULT_SPLIT)


def _dropped(cut: Cut, ids: Tensor, windows: Tensor) -> dict[str, object]:
    return {"dropped_tokens": None if cut.n_windows else len(ids) - windows.numel()}
