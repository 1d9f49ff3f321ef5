"""A mergeable streaming sketch of every neuron's output distribution.

One pass over the tokens, memory independent of their number: a histogram of about 1,500 bins and
four power sums a neuron, plus a coarser histogram for each group of sequences, from which
standard errors and split halves are computed. All state is additive, so two sketches of parts of
the text merge into the sketch of the whole.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int32
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.kernels import counting
from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, on_cpu, usable
from entangle.memory import by_device
from entangle.precision import accumulator_dtype, row_parts
from entangle.ranks import Ranks
from entangle.stats import bins
from entangle.stats.bins import (
    GROUP_FOLD,
    LEAST_SPREAD,
    BinnedDistances,
    Scratch,
    ToAdd,
    binned_at_once,
    binned_distances,
    binned_wd,
    has_kernels,
    higher_moments,
    jackknife_error,
    joined_edges,
    mean_and_std,
    pooled_parts,
    power_sums,
    resampled,
    sum_groups,
    to_host,
)
from entangle.stats.edges import N_BINS, SAVED_FOLD
from entangle.stats.wasserstein import (
    ShapeStatistics,
    is_constant,
    sort_rows,
)

_PILOT_TOKENS = 512
_AT_ONCE = 2**15
"""Bins to integrate over at once on a CPU, whose cache holds what is worked out of them."""

_SUMS = 2.5 * 16 * 2.0**-24
"""Error of WD through sums of x and x² that are wrong by 15 roundings: (δm₁ + 1.5 δm₂) / s²."""

_NORMAL_IQR = 1.3489795003921634
_FARTHEST = 1e30
"""Units of its bins that a neuron's outputs may lie from their middle, so that none overflows."""


@dataclass(frozen=True, eq=False)
class SketchResult:
    """What a sketch knows; tensors on the CPU, float64, of shape (neurons,) unless said."""

    shape: ShapeStatistics
    """Distances and moments, with WD and KS from the histogram."""
    wd_bound: Float[Tensor, " neurons"]
    """Largest possible error of the histogram's WD, in standard deviations."""
    wd_se: Float[Tensor, " neurons"]
    """Standard error of WD by jackknife over groups of whole sequences; NaN below two groups."""
    wd_halves: Float[Tensor, "halves=2 neurons"]
    """WD in the even and in the odd groups; NaN below two groups."""
    wd_without: Float[Tensor, "groups neurons"]
    """WD without each group, from which ``wd_se`` is; NaN of a group without tokens, and below two
    groups."""
    counts: Int32[Tensor, "neurons bins"]
    """The histogram over ``entangle.stats.signed_edges(SAVED_FOLD)`` in units of ``scale``, from
    ``first_bin`` on."""
    location: Float[Tensor, " neurons"]
    """Where the bins are centred, in the neuron's own units."""
    scale: Float[Tensor, " neurons"]
    """Width of the unit of the bins, in the neuron's own units."""
    low: Float[Tensor, " neurons"]
    """Smallest output, in the neuron's own units."""
    high: Float[Tensor, " neurons"]
    """Largest output, in the neuron's own units."""
    n_tokens: int
    """Number of tokens seen."""
    first_bin: int = 0
    """Bins left out in front of ``counts``, all empty."""


def _is_counted_by_kernels(sketch: "OutputSketch", *_: object, **__: object) -> bool:
    return usable(sketch._counts)


class OutputSketch:
    """Accumulate the outputs of one layer.

    Parameters
    ----------
    n_neurons
        Number of neurons.
    n_groups
        Number of groups of whole sequences for the jackknife.
    scratch
        Work space, which sketches that are updated one after the other may share.
    split
        Keep the sums of every update apart, 32 bytes a neuron, so that `pool` can add those of
        several ranks in the order of one.

    Notes
    -----
    The first update places each neuron's bins: centred at the median and scaled by the
    interquartile range of up to 512 of its tokens. Sketches merge only if their bins agree: make
    the second one with `fork`.
    """

    _powers: Tensor
    _group_powers: Tensor
    _group_tokens: Tensor
    _low: Tensor
    _high: Tensor
    _nan: Tensor
    _inf: Tensor

    def __init__(
        self,
        n_neurons: int,
        *,
        n_groups: int = 8,
        scratch: Scratch | None = None,
        split: bool = False,
    ) -> None:
        if n_neurons < 1 or n_groups < 1:
            raise InvalidInput(
                f"`n_neurons` and `n_groups` must be at least 1; got {n_neurons} and {n_groups}."
            )
        self.n_neurons, self.n_groups, self.n_tokens = n_neurons, n_groups, 0
        self._placed, self._open_group = False, 0
        self._scratch, self._split = scratch or Scratch(), split
        self._parts: list[tuple[int, Tensor]] = []
        """Group and power sums of every update, where they are kept apart."""

    @property
    def place(self) -> Float[Tensor, "two=2 neurons"] | None:
        """Centre and unit of each neuron's bins, float32; None before the first update."""
        return torch.stack([self._location, self._scale]) if self._placed else None

    def placed_at(self, place: Float[Tensor, "two=2 neurons"]) -> "OutputSketch":
        """Return an empty sketch with these bins (`place`)."""
        other = OutputSketch(
            self.n_neurons, n_groups=self.n_groups, scratch=self._scratch, split=self._split
        )
        other._place(*(one.clone() for one in place))
        return other

    def fork(self) -> "OutputSketch":
        """Return an empty sketch with the same bins, to be merged later."""
        if not self._placed:
            raise InvalidInput("a sketch can be forked only after its first `update`.")
        other = OutputSketch(self.n_neurons, n_groups=self.n_groups)
        other._place(self._location, self._scale)
        return other

    def update(self, outputs: Float[Tensor, "tokens neurons"], *, group: int = 0) -> None:
        """Add outputs of shape (tokens, neurons), all from sequences of one ``group``."""
        if outputs.shape[1] != self.n_neurons or not 0 <= group < self.n_groups:
            raise InvalidInput(
                f"`outputs` must have {self.n_neurons} columns and `group` lie in "
                f"[0, {self.n_groups}); got {outputs.shape[1]} columns and group {group}."
            )
        if outputs.shape[0] == 0:
            return
        outputs = outputs.detach()
        if not self._placed:
            self._place(*place_bins(outputs))
        if group != self._open_group:
            if self.n_tokens:
                self._close_group()
            self._open_group = group
        whole = self._powers
        if self._split:
            self._powers = torch.zeros_like(whole)
            self._parts.append((group, self._powers))
        self._add(outputs, group)
        self._powers = whole
        self.n_tokens += outputs.shape[0]
        self._group_tokens[group] += outputs.shape[0]

    def merge(self, other: "OutputSketch") -> None:
        """Add another sketch of the same neurons with the same bins."""
        if not (self._placed and other._placed) or (
            not torch.equal(self._location, other._location)
            or not torch.equal(self._scale, other._scale)
            or self.n_groups != other.n_groups
        ):
            raise InvalidInput("only sketches made from one another with `fork` can be merged.")
        for one in (self, other):
            if one.n_tokens:
                one._close_group()
        for name in ("_counts", "_group_counts", "_powers", "_group_powers", "_group_tokens"):
            getattr(self, name).add_(getattr(other, name))
        torch.minimum(self._low, other._low, out=self._low)
        torch.maximum(self._high, other._high, out=self._high)
        self._nan |= other._nan
        self._inf |= other._inf
        self._closed_counts.add_(other._closed_counts)
        self.n_tokens += other.n_tokens

    @staticmethod
    def used(sketches: Sequence["OutputSketch"]) -> list[tuple[int, int]]:
        """Return the first and the last joined bin that may hold counts, of each sketch.

        A GPU is waited for once, for all of them.
        """
        seen = [one for one in sketches if one.n_tokens]
        ends = to_host([torch.stack([one._low.min(), one._high.max()]) for one in seen])
        index = bins.signed_index(torch.stack(ends)).tolist() if ends else []
        found = {id(one): own for one, own in zip(seen, index, strict=True)}
        none = N_BINS, -1
        every = (found.get(id(one), none) for one in sketches)
        return [(first // GROUP_FOLD, last // GROUP_FOLD) for first, last in every]

    def known(self, used: tuple[int, int]) -> Sequence[Any]:
        """Return what all ranks must know of this sketch to `pool` it, as JSON takes it.

        ``used`` is what `used` says of it.
        """
        if self.n_tokens:
            self._close_group()
        tokens = self._group_tokens.tolist() if self._placed else []
        return [[group for group, _ in self._parts], tokens, *used]

    def pool(self, ranks: Ranks, found: Sequence[Sequence[Any]], *, to: int) -> ToAdd:
        """Put what the sketches of all ranks have seen into that of rank ``to``.

        All have the same bins, keep their sums apart (``split``), and have seen one text, the first
        rank its beginning: what comes out is what one sketch of all of it holds, to the bit, when
        what is returned has been added. Those of the other ranks hold nothing of use afterwards.
        ``found`` is what every rank's `known` gave.
        """
        groups = [(own, tokens) for own, tokens, _, _ in found]
        some = slice(min(one for *_, one, _ in found), max(one for *_, one in found) + 1)
        wide = slice(some.start * GROUP_FOLD, some.stop * GROUP_FOLD)
        sums = pooled_parts(
            ranks, [part for _, part in self._parts], [len(own) for own, _ in groups],
            like=self._powers, to=to,
        )  # fmt: skip
        others = [tokens for rank, (_, tokens) in enumerate(groups) if rank != to]
        counted = [group for group in range(self.n_groups) if any(own[group] for own in others)]
        counts = [self._counts[:, wide], *(self._group_counts[i, :, some] for i in counted)]
        sent = torch.cat(counts, dim=1)  # no other bins, or groups but rank ``to``'s, hold counts
        ranks.reduce(sent, to=to)
        extremes = torch.stack([-self._low, self._high, self._nan.float(), self._inf.float()])
        ranks.reduce(extremes, to=to, by="max")
        self._parts.clear()
        if ranks.rank != to:
            return []
        widths = [one.shape[1] for one in counts]
        for one, whole in zip(counts, sent.split(widths, dim=1), strict=True):
            one.copy_(whole)
        self._low, self._high = extremes[0].neg(), extremes[1].clone()
        self._nan, self._inf = extremes[2:].bool()
        self._closed_counts = self._group_counts.sum(0, dtype=torch.int32)
        self._group_tokens = torch.tensor([own for _, own in groups]).sum(0)
        self.n_tokens = int(self._group_tokens.sum())
        self._powers.zero_()
        self._group_powers.zero_()
        of_groups = [group for own, _ in groups for group in own]
        by_group: dict[int, list[Tensor]] = {}
        for group, part in zip(of_groups, sums, strict=True):
            by_group.setdefault(group, []).append(part[:2])
        each = [(self._group_powers[group], some) for group, some in by_group.items()]
        return [(self._powers, sums), *each]

    def result(self, *, distances: bool = True) -> SketchResult:
        """Compute all statistics of the tokens seen so far.

        Without ``distances``, WD, its bound and KS of the whole are left NaN, which is faster.
        """
        if self.n_tokens == 0:
            raise InvalidInput("the sketch has seen no token.")
        self._close_group()
        moments = self._powers / self._tokens_in(range(self.n_groups))
        shift, spread = mean_and_std(moments)
        location, scale = self._location.double(), self._scale.double()
        mean, std = location + scale * shift, scale * spread
        nan, inf = self._nan.clone(), self._inf & ~self._nan
        constant = is_constant(std, mean, torch.float32) & ~nan & ~inf
        bad = nan | inf | constant
        unknown = torch.full_like(shift, math.nan)
        binned = BinnedDistances(unknown, unknown, unknown)
        if distances:
            binned = self._distances(self._counts, shift, spread, fold=1)
        skewness, kurtosis = higher_moments(moments, shift, spread)
        se, halves, without = self._resample()
        found = [binned.wd, binned.ks, mean, std, skewness, kurtosis, binned.wd_bound, se]
        found[6] = found[6] + _SUMS * (moments[1] / spread.square())
        columns = torch.stack([*found, *halves, *without]).masked_fill(bad, math.nan)
        ends = location + scale * self._low, location + scale * self._high
        places = torch.stack([location, scale, *ends])
        flags = torch.stack([constant, nan, inf])
        sizes = [len(columns), len(places), len(flags)]
        first, folded = self._saved()
        table, counts = to_host([torch.cat([columns, places, flags.to(places)]), folded])
        columns, places, flags = table.split(sizes)
        return SketchResult(
            shape=ShapeStatistics(*columns[:6], *flags.bool()),
            wd_bound=columns[6],
            wd_se=columns[7],
            wd_halves=columns[8:10],
            wd_without=columns[10:],
            counts=counts,
            location=places[0],
            scale=places[1],
            low=places[2],
            high=places[3],
            n_tokens=self.n_tokens,
            first_bin=first,
        )

    def release(self) -> None:
        """Leave the histograms' memory to other sketches; nothing can be asked afterwards."""
        if not self._placed:
            return
        first, last = self._used_groups()
        used = slice(first, last + 1)
        self._counts[:, first * GROUP_FOLD : (last + 1) * GROUP_FOLD].zero_()
        self._closed_counts[:, used].zero_()
        for group in self._group_tokens.nonzero()[:, 0].tolist():
            self._group_counts[group, :, used].zero_()
        for tensor in (self._counts, self._group_counts, self._closed_counts):
            self._scratch.give_back(tensor)
        del self._counts, self._group_counts, self._closed_counts

    def _saved_counts(self) -> Tensor:
        """Return the histogram in the bins that are saved."""
        first, last = self._used_groups()
        step = GROUP_FOLD // SAVED_FOLD
        found = self._counts.new_zeros(self.n_neurons, N_BINS // SAVED_FOLD)
        used = self._counts[:, first * GROUP_FOLD : (last + 1) * GROUP_FOLD]
        found[:, first * step : (last + 1) * step] = bins.fold_counts(used, SAVED_FOLD)
        return found

    def _tokens_in(self, groups: Sequence[int]) -> int | Float64[Tensor, " neurons"]:
        """Return the tokens of some groups, of all neurons or of each."""
        return int(self._group_tokens[list(groups)].sum())

    def _saved(self) -> tuple[int, Tensor]:
        """Return the first bin that is saved, and the counts from there on."""
        return 0, self._saved_counts()

    def _place(self, location: Tensor, scale: Tensor) -> None:
        device, n, groups = location.device, self.n_neurons, self.n_groups
        wide = accumulator_dtype(device)
        self._location, self._scale, self._placed = location, scale, True
        joined = n, N_BINS // GROUP_FOLD
        self._counts, self._group_counts, self._closed_counts = (
            self._scratch.zeros(shape, torch.int32, device)
            for shape in ((n, N_BINS), (groups, *joined), joined)
        )
        self._powers = torch.zeros(4, n, dtype=wide, device=device)
        self._group_powers = torch.zeros(groups, 2, n, dtype=wide, device=device)
        self._group_tokens = torch.zeros(groups, dtype=torch.int64)
        self._low = torch.full((n,), math.inf, device=device)
        self._high = torch.full((n,), -math.inf, device=device)
        self._nan = torch.zeros(n, dtype=torch.bool, device=device)
        self._inf = torch.zeros(n, dtype=torch.bool, device=device)

    def _add_at_once(self, outputs: Tensor, group: int) -> None:
        kernels.add_outputs(
            outputs,
            self._location,
            self._scale,
            counts=self._counts,
            powers=self._powers,
            group_powers=self._group_powers[group],
            low=self._low,
            high=self._high,
            nan=self._nan,
            inf=self._inf,
        )

    def _add_on_cpu(self, outputs: Tensor, group: int) -> None:
        powers = counting.add_outputs(
            outputs, self._location, self._scale,
            bins=bins.BITS, counts=self._counts, low=self._low, high=self._high, nan=self._nan,
            inf=self._inf,
        )  # fmt: skip
        self._powers += powers
        self._group_powers[group] += powers[:2]

    @dispatch(_add_at_once, where=lambda _sketch, outputs, _group: kernels.fits(outputs, N_BINS))
    @dispatch(_add_on_cpu, where=lambda _sketch, outputs, _group: counting.fits(outputs))
    def _add(self, outputs: Tensor, group: int) -> None:
        """Add outputs, a block of neurons after the other."""
        for part in row_parts(self.n_neurons, _block_columns(outputs)):
            self._update_block(outputs, part, group)

    def _update_block(self, outputs: Tensor, part: slice, group: int) -> None:
        values = outputs[:, part].float()
        turned = values.stride(0) == 1  # each neuron's outputs lie together, and are summed so
        shape = tuple(values.T.shape if turned else values.shape)
        x, square, work = (
            self._scratch.take(name, shape, torch.float32, values.device)
            for name in ("x", "square", "work")
        )
        if turned:
            x, square, work = x.T, square.T, work.T
        torch.sub(values, self._location[part], out=x).div_(self._scale[part])
        powers = power_sums(x, square, work)
        if not bool(powers[-1].isfinite().all()):
            self._nan[part] |= x.isnan().any(0)
            self._inf[part] |= x.isinf().any(0)
            exact = x.nan_to_num_(0.0, 0.0, 0.0).to(self._powers.dtype)  # x⁴ may overflow float32
            powers = power_sums(exact, torch.empty_like(exact), torch.empty_like(exact))
        for i, power in enumerate(powers):
            self._powers[i, part] += power
        self._group_powers[group, 0, part] += powers[0]
        self._group_powers[group, 1, part] += powers[1]
        torch.minimum(self._low[part], x.amin(0), out=self._low[part])
        torch.maximum(self._high[part], x.amax(0), out=self._high[part])
        bins.add_counts(self._counts[part], bins.signed_index_(x, work), self._scratch)

    def _close_group_at_once(self) -> None:
        kernels.close_group(
            self._counts, closed=self._closed_counts, group=self._group_counts[self._open_group],
            low=self._low, high=self._high,
        )  # fmt: skip

    @dispatch(_close_group_at_once, where=_is_counted_by_kernels)
    def _close_group(self) -> None:
        """Credit what was counted since the last call to the open group."""
        first, last = self._used_groups()
        used = slice(first, last + 1)
        counts = self._counts[:, first * GROUP_FOLD : (last + 1) * GROUP_FOLD]
        now = counts.unflatten(1, (-1, GROUP_FOLD)).sum(-1, dtype=counts.dtype)
        self._group_counts[self._open_group, :, used] += now - self._closed_counts[:, used]
        self._closed_counts[:, used] = now

    def _groups_between_ends(self) -> tuple[int, int]:
        extremes = torch.stack([self._low.min(), self._high.max()])
        first, last = bins.signed_index_(extremes, torch.empty_like(extremes)).tolist()
        return first // GROUP_FOLD, last // GROUP_FOLD

    @dispatch(_groups_between_ends, where=lambda sketch: on_cpu(sketch._counts))
    def _used_groups(self) -> tuple[int, int]:
        """Return the first and the last joined bin that may hold counts.

        All of them on a GPU, which would have to be waited for.
        """
        return 0, N_BINS // GROUP_FOLD - 1

    def _distances_at_once(
        self, counts: Tensor, shift: Tensor, spread: Tensor, *, fold: int
    ) -> BinnedDistances:
        one = torch.ones(1, 1, dtype=torch.int32, device=counts.device)
        found = binned_at_once(
            counts[None], one, shift[None], spread[None], self._low, self._high, fold=fold
        )
        return BinnedDistances(*found[:, 0])

    @dispatch(_distances_at_once, where=lambda _sketch, counts, *_, **__: has_kernels(counts))
    def _distances(
        self, counts: Tensor, shift: Tensor, spread: Tensor, *, fold: int
    ) -> BinnedDistances:
        found = torch.empty(3, self.n_neurons, dtype=shift.dtype, device=shift.device)
        ends = bins.signed_index(torch.stack([self._low, self._high])).long() // fold
        for part, own, edges in self._standardised(counts, shift, spread, ends, fold=fold):
            one = binned_distances(own, edges)
            found[:, part] = torch.stack([one.wd, one.wd_bound, one.ks])
        return BinnedDistances(*found)

    def _standardised(
        self, counts: Tensor, shift: Tensor, spread: Tensor, ends: Tensor, *, fold: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield neurons, their counts and the standardised edges of these bins, few at a time.

        ``ends`` are the first and the last bin that each neuron has counts in, (2, neurons). Empty
        bins at a neuron's ends get no width, so that no other neuron's bins matter; neurons whose
        counts reach about as far go together.
        """
        edges = joined_edges(fold, shift.dtype, shift.device)
        last = counts.shape[1] - 1
        low = self._low.to(shift).where(ends[0] == 0, self._low.to(shift).maximum(edges[ends[0]]))
        high = self._high.to(shift).where(
            ends[1] == last, self._high.to(shift).minimum(edges[ends[1] + 1])
        )
        order = (ends[1] - ends[0]).argsort(stable=True)
        at_once = by_device(shift.device, cpu=_AT_ONCE, gpu=2**25)
        for part in _alike(order, ends[:, order], at_once):
            first, end = int(ends[0, part].min()), int(ends[1, part].max()) + 1
            own = low[part, None], high[part, None]
            placed = torch.clamp(edges[None, first : end + 1], *own)
            if first == 0:  # the outermost bins are open
                placed[:, :1] = own[0]
            if end == last + 1:
                placed[:, -1:] = own[1]
            placed.sub_(shift[part, None]).div_(spread[part, None])
            yield part, counts[:, first:end].index_select(0, part), placed

    def _subset_wd(self, counts: Tensor, powers: Tensor, tokens: int | Tensor) -> Tensor:
        """Return the WD of some of the groups; NaN where rounding hides their spread."""
        shift, spread = mean_and_std(powers / tokens)
        wd = torch.empty_like(shift)
        parts = self._standardised(counts, shift, spread, _occupied(counts), fold=GROUP_FOLD)
        for part, own, edges in parts:
            total = tokens if isinstance(tokens, int) else tokens[part, None]
            wd[part] = binned_wd(own, edges, total=total)
        return wd.masked_fill(spread <= LEAST_SPREAD * shift.abs(), math.nan)

    def _resample_at_once(self) -> tuple[Tensor, Tensor, Tensor]:
        return resampled(
            self._group_counts, self._group_powers, self._group_tokens, self._low, self._high
        )

    @dispatch(_resample_at_once, where=lambda sketch: has_kernels(sketch._group_counts))
    def _resample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the jackknife's standard error, WD of the two halves and without each group."""
        used = [g for g in range(self.n_groups) if bool((self._group_tokens[g] > 0).any())]
        each = torch.full_like(self._group_powers[:, 0], math.nan)
        if len(used) < 2:
            nothing = torch.full_like(self._powers[:2], math.nan)
            return nothing[0], nothing, each
        total = self._tokens_in(used)
        without = torch.stack(
            [
                self._subset_wd(
                    self._closed_counts - self._group_counts[g],
                    sum_groups(self._group_powers[[one for one in used if one != g]]),
                    total - self._tokens_in([g]),
                )
                for g in used
            ]
        )
        halves = torch.stack(
            [
                self._subset_wd(
                    self._group_counts[half].sum(0, dtype=torch.int32),
                    sum_groups(self._group_powers[half]),
                    self._tokens_in(half),
                )
                for half in (used[::2], used[1::2])
            ]
        )
        each[used] = without
        return jackknife_error(without), halves, each


def _occupied(counts: Tensor) -> Tensor:
    """Return the first and the last bin that each row has counts in, (2, rows)."""
    used = (counts > 0).byte()
    last = counts.shape[1] - 1 - used.flip(1).argmax(1)
    return torch.stack([used.argmax(1), last])


def _alike(order: Tensor, ends: Tensor, at_once: int) -> Iterator[Tensor]:
    """Split rows, ordered by how far their ``ends`` are apart, into parts of so many bins."""
    width = (ends[1] - ends[0] + 1).tolist()
    start = 0
    while start < len(width):
        stop = start + max(1, at_once // width[start])
        stop = start + max(1, at_once // width[min(stop, len(width)) - 1])
        yield order[start:stop]
        start = stop


def _block_columns(outputs: Tensor) -> int:
    """Choose how many neurons to treat at once: a cache-sized block on the CPU."""
    values = by_device(outputs.device, cpu=2**18, gpu=2**26)
    return max(4, values // outputs.shape[0] // 4 * 4)


def place_bins(
    outputs: Float[Tensor, "tokens neurons"],
) -> tuple[Float[Tensor, " neurons"], Float[Tensor, " neurons"]]:
    """Return the median and the core width of each neuron over a sample of the tokens."""
    stride = max(1, outputs.shape[0] // _PILOT_TOKENS)
    sample = outputs[::stride][:_PILOT_TOKENS].t().float().nan_to_num(0.0, 0.0, 0.0)
    ordered = sort_rows(sample)
    n = ordered.shape[1]
    location = ordered[:, n // 2].clone()
    core = (ordered[:, (3 * n) // 4] - ordered[:, n // 4]) / _NORMAL_IQR
    scale = core.clone()
    flat = (~(core > 0)).nonzero()[:, 0]
    if len(flat):
        deviations = (ordered[flat] - location[flat, None]).to(accumulator_dtype(ordered.device))
        scale[flat] = deviations.square().mean(1).sqrt().to(ordered)
    floor = location.abs() * torch.finfo(torch.float32).eps
    ends = ordered[:, [0, -1]] / _FARTHEST - location[:, None] / _FARTHEST
    floor = floor.maximum(ends.abs().amax(1))
    scale = torch.where(scale > floor, scale, floor)
    return location, torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
