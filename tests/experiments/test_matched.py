import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import array, inf, nan

from entangle.experiments.arms import bisect_fraction, mean_loss


def test_hand_worked_search() -> None:
    tried: list[tuple[float, float]] = []
    found = bisect_fraction(lambda f: 10 * f, 2.5, low=0.0625, steps=3, tried=tried)
    # 1 → 10 above; √(1/16 · 1) = 1/4 → 2.5 reaches the target; √(1/16 · 1/4) = 1/8 → below
    assert tried == [(1.0, 10.0), (0.25, 2.5), (0.125, 1.25)]
    assert found == (0.25, 0.125, 0.25)


def test_all_neurons_cost_too_little() -> None:
    tried: list[tuple[float, float]] = []
    found = bisect_fraction(lambda f: f, 2.0, low=0.1, steps=5, tried=tried)
    assert all(math.isnan(value) for value in found)
    assert tried == [(1.0, 1.0)]


def test_the_smallest_share_costs_too_much() -> None:
    tried: list[tuple[float, float]] = []
    value, low, high = bisect_fraction(lambda f: 1.0 + f, 0.5, low=0.25, steps=3, tried=tried)
    assert math.isnan(value)
    assert (low, high) == (0.0, 0.25)
    assert [fraction for fraction, _ in tried] == pytest.approx([1.0, 0.5, 0.25 * 2**0.5, 0.25])


def test_an_answer_just_above_the_smallest_share_is_interpolated() -> None:
    found = bisect_fraction(lambda f: f, 0.26, low=0.25, steps=2, tried=[])
    share = (0.26 - 0.25) / (0.5 - 0.25)
    assert found == pytest.approx((0.25 * 2**share, 0.25, 0.5))


@given(st.floats(0.02, 0.98), st.integers(2, 9))
def test_the_bracket_holds_the_answer_and_halves(wanted: float, steps: int) -> None:
    tried: list[tuple[float, float]] = []
    value, low, high = bisect_fraction(lambda f: f, wanted, low=0.01, steps=steps, tried=tried)
    assert low <= value <= high
    assert low <= wanted <= high
    assert math.log(high / low) == pytest.approx(math.log(100) / 2 ** (steps - 1))
    assert len(tried) == steps + (low == 0.01)


def test_infinite_losses_are_above_everything() -> None:
    assert mean_loss(array([1.0, 3.0])) == 2.0
    assert mean_loss(array([1.0, nan])) == inf
    assert mean_loss(array([inf, 1.0])) == inf
