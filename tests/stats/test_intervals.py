import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from entangle.errors import InvalidInput
from entangle.seeding import numpy_rng
from entangle.stats import intervals
from entangle.stats.intervals import (
    median_interval,
    percentiles,
    resampled_means,
    share_interval,
    spearman_interval,
    window_difference_interval,
    window_mean_interval,
)

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


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 30, 31, 1000])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_intervals_of_a_share_and_of_the_median_are_those_of_scipy(n: int, level: float) -> None:
    for count in {0, n // 3, n}:
        wilson = stats.binomtest(count, n).proportion_ci(level, method="wilson")
        found = share_interval(count, n, level=level)
        assert (found.low, found.high, found.value) == (wilson.low, wilson.high, count / n)
    x = np.random.default_rng(n).normal(size=n)
    test = stats.quantile_test(x, q=float(np.median(x)), p=0.5).confidence_interval(level)
    median = median_interval(x, level=level)
    np.testing.assert_equal((median.low, median.high), (test.low, test.high))
    assert median.value == np.median(x)


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


def slow_window_means(values: list[float], counts: list[int], n_boot: int, seed: int) -> Floats:
    """Copy the chosen windows and divide the sums, in plain Python."""
    rng = numpy_rng(seed, "window bootstrap")
    found = []
    for _ in range(n_boot):
        chosen = rng.integers(len(values), size=len(values)).tolist()
        found.append(sum(values[i] for i in chosen) / sum(counts[i] for i in chosen))
    return np.array(found)


def windows_of(n: int, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 50, size=n)
    return rng.normal(2.0, 1.0, size=n) * counts, counts


@pytest.mark.parametrize("n", [2, 30])
def test_window_mean_agrees_with_a_loop(n: int) -> None:
    values, counts = windows_of(n)
    got = window_mean_interval(values, counts, n_boot=300, seed=5, level=0.8)
    draws = slow_window_means(values.tolist(), counts.tolist(), 300, 5)
    assert got.value == pytest.approx(sum(values.tolist()) / sum(counts.tolist()))
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(draws, [10, 90])))


def test_window_difference_agrees_with_a_loop() -> None:
    (a, counts), (b, _) = windows_of(30), windows_of(30, 1)
    got = window_difference_interval(a, b, counts, n_boot=300, seed=5, level=0.8)
    draws = [slow_window_means(x.tolist(), counts.tolist(), 300, 5) for x in (a, b)]
    assert got.value == pytest.approx((a.sum() - b.sum()) / counts.sum())
    ends = np.percentile(draws[0] - draws[1], [10, 90])
    assert (got.low, got.high) == pytest.approx(tuple(ends))


def test_window_mean_by_hand() -> None:
    # resamples of two windows: both first (1/4), both second (1/4), one of each
    values, counts = np.array([1.0, 6.0]), np.array([1, 3])
    got = window_mean_interval(values, counts, n_boot=400)
    assert (got.value, got.low, got.high) == (7 / 4, 1.0, 2.0)
    gap = window_difference_interval(values, np.array([0.0, 3.0]), counts, n_boot=400)
    assert (gap.value, gap.low, gap.high) == (1.0, 1.0, 1.0)  # one less for each item


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10.0), shift=st.floats(-5.0, 5.0))
def test_window_means_follow_linear_maps(seed: int, scale: float, shift: float) -> None:
    values, counts = windows_of(12, seed)
    plain = window_mean_interval(values, counts, n_boot=60)
    mapped = window_mean_interval(scale * values + shift * counts, counts, n_boot=60)
    expected = [scale * end + shift for end in (plain.value, plain.low, plain.high)]
    assert [mapped.value, mapped.low, mapped.high] == pytest.approx(expected, abs=1e-9)
    turned = window_difference_interval(np.zeros(12), values, counts, n_boot=60)
    assert (turned.low, turned.high) == pytest.approx((-plain.high, -plain.low))
    assert plain.low <= plain.high


def test_window_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for trial in range(150):
        rng = np.random.default_rng(trial)
        counts = rng.integers(5, 20, size=60)
        values = np.array([n * (rng.exponential() + rng.normal(size=n).mean()) for n in counts])
        found = window_mean_interval(values, counts, n_boot=200, seed=trial)
        hits += found.low <= 1.0 <= found.high
    assert 0.86 * 150 <= hits <= 150


def test_window_mean_is_fixed_by_its_seed() -> None:
    values, counts = windows_of(20)
    first = window_mean_interval(values, counts, n_boot=50, seed=1)
    assert window_mean_interval(values, counts, n_boot=50, seed=1) == first
    assert window_mean_interval(values, counts, n_boot=50, seed=2) != first


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([3.0], 1.5),
        ([1.0, np.nan], np.nan),
        ([1.0, np.inf], np.inf),
        ([-np.inf, np.inf], np.nan),
    ],
)
def test_windows_without_an_interval(values: list[float], mean: float) -> None:
    counts = np.full(len(values), 2)
    got = window_mean_interval(np.array(values), counts)
    assert (got.value, got.low, got.high) == pytest.approx((mean, np.nan, np.nan), nan_ok=True)
    gap = window_difference_interval(np.array(values), np.array(values), counts)
    expected = 0.0 if np.isfinite(values).all() else np.nan
    assert gap.value == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("values", "counts", "options", "says"),
    [
        ([], [], {}, r"window.*\b1\b"),
        ([1.0, 2.0], [1], {}, r"count.*\b1\b"),
        ([1.0, 2.0], [1, 0], {}, r"`counts`.*\b1\b.*\b0\b"),
        ([1.0, 2.0], [1, 1], {"n_boot": 0}, r"n_boot.*\b0\b"),
        ([1.0, 2.0], [1, 1], {"level": 0.0}, r"`level`.*\b0\.0\b"),
    ],
)
def test_means_that_do_not_exist_are_refused(
    values: list[float], counts: list[int], options: dict[str, float], says: str
) -> None:
    given = np.array(values), np.array(counts, dtype=np.int64)
    with pytest.raises(InvalidInput, match=says):
        window_mean_interval(*given, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"`a`.*`b`"):
        window_difference_interval(np.zeros(2), np.zeros(3), np.ones(2, dtype=np.int64))


def test_defaults_are_a_thousand_resamples_of_seed_0_and_95_percent() -> None:
    rng = np.random.default_rng(0)
    x, y, z = (rng.normal(size=25) for _ in range(3))
    counts = rng.integers(1, 9, size=25)
    options = {"n_boot": 1000, "seed": 0, "level": 0.95}
    for default, explicit in (
        (spearman_interval(x, y), spearman_interval(x, y, **options)),  # type: ignore[arg-type]
        (
            window_mean_interval(x, counts),
            window_mean_interval(x, counts, **options),  # type: ignore[arg-type]
        ),
        (
            window_difference_interval(x, z, counts),
            window_difference_interval(x, z, counts, **options),  # type: ignore[arg-type]
        ),
    ):
        assert default == explicit


@pytest.mark.parametrize("at_once", [1, 7, 20, 21, 100, 10**9])
def test_draws_do_not_depend_on_how_many_are_held(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, counts = windows_of(10)
    whole = resampled_means(values, counts, n_boot=23, rng=np.random.default_rng(3))
    monkeypatch.setattr(intervals, "_AT_ONCE", at_once)
    parts = resampled_means(values, counts, n_boot=23, rng=np.random.default_rng(3))
    assert whole.shape == (23,)
    np.testing.assert_array_equal(parts, whole)
    assert len(set(parts.tolist())) == 23


def test_percentiles_pass_over_what_is_not_a_number() -> None:
    draws = [np.nan, *np.arange(11.0).tolist(), np.nan]
    assert percentiles(draws, 0.8) == pytest.approx((1.0, 9.0))
    assert percentiles(draws, 0.8, otherwise=7.0) == pytest.approx((1.0, 9.0))
    assert percentiles([np.nan] * 3, 0.8, otherwise=7.0) == (7.0, 7.0)
    assert np.isnan(percentiles([np.nan], 0.8)).all()


def test_correlations_take_three_points_and_any_level_inside() -> None:
    x = np.array([1.0, 2.0, 3.0])
    found = spearman_interval(x, -x, n_boot=1, level=1e-6)
    assert (found.value, found.low, found.high) == pytest.approx((-1.0, -1.0, -1.0))
    for size in (0, 2):
        with pytest.raises(InvalidInput, match=rf"\b3\b.*{size}.*\(3,\)"):
            spearman_interval(np.arange(float(size)), x)
    with pytest.raises(InvalidInput, match=r"\(1, 3\)"):
        spearman_interval(x[None], x[None])
    for level in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(InvalidInput, match=rf"`level`.*{level}"):
            spearman_interval(x, x, level=level)
    with pytest.raises(InvalidInput, match=r"n_boot.*\b0\b"):
        spearman_interval(x, x, n_boot=0)


def test_the_value_of_a_side_that_does_not_vary_is_named() -> None:
    x, flat = np.array([1.0, 2.0, 4.0]), np.full(3, 5.5)
    for pair in ((x, flat), (flat, x)):
        with pytest.raises(InvalidInput, match=r"\b3\b.*\b5\.5\b"):
            spearman_interval(*pair)
