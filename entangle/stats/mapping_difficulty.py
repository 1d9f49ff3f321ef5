"""Mapping difficulty: how far apart a neuron must map inputs that lie close together.

Over random disjoint pairs of tokens (a, b), with N_x and N_y normalisers,

    MD = mean over pairs of (|y_a − y_b| / N_y) / (‖x_a − x_b‖₂ / N_x)

(arXiv 2405.15756, eq. 2; the published code takes the maximum over the pairs as N_x and the
median as N_y). Pairs with identical inputs are left out and counted.

The pair statistics of the mapping difficulty from a stream of outputs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.kernels import counting, exact
from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, on_cpu, usable
from entangle.memory import by_device
from entangle.precision import accumulator_dtype
from entangle.ranks import Ranks
from entangle.seeding import torch_rng
from entangle.stats import bins
from entangle.stats.bins import Scratch, ToAdd, pooled_parts, to_host
from entangle.stats.edges import PER_OCTAVE, magnitude_edges
from entangle.stats.wasserstein import sort_rows

MAX_PAIRS = 50_000

OutputNorm = Literal["median", "mean", "max"]
InputNorm = Literal["max", "mean"]


@dataclass(frozen=True, eq=False)
class MappingDifficulty:
    """Pair statistics of one layer; fields of shape (neurons,) unless said."""

    slope: Float[Tensor, " neurons"]
    """Mean over pairs of |y_a − y_b| / ‖x_a − x_b‖, in output units per input unit."""
    dy_median: Float[Tensor, " neurons"]
    """Median over pairs of |y_a − y_b|, in output units."""
    dy_mean: Float[Tensor, " neurons"]
    """Mean over pairs of |y_a − y_b|, in output units."""
    dy_max: Float[Tensor, " neurons"]
    """Maximum over pairs of |y_a − y_b|, in output units."""
    dx_max: float
    """Maximum over pairs of ‖x_a − x_b‖, in input units."""
    dx_mean: float
    """Mean over pairs of ‖x_a − x_b‖, in input units."""
    n_pairs: int
    """Pairs counted."""
    n_identical: int
    """Pairs left out because their inputs are identical."""

    def md(
        self,
        *,
        output_norm: OutputNorm = "median",
        input_norm: InputNorm = "max",
        noise: Float[Tensor, " neurons"] | None = None,
    ) -> Float[Tensor, " neurons"]:
        """Return the mapping difficulty (no unit) under a choice of normalisers.

        The input normaliser is common to all neurons of a layer and leaves their order alone.
        NaN where the output normaliser is 0, for example if most pairs have equal outputs, or no
        more than twice the ``noise``: the rounding of a usual output, in output units, (neurons,),
        from `entangle.stats.wasserstein`.
        """
        if output_norm not in ("median", "mean", "max") or input_norm not in ("max", "mean"):
            raise InvalidInput(
                "`output_norm` must be median, mean or max and `input_norm` max or mean; "
                f"got {output_norm!r} and {input_norm!r}."
            )
        dy = {"median": self.dy_median, "mean": self.dy_mean, "max": self.dy_max}[output_norm]
        dx = {"max": self.dx_max, "mean": self.dx_mean}[input_norm]
        nothing = dy == 0 if noise is None else dy <= 2 * noise.to(dy)
        return (self.slope * dx / dy).masked_fill(nothing, math.nan)


def draw_pairs(
    n_tokens: int, *, seed: int, max_pairs: int = MAX_PAIRS
) -> Int[Tensor, "two=2 pairs"]:
    """Draw disjoint pairs of token indices without replacement.

    Parameters
    ----------
    n_tokens
        Number of tokens to draw from.
    seed
        Seed of the draw.
    max_pairs
        Upper limit; at most ``n_tokens // 2`` pairs exist.

    Returns
    -------
    Tensor of shape (2, pairs)
        Token indices, int64; no index occurs twice.
    """
    pairs = min(max_pairs, n_tokens // 2)
    narrow = torch.int32 if n_tokens < 2**31 else torch.int64  # the same draws in half the memory
    generator = torch_rng(seed, "mapping difficulty")
    order = torch.randperm(n_tokens, generator=generator, dtype=narrow)
    return order[: 2 * pairs].to(torch.int64, copy=True).view(2, pairs)  # keeps no order alive


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Pairs of tokens with distinct inputs, for all layers that have these inputs."""

    tokens: Int[Tensor, "two=2 pairs"]
    """Token indices, where the outputs are."""
    slant: Float[Tensor, " pairs"]
    """1 / ‖x_a − x_b‖₂, per input unit."""
    dx_max: float
    """Maximum of ‖x_a − x_b‖₂, in input units; NaN without a pair."""
    dx_mean: float
    """Mean of ‖x_a − x_b‖₂, in input units; NaN without a pair."""
    n_identical: int
    """Pairs left out because their inputs are identical."""

    @classmethod
    def of(
        cls,
        pairs: Int[Tensor, "two=2 drawn"],
        input_distance: Float[Tensor, " drawn"],
        *,
        device: torch.device,
    ) -> "TokenPairs":
        """Leave out the pairs at distance 0, and move the rest to where the outputs are."""
        drawn, distinct = pairs.shape[1], input_distance > 0
        dx = input_distance.to(accumulator_dtype(device))
        n_distinct, most, mean = _summary(dx, distinct)
        if n_distinct < drawn:
            pairs, dx = pairs[:, distinct.to(pairs.device)], dx[distinct]
            _, most, mean = _summary(dx, distinct[distinct])
        slant = (1 / dx).to(device)
        return cls(pairs.to(device), slant, most, mean, drawn - int(n_distinct))

    def difficulty(self, outputs: Float[Tensor, "neurons tokens"]) -> MappingDifficulty:
        """Compute the pair statistics of neurons; see `mapping_difficulty`."""
        if self.slant.numel() == 0:
            nothing = self.slant.new_full((outputs.shape[0],), math.nan)
            return no_pairs(nothing, self.n_identical)
        slope, median, mean, most = _pair_statistics(outputs, self.tokens, self.slant)
        return MappingDifficulty(
            slope=slope,
            dy_median=median,
            dy_mean=mean,
            dy_max=most,
            dx_max=self.dx_max,
            dx_mean=self.dx_mean,
            n_pairs=self.slant.numel(),
            n_identical=self.n_identical,
        )


def _summary(dx: Tensor, distinct: Tensor) -> list[float]:
    """Return how many pairs are distinct, and the maximum and the mean of all; with one wait."""
    if not dx.numel():
        return [0.0, math.nan, math.nan]
    found: list[float] = torch.stack([distinct.sum().to(dx), dx.max(), dx.mean()]).tolist()
    return found


def mapping_difficulty(
    outputs: Float[Tensor, "neurons tokens"],
    pairs: Int[Tensor, "two=2 pairs"],
    input_distance: Float[Tensor, " pairs"],
) -> MappingDifficulty:
    """Compute the pair statistics of neurons from all their outputs.

    Parameters
    ----------
    outputs
        Outputs of shape (neurons, tokens).
    pairs
        Token indices of shape (2, pairs), from `draw_pairs`.
    input_distance
        ‖x_a − x_b‖₂ of every pair, shape (pairs,), in input units.

    Returns
    -------
    MappingDifficulty
        With NaN in every statistic where no pair has distinct inputs.
    """
    return TokenPairs.of(pairs, input_distance, device=outputs.device).difficulty(outputs)


def _fits_pairs(outputs: Tensor, pairs: Tensor, _slant: Tensor) -> bool:
    return exact.fits_pairs(outputs, pairs.shape[1])


@dispatch(lambda *of_pairs: tuple(exact.pair_statistics(*of_pairs)), where=_fits_pairs)
def _pair_statistics(outputs: Tensor, pairs: Tensor, slant: Tensor) -> tuple[Tensor, ...]:
    """Return slope, and median, mean and maximum of |y_a − y_b|, of every neuron."""
    wide = slant.dtype
    dy = (outputs[:, pairs[0]].float() - outputs[:, pairs[1]].float()).abs_()
    slope = dy.to(wide).mul_(slant).mean(1)
    return slope, _median(dy).to(wide), dy.mean(1, dtype=wide), dy.amax(1).to(wide)


def no_pairs(nothing: Float[Tensor, " neurons"], n_identical: int) -> MappingDifficulty:
    """Return what no pair tells of neurons; ``nothing`` is NaN."""
    return MappingDifficulty(
        slope=nothing,
        dy_median=nothing,
        dy_mean=nothing,
        dy_max=nothing,
        dx_max=math.nan,
        dx_mean=math.nan,
        n_pairs=0,
        n_identical=n_identical,
    )


def _median_by_numpy(values: Tensor) -> Tensor:
    return torch.from_numpy(np.median(values.numpy(), axis=1))


@dispatch(_median_by_numpy, where=on_cpu)
def _median(values: Tensor) -> Tensor:
    """Return the median of every row; the mean of the middle two where there are two."""
    return values.quantile(0.5, dim=1)


_BINS, _PILOT_PAIRS = 3 * PER_OCTAVE, 512
PAIR_BYTES = 4 * _BINS
"""That a `PairSketch` holds of a neuron, at least."""


def _can_add_at_once(_sketch: object, first: Tensor, second: Tensor, *_: object) -> bool:
    return kernels.fits(first, _BINS, bytes_a_count=4) and first.stride() == second.stride()


def _typical(first: Tensor, second: Tensor) -> Tensor:
    """Return the scale of the bins by the outputs of some pairs."""
    sample = (first.float() - second.float()).abs_().nan_to_num_(0.0, 0.0, 0.0)
    typical = sort_rows(sample.t())[:, (len(sample) - 1) // 2]
    return torch.where(typical > 0, typical, 1.0)


class PairSketch:
    """Accumulate the pair statistics of one layer from a stream, in memory that does not grow.

    Parameters
    ----------
    n_neurons
        Number of neurons.
    scratch
        Work space, which sketches that are updated one after the other may share.
    split
        As of `entangle.stats.sketch.OutputSketch`.

    Notes
    -----
    The median of |y_a − y_b| comes from a histogram with 1/64 of the first batch's median as bin
    width (1/32 from one to three times that median, 1/16 up to seven times), interpolated, and is
    NaN where it lies beyond the last bin; the other statistics are exact.
    """

    _sums: Tensor
    _dy_max: Tensor

    def __init__(
        self, n_neurons: int, *, scratch: Scratch | None = None, split: bool = False
    ) -> None:
        self.n_neurons, self.n_pairs, self.n_identical = n_neurons, 0, 0
        self._scratch, self._split = scratch or Scratch(), split
        self._parts: list[tuple[float, Tensor]] = []
        """Sum of the input distances and of what `_sums` holds, of every update, if kept apart."""
        self._dx_max = self._dx_sum = 0.0
        self._placed = False
        self._uncounted: list[Tensor] = []

    @property
    def place(self) -> Float[Tensor, " neurons"] | None:
        """Unit of each neuron's bins, float32; None before the first pairs."""
        return self._scale if self._placed else None

    def placed_at(self, place: Float[Tensor, " neurons"] | None) -> "PairSketch":
        """Return an empty sketch with these bins (`place`)."""
        other = PairSketch(self.n_neurons, scratch=self._scratch, split=self._split)
        if place is not None:
            other._place(place.clone())
        return other

    def fork(self) -> "PairSketch":
        """Return an empty sketch with the same bins, to be merged later."""
        if not self._placed:
            raise InvalidInput("a sketch can be forked only after its first `update`.")
        other = PairSketch(self.n_neurons)
        other._place(self._scale)
        return other

    def update(
        self,
        first: Float[Tensor, "rows neurons"],
        second: Float[Tensor, "rows neurons"],
        input_distance: Float[Tensor, " pairs"],
        *,
        starts: tuple[int, int] = (0, 0),
    ) -> None:
        """Add the outputs at both tokens of some pairs.

        Pair i joins row (a + i) % rows of ``first`` with row (b + i) % rows of ``second``, where
        ``starts`` is (a, b). There are at most as many pairs as rows.
        """
        rows, pairs = first.shape[0], input_distance.shape[0]
        if pairs == 0:
            return
        if pairs > rows or not all(0 <= start < rows for start in starts):
            raise InvalidInput(
                f"there must be at most as many pairs as rows, {rows}, and `starts` be rows; "
                f"got {pairs} pairs and {starts}."
            )
        dx = input_distance.to(first.device)
        if not self._split:
            self._add(first, second, dx, starts)
            return
        before, self._dx_sum = self._dx_sum, 0.0
        whole = self._sums if self._placed else None
        if whole is not None:
            self._sums = torch.zeros_like(whole)
        self._add(first, second, dx, starts)
        if self._placed:
            self._parts.append((self._dx_sum, self._sums))
            self._sums = torch.zeros_like(self._sums) if whole is None else whole
        self._dx_sum += before

    def _add_at_once(
        self, first: Tensor, second: Tensor, dx: Tensor, starts: tuple[int, int]
    ) -> None:
        """Do what `_add_gathered` does, in one kernel that is not waited for."""
        if not self._placed:
            run = (dx[: first.shape[0] - max(starts)] > 0).nonzero()[:_PILOT_PAIRS, 0]
            if not run.numel():
                self._add_gathered(first, second, dx, starts)
                return
            self._place(_typical(first[starts[0] + run], second[starts[1] + run]))
        kernels.add_pairs(
            first, second, dx.float(), self._scale,
            starts=starts, counts=self._counts, sums=self._sums, highest=self._dy_max,
        )  # fmt: skip
        self._uncounted.append(dx)

    def _add_gathered(
        self, first: Tensor, second: Tensor, dx: Tensor, starts: tuple[int, int]
    ) -> None:
        rows, pairs = first.shape[0], dx.shape[0]
        if pairs < rows or starts != (0, 0):
            order = torch.arange(pairs, device=first.device)
            first, second = first[(starts[0] + order) % rows], second[(starts[1] + order) % rows]
        distinct = dx > 0
        if not bool(distinct.all()):
            self.n_identical += int((~distinct).sum())
            first, second, dx = first[distinct], second[distinct], dx[distinct]
        if dx.numel() == 0:
            return
        if not self._placed:
            self._place(_typical(first[:_PILOT_PAIRS], second[:_PILOT_PAIRS]))
        self._count(first, second, dx)
        self.n_pairs += dx.numel()
        self._dx_max = max(self._dx_max, float(dx.max()))
        self._dx_sum += float(dx.sum(dtype=accumulator_dtype(dx.device)))

    _add = dispatch(_add_at_once, where=_can_add_at_once)(_add_gathered)

    def _count_on_cpu(self, first: Tensor, second: Tensor, dx: Tensor) -> None:
        self._sums += counting.add_pairs(
            first, second, (1 / dx).float(), self._scale,
            bins=bins.BITS, counts=self._counts, highest=self._dy_max,
        )  # fmt: skip

    @dispatch(_count_on_cpu, where=lambda _sketch, first, *_: counting.fits(first))
    def _count(self, first: Tensor, second: Tensor, dx: Tensor) -> None:
        """Count pairs with different inputs, a block of neurons after the other."""
        at_once = by_device(first.device, cpu=2**18, gpu=2**26)
        columns = max(4, at_once // dx.numel() // 4 * 4)
        for start in range(0, self.n_neurons, columns):
            part = slice(start, start + columns)
            left, right = first[:, part].float(), second[:, part].float()
            dy = self._scratch.take("x", tuple(left.shape), torch.float32, left.device)
            torch.sub(left, right, out=dy).abs_()
            work = self._scratch.take("work", tuple(dy.shape), dy.dtype, dy.device)
            torch.mul(dy, (1 / dx).to(dy.dtype)[:, None], out=work)
            self._sums[0, part] += work.sum(0)  # by halves: a matrix product is less exact
            self._sums[1, part] += dy.sum(0)
            torch.maximum(self._dy_max[part], dy.amax(0), out=self._dy_max[part])
            index = bins.magnitude_index_(dy.div_(self._scale[part]), _BINS)
            bins.add_counts(self._counts[part], index, self._scratch)

    def merge(self, other: "PairSketch") -> None:
        """Add another sketch of the same neurons with the same bins."""
        if not (self._placed and other._placed and torch.equal(self._scale, other._scale)):
            raise InvalidInput("only sketches made from one another with `fork` can be merged.")
        self.settle([self])
        self.settle([other])
        self._counts += other._counts
        self._sums += other._sums
        torch.maximum(self._dy_max, other._dy_max, out=self._dy_max)
        self._dx_max = max(self._dx_max, other._dx_max)
        self._dx_sum += other._dx_sum
        self.n_pairs += other.n_pairs
        self.n_identical += other.n_identical

    def known(self) -> Sequence[Any]:
        """As `entangle.stats.sketch.OutputSketch.known`."""
        known = [self.n_pairs, self.n_identical, self._dx_max, [dx for dx, _ in self._parts]]
        return [*known, [len(dx) for dx in self._uncounted]]

    def pool(self, ranks: Ranks, found: Sequence[Sequence[Any]], *, to: int) -> ToAdd:
        """As `entangle.stats.sketch.OutputSketch.pool`."""
        if self._placed:
            sums = pooled_parts(
                ranks, [part for _, part in self._parts], [len(own[3]) for own in found],
                like=self._sums, to=to,
            )  # fmt: skip
            nan = self._dy_max.isnan().to(self._dy_max)
            most = torch.stack([self._dy_max.nan_to_num(nan=0.0, posinf=torch.inf), nan])
            ranks.reduce(self._counts, to=to)
            ranks.reduce(most, to=to, by="max")
            self._pool_distances(ranks, [own[4] for own in found], to=to)
        self._parts.clear()
        if ranks.rank != to:
            return []
        self.n_pairs, self.n_identical = (sum(own[i] for own in found) for i in (0, 1))
        self._dx_max = max(own[2] for own in found)
        self._dx_sum = 0.0
        for dx in [dx for own in found for dx in own[3]]:
            self._dx_sum += dx
        if not self._placed:
            return []
        self._dy_max = most[0].masked_fill(most[1] > 0, torch.nan)
        return [(self._sums.zero_(), sums)]

    def _pool_distances(self, ranks: Ranks, sizes: Sequence[Sequence[int]], *, to: int) -> None:
        """Put together the distances of pairs that are not counted yet, ``sizes`` of every rank."""
        counts = [sum(own) for own in sizes]
        if not sum(counts):
            return
        own = torch.cat(self._uncounted).float() if self._uncounted else self._dy_max[:0]
        every = self._dy_max.new_zeros(sum(counts))
        start = sum(counts[: ranks.rank])
        every[start : start + len(own)] = own
        ranks.reduce(every, to=to)
        self._uncounted = list(every.split([n for own in sizes for n in own]))

    def result(self) -> MappingDifficulty:
        """Return the pair statistics of all pairs seen so far, on the CPU."""
        self.settle([self])
        if self.n_pairs == 0:
            nothing = torch.full((self.n_neurons,), torch.nan, dtype=torch.float64)
            return no_pairs(nothing, self.n_identical)
        (found,) = to_host([self._statistics()])
        slope, median, mean, most = found
        return MappingDifficulty(
            slope=slope,
            dy_median=median,
            dy_mean=mean,
            dy_max=most,
            dx_max=self._dx_max,
            dx_mean=self._dx_sum / self.n_pairs,
            n_pairs=self.n_pairs,
            n_identical=self.n_identical,
        )

    def release(self) -> None:
        """As `entangle.stats.sketch.OutputSketch.release`."""
        if self._placed:
            self._scratch.give_back(self._counts.zero_())
            del self._counts

    def _place(self, scale: Tensor) -> None:
        wide = accumulator_dtype(scale.device)
        self._scale, self._placed = scale, True
        self._counts = self._scratch.zeros((self.n_neurons, _BINS), torch.int32, scale.device)
        self._sums = torch.zeros(2, self.n_neurons, dtype=wide, device=scale.device)
        self._dy_max = torch.zeros(self.n_neurons, device=scale.device)

    @staticmethod
    def settle(sketches: Iterable["PairSketch"]) -> None:
        """Count the pairs that went to the GPU, of all sketches with one wait."""
        waiting = [sketch for sketch in sketches if sketch._uncounted]
        for sketch, known in zip(
            waiting, to_host([sketch._known() for sketch in waiting]), strict=True
        ):
            pairs, most, total = known.tolist()
            sketch.n_pairs += int(pairs)
            sketch.n_identical += sum(map(len, sketch._uncounted)) - int(pairs)
            sketch._dx_max = max(sketch._dx_max, most)
            sketch._dx_sum += total
            sketch._uncounted.clear()

    def _known(self) -> Tensor:
        """Return number, maximum and sum of the uncounted distances that are not 0."""
        dx = torch.cat(self._uncounted)
        kept = dx.where(dx > 0, 0.0).double()
        return torch.stack([(kept > 0).sum(dtype=kept.dtype), kept.max(), kept.sum()])

    def _statistics_at_once(self) -> Tensor:
        return kernels.pair_statistics(
            self._counts, self._sums, self._dy_max, self._scale, n_pairs=self.n_pairs
        )

    @dispatch(_statistics_at_once, where=lambda sketch: usable(sketch._counts))
    def _statistics(self) -> Tensor:
        """Return slope, and median, mean and maximum of |y_a − y_b|, of every neuron."""
        slope, mean = self._sums / self.n_pairs
        return torch.stack([slope, self._median() * self._scale, mean, self._dy_max.to(slope)])

    def _median(self) -> Tensor:
        """Interpolate the median inside its bin, in units of the scale.

        NaN in the open last bin and in the first, where most pairs have next to equal outputs.
        """
        edges = torch.from_numpy(magnitude_edges(_BINS)).to(self._sums)
        cumulative = self._counts.cumsum(1, dtype=torch.int32)
        half = self.n_pairs / 2
        bin_ = (cumulative < math.ceil(half)).sum(1).clamp_max(_BINS - 1)
        count = self._counts.gather(1, bin_[:, None])[:, 0].to(edges)
        before = cumulative.gather(1, bin_[:, None])[:, 0].to(edges) - count
        inside = (half - before) / count.clamp_min(1)
        median = edges[bin_] + inside * (edges[bin_ + 1] - edges[bin_])
        unresolved = (bin_ == 0) | (bin_ == _BINS - 1)
        return median.masked_fill(unresolved | self._sums[0].isnan(), math.nan)
