import numpy as np
import pytest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from entangle.errors import InvalidInput
from entangle.experiments.predictors import partial_spearman
from entangle.seeding import numpy_rng

Floats = NDArray[np.float64]


def inverse_formula(x: Floats, y: Floats, given: Floats) -> float:
    """Partial correlation from the inverse of the matrix of rank correlations."""
    matrix = np.atleast_2d(stats.spearmanr(np.column_stack([x, y, given])).statistic)
    precision = np.linalg.inv(matrix)
    return float(-precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1]))


def neurons(n: int, seed: int, columns: int = 2) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    given = rng.normal(size=(n, columns))
    x = given.sum(axis=1) + rng.normal(size=n)
    y = given[:, 0] + 0.5 * x + rng.normal(size=n)
    return x, y, given


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("decimals", [0, 8])  # many ties, and none
def test_equals_the_inverse_of_the_correlation_matrix_on_every_resample(
    columns: int, decimals: int
) -> None:
    x, y, given = (part.round(decimals) for part in neurons(80, columns, columns))
    found = partial_spearman(x, y, given, n_boot=60, seed=3, level=0.9)
    rng, draws = numpy_rng(3, "partial bootstrap"), []
    for _ in range(60):
        chosen = rng.integers(80, size=80)
        draws.append(inverse_formula(x[chosen], y[chosen], given[chosen]))
    assert found.value == pytest.approx(inverse_formula(x, y, given), abs=1e-10)
    ends = np.percentile(draws, [5, 95])
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-10)


def test_three_variables_by_hand() -> None:
    # 1 - 6 * d² / 60 for four ranks: d² = 2, 8 and 6
    x, y, z = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4]), np.array([3.0, 1, 2, 4])
    xy, xz, yz = 0.8, 0.4, 0.2
    assert [1 - ((a - b) @ (a - b)) / 10 for a, b in ((x, y), (x, z), (y, z))] == pytest.approx(
        [xy, xz, yz]
    )
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_spearman(x, y, z[:, None], n_boot=5).value == pytest.approx(expected)


def test_a_common_cause_leaves_nothing() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=4000)
    x, y = z + rng.normal(size=4000), z + rng.normal(size=4000)
    assert stats.spearmanr(x, y).statistic > 0.4
    found = partial_spearman(x, y, z[:, None], n_boot=100)
    assert abs(found.value) < 0.05
    assert found.low < 0.0 < found.high


@settings(max_examples=20, deadline=None)
@cases(seed=st.integers(0, 1000))
def test_properties(seed: int) -> None:
    x, y, given = neurons(40, seed)
    plain = partial_spearman(x, y, given, n_boot=20)
    swapped = partial_spearman(y, x, given, n_boot=20)
    grown = partial_spearman(np.exp(x), y**3, 2 * given + 1, n_boot=20)
    turned = partial_spearman(-x, y, given, n_boot=20)
    doubled = partial_spearman(x, y, np.column_stack([given, given]), n_boot=20)
    for other in (swapped, grown, doubled):
        assert (other.value, other.low, other.high) == pytest.approx(
            (plain.value, plain.low, plain.high)
        )
    assert turned.value == pytest.approx(-plain.value)
    assert plain.low <= plain.high


def test_without_anything_given_it_is_spearman() -> None:
    x, y, _ = neurons(50, 1)
    found = partial_spearman(x, y, np.empty((50, 0)), n_boot=10)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)


def test_the_seed_decides() -> None:
    x, y, given = neurons(40, 0)
    first = partial_spearman(x, y, given, n_boot=30, seed=1)
    assert partial_spearman(x, y, given, n_boot=30, seed=1) == first
    assert partial_spearman(x, y, given, n_boot=30, seed=2) != first


@pytest.mark.parametrize(
    ("x", "y", "given", "options", "says"),
    [
        ([1, 2, 3, 4], [1, 1, 1, 1], [[1], [3], [2], [4]], {}, r"`x`.*determine.*\b4\b"),
        ([1, 2, 3, 4], [2, 1, 4, 3], [[1], [2], [3], [5]], {}, r"`x`.*determine.*\b4\b"),
        ([1, 2, 3], [1, 3, 2], [[1], [3], [2]], {}, r"\b1\b.*\b4\b.*points.*\b3\b"),
        ([1, 2, 3, 4], [1, 3, 2], [[1]] * 4, {}, r"`x`.*`y`.*`given`.*shapes"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [[1]] * 3, {}, r"`x`.*`y`.*`given`.*shapes"),
        ([1, 2, 3, np.nan], [1, 3, 2, 4], [[1]] * 4, {}, "must be finite"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [[1], [2], [2], [np.inf]], {}, "must be finite"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [[1], [2], [2], [0]], {"n_boot": 0}, r"n_boot.*\b0\b"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [[1], [2], [2], [0]], {"level": 1.0}, r"`level`.*got 1\.0"),
    ],
)
def test_what_has_no_partial_correlation_is_refused(
    x: list[float], y: list[float], given: list[list[float]], options: dict[str, float], says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        partial_spearman(
            np.array(x, float), np.array(y, float), np.array(given, float),
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
