"""Texts to evaluate on: tokenised once, cut into windows that do not overlap."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.calibration import CalibrationSet
from entangle.calibration.calibration_set import check_ids
from entangle.calibration.joined_text import JoinedText
from entangle.calibration.special_tokens import describe_tokenizer, special_tokens
from entangle.calibration.texts import as_path, existing, open_texts, refuse
from entangle.calibration.token_files import integer_ids, read_token_file
from entangle.calibration.tokens import first_tokens
from entangle.errors import InvalidInput
from entangle.evaluation.words import count_predicted

Source = str | Path | Tensor | NDArray[np.generic]

DEFAULT_SEQ_LEN = 2048
DEFAULT_SPLIT = "test"
_SPLITS = {"c4": "validation"}  # it has no test split


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """Windows of token ids, made once for all models that share a tokenizer."""

    windows: Int64[Tensor, "n_windows seq_len"]
    """Token ids, shape (n_windows, seq_len), on the CPU; every token but a window's first is
    predicted."""
    source: str
    """What the user gave: a name, a data set's id, a path, or the kind of an array."""
    n_words: int | None
    """Words (between white space) that begin in predicted tokens; None where unknown."""
    n_bytes: int | None
    """Bytes of the predicted tokens' text in UTF-8; None where unknown."""
    settings: Mapping[str, object]
    """Everything else that decided the windows; JSON-serialisable."""

    def __post_init__(self) -> None:
        if self.windows.shape[1] < 2:
            raise InvalidInput(
                f"`seq_len` must be at least 2, or nothing is predicted; got "
                f"{self.windows.shape[1]}."
            )
        copied = CalibrationSet(self.windows, self.source, self.settings).settings
        object.__setattr__(self, "settings", MappingProxyType(dict(copied)))

    @property
    def n_windows(self) -> int:
        """Number of windows."""
        return self.windows.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in a window, special ones included."""
        return self.windows.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens that are predicted and counted: n_windows · (seq_len − 1)."""
        return self.n_windows * (self.seq_len - 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the windows, in hexadecimal, as `CalibrationSet.digest`."""
        return CalibrationSet(self.windows, self.source, {}).digest

    def describe(self) -> dict[str, object]:
        """Return the protocol: source, sizes, counts, digest and settings, JSON-serialisable."""
        return {
            "source": self.source,
            "seq_len": self.seq_len,
            "stride": self.seq_len,
            "n_windows": self.n_windows,
            "n_tokens": self.n_tokens,
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
        As in `entangle.calibration.load_calibration`. Ids of shape (tokens,) are cut like a text;
        of ids of shape (rows, columns) the rows are the windows.
    tokenizer
        Needed for a text, not used for token ids.
    seq_len
        Tokens in a window, special ones included. If not given 2048 or ``context_length``,
        whichever is less, or all columns of a table of ids.
    n_windows
        Take only the first windows, and read no more of the text than they need; None for all.
    split
        Split of a data set; if not given ``test`` (``validation`` for ``c4``).
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
        ``settings`` has the options and how many tokens were dropped. Words and bytes are counted
        where the tokenizer is a fast one, which knows each token's place.

    Raises
    ------
    InvalidInput
        If a size is out of range, the text is shorter than asked, or the tokenizer is missing or
        does not fit the model.
    Unavailable, UnknownName
        As in `entangle.calibration.load_texts`.

    Notes
    -----
    To count words, the text that was read is held in memory, with some 170 bytes a character while
    its tokens' places are looked up.
    """
    _check_size("seq_len", seq_len, 2)
    _check_size("n_windows", n_windows, 1)
    label = source if isinstance(source, str | Path) else _array_label(source)
    names = {"split": split, "config": config, "column": column}
    stored = _stored_ids(source, str(label))
    if stored is not None:
        refuse(str(label), **names, add_special_tokens=add_special_tokens or None)
    if stored is not None and stored.ndim == 2:
        windows = _rows(stored, seq_len, n_windows, str(label))
        _check_context(windows.shape[1], context_length)
        text = EvaluationText(windows, str(label), None, None, {"sampling": "rows"})
    else:
        length = seq_len or min(DEFAULT_SEQ_LEN, context_length or DEFAULT_SEQ_LEN)
        _check_context(length, context_length)
        if stored is not None:
            text = _from_ids(stored, length, n_windows, str(label))
        else:
            assert isinstance(label, str | Path)
            text = _from_text(label, tokenizer, length, n_windows, join, add_special_tokens, names)
    check_ids(text.windows, vocab_size)
    return text
