"""Words, bytes and contexts: the text that tokens stand for.

A token's bytes are those of the text that it stands for, with what no token holds (white space, for
some tokenizers) counted to the token after it: so the bytes of windows add up to those of the text.
Where one character is several tokens, each has its own bytes if its name tells how many: the
letters of a byte-level tokenizer, ``<0xE2>`` of one that falls back to bytes. Else, as where a
ligature is written out before it is cut, the characters' bytes are shared evenly.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.errors import visible

_WORD = re.compile(r"\S+")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class TextCounts:
    """How much text is predicted; None where the tokens' places are unknown."""

    n_words: int | None
    """Words, separated by white space, whose first character is in a predicted token."""
    n_bytes: int | None
    """Bytes in UTF-8 of the text as it was given, before a tokenizer changes it (lower case,
    NFKC)."""


@dataclass(frozen=True)
class _Places:
    """Where all tokens of a text lie in it."""

    ids: list[int]
    starts: NDArray[np.int64]
    """First character of each token."""
    ends: NDArray[np.int64]
    """The character after each token, never falling."""
    shares: NDArray[np.bool_]
    """Whether a token begins before the one ahead of it ends: they share a character."""


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
    places = _places(text, ids, tokenizer)
    if places is None:
        return TextCounts(None, None)
    words = np.array([word.start() for word in _WORD.finditer(text)])
    begins, closes = _windows(places.ends[: len(ids)], n_windows, skipped, ends_of_text)
    n_words = (np.searchsorted(words, closes) - np.searchsorted(words, begins)).sum()
    byte_ends = _byte_ends(text, places, tokenizer)[: len(ids)]
    begins, closes = _windows(byte_ends, n_windows, skipped, ends_of_text)
    return TextCounts(int(n_words), int((closes - begins).sum()))


def _windows(
    ends: NDArray[np.int64], n_windows: int, skipped: int, ends_of_text: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the predicted part of every window begins and closes."""
    first, last = ends_of_text
    length = (first + len(ends) + last) // n_windows
    starts = (np.arange(n_windows) * length + skipped - first).clip(0)
    stops = (np.arange(1, n_windows + 1) * length - first).clip(max=len(ends))
    before_token = np.concatenate([[0], ends])  # where the token before a token ends
    return before_token[starts], before_token[stops]


def _places(
    text: str, ids: Int64[Tensor, " tokens"], tokenizer: PreTrainedTokenizerBase
) -> _Places | None:
    """Return where the tokens lie, or None if the tokenizer cannot tell."""
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
    starts, own_ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    ends = np.maximum.accumulate(own_ends)
    shares = np.zeros(len(ends), dtype=bool)
    shares[1:] = (starts[1:] < ends[:-1]) & (starts[1:] < own_ends[1:])
    return _Places(encoded["input_ids"], starts, ends, shares)


def _byte_ends(text: str, places: _Places, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Return the byte of the text after each token, shape (tokens,), never falling."""
    after = np.concatenate([[0], np.cumsum(_utf8_lengths(text))])
    ends: NDArray[np.int64] = after[places.ends]
    for first, last in _chains(places.shares):
        begin = int(ends[first - 1]) if first else 0
        names = list(tokenizer.convert_ids_to_tokens(places.ids[first : last + 1]))
        ends[first : last + 1] = begin + _shared(names, int(ends[last]) - begin)
    return ends


def _utf8_lengths(text: str) -> NDArray[np.int64]:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)


def _chains(shares: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the first and last token of every run of tokens that share characters."""
    places = np.flatnonzero(shares)
    breaks = np.flatnonzero(np.diff(places) > 1) + 1
    for run in np.split(places, breaks) if len(places) else ():
        yield int(run[0]) - 1, int(run[-1])


def _shared(names: list[str], total: int) -> NDArray[np.int64]:
    """Return how many of ``total`` bytes lie up to the end of each of the tokens of these names."""
    own = [1 if _BYTE.fullmatch(name) else len(name) for name in names]
    if sum(own) == total:
        return np.cumsum(own)
    return np.arange(1, len(names) + 1) * total // len(names)


class TokenText:
    r"""Text of single tokens and of runs of tokens.

    Parameters
    ----------
    tokenizer
        The model's; without one (None) a token is written as its id, and a run with spaces between.

    Notes
    -----
    A token is taken apart into bytes, by the kind of its tokenizer: byte-level pieces (GPT-2,
    Llama 3), SentencePiece pieces with ``<0x..>`` for single bytes (Llama 2, Gemma), WordPiece
    pieces (BERT). A run is decoded as a whole, so that characters spread over several tokens come
    out right. A byte that is no part of a character is written as ``<0xE2>``; what cannot be seen
    as ``\n`` or ``\u200b`` (`entangle.errors.visible`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._parts = frozenset() if tokenizer is None else _decoder_parts(tokenizer)
        self._special = frozenset() if tokenizer is None else frozenset(tokenizer.all_special_ids)
        self._added = (
            frozenset() if tokenizer is None else frozenset(tokenizer.added_tokens_decoder)
        )
        self._bytes = lru_cache(maxsize=2**17)(self._find_bytes)

    def token(self, token_id: int) -> str:
        """Return the text of one token, a leading space included; a lone space is written "␣"."""
        if self._tokenizer is None:
            return str(token_id)
        text = decoded(self._bytes(token_id))
        return text.replace(" ", "␣") if text.isspace() else text

    def run(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens that follow one another."""
        if self._tokenizer is None:
            return "".join(f"{one} " for one in token_ids)
        return decoded(b"".join(map(self._bytes, token_ids)))

    def context(self, token_ids: Sequence[int], place: int, window: int) -> tuple[str, str, str]:
        """Return the text before, of, and after the token at ``place`` of a sequence.

        Parameters
        ----------
        token_ids
            The whole sequence.
        place
            Index in it.
        window
            Tokens shown on either side, fewer at the ends of the sequence.
        """
        before = self.run(token_ids[max(place - window, 0) : place])
        after = self.run(token_ids[place + 1 : place + 1 + window])
        if self._tokenizer is None and after:
            after = f" {after.rstrip()}"
        return before, self.token(token_ids[place]), after

    def _find_bytes(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        assert tokenizer is not None  # noqa: S101
        piece: object = tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):  # an id that the model has and the tokenizer has not
            return f"<{token_id}>".encode()
        if token_id in self._special:
            return piece.encode()
        if "ByteLevel" in self._parts:
            letters = _letter_bytes()
            known = token_id not in self._added and all(letter in letters for letter in piece)
            return bytes(letters[letter] for letter in piece) if known else piece.encode()
        if "WordPiece" in self._parts:
            return piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
        single = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        if single and "ByteFallback" in self._parts:
            return bytes([int(single[1], 16)])
        if "▁" in self._parts:
            return piece.replace("▁", " ").encode()
        return piece.encode("utf-8", errors="surrogatepass")


def decoded(text: bytes) -> str:
    """Decode UTF-8; write broken bytes as ``<0xE2>``, and what cannot be seen as escapes."""
    parts, rest = [], text
    while rest:
        try:
            parts.append(visible(rest.decode()))
            break
        except UnicodeDecodeError as error:
            parts.append(visible(rest[: error.start].decode()))
            parts.extend(f"<0x{byte:02X}>" for byte in rest[error.start : error.end])
            rest = rest[error.end :]
    return "".join(parts)


def _decoder_parts(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the kinds of steps that turn pieces into text, and "▁" if that stands for a space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer; those of SentencePiece write a space as ▁
        return frozenset({"▁", "ByteFallback"} if hasattr(tokenizer, "sp_model") else ())
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {str(step.get("type")) for step in steps}
    replaced = any("▁" in json.dumps(step, ensure_ascii=False) for step in steps)
    return frozenset(kinds | ({"▁"} if replaced else set()))


@cache
def _letter_bytes() -> dict[str, int]:
    """Return the byte that every letter of byte-level pieces stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
