"""Bins that cover the whole real line with a fixed relative resolution.

A value x (in units of a neuron's core width, from its median) is binned by the leading bits of
1 + |x| as a float32 number: 64 bins of equal width over [0, 1), 64 over [1, 3), 64 over [3, 7)
and so on, mirrored for negative values. Integer arithmetic on the bits replaces a search, and a
distribution with a sharp core and far outliers is resolved in both.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from entangle.stats.scratch import Scratch

PER_OCTAVE = 64
OCTAVES = 12
HALF = PER_OCTAVE * OCTAVES
N_BINS = 2 * HALF
SAVED_FOLD = 4
"""Bins that are one in the histograms that are kept."""

_SHIFT = 23 - PER_OCTAVE.bit_length() + 1
_LANES = 4
_ONE = 0x3F800000 >> _SHIFT  # the leading bits of 1.0


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


@lru_cache(maxsize=8)
def magnitude_edges(n_bins: int) -> np.ndarray:
    """Return the n_bins + 1 edges of the bins of `magnitude_index`, float64."""
    k = np.arange(n_bins + 1)
    octave, step = np.divmod(k, PER_OCTAVE)
    return np.exp2(octave) * (1 + step / PER_OCTAVE) - 1


@lru_cache(maxsize=8)
def signed_edges(fold: int = 1) -> np.ndarray:
    """Return the edges of the bins of `signed_index`, every ``fold`` bins joined; float64."""
    edges = magnitude_edges(HALF)
    return np.concatenate([-edges[:0:-1], edges])[::fold]


def fold_counts(counts: Tensor, fold: int) -> Tensor:
    """Join every ``fold`` neighbouring bins of counts of shape (..., bins)."""
    grouped = counts.reshape(*counts.shape[:-1], -1, fold)
    return grouped.sum(-1, dtype=counts.dtype)
