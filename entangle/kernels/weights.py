"""Sums over the rows of a weight, read once in its own dtype, on a CPU.

Partial sums are float32, each row's in one order whatever the threads, and joined in float64.
"""

from enum import IntEnum
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.kernels import native
from entangle.kernels.native import Code

_LANES, _SIDE_BY_SIDE, _ROWS = 16, 4, 16


class _Job(IntEnum):
    """What stands where in a job: addresses, and whole numbers."""

    NEXT = 0
    """The next rows; counted up by the threads."""
    WEIGHT = 1
    STRIDE = 2
    """Bytes from a row to the next."""
    FACTOR = 3
    FOUND = 4
    ROWS = 5
    COLS = 6


def fits(weight: Float[Tensor, "rows columns"]) -> bool:
    """Tell whether these kernels can read a weight."""
    right = weight.device.type == "cpu" and weight.ndim == 2 and weight.stride(1) == 1
    return right and bool(native.forms()) and native.reads(weight.dtype)


def squares(weight: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """Return the sum of the squares of each row, float64."""
    return _run("squares", weight, weight)


def magnitudes(
    weight: Float[Tensor, "rows columns"], factor: Float[Tensor, " columns"]
) -> Float[Tensor, " rows"]:
    """Return the sum of each row's magnitudes times a factor of each column, float64."""
    return _run("magnitudes", weight, factor.float().contiguous())


def _run(name: str, weight: Tensor, factor: Tensor) -> Tensor:
    found = torch.empty(weight.shape[0], dtype=torch.float64)
    stride = weight.stride(0) * weight.element_size()
    job = [0, weight.data_ptr(), stride, factor.data_ptr(), found.data_ptr(), *weight.shape]
    native.run(_kernel(name, weight.dtype, native.forms()[0]), job, torch.get_num_threads())
    return found


@cache
def _kernel(name: str, dtype: torch.dtype, form: str) -> Any:
    return native.compiled(_Sums(name, dtype).written(), name, form)


class _Sums(Code):
    """The kernel of ``squares`` or ``magnitudes``."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.name, self.dtype, self.size = name, dtype, torch.finfo(dtype).bits // 8

    def written(self) -> str:
        """Write it."""
        job = self.at.ptrtoint(self.function.args[0], self.i64)
        self.field = {one: self.load(self.i64, self.sum(job, 8 * one)) for one in _Job}
        rows = self.field[_Job.ROWS]
        with self.shared(job, rows, _ROWS) as start:
            stop = self.sum(start, _ROWS)
            stop = self.at.select(self.at.icmp_signed("<", rows, stop), rows, stop)
            with self.loop(start, stop) as row:
                self._row(row)
        return self.text()

    def _row(self, row: Any) -> None:
        line = self.sum(self.field[_Job.WEIGHT], self.times(row, self.field[_Job.STRIDE]))
        kind = self.vector(self.f32, _LANES)
        places = [self.variable(self.constant(kind, 0.0)) for _ in range(_SIDE_BY_SIDE)]
        rest = self.variable(self.constant(self.vector(self.f32, 1), 0.0))
        at = self.variable(self.whole(0))
        for sums, lanes in ((places, _LANES), (places[:1], _LANES), ([rest], 1)):
            whole = lanes * len(sums)
            last = self.at.sub(self.field[_Job.COLS], self.whole(whole))
            with self.whilst(partial(self._until, at, last)):
                for number, place in enumerate(sums):
                    column = self.sum(self.get(at), number * lanes)
                    self.set(place, self._term(line, column, lanes, self.get(place)))
                self.add(at, whole)
        total = self.constant(self.f64, 0.0)
        for place in (*places, rest):
            value = self.get(place)
            for lane in range(value.type.count):
                one = self.at.extract_element(value, self.i32(lane))
                total = self.at.fadd(total, self.at.fpext(one, self.f64))
        self.store(total, self.sum(self.field[_Job.FOUND], self.times(row, 8)))

    def _until(self, place: Any, last: Any) -> Any:
        return self.at.icmp_signed("<=", self.get(place), last)

    def _term(self, line: Any, column: Any, lanes: int, before: Any) -> Any:
        """Return a sum with the columns from one on."""
        values = self.as_floats(self.sum(line, self.times(column, self.size)), self.dtype, lanes)
        if self.name == "squares":
            return self.fma(values, values, before)
        there = self.sum(self.field[_Job.FACTOR], self.times(column, 4))
        factor = self.load(self.vector(self.f32, lanes), there)
        return self.fma(self.own("fabs", values), factor, before)
