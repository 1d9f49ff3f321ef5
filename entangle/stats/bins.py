"""Bins that cover the whole real line with a fixed relative resolution.

A value x (in units of a neuron's core width, from its median) is binned by the leading bits of
1 + |x| as a float32 number: 64 bins of equal width over [0, 1), 64 over [1, 3), 64 over [3, 7)
and so on, mirrored for negative values. Integer arithmetic on the bits replaces a search, and a
distribution with a sharp core and far outliers is resolved in both.

Work space that is used again instead of being allocated for every batch.

A large block that is freed goes back to the operating system, and the next one of its size is
mapped page by page when it is first written to, which takes longer than the arithmetic.

Distances from a fitted Gaussian, computed from binned outputs.

Results from a GPU to the CPU, with one wait.

Moments from the sums of powers that a sketch keeps.

The jackknife over groups of sequences, from the groups' histograms, by kernels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, lru_cache, reduce
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64, Shaped
from torch import Tensor

from entangle.kernels import binned, counting
from entangle.kernels.binned import NOTHING
from entangle.kernels.dispatch import dispatch, on_cpu, usable
from entangle.kernels.exact import fused_binned_distances
from entangle.ranks import Ranks
from entangle.stats.edges import HALF, N_BINS, PER_OCTAVE, signed_edges

_LENDING = Lock()


class Scratch:
    """Hands out tensors of undefined content; those taken under one name share their memory.

    One object may serve any number of accumulators that are updated one after the other, but not
    two threads; only `give_back` may come from another one.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._zeros: list[Tensor] = []

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return zeros, in memory of that shape that was given back where there is some."""
        with _LENDING:
            for place, one in enumerate(self._zeros):
                if (one.shape, one.dtype, one.device) == (shape, dtype, device):
                    return self._zeros.pop(place)
        return torch.zeros(shape, dtype=dtype, device=device)

    def give_back(self, zeros: Tensor) -> None:
        """Keep a tensor of zeros, which nobody uses any more, for `zeros`."""
        with _LENDING:
            self._zeros.append(zeros)

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a contiguous tensor; what was taken under this name before is overwritten."""
        key = name, dtype, device
        size = math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)


def pooled_parts(
    ranks: Ranks, parts: Sequence[Tensor], counts: Sequence[int], *, like: Tensor, to: int
) -> list[Tensor]:
    """Return the parts of sums that all ranks have, in their order, on rank ``to``.

    Parameters
    ----------
    ranks
        Who has them.
    parts
        This rank's, all like ``like``.
    counts
        How many every rank has.
    like
        Shape, dtype and device of a part.
    to
        Who gets them; what others get is of no use.
    """
    sent = [0 if rank == to else count for rank, count in enumerate(counts)]
    table = like.new_zeros(sum(sent), *like.shape)  # a sum of one number and zeros is exact
    if parts and ranks.rank != to:
        before = sum(sent[: ranks.rank])
        torch.stack(list(parts), out=table[before : before + len(parts)])
    ranks.reduce(table, to=to)
    before = sum(sent[:to])
    return [*table[:before], *parts, *table[before:]] if ranks.rank == to else []


ToAdd = list[tuple[Tensor, Sequence[Tensor]]]
"""Sums, and what is still to be added to each, in its order."""


def add_in_order(sums: ToAdd) -> None:
    """Add to many sums at once, which takes a GPU no longer than to add to one."""
    for i in range(max((len(parts) for _, parts in sums), default=0)):
        some = [(whole, parts[i]) for whole, parts in sums if i < len(parts)]
        torch._foreach_add_([whole for whole, _ in some], [part for _, part in some])


_SHIFT = 23 - PER_OCTAVE.bit_length() + 1
_LANES = 4
_ONE = 0x3F800000 >> _SHIFT  # the leading bits of 1.0
BITS = counting.Bins(_SHIFT, _ONE)
"""What the kernels for CPUs need to know of the bins."""


def magnitude_index(magnitude: Float[Tensor, "*shape"], n_bins: int) -> Int32[Tensor, "*shape"]:
    """Return the bin of each non-negative float32 value, in [0, n_bins); the last one is open."""
    return magnitude_index_(magnitude.clone(), n_bins)


def signed_index(x: Float[Tensor, "*shape"]) -> Int32[Tensor, "*shape"]:
    """Return the bin of each float32 value, in [0, N_BINS); the outermost two are open."""
    return signed_index_(x.clone(), torch.empty_like(x))


def magnitude_index_(magnitude: Float[Tensor, "*shape"], n_bins: int) -> Int32[Tensor, "*shape"]:
    """As `magnitude_index`, in the memory of ``magnitude``."""
    bits = magnitude.add_(1).view(torch.int32)
    return bits.bitwise_right_shift_(_SHIFT).sub_(_ONE).clamp_(max=n_bins - 1)


def signed_index_(
    x: Float[Tensor, "*shape"], work: Float[Tensor, "*shape"]
) -> Int32[Tensor, "*shape"]:
    """As `signed_index`, in the memory of ``work``; ``x`` is overwritten too."""
    index = magnitude_index_(torch.abs(x, out=work), HALF)
    sign = x.add_(0.0).view(torch.int32).bitwise_right_shift_(31)  # −1 where negative, not for −0.0
    return index.bitwise_xor_(sign).add_(HALF)  # k → −1 − k is a bitwise not


def add_counts(
    counts: Int32[Tensor, "neurons bins"],
    index: Int32[Tensor, "tokens neurons"],
    scratch: Scratch,
) -> None:
    """Add 1 to ``counts[n, index[t, n]]`` for every token and neuron; ``index`` is overwritten.

    Counting is fast neuron by neuron, where one row of counts stays in the cache, so the indices
    must be turned. Four neurons' indices, as 16-bit numbers, are turned as one 64-bit number, and
    the four count in neighbouring rows; ``4 * bins`` must fit into 16 bits.
    """
    (tokens, neurons), n_bins, device = index.shape, counts.shape[1], counts.device
    lanes = _LANES if neurons % _LANES == 0 else 1
    rows = neurons // lanes
    offset = torch.arange(lanes, dtype=torch.int32, device=device) * n_bins
    index += offset.repeat(rows)
    small = scratch.take("small", (tokens, neurons), torch.int16, device).copy_(index)
    turned = scratch.take("turned", (rows, tokens * lanes), torch.int16, device)
    whole = torch.int64 if lanes == _LANES else torch.int16
    turned.view(whole).copy_(small.view(whole).t())
    wide = scratch.take("wide", (rows, tokens * lanes), torch.int64, device).copy_(turned)
    one = torch.ones((), dtype=counts.dtype, device=device)
    counts.view(rows, lanes * n_bins).scatter_add_(1, wide, one.expand_as(wide))


def fold_counts(counts: Tensor, fold: int) -> Tensor:
    """Join every ``fold`` neighbouring bins of counts of shape (..., bins)."""
    grouped = counts.reshape(*counts.shape[:-1], -1, fold)
    return grouped.sum(-1, dtype=counts.dtype)


@dataclass(frozen=True, eq=False)
class BinnedDistances:
    """Distances of binned distributions to N(0, 1); every field has shape (rows,)."""

    wd: Float[Tensor, " rows"]
    """1-Wasserstein distance with the mass spread evenly inside each bin."""
    wd_bound: Float[Tensor, " rows"]
    """Largest possible error of ``wd``, wherever the mass lies inside the bins."""
    ks: Float[Tensor, " rows"]
    """Kolmogorov-Smirnov distance at the bin edges (a lower bound of the exact one)."""


def binned_distances(
    counts: Shaped[Tensor, "rows bins"], edges: Float[Tensor, "rows edges"]
) -> BinnedDistances:
    """Integrate |F − Φ| over standardised bins.

    Parameters
    ----------
    counts
        Number of values in each bin, shape (rows, bins).
    edges
        Standardised bin edges, ascending, of shape (rows, bins + 1), in standard deviations.

    Returns
    -------
    BinnedDistances
        The distribution function F is exact at the edges and linear between them. A monotone
        function with the same ends differs from it by at most half of mass times width in each
        bin. Where F crosses Φ inside a bin, Φ is taken as its chord there, which errs by at most
        twice the area between the two. The bound is the sum of both over the bins.
    """
    mass, normal, gap, wd = _integrated(counts, edges, counts.sum(1, keepdim=True))
    width = edges.diff(dim=1)
    bound = mass.mul_(width).div_(2).add_(_chord_area(width, normal).mul_(2))
    return BinnedDistances(wd, _in_order(bound), torch.maximum(-gap.amin(1), gap.amax(1)))


def binned_wd(
    counts: Shaped[Tensor, "rows bins"],
    edges: Float[Tensor, "rows edges"],
    *,
    total: int | Float[Tensor, "rows one=1"],
) -> Float[Tensor, " rows"]:
    """Return the first of `binned_distances` alone, in less time; ``total`` counts in each row."""
    return _integrated(counts, edges, total)[-1]


def _integrated(
    counts: Tensor, edges: Tensor, total: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mass of the bins, Φ and F − Φ at their edges, and WD."""
    mass = counts.to(edges.dtype, copy=True).div_(total)
    normal = torch.special.ndtr(edges)
    gap = edges.new_zeros(edges.shape)
    torch.cumsum(mass, 1, out=gap[:, 1:])
    width = edges.diff(dim=1)
    area = (mass / 2).add_(gap[:, :-1]).mul_(width).sub_(_normal_area(edges, normal)).abs_()
    gap -= normal
    sizes = gap.abs()
    crosses = (gap[:, :-1] * gap[:, 1:] < 0) & (sizes[:, :-1].minimum(sizes[:, 1:]) > NOTHING)
    inside = _true(crosses)  # one or a few of a row's bins
    at = inside + inside // width.shape[1]  # a row has one edge more
    left, right = gap.view(-1)[at], gap.view(-1)[at + 1]
    change = (right - left).abs_().clamp_min_(1e-300)
    crossing = width.view(-1)[inside] * (left.square() + right.square()) / (2 * change)
    area.view(-1)[inside] = crossing.maximum(area.view(-1)[inside])
    tails = _normal_tail(edges[:, 0]) + _normal_tail(-edges[:, -1])
    return mass, normal, gap, _in_order(area) + tails


def _places_by_numpy(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


@dispatch(_places_by_numpy, where=on_cpu)
def _true(mask: Tensor) -> Tensor:
    """Return the places that are true, counted row after row."""
    return mask.flatten().nonzero()[:, 0]


def _in_order(values: Tensor) -> Tensor:
    """Sum rows from left to right, so that zeros on either side change no bit; in their memory."""
    return values.cumsum_(1)[:, -1]


def _chord_area(width: Tensor, normal: Tensor) -> Tensor:
    """Bound the area between Φ and its chord over each bin, given Φ at the edges.

    It is at most w³ max|Φ''| / 12 by Taylor, and half of rise times width as both are monotone.
    """
    steepest = math.exp(-0.5) / math.sqrt(2 * math.pi)  # max|Φ''|, at ±1
    half = normal.diff(dim=1).mul_(width).div_(2)
    return (width**3).mul_(steepest / 12).minimum(half)


def _normal_area(edges: Tensor, normal: Tensor) -> Tensor:
    """Integrate Φ over each bin: ∫Φ = zΦ + φ."""
    density = edges.square().div_(-2).exp_().div_(math.sqrt(2 * math.pi))
    return density.add_(edges * normal).diff(dim=1)


def _normal_tail(z: Tensor) -> Tensor:
    """Integrate Φ from −∞ to z."""
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    integral: Tensor = z * torch.special.ndtr(z) + density
    return integral


First = TypeVar("First")
Second = TypeVar("Second")

_SMALL, _LARGE = 2**22, 2**26
_BEGINNING = Lock()


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of any devices on the CPU; those that are there are not copied.

    What comes from a GPU goes through pinned memory, beside the work that the GPU has, and is
    waited for once, for all of it. Until then other threads can give the GPU more work, which a
    copy to ordinary memory would not let them. That is how tensors of more than 64 MiB go, so that
    little memory is pinned. Tensors of more than 4 MiB are returned as they lie there: copy what is
    to be kept of them.
    """
    found = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        if _is_pinned(tensor)
        else tensor.cpu()
        for tensor in tensors
    ]
    pairs = list(zip(tensors, found, strict=True))
    devices = {tensor.device for tensor in tensors if _is_pinned(tensor)}
    events = [
        _copied([pair for pair in pairs if pair[0].device == device], device) for device in devices
    ]
    for event in events:
        event.synchronize()
    return [here.clone() if _is_pinned(there, _SMALL) else here for there, here in pairs]


def _copied(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> torch.cuda.Event:
    """Begin to copy tensors of a GPU into pinned ones; return what happens when that is done."""
    stream, before = _copying(device), torch.cuda.current_stream(device)
    with _BEGINNING, torch.cuda.stream(stream):
        stream.wait_stream(before)
        for there, here in pairs:
            if _is_pinned(there):
                here.copy_(there, non_blocking=True)
        done: torch.cuda.Event = stream.record_event()
    return done


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU that copies to the CPU, which several threads share."""
    return torch.cuda.Stream(device)


def _is_pinned(tensor: Tensor, most: int = _LARGE) -> bool:
    """Tell whether a tensor goes through pinned memory, and has at most so many bytes."""
    return tensor.is_cuda and tensor.numel() * tensor.element_size() <= most


def fetched(first: First, second: Second) -> tuple[First, Second]:
    """Return two dataclasses with all their tensors on the CPU, as `to_host` brings them.

    Parameters
    ----------
    first, second
        Frozen dataclasses, or None, which stays None.
    """
    held = [_tensors(first), _tensors(second)]
    here = iter(to_host([tensor for one in held for tensor in one.values()]))
    moved: list[dict[str, Any]] = [{name: next(here) for name in one} for one in held]
    return _with(first, moved[0]), _with(second, moved[1])


def _tensors(part: object) -> dict[str, Tensor]:
    """Return the fields of a dataclass that are tensors."""
    names = [f.name for f in fields(part)] if is_dataclass(part) else []
    return {name: getattr(part, name) for name in names if isinstance(getattr(part, name), Tensor)}


def _with(part: Any, tensors: dict[str, Any]) -> Any:
    """Return a dataclass with other tensors."""
    return replace(part, **tensors) if tensors else part


def power_sums(x: Tensor, square: Tensor, cube: Tensor) -> tuple[Tensor, ...]:
    """Return the sums over tokens of the first four powers of x; the others are work space."""
    torch.mul(x, x, out=square)
    torch.mul(square, x, out=cube)
    first, second, third = x.sum(0), square.sum(0), cube.sum(0)
    return first, second, third, square.mul_(square).sum(0)


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population standard deviation from the first two raw moments."""
    shift = moments[0]
    return shift, (moments[1] - shift.square()).clamp_min(0).sqrt()


def higher_moments(moments: Tensor, shift: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return skewness and excess kurtosis from four raw moments."""
    _, second, third, fourth = moments
    central3 = third - 3 * shift * second + 2 * shift**3
    central4 = fourth - 4 * shift * third + 6 * shift.square() * second - 3 * shift**4
    return central3 / spread**3, central4 / spread**4 - 3


GROUP_FOLD = 8
"""Bins that are one in the histograms of the groups."""

LEAST_SPREAD = 1e-3
"""Of |mean − location|: squares summed in float32 resolve no smaller spread."""


def bytes_a_neuron(n_groups: int) -> int:
    """Return the bytes that the histograms of an `OutputSketch` take of a neuron, at least."""
    return 4 * (N_BINS + (n_groups + 1) * (N_BINS // GROUP_FOLD))


def resampled(
    counts: Int32[Tensor, "groups neurons folded"],
    powers: Float[Tensor, "groups two=2 neurons"],
    tokens: Int64[Tensor, " groups *layers"],
    low: Float[Tensor, " neurons"],
    high: Float[Tensor, " neurons"],
) -> tuple[
    Float[Tensor, " neurons"], Float[Tensor, "halves=2 neurons"], Float[Tensor, "groups neurons"]
]:
    """Return the jackknife's standard error of WD, and WD of the even and the odd groups.

    At last WD without each group, NaN of one without tokens.

    Parameters
    ----------
    counts
        Histogram of each group, `GROUP_FOLD` bins joined.
    powers
        Sums of x and its square over each group, in units of the bins, float64.
    tokens
        Tokens of each group, on the CPU; empty groups are left out. NaN below two others. Or of
        each group of several layers, which have equally many of the neurons and the same empty
        groups.
    low, high
        Smallest and largest x.
    """
    tokens = tokens.reshape(len(tokens), -1)
    used = tokens.any(1).nonzero()[:, 0].tolist()
    each = torch.full_like(powers[:, 0], math.nan)
    if len(used) < 2:
        nothing = torch.full_like(powers[0], math.nan)
        return nothing[0], nothing, each
    asked = [*(tuple(g for g in used if g != left_out) for left_out in used),
             tuple(used[::2]), tuple(used[1::2])]  # fmt: skip
    sets = list(dict.fromkeys(asked))  # of two groups, each half is one without the other
    chosen = torch.zeros(len(sets), len(tokens), dtype=torch.int32)
    for row, members in zip(chosen, sets, strict=True):
        row[list(members)] = 1
    totals = (chosen.long() @ tokens).to(powers.device, non_blocking=True)
    chosen = chosen.to(powers.device, non_blocking=True)
    moments = _sums_of_sets(powers, chosen)
    moments = moments / totals.repeat_interleave(moments.shape[-1] // totals.shape[1], 1)
    shift, spread = mean_and_std(moments)
    found = binned_at_once(counts, chosen, shift, spread, low, high, fold=GROUP_FOLD)[0]
    found = found.masked_fill(spread <= LEAST_SPREAD * shift.abs(), math.nan)
    wd = torch.stack([found[sets.index(members)] for members in asked])
    without = wd[: len(used)]
    for row, group in enumerate(used):
        each[group] = without[row]
    return jackknife_error(without), wd[len(used) :], each


def _one_after_the_other(powers: Tensor, chosen: Tensor) -> Tensor:
    sums = [sum_groups(powers[row > 0]) for row in chosen]
    return torch.stack(sums, 1)


@dispatch(_one_after_the_other, where=on_cpu)
def _sums_of_sets(powers: Tensor, chosen: Tensor) -> Tensor:
    """Sum powers (groups, two, neurons) over the groups of each set, (two, sets, neurons)."""
    return torch.einsum("sg,gpn->psn", chosen.to(powers), powers)


def sum_groups(groups: Float[Tensor, "*groups neurons"]) -> Float[Tensor, "*others neurons"]:
    """Sum over the groups one after the other, whatever lies beside a neuron."""
    total: Tensor = reduce(torch.add, groups)
    return total


def jackknife_error(without: Float[Tensor, "groups neurons"]) -> Float[Tensor, " neurons"]:
    """Return the jackknife's standard error of what was found without each group."""
    n = len(without)
    spread = without - sum_groups(without) / n
    return ((n - 1) / n * sum_groups(spread.square())).sqrt()


def has_kernels(counts: Int32[Tensor, "*groups neurons bins"]) -> bool:
    """Tell whether `binned_at_once` and `resampled` take histograms."""
    return usable(counts) or binned.fits(counts)


def _at_once_on_cpu(
    counts: Tensor,
    weights: Tensor,
    shift: Tensor,
    spread: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    fold: int,
) -> Tensor:
    return binned.binned_distances(
        counts, weights, shift=shift, spread=spread, low=low, high=high,
        edges=joined_edges(fold, torch.float64, counts.device),
        ends=signed_index(torch.stack([low, high])) // fold,
    )  # fmt: skip


@dispatch(_at_once_on_cpu, where=on_cpu)
def binned_at_once(
    counts: Tensor,
    weights: Tensor,
    shift: Tensor,
    spread: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    fold: int,
) -> Tensor:
    """Return WD, its bound and KS of sets of groups, (3, sets, neurons), in one kernel."""
    return fused_binned_distances(
        counts, weights, shift=shift.contiguous(), spread=spread.contiguous(),
        low=low.contiguous(), high=high.contiguous(),
        edges=joined_edges(fold, shift.dtype, shift.device),
    )  # fmt: skip


@lru_cache(maxsize=16)
def joined_edges(fold: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the edges of the bins, every ``fold`` bins joined."""
    return torch.from_numpy(np.ascontiguousarray(signed_edges(fold))).to(device, dtype)
