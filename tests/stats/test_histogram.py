import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ndtr

from entangle.stats.bins import BinnedDistances, binned_distances
from tests.reference.wasserstein import w1_along_x, w1_of_histogram

Array = NDArray[np.float64]


def _binned(counts: Array, edges: Array) -> BinnedDistances:
    return binned_distances(torch.from_numpy(counts[None]), torch.from_numpy(edges[None]))


@st.composite
def histograms(draw: st.DrawFn, *, widest: float) -> tuple[Array, Array]:
    """Counts and ascending edges, with empty bins and bins of no width among them."""
    n = draw(st.integers(1, 12))
    counts = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 3.0, 50.0]), min_size=n, max_size=n))
    counts[draw(st.integers(0, n - 1))] += 1.0
    steps = st.sampled_from([0.0, 0.02, widest / 3, widest])
    widths = draw(st.lists(steps, min_size=n, max_size=n))
    start = draw(st.floats(-widest * n, 1.0))
    return np.array(counts), start + np.concatenate([[0.0], np.cumsum(widths)])


def test_hand_worked_single_bin() -> None:
    # All mass even over [5, 6]: but for less than 1e-7, F lies below Φ everywhere, so WD is the
    # difference of the means, 5.5 − 0. The mass may lie anywhere in a bin of width 1: ± 1/2.
    binned = _binned(np.array([3.0]), np.array([5.0, 6.0]))
    assert binned.wd.item() == pytest.approx(5.5, abs=1e-6)
    assert binned.wd_bound.item() == pytest.approx(0.5, abs=1e-6)
    assert binned.ks.item() == pytest.approx(1.0, abs=1e-6)


def test_hand_worked_atom() -> None:
    # One bin of no width at 0: F is a step, WD = E|N(0, 1)| = sqrt(2/π), known without error.
    binned = _binned(np.array([0.0, 7.0, 0.0]), np.array([-1.0, 0.0, 0.0, 1.0]))
    assert binned.wd.item() == pytest.approx(math.sqrt(2 / math.pi), abs=1e-12)
    assert binned.wd_bound.item() < 0.1  # the empty bins, where Φ bends
    assert binned.ks.item() == pytest.approx(0.5)


@settings(max_examples=60, deadline=None)
@given(histogram=histograms(widest=0.12))
def test_wd_of_mass_spread_evenly(histogram: tuple[Array, Array]) -> None:
    counts, edges = histogram
    binned = _binned(counts, edges)
    # Φ is taken as its chord in bins where it crosses F: w³ max|Φ''| / 6 at w = 0.12 is 7e-5.
    assert binned.wd.item() == pytest.approx(w1_of_histogram(counts, edges, steps=500), abs=8e-5)


def _placed(counts: Array, edges: Array, fractions: list[float], split: list[bool]) -> float:
    """Return the W1 to N(0, 1) of atoms placed inside the bins, halves of some at both ends."""
    left, width = edges[:-1], np.diff(edges)
    fraction = np.array(fractions)
    high = left + fraction * width
    low = np.where(np.array(split), left, high)
    both = np.concatenate([counts * (1 - fraction), counts * fraction])
    return w1_along_x(np.concatenate([low, high, edges[[0, -1]]]), np.append(both, [0.0, 0.0]))


@settings(max_examples=150, deadline=None)
@given(
    histogram=st.one_of(histograms(widest=0.1), histograms(widest=1.0), histograms(widest=12.0)),
    data=st.data(),
)
def test_no_placement_inside_the_bins_exceeds_the_bound(
    histogram: tuple[Array, Array], data: st.DataObject
) -> None:
    counts, edges = histogram
    n = len(counts)
    spots = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
    fractions = data.draw(st.lists(spots, min_size=n, max_size=n))
    split = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    binned = _binned(counts, edges)
    true = _placed(counts, edges, fractions, split)
    assert abs(binned.wd.item() - true) <= binned.wd_bound.item() + 1e-9


@pytest.mark.parametrize("width", [0.1, 1.0, 3.0, 10.0, 1000.0])
@pytest.mark.parametrize("inside", [0.0, 0.2, 1.0])
def test_bound_covers_wide_bins_around_the_centre(width: float, inside: float) -> None:
    counts, edges = np.array([1.0, 2 * inside, 1.0]), np.array([-1.0, -0.5, 0.5, 1.0]) * width
    binned = _binned(counts, edges)
    for fraction in (0.0, 0.5, 1.0):
        true = _placed(counts, edges, [fraction, 0.5, 1 - fraction], [False] * 3)
        assert abs(binned.wd.item() - true) <= binned.wd_bound.item() + 1e-9


def test_rows_do_not_mix_and_inputs_stay() -> None:
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(0, 9, (5, 20)))
    edges = torch.from_numpy(np.sort(rng.standard_normal((5, 21)), axis=1))
    kept = counts.clone(), edges.clone()
    together = binned_distances(counts, edges)
    for i in range(5):
        alone = binned_distances(counts[i : i + 1], edges[i : i + 1])
        for name in ("wd", "wd_bound", "ks"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[i])
    assert torch.equal(counts, kept[0])
    assert torch.equal(edges, kept[1])


def test_ks_is_the_largest_gap_at_the_edges() -> None:
    counts, edges = np.array([1.0, 0.0, 3.0]), np.array([-2.0, 0.0, 0.5, 1.0])
    gaps = np.abs(np.array([0, 0.25, 0.25, 1.0]) - ndtr(edges))
    assert _binned(counts, edges).ks.item() == pytest.approx(gaps.max(), abs=1e-14)


def test_empty_histogram_is_nan() -> None:
    assert _binned(np.zeros(3), np.arange(4.0)).wd.isnan().all()


@pytest.mark.parametrize(
    ("left", "right", "chord"),
    [
        # w³ max|Φ''| / 12 with max|Φ''| = φ(1) = 0.24197072: the curve within a narrow bin
        (-0.05, 0.05, 0.1**3 * 0.24197072451914337 / 12),
        (1.0, 1.5, 0.5**3 * 0.24197072451914337 / 12),
        # half of rise times width, Φ(3) − Φ(−3) = 0.9973002: Φ is monotone over a wide bin
        (-3.0, 3.0, 0.9973002039367398 * 6 / 2),
    ],
)
def test_the_bound_by_hand(left: float, right: float, chord: float) -> None:
    """Half of mass times width where the mass lies, and twice the area between Φ and its chord."""
    one = _binned(np.array([1.0]), np.array([left, right]))
    assert one.wd_bound.item() == pytest.approx((right - left) / 2 + 2 * chord, abs=1e-12)
    two = _binned(np.array([1.0, 3.0]), np.array([left, right, right]))  # a quarter of the mass
    assert two.wd_bound.item() == pytest.approx((right - left) / 8 + 2 * chord, abs=1e-12)


def test_wd_of_a_bin_that_phi_crosses_by_hand() -> None:
    """Mass even over [−1, 1]: |F − Φ| by triangles under the chord of Φ, and the tails of Φ.

    At the edges F − Φ is ∓Φ(−1); the straight line between them makes two triangles of width 1 and
    height Φ(−1) = 0.158655, of area 0.158655 together; each tail of Φ has φ(1) − Φ(−1).
    """
    tail = 0.24197072451914337 - 0.15865525393145707
    found = _binned(np.array([4.0]), np.array([-1.0, 1.0])).wd.item()
    assert found == pytest.approx(0.15865525393145707 + 2 * tail, abs=1e-12)
