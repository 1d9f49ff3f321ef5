"""Words and bytes of the text that predicted tokens stand for."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class TextCounts:
    """How much text is predicted; None where the tokens' places are unknown."""

    n_words: int | None
    """Words, separated by white space, whose first character is in a predicted token."""
    n_bytes: int | None
    """Bytes in UTF-8."""


def count_predicted(
    text: str,
    ids: Int64[Tensor, " tokens"],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_windows: int,
    skipped: int,
    ends_of_text: tuple[int, int] = (0, 0),
) -> TextCounts:
    """Count words and bytes of the tokens that are predicted.

    Parameters
    ----------
    text
        The text; its first tokens are ``ids``.
    ids
        The tokens of all windows, shape (tokens,), a multiple of ``n_windows``, no special ones.
    tokenizer
        The one that made ``ids``; one that is not fast cannot tell the tokens' places.
    n_windows
        Number of windows into which ``ids`` are cut, end to end.
    skipped
        Tokens at the beginning of a window that are not predicted: 0 or 1.
    ends_of_text
        Special tokens that stand in the first window before ``ids``, and in the last one after.
    """
    ends = _ends(text, ids, tokenizer)
    if ends is None:
        return TextCounts(None, None)
    first, last = ends_of_text
    length = (first + len(ids) + last) // n_windows
    starts = (np.arange(n_windows) * length + skipped - first).clip(0)
    stops = (np.arange(1, n_windows + 1) * length - first).clip(max=len(ids))
    before_token = np.concatenate([[0], ends])  # where the token before a token ends
    begins, closes = before_token[starts], before_token[stops]
    words = np.array([word.start() for word in _WORD.finditer(text)])
    n_words = (np.searchsorted(words, closes) - np.searchsorted(words, begins)).sum()
    spans = zip(begins.tolist(), closes.tolist(), strict=True)
    return TextCounts(int(n_words), sum(len(text[begin:end].encode()) for begin, end in spans))


def _ends(
    text: str, ids: Int64[Tensor, " tokens"], tokenizer: PreTrainedTokenizerBase
) -> Int[np.ndarray, " tokens"] | None:
    """Return the character after each token, or None if the tokenizer cannot tell."""
    if not tokenizer.is_fast:
        return None
    encoded: Any = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a text longer than the model's context is meant
    )
    if encoded["input_ids"][: len(ids)] != ids.tolist():
        return None
    return np.array([end for _, end in encoded["offset_mapping"][: len(ids)]])
