import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.allocation.search import GRID, minimise


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 3.0))
def test_the_minimum_of_a_parabola_is_found(center: float) -> None:
    tried = minimise(lambda x: (x - center) ** 2, 0.0, 3.0, evaluations=30)
    best = min(tried, key=lambda one: one[1])[0]
    assert best == pytest.approx(center, abs=1e-3)


@pytest.mark.parametrize("evaluations", [2, 3, 5, 6, 7, 12])
def test_the_function_is_called_that_often_and_never_twice_at_a_place(evaluations: int) -> None:
    places: list[float] = []

    def function(x: float) -> float:
        places.append(x)
        return abs(x - 0.31)

    tried = minimise(function, 0.0, 1.0, evaluations=evaluations)
    assert [x for x, _ in tried] == places
    assert len(places) == len(set(places)) == evaluations
    assert places[0] == 0.0
    assert places[min(evaluations, GRID) - 1] == 1.0
    assert all(0.0 <= x <= 1.0 for x in places)


def test_by_hand() -> None:
    # the grid's best point is 0.25, so that the section lies between 0 and 0.5
    tried = minimise(lambda x: abs(x - 0.2), 0.0, 1.0, evaluations=7)
    assert [x for x, _ in tried[:5]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    golden = (math.sqrt(5) - 1) / 2
    assert [x for x, _ in tried[5:]] == pytest.approx([0.5 * (1 - golden), 0.5 * golden])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: -x, 2.0),
        (lambda x: x, 0.0),
        (lambda x: math.nan if x < 1.5 else x, 1.5),
        (lambda x: 1.0, 0.0),
    ],
)
def test_ends_nan_and_plateaus(function: Callable[[float], float], expected: float) -> None:
    tried = minimise(function, 0.0, 2.0, evaluations=8)
    assert len(tried) == 8
    assert not any(math.isnan(value) for _, value in tried)
    assert min(tried, key=lambda one: one[1])[0] == pytest.approx(expected, abs=0.1)
