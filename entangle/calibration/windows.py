"""Cutting a running text's tokens into sequences.

``contiguous`` windows lie end to end from the first token on. ``random`` windows start anywhere,
uniformly in [0, tokens − length), and may overlap: the rule of the WikiText-2 loader of the
SparseGPT and GPTQ repositories. They are drawn from a pool of bounded size, the tokens of the
text's first `Draw.pool_characters` characters: all of WikiText-2's training text (11 million
characters), and the beginning of a streamed data set such as C4, which is stored in random order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from entangle.calibration.padding import first_columns, real_rows
from entangle.checks import check_seq_len, whole
from entangle.errors import InvalidInput
from entangle.seeding import check_seed, numpy_rng

DEFAULT_N_SEQ = 128
DEFAULT_SEQ_LEN = 2048
_POOL_CHARACTERS = 2**24
_POOL_PER_TOKEN = 16
_MOST_TOKENS = 2**36


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How many windows to cut, how long, and by which rule."""

    n_seq: int | None
    """Sequences asked for; None for `DEFAULT_N_SEQ`, or every row of a table of ids."""
    seq_len: int | None
    """Tokens in a sequence; None for `DEFAULT_SEQ_LEN` or the context, or a table's columns."""
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
        return self.n_seq or DEFAULT_N_SEQ

    @property
    def window(self) -> int:
        """Tokens in a window of a text, special tokens included."""
        return self.seq_len or min(DEFAULT_SEQ_LEN, self.context_length or DEFAULT_SEQ_LEN)

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
