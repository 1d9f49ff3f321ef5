"""Edges of the bins that outputs are counted in (see `entangle.stats.bins`); no torch here."""

from functools import lru_cache

import numpy as np

PER_OCTAVE = 64
OCTAVES = 12
HALF = PER_OCTAVE * OCTAVES
N_BINS = 2 * HALF
SAVED_FOLD = 4
"""Bins that are one in the histograms that are kept."""


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
