"""From what a user gives to a `CalibrationSet`.

The documents of a source as one text, of which only a part is held at a time.

The token ids of a text of any length, a chunk at a time.

The result is that of tokenising the whole text at once. The library needs some 170 bytes of memory
for a character, so a long text is tokenised in chunks that overlap. A cut changes only the
tokens next to it: two neighbouring chunks are joined in the middle of their overlap, after
checking that they agree on every token (id and place) around it. Where they do not, the first
chunk is made longer until they do.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.checks import check_seq_len
from entangle.errors import InvalidInput
from entangle.models.loading import LanguageModel
from entangle.models.pretrained import broken_as
from entangle.runs.progress import tell
from entangle.runs.provenance import of_saved
from entangle.texts.calibration_set import (
    CalibrationSet,
    Draw,
    check_ids,
    cut_windows,
    is_running,
    take_rows,
)
from entangle.texts.documents import TextSource, open_texts, refuse
from entangle.texts.files import Document, well_formed
from entangle.texts.given import Source, Wanted, find, label_of
from entangle.texts.special_tokens import (
    DEFAULT_POLICY,
    Affixes,
    affixes,
    check_policy,
    describe_tokenizer,
    no_policy,
)
from entangle.texts.token_files import TokenFile, note_unmasked_pads


class JoinedText:
    """The documents of a source joined into one text that is read only as far as asked.

    Lone surrogates, which no tokenizer takes, become U+FFFD.
    """

    def __init__(self, documents: Iterable[Document], join: str) -> None:
        self.n_documents = 0
        """Documents begun so far."""
        self.holds_text = False
        """Whether any document so far had a character."""
        self._blocks = self._joined(documents, join)
        self._held = ""
        self._begin = 0  # where in the text `_held` begins

    def _joined(self, documents: Iterable[Document], join: str) -> Iterator[str]:
        for document in documents:
            if self.n_documents:
                yield well_formed(join)
            self.n_documents += 1
            for block in document:
                self.holds_text |= bool(block)
                yield well_formed(block)

    def span(self, begin: int, end: int) -> str:
        """Return the characters in [begin, end), fewer only where the text ends."""
        if begin < self._begin:
            raise ValueError(f"the text before {self._begin} is forgotten; got `begin` {begin}.")
        self._read_to(end)
        return self._held[begin - self._begin : end - self._begin]

    def ends_by(self, end: int) -> bool:
        """Return whether the text has no more than ``end`` characters."""
        self._read_to(end + 1)
        return self._begin + len(self._held) <= end

    def forget(self, begin: int) -> None:
        """Drop the text before ``begin``; later spans must not begin earlier."""
        self._held = self._held[max(begin - self._begin, 0) :]
        self._begin = max(begin, self._begin)

    def _read_to(self, end: int) -> None:
        read, length = [self._held], self._begin + len(self._held)
        while length < end and (block := next(self._blocks, None)) is not None:
            read.append(block)
            length += len(block)
        self._held = "".join(read)


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


Cut = tuple[Int64[Tensor, "n_seq seq_len"], dict[str, object]]
Mask = Bool[Tensor, "n_seq seq_len"] | None

DEFAULT_SPLIT = "train"


@dataclass(frozen=True, eq=False)
class GivenText:
    """A text, and what makes tokens of it."""

    texts: TextSource
    tokenizer: PreTrainedTokenizerBase
    specials: Affixes


def given_tokens_or_text(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    wanted: Wanted,
    *,
    special_tokens: str,
    add_special_tokens: bool | None,
    opened: Callable[[str | Path, Wanted], TextSource],
) -> TokenFile | GivenText:
    """Return the token ids of a source, or its text; arguments as in `load_calibration`.

    ``opened`` opens a text that has a name.
    """
    policy, label = check_policy(special_tokens, add_special_tokens), label_of(source)
    found = find(source, wanted)
    if isinstance(found, TokenFile):
        refuse(label, **no_policy(special_tokens, add_special_tokens))
        note_unmasked_pads(found.ids, getattr(tokenizer, "pad_token_id", None), found.mask, label)
        return found
    if tokenizer is None:
        raise InvalidInput(
            f"{label!r} is text, so it needs a tokenizer; pass the model's, or give token ids."
        )
    texts = found if isinstance(found, TextSource) else opened(found, wanted)
    return GivenText(texts, tokenizer, affixes(tokenizer, policy))


def load_calibration(
    source: Source = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n_seq: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    sampling: str = "random",
    join: str = "\n\n",
    split: str | None = None,
    config: str | None = None,
    column: str | None = None,
    special_tokens: str = DEFAULT_POLICY,
    add_special_tokens: bool | None = None,
    context_length: int | None = None,
    vocab_size: int | None = None,
) -> CalibrationSet:
    """Build a calibration set from a text, a data set or token ids.

    Documents are joined by ``join`` and tokenised as one text, so that anyone can recompute the
    tokens: ``tokenizer(join.join(documents), add_special_tokens=False)``, with the special tokens
    of ``special_tokens`` around.

    Parameters
    ----------
    source
        Text: a source of `load_texts`; a list of strings, a pandas column of them, or a table with
        a column of text (a DataFrame, a list of dictionaries, a `datasets` Dataset, IterableDataset
        or DatasetDict, or a folder that ``save_to_disk`` wrote): a document each.

        Or token ids: a ``.safetensors`` file with an integer tensor ``ids`` or ``input_ids``, such
        as `CalibrationSet.save` writes; an integer array or list; a tokenizer's output or another
        dictionary with ``input_ids``; a table with a column ``input_ids`` and none of text; a list
        of rows, or of the (input, target) pairs that the loaders of SparseGPT and Wanda give. An
        ``attention_mask`` beside the ids is honoured, and rows of different lengths are padded
        (`CalibrationSet.mask`); rows of pads alone are left out, which is said. Ids of shape
        (tokens,) are cut like a text, and so is one row that is longer than ``seq_len`` or the
        context. Of ids of shape (rows, columns) the first ``n_seq`` rows, and the first ``seq_len``
        tokens of each, are taken, whatever ``sampling`` says.
    tokenizer
        Needed for a text, not used for token ids.
    n_seq
        Number of sequences; `entangle.texts.N_SEQ` (32) if not given, or all rows of a table of
        ids.
    seq_len
        Tokens in a sequence, special ones included. If not given 1,024 or ``context_length``,
        whichever is less, or all columns of a table of ids.
    seed, sampling
        ``"contiguous"``: the first tokens of the text; no more of it is read than needed.
        ``"random"``: windows drawn with ``seed`` from the text's first 2²⁴ characters, or 16 for
        every token drawn if that is more (see `entangle.texts.calibration_set`);
        ``settings["whole_text"]`` tells if that was all. Windows may overlap.
    join
        Put between documents, taken as it is (see `interpret_escapes`).
    split, config, column
        As in `load_texts`; also of `datasets` objects and tables.
    special_tokens
        ``"model"``: around every sequence, within ``seq_len``, those that the model's tokenizer
        puts around a text (see `entangle.texts.special_tokens`); ``"none"``; or ``"published"``,
        the protocol of the SparseGPT code: once around the whole text, from which sequences are
        cut.
    add_special_tokens
        The older option: True means ``"model"``, False ``"none"``.
    context_length, vocab_size
        The model's: longer sequences and ids outside [0, vocab_size) are refused.

    Returns
    -------
    CalibrationSet
        ``settings`` has every option above and how much was read.

    Raises
    ------
    InvalidInput
        If a size is out of range, the text is too short, or the tokenizer is missing or does not
        fit the model.
    Unavailable, UnknownName
        As in `load_texts`.
    """
    draw = Draw(
        n_seq=n_seq, seq_len=seq_len, sampling=sampling, seed=seed, context_length=context_length
    )
    label, mask = label_of(source), None
    found = given_tokens_or_text(
        source, tokenizer, Wanted(split, config, column, (DEFAULT_SPLIT,), draw.n_seq),
        special_tokens=special_tokens, add_special_tokens=add_special_tokens,
        opened=_open,
    )  # fmt: skip
    if isinstance(found, TokenFile):
        ids, mask, settings = _from_ids(found, draw, label)
    else:
        ids, settings = _from_text(found, draw, join, where=repr(label))
    sizes = {"n_seq": ids.shape[0], "seq_len": ids.shape[1]}
    made = CalibrationSet(ids, label, {**sizes, **settings}, mask)
    check_ids(made.ids, vocab_size)
    return made


def as_calibration(source: Source, model: LanguageModel) -> CalibrationSet:
    """Return a calibration set that fits a model.

    Parameters
    ----------
    source
        A set, which is returned as it is, or whatever else `load_calibration` takes, with its
        default settings.
    model
        Its tokenizer makes the tokens of a text.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If a sequence is longer than the model's context or an id no token of it; and as
        `load_calibration`.
    """
    limit = model.context_length
    if not isinstance(source, CalibrationSet):
        return load_calibration(
            source, model.tokenizer, context_length=limit, vocab_size=model.vocab_size
        )
    check_seq_len(source.longest, limit)
    check_ids(source.ids, model.vocab_size)
    return source


def _from_ids(
    stored: TokenFile, draw: Draw, label: str
) -> tuple[Int64[Tensor, "n_seq seq_len"], Mask, dict[str, object]]:
    settings: dict[str, object] = {} if stored.origin is None else {"origin": stored.origin}
    if not is_running(stored.ids, draw.seq_len or draw.context_length):
        ids, mask, left_out = take_rows(stored.ids, draw, where=label, mask=stored.mask)
        settings |= of_saved(stored.origin, whole=ids.shape[1] == stored.ids.shape[1])
        return ids, mask, {**settings, "sampling": "rows", **empty_rows(left_out, label)}
    running = stored.ids if stored.mask is None else stored.ids[stored.mask]
    running = running.flatten()
    ids = cut_windows(running, draw, where=label)
    return ids, None, {**settings, **draw.settings(), "n_text_tokens": len(running)}


def empty_rows(count: int, label: str, *, least: int = 1) -> dict[str, object]:
    """Say, and return for the settings, how many rows were left out for want of tokens."""
    if not count:
        return {}
    tell(f"{count} row(s) of {label} with fewer than {least} token(s) beside pads are left out")
    return {"rows_left_out": count}


def _open(source: str | Path, wanted: Wanted) -> TextSource:
    return open_texts(source, split=wanted.split, config=wanted.config, column=wanted.column)


def _from_text(given: GivenText, draw: Draw, join: str, *, where: str) -> Cut:
    tokenizer, specials = given.tokenizer, given.specials
    text = JoinedText(given.texts.documents, join)
    complete = True
    if draw.sampling == "contiguous":
        wanted = draw.sequences * max(draw.window - sum(map(len, specials.around)), 1)
        tokens = first_tokens(text, tokenizer, wanted)
        complete = len(tokens.ids) < wanted
    else:
        tokens = pool_tokens(text, tokenizer, draw.pool_characters)
    if not text.holds_text:
        raise InvalidInput(f"{where} holds no text: every document in it is empty.")
    running = specials.enclose(tokens.ids, complete=complete and tokens.whole_text)
    settings = {
        **given.texts.settings,
        **draw.settings(),
        "join": join,
        "special_tokens": dict(specials.settings),
        "tokenizer": describe_tokenizer(tokenizer),
        "n_documents": text.n_documents,
        "n_characters": tokens.n_characters,
        "n_text_tokens": len(tokens.ids),
        "whole_text": tokens.whole_text,
    }
    return cut_windows(running, draw, where=where, specials=specials.around), settings
