"""The kernels for packed experts on CPUs, as they are written for `entangle.packed.native`.

A row is worked on in two steps. Its stored values become float32 numbers (codes minus the code of
zero) in a buffer that stays in the first cache; then each meets the x of its column:

* ``bitmap``: the numbers spread to the columns whose bits are set, 16 by AVX-512's expanding load,
  8 by a permutation from a table of 256 (AVX2), or one by one (any processor);
* ``n16``: x comes to the numbers. 16 numbers of a lane's stream cover few blocks, always the same
  ones; each block of x, one register, is permuted by the positions and taken where the number is
  that block's (AVX-512), or x is gathered.

Threads take the next rows by a counter; every row is summed by one thread in one order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from entangle.packed.formats import BLOCK, GROUP, Layout
from entangle.packed.native import Code

Use = Callable[[list[Any], Callable[[int, int], Any], int], None]
"""Of one vector of numbers a row, the x of (row, token) to them, and a running number."""


class Job(IntEnum):
    """What stands where in a job (64 bits each)."""

    NEXT = 0
    """The next piece of work; counted up by the threads."""
    SEAT = 1
    """The next thread's number; counted up by the threads."""
    PIECES = 2
    """Pieces of work: of all parts together."""
    CHUNKS = 3
    """Pieces of a part."""
    CHUNK = 4
    """Rows of a piece."""
    FIRST = 5
    STOP = 6
    """Rows to work on, first and behind the last."""
    ROWS = 7
    """Rows of an expert."""
    COLS = 8
    STORED = 9
    """Values of a row of ``n16``."""
    X = 10
    X_STRIDE = 11
    OUT_STRIDE = 12
    """Bytes from a token (or a row of a tile) to the next."""
    GROUPS = 13
    """How many groups of tokens of one expert."""
    GROUP = 14
    """Address of the groups: the expert and the tokens, 64 bits each."""
    SCRATCH = 15
    SCRATCH_STRIDE = 16
    """Floats for each thread: their address and their bytes."""
    BUFFER = 17
    """Bytes for the numbers of a row."""
    TABLE = 18
    """Address: of ``n16`` every stored value's first column of its block, int32."""
    PARTS = 19
    """Here the parts begin; each has the fields of `Part`."""


class Part(IntEnum):
    """Addresses of one layer."""

    POSITIONS = 0
    """``bitmap`` or ``index``."""
    STARTS = 1
    VALUES = 2
    SCALE = 3
    ZERO = 4
    STEPS = 5
    OUT = 6
    SIZE = 7


@dataclass(frozen=True)
class Kernel:
    """What a kernel is written for."""

    form: str
    layout: Layout
    """Its shape counts for ``n16`` alone."""
    tokens: int
    """Tokens of one expert at once; 0: the kernel unpacks rows."""
    tile: str = "float32"
    """Dtype of unpacked rows."""

    @property
    def width(self) -> int:
        """Lanes of a vector."""
        return {"avx512": 16, "avx2": 8, "scalar": 1}[self.form]

    @property
    def rows(self) -> int:
        """Rows at once: they share the loads of x."""
        return 2 if self.width > 1 and self.tokens in (1, 2) else 1


class _Writer(Code):
    """What both kinds of kernels share."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__("work")
        self.kernel = kernel
        self.layout = kernel.layout
        self.floats = self.vector(self.f32, kernel.width)
        address = self.at.ptrtoint(self.function.args[0], self.i64)
        self.job = address
        self.field = {one: self.load(self.i64, self.sum(address, 8 * one)) for one in Job}
        seat = self.take(Job.SEAT)
        place = self.times(seat, self.field[Job.SCRATCH_STRIDE])
        self.scratch = self.sum(self.field[Job.SCRATCH], place)
        self.spread = self._spread_table() if kernel.form == "avx2" else None

    def take(self, counter: Job) -> Any:
        """Return the next number of a counter that all threads share."""
        place = self.pointer(self.sum(self.job, 8 * counter))
        return self.at.atomic_rmw("add", place, self.whole(1), "monotonic")

    def pieces(self, work: Callable[[Any, Any, Any], None]) -> None:
        """Take pieces as long as there are any, and do the work on part, first row, stop."""
        field = self.field
        taken = self.variable(self.take(Job.NEXT))
        with self.whilst(lambda: self.at.icmp_signed("<", self.get(taken), field[Job.PIECES])):
            part = self.at.sdiv(self.get(taken), field[Job.CHUNKS])
            chunk = self.at.srem(self.get(taken), field[Job.CHUNKS])
            first = self.sum(field[Job.FIRST], self.times(chunk, field[Job.CHUNK]))
            stop = self.least(self.sum(first, field[Job.CHUNK]), field[Job.STOP])
            part = self.sum(self.job, 8 * Job.PARTS, self.times(part, 8 * Part.SIZE))
            work(part, first, stop)
            self.set(taken, self.take(Job.NEXT))

    def least(self, one: Any, other: Any) -> Any:
        """Return the lesser of two whole numbers."""
        return self.at.select(self.at.icmp_signed("<", one, other), one, other)

    def row(self, part: Any, expert: Any, row: Any, buffer: Any) -> "_Row":
        """Convert the stored values of a row, and return where everything of it stands."""
        find = {one: self.load(self.i64, self.sum(part, 8 * one)) for one in Part if one < 7}
        at = self.sum(self.times(expert, self.field[Job.ROWS]), row)
        scale = zero = steps = None
        if self.layout.coded:
            scale = self.load(self.f32, self.sum(find[Part.SCALE], self.times(at, 4)))
            zero = self.load(self.i8, self.sum(find[Part.ZERO], at))
            zero = self.at.zext(zero, self.i32)
        if self.layout.grouped:
            groups = self.at.sdiv(self.sum(self.field[Job.COLS], GROUP - 1), self.whole(GROUP))
            steps = self.sum(find[Part.STEPS], self.times(at, groups))
        if self.layout.format == "bitmap":
            words = self.at.sdiv(self.sum(self.field[Job.COLS], 63), self.whole(64))
            positions = self.sum(find[Part.POSITIONS], self.times(at, self.times(words, 8)))
            place = self.sum(find[Part.STARTS], self.times(self.sum(at, expert), 4))
            start, end = (
                self.times(self.at.zext(self.load(self.i32, self.sum(place, n)), self.i64), 8)
                for n in (0, 4)
            )
            count = self.at.sub(end, start)
        else:
            count = self.field[Job.STORED]
            start = self.times(at, count)
            positions = self.sum(find[Part.POSITIONS], self.at.ashr(start, self.whole(1)))
            words = count
        values = self.at.ashr(self.times(start, self.layout.bits), self.whole(3))
        self.numbers(self.sum(find[Part.VALUES], values), count, buffer, zero)
        return _Row(positions, words, buffer, scale, steps)

    def numbers(self, values: Any, count: Any, buffer: Any, zero: Any) -> None:
        """Convert stored values, a multiple of 8, to float32 in a buffer."""
        done = self.variable(self.whole(0))
        for lanes in (32, 8):
            with self.whilst(
                lambda lanes=lanes: self.at.icmp_signed(  # type: ignore[misc]
                    "<=", self.sum(self.get(done), lanes), count
                )
            ):
                at = self.get(done)
                place = self.at.ashr(self.times(at, self.layout.bits), self.whole(3))
                found = self.convert(self.sum(values, place), lanes, zero)
                self.store(found, self.sum(buffer, self.times(at, 4)))
                self.add(done, lanes)

    def convert(self, address: Any, lanes: int, zero: Any) -> Any:
        """Load stored values and return them as float32."""
        kind, wide = self.layout.values, self.vector(self.i32, lanes)
        floats = self.vector(self.f32, lanes)
        if kind == "float32":
            return self.load(floats, address)
        if kind == "float16":
            return self.half(address, lanes)
        if kind == "bfloat16":
            found = self.at.zext(self.load(self.vector(self.i16, lanes), address), wide)
            return self.at.bitcast(self.at.shl(found, self.constant(wide, 16)), floats)
        if kind == "int8":
            found = self.at.zext(self.load(self.vector(self.i8, lanes), address), wide)
        else:
            found = self.nibbles(self.load(self.vector(self.i8, lanes // 2), address))
        return self.at.sitofp(self.at.sub(found, self.splat(zero, lanes)), floats)

    def half(self, address: Any, lanes: int) -> Any:
        """Load finite numbers of float16 and return them as float32.

        A processor without the instruction moves the bits; 2**112 makes up for the exponents.
        """
        floats, wide = self.vector(self.f32, lanes), self.vector(self.i32, lanes)
        if self.kernel.form != "scalar":
            return self.at.fpext(self.load(self.vector(self.f16, lanes), address), floats)
        bits = self.at.zext(self.load(self.vector(self.i16, lanes), address), wide)
        sign = self.at.shl(self.at.and_(bits, self.constant(wide, 0x8000)), self.constant(wide, 16))
        rest = self.at.shl(self.at.and_(bits, self.constant(wide, 0x7FFF)), self.constant(wide, 13))
        rest = self.at.fmul(self.at.bitcast(rest, floats), self.constant(floats, 2.0**112))
        return self.at.bitcast(self.at.or_(sign, self.at.bitcast(rest, wide)), floats)

    def nibbles(self, packed: Any, *, clean: bool = True) -> Any:
        """Return the numbers of 4 bits in their order; not ``clean``: in the lowest 4 bits."""
        pairs = self.vector(self.i64, packed.type.count)
        wide = self.vector(self.i32, 2 * packed.type.count)
        found = self.at.zext(packed, pairs)
        found = self.at.or_(found, self.at.shl(found, self.constant(pairs, 28)))
        found = self.at.bitcast(found, wide)
        return self.at.and_(found, self.constant(wide, 15)) if clean else found

    def unit(self, row: "_Row", group: Any) -> Any:
        """Return the distance of neighbouring values in a group of columns."""
        if row.steps is None:
            return row.scale
        step = self.load(self.i8, self.sum(row.steps, group))
        return self.at.fmul(row.scale, self.at.uitofp(step, self.f32))

    def _spread_table(self) -> Any:
        """Return the address of a table: a byte's set bits -> the number that each column takes.

        Columns without one have the highest bit set.
        """
        lines = []
        for byte in range(256):
            taken = [(byte & (2**bit - 1)).bit_count() for bit in range(8)]
            lines += [n if byte >> bit & 1 else 128 for bit, n in enumerate(taken)]
        return self.data("spread", lines)

    def data(self, name: str, content: list[int]) -> Any:
        """Return the address of some bytes beside the code."""
        from llvmlite import ir

        kind = ir.ArrayType(self.i8, len(content))
        table = ir.GlobalVariable(self.module, kind, name)
        table.global_constant, table.linkage = True, "internal"
        table.initializer = ir.Constant(kind, bytearray(content))
        return self.at.ptrtoint(table, self.i64)

    def expand(self, place: Any, bits: Any) -> Any:
        """Load the next numbers to the columns whose bits are set, zero to the others."""
        if self.kernel.form == "avx512":
            mask = self.at.bitcast(self.at.trunc(bits, self.i16), self.vector(self.i1, 16))
            zero = self.constant(self.floats, 0.0)
            return self.call(
                "llvm.masked.expandload.v16f32", self.floats, self.pointer(place), mask, zero
            )
        whole = self.vector(self.i32, 8)
        line = self.load(self.vector(self.i8, 8), self.sum(self.spread, self.times(bits, 8)))
        line = self.at.sext(line, whole)
        found = self.call("llvm.x86.avx2.permps", self.floats, self.load(self.floats, place), line)
        kept = self.at.icmp_signed(">=", line, self.constant(whole, 0))
        return self.at.select(kept, found, self.constant(self.floats, 0.0))

    @property
    def i1(self) -> Any:
        from llvmlite import ir

        return ir.IntType(1)


@dataclass
class _Row:
    """Where a row's tensors and numbers stand."""

    positions: Any
    words: Any
    buffer: Any
    scale: Any
    steps: Any


def product(kernel: Kernel) -> str:
    """Write the kernel that multiplies rows by the tokens of one expert, `Kernel.tokens` of them.

    A group in the job is the expert and that many tokens (one may stand there more than once).
    """
    return _Product(kernel).written()


class _Product(_Writer):
    def written(self) -> str:
        self.pieces(self._piece)
        return self.text()

    def _piece(self, part: Any, first: Any, stop: Any) -> None:
        size = 8 * (1 + self.kernel.tokens)
        with self.loop(0, self.field[Job.GROUPS]) as number:
            group = self.sum(self.field[Job.GROUP], self.times(number, size))
            expert = self.load(self.i64, group)
            tokens = [
                self.load(self.i64, self.sum(group, 8 * (1 + t))) for t in range(self.kernel.tokens)
            ]
            x = [
                self.sum(self.field[Job.X], self.times(t, self.field[Job.X_STRIDE])) for t in tokens
            ]
            out = self.load(self.i64, self.sum(part, 8 * Part.OUT))
            outs = [self.sum(out, self.times(t, self.field[Job.OUT_STRIDE])) for t in tokens]
            finite = [self._finite(one) for one in x]
            with self.loop(first, stop, self.kernel.rows) as row:
                last = self.sum(stop, -1)
                rows = [self.least(self.sum(row, n), last) for n in range(self.kernel.rows)]
                self._rows(part, expert, rows, x, outs, finite)

    def _finite(self, x: Any) -> Any:
        """Return 0, or what is not a number if x holds one that is not finite."""
        found = self.variable(self.constant(self.f32, 0.0))
        lanes = self.vector(self.f32, 16)
        total = self.variable(self.constant(lanes, 0.0))
        with self.loop(0, self.field[Job.X_STRIDE], 64) as place:
            here = self.load(lanes, self.sum(x, place))
            self.set(total, self.fma(here, self.constant(lanes, 0.0), self.get(total)))
        self.set(found, self.total(self.get(total)))
        return self.get(found)

    def total(self, vector: Any) -> Any:
        """Return the sum of a vector's lanes."""
        lanes = vector.type.count
        while lanes > 1:
            lanes //= 2
            halves = [
                self.at.shuffle_vector(
                    vector, vector, self.constant(self.vector(self.i32, lanes), [*which])
                )
                for which in (range(lanes), range(lanes, 2 * lanes))
            ]
            vector = self.at.fadd(*halves)
        return self.at.extract_element(vector, self.i32(0))

    def _rows(
        self, part: Any, expert: Any, numbers: list[Any], x: list[Any], out: list[Any],
        finite: list[Any],
    ) -> None:  # fmt: skip
        rows = [
            self.row(
                part, expert, row, self.sum(self.scratch, self.times(self.field[Job.BUFFER], n))
            )
            for n, row in enumerate(numbers)
        ]
        zero = self.constant(self.floats, 0.0)
        sums = [[[self.variable(zero) for _ in range(2)] for _ in x] for _ in rows]

        def use(values: list[Any], other: Callable[[int, int], Any], turn: int) -> None:
            for r, value in enumerate(values):
                for t in range(len(x)):
                    place = sums[r][t][turn % 2]
                    self.set(place, self.fma(value, other(r, t), self.get(place)))

        self._walk(rows, x, use)
        for row, at, found in zip(rows, numbers, sums, strict=True):
            for t, (one, two) in enumerate(found):
                total = self.total(self.at.fadd(self.get(one), self.get(two)))
                if self.layout.coded and not self.layout.grouped:
                    total = self.at.fmul(total, row.scale)
                total = self.at.fadd(total, finite[t])
                self.store(total, self.sum(out[t], self.times(at, 4)))

    def _walk(self, rows: list[_Row], x: list[Any], use: Use) -> None:
        ways = {
            ("bitmap", "scalar"): self._bits, ("n16", "avx512"): self._streams,
            ("n16", "avx2"): self._gathers, ("n16", "scalar"): self._singles,
        }  # fmt: skip
        ways.get((self.layout.format, self.kernel.form), self._words)(rows, x, use)

    def _words(self, rows: list[_Row], x: list[Any], use: Use) -> None:
        """Walk over the words of a bitmap, a vector of columns at a time."""
        width = self.kernel.width
        places = [self.variable(row.buffer) for row in rows]
        with self.loop(0, rows[0].words) as word:
            bits = [self.load(self.i64, self.sum(r.positions, self.times(word, 8))) for r in rows]
            units = [
                self.splat(self.unit(row, self.at.ashr(word, self.whole(1))), width)
                for row in rows if row.steps is not None
            ]  # fmt: skip
            for turn in range(64 // width):
                values = []
                for r in range(len(rows)):
                    mine = self.at.lshr(bits[r], self.whole(width * turn))
                    mine = self.at.and_(mine, self.whole(2**width - 1))
                    value = self.expand(self.get(places[r]), mine)
                    self.add(places[r], self.times(self.call("llvm.ctpop.i64", self.i64, mine), 4))
                    values.append(self.at.fmul(value, units[r]) if units else value)
                at = self.sum(self.times(word, 256), 4 * width * turn)
                found = [self.load(self.floats, self.sum(one, at)) for one in x]
                use(values, lambda _r, t, found=found: found[t], turn)  # type: ignore[misc]

    def _bits(self, rows: list[_Row], x: list[Any], use: Use) -> None:
        """Walk over the set bits of a bitmap."""
        (row,) = rows
        place = self.variable(row.buffer)
        with self.loop(0, row.words) as word:
            unit = (
                self.unit(row, self.at.ashr(word, self.whole(1))) if row.steps is not None else None
            )
            left = self.variable(self.load(self.i64, self.sum(row.positions, self.times(word, 8))))
            with self.whilst(lambda: self.at.icmp_signed("!=", self.get(left), self.whole(0))):
                bits = self.get(left)
                column = self.call("llvm.cttz.i64", self.i64, bits, self.constant(self.i1, 1))
                at = self.sum(self.times(word, 256), self.times(column, 4))
                value = self.load(self.floats, self.get(place))
                if unit is not None:
                    value = self.at.fmul(value, self.splat(unit, 1))
                use([value], lambda _r, t, at=at: self.load(self.floats, self.sum(x[t], at)), 0)  # type: ignore[misc]
                self.add(place, 4)
                self.set(left, self.at.and_(bits, self.sum(bits, -1)))

    def _singles(self, rows: list[_Row], x: list[Any], use: Use) -> None:
        """Walk over the stored values of ``n16`` one by one, in pairs of positions."""
        (row,) = rows
        with self.loop(0, self.field[Job.STORED], 2) as at:
            byte = self.load(self.i8, self.sum(row.positions, self.at.ashr(at, self.whole(1))))
            byte = self.at.zext(byte, self.i64)
            for half in range(2):
                place = self.times(self.sum(at, half), 4)
                block = self.load(self.i32, self.sum(self.field[Job.TABLE], place))
                index = self.at.and_(self.at.lshr(byte, self.whole(4 * half)), self.whole(15))
                block = self.at.zext(block, self.i64)
                value = self.load(self.floats, self.sum(row.buffer, place))
                if row.steps is not None:
                    unit = self.unit(row, self.at.lshr(block, self.whole(7)))
                    value = self.at.fmul(value, self.splat(unit, 1))
                column = self.times(self.sum(block, index), 4)
                use(
                    [value],
                    lambda _r, t, column=column: self.load(self.floats, self.sum(x[t], column)),  # type: ignore[misc]
                    half,
                )

    def _units(self, row: _Row, number: int) -> Any:
        """Write the distances of neighbouring values of all groups behind a row's numbers."""
        lanes = self.layout.lanes
        groups = math.ceil(self.layout.in_features / GROUP)
        filled = math.ceil(lanes.blocks * BLOCK / GROUP)
        place = self.sum(
            self.scratch, self.times(self.field[Job.BUFFER], self.kernel.rows),
            4 * number * filled,
        )  # fmt: skip
        with self.loop(0, groups) as group:
            self.store(self.unit(row, group), self.sum(place, self.times(group, 4)))
        with self.loop(groups, filled) as group:
            zero = self.constant(self.f32, 0.0)
            self.store(zero, self.sum(place, self.times(group, 4)))
        return place

    def _gathers(self, rows: list[_Row], x: list[Any], use: Use) -> None:
        """Walk over the stored values of ``n16``, 8 at a time, and gather their x."""
        whole = self.vector(self.i32, 8)
        units = [self._units(row, n) for n, row in enumerate(rows) if row.steps is not None]
        with self.loop(0, self.field[Job.STORED], 8) as at:
            place = self.times(at, 4)
            blocks = self.load(whole, self.sum(self.field[Job.TABLE], place))
            values, columns = [], []
            for n, row in enumerate(rows):
                packed = self.load(
                    self.vector(self.i8, 4),
                    self.sum(row.positions, self.at.ashr(at, self.whole(1))),
                )
                columns.append(self.at.add(blocks, self.nibbles(packed)))
                value = self.load(self.floats, self.sum(row.buffer, place))
                if units:
                    group = self.at.lshr(blocks, self.constant(whole, 7))
                    value = self.at.fmul(value, self._gather(units[n], group))
                values.append(value)
            use(values, lambda r, t: self._gather(x[t], columns[r]), 0)

    def _gather(self, base: Any, index: Any) -> Any:
        zero = self.constant(self.floats, 0.0)
        all_of_them = self.at.bitcast(self.constant(self.vector(self.i32, 8), -1), self.floats)
        return self.call(
            "llvm.x86.avx2.gather.d.ps.256", self.floats, zero, self.pointer(base), index,
            all_of_them, self.constant(self.i8, 4),
        )  # fmt: skip

    def _streams(self, rows: list[_Row], x: list[Any], use: Use) -> None:
        """Walk over the lanes of ``n16``, 16 numbers of a lane's stream at a time."""
        lanes, kept = self.layout.lanes, self.layout.kept
        units = [self._units(row, n) for n, row in enumerate(rows) if row.steps is not None]
        for number in range(math.ceil(lanes.rounds * kept / 16)):
            owners = [
                min(t // kept, lanes.rounds - 1) for t in range(16 * number, 16 * number + 16)
            ]
            masks = {
                one: self.constant(self.vector(self.i1, 16), [int(o == one) for o in owners])
                for one in dict.fromkeys(owners)
            }
            with self.loop(0, lanes.lanes) as lane:
                values = [self._piece_of(r.buffer, number, lane, 32) for r in rows]
                index = [
                    self.nibbles(self._piece_of(r.positions, number, lane, 4), clean=False)
                    for r in rows
                ]
                blocks = {one: self.sum(lane, lanes.lanes * one) for one in masks}
                if units:
                    for r, place in enumerate(units):
                        values[r] = self.at.fmul(values[r], self._unit_of(place, blocks, masks))
                found = self._permuted(x, index, blocks, masks)
                use(values, lambda r, t, found=found: found[r][t], number)  # type: ignore[misc]

    def _permuted(
        self, x: list[Any], index: list[Any], blocks: dict[int, Any], masks: dict[int, Any]
    ) -> list[list[Any]]:
        """Return the x of 16 numbers, for every row and token."""
        found: list[list[Any]] = [[None] * len(x) for _ in index]
        for one, block in blocks.items():
            for t, base in enumerate(x):
                here = self.load(self.floats, self.sum(base, self.times(block, 4 * BLOCK)))
                for r, places in enumerate(index):
                    mine = self.call("llvm.x86.avx512.permvar.sf.512", self.floats, here, places)
                    before = found[r][t]
                    found[r][t] = mine if before is None else self.at.select(
                        masks[one], mine, before
                    )  # fmt: skip
        return found

    def _unit_of(self, place: Any, blocks: dict[int, Any], masks: dict[int, Any]) -> Any:
        found = None
        for one, block in blocks.items():
            group = self.at.lshr(block, self.whole(3))
            mine = self.load(self.f32, self.sum(place, self.times(group, 4)))
            mine = self.splat(mine, 16)
            found = mine if found is None else self.at.select(masks[one], mine, found)
        return found

    def _piece_of(self, base: Any, number: int, lane: Any, bits: int) -> Any:
        """Load 16 neighbours of a lane's stream: floats (32 bits each) or pairs of positions (4).

        They stand in pieces of `Lanes.chunk`; behind the last step they are zeros.
        """
        lanes = self.layout.lanes
        size = min(lanes.chunk, 16)
        kind = self.f32 if bits == 32 else self.i8
        count = size if bits == 32 else size // 2
        pieces = []
        for first in range(16 * number, 16 * number + 16, size):
            step, rest = divmod(first, lanes.chunk)
            at = self.sum(self.times(self.sum(lane, lanes.lanes * step), lanes.chunk), rest)
            place = self.sum(base, self.at.lshr(self.times(at, bits), self.whole(3)))
            kinds = self.vector(kind, count)
            inside = step < lanes.steps
            pieces.append(self.load(kinds, place) if inside else self.constant(kinds, 0))
        while len(pieces) > 1:
            lanes_of_two = self.vector(self.i32, 2 * pieces[0].type.count)
            order = self.constant(lanes_of_two, [*range(lanes_of_two.count)])
            pieces = [
                self.at.shuffle_vector(one, two, order)
                for one, two in zip(pieces[::2], pieces[1::2], strict=True)
            ]
        return pieces[0]


def unpacking(kernel: Kernel) -> str:
    """Write the kernel that unpacks rows of one expert (the first of the job's groups)."""
    return _Unpack(kernel).written()


class _Unpack(_Writer):
    def written(self) -> str:
        self.pieces(self._piece)
        return self.text()

    def _piece(self, part: Any, first: Any, stop: Any) -> None:
        expert = self.load(self.i64, self.field[Job.GROUP])
        out = self.load(self.i64, self.sum(part, 8 * Part.OUT))
        line = self.sum(self.scratch, self.field[Job.BUFFER])
        with self.loop(first, stop) as number:
            row = self.row(part, expert, number, self.scratch)
            if self.layout.format == "bitmap" and self.kernel.width > 1:
                self._expanded(row, line)
            else:
                self._scattered(row, line)
            place = self.at.sub(number, self.field[Job.FIRST])
            self._narrowed(line, self.sum(out, self.times(place, self.field[Job.OUT_STRIDE])))

    def _expanded(self, row: _Row, line: Any) -> None:
        width = self.kernel.width
        place = self.variable(row.buffer)
        with self.loop(0, row.words) as word:
            bits = self.load(self.i64, self.sum(row.positions, self.times(word, 8)))
            unit = self._unit(row, self.at.ashr(word, self.whole(1)), width)
            for turn in range(64 // width):
                mine = self.at.lshr(bits, self.whole(width * turn))
                mine = self.at.and_(mine, self.whole(2**width - 1))
                value = self.expand(self.get(place), mine)
                value = value if unit is None else self.at.fmul(value, unit)
                self.store(value, self.sum(line, self.times(word, 256), 4 * width * turn))
                self.add(place, self.times(self.call("llvm.ctpop.i64", self.i64, mine), 4))

    def _unit(self, row: _Row, group: Any, lanes: int) -> Any:
        return self.splat(self.unit(row, group), lanes) if self.layout.coded else None

    def _scattered(self, row: _Row, line: Any) -> None:
        empty = self.constant(self.vector(self.f32, 16), 0.0)
        with self.loop(0, self.field[Job.X_STRIDE], 64) as place:
            self.store(empty, self.sum(line, place))
        walk = self._bits if self.layout.format == "bitmap" else self._singles
        walk(row, line)

    def _put(self, row: _Row, value: Any, column: Any, line: Any) -> None:
        """Add a number to its column: places without a value add zero to another's."""
        if self.layout.coded:
            value = self.at.fmul(value, self.unit(row, self.at.lshr(column, self.whole(7))))
        place = self.sum(line, self.times(column, 4))
        self.store(self.at.fadd(self.load(self.f32, place), value), place)

    def _bits(self, row: _Row, line: Any) -> None:
        place = self.variable(row.buffer)
        with self.loop(0, row.words) as word:
            left = self.variable(self.load(self.i64, self.sum(row.positions, self.times(word, 8))))
            with self.whilst(lambda: self.at.icmp_signed("!=", self.get(left), self.whole(0))):
                bits = self.get(left)
                column = self.call("llvm.cttz.i64", self.i64, bits, self.constant(self.i1, 1))
                column = self.sum(self.times(word, 64), column)
                self._put(row, self.load(self.f32, self.get(place)), column, line)
                self.add(place, 4)
                self.set(left, self.at.and_(bits, self.sum(bits, -1)))

    def _singles(self, row: _Row, line: Any) -> None:
        with self.loop(0, self.field[Job.STORED], 2) as at:
            byte = self.load(self.i8, self.sum(row.positions, self.at.ashr(at, self.whole(1))))
            byte = self.at.zext(byte, self.i64)
            for half in range(2):
                place = self.times(self.sum(at, half), 4)
                block = self.load(self.i32, self.sum(self.field[Job.TABLE], place))
                index = self.at.and_(self.at.lshr(byte, self.whole(4 * half)), self.whole(15))
                column = self.sum(self.at.zext(block, self.i64), index)
                self._put(row, self.load(self.f32, self.sum(row.buffer, place)), column, line)

    def _narrowed(self, line: Any, out: Any) -> None:
        """Copy a row of float32 as the tile's dtype."""
        size = 4 if self.kernel.tile == "float32" else 2
        done = self.variable(self.whole(0))
        for lanes in (16, 1):
            kind = self.vector(self.f32, lanes)
            with self.whilst(
                lambda lanes=lanes: self.at.icmp_signed(  # type: ignore[misc]
                    "<=", self.sum(self.get(done), lanes), self.field[Job.COLS]
                )
            ):
                at = self.get(done)
                found = self._rounded(self.load(kind, self.sum(line, self.times(at, 4))))
                self.store(found, self.sum(out, self.times(at, size)))
                self.add(done, lanes)

    def _rounded(self, floats: Any) -> Any:
        lanes = floats.type.count
        if self.kernel.tile == "float16":
            return self.at.fptrunc(floats, self.vector(self.f16, lanes))
        if self.kernel.tile == "float32":
            return floats
        wide = self.vector(self.i32, lanes)
        bits = self.at.bitcast(floats, wide)
        odd = self.at.and_(self.at.lshr(bits, self.constant(wide, 16)), self.constant(wide, 1))
        bits = self.at.add(self.at.add(bits, odd), self.constant(wide, 0x7FFF))
        return self.at.trunc(
            self.at.lshr(bits, self.constant(wide, 16)), self.vector(self.i16, lanes)
        )
