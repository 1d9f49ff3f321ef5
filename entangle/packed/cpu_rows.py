"""What all kernels for packed experts on CPUs share: the job, its sharing, and reading a row.

A row's stored values become float32 numbers (codes minus the code of zero) in a buffer that stays
in the first cache, in the order in which they are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from entangle.kernels.native import Code
from entangle.packed.formats import GROUP, Layout


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
        return {"vbmi2": 16, "avx512": 16, "avx2": 8, "scalar": 1}[self.form]

    @property
    def direct(self) -> bool:
        """Whether numbers are spread as bfloat16, 32 at once: as stored, or exact for codes."""
        narrow = self.layout.coded or self.layout.values == "bfloat16"
        return (
            narrow and self.layout.format == "bitmap" and self.form == "vbmi2" and self.tokens > 0
        )

    @property
    def converts(self) -> bool:
        """Whether a row's values are first written as numbers to the buffer."""
        n16 = self.layout.format == "n16"
        ready = self.width == 16 if n16 else self.direct and not self.layout.coded
        return not (ready and self.tokens)

    @property
    def rows(self) -> int:
        """Rows at once: they share the loads of x."""
        if self.width == 1:
            return 1
        return {1: 4, 2: 2}.get(self.tokens, 1)


class Writer(Code):
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

    def row(self, part: Any, expert: Any, row: Any, buffer: Any) -> "Row":
        """Convert the stored values of a row, and return where everything of it stands."""
        find = {one: self.load(self.i64, self.sum(part, 8 * one)) for one in Part if one < 7}
        at = self.sum(self.times(expert, self.field[Job.ROWS]), row)
        scale = zero = steps = None
        if self.layout.coded:
            scale = self.load(self.f32, self.sum(find[Part.SCALE], self.times(at, 4)))
            zero = self.load(self.i8, self.sum(find[Part.ZERO], at))
            zero = self.at.zext(zero, self.i32)
        if self.layout.grouped:
            fours = self.sum(self.field[Job.COLS], 4 * GROUP - 1)
            groups = self.times(self.at.sdiv(fours, self.whole(4 * GROUP)), 4)
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
        values = self.sum(find[Part.VALUES], values)
        size = self.at.ashr(self.times(count, self.layout.bits), self.whole(3))
        if self.kernel.converts:
            self.numbers(values, count, buffer, zero)
        else:
            buffer = values
        return Row(positions, words, buffer, scale, zero, steps, self.sum(values, size), size)

    def numbers(self, values: Any, count: Any, buffer: Any, zero: Any) -> None:
        """Convert stored values, a multiple of 8, to float32 in a buffer."""
        done = self.variable(self.whole(0))
        few = self.kernel.direct and self.layout.bits == 4
        narrowed = self._looked_up(zero) if few else self._narrowed_codes
        for lanes in (32, 8):
            with self.whilst(
                lambda lanes=lanes: self.at.icmp_signed(  # type: ignore[misc]
                    "<=", self.sum(self.get(done), lanes), count
                )
            ):
                at = self.get(done)
                place = self.at.ashr(self.times(at, self.layout.bits), self.whole(3))
                if self.kernel.direct:
                    found = narrowed(self.sum(values, place), lanes, zero)
                else:
                    found = self.convert(self.sum(values, place), lanes, zero)
                size = 2 if self.kernel.direct else 4
                self.store(found, self.sum(buffer, self.times(at, size)))
                self.add(done, lanes)

    def _narrowed_codes(self, address: Any, lanes: int, zero: Any) -> Any:
        """Load codes and return them as bfloat16 (exact: 8 bits and a sign), as their bits."""
        wide = self.vector(self.i32, lanes)
        found = self.at.bitcast(self.convert(address, lanes, zero), wide)
        found = self.at.lshr(found, self.constant(wide, 16))
        return self.at.trunc(found, self.vector(self.i16, lanes))

    def _looked_up(self, zero: Any) -> Callable[[Any, int, Any], Any]:
        """Return what `_narrowed_codes` does for 4 bits, by a table of the 16 results."""
        short, wide = self.vector(self.i16, 32), self.vector(self.i32, 32)
        codes = self.constant(wide, [*range(16)] * 2)
        table = self.at.sitofp(
            self.at.sub(codes, self.splat(zero, 32)), self.vector(self.f32, 32)
        )  # fmt: skip
        table = self.at.lshr(self.at.bitcast(table, wide), self.constant(wide, 16))
        table = self.at.trunc(table, short)

        def look_up(address: Any, lanes: int, _zero: Any) -> Any:
            pairs = self.vector(self.i32, lanes // 2)
            found = self.load(self.vector(self.i8, lanes // 2), address)
            found = self.at.zext(found, pairs)
            found = self.at.or_(found, self.at.shl(found, self.constant(pairs, 12)))
            found = self.at.and_(found, self.constant(pairs, 0x000F000F))
            found = self.at.bitcast(found, self.vector(self.i16, lanes))
            all_lanes = self.constant(wide, [*range(32)] if lanes == 32 else [*range(8)] * 4)
            found = self.at.shuffle_vector(found, found, all_lanes)
            found = self.call("llvm.x86.avx512.permvar.hi.512", short, table, found)
            some = self.constant(self.vector(self.i32, lanes), [*range(lanes)])
            return self.at.shuffle_vector(found, found, some)

        return look_up

    def convert(self, address: Any, lanes: int, zero: Any) -> Any:
        """Load stored values and return them as float32."""
        if self.layout.bits == 4:
            return self.widened(self.load(self.vector(self.i8, lanes // 2), address), zero)
        return self.widened(self.load(self.vector(self.stored, lanes), address), zero)

    @property
    def stored(self) -> Any:
        """The type of stored values; of 4 bits, two at once."""
        return {32: self.f32, 16: self.i16}.get(self.layout.bits, self.i8)

    def widened(self, found: Any, zero: Any) -> Any:
        """Return stored values, a vector of the type `stored`, as float32."""
        lanes = found.type.count * (2 if self.layout.bits == 4 else 1)
        kind, wide = self.layout.values, self.vector(self.i32, lanes)
        floats = self.vector(self.f32, lanes)
        if kind == "float32":
            return found
        if kind == "float16":
            return self.half(found)
        if kind == "bfloat16":
            found = self.at.zext(found, wide)
            return self.at.bitcast(self.at.shl(found, self.constant(wide, 16)), floats)
        found = self.at.zext(found, wide) if kind == "int8" else self.nibbles(found)
        return self.at.sitofp(self.at.sub(found, self.splat(zero, lanes)), floats)

    def half(self, found: Any) -> Any:
        """Return finite numbers of float16, whose bits are given, as float32.

        A processor without the instruction moves the bits; 2**112 makes up for the exponents.
        """
        lanes = found.type.count
        floats, wide = self.vector(self.f32, lanes), self.vector(self.i32, lanes)
        if self.kernel.form != "scalar":
            return self.at.fpext(self.at.bitcast(found, self.vector(self.f16, lanes)), floats)
        bits = self.at.zext(found, wide)
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

    def unit(self, row: "Row", group: Any) -> Any:
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
        if self.kernel.width == 16:
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
        """The type of one bit."""
        from llvmlite import ir

        return ir.IntType(1)


@dataclass
class Row:
    """Where a row's tensors and numbers stand."""

    positions: Any
    words: Any
    buffer: Any
    scale: Any
    zero: Any
    steps: Any
    end: Any
    """Address behind the row's stored values, where the next row's are."""
    size: Any
    """Bytes of the row's stored values."""
