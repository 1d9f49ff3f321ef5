import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entangle.stats.bins import fold_counts, magnitude_index, signed_index
from entangle.stats.edges import HALF, N_BINS, PER_OCTAVE, magnitude_edges, signed_edges

float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _searched(x: NDArray[np.float32], n_bins: int) -> NDArray[np.int64]:
    """Find the bin of |x| by binary search, with 1 + |x| rounded to float32 like in the package."""
    magnitude = (np.float32(1) + np.abs(x)).astype(np.float64) - 1
    found = np.searchsorted(magnitude_edges(n_bins), magnitude, side="right") - 1
    return found.clip(0, n_bins - 1)


def _edges_in_plain_words() -> list[float]:
    """64 bins over [0, 1), 64 over [1, 3), 64 over [3, 7), …"""
    edges, start = [0.0], 0.0
    for octave in range(12):
        width = 2.0**octave / 64
        edges += [start + width * (step + 1) for step in range(64)]
        start = edges[-1]
    return edges


def test_edges() -> None:
    np.testing.assert_array_equal(magnitude_edges(HALF), _edges_in_plain_words())
    assert magnitude_edges(HALF)[[64, 128, 192]].tolist() == [1.0, 3.0, 7.0]
    edges = signed_edges()
    assert edges.shape == (N_BINS + 1,)
    np.testing.assert_array_equal(edges, -edges[::-1])
    assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-6, 0.1, 1.0, 30.0, 4000.0, 1e9, 1e37])
def test_index_agrees_with_a_search_in_the_edges(scale: float) -> None:
    x = (np.random.default_rng(0).standard_normal(20_000) * scale).astype(np.float32)
    found = _searched(x, HALF)
    expected = np.where(x < 0, HALF - 1 - found, HALF + found)
    np.testing.assert_array_equal(signed_index(torch.from_numpy(x)).numpy(), expected)
    np.testing.assert_array_equal(
        magnitude_index(torch.from_numpy(np.abs(x)), 192).numpy(), _searched(x, 192)
    )


def test_hand_worked_indices() -> None:
    x = torch.tensor([0.0, -0.0, 1 / 64, -1 / 64, -1e-30, 0.99, 1.0, 1.03125, -1.0, 1e30, -1e30])
    expected = [768, 768, 769, 766, 767, 831, 832, 833, 703, 1535, 0]
    assert signed_index(x).tolist() == expected
    assert signed_index(torch.tensor([torch.inf, -torch.inf])).tolist() == [N_BINS - 1, 0]


def test_every_edge_opens_its_own_bin() -> None:
    edges = torch.from_numpy(magnitude_edges(HALF)[:-1]).float()
    assert magnitude_index(edges, HALF).tolist() == list(range(HALF))
    above = signed_index(torch.from_numpy(signed_edges()[HALF:-1]).float())
    assert above.tolist() == list(range(HALF, N_BINS))


@settings(deadline=None)
@given(x=float32)
def test_index_is_symmetric(x: float) -> None:
    here, there = signed_index(torch.tensor([x, -x])).tolist()
    assert here + there == (N_BINS - 1 if x != 0 else 2 * HALF)


@settings(deadline=None)
@given(values=st.lists(float32, min_size=2, max_size=20))
def test_index_is_monotone_and_keeps_its_input(values: list[float]) -> None:
    x = torch.tensor(sorted(values))
    before = x.clone()
    assert (signed_index(x).diff() >= 0).all()
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("fold", [1, 2, 8, 64])
def test_folding_counts_is_counting_in_folded_bins(fold: int) -> None:
    x = np.random.default_rng(1).standard_t(1, 5000).astype(np.float32)
    index = signed_index(torch.from_numpy(x)).long()
    counts = torch.bincount(index, minlength=N_BINS).to(torch.int32)
    folded = fold_counts(counts.repeat(3, 1), fold)
    inner = signed_edges(fold)[1:-1]
    rounded = np.sign(x) * ((np.float32(1) + np.abs(x)).astype(np.float64) - 1)
    expected = np.bincount(np.searchsorted(inner, rounded, side="right"), minlength=len(inner) + 1)
    # a negative value on an edge belongs to the bin below it; there is none in this sample
    assert not np.isin(rounded[x < 0], inner).any()
    assert folded.dtype == torch.int32
    np.testing.assert_array_equal(folded.numpy(), np.tile(expected, (3, 1)))
    assert signed_edges(fold).shape == (N_BINS // fold + 1,)


def test_relative_resolution() -> None:
    edges = magnitude_edges(HALF)
    assert (np.diff(edges) / (1 + edges[:-1]) <= 1 / PER_OCTAVE).all()
