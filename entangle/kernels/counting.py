"""What sketches count of outputs and of pairs of outputs, on a CPU.

The plain versions are in `entangle.stats.sketch` and `entangle.stats.mapping_difficulty`; counts
are the same to the bit. Sums are float64, a neuron's token after token, whatever the threads.
"""

from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entangle.kernels import native
from entangle.kernels.native import Code

_LANES = 16


class Bins(NamedTuple):
    """How a float32 number x becomes a bin: bits of 1 + |x|, shifted right, less those of 1."""

    shift: int
    one: int


def fits(outputs: Float[Tensor, "tokens neurons"], *_others: object) -> bool:
    """Tell whether these kernels can count outputs."""
    return outputs.device.type == "cpu" and bool(native.forms())


def _readable(outputs: Tensor) -> Tensor:
    """Return outputs as the kernels read them: of a dtype they know, a token's side by side."""
    known = outputs if native.reads(outputs.dtype) else outputs.float()
    return known if known.stride(1) == 1 else known.contiguous()


class _Job(IntEnum):
    """What stands where in a job: addresses, and whole numbers."""

    NEXT = 0
    """The next neurons; counted up by the threads."""
    FIRST = 1
    """Outputs; of pairs, those at the one token."""
    FIRST_STRIDE = 2
    """Bytes from a token to the next."""
    SECOND = 3
    SECOND_STRIDE = 4
    """Of pairs: likewise, those at the other token."""
    TOKENS = 5
    NEURONS = 6
    BINS = 7
    COUNTS = 8
    SCALE = 9
    HIGH = 10
    SUMS = 11
    LOCATION = 12
    LOW = 13
    NAN = 14
    INF = 15
    FACTOR = 16
    """Of pairs: one over the distance of the inputs of each."""


def add_outputs(
    outputs: Float[Tensor, "tokens neurons"],
    location: Float[Tensor, " neurons"],
    scale: Float[Tensor, " neurons"],
    *,
    bins: Bins,
    counts: Int[Tensor, "neurons bins"],
    low: Float[Tensor, " neurons"],
    high: Float[Tensor, " neurons"],
    nan: Bool[Tensor, " neurons"],
    inf: Bool[Tensor, " neurons"],
) -> Float[Tensor, "four=4 neurons"]:
    """Add outputs to the state of a sketch, and return the sums of their first four powers.

    Parameters
    ----------
    outputs
        As `fits` wants them.
    location, scale, counts, low, high, nan, inf
        As of `entangle.kernels.sketch.add_outputs`; what is changed must be contiguous.
    bins
        How numbers become bins; the middle one begins at 0.
    """
    outputs = _readable(outputs)
    sums = torch.empty(4, outputs.shape[1], dtype=torch.float64)
    location, scale = location.contiguous(), scale.contiguous()
    _run(
        _outputs(outputs.dtype, bins, counts.shape[1], native.forms()[0]), outputs, outputs,
        {_Job.COUNTS: counts, _Job.SCALE: scale, _Job.HIGH: high, _Job.SUMS: sums,
         _Job.LOCATION: location, _Job.LOW: low, _Job.NAN: nan, _Job.INF: inf},
        bins=counts.shape[1],
    )  # fmt: skip
    return sums


def add_pairs(
    first: Float[Tensor, "pairs neurons"],
    second: Float[Tensor, "pairs neurons"],
    factor: Float[Tensor, " pairs"],
    scale: Float[Tensor, " neurons"],
    *,
    bins: Bins,
    counts: Int[Tensor, "neurons bins"],
    highest: Float[Tensor, " neurons"],
) -> Float[Tensor, "two=2 neurons"]:
    """Add pairs to the state of a sketch; return the sums of d · ``factor`` and of d.

    Parameters
    ----------
    first, second
        Outputs at both tokens of each pair, as `fits` wants them, of one dtype. d is the absolute
        difference.
    factor
        float32.
    scale, counts, highest
        As of `entangle.kernels.sketch.add_pairs`; what is changed must be contiguous.
    bins
        How numbers become bins.
    """
    first, second = _readable(first), _readable(second)
    sums = torch.empty(2, first.shape[1], dtype=torch.float64)
    scale, factor = scale.contiguous(), factor.contiguous()
    _run(
        _pairs(first.dtype, bins, counts.shape[1], native.forms()[0]), first, second,
        {_Job.COUNTS: counts, _Job.SCALE: scale, _Job.HIGH: highest, _Job.SUMS: sums,
         _Job.FACTOR: factor},
        bins=counts.shape[1],
    )  # fmt: skip
    return sums


def _run(
    kernel: Any, first: Tensor, second: Tensor, others: dict[_Job, Tensor], *, bins: int
) -> None:
    job, size = [0] * len(_Job), first.element_size()
    job[_Job.FIRST : _Job.BINS + 1] = [
        first.data_ptr(), first.stride(0) * size, second.data_ptr(), second.stride(0) * size,
        *first.shape, bins,
    ]  # fmt: skip
    for place, tensor in others.items():
        job[place] = tensor.data_ptr()
    native.run(kernel, job, torch.get_num_threads())


@cache
def _outputs(dtype: torch.dtype, bins: Bins, n_bins: int, form: str) -> Any:
    return native.compiled(_Outputs("outputs", dtype, bins, n_bins).written(), "outputs", form)


@cache
def _pairs(dtype: torch.dtype, bins: Bins, n_bins: int, form: str) -> Any:
    return native.compiled(_Pairs("pairs", dtype, bins, n_bins).written(), "pairs", form)


class _Counting(Code):
    """A kernel that goes over the tokens of some neurons."""

    lanes: int
    """Neurons side by side."""

    def __init__(self, name: str, dtype: torch.dtype, bins: Bins, n_bins: int) -> None:
        super().__init__(name)
        self.dtype, self.bins, self.n_bins = dtype, bins, n_bins
        self.size = torch.finfo(dtype).bits // 8

    def written(self) -> str:
        """Write it."""
        job = self.at.ptrtoint(self.function.args[0], self.i64)
        self.field = {one: self.load(self.i64, self.sum(job, 8 * one)) for one in _Job}
        neurons = self.field[_Job.NEURONS]
        with self.shared(job, neurons, 4 * _LANES) as start:
            stop = self.sum(start, 4 * _LANES)
            fewer = self.at.icmp_signed("<", neurons, stop)
            stop = self.at.select(fewer, neurons, stop)
            at = self.variable(start)
            for self.lanes in (_LANES, 1):
                with self.whilst(
                    lambda: self.at.icmp_signed("<=", self.sum(self.get(at), self.lanes), stop)
                ):
                    self._neurons(self.get(at))
                    self.add(at, self.lanes)
        return self.text()

    def _neurons(self, neuron: Any) -> None:
        raise NotImplementedError

    def _at(self, field: _Job, neuron: Any, size: int = 4) -> Any:
        return self.sum(self.field[field], self.times(neuron, size))

    def _own_floats(self, field: _Job, neuron: Any) -> Any:
        return self.load(self.vector(self.f32, self.lanes), self._at(field, neuron))

    def _values(self, field: _Job, stride: _Job, token: Any, neuron: Any) -> Any:
        line = self.sum(self.field[field], self.times(token, self.field[stride]))
        return self.as_floats(self.sum(line, self.times(neuron, self.size)), self.dtype, self.lanes)

    def _number(self, value: float, kind: Any = None) -> Any:
        return self.constant(self.vector(kind or self.f32, self.lanes), value)

    def _accumulators(self, count: int) -> list[Any]:
        return [self.variable(self._number(0.0, self.f64)) for _ in range(count)]

    def _magnitude(self, x: Any, most: int) -> Any:
        """Return the bin of each magnitude, at most the last one."""
        kind = self.vector(self.i32, self.lanes)
        bits = self.at.bitcast(self.at.fadd(x, self._number(1.0)), kind)
        bits = self.at.ashr(bits, self.constant(kind, self.bins.shift))
        bits = self.at.sub(bits, self.constant(kind, self.bins.one))
        last = self.constant(kind, most)
        return self.at.select(self.at.icmp_signed("<", bits, last), bits, last)

    def _count(self, neuron: Any, index: Any) -> None:
        for lane in range(self.lanes):
            own = self.at.zext(self.at.extract_element(index, self.i32(lane)), self.i64)
            line = self.times(self.sum(neuron, lane), self.n_bins)
            place = self.sum(self.field[_Job.COUNTS], self.times(self.sum(line, own), 4))
            more = self.at.add(self.load(self.i32, place), self.constant(self.i32, 1))
            self.store(more, place)

    def _keep(self, sums: list[Any], neuron: Any) -> None:
        line = self.times(self.field[_Job.NEURONS], 8)
        for number, place in enumerate(sums):
            there = self.sum(self._at(_Job.SUMS, neuron, 8), self.times(line, number))
            self.store(self.get(place), there)


class _Outputs(_Counting):
    def _neurons(self, neuron: Any) -> None:
        location, scale = (self._own_floats(one, neuron) for one in (_Job.LOCATION, _Job.SCALE))
        low, high = (self.variable(self._own_floats(one, neuron)) for one in (_Job.LOW, _Job.HIGH))
        odd = self.vector(self.i32, self.lanes)
        nan, inf = (self.variable(self.constant(odd, 0)) for _ in range(2))
        sums = self._accumulators(4)
        with self.loop(0, self.field[_Job.TOKENS]) as token:
            y = self._values(_Job.FIRST, _Job.FIRST_STRIDE, token, neuron)
            x = self.at.fdiv(self.at.fsub(y, location), scale)
            x = self._finite(x, nan, inf)
            self._powers(x, sums)
            self.set(low, self.smaller(self.get(low), x))
            self.set(high, self.larger(self.get(high), x))
            self._count(neuron, self._signed(x))
        self._keep(sums, neuron)
        self.store(self.get(low), self._at(_Job.LOW, neuron))
        self.store(self.get(high), self._at(_Job.HIGH, neuron))
        for place, field in ((nan, _Job.NAN), (inf, _Job.INF)):
            byte, there = self.vector(self.i8, self.lanes), self._at(field, neuron, 1)
            bits = self.at.trunc(self.get(place), byte)
            self.store(self.at.or_(self.load(byte, there), bits), there)

    def _finite(self, x: Any, nan: Any, inf: Any) -> Any:
        """Return x, 0 where it is not finite, which is noted."""
        kind = self.vector(self.i32, self.lanes)
        size = self.own("fabs", x)
        is_nan = self.at.fcmp_unordered("uno", x, x)
        is_inf = self.at.fcmp_ordered("==", size, self._number(float("inf")))
        for place, here in ((nan, is_nan), (inf, is_inf)):
            self.set(place, self.at.or_(self.get(place), self.at.zext(here, kind)))
        good = self.at.fcmp_ordered("<", size, self._number(float("inf")))
        return self.at.select(good, x, self._number(0.0))

    def _powers(self, x: Any, sums: list[Any]) -> None:
        wide = self.at.fpext(x, self.vector(self.f64, self.lanes))
        square = self.at.fmul(wide, wide)
        first, second, third, fourth = sums
        self.set(first, self.at.fadd(self.get(first), wide))
        self.set(second, self.at.fadd(self.get(second), square))
        self.set(third, self.fma(square, wide, self.get(third)))
        self.set(fourth, self.fma(square, square, self.get(fourth)))

    def _signed(self, x: Any) -> Any:
        kind, half = self.vector(self.i32, self.lanes), self.n_bins // 2
        index = self._magnitude(self.own("fabs", x), half - 1)
        sign = self.at.bitcast(self.at.fadd(x, self._number(0.0)), kind)  # 0 of −0.0
        sign = self.at.ashr(sign, self.constant(kind, 31))
        return self.at.add(self.at.xor(index, sign), self.constant(kind, half))


class _Pairs(_Counting):
    def _neurons(self, neuron: Any) -> None:
        scale = self._own_floats(_Job.SCALE, neuron)
        most = self.variable(self._own_floats(_Job.HIGH, neuron))
        sums = self._accumulators(2)
        wide = self.vector(self.f64, self.lanes)
        with self.loop(0, self.field[_Job.TOKENS]) as pair:
            first = self._values(_Job.FIRST, _Job.FIRST_STRIDE, pair, neuron)
            second = self._values(_Job.SECOND, _Job.SECOND_STRIDE, pair, neuron)
            d = self.own("fabs", self.at.fsub(first, second))
            factor = self.splat(self.load(self.f32, self._at(_Job.FACTOR, pair)), self.lanes)
            slope, total = sums
            self.set(
                slope, self.at.fadd(self.get(slope), self.at.fpext(self.at.fmul(d, factor), wide))
            )
            self.set(total, self.at.fadd(self.get(total), self.at.fpext(d, wide)))
            self.set(most, self.own("maximum", self.get(most), d))  # NaN where one is
            self._count(neuron, self._magnitude(self.at.fdiv(d, scale), self.n_bins - 1))
        self._keep(sums, neuron)
        self.store(self.get(most), self._at(_Job.HIGH, neuron))
