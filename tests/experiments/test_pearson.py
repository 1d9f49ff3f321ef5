import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from entangle.errors import InvalidInput
from entangle.experiments.predictors import pearson_interval
from entangle.seeding import numpy_rng


def test_by_hand() -> None:
    """Deviations (−1, 0, 1) and (−1, 2, −1): 0; of (1, 2, 4): 3 / √(2 · 14/3)."""
    x = np.array([1.0, 2.0, 3.0])
    assert pearson_interval(x, np.array([0.0, 3.0, 0.0])).value == pytest.approx(0.0, abs=1e-15)
    expected = 3 / np.sqrt(2 * 14 / 3)
    assert pearson_interval(x, np.array([1.0, 2.0, 4.0])).value == pytest.approx(expected)


def test_against_scipy_and_resampling_point_by_point() -> None:
    rng = numpy_rng(0, "points")
    x = rng.normal(size=80)
    y = 0.5 * x + rng.normal(size=80)
    found = pearson_interval(x, y, n_boot=4000)
    assert found.value == pytest.approx(stats.pearsonr(x, y).statistic)
    other, draws = np.random.default_rng(3), []
    for _ in range(4000):
        chosen = other.integers(80, size=80)
        draws.append(stats.pearsonr(x[chosen], y[chosen]).statistic)
    assert (found.low, found.high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.02)


@given(st.integers(0, 50), st.floats(0.1, 1e6), st.floats(-1e6, 1e6))
def test_scale_and_shift_change_nothing(seed: int, scale: float, shift: float) -> None:
    x, y = numpy_rng(seed, "xy").normal(size=(2, 20))
    one = pearson_interval(x, y, n_boot=50)
    other = pearson_interval(scale * x + shift, y, n_boot=50)
    turned = pearson_interval(-x, y, n_boot=50)
    for name in ("value", "low", "high"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-6)
    assert (turned.value, turned.low, turned.high) == pytest.approx(
        (-one.value, -one.high, -one.low)
    )
    assert -1.0 <= one.low <= one.high <= 1.0


@pytest.mark.parametrize("values", [[1.0, 2.0], [], [3.0, 3.0, 3.0, 3.0]])
def test_nothing_to_correlate_is_nan(values: list[float]) -> None:
    y = np.arange(len(values), dtype=np.float64)
    found = pearson_interval(np.array(values), y)
    assert np.isnan([found.value, found.low, found.high]).all()


def test_resamples_without_variation_are_passed_over() -> None:
    found = pearson_interval(np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.1, 1.0]), n_boot=200)
    assert np.isfinite([found.value, found.low, found.high]).all()


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match=r"`x`.*\(3,\).*\(4,\)"):
        pearson_interval(np.zeros(3), np.zeros(4))
    with pytest.raises(InvalidInput, match=r"`n_boot`.*got 0"):
        pearson_interval(np.zeros(3), np.zeros(3), n_boot=0)
    with pytest.raises(InvalidInput, match=r"`level`.*got 1\.0"):
        pearson_interval(np.zeros(3), np.zeros(3), level=1.0)
