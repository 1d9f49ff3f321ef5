"""Distances of binned distributions from N(0, 1), on a CPU.

The plain version is `entangle.stats.bins.binned_distances`, which says what is measured. Here Φ,
its density φ and its integral come from a table by Taylor's series, to 1e-15, eight edges at a
time; a row's sums depend on nothing that lies beside it.
"""

import math
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtr
from torch import Tensor

from entangle.kernels import native
from entangle.kernels.native import Code

_LANES = 8
_PER_UNIT, _REACH = 64, 8.5
"""Points of the table from one σ to the next, and σ beyond which Φ is 0 or 1 to 1e-16."""
_STEEPEST = math.exp(-0.5) / math.sqrt(2 * math.pi) / 12  # max|Φ''| / 12
_LEAST = 1e-300
NOTHING = 1e-12
"""A gap between F and Φ up to which they are equal: a sign that rounding made is no crossing."""


class _Job(IntEnum):
    """What stands where in a job: addresses, and whole numbers."""

    SHIFT = 0
    SPREAD = 1
    LOW = 2
    HIGH = 3
    EDGES = 4
    COUNTS = 5
    WEIGHTS = 6
    ENDS = 7
    TABLE = 8
    FOUND = 9
    WORK = 10
    """Room for `_WORK` rows of so many edges, float64."""
    ROOM = 11
    """Bytes of such a row."""
    ROWS = 12
    SETS = 13
    GROUPS = 14
    BINS = 15


_WORK = 6
"""Counts, then at every edge F, z, Φ, the integral of Φ, and F − Φ."""


def fits(counts: Int[Tensor, "groups rows bins"], *_others: object, **_settings: object) -> bool:
    """Tell whether `binned_distances` takes these counts; same arguments."""
    return (
        counts.device.type == "cpu"
        and counts.dtype == torch.int32
        and counts.shape[-1] % _LANES == 0
        and bool(native.forms())
    )


def binned_distances(
    counts: Int[Tensor, "groups rows bins"],
    weights: Int[Tensor, "sets groups"],
    *,
    shift: Float[Tensor, "sets rows"],
    spread: Float[Tensor, "sets rows"],
    low: Float[Tensor, " rows"],
    high: Float[Tensor, " rows"],
    edges: Float[Tensor, " edges"],
    ends: Int[Tensor, "two=2 rows"],
) -> Float[Tensor, "three=3 sets rows"]:
    """Return WD, its bound and KS of several sets of groups, float64, by one thread.

    Parameters
    ----------
    counts, weights, shift, spread, low, high, edges
        As of `entangle.kernels.exact.fused_binned_distances`.
    ends
        The bins of each row's smallest and largest value.
    """
    (groups, rows, bins), sets = counts.shape, weights.shape[0]
    wide = torch.full((bins + 1 + _LANES,), math.inf, dtype=torch.float64)
    wide[0], wide[1:bins] = -math.inf, edges[1:-1]  # the outermost bins are open
    found = torch.empty(3, sets, rows, dtype=torch.float64)
    room = 8 * (bins + 1 + _LANES)
    given = [shift.double(), spread.double(), low.double(), high.double(), wide]
    whole = [counts, weights.to(torch.int32), ends.to(torch.int64)]
    work = torch.empty(_WORK * room, dtype=torch.uint8)
    held = [tensor.contiguous() for tensor in (*given, *whole, _table(), found, work)]
    job = [*(tensor.data_ptr() for tensor in held), room, rows, sets, groups, bins]
    native.run(_kernel(native.forms()[0]), job, 1)
    return found


@cache
def _table() -> Float[Tensor, "points two=2"]:
    """Return Φ and φ at the points."""
    z = np.arange(-int(_REACH * _PER_UNIT), int(_REACH * _PER_UNIT) + 1) / _PER_UNIT
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return torch.from_numpy(np.column_stack([ndtr(z), density]))


@cache
def _kernel(form: str) -> Any:
    return native.compiled(_Distances("binned_distances").written(), "binned_distances", form)


class _Distances(Code):
    """The kernel; addresses of a row's numbers are of its first edge."""

    def written(self) -> str:
        """Write it."""
        self.wide = self.vector(self.f64, _LANES)
        job = self.at.ptrtoint(self.function.args[0], self.i64)
        self.field = {one: self.load(self.i64, self.sum(job, 8 * one)) for one in _Job}
        rows = self.field[_Job.ROWS]
        with self.loop(0, rows) as row, self.loop(0, self.field[_Job.SETS]) as set_:
            self._row(row, set_, self.sum(self.times(set_, rows), row))
        return self.text()

    def _row(self, row: Any, set_: Any, place: Any) -> None:
        """Measure one row of one set of groups."""
        ends, rows = self.field[_Job.ENDS], self.field[_Job.ROWS]
        first = self.load(self.i64, self.sum(ends, self.times(row, 8)))
        last = self.load(self.i64, self.sum(ends, self.times(self.sum(rows, row), 8)))
        first = self.at.and_(first, self.whole(-_LANES))
        size = self.at.and_(self.sum(last, _LANES), self.whole(-_LANES))
        size = self.at.sub(size, first)  # bins to look at, whole vectors of them
        room, work = self.field[_Job.ROOM], self.field[_Job.WORK]
        mass, up_to, z, normal, area, gap = (
            self.sum(work, self.times(room, i)) for i in range(_WORK)
        )
        self._sum_groups(row, set_, first, size, mass)
        share = self._distribution(mass, up_to, size)
        ks = self._edges(row, place, first, size, (up_to, z, normal, area, gap), share)
        found, bound = self._bins(size, (mass, up_to, z, normal, area, gap), share)
        end = self.times(size, 8)
        left, right = (self.load(self.f64, self.sum(area, at)) for at in (self.whole(0), end))
        right = self.at.fsub(right, self.load(self.f64, self.sum(z, end)))
        found = self.at.fadd(self._in_order(found), self.at.fadd(left, right))
        step = self.times(self.times(self.field[_Job.SETS], rows), 8)
        out = self.sum(self.field[_Job.FOUND], self.times(place, 8))
        for number, value in enumerate((found, self._in_order(bound), self._largest(ks))):
            self.store(value, self.sum(out, self.times(step, number)))

    def _sum_groups(self, row: Any, set_: Any, first: Any, size: Any, mass: Any) -> None:
        """Write the counts of the groups of a set, int32."""
        groups, bins = self.field[_Job.GROUPS], self.field[_Job.BINS]
        kind, end = self.vector(self.i32, _LANES), self.times(size, 4)
        with self.loop(0, end, 4 * _LANES) as at:
            self.store(self.constant(kind, 0), self.sum(mass, at))
        with self.loop(0, groups) as group:
            at = self.sum(self.times(set_, groups), group)
            weight = self.load(self.i32, self.sum(self.field[_Job.WEIGHTS], self.times(at, 4)))
            with self.at.if_then(self.at.icmp_signed("!=", weight, self.constant(self.i32, 0))):
                factor = self.splat(weight, _LANES)
                line = self.sum(self.times(group, self.field[_Job.ROWS]), row)
                line = self.times(self.sum(self.times(line, bins), first), 4)
                line = self.sum(self.field[_Job.COUNTS], line)
                with self.loop(0, end, 4 * _LANES) as at:
                    own = self.at.mul(factor, self.load(kind, self.sum(line, at)))
                    there = self.sum(mass, at)
                    self.store(self.at.add(own, self.load(kind, there)), there)

    def _distribution(self, mass: Any, up_to: Any, size: Any) -> Any:
        """Write how many counts are left of every edge, int32; return one count's share."""
        all_ = self.variable(self.constant(self.i32, 0))
        with self.loop(0, self.times(size, 4), 4) as at:
            self.store(self.get(all_), self.sum(up_to, at))
            own = self.load(self.i32, self.sum(mass, at))
            self.set(all_, self.at.add(self.get(all_), own))
        after = self.splat(self.get(all_), _LANES)
        self.store(after, self.sum(up_to, self.times(size, 4)))
        total = self.at.sitofp(self.get(all_), self.f64)
        return self.splat(self.at.fdiv(self.constant(self.f64, 1.0), total), _LANES)

    def _edges(
        self, row: Any, place: Any, first: Any, size: Any, lines: tuple[Any, ...], share: Any
    ) -> Any:
        """Write z, Φ, its integral and F − Φ at all edges; return the largest of |F − Φ|."""
        up_to, *others = lines
        low, high, shift, spread = (
            self.splat(self.load(self.f64, self.sum(self.field[one], self.times(at, 8))), _LANES)
            for one, at in (
                (_Job.LOW, row), (_Job.HIGH, row), (_Job.SHIFT, place), (_Job.SPREAD, place),
            )
        )  # fmt: skip
        per_unit = self.at.fdiv(self._number(1.0), spread)
        edges = self.sum(self.field[_Job.EDGES], self.times(first, 8))
        most = self.variable(self.constant(self.wide, 0.0))
        with self.loop(0, self.sum(size, 1), _LANES) as number:
            at = self.times(number, 8)
            edge = self.smaller(self.larger(self.load(self.wide, self.sum(edges, at)), low), high)
            z = self.at.fmul(self.at.fsub(edge, shift), per_unit)
            normal, area = self._normal(z)
            gap = self.at.fsub(self._shares(up_to, number, share), normal)
            for line, value in zip(others, (z, normal, area, gap), strict=True):
                self.store(value, self.sum(line, at))
            self.set(most, self.larger(self.get(most), self.own("fabs", gap)))
        return most

    def _bins(self, size: Any, lines: tuple[Any, ...], share: Any) -> tuple[Any, Any]:
        """Return sums, lane by lane, over the bins: of |F − Φ|, and of its largest error."""
        mass, up_to, *edged = lines
        number = self._number
        found, bound = (self.variable(number(0.0)) for _ in range(2))
        with self.loop(0, size, _LANES) as at:
            (z, upper), (low, high), (before, after), (left, right) = (
                (self.load(self.wide, self.sum(line, self.times(at, 8))),
                 self.load(self.wide, self.sum(line, self.times(at, 8), 8)))
                for line in edged
            )  # fmt: skip
            half = self.at.fmul(self._shares(mass, at, share), number(0.5))
            width = self.at.fsub(upper, z)
            height = self.at.fadd(self._shares(up_to, at, share), half)
            area = self.at.fsub(self.at.fmul(height, width), self.at.fsub(after, before))
            area = self.own("fabs", area)
            gap = self.smaller(self.own("fabs", left), self.own("fabs", right))
            crosses = self.at.and_(
                self.at.fcmp_ordered("<", self.at.fmul(left, right), number(0.0)),
                self.at.fcmp_ordered(">", gap, number(NOTHING)),
            )
            placed = self.variable(area)
            any_ = self.at.bitcast(crosses, self.i8)  # a bit for each lane
            with self.at.if_then(self.at.icmp_unsigned("!=", any_, any_.type(0)), likely=False):
                change = self.larger(self.own("fabs", self.at.fsub(right, left)), number(_LEAST))
                squares = self.at.fadd(self.at.fmul(left, left), self.at.fmul(right, right))
                crossing = self.at.fmul(self.at.fmul(width, number(0.5)), squares)
                crossing = self.larger(self.at.fdiv(crossing, change), area)
                self.set(placed, self.at.select(crosses, crossing, area))
            area = self.get(placed)
            self.set(found, self.at.fadd(self.get(found), area))
            cube = self.at.fmul(self.at.fmul(width, width), self.at.fmul(width, number(_STEEPEST)))
            rise = self.at.fmul(self.at.fmul(self.at.fsub(high, low), width), number(0.5))
            chord = self.at.fmul(self.smaller(cube, rise), number(2.0))
            own = self.fma(half, width, chord)
            self.set(bound, self.at.fadd(self.get(bound), own))
        return found, bound

    def _normal(self, z: Any) -> tuple[Any, Any]:
        """Return Φ and its integral from −∞, at any z."""
        number = self._number
        inside = self.smaller(self.larger(z, number(-_REACH)), number(_REACH))
        point = self.own("rint", self.at.fmul(inside, number(_PER_UNIT)))
        at = self.at.fmul(point, number(1 / _PER_UNIT))
        d = self.at.fsub(inside, at)
        normal, density = self._looked_up(point)
        square = self.at.fmul(at, at)
        second = self.at.fsub(square, number(1.0))
        third = self.at.fmul(at, self.at.fsub(square, number(3.0)))
        fourth = self.fma(square, self.at.fsub(square, number(6.0)), number(3.0))
        terms = [number(1.0), at, second, third, fourth]  # Hermite's polynomials, signs apart
        first, whole = (
            self._series(terms[: 5 - skip], d, [(-1) ** k / math.factorial(k + 1 + skip)
                                                for k in range(5 - skip)])
            for skip in (0, 1)
        )  # fmt: skip
        area = self.fma(at, normal, density)
        slope = self.fma(self.at.fmul(density, d), whole, normal)
        area = self.fma(d, slope, area)
        beyond = self.larger(self.at.fsub(z, number(_REACH)), number(0.0))
        found = self.fma(self.at.fmul(density, d), first, normal)
        return found, self.at.fadd(area, beyond)

    def _series(self, terms: list[Any], d: Any, factors: list[float]) -> Any:
        """Return Σ factor · term · dᵏ."""
        *others, last = [
            self.at.fmul(term, self._number(factor))
            for term, factor in zip(terms, factors, strict=True)
        ]
        for one in reversed(others):
            last = self.fma(last, d, one)
        return last

    def _looked_up(self, point: Any) -> tuple[Any, Any]:
        """Return Φ and φ at points of the table."""
        index = self.at.fptosi(point, self.vector(self.i64, _LANES))
        start = self.sum(self.field[_Job.TABLE], 16 * int(_REACH * _PER_UNIT))
        found = [self.constant(self.wide, 0.0)] * 2
        for lane in range(_LANES):
            at = self.at.extract_element(index, self.i32(lane))
            at = self.sum(start, self.times(at, 16))
            for which in range(2):
                value = self.load(self.f64, self.sum(at, 8 * which))
                found[which] = self.at.insert_element(found[which], value, self.i32(lane))
        return found[0], found[1]

    def _shares(self, line: Any, number: Any, share: Any) -> Any:
        """Return counts, int32, as shares of all."""
        whole = self.load(self.vector(self.i32, _LANES), self.sum(line, self.times(number, 4)))
        return self.at.fmul(self.at.sitofp(whole, self.wide), share)

    def _in_order(self, place: Any) -> Any:
        """Sum the lanes of a variable."""
        return self._joined(place, self.at.fadd)

    def _largest(self, place: Any) -> Any:
        def larger(one: Any, other: Any) -> Any:
            return self.at.select(self.at.fcmp_ordered(">", other, one), other, one)

        return self._joined(place, larger)

    def _joined(self, place: Any, by: Any) -> Any:
        value = self.get(place)
        found = self.at.extract_element(value, self.i32(0))
        for lane in range(1, _LANES):
            found = by(found, self.at.extract_element(value, self.i32(lane)))
        return found

    def _number(self, value: float) -> Any:
        return self.constant(self.wide, value)
