"""Token ids that exist already: in a safetensors file or in an array.

Rows of token ids that are padded to one length: which are the text's own tokens.

Pads never enter a model: a row's own tokens run as a sequence of their length, so that what comes
out is what the unpadded text gives, whatever the architecture makes of an attention mask.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.runs.progress import tell
from entangle.runs.reading import decoding, regular_file


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
    rows = TokenRows(ids, mask)
    return pad_rows([rows.sequence(i)[:columns] for i in range(len(ids))])


class TokenRows:
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


METADATA_KEY = "entangle.calibration_set"
_NAMES = ("ids", "input_ids")
_MASK = "attention_mask"
_REMEDY = "give a valid safetensors file"


@dataclass(frozen=True, eq=False)
class TokenFile:
    """What a safetensors file of token ids holds."""

    ids: Int64[Tensor, "..."]
    """Token ids, shape (tokens,) for a running text or (n_seq, seq_len)."""
    origin: dict[str, Any] | None
    """`CalibrationSet.describe` of the set that was saved, None for any other file."""
    mask: Bool[Tensor, "n_seq seq_len"] | None = None
    """True where an id is a token of the text, False where it is a pad; None where all are."""


def integer_ids(values: Tensor | NDArray[np.generic], *, name: str) -> Int64[Tensor, "..."]:
    """Return a CPU int64 copy of a one- or two-dimensional integer array of token ids.

    Raises
    ------
    InvalidInput
        If the array is empty, has another number of dimensions, or does not hold integers.
    """
    tensor = values if isinstance(values, Tensor) else _from_numpy(values, name)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise InvalidInput(f"{name} must hold integer token ids; got {tensor.dtype}.")
    if tensor.ndim not in (1, 2) or tensor.numel() == 0:
        raise InvalidInput(
            f"{name} must have shape (tokens,) or (n_seq, seq_len) and hold at least one token; "
            f"got shape {tuple(tensor.shape)}."
        )
    return tensor.detach().to("cpu", torch.int64, copy=True)


def _from_numpy(values: NDArray[np.generic], name: str) -> Tensor:
    if values.dtype.kind not in "iu":
        raise InvalidInput(f"{name} must hold integer token ids; got {values.dtype}.")
    return torch.from_numpy(values.astype(np.int64))


def read_token_file(path: Path) -> TokenFile:
    """Read the tensor ``ids`` (or ``input_ids``) of a safetensors file.

    Raises
    ------
    Unavailable
        If the file is missing or unreadable.
    InvalidInput
        If it is corrupt or holds no such integer tensor, or its ``attention_mask`` does not fit.
    """
    with decoding(regular_file(path), remedy=_REMEDY), safe_open(path, framework="pt") as file:
        name = _name(path, list(file.keys()))
        tensor, metadata = file.get_tensor(name), file.metadata() or {}
        masked = file.get_tensor(_MASK) if _MASK in list(file.keys()) else None
    ids = integer_ids(tensor, name=f"tensor `{name}` of '{path}'")
    return TokenFile(*masked_ids(ids, masked, _origin(path, metadata), name=f"{_MASK} of '{path}'"))


def masked_ids(
    ids: Int64[Tensor, "..."],
    mask: Tensor | None,
    origin: dict[str, Any] | None = None,
    *,
    name: str,
) -> tuple[Tensor, dict[str, Any] | None, Tensor | None]:
    """Return the fields of a `TokenFile`; a running text loses its pads.

    Raises
    ------
    InvalidInput
        As `checked_mask`.
    """
    if mask is None:
        return ids, origin, None
    if ids.ndim == 2:
        return ids, origin, checked_mask(mask, ids, name=name)
    if mask.ndim != 1:
        raise InvalidInput(
            f"`{name}` must have the shape of the ids, {tuple(ids.shape)}; got {tuple(mask.shape)}."
        )
    real = checked_mask(mask[None], ids[None], name=name)
    return ids if real is None else ids[real[0]], origin, None


def _name(path: Path, names: list[str]) -> str:
    for name in _NAMES:
        if name in names:
            return name
    raise InvalidInput(
        f"'{path}' must hold token ids in a tensor named `ids` or `input_ids`; "
        f"it has {', '.join(sorted(names)[:5]) or 'no tensors'}."
    )


def _origin(path: Path, metadata: dict[str, str]) -> dict[str, Any] | None:
    if METADATA_KEY not in metadata:
        return None
    remedy = f"its metadata `{METADATA_KEY}` is corrupt: make the set again"
    with decoding(path, remedy=remedy):
        origin = json.loads(metadata[METADATA_KEY])
        return {key: origin[key] for key in ("source", "settings", "digest")}
