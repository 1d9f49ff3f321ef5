"""The jackknife over groups of sequences on a GPU, from the groups' histograms."""

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from entangle.kernels.binned import binned_distances
from entangle.stats import bins
from entangle.stats.moments import mean_and_std

GROUP_FOLD = 8
"""Bins that are one in the histograms of the groups."""

LEAST_SPREAD = 1e-3
"""Of |mean − location|: squares summed in float32 resolve no smaller spread."""


def resample_on_gpu(
    counts: Int32[Tensor, "groups neurons folded"],
    powers: Float[Tensor, "groups two=2 neurons"],
    tokens: Int64[Tensor, " groups"],
    low: Float[Tensor, " neurons"],
    high: Float[Tensor, " neurons"],
) -> tuple[Float[Tensor, " neurons"], Float[Tensor, "halves=2 neurons"]]:
    """Return the jackknife's standard error of WD and the WD of the even and the odd groups.

    Parameters
    ----------
    counts
        Histogram of each group, `GROUP_FOLD` bins joined.
    powers
        Sums of x and its square over each group, in units of the bins, float64.
    tokens
        Tokens of each group, on the CPU; empty groups are left out. NaN below two others.
    low, high
        Smallest and largest x.
    """
    used = tokens.nonzero()[:, 0].tolist()
    if len(used) < 2:
        nothing = torch.full_like(powers[0], math.nan)
        return nothing[0], nothing
    sets = [*([g for g in used if g != left_out] for left_out in used), used[::2], used[1::2]]
    chosen = torch.zeros(len(sets), len(tokens), dtype=torch.int32)
    for row, members in zip(chosen, sets, strict=True):
        row[members] = 1
    totals = (chosen.long() * tokens).sum(1).to(powers.device, non_blocking=True)
    chosen = chosen.to(powers.device, non_blocking=True)
    moments = torch.einsum("sg,gpn->psn", chosen.to(powers), powers) / totals[:, None]
    shift, spread = mean_and_std(moments)
    wd = binned_on_gpu(counts, chosen, shift, spread, low, high, fold=GROUP_FOLD)[0]
    wd = wd.masked_fill(spread <= LEAST_SPREAD * shift.abs(), math.nan)
    without = wd[: len(used)]
    return ((len(used) - 1) * without.var(0, correction=0)).sqrt(), wd[len(used) :]


def binned_on_gpu(
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
    return binned_distances(
        counts, weights, shift=shift.contiguous(), spread=spread.contiguous(),
        low=low.contiguous(), high=high.contiguous(),
        edges=joined_edges(fold, shift.dtype, shift.device),
    )  # fmt: skip


@lru_cache(maxsize=16)
def joined_edges(fold: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the edges of the bins, every ``fold`` bins joined."""
    return torch.from_numpy(np.ascontiguousarray(bins.signed_edges(fold))).to(device, dtype)
