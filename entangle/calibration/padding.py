"""Rows of token ids that are padded to one length: which are the text's own tokens.

Pads never enter a model: a row's own tokens run as a sequence of their length, so that what comes
out is what the unpadded text gives, whatever the architecture makes of an attention mask.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.progress import tell


def checked_mask(
    mask: Tensor | None, ids: Int64[Tensor, "rows columns"], *, name: str = "mask"
) -> Bool[Tensor, "rows columns"] | None:
    """Return a mask of the text's own tokens as booleans on the CPU; None where all are.

    Parameters
    ----------
    mask
        1 or True for a token of the text, 0 or False for a pad, in the shape of ``ids``.
    ids
        Token ids.
    name
        What the user calls the mask.

    Raises
    ------
    InvalidInput
        If the shape is another, a value is neither 0 nor 1, or a row's tokens are not one run: with
        pads between them their positions would not be known. A row of pads alone is let through
        (`real_rows` leaves it out).
    """
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise InvalidInput(
            f"`{name}` must have the shape of the ids, {tuple(ids.shape)}; got {tuple(mask.shape)}."
        )
    if mask.is_floating_point() or mask.is_complex() or bool(((mask != 0) & (mask != 1)).any()):
        raise InvalidInput(f"`{name}` must hold 0 and 1 only; got {mask.dtype} with other values.")
    real = mask.detach().to("cpu", torch.bool)
    runs = real[:, :1].long().sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0])
        raise InvalidInput(
            f"`{name}` must mark one run of tokens in every row, with pads before or after it; row "
            f"{row} has {int(runs[row])} runs."
        )
    return None if bool(real.all()) else real


def check_filled(mask: Bool[Tensor, "rows columns"]) -> None:
    """Raise `InvalidInput` if a row is all pads."""
    empty = (~mask.any(1)).nonzero()
    if len(empty):
        raise InvalidInput(
            f"every row must hold a token beside its pads; row {int(empty[0])} holds none: leave "
            "it out."
        )


def note_unmasked_pads(
    ids: Int64[Tensor, "*rows columns"], pad: object, mask: Tensor | None, label: str
) -> None:
    """Say how many rows without a mask begin or end with several pads, which count as tokens.

    Parameters
    ----------
    ids
        Token ids.
    pad
        The tokenizer's id of a pad. One at an end is no sign: with many models it ends a text.
    mask
        Where there is one, nothing is said.
    label
        What the user calls the ids.
    """
    if mask is not None or not isinstance(pad, int) or ids.ndim != 2 or ids.shape[1] < 2:
        return
    pads = (ids[:, :2] == pad).all(1) | (ids[:, -2:] == pad).all(1)
    if bool(pads.any()):
        tell(
            f"{int(pads.sum())} of {len(ids)} row(s) of {label} begin or end with several pads "
            f"(id {pad}), which count as tokens; give their `attention_mask` to leave them out"
        )


def pad_rows(
    rows: Sequence[Int64[Tensor, " _"]],
) -> tuple[Int64[Tensor, "rows columns"], Bool[Tensor, "rows columns"] | None]:
    """Return sequences as one table, padded at their ends with 0, and its mask (None: no pads)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids, None if bool(mask.all()) else mask


def real_rows(
    ids: Int64[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"] | None, *, least: int = 1
) -> tuple[Int64[Tensor, "kept columns"], Bool[Tensor, "kept columns"] | None, int]:
    """Leave out rows with fewer than ``least`` tokens beside their pads; return how many as well.

    Raises
    ------
    InvalidInput
        If no row has as many.
    """
    if mask is None:
        return ids, None, 0
    kept = mask.sum(1) >= least
    if not bool(kept.any()):
        raise InvalidInput(
            f"a row must have at least {least} token(s) beside its pads; none of {len(ids)} has."
        )
    mask = mask[kept]
    return ids[kept], None if bool(mask.all()) else mask, int((~kept).sum())


def first_columns(
    ids: Int64[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"] | None, columns: int
) -> tuple[Int64[Tensor, "rows _"], Bool[Tensor, "rows _"] | None]:
    """Cut every row to its first tokens, of which pads are none."""
    if mask is None or columns == ids.shape[1]:
        return ids[:, :columns], mask
    rows = Rows(ids, mask)
    return pad_rows([rows.sequence(i)[:columns] for i in range(len(ids))])


class Rows:
    """The sequences in rows of ids, without their pads.

    Parameters
    ----------
    ids
        Shape (rows, columns).
    mask
        From `checked_mask`.
    """

    def __init__(
        self, ids: Int64[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"] | None
    ) -> None:
        rows, columns = ids.shape
        self._ids, self._mask = ids, mask
        self.lengths: list[int]
        """Tokens of each sequence."""
        if mask is None:
            self.lengths, self._first = [columns] * rows, [0] * rows
        else:
            self.lengths = mask.sum(1).tolist()
            self._first = mask.int().argmax(1).tolist()
        self.ends = [0, *accumulate(self.lengths)]
        """Tokens before each sequence, and all tokens, (rows + 1,)."""

    def sequence(self, index: int) -> Int64[Tensor, " tokens"]:
        """Return the tokens of one sequence."""
        return self._ids[index, self._columns(index)]

    def flat(self) -> Int64[Tensor, " tokens"]:
        """Return all sequences' tokens, end to end."""
        return self._ids.flatten() if self._mask is None else self._ids[self._mask]

    def batches(
        self, n: int, start: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, Int64[Tensor, "batch tokens"]]]:
        """Yield the index of the first sequence and the ids of up to ``n`` sequences of one length.

        Sequences come in order, each once; the ids are views where rows need no shifting.
        """
        last = len(self.lengths) if end is None else end
        while start < last:
            stop, place = start + 1, self._columns(start)
            while stop < min(start + n, last) and self._columns(stop) == place:
                stop += 1
            yield start, self._ids[start:stop, place]
            start = stop

    def _columns(self, index: int) -> slice:
        first = self._first[index]
        return slice(first, first + self.lengths[index])
