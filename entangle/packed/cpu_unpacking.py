"""Kernels that unpack rows of packed experts, as they are written for `entangle.kernels.native`."""

from typing import Any

from entangle.packed.cpu_rows import Job, Kernel, Part, Row, Writer


def unpacking(kernel: Kernel) -> str:
    """Write the kernel that unpacks rows of one expert (the first of the job's groups)."""
    return _Unpack(kernel).written()


class _Unpack(Writer):
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

    def _expanded(self, row: Row, line: Any) -> None:
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

    def _unit(self, row: Row, group: Any, lanes: int) -> Any:
        return self.splat(self.unit(row, group), lanes) if self.layout.coded else None

    def _scattered(self, row: Row, line: Any) -> None:
        empty = self.constant(self.vector(self.f32, 16), 0.0)
        with self.loop(0, self.field[Job.X_STRIDE], 64) as place:
            self.store(empty, self.sum(line, place))
        walk = self._bits if self.layout.format == "bitmap" else self._singles
        walk(row, line)

    def _put(self, row: Row, value: Any, column: Any, line: Any) -> None:
        """Add a number to its column: places without a value add zero to another's."""
        if self.layout.coded:
            value = self.at.fmul(value, self.unit(row, self.at.lshr(column, self.whole(7))))
        place = self.sum(line, self.times(column, 4))
        self.store(self.at.fadd(self.load(self.f32, place), value), place)

    def _bits(self, row: Row, line: Any) -> None:
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

    def _singles(self, row: Row, line: Any) -> None:
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
