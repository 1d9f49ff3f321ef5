"""Kernels that multiply packed experts, as they are written for `entangle.kernels.native`.

The numbers of a row meet the x of their columns:

* ``bitmap``: the numbers spread to the columns whose bits are set, by AVX-512's expanding load (32
  of bfloat16 at once, else 16), by a permutation from a table of 256 (AVX2: 8), or one by one;
* ``n16``: x comes to the numbers. 16 neighbours of a lane's stream cover few blocks, always the
  same ones; each block of x, one register, is permuted by the positions and taken where the number
  is that block's (AVX-512), or x is gathered.

Threads take the next rows by a counter; every row is summed by one thread in one order.
"""

import math
from collections.abc import Callable
from typing import Any

from entangle.packed.cpu_rows import Job, Kernel, Part, Row, Writer
from entangle.packed.formats import BLOCK, GROUP

Terms = list[tuple[list[Any], Callable[[int, int], Any]]]
"""Vectors of numbers, one a row, and the x of (row, token) to them."""
Use = Callable[[Terms, list[Any]], None]
"""Of some terms and, where their sum is to be multiplied, by what (a vector for each row)."""


def product(kernel: Kernel) -> str:
    """Write the kernel that multiplies rows by the tokens of one expert, `Kernel.tokens` of them.

    A group in the job is the expert and that many tokens (one may stand there more than once).
    """
    return _Product(kernel).written()


class _Product(Writer):
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
            if self.kernel.direct:
                x = [self._halved(one, t) for t, one in enumerate(x)]
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

        def use(terms: Terms, factors: list[Any]) -> None:
            for r in range(len(rows)):
                for t in range(len(x)):
                    part = None
                    for turn, (values, other) in enumerate(terms):
                        place = sums[r][t][turn % 2]
                        if not factors:
                            self.set(place, self.fma(values[r], other(r, t), self.get(place)))
                        elif part is None:
                            part = self.at.fmul(values[r], other(r, t))
                        else:
                            part = self.fma(values[r], other(r, t), part)
                    if factors:
                        place = sums[r][t][0]
                        self.set(place, self.fma(part, factors[r], self.get(place)))

        self._walk(rows, x, use)
        for row, at, found in zip(rows, numbers, sums, strict=True):
            for t, (one, two) in enumerate(found):
                total = self.total(self.at.fadd(self.get(one), self.get(two)))
                if self.layout.coded and not self.layout.grouped:
                    total = self.at.fmul(total, row.scale)
                total = self.at.fadd(total, finite[t])
                self.store(total, self.sum(out[t], self.times(at, 4)))

    def _walk(self, rows: list[Row], x: list[Any], use: Use) -> None:
        ways = {
            ("bitmap", 16): self._pairs if self.kernel.direct else self._words,
            ("bitmap", 8): self._words, ("bitmap", 1): self._bits,
            ("n16", 16): self._streams, ("n16", 8): self._gathers, ("n16", 1): self._singles,
        }  # fmt: skip
        ways[self.layout.format, self.kernel.width](rows, x, use)

    def _halved(self, x: Any, number: int) -> Any:
        """Copy x with the even ones of 32 columns before the odd ones, and return where."""
        behind = self.times(self.field[Job.BUFFER], self.kernel.rows)
        line = self.sum(self.scratch, behind, self.times(self.field[Job.X_STRIDE], number))
        with self.loop(0, self.field[Job.X_STRIDE], 128) as place:
            found = self.load(self.vector(self.f32, 32), self.sum(x, place))
            for odd in range(2):
                which = self.constant(self.vector(self.i32, 16), [*range(odd, 32, 2)])
                half = self.at.shuffle_vector(found, found, which)
                self.store(half, self.sum(line, place, 64 * odd))
        return line

    def _pairs(self, rows: list[Row], x: list[Any], use: Use) -> None:
        """Walk over the words of a bitmap whose values of 16 bits are spread 32 at once.

        The even columns stand in the lower halves of 16 numbers of 32 bits, the odd in the upper.
        """
        places = [self.variable(row.buffer) for row in rows]
        short, wide = self.vector(self.i16, 32), self.vector(self.i32, 16)
        with self.loop(0, rows[0].words) as word:
            self._ahead(rows, word)
            bits = [self.load(self.i64, self.sum(r.positions, self.times(word, 8))) for r in rows]
            terms: Terms = []
            for turn in range(2):
                evens, odds = [], []
                for r in range(len(rows)):
                    mine = self.at.trunc(self.at.lshr(bits[r], self.whole(32 * turn)), self.i32)
                    mask = self.at.bitcast(mine, self.vector(self.i1, 32))
                    found = self.call(
                        "llvm.masked.expandload.v32i16", short, self.pointer(self.get(places[r])),
                        mask, self.constant(short, 0),
                    )  # fmt: skip
                    count = self.at.zext(self.call("llvm.ctpop.i32", self.i32, mine), self.i64)
                    self.add(places[r], self.times(count, 2))
                    found = self.at.bitcast(found, wide)
                    even = self.at.shl(found, self.constant(wide, 16))
                    odd = self.at.and_(found, self.constant(wide, 0xFFFF0000))
                    evens.append(self.at.bitcast(even, self.floats))
                    odds.append(self.at.bitcast(odd, self.floats))
                at = self.sum(self.times(word, 256), 128 * turn)
                terms += [(evens, self._at(x, at)), (odds, self._at(x, self.sum(at, 64)))]
            use(terms, self._factors(rows, word))

    def _at(self, x: list[Any], place: Any) -> Callable[[int, int], Any]:
        """Load x once for all rows."""
        found = [self.load(self.floats, self.sum(one, place)) for one in x]
        return lambda _row, token: found[token]

    def _factors(self, rows: list[Row], word: Any) -> list[Any]:
        """Return the units of a word's columns, where groups of columns have their own."""
        group = self.at.ashr(word, self.whole(1))
        width = self.kernel.width
        return [self.splat(self.unit(r, group), width) for r in rows if r.steps is not None]

    def _ahead(self, rows: list[Row], turn: Any) -> None:
        """Fetch the next rows' share of the values into the cache, in every turn as much."""
        self._fetch(rows[-1].end, len(rows), rows[0].size, turn, rows[0].words)

    def _fetch(self, start: Any, rows: int, size: Any, turn: Any, turns: Any) -> None:
        count = max(1, rows * self.layout.bits // 16)
        share = self.at.sdiv(self.times(size, rows), self.times(turns, count))
        for number in range(count):
            place = self.times(self.sum(self.times(turn, count), number), share)
            self.call(
                "llvm.prefetch.p0", self.void, self.pointer(self.sum(start, place)),
                self.constant(self.i32, 0), self.constant(self.i32, 3), self.constant(self.i32, 1),
            )  # fmt: skip

    def _words(self, rows: list[Row], x: list[Any], use: Use) -> None:
        """Walk over the words of a bitmap, a vector of columns at a time."""
        width = self.kernel.width
        places = [self.variable(row.buffer) for row in rows]
        with self.loop(0, rows[0].words) as word:
            self._ahead(rows, word)
            bits = [self.load(self.i64, self.sum(r.positions, self.times(word, 8))) for r in rows]
            terms: Terms = []
            for turn in range(64 // width):
                values = []
                for r in range(len(rows)):
                    mine = self.at.lshr(bits[r], self.whole(width * turn))
                    mine = self.at.and_(mine, self.whole(2**width - 1))
                    values.append(self.expand(self.get(places[r]), mine))
                    self.add(places[r], self.times(self.call("llvm.ctpop.i64", self.i64, mine), 4))
                at = self.sum(self.times(word, 256), 4 * width * turn)
                terms.append((values, self._at(x, at)))
            use(terms, self._factors(rows, word))

    def _bits(self, rows: list[Row], x: list[Any], use: Use) -> None:
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
                use([([value], self._at(x, at))], [])
                self.add(place, 4)
                self.set(left, self.at.and_(bits, self.sum(bits, -1)))

    def _singles(self, rows: list[Row], x: list[Any], use: Use) -> None:
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
                use([([value], self._at(x, column))], [])

    def _units(self, row: Row, number: int) -> Any:
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

    def _gathers(self, rows: list[Row], x: list[Any], use: Use) -> None:
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
            use([(values, lambda r, t: self._gather(x[t], columns[r]))], [])

    def _gather(self, base: Any, index: Any) -> Any:
        zero = self.constant(self.floats, 0.0)
        all_of_them = self.at.bitcast(self.constant(self.vector(self.i32, 8), -1), self.floats)
        return self.call(
            "llvm.x86.avx2.gather.d.ps.256", self.floats, zero, self.pointer(base), index,
            all_of_them, self.constant(self.i8, 4),
        )  # fmt: skip

    def _streams(self, rows: list[Row], x: list[Any], use: Use) -> None:
        """Walk over the lanes of ``n16``, 16 numbers of a lane's stream at a time."""
        lanes, kept = self.layout.lanes, self.layout.kept
        units = [self._units(row, n) for n, row in enumerate(rows) if row.steps is not None]
        streams = math.ceil(lanes.rounds * kept / 16)
        for number in range(streams):
            owners = [
                min(t // kept, lanes.rounds - 1) for t in range(16 * number, 16 * number + 16)
            ]
            masks = {
                one: self.constant(self.vector(self.i1, 16), [int(o == one) for o in owners])
                for one in dict.fromkeys(owners)
            }
            with self.loop(0, lanes.lanes) as lane:
                turn = self.sum(lane, number * lanes.lanes)
                turns = self.whole(streams * lanes.lanes)
                half = self.at.ashr(rows[0].words, self.whole(1))
                self._fetch(rows[-1].end, len(rows), rows[0].size, turn, turns)
                self._fetch(self.sum(rows[-1].positions, half), len(rows), half, turn, turns)
                values, index = [], []
                for r in rows:
                    stored = self._neighbours(r.buffer, number, lane, self.layout.bits, r.zero)
                    values.append(self.widened(stored, r.zero))
                    packed = self._neighbours(r.positions, number, lane, 4)
                    index.append(self.nibbles(packed, clean=False))
                blocks = {one: self.sum(lane, lanes.lanes * one) for one in masks}
                if units:
                    for n, place in enumerate(units):
                        values[n] = self.at.fmul(values[n], self._unit_of(place, blocks, masks))
                found = self._permuted(x, index, blocks, masks)
                use([(values, lambda r, t, found=found: found[r][t])], [])  # type: ignore[misc]

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

    def _neighbours(self, base: Any, number: int, lane: Any, bits: int, zero: Any = None) -> Any:
        """Load 16 neighbours of a lane's stream, of some bits each (4: two in 8 bits).

        They stand in pieces of `Lanes.chunk`; behind the last step are zeros (or their code).
        """
        lanes = self.layout.lanes
        size = min(lanes.chunk, 16)
        kind = {32: self.f32, 16: self.i16}.get(bits, self.i8)
        kinds = self.vector(kind, size // 2 if bits == 4 else size)
        empty = self.constant(kinds, 0)
        if zero is not None:
            code = self.at.mul(zero, self.constant(self.i32, 17 if bits == 4 else 1))
            empty = self.splat(self.at.trunc(code, self.i8), kinds.count)
        pieces = []
        for first in range(16 * number, 16 * number + 16, size):
            step, rest = divmod(first, lanes.chunk)
            at = self.sum(self.times(self.sum(lane, lanes.lanes * step), lanes.chunk), rest)
            place = self.sum(base, self.at.lshr(self.times(at, bits), self.whole(3)))
            pieces.append(self.load(kinds, place) if step < lanes.steps else empty)
        while len(pieces) > 1:
            order = self.vector(self.i32, 2 * pieces[0].type.count)
            order = self.constant(order, [*range(order.count)])
            pieces = [
                self.at.shuffle_vector(one, two, order)
                for one, two in zip(pieces[::2], pieces[1::2], strict=True)
            ]
        return pieces[0]
