import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from entangle.errors import InvalidInput
from entangle.seeding import numpy_rng
from entangle.stats.intervals import spearman_interval

Floats = NDArray[np.float64]


def slow_draws(x: Floats, y: Floats, *, n_boot: int, seed: int) -> Floats:
    """Resample the points themselves and let scipy rank every resample from scratch."""
    rng = numpy_rng(seed, "bootstrap")
    found = []
    for _ in range(n_boot):
        chosen = rng.integers(len(x), size=len(x))
        if np.ptp(x[chosen]) > 0 and np.ptp(y[chosen]) > 0:
            found.append(stats.spearmanr(x[chosen], y[chosen]).statistic)
    return np.array(found)


@pytest.mark.parametrize("n", [5, 60])
@pytest.mark.parametrize("decimals", [1, 8])  # many ties, and none
def test_bootstrap_agrees_with_scipy_on_every_resample(n: int, decimals: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=n).round(decimals)
    y = (x + rng.normal(size=n)).round(decimals)
    result = spearman_interval(x, y, n_boot=200, seed=4, level=0.9)
    low, high = np.percentile(slow_draws(x, y, n_boot=200, seed=4), [5, 95])
    assert result.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-12)


def test_spearman_by_hand() -> None:
    # ranks of y: 1, 3, 2, 4; rho = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 1e6])
    assert spearman_interval(x, y, n_boot=10).value == pytest.approx(0.8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10.0))
def test_spearman_keeps_under_growing_maps_and_turns_its_sign(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    plain = spearman_interval(x, y, n_boot=50)
    mapped = spearman_interval(np.exp(x), scale * y, n_boot=50)
    turned = spearman_interval(-x, y, n_boot=50)
    assert mapped == plain
    assert turned.value == pytest.approx(-plain.value)
    assert (turned.low, turned.high) == pytest.approx((-plain.high, -plain.low))
    assert plain.low <= plain.high


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = 6.0 / np.pi * np.arcsin(0.6 / 2.0)  # Spearman of a Gaussian pair with Pearson 0.6
    hits = 0
    for trial in range(100):
        pair = np.random.default_rng(trial).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 150)
        found = spearman_interval(pair[:, 0], pair[:, 1], n_boot=200, seed=trial)
        hits += found.low <= truth <= found.high
    assert 87 <= hits <= 100


def test_bootstrap_is_fixed_by_its_seed_and_reads_no_global_state() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=30), rng.normal(size=30)
    before = np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    first = spearman_interval(x, y, n_boot=50, seed=1)
    assert spearman_interval(x, y, n_boot=50, seed=1) == first
    assert spearman_interval(x, y, n_boot=50, seed=2) != first
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index] # noqa: NPY002


@pytest.mark.parametrize(
    ("x", "y", "options"),
    [
        ([1.0, 2.0], [1.0, 2.0], {}),
        ([1.0, 2.0, 3.0], [1.0, 2.0], {}),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], {}),
        ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], {}),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], {"n_boot": 0}),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], {"level": 1.0}),
    ],
)
def test_correlations_that_do_not_exist_are_refused(
    x: list[float], y: list[float], options: dict[str, float]
) -> None:
    with pytest.raises(InvalidInput, match="must"):
        spearman_interval(np.array(x), np.array(y), **options)  # type: ignore[arg-type]
