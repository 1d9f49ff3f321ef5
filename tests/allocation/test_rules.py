import numpy as np
import pytest

from entangle.allocation import rules
from entangle.allocation.request import keep_more, min_max
from entangle.errors import InvalidInput
from tests.allocation.requests import request_of


def test_uniform() -> None:
    wish = rules.uniform(request_of([[1, 2], [3]], sparsity=0.3, lowest=0.1, highest=0.9))
    assert wish.sparsity.tolist() == [0.3, 0.3]
    assert wish.low.tolist() == [0.1, 0.1]
    assert wish.high.tolist() == [0.9, 0.9]


def test_by_layer_by_hand() -> None:
    """Means 1, 2 and 5: kept shares 0, 0.04 and 0.16 over a range of 0.16, less their mean."""
    request = request_of([[0, 2], [2], [5, 5]], sparsity=0.7, strength=0.08)
    mean = 0.2 / 3
    expected = [0.7 + mean, 0.7 + mean - 0.04, 0.7 + mean - 0.16]
    assert rules.by_layer(request).sparsity == pytest.approx(expected)


def test_linear_by_hand() -> None:
    """Scores 1, 2, 3 have z = ∓√1.5, 0; two equal ones have z = 0."""
    wish = rules.linear(request_of([[1, 2, 3], [4, 4]], target=[0.5, 0.8], strength=0.1))
    step = 0.1 * np.sqrt(1.5)
    assert wish.sparsity == pytest.approx([0.5 + step, 0.5, 0.5 - step, 0.8, 0.8])
    across = rules.linear(request_of([[1, 2, 3], [4, 4]], strength=0.1)).sparsity
    z = (np.array([1, 2, 3, 4, 4]) - 2.8) / np.std([1, 2, 3, 4, 4])
    assert across == pytest.approx(0.5 - 0.1 * z)


def test_rank_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 of 4 are 1/8, 1/2, 1/2, 7/8; strength 0.2 moves by ± 0.15."""
    wish = rules.rank(request_of([[7, 8, 8, 90], [1]], target=[0.5, 0.5], strength=0.2))
    assert wish.sparsity == pytest.approx([0.65, 0.5, 0.5, 0.35, 0.5])
    doubled = rules.rank(request_of([[14, 16, 16, 180], [2]], target=[0.5, 0.5], strength=0.2))
    assert doubled.sparsity.tolist() == wish.sparsity.tolist()


def test_protect_marks_the_top() -> None:
    scores = [[3.0, 1.0, 2.0, 0.0], [9.0, 9.0, 1.0, 1.0]]
    request = request_of(scores, target=[0.5, 0.6], protect=0.25, protect_sparsity=0.1)
    wish = rules.protect(request)
    assert wish.sparsity.tolist() == [0.1, 0.5, 0.5, 0.5, 0.1, 0.6, 0.6, 0.6]
    assert wish.low.tolist() == [0.1, 0, 0, 0, 0.1, 0, 0, 0]
    assert wish.high.tolist() == [0.1, 1, 1, 1, 0.1, 1, 1, 1]
    across = rules.protect(request_of(scores, protect=0.25)).high
    assert across.tolist() == [1, 1, 1, 1, 0, 0, 1, 1]


def test_protect_at_least_one_but_none_if_so_asked() -> None:
    scores = [[3.0, 1, 2, 0]]
    assert (rules.protect(request_of(scores, target=[0.5], protect=0.01)).high == 0).sum() == 1
    assert (rules.protect(request_of(scores, target=[0.5], protect=0.4)).high == 0).sum() == 2
    assert (rules.protect(request_of(scores, target=[0.5], protect=0.0)).high == 0).sum() == 0
    assert (rules.protect(request_of(scores, target=[0.5], protect=1.0)).high == 0).sum() == 4


def test_min_max() -> None:
    assert min_max(np.array([1.0, 3.0, 2.0])).tolist() == [0, 1, 0.5]
    assert min_max(np.array([2.0, 2.0])).tolist() == [0, 0]
    assert keep_more(np.array([1.0, 3.0]), 0.5, 0.1) == pytest.approx([0.6, 0.4])


def test_a_rule_that_measures_says_so() -> None:
    with pytest.raises(InvalidInput, match="'linear'"):
        request_of([[1.0]]).measurements()
