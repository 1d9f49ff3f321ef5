"""How sparse experts are packed: what lies in a file, in memory and under the kernels alike.

A layer's experts are tensors of one of three formats, little-endian, each row by itself.

``bitmap``
    Any zeros. One bit a weight and the kept values of a row in the order of its columns.

    * ``bitmap``, uint8, (experts, rows, 8 · ceil(cols / 64)): bit ``c % 8`` of byte ``c // 8``;
    * ``starts``, int32, (experts, rows + 1): where a row's values start, in units of 8 values;
    * ``values``, (stored,): a row's values and up to 7 zeros that fill its last 8; zeros fill up
      the last row to a multiple of 32.

``delta``
    Any zeros. The kept values of a row in the order of its columns, and how far each stands from
    the one before; where more than 15 columns lie between, zeros are stored among them.

    * ``starts`` and ``values`` as above; what fills up a row are zeros in the columns that follow;
    * ``index``, uint8, (stored / 2,): columns between a value and the one before, or the start of
      the row, 4 bits each, the lower half of a byte first.

``n16``
    At most n of any 16 neighbouring columns (a block) are kept. ``lanes`` neighbouring threads
    share a row: lane l owns the blocks l, l + lanes, l + 2 · lanes, …, n values each, in steps of
    ``chunk`` values (`Lanes`).

    * ``values``, (experts, rows, steps, lanes, chunk);
    * ``index``, uint8, (experts, rows, steps, lanes, chunk / 2): a value's column within its block,
      4 bits each, the lower half of a byte first. Places without a value hold a zero (the code of
  zero) and index 0.

Values are bfloat16, float16 or float32, or codes of 8 or 4 bits (uint8; of 4 bits two a byte, the
lower half first) and

    * ``scale``, float32, (experts, rows), and ``zero``, uint8, (experts, rows);
    * ``steps``, uint8, (experts, rows, 4 · ceil(cols / 512)), where groups of 128 columns have
      scales of their own; zeros fill it up.

A weight is ``(code − zero) · scale``, or ``(code − zero) · scale · step`` of its group.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from entangle.checks import choice, whole
from entangle.errors import InvalidInput

FORMATS = ("bitmap", "delta", "n16")
VALUES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.uint8,
    "int4": torch.uint8,
}
"""Dtype of what is stored, by the name of the values."""
GROUP = 128
"""Columns that share a step of the quantisation grid."""
BLOCK = 16
"""Neighbouring columns of which ``n16`` keeps n."""
UNIT = 8
"""Values in which ``starts`` counts."""
_FILL = 32  # values, at least 16 bytes, in which all of them are counted
_WORD = 64  # columns in which a bitmap's rows are counted
_WEIGHTS_AT_ONCE = 2**26  # of which places of 8 bytes are worked out together
_MARKED = 4096  # values of which a fingerprint is taken


@dataclass(frozen=True)
class Lanes:
    """How ``n16`` lays out a row: which thread owns which values."""

    lanes: int
    """Threads that share a row: 32, 16, 8 or 4."""
    rounds: int
    """Blocks that each of them owns."""
    chunk: int
    """Values that a thread loads at once."""
    steps: int
    """Loads of a thread a row: ``chunk · steps ≥ rounds · n``, the rest are zeros."""

    @property
    def blocks(self) -> int:
        """Blocks of a row, those that fill it up included."""
        return self.lanes * self.rounds


@cache
def lanes_of(in_features: int, kept: int, value_bits: int) -> Lanes:
    """Return the layout that fills up least; of nearly equal ones that of the longest loads."""
    blocks = math.ceil(in_features / BLOCK)
    found: list[tuple[int, Lanes]] = []
    for lanes in (32, 16, 8, 4):
        rounds = math.ceil(blocks / lanes)
        for chunk in (32, 16, 8, 4, 2):
            if chunk * value_bits <= 128:
                steps = math.ceil(rounds * kept / chunk)
                found.append((lanes * steps * chunk, Lanes(lanes, rounds, chunk, steps)))
    least = min(size for size, _ in found)
    return next(layout for size, layout in found if size <= 1.03 * least)


@dataclass(frozen=True)
class Layout:
    """Everything about a packed layer but its numbers; stands in ``config.json``."""

    format: str
    """One of `FORMATS`."""
    values: str
    """One of `VALUES`."""
    experts: int
    out_features: int
    in_features: int
    kept: int = 0
    """Values a block of ``n16``; else 0."""
    stored: int = 0
    """Values in ``values`` of the other two, those that fill up rows included; 0 for ``n16``."""
    grouped: bool = False
    """Whether codes have steps a group of 128 columns."""

    def __post_init__(self) -> None:
        choice("format", self.format, FORMATS)
        choice("values", self.values, tuple(VALUES))
        for name in ("experts", "out_features", "in_features"):
            whole(name, getattr(self, name), least=1)
        whole("kept", self.kept, least=int(self.format == "n16"), most=BLOCK)
        whole("stored", self.stored, least=0)
        if self.stored % _FILL or (self.grouped and not self.coded):
            raise InvalidInput(f"no packed layer can have the layout {self.describe()}.")

    @property
    def coded(self) -> bool:
        """Whether values are codes of a quantisation grid."""
        return self.values.startswith("int")

    @property
    def bits(self) -> int:
        """Bits of a stored value."""
        return 4 if self.values == "int4" else 8 * VALUES[self.values].itemsize

    @property
    def lanes(self) -> Lanes:
        """The layout of a row of ``n16``."""
        return lanes_of(self.in_features, self.kept, self.bits)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor by name."""
        k, rows, cols = self.experts, self.out_features, self.in_features
        dtype, half = VALUES[self.values], 1 + (self.values == "int4")
        found: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if self.format == "bitmap":
            found = {
                "bitmap": ((k, rows, 8 * math.ceil(cols / _WORD)), torch.uint8),
                "starts": ((k, rows + 1), torch.int32),
                "values": ((self.stored // half,), dtype),
            }
        elif self.format == "delta":
            found = {
                "index": ((self.stored // 2,), torch.uint8),
                "starts": ((k, rows + 1), torch.int32),
                "values": ((self.stored // half,), dtype),
            }
        else:
            at = self.lanes
            shape = (k, rows, at.steps, at.lanes)
            found = {
                "index": ((*shape, at.chunk // 2), torch.uint8),
                "values": ((*shape, at.chunk // half), dtype),
            }
        if self.coded:
            found |= {"scale": ((k, rows), torch.float32), "zero": ((k, rows), torch.uint8)}
        if self.grouped:
            found["steps"] = (k, rows, 4 * math.ceil(cols / (4 * GROUP))), torch.uint8
        return found

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)


class Packed(NamedTuple):
    """One layer's packed experts."""

    tensors: Mapping[str, Tensor]
    layout: Layout
    bias: Float[Tensor, " out_features"] | None = None


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantisation grid: a weight is ``(code − zero) · scale · step``."""

    bits: int
    """8 or 4."""
    scale: Float[Tensor, "experts rows"]
    zero: Float[Tensor, "experts rows"]
    """Code of the weight 0, a whole number in [0, 2**bits)."""
    steps: UInt8[Tensor, "experts rows groups"] | None = None

    def unit(self, cols: int) -> Float[Tensor, "experts rows *cols"]:
        """Return the distance of neighbouring values, for every column where it differs."""
        return unit_of(self.scale, self.steps, cols)


def unit_of(scale: Tensor, steps: Tensor | None, cols: int) -> Tensor:
    """Return the distance of neighbouring values, (…, rows, cols) or without steps (…, rows, 1)."""
    if steps is None:
        return scale[..., None]
    return (scale[..., None] * steps).repeat_interleave(GROUP, -1)[..., :cols]


def pack(
    weight: Float[Tensor, "experts rows cols"],
    form: str = "bitmap",
    *,
    values: str | None = None,
    codes: Codes | None = None,
    kept: int | None = None,
) -> tuple[Layout, dict[str, Tensor]]:
    """Pack experts; `unpack` gives them back, bit for bit but for the sign of a zero.

    Parameters
    ----------
    weight
        With zeros where nothing is kept.
    form
        One of `FORMATS`.
    values
        How values are stored: by default as they are. A narrower float rounds them.
    codes
        The grid on which all weights lie (to the rounding of their dtype); their codes are stored.
    kept
        For ``n16``: values a block; by default the most that a block holds.

    Raises
    ------
    InvalidInput
        If a block holds more than ``kept`` values, a value is not on the grid, or a float overflows
        the narrower one.
    """
    k, rows, cols = weight.shape
    name = str(weight.dtype).removeprefix("torch.") if values is None else values
    mask = weight != 0
    if codes is not None:
        name = f"int{codes.bits}"
        parts = [_encode(weight[e : e + 1], codes, mask[e : e + 1], e) for e in range(k)]
        stored, mask = (torch.cat(several) for several in zip(*parts, strict=True))
    else:
        if name not in VALUES or name.startswith("int"):
            raise InvalidInput(f"`values` must be a float of `VALUES` without a grid; got {name}.")
        stored = weight.to(VALUES[name])
        if not all(bool(own.isfinite().all()) for own in stored):  # one by one: it makes copies
            raise InvalidInput(f"a weight overflows {name}; store a wider dtype.")
        if stored.dtype != weight.dtype:
            mask = stored != 0
    extra = {} if codes is None else _grid_tensors(codes)
    described: dict[str, Any] = {
        "format": form, "values": name, "experts": k, "out_features": rows,
        "in_features": cols, "grouped": "steps" in extra,
    }  # fmt: skip
    if choice("form", form, FORMATS) == "bitmap":
        found = _pack_bitmap(stored, mask)
        layout = Layout(**described, stored=found["values"].numel())
    elif form == "delta":
        found = _pack_delta(stored, mask, extra.get("zero"))
        layout = Layout(**described, stored=found["values"].numel())
    else:
        blocks = torch.nn.functional.pad(mask, (0, -cols % BLOCK)).unflatten(-1, (-1, BLOCK))
        most = max(1, int(blocks.sum(-1, dtype=torch.int32).max()))
        if kept is not None and whole("kept", kept, least=1, most=BLOCK) < most:
            raise InvalidInput(f"a block of 16 columns holds {most} values, more than {kept}.")
        layout = Layout(**described, kept=kept or most)
        found = _pack_n16(stored, mask, layout, extra.get("zero"))
    if name == "int4":
        found["values"] = _pairs(found["values"])
    return layout, found | extra


def _starts(counts: Tensor) -> Tensor:
    """Return where the rows start, (experts, rows + 1), of these numbers of values."""
    k, rows = counts.shape
    ends = ((counts.flatten() + UNIT - 1) // UNIT).cumsum(0)
    if int(ends[-1]) >= 2**31:
        raise InvalidInput("a packed layer holds at most 2**34 values; expand into fewer experts.")
    starts = torch.cat([ends.new_zeros(1), ends])
    return torch.cat([starts[:-1].view(k, rows), starts[rows::rows, None]], 1).int()


def room(units: int) -> int:
    """Return how many values are stored where rows take so many units."""
    return math.ceil(units * UNIT / _FILL) * _FILL


def _room(starts: Tensor) -> int:
    return room(int(starts[-1, -1]))


def _pack_bitmap(stored: Tensor, mask: Tensor) -> dict[str, Tensor]:
    cols = mask.shape[-1]
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    starts = _starts(mask.sum(-1))
    values, bitmaps = stored.new_zeros(_room(starts)), []
    some = max(1, _WEIGHTS_AT_ONCE // cols)
    for start, expert, kept in zip(starts[:, :-1, None].long(), stored, mask, strict=True):
        for place, own, there in zip(
            start.split(some), expert.split(some), kept.split(some), strict=True
        ):
            values[(place * UNIT + there.cumsum(-1) - 1)[there]] = own[there]
        bits = torch.nn.functional.pad(kept, (0, -cols % _WORD)).unflatten(-1, (-1, 8))
        bitmaps.append((bits * weights).sum(-1, dtype=torch.uint8))
    return {"bitmap": torch.stack(bitmaps), "starts": starts, "values": values}


def _pack_delta(stored: Tensor, mask: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
    k, rows, cols = mask.shape
    lines, columns = mask.view(k * rows, cols).nonzero(as_tuple=True)
    first = torch.ones_like(lines, dtype=torch.bool)
    first[1:] = lines[1:] != lines[:-1]
    before = torch.where(first, -1, columns.roll(1))
    jumps = columns - before
    fillers = (jumps - 1) // BLOCK
    counts = torch.zeros(k * rows, dtype=torch.int64, device=mask.device)
    counts.index_add_(0, lines, fillers + 1)
    starts = _starts(counts.view(k, rows))
    empty = torch.zeros_like(stored[:, :, 0]) if zero is None else zero
    units = (starts[:, 1:] - starts[:, :-1]).flatten().long() * UNIT
    values = stored.new_zeros(_room(starts))
    index = torch.zeros_like(values, dtype=torch.uint8)
    filled = empty.flatten().repeat_interleave(units)
    values[: filled.numel()] = filled
    # a value stands behind all values and fillers of its row that come before it
    running = (fillers + 1).cumsum(0)
    ahead = (counts.cumsum(0) - counts)[lines]
    places = starts[:, :-1].flatten().long()[lines] * UNIT + running - 1 - ahead
    values[places] = stored.view(k * rows, cols)[lines, columns]
    index[places] = ((jumps - 1) % BLOCK).to(torch.uint8)
    total = int(fillers.sum())
    of = torch.arange(len(fillers), device=mask.device).repeat_interleave(fillers)
    back = torch.arange(total, device=mask.device) - (fillers.cumsum(0) - fillers)[of] + 1
    index[places[of] - back] = BLOCK - 1
    return {"index": _pairs(index), "starts": starts, "values": values}


def _pack_n16(
    stored: Tensor, mask: Tensor, layout: Layout, zero: Tensor | None
) -> dict[str, Tensor]:
    parts = [
        _pack_n16_expert(stored[e], mask[e], layout, None if zero is None else zero[e])
        for e in range(layout.experts)
    ]
    index, values = (torch.stack(several) for several in zip(*parts, strict=True))
    return {"index": index, "values": values}


def _pack_n16_expert(
    stored: Tensor, mask: Tensor, layout: Layout, zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, cols = mask.shape
    at, n = layout.lanes, layout.kept
    fill = (0, at.blocks * BLOCK - cols)
    mask = torch.nn.functional.pad(mask, fill).unflatten(-1, (-1, BLOCK))
    stored = torch.nn.functional.pad(stored, fill).unflatten(-1, (-1, BLOCK))
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n]  # kept columns first
    real = mask.gather(-1, order)
    empty = torch.zeros_like(stored[:1, :1, :1]) if zero is None else zero[:, None, None]
    values = torch.where(real, stored.gather(-1, order), empty)
    index = torch.where(real, order, 0).to(torch.uint8)

    def streams(tensor: Tensor, fill: Tensor) -> Tensor:
        """Give every lane its blocks in a row, (rows, steps, lanes, chunk)."""
        own = tensor.view(rows, at.rounds, at.lanes, n).transpose(1, 2).flatten(2)
        rest = fill.expand(rows, at.lanes, at.steps * at.chunk - own.shape[-1])
        own = torch.cat([own, rest], -1)
        own = own.reshape(rows, at.lanes, at.steps, at.chunk)
        return own.transpose(1, 2).contiguous()

    none = torch.zeros_like(index[:1, :1, :1])
    return _pairs(streams(index, none)), streams(values, empty)


def fingerprint(values: Tensor) -> str:
    """Return the SHA-256 of the first packed values, which tells builds apart at no cost."""
    first = values.flatten()[:_MARKED].cpu().contiguous()
    return hashlib.sha256(first.view(torch.uint8).numpy().tobytes()).hexdigest()


def check_starts(starts: Int[Tensor, "experts ends"], layout: Layout) -> None:
    """Check that all rows lie within the values and are no longer than a row can be.

    Raises
    ------
    InvalidInput
        If not; the kernels would read or write past the ends.
    """
    ends = starts.long()
    sizes, most = ends.diff(dim=1), math.ceil(layout.in_features / UNIT)
    inside = ends[0, 0] >= 0 and _room(ends) == layout.stored
    joined = torch.equal(ends[1:, 0], ends[:-1, -1])
    if not (inside and joined and bool(((sizes >= 0) & (sizes <= most)).all())):
        raise InvalidInput("the packed `starts` are damaged: copy the file again.")


def _encode(weight: Tensor, codes: Codes, mask: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Return the codes of one expert, and where they are not that of a zero."""
    own = slice(expert, expert + 1)
    steps = None if codes.steps is None else codes.steps[own]
    unit = unit_of(codes.scale[own], steps, weight.shape[-1]).float()
    zero = codes.zero[own, :, None].float()
    wide = weight.float()
    found = (wide / unit).round() + zero
    about = torch.finfo(weight.dtype)
    rounding = about.eps * (wide.abs() + about.smallest_normal)
    fits = (((found - zero) * unit - wide).abs() <= rounding + 1e-4 * unit) | ~mask
    if not bool((fits & ((found >= 0) & (found < 2**codes.bits) | ~mask)).all()):
        raise InvalidInput("a weight does not lie on the quantisation grid it is to be stored by.")
    return torch.where(mask, found, 0).to(torch.uint8), mask & (found != zero)


def _grid_tensors(codes: Codes) -> dict[str, Tensor]:
    found = {"scale": codes.scale.float().contiguous(), "zero": codes.zero.to(torch.uint8)}
    if codes.steps is None:
        return found
    steps = torch.nn.functional.pad(codes.steps, (0, -codes.steps.shape[-1] % 4))
    return found | {"steps": steps.contiguous()}


def _pairs(nibbles: Tensor) -> Tensor:
    """Store two numbers below 16 a byte, the first in its lower half."""
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _halves(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def unpack(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    expert: int,
    rows: slice = slice(None),
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "rows cols"]:
    """Return some rows of one expert with their zeros.

    Parameters
    ----------
    tensors
        From `pack`, on any device.
    layout
        From `pack`.
    expert, rows
        Which of them.
    dtype
        By default that of the values; float32 for codes.
    """
    first, stop, _ = rows.indices(layout.out_features)
    if layout.format == "bitmap":
        values, mask = _read_bitmap(tensors, layout, expert, first, stop)
        dense = values.new_zeros(mask.shape)
        dense[mask] = values
    elif layout.format == "delta":
        dense, mask = _read_delta(tensors, layout, expert, first, stop)
    else:
        dense, mask = _read_n16(tensors, layout, expert, first, stop)
    if layout.coded:
        zero = tensors["zero"][expert, first:stop, None].float()
        steps = tensors["steps"][expert, first:stop] if layout.grouped else None
        unit = unit_of(tensors["scale"][expert, first:stop], steps, layout.in_features)
        dense = torch.where(mask, (dense.float() - zero) * unit, 0)
    return dense if dtype is None else dense.to(dtype)


def _read_bitmap(
    tensors: Mapping[str, Tensor], layout: Layout, expert: int, first: int, stop: int
) -> tuple[Tensor, Bool[Tensor, "rows cols"]]:
    """Return the kept values of some rows in reading order, and where they stand."""
    shifts = torch.arange(8, dtype=torch.uint8, device=tensors["bitmap"].device)
    bits = tensors["bitmap"][expert, first:stop, :, None] >> shifts & 1
    mask = bits.flatten(1)[:, : layout.in_features].bool()
    values, row, offset = _read_values(tensors, layout, expert, first, stop)
    return values[offset < mask.sum(1)[row]], mask


def _read_values(
    tensors: Mapping[str, Tensor], layout: Layout, expert: int, first: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all stored values of some rows, their rows, and their numbers within these."""
    starts = tensors["starts"][expert, first : stop + 1].long() * UNIT
    begin, end = int(starts[0]), int(starts[-1])
    if layout.values == "int4":
        values = _halves(tensors["values"][begin // 2 : end // 2])
    else:
        values = tensors["values"][begin:end]
    offset = torch.arange(begin, end, device=values.device)
    row = torch.searchsorted(starts, offset, right=True) - 1
    return values, row, offset - starts[row]


def _read_delta(
    tensors: Mapping[str, Tensor], layout: Layout, expert: int, first: int, stop: int
) -> tuple[Tensor, Bool[Tensor, "rows cols"]]:
    values, row, offset = _read_values(tensors, layout, expert, first, stop)
    begin = int(tensors["starts"][expert, first]) * UNIT
    gaps = _halves(tensors["index"][begin // 2 : (begin + len(values)) // 2]).long() + 1
    running = gaps.cumsum(0)
    ahead = (running - gaps)[offset == 0]  # of each row that stores anything
    column = running - ahead[(offset == 0).cumsum(0) - 1] - 1
    fill = tensors["zero"][expert, first:stop][row] if layout.coded else 0
    real = values != fill
    dense = values.new_zeros(stop - first, layout.in_features)
    dense[row[real], column[real]] = values[real]
    mask = torch.zeros_like(dense, dtype=torch.bool)
    mask[row[real], column[real]] = True
    return dense, mask


def _read_n16(
    tensors: Mapping[str, Tensor], layout: Layout, expert: int, first: int, stop: int
) -> tuple[Tensor, Bool[Tensor, "rows cols"]]:
    at, n = layout.lanes, layout.kept
    values = tensors["values"][expert, first:stop]
    values = _halves(values) if layout.values == "int4" else values
    index = _halves(tensors["index"][expert, first:stop])

    def blocks(tensor: Tensor) -> Tensor:
        own = tensor.transpose(1, 2).flatten(2)[..., : at.rounds * n]
        own = own.reshape(-1, at.lanes, at.rounds, n)
        return own.transpose(1, 2).flatten(1, 2)

    values, index = blocks(values), blocks(index).long()
    fill = tensors["zero"][expert, first:stop, None, None] if layout.coded else 0
    real = values != fill
    places = torch.where(real, index, BLOCK)  # one place more, for what only fills
    dense = values.new_zeros(*values.shape[:2], BLOCK + 1).scatter_(-1, places, values)
    mask = torch.zeros_like(dense, dtype=torch.bool).scatter_(-1, places, True)
    cols = layout.in_features
    return dense[..., :BLOCK].flatten(1)[:, :cols], mask[..., :BLOCK].flatten(1)[:, :cols]
