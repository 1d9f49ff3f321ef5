from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.allocation.allocation import Counts, Reals
from entangle.allocation.request import (
    InfeasibleBudget,
    Wish,
    check_reachable,
    fill,
    round_zeros,
    whole_bounds,
)
from tests.reference.allocation import shifted

ONE = np.zeros(1, dtype=np.int64)


def wish_of(sparsity: Any, gain: Any = 1.0, low: Any = 0.0, high: Any = 1.0) -> Wish:
    values = np.array(sparsity, dtype=np.float64)
    fields = (np.broadcast_to(np.float64(one), values.shape).copy() for one in (gain, low, high))
    return Wish(values, *fields)


def met(
    wish: Wish, weights: Counts, budget: int, steps: Counts | None = None
) -> tuple[Counts, int]:
    steps = np.ones_like(weights) if steps is None else steps
    low, high = whole_bounds(wish, weights // steps)
    zeros = fill(
        wish, weights, (low * steps).astype(float), (high * steps).astype(float),
        starts=ONE, totals=np.array([float(budget)]),
    )  # fmt: skip
    return round_zeros(zeros, low, high, steps=steps, budget=budget)


def test_by_hand() -> None:
    """Wishes 0.2, 0.5, 0.9 of 10 weights, 18 zeros: the last is clipped at 9, the others rise."""
    weights = np.array([10, 10, 10])
    wish = wish_of([0.2, 0.5, 0.9], high=0.9)
    zeros, remainder = met(wish, weights, 18)
    assert remainder == 0
    assert zeros.tolist() == [3, 6, 9]
    exact = fill(wish, weights, np.zeros(3), np.full(3, 9.0), starts=ONE, totals=np.array([18.0]))
    assert exact == pytest.approx([3.0, 6.0, 9.0])


items = st.lists(
    st.tuples(
        st.floats(-0.5, 1.5), st.floats(0.1, 5), st.integers(1, 60),
        st.floats(0, 1), st.floats(0, 1),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@given(items, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_meets_every_budget_within_the_clips(
    drawn: list[tuple[float, float, int, float, float]], part: float
) -> None:
    sparsity, gain, sizes, a, b = (np.array(one) for one in zip(*drawn, strict=True))
    wish = Wish(sparsity, gain, np.minimum(a, b), np.maximum(a, b))
    weights = sizes.astype(np.int64)
    low, high = whole_bounds(wish, weights)
    budget = int(low.sum() + round(part * (high.sum() - low.sum())))
    zeros, remainder = met(wish, weights, budget)
    assert remainder == 0
    assert zeros.sum() == budget
    assert (zeros >= low).all()
    assert (zeros <= high).all()
    bounds = [(float(x), float(y)) for x, y in zip(low, high, strict=True)]
    wanted = shifted(sparsity.tolist(), gain.tolist(), weights.tolist(), bounds, float(budget))
    assert np.abs(zeros - wanted).max() < 1 + 1e-6
    exact = fill(
        wish, weights, low.astype(float), high.astype(float), starts=ONE,
        totals=np.array([float(budget)]),
    )  # fmt: skip
    assert exact == pytest.approx(np.array(wanted), abs=1e-6)


def test_segments_are_met_one_by_one() -> None:
    rng = np.random.default_rng(0)
    sizes, weights = [4, 1, 7], np.array([10] * 4 + [33] + [21] * 7)
    wish = wish_of(rng.uniform(size=12))
    totals = np.array([13.5, 20.0, 140.0])
    high = weights.astype(float)
    found = fill(wish, weights, np.zeros(12), high, starts=np.array([0, 4, 5]), totals=totals)
    assert np.add.reduceat(found, [0, 4, 5]) == pytest.approx(totals)
    first = 0
    for size, total in zip(sizes, totals, strict=True):
        part = slice(first, first + size)
        alone = fill(
            wish_of(wish.sparsity[part]), weights[part], np.zeros(size), high[part],
            starts=ONE, totals=np.array([total]),
        )  # fmt: skip
        assert found[part] == pytest.approx(alone)
        first += size


def test_scaling_keeps_ratios() -> None:
    """A gain equal to the wish multiplies all wishes by one factor."""
    wish = wish_of([0.2, 0.4, 0.6], gain=1.0)
    wish = Wish(wish.sparsity, wish.sparsity, wish.low, wish.high)
    found = fill(
        wish, np.array([100] * 3), np.zeros(3), np.full(3, 100.0), starts=ONE,
        totals=np.array([60.0]),
    )  # fmt: skip
    assert found == pytest.approx([10, 20, 30])


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 0.5, 0.7001, 1.0])
def test_uniform_rows_take_turns(share: float) -> None:
    """Rows of equal wishes differ by one, and every run of them holds its share."""
    weights = np.full(1000, 57)
    budget = round(share * 57_000)
    zeros, _ = met(wish_of(np.full(1000, share)), weights, budget)
    assert np.ptp(zeros) <= 1
    halves = zeros.reshape(10, 100).sum(1)
    assert np.abs(halves - budget / 10).max() <= 1


def test_steps_of_a_pattern() -> None:
    """Whole multiples of in_features / m, and the total as near as half of the smallest step."""
    rng = np.random.default_rng(1)
    weights = np.repeat(np.array([24, 64]), [30, 11])
    steps = weights // 8
    for share in (0.1, 0.37, 0.8):
        budget = round(share * int(weights.sum()))
        zeros, remainder = met(wish_of(rng.uniform(size=41)), weights, budget, steps)
        assert not (zeros % steps).any()
        assert zeros.sum() + remainder == budget
        assert abs(remainder) <= 3 / 2
        assert (zeros <= weights).all()


def test_clips_are_rounded_inward() -> None:
    wish = wish_of([0.5] * 4, low=[0.21, 0.3, 0.0, 0.24], high=[0.59, 0.6, 1.0, 0.26])
    low, high = whole_bounds(wish, np.array([10, 10, 10, 10]))
    assert low.tolist() == [3, 3, 0, 2]
    assert high.tolist() == [5, 6, 10, 2]


def test_a_fixed_item_keeps_out_of_the_turns() -> None:
    """A step of 4 does not fit a budget of 2: the free item takes one or none."""
    wish = wish_of([0.0, 0.25], high=[0.0, 1.0])
    zeros, remainder = met(wish, np.array([8, 8]), 2, np.array([4, 4]))
    assert zeros[0] == 0
    assert abs(remainder) == 2


def test_a_fixed_item_is_rounded_once() -> None:
    """0.3 of 7 weights is 2.1: fixed at 2, whatever the budget."""
    wish = wish_of([0.3, 0.5], low=[0.3, 0.0], high=[0.3, 1.0])
    for budget in (2, 5, 9):
        assert met(wish, np.array([7, 7]), budget)[0].tolist() == [2, budget - 2]


def test_a_gain_of_zero_gives_way_last() -> None:
    wish = Wish(np.array([0.5, 0.5]), np.array([0.0, 1.0]), np.zeros(2), np.ones(2))
    assert met(wish, np.array([10, 10]), 12)[0].tolist() == [5, 7]
    assert met(wish, np.array([10, 10]), 18)[0].sum() == 18


def test_what_cannot_be_met_is_named() -> None:
    with pytest.raises(InfeasibleBudget, match=r"\b70\b.*\b100\b.*\b0\.1\b.*\b0\.6\b") as caught:
        check_reachable(10, 60, 70, 100, "clips")
    assert "\n" not in str(caught.value)
    check_reachable(10, 60, 60, 100, "clips")
    check_reachable(10, 60, 10, 100, "clips")


def test_large_sums_stay_exact() -> None:
    rng = np.random.default_rng(2)
    weights = np.repeat(np.array([4096, 11008]), [150_000, 50_000])
    budget = round(0.7 * int(weights.sum()))
    values: Reals = rng.lognormal(-1, 1, 200_000)
    zeros, remainder = met(wish_of(values, low=0.05, high=0.97), weights, budget)
    assert remainder == 0
    assert int(zeros.sum()) == budget
    assert (zeros / weights).min() >= 0.05
    assert (zeros / weights).max() <= 0.97


@pytest.mark.parametrize(
    ("missing", "taken"),
    [
        (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (1, [0]), (9, list(range(9))),
        (-3, [0, 3, 6]), (-2, [0, 4]),
    ],
)  # fmt: skip
def test_what_is_missing_is_spread_evenly(missing: int, taken: list[int]) -> None:
    """Nine rows of 5 zeros each: the k that give or take one lie 9/k apart, from the first on."""
    found, remainder = round_zeros(
        np.full(9, 5.0), np.zeros(9, dtype=np.int64), np.full(9, 10), steps=np.ones(9, np.int64),
        budget=45 + missing,
    )  # fmt: skip
    sign = 1 if missing > 0 else -1
    assert (found - 5).tolist() == [sign if i in taken else 0 for i in range(9)]
    assert remainder == 0


def test_what_is_missing_goes_where_there_is_room_round_after_round() -> None:
    """12 more zeros for 7 rows, of which every third is full: 5 with room get 2 each, then 2."""
    steps = np.ones(7, dtype=np.int64)
    high = np.array([5, 9, 9, 5, 9, 9, 9])
    found, remainder = round_zeros(
        np.full(7, 5.0), np.zeros(7, dtype=np.int64), high, steps=steps, budget=35 + 12
    )
    assert (found - 5).tolist() == [0, 3, 2, 0, 3, 2, 2]  # the last 2 to the 1st and 3rd of five
    assert remainder == 0
    low = np.array([5, 3, 5, 4])
    found, remainder = round_zeros(
        np.full(4, 5.0), low, np.full(4, 9), steps=steps[:4], budget=20 - 5
    )
    assert found.tolist() == [5, 3, 5, 4]  # no row has room below: 2 of the 5 stay
    assert remainder == -2


def test_what_is_missing_goes_to_the_smallest_steps() -> None:
    """Steps of 4 and of 1, and 3 zeros short: only rows of the small step can make them up."""
    steps = np.array([4, 1, 1, 1, 4, 1])
    zeros = np.array([4.0, 2, 2, 2, 8, 2])
    found, remainder = round_zeros(
        zeros, np.zeros(6, dtype=np.int64), np.full(6, 5), steps=steps, budget=20 + 2
    )
    assert found.tolist() == [4, 3, 2, 3, 8, 2]
    assert remainder == 0
