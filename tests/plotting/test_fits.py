import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from entangle.errors import InvalidInput
from entangle.plotting.predictors import fit_line, lower_front, power_law

Floats = NDArray[np.float64]


@pytest.fixture
def points() -> tuple[Floats, Floats]:
    rng = np.random.default_rng(3)
    x = rng.gamma(2.0, 3.0, 80)
    return x, 2.0 - 0.5 * x + rng.normal(0.0, 1.0, 80)


def test_line_agrees_with_scipy(points: tuple[Floats, Floats]) -> None:
    fit, found = fit_line(*points, n_boot=10), stats.linregress(*points)
    assert fit.slope == pytest.approx(found.slope)
    np.testing.assert_allclose(fit.y, found.intercept + found.slope * fit.x)
    assert fit.r2.value == pytest.approx(found.rvalue**2)
    assert fit.spearman.value == pytest.approx(stats.spearmanr(*points).statistic)
    assert (fit.x[0], fit.x[-1], fit.n) == (points[0].min(), points[0].max(), 80)


def test_line_worked_out_by_hand() -> None:
    fit = fit_line(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0]), n_boot=5)
    assert fit.slope == pytest.approx(0.5)
    assert fit.r2.value == pytest.approx(0.25)
    assert fit.y[[0, -1]] == pytest.approx([0.5, 1.5])


def test_intervals_cover_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=100)
        fit = fit_line(x, 0.5 * x + rng.normal(size=100), n_boot=200)  # R² = 0.2
        inside += fit.r2.low <= 0.2 <= fit.r2.high
    assert 52 <= inside <= 60


def test_band_is_narrowest_in_the_middle_and_holds_the_line(points: tuple[Floats, Floats]) -> None:
    fit = fit_line(*points, n_boot=400)
    spread = fit.high - fit.low
    assert fit.x[spread.argmin()] == pytest.approx(points[0].mean(), abs=1.5)
    assert ((fit.low <= fit.y) & (fit.y <= fit.high)).all()


def test_line_follows_its_units_and_its_seed(points: tuple[Floats, Floats]) -> None:
    x, y = points
    fit, moved = fit_line(x, y, n_boot=50), fit_line(100 * x - 7, 3 - 2 * y, n_boot=50)
    assert moved.slope == pytest.approx(-0.02 * fit.slope)
    assert moved.r2.low == pytest.approx(fit.r2.low)
    np.testing.assert_allclose(moved.low, 3 - 2 * fit.high)
    assert fit_line(x, y, n_boot=50).r2 == fit.r2
    assert fit_line(x, y, n_boot=50, seed=1).r2 != fit.r2


@pytest.mark.parametrize("y", [[1.0, 1.0, 1.0], [1.0, 2.0]])
def test_line_needs_three_points_that_differ(y: list[float]) -> None:
    with pytest.raises(InvalidInput, match="must have"):
        fit_line(np.arange(float(len(y))), np.array(y))


def slow_front(x: Floats, y: Floats) -> set[tuple[float, float]]:
    """Points that no other point beats, by looking at all pairs."""
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    return {
        (a, b)
        for a, b in pairs
        if not any((p >= a and q <= b) and (p, q) != (a, b) for p, q in pairs)
    }


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_front_is_what_no_point_beats(points: list[tuple[int, int]]) -> None:
    x, y = np.array(points, dtype=np.float64).T
    front = lower_front(x, y)
    assert set(zip(x[front].tolist(), y[front].tolist(), strict=True)) == slow_front(x, y)
    assert (np.diff(x[front]) > 0).all()
    assert (np.diff(y[front]) > 0).all()


def test_front_worked_out_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 3.0, 0.5]), np.array([0.2, 0.4, 0.3, 0.5, 0.2])
    assert lower_front(x, y).tolist() == [0, 2]


def test_power_law_is_recovered() -> None:
    x = np.array([1.0, 2.0, 5.0, 11.0])
    assert power_law(x, 0.3 * x**1.7) == pytest.approx((0.3, 1.7))


@pytest.mark.parametrize(
    ("x", "y"), [([2.0, 2.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0])]
)
def test_power_law_needs_positive_points_at_two_places(x: list[float], y: list[float]) -> None:
    with pytest.raises(InvalidInput, match=r"\b2\b.*different"):
        power_law(np.array(x), np.array(y))
