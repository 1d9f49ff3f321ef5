import numpy as np
import pytest

from entangle.scoring.layer_scores import rank_correlation

NAN = float("nan")


def test_rank_correlation_by_hand() -> None:
    first = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(first, np.array([1.0, 8.0, 9.0, 100.0])) == 1
    assert rank_correlation(first, np.array([4.0, 3.0, 2.0, 1.0])) == -1
    # ranks 2, 1, 4, 3: 1 − 6·(1 + 1 + 1 + 1) / (4·15)
    assert rank_correlation(first, np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)


def test_only_finite_pairs_count() -> None:
    first = np.array([1.0, 2.0, 3.0, NAN, 5.0])
    second = np.array([1.0, 2.0, 3.0, 9.0, np.inf])
    assert rank_correlation(first, second) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([], []),
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([NAN] * 3, [1.0] * 3),
    ],
)
def test_too_little_to_rank(first: list[float], second: list[float]) -> None:
    assert np.isnan(rank_correlation(np.array(first), np.array(second)))
