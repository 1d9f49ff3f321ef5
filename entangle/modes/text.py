"""Tokens as readable text: what pieces stand for, with nothing invisible or broken."""

import json
import re
from collections.abc import Sequence
from functools import cache, lru_cache

from transformers import PreTrainedTokenizerBase

from entangle.escapes import visible


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
    as ``\n`` or ``\u200b`` (`entangle.escapes.visible`).
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
