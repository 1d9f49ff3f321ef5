import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtri
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.stats import wasserstein
from entangle.stats.wasserstein import ShapeStatistics, null_floor, shape_statistics, sort_rows
from tests.reference.wasserstein import exact_wd, standardised, w1_along_x, w1_by_quadrature

Array = NDArray[np.float64]
FIELDS = ("wd", "ks", "mean", "std", "skewness", "excess_kurtosis")
SHAPES = ("normal", "t3", "skewed", "bimodal", "uniform", "lattice", "outlier", "atom")


def _sample(shape: str, n: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(n)
    drawn = {
        "normal": normal,
        "t3": rng.standard_t(3, n),
        "skewed": rng.exponential(size=n),
        "bimodal": normal + np.where(rng.random(n) < 0.3, -4, 4),
        "uniform": rng.random(n),
        "lattice": np.round(2 * normal),
        "outlier": np.where(np.arange(n) == n // 2, 3000.0, normal),
        "atom": np.where(rng.random(n) < 0.7, 0.0, normal),
    }
    return np.asarray(drawn[shape], dtype=np.float64)


def _rows(n: int = 200) -> Tensor:
    return torch.from_numpy(np.stack([_sample(shape, n) for shape in SHAPES]))


def _of(y: Array) -> ShapeStatistics:
    return shape_statistics(torch.from_numpy(np.ascontiguousarray(y))[None])


def _assert_equal(a: ShapeStatistics, b: ShapeStatistics, *, tol: float) -> None:
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tol, atol=tol, equal_nan=True, msg=name
        )
    for name in ("constant", "nan", "inf"):
        assert torch.equal(getattr(a, name), getattr(b, name))


# --- independent references ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 17, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_wd_agrees_with_quadrature(shape: str, n: int) -> None:
    y = _sample(shape, n)
    if y.std() == 0:
        y[0] = 1.0
    assert _of(y).wd.item() == pytest.approx(w1_by_quadrature(standardised(y)), abs=1e-9)


@pytest.mark.parametrize("n", [5_000, 131_072])
@pytest.mark.parametrize("shape", SHAPES)
def test_wd_of_many_tokens_agrees_with_the_integral_along_x(shape: str, n: int) -> None:
    assert _of(_sample(shape, n)).wd.item() == pytest.approx(exact_wd(_sample(shape, n)), abs=1e-9)


def test_the_two_references_agree() -> None:
    for shape in SHAPES:
        z = standardised(_sample(shape, 60))
        assert w1_along_x(z) == pytest.approx(w1_by_quadrature(z), abs=1e-11)


@pytest.fixture(scope="module")
def quantile_grid() -> Array:
    """Return midpoint quantiles of N(0, 1), whose own distance to N(0, 1) is below 4e-5.

    By the triangle inequality a library's W1 between a sample and this grid differs from the
    distance to N(0, 1) by no more. In each cell the grid's distance is
    ∫_a^b |q(m) − q(u)| du = 2φ(q(m)) − φ(q(a)) − φ(q(b)), m the midpoint of (a, b).
    """
    size = 2**16
    density = stats.norm.pdf(ndtri(np.arange(size + 1) / size))
    grid: Array = ndtri((np.arange(size) + 0.5) / size)
    assert (2 * stats.norm.pdf(grid) - density[:-1] - density[1:]).sum() < 4e-5
    return grid


@pytest.mark.parametrize("shape", SHAPES)
def test_wd_agrees_with_scipy_and_pot(shape: str, quantile_grid: Array) -> None:
    z = standardised(_sample(shape, 3000))
    wd = _of(z).wd.item()
    assert stats.wasserstein_distance(z, quantile_grid) == pytest.approx(wd, abs=1e-4)
    pot = ot.wasserstein_1d(z, quantile_grid, p=1)  # p = 2 would give the squared distance
    assert float(pot) == pytest.approx(wd, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [3, 1000])
def test_ks_and_moments_agree_with_scipy(shape: str, n: int) -> None:
    y = _sample(shape, n, seed=1)
    y[0] += 0.5
    found = _of(y)
    assert found.ks.item() == pytest.approx(stats.kstest(standardised(y), "norm").statistic, 1e-9)
    assert found.mean.item() == pytest.approx(y.mean(), abs=1e-12)
    assert found.std.item() == pytest.approx(y.std(), rel=1e-12)
    assert found.skewness.item() == pytest.approx(stats.skew(y), rel=1e-9, abs=1e-9)
    assert found.excess_kurtosis.item() == pytest.approx(stats.kurtosis(y), rel=1e-9, abs=1e-9)


# --- worked by hand -----------------------------------------------------------------------------


def test_two_values_by_hand() -> None:
    # {−1, 1} is standardised already. WD = 2 ∫_½^1 |1 − q(u)| du, q = Φ⁻¹, which is below 1 up to
    # u = Φ(1). With ∫q = −φ(q): ∫_½^Φ(1) (1 − q) = Φ(1) − ½ + φ(1) − φ(0) and
    # ∫_Φ(1)^1 (q − 1) = φ(1) − 1 + Φ(1), so WD = 2·(2Φ(1) − 3/2 + 2φ(1) − φ(0)).
    # The largest gap |F − Φ| is at ±1: KS = Φ(1) − ½.
    big_phi, phi1, phi0 = 0.8413447460685429, 0.24197072451914337, 0.3989422804014327
    found = _of(np.array([-1.0, 1.0]))
    assert found.wd.item() == pytest.approx(2 * (2 * big_phi - 1.5 + 2 * phi1 - phi0), abs=1e-14)
    assert found.wd.item() == pytest.approx(0.5353773, abs=1e-7)
    assert found.ks.item() == pytest.approx(big_phi - 0.5, abs=1e-14)
    assert (found.mean.item(), found.std.item()) == (0.0, 1.0)
    assert (found.skewness.item(), found.excess_kurtosis.item()) == (0.0, -2.0)


def test_gaussian_quantiles_score_almost_zero() -> None:
    n = 100_000
    assert _of(ndtri((np.arange(n) + 0.5) / n)).wd.item() < 1e-4


def test_one_far_value_among_equals_by_hand() -> None:
    # n − 1 zeros and one value: as n grows z → 0 for all but one and WD → E|N(0, 1)| = √(2/π);
    # skewness is (n − 2)/√(n − 1) exactly.
    y = np.zeros(10**6)
    y[7] = 5.0
    found = _of(y)
    assert found.wd.item() == pytest.approx(math.sqrt(2 / math.pi), abs=2e-3)
    assert found.skewness.item() == pytest.approx((10**6 - 2) / math.sqrt(10**6 - 1), rel=1e-9)


# --- properties ---------------------------------------------------------------------------------

finite = st.floats(-1000, 1000)
samples = st.lists(finite, min_size=2, max_size=40)


def _spread_out(values: list[float]) -> Array:
    y = np.array(values)
    assume(y.std() > 1e-3)
    return y


@settings(deadline=None)
@given(values=samples)
def test_wd_by_hypothesis_agrees_with_the_reference(values: list[float]) -> None:
    y = _spread_out(values)
    found = _of(y)
    assert found.wd.item() == pytest.approx(exact_wd(y), abs=1e-9)
    assert 0 <= found.wd.item() <= math.sqrt(2)  # W1 ≤ W2 ≤ √(1 + 1), both standardised
    assert 0.5 / len(y) - 1e-12 <= found.ks.item() <= 1


@settings(deadline=None)
@given(values=samples, a=st.floats(0.01, 100), sign=st.sampled_from([-1, 1]), b=finite)
def test_shape_is_unchanged_by_an_affine_map(
    values: list[float], a: float, sign: int, b: float
) -> None:
    y = _spread_out(values)
    one, two = _of(y), _of(sign * a * y + b)
    assert two.wd.item() == pytest.approx(one.wd.item(), abs=1e-7)
    assert two.ks.item() == pytest.approx(one.ks.item(), abs=1e-7)
    assert two.std.item() == pytest.approx(a * one.std.item(), rel=1e-7)
    assert two.skewness.item() == pytest.approx(sign * one.skewness.item(), rel=1e-5, abs=1e-5)


@settings(deadline=None)
@given(values=samples, seed=st.integers(0, 99))
def test_order_of_tokens_does_not_matter(values: list[float], seed: int) -> None:
    y = _spread_out(values)
    shuffled = np.random.default_rng(seed).permutation(y)
    _assert_equal(_of(y), _of(shuffled), tol=1e-12)


@settings(deadline=None)
@given(values=samples, times=st.integers(2, 7))
def test_repeating_every_token_changes_nothing(values: list[float], times: int) -> None:
    y = _spread_out(values)
    one, two = _of(y), _of(np.repeat(y, times))
    for name in FIELDS:
        assert getattr(two, name).item() == pytest.approx(getattr(one, name).item(), abs=1e-7)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e-5, 1e5, 1e30, 1e150])
def test_scale_over_the_range_of_float64(scale: float) -> None:
    one, two = shape_statistics(_rows()), shape_statistics(_rows() * scale)
    torch.testing.assert_close(one.wd, two.wd, rtol=1e-11, atol=0)
    torch.testing.assert_close(one.excess_kurtosis, two.excess_kurtosis, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens_at_once", [1, 3, 100])
def test_chunks_of_rows_do_not_matter(tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shape_statistics(_rows())
    monkeypatch.setattr(wasserstein, "_SORT_BYTES", 4 * 200 * tokens_at_once)
    monkeypatch.setattr(wasserstein, "_CACHE_BYTES", 8 * 200)
    _assert_equal(shape_statistics(_rows()), whole, tol=1e-14)


def test_a_row_alone_is_the_row_in_a_batch_and_inputs_stay() -> None:
    rows = _rows()
    kept = rows.clone()
    together = shape_statistics(rows)
    for i in range(len(SHAPES)):
        alone = shape_statistics(rows[i : i + 1])
        for name in FIELDS:
            assert getattr(alone, name)[0].item() == pytest.approx(
                getattr(together, name)[i].item(), rel=1e-13, abs=1e-13
            )
    assert torch.equal(rows, kept)


def test_strided_views_and_gradients_are_accepted() -> None:
    rows = _rows()
    turned = rows.t().contiguous().t()
    assert not turned.is_contiguous()
    _assert_equal(shape_statistics(turned), shape_statistics(rows), tol=1e-13)
    found = shape_statistics(rows.clone().requires_grad_())
    assert not found.wd.requires_grad


# --- dtypes and precision -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_is_measured_in_float64(dtype: torch.dtype) -> None:
    rows = _rows(1000).to(dtype)
    found = shape_statistics(rows)
    assert found.wd.dtype == torch.float64
    for i, row in enumerate(rows.double().numpy()):
        assert found.wd[i].item() == pytest.approx(exact_wd(row), abs=1e-9)
        assert found.std[i].item() == pytest.approx(row.std(), rel=1e-9)


def test_a_million_float32_tokens_keep_their_digits() -> None:
    y = (np.random.default_rng(0).exponential(size=10**6) + 100).astype(np.float32)
    found = shape_statistics(torch.from_numpy(y)[None])
    assert found.wd.item() == pytest.approx(exact_wd(y.astype(np.float64)), abs=1e-9)
    assert found.mean.item() == pytest.approx(y.astype(np.float64).mean(), rel=1e-12)


def test_huge_mean_with_tiny_spread() -> None:
    y = 1e8 + 1e-3 * _sample("skewed", 2000)
    # Neighbours of 1e8 lie 1.5e-8 apart, and so does the mean from its exact value: 1.5e-5 σ.
    assert _of(y).wd.item() == pytest.approx(exact_wd(y - 1e8), abs=2e-5)
    single = (1000 + 0.01 * _sample("skewed", 2000)).astype(np.float32)
    found = shape_statistics(torch.from_numpy(single)[None])
    assert not found.constant.item()
    assert found.wd.item() == pytest.approx(exact_wd(single.astype(np.float64)), abs=1e-9)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-41), (torch.float16, 1e-6)])
def test_denormal_outputs(dtype: torch.dtype, unit: float) -> None:
    y = torch.from_numpy(_sample("skewed", 500) * unit).to(dtype)
    assert y.abs().max() < torch.finfo(dtype).tiny
    found = shape_statistics(y[None])
    assert found.wd.item() == pytest.approx(exact_wd(y.double().numpy() / unit), abs=1e-9)


# --- edges --------------------------------------------------------------------------------------


def _assert_no_score(found: ShapeStatistics, row: int = 0) -> None:
    assert all(math.isnan(getattr(found, name)[row]) for name in FIELDS)


@pytest.mark.parametrize("n", [1, 2, 1000, 65_537, 999_983])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.7e-5, 1e8 + 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant(value: float, n: int, dtype: torch.dtype) -> None:
    found = shape_statistics(torch.full((1, n), value, dtype=dtype))
    assert found.constant.item()
    assert not found.nan.item()
    assert not found.inf.item()
    _assert_no_score(found)


def test_variation_within_rounding_is_constant() -> None:
    y = torch.full((1, 100), 1.0)
    y[0, ::2] += torch.finfo(torch.float32).eps
    assert shape_statistics(y).constant.item()
    y[0, ::2] += 1e-4
    assert not shape_statistics(y).constant.item()


def test_nan_and_infinity_are_flagged_and_stay_in_their_row() -> None:
    rows = _rows()[[0, 0, 0, 0, 0]].clone()
    rows[0, 5] = math.nan
    rows[1, 5] = math.inf
    rows[2, 199] = -math.inf
    rows[3, 0], rows[3, 1] = math.inf, -math.nan
    found = shape_statistics(rows)
    assert found.nan.tolist() == [True, False, False, True, False]
    assert found.inf.tolist() == [False, True, True, False, False]
    assert not found.constant.any()
    for row in range(4):
        _assert_no_score(found, row)
    assert found.wd[4].item() == pytest.approx(exact_wd(rows[4].numpy()), abs=1e-12)


def test_rows_of_nothing_but_nan_or_infinity() -> None:
    rows = torch.tensor([[math.nan] * 3, [math.inf] * 3, [-math.inf, math.inf, math.inf]])
    found = shape_statistics(rows)
    assert found.nan.tolist() == [True, False, False]
    assert found.inf.tolist() == [False, True, True]
    assert not found.constant.any()


def test_ties_on_cell_borders() -> None:
    # An even number of zeros: Φ(0) = ½ is exactly a cell border, so no cell contains it.
    for y in (np.array([-3.0, 0, 0, 3]), np.array([-1.0, -1, 0, 0, 1, 1]), np.array([-1.0, 0, 1])):
        assert _of(y).wd.item() == pytest.approx(w1_by_quadrature(standardised(y)), abs=1e-12)


def test_no_neuron_and_no_token() -> None:
    assert shape_statistics(torch.empty(0, 5)).wd.shape == (0,)
    with pytest.raises(InvalidInput, match=r"`outputs`.*token.*\b0\b"):
        shape_statistics(torch.empty(3, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7])
def test_sort_rows(dtype: torch.dtype, rows: int) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, 301))).to(dtype)
    values[0, 3] = math.nan
    kept = values.clone()
    ordered = sort_rows(values)
    assert ordered[0, -1].isnan()
    torch.testing.assert_close(
        ordered.double(), values.double().sort(dim=1).values, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(values, kept, rtol=0, atol=0, equal_nan=True)


def test_sort_rows_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((7, 50)))
    assert torch.equal(sort_rows(values), values.sort(dim=1).values)


# --- null floor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [100, 1000, 8192, 100_000])
def test_null_floor_law(n: int) -> None:
    floor, high = null_floor(n)
    assert 0.77 <= floor * math.sqrt(n) <= 0.86
    assert floor < high < 2 * floor


def test_null_floor_falls_with_the_number_of_tokens() -> None:
    floors = [null_floor(n) for n in (50, 200, 800, 3200, 8192, 8193, 12_800, 10**6)]
    assert all(a > b for a, b in itertools.pairwise(floors))
    assert null_floor(4 * 8192)[0] == pytest.approx(null_floor(8192)[0] / 2, rel=1e-12)


def test_null_floor_beyond_the_simulated_size_is_still_a_gaussian() -> None:
    rng = np.random.default_rng(7)
    measured = shape_statistics(torch.from_numpy(rng.standard_normal((40, 60_000)))).wd
    floor, high = null_floor(60_000)
    assert measured.mean().item() == pytest.approx(floor, rel=0.1)
    assert (measured > high).double().mean().item() < 0.2


def test_null_floor_is_deterministic_and_seeded() -> None:
    null_floor.cache_clear()
    first = null_floor(500, seed=1)
    null_floor.cache_clear()
    state = torch.get_rng_state()
    assert null_floor(500, seed=1) == first
    assert torch.equal(state, torch.get_rng_state())
    assert null_floor(500, seed=2) != first


def test_null_floor_of_three_tokens_by_their_angle() -> None:
    """Three standardised Gaussian values lie on a circle, at an angle that is uniform.

    That gives the distribution of their WD without a random number: the mean is the mean over the
    circle, and 97.5 % of the circle lie below the percentile.
    """
    angles = (np.arange(3000) + 0.5) / 3000 * (2 * np.pi)
    plane = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])  # orthogonal to (1, 1, 1)
    circle = math.sqrt(3) * (
        np.cos(angles)[:, None] * plane[0] + np.sin(angles)[:, None] * plane[1]
    )
    wd = np.array([w1_along_x(z) for z in circle])
    mean, high = null_floor(3, n_draws=4000)
    assert mean == pytest.approx(wd.mean(), abs=4 * wd.std() / math.sqrt(4000))
    assert (wd < high).mean() == pytest.approx(0.975, abs=3 * math.sqrt(0.975 * 0.025 / 4000))


@pytest.mark.parametrize("n_tokens", [40, 20_000])
def test_null_floor_is_exceeded_by_one_draw_in_forty(n_tokens: int) -> None:
    """Of the default 200 draws 5 lie above the 97.5th percentile, also where it is scaled."""
    drawn = wasserstein._gaussian_wd(min(n_tokens, 8192), 0, 200)
    assert drawn.shape == (200,)
    floor, high = null_floor(n_tokens)
    scale = math.sqrt(min(n_tokens, 8192) / n_tokens)
    assert int((drawn * scale > high).sum()) == 5
    assert floor == pytest.approx(scale * math.fsum(drawn) / 200, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_row_in_stretches_is_the_row_at_once(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.from_numpy(np.stack([_sample(shape, 1000, seed) for seed in range(3)]))
    expected = shape_statistics(rows)
    monkeypatch.setattr(wasserstein, "_CACHE_BYTES", 2 * 8 * 96)
    monkeypatch.setattr(wasserstein, "_STRETCH", 96)
    monkeypatch.setattr(wasserstein, "_sorted_statistics", None)
    found = shape_statistics(rows)
    for name in FIELDS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-13, equal_nan=True), name
