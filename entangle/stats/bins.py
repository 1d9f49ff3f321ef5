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

PER_OCTAVE = 64
OCTAVES = 12
HALF = PER_OCTAVE * OCTAVES
N_BINS = 2 * HALF

_SHIFT = 23 - PER_OCTAVE.bit_length() + 1
_ONE = 0x3F800000 >> _SHIFT  # the leading bits of 1.0


def magnitude_index(magnitude: Float[Tensor, "*shape"], n_bins: int) -> Int32[Tensor, "*shape"]:
    """Return the bin of each non-negative float32 value, in [0, n_bins); the last one is open."""
    bits = (magnitude + 1).view(torch.int32)
    return bits.bitwise_right_shift_(_SHIFT).sub_(_ONE).clamp_(max=n_bins - 1)


def signed_index(x: Float[Tensor, "*shape"]) -> Int32[Tensor, "*shape"]:
    """Return the bin of each float32 value, in [0, N_BINS); the outermost two are open."""
    sign = (x < 0).to(torch.int32).neg_()  # −1 where negative: k → −1 − k is a bitwise not
    return magnitude_index(x.abs(), HALF).bitwise_xor_(sign).add_(HALF)


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
