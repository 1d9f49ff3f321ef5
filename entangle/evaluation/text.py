"""Texts to evaluate on: tokenised once, cut into windows that do not overlap."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.calibration import CalibrationSet
from entangle.calibration.calibration_set import check_ids
from entangle.calibration.given import Source, Wanted, find, label_of
from entangle.calibration.joined_text import JoinedText
from entangle.calibration.loading import empty_rows
from entangle.calibration.padding import Rows
from entangle.calibration.special_tokens import describe_tokenizer, special_tokens
from entangle.calibration.texts import TextSource, as_path, open_texts, refuse
from entangle.calibration.token_files import TokenFile
from entangle.calibration.tokens import first_tokens
from entangle.calibration.windows import is_running
from entangle.errors import InvalidInput
from entangle.evaluation.windows import Cut
from entangle.evaluation.words import count_predicted
from entangle.models.loading import LanguageModel

DEFAULT_SPLIT = "test"
_OTHERWISE = "validation"
"""The split of a data set that has no split ``test``."""
_SPLITS = {"c4": _OTHERWISE}  # it has no test split


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """Windows of token ids, made once for all models that share a tokenizer."""

    windows: Int64[Tensor, "n_windows seq_len"]
    """Token ids, shape (n_windows, seq_len), int64, on the CPU; all but a window's first token
    are predicted."""
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
        if (shortest := min(self.rows.lengths)) < 2:
            raise InvalidInput(
                f"every window must have at least 2 tokens beside its pads; got {shortest}."
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
        """Tokens that are predicted and counted: all but each window's first, pads left out."""
        return int(self.window_tokens.sum())

    @property
    def window_tokens(self) -> NDArray[np.int64]:
        """Tokens that are predicted in each window, shape (n_windows,)."""
        return np.array(self.rows.lengths, dtype=np.int64) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest window, pads left out."""
        return max(self.rows.lengths)

    @cached_property
    def rows(self) -> Rows:
        """The windows without their pads."""
        return Rows(self.windows, self.mask)

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
    add_special_tokens: bool = False,
    context_length: int | None = None,
    vocab_size: int | None = None,
) -> EvaluationText:
    """Cut a text into windows to evaluate on, by the protocol of the SparseGPT and GPTQ codes.

    The documents are joined by ``join``, tokenised as one text without special tokens, and cut
    into windows that lie end to end from the first token on; the incomplete last one is dropped.

    Parameters
    ----------
    source
        As in `entangle.calibration.load_calibration`. Ids of shape (tokens,), and one row that is
        longer than ``seq_len`` or the context, are cut like a text; the rows of ids of shape (rows,
        columns) are windows, without those in which there is nothing to predict.
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
        As in `entangle.calibration.load_texts`.
    join
        Put between documents, taken as it is.
    add_special_tokens
        Begin every window with the special tokens that the tokenizer puts before a text. Those
        that it puts after one are not added: a window does not end where a text ends.
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
        As in `entangle.calibration.load_texts`.

    Notes
    -----
    To count words, all text that is read stays in memory, with some 170 bytes for a character
    while the tokens' places are looked up.
    """
    cut = Cut(seq_len=seq_len, n_windows=n_windows, context_length=context_length)
    label = label_of(source)
    names = {"split": split, "config": config, "column": column}
    found = find(source, Wanted(split, config, column, (DEFAULT_SPLIT, _OTHERWISE), cut.n_windows))
    if isinstance(found, TokenFile):
        refuse(label, add_special_tokens=add_special_tokens or None)
        text = _from_ids(found, cut, label)
    else:
        text = _from_text(found, label, tokenizer, cut, join, add_special_tokens, names)
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
    if limit is not None and source.longest > limit:
        raise InvalidInput(
            f"`seq_len` must be at most the model's context, {limit}; got {source.longest}."
        )
    check_ids(source.windows, model.vocab_size)
    return source


def _from_ids(stored: TokenFile, cut: Cut, label: str) -> EvaluationText:
    if not is_running(stored.ids, cut.seq_len or cut.context_length):
        windows, mask, left_out = cut.rows(stored.ids, where=label, mask=stored.mask)
        settings = {"cut": "rows", **empty_rows(left_out, label, least=2)}
        return EvaluationText(windows, label, settings, mask=mask)
    ids = stored.ids if stored.mask is None else stored.ids[stored.mask]
    ids = ids.flatten()
    windows = cut.running_text(ids, where=label)
    return EvaluationText(windows, label, {"cut": "contiguous", **_dropped(cut, ids, windows)})


class _KeptText(JoinedText):
    """A joined text that stays in memory, to look up the tokens' places in it."""

    def forget(self, begin: int) -> None:
        """Keep everything."""


def _from_text(
    source: str | Path | TextSource,
    label: str,
    tokenizer: PreTrainedTokenizerBase | None,
    cut: Cut,
    join: str,
    add_special_tokens: bool,
    names: dict[str, str | None],
) -> EvaluationText:
    where = repr(label)
    if tokenizer is None:
        raise InvalidInput(
            f"{where} is text, so it needs a tokenizer; pass the model's, or give token ids."
        )
    opened = source if isinstance(source, TextSource) else _open(source, names)
    before = special_tokens(tokenizer)[0] if add_special_tokens else []
    text = _KeptText(opened.documents, join)
    length = max(cut.window - len(before), 1)
    wanted = sys.maxsize if cut.n_windows is None else cut.n_windows * length
    tokens = first_tokens(text, tokenizer, wanted)
    windows = cut.running_text(tokens.ids, where=where, before=before)
    counts = count_predicted(
        text.span(0, tokens.n_characters),
        tokens.ids[: len(windows) * length],
        tokenizer,
        n_windows=len(windows),
        skipped=0 if before else 1,
    )
    settings = {
        **opened.settings,
        "cut": "contiguous",
        "join": join,
        "special_tokens": before,
        "tokenizer": describe_tokenizer(tokenizer),
        "n_documents": text.n_documents,
        **_dropped(cut, tokens.ids, windows[:, len(before) :]),
    }
    return EvaluationText(windows, label, settings, counts.n_words, counts.n_bytes)


def _open(source: str | Path, names: Mapping[str, str | None]) -> TextSource:
    """Open a named text at the split asked for, or else the first that there is."""
    split, splits = _split(source, names), tuple[str, ...]()
    if names["split"] is None and source != "demo":
        splits = tuple(dict.fromkeys((split or DEFAULT_SPLIT, _OTHERWISE)))
    return open_texts(
        source, split=split, config=names["config"], column=names["column"], splits=splits
    )


def _split(source: str | Path, names: Mapping[str, str | None]) -> str | None:
    """Return the split asked for, or the default one where the `datasets` library reads."""
    path = as_path(source)
    local = path is not None and (path.is_file() or names["config"] is None)
    if names["split"] is not None or local or source == "demo":
        return names["split"]
    return _SPLITS.get(str(source), DEFAULT_SPLIT)


def _dropped(cut: Cut, ids: Tensor, windows: Tensor) -> dict[str, object]:
    return {"dropped_tokens": None if cut.n_windows else len(ids) - windows.numel()}
