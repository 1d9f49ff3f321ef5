"""The immutable value that a calibration run works on.

Cutting a running text's tokens into sequences.

``contiguous`` windows lie end to end from the first token on. ``random`` windows start anywhere,
uniformly in [0, tokens − length), and may overlap: the rule of the WikiText-2 loader of the
SparseGPT and GPTQ repositories. They are drawn from a pool of bounded size, the tokens of the
text's first `Draw.pool_characters` characters: all of WikiText-2's training text (11 million
characters), and the beginning of a streamed data set such as C4, which is stored in random order.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from entangle.checks import check_seq_len, whole
from entangle.errors import InvalidInput
from entangle.runs.provenance import output_file
from entangle.seeding import check_seed, numpy_rng
from entangle.texts import N_SEQ, SEQ_LEN
from entangle.texts.token_files import (
    METADATA_KEY,
    TokenRows,
    check_filled,
    checked_mask,
    first_columns,
    read_token_file,
    real_rows,
)

_TOKENS_IN_A_PASS = 4096


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Sequences of token ids with their origin."""

    ids: Int64[Tensor, "n_seq seq_len"]
    """Token ids, shape (n_seq, seq_len), int64, on the CPU; 0 where there is a pad."""
    source: str
    """What the user gave: a name, a data set's id, a path, or the kind of an array."""
    settings: Mapping[str, object]
    """Everything that decided the ids (sizes, seed, join, tokenizer, …); JSON-serialisable."""
    mask: Bool[Tensor, "n_seq seq_len"] | None = None
    """True where an id is a token of the text, False where it is a pad; None where all are tokens.
    A row's tokens are one run. Pads never enter a model."""

    def __post_init__(self) -> None:
        if self.ids.numel() == 0 or self.ids.device.type != "cpu":
            raise InvalidInput(
                "`ids` must hold at least one token and lie on the CPU; "
                f"got shape {tuple(self.ids.shape)} on {self.ids.device}."
            )
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64:
            raise InvalidInput(
                "`ids` must be int64 of shape (n_seq, seq_len); "
                f"got {self.ids.dtype} of shape {tuple(self.ids.shape)}."
            )
        mask = checked_mask(self.mask, self.ids)
        if mask is not None:
            check_filled(mask)
            object.__setattr__(self, "ids", self.ids.masked_fill(~mask, 0))
        object.__setattr__(self, "mask", mask)
        copied = json.loads(json.dumps(dict(self.settings)))
        object.__setattr__(self, "settings", MappingProxyType(copied))

    @property
    def n_seq(self) -> int:
        """Number of sequences."""
        return self.ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in a sequence, pads included."""
        return self.ids.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences, pads left out."""
        return self.rows.ends[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, pads left out."""
        return max(self.rows.lengths)

    @cached_property
    def rows(self) -> TokenRows:
        """The sequences without their pads."""
        return TokenRows(self.ids, self.mask)

    def flat(self) -> Int64[Tensor, " tokens"]:
        """Return all ids, sequence by sequence, pads left out, (tokens,)."""
        return self.rows.flat()

    def place(self, position: int) -> tuple[int, int]:
        """Return the sequence and the place in it of a token, counted over all sequences."""
        sequence = bisect_right(self.rows.ends, position) - 1
        return sequence, position - self.rows.ends[sequence]

    @property
    def per_pass(self) -> int:
        """Sequences in one forward pass by default: as many as make 4,096 tokens."""
        return max(1, _TOKENS_IN_A_PASS // self.seq_len)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of n_seq, seq_len and then the ids, as little-endian int64.

        Where there are pads, a byte for every id follows: 1 for a token of the text, 0 for a pad.
        """
        found = hashlib.sha256(np.array(self.ids.shape, dtype="<i8").tobytes())
        found.update(np.ascontiguousarray(self.ids.numpy(), dtype="<i8").data)
        if self.mask is not None:
            found.update(np.ascontiguousarray(self.mask.numpy()).data)
        return found.hexdigest()

    def describe(self) -> dict[str, object]:
        """Return source, sizes, digest and settings, JSON-serialisable, for a run's manifest."""
        return {
            "source": self.source,
            "n_seq": self.n_seq,
            "seq_len": self.seq_len,
            "n_tokens": self.n_tokens,
            "digest": self.digest,
            "settings": dict(self.settings),
        }

    def batches(self, n: int | None = None) -> Iterator[tuple[int, Int64[Tensor, "batch tokens"]]]:
        """Yield the index of the first sequence and the ids of ``n`` sequences at a time, unpadded.

        A batch holds neighbours of one length, and may hold fewer; without ``n`` up to `per_pass`.
        The ids are views, not copies.
        """
        return self.rows.batches(self.per_pass if n is None else whole("n", n, least=1))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the ids and their origin to a ``.safetensors`` file.

        The file is written under a temporary name in the same folder, then renamed. It is itself a
        calibration source: ``load_calibration(path)`` gives the same ids.

        Parameters
        ----------
        path
            File to write; its name must end in ``.safetensors``.
        force
            Replace a file that exists.

        Returns
        -------
        Path
            The file written.

        Raises
        ------
        InvalidInput
            If the name has another ending, or the file exists and ``force`` is false.
        Unavailable
            If the file cannot be written.
        """
        target = Path(path)
        if target.suffix != ".safetensors":
            raise InvalidInput(
                f"a calibration set's file must end in .safetensors; got '{target}'."
            )
        if target.exists() and not force:
            raise InvalidInput(f"'{target}' exists; choose another name or pass `force=True`.")
        metadata = {METADATA_KEY: json.dumps(self.describe())}
        tensors = {"ids": self.ids.contiguous()}
        if self.mask is not None:
            tensors["attention_mask"] = self.mask.to(torch.int64)
        content = safetensors.torch.save(tensors, metadata=metadata)
        with output_file(target, remedy="choose another folder") as temporary:
            temporary.write_bytes(content)
        return target

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationSet":
        """Read a set that `save` wrote, with its own source and settings.

        Raises
        ------
        Unavailable
            If the file is missing or unreadable.
        InvalidInput
            If it is corrupt, was not written by `save`, or its ids do not match its digest.
        """
        file = read_token_file(Path(path))
        if file.origin is None or file.ids.ndim != 2:
            raise InvalidInput(
                f"'{path}' was not written by `CalibrationSet.save`; "
                "read a file of bare token ids with `load_calibration`."
            )
        loaded = cls(file.ids, file.origin["source"], file.origin["settings"], file.mask)
        if loaded.digest != file.origin["digest"]:
            raise InvalidInput(f"the ids in '{path}' do not match its digest; make the set again.")
        return loaded


def check_ids(
    ids: Int64[Tensor, "n_seq seq_len"], vocab_size: int | None
) -> Int64[Tensor, "n_seq seq_len"]:
    """Return ``ids`` if every one lies in [0, vocab_size), raise `InvalidInput` otherwise."""
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0:
        raise InvalidInput(
            f"token ids must be at least 0; got {low}: give the inputs, not targets (where -100 "
            f"marks what is not predicted), and pads beside an attention_mask."
        )
    if vocab_size is not None and high >= vocab_size:
        raise InvalidInput(
            f"the tokenizer does not fit the model: token id {high} is outside the model's "
            f"[0, {vocab_size}); use the tokenizer that belongs to the model."
        )
    return ids


_POOL_CHARACTERS = 2**24
_POOL_PER_TOKEN = 16
_MOST_TOKENS = 2**36


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How many windows to cut, how long, and by which rule."""

    n_seq: int | None
    """Sequences asked for; None for `N_SEQ`, or every row of a table of ids."""
    seq_len: int | None
    """Tokens in a sequence; None for `SEQ_LEN` or the context, or a table's columns."""
    sampling: str
    """``random`` or ``contiguous``."""
    seed: int
    """Seed of random windows."""
    context_length: int | None = None
    """Longest sequence the model accepts."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.sampling not in ("random", "contiguous"):
            raise InvalidInput(f"`sampling` must be random or contiguous; got {self.sampling!r}.")
        for name in ("n_seq", "seq_len"):
            value = getattr(self, name)
            counted = None if value is None else whole(name, value, least=1)
            object.__setattr__(self, name, counted)
        self.check_context(self.seq_len or 1)

    def check_context(self, seq_len: int) -> None:
        """Raise `InvalidInput` if the model's context is shorter than ``seq_len``."""
        check_seq_len(seq_len, self.context_length)

    @property
    def sequences(self) -> int:
        """Number of windows of a text."""
        return self.n_seq or N_SEQ

    @property
    def window(self) -> int:
        """Tokens in a window of a text, special tokens included."""
        return self.seq_len or min(SEQ_LEN, self.context_length or SEQ_LEN)

    @property
    def pool_characters(self) -> int:
        """Characters from which random windows are drawn: 2²⁴, or 16 a token if that is more."""
        return max(_POOL_CHARACTERS, _POOL_PER_TOKEN * self.sequences * self.window)

    def settings(self) -> dict[str, object]:
        """Return the rule, and the seed if it has any effect."""
        return {"sampling": self.sampling, "seed": self.seed if self.sampling == "random" else None}


def cut_windows(
    tokens: Int64[Tensor, " tokens"],
    draw: Draw,
    *,
    where: str,
    specials: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Int64[Tensor, "n_seq seq_len"]:
    """Cut a running text's tokens into windows.

    Parameters
    ----------
    tokens
        Token ids, shape (tokens,).
    draw
        Sizes and rule.
    where
        The source, for the message.
    specials
        Special token ids to put before and after the text of every window, within ``seq_len``.

    Returns
    -------
    Int64[Tensor, "n_seq seq_len"]
        The windows, copied.

    Raises
    ------
    InvalidInput
        If there are too few tokens; the message has the largest size that fits.
    """
    before, after = (torch.tensor(ids, dtype=torch.int64) for ids in specials)
    length = draw.window - len(before) - len(after)
    if length < 1:
        raise InvalidInput(
            f"`seq_len` must leave room for text beside {len(before) + len(after)} special tokens; "
            f"got {draw.window}."
        )
    _check_enough(len(tokens), length, draw, where)
    if draw.sequences * draw.window > _MOST_TOKENS:
        raise InvalidInput(
            f"`n_seq` × `seq_len` must be at most {_MOST_TOKENS:,} tokens; "
            f"got {draw.sequences:,} × {draw.window:,}."
        )
    if draw.sampling == "random":
        starts = numpy_rng(draw.seed, "calibration").integers(
            0, len(tokens) - length, size=draw.sequences
        )
    else:
        starts = np.arange(draw.sequences) * length
    text = tokens.unfold(0, length, 1)[torch.from_numpy(starts)]
    return torch.cat([before.expand(len(text), -1), text, after.expand(len(text), -1)], dim=1)


def _check_enough(n_tokens: int, length: int, draw: Draw, where: str) -> None:
    if n_tokens == 0:
        raise InvalidInput(f"{where} holds no text.")
    spare = 1 if draw.sampling == "random" else 0
    if n_tokens < length + spare:
        longest = draw.window - length + n_tokens - spare
        remedy = f"lower `seq_len` to at most {longest} or " if longest > 0 else ""
        raise InvalidInput(
            f"{where} has {n_tokens} tokens, but one {draw.sampling} sequence of `seq_len` "
            f"{draw.window} needs {length + spare}; {remedy}give a longer text."
        )
    if not spare and n_tokens < draw.sequences * length:
        raise InvalidInput(
            f"`n_seq` × `seq_len` = {draw.sequences} × {draw.window} needs "
            f"{draw.sequences * length} tokens of text, but {where} has {n_tokens}; the largest "
            f"`n_seq` that fits is {n_tokens // length}."
        )


def take_rows(
    table: Int64[Tensor, "rows columns"],
    draw: Draw,
    *,
    where: str,
    mask: Bool[Tensor, "rows columns"] | None = None,
) -> tuple[Int64[Tensor, "n_seq seq_len"], Bool[Tensor, "n_seq seq_len"] | None, int]:
    """Return the first rows and columns of a table of token ids, all of them if not asked.

    Rows of pads alone are left out; a row that is cut keeps its first tokens, of which pads are
    none.

    Returns
    -------
    tuple
        Ids and mask, as `CalibrationSet` takes them, and the number of rows left out.

    Raises
    ------
    InvalidInput
        If the table has fewer, or its rows are longer than the model's context.
    """
    table, mask, left_out = real_rows(table, mask)
    rows, columns = table.shape
    n_seq, seq_len = draw.n_seq or rows, draw.seq_len or columns
    longest = columns if mask is None else int(mask[:n_seq].sum(1).max())
    draw.check_context(min(seq_len, longest))
    if n_seq > rows or seq_len > columns:
        raise InvalidInput(
            f"{where} has {rows} sequences of {columns} tokens; `n_seq` {n_seq} and `seq_len` "
            f"{seq_len} must not be larger."
        )
    ids, mask = first_columns(table[:n_seq], None if mask is None else mask[:n_seq], seq_len)
    return ids.clone(), mask, left_out


def is_running(ids: Int64[Tensor, "..."], longest: int | None) -> bool:
    """Tell whether ids are a running text: of one dimension, or one row that is too long for a row.

    A tokenizer gives a whole text as one row, ``tokenizer(text, return_tensors="pt")``.
    """
    return ids.ndim == 1 or (len(ids) == 1 and longest is not None and ids.shape[1] > longest)


@dataclass(frozen=True, eq=False)
class SeenTokens:
    """Some of a calibration set's tokens, such as those that an expert sees, counted from 0."""

    text: CalibrationSet
    """All of them."""
    at: Int64[Tensor, " tokens"]
    """Which of them, (tokens,), on the CPU."""

    @property
    def rows(self) -> TokenRows:
        """The sequences, whole."""
        return self.text.rows

    def flat(self) -> Int64[Tensor, " tokens"]:
        """Return the ids, (tokens,)."""
        return self.text.flat()[self.at]

    def place(self, position: int) -> tuple[int, int]:
        """Return the sequence and the place in it of token number ``position``."""
        return self.text.place(int(self.at[position]))


Tokens = CalibrationSet | SeenTokens
"""Tokens in their text."""
