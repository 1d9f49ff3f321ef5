"""The token ids of a text of any length, a chunk at a time.

The result is that of tokenising the whole text at once. The library needs some 170 bytes of memory
for a character, so a long text is tokenised in chunks that overlap. A cut changes only the
tokens next to it: two neighbouring chunks are joined in the middle of their overlap, after
checking that they agree on every token (id and place) around it. Where they do not, the first
chunk is made longer until they do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.calibration.joined_text import JoinedText
from entangle.models.pretrained import broken_as

CHUNK = 2**18
"""Characters tokenised at a time."""
OVERLAP = 2**12
"""Characters that neighbouring chunks share; they must agree on the middle half."""
_PER_TOKEN = 5  # characters first read for a token wanted, without offsets


@dataclass(frozen=True, eq=False)
class TextTokens:
    """Token ids of the beginning of a text."""

    ids: Int64[Tensor, " tokens"]
    """Token ids, shape (tokens,)."""
    n_characters: int
    """Characters of the text that were tokenised."""
    whole_text: bool
    """Whether that was all of the text."""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Tokens of the characters in [begin, end) of a text, with every token's place in the text."""

    ids: Int64[Tensor, " tokens"]
    starts: Int64[Tensor, " tokens"]
    begin: int
    end: int

    def index(self, place: int) -> int:
        """Return the first token that starts at ``place`` or later."""
        return int(torch.searchsorted(self.starts, place))


def first_tokens(text: JoinedText, tokenizer: PreTrainedTokenizerBase, n: int) -> TextTokens:
    """Return the first ``n`` token ids of the whole text, all if it has fewer; no specials.

    No more of the text is read than that needs.
    """
    if not tokenizer.is_fast:
        return _first_in_one_piece(text, tokenizer, n)
    parts: list[Tensor] = []
    read = 0
    for part, end in _settled(text, tokenizer, None):
        parts.append(part)
        read = end
        if sum(map(len, parts)) >= n:
            break
    return TextTokens(torch.cat(parts)[:n], read, text.ends_by(read))


def pool_tokens(text: JoinedText, tokenizer: PreTrainedTokenizerBase, length: int) -> TextTokens:
    """Return the token ids of the first ``length`` characters of the text; no specials."""
    if not tokenizer.is_fast:
        prefix = text.span(0, length)
        return TextTokens(_tokenise(tokenizer, prefix), len(prefix), text.ends_by(length))
    parts, read = zip(*_settled(text, tokenizer, length), strict=True)
    return TextTokens(torch.cat(parts), read[-1], text.ends_by(read[-1]))


def _settled(
    text: JoinedText, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> Iterator[tuple[Int64[Tensor, " part"], int]]:
    """Yield the tokens that more text would not change, and how many characters were read."""
    chunk, first = _encode(text, tokenizer, 0, CHUNK, limit), 0
    while chunk.end != limit and not text.ends_by(chunk.end):
        following = _encode(text, tokenizer, chunk.end - OVERLAP, chunk.end + CHUNK, limit)
        middle = chunk.end - OVERLAP // 2
        if _agree(chunk, following, middle):
            yield chunk.ids[first : chunk.index(middle)], following.end
            chunk, first = following, following.index(middle)
            text.forget(chunk.begin)
        else:
            chunk = _encode(text, tokenizer, chunk.begin, 2 * chunk.end - chunk.begin, limit)
    yield chunk.ids[first:], chunk.end


def _encode(
    text: JoinedText, tokenizer: PreTrainedTokenizerBase, begin: int, end: int, limit: int | None
) -> _Chunk:
    span = text.span(begin, end if limit is None else min(end, limit))
    encoded = _call(tokenizer, span, return_offsets_mapping=True)
    starts = torch.tensor([start for start, _ in encoded["offset_mapping"]], dtype=torch.int64)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return _Chunk(ids, begin + starts, begin, begin + len(span))


def _agree(chunk: _Chunk, following: _Chunk, middle: int) -> bool:
    """Whether both have the same tokens, and any at all, in the middle half of their overlap."""
    low, high = middle - OVERLAP // 4, middle + OVERLAP // 4
    a = slice(chunk.index(low), chunk.index(high))
    b = slice(following.index(low), following.index(high))
    return (
        a.start < a.stop
        and torch.equal(chunk.ids[a], following.ids[b])
        and torch.equal(chunk.starts[a], following.starts[b])
    )


def _first_in_one_piece(text: JoinedText, tokenizer: PreTrainedTokenizerBase, n: int) -> TextTokens:
    """Without the tokens' places: tokenise the beginning twice, the second time a tenth shorter.

    Its first ``n`` tokens are taken if both agree on them; otherwise twice as much is read.
    """
    length = _PER_TOKEN * n + OVERLAP
    while True:
        prefix, whole = text.span(0, length), text.ends_by(length)
        ids = _tokenise(tokenizer, prefix)
        shorter = ids if whole else _tokenise(tokenizer, prefix[: length - length // 10])
        if whole or (len(shorter) >= n and torch.equal(ids[:n], shorter[:n])):
            return TextTokens(ids[:n], len(prefix), whole)
        length *= 2


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Int64[Tensor, " tokens"]:
    return torch.tensor(_call(tokenizer, text)["input_ids"], dtype=torch.int64)


def _call(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    with broken_as(f"tokenizer {str(tokenizer.name_or_path)!r}", verb="used"):
        return tokenizer(
            text,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a text longer than the model's context is meant
            **options,
        )
