from dataclasses import replace

import pytest
from hypothesis import given, settings

from entangle.allocation import Allocation
from entangle.allocation.even import even
from tests.allocation.samples import allocations, made, same_zeros


@settings(max_examples=100, deadline=None)
@given(allocation=allocations())
def test_the_same_budget_and_no_row_farther_than_one_from_the_mean(allocation: Allocation) -> None:
    found = even(allocation)
    assert found.n_zeros == allocation.n_zeros
    assert found.in_features == allocation.in_features
    for name, zeros in found.zeros.items():
        wanted = allocation.overall * allocation.in_features[name]
        assert float((zeros - wanted).abs().max()) <= 1.0


def test_by_hand() -> None:
    found = even(made({"b.0.up": [4, 0, 1], "b.1.up": [2]}, {"b.0.up": 4, "b.1.up": 8}))
    # 7 of 20 weights: 1.4 zeros a row of 4, 2.8 of 8
    assert [zeros.tolist() for zeros in found.zeros.values()] == [[1, 2, 1], [3]]


def test_the_rest_of_the_allocation_stays() -> None:
    """Whoever takes the even spread still checks that it is for their model and layers."""
    given = {"model": {"digest": "abc"}, "settings": {"rule": "protect"}, "budget": {"zeros": 3}}
    allocation = replace(made({"b.0.up": [0, 3], "head": [0]}, {"b.0.up": 4, "head": 5}),
                         manifest=given)  # fmt: skip
    found = even(allocation)
    assert found.manifest == given | {"settings": {"rule": "uniform"}}
    assert found.blocks == {"b.0.up": 0}
    assert even(found).zeros.keys() == found.zeros.keys()
    assert same_zeros(even(found), found)
    assert not same_zeros(allocation, found)


@pytest.mark.parametrize("zeros", [0, 4])
def test_all_or_nothing(zeros: int) -> None:
    allocation = made({"b.0.up": [zeros] * 3}, {"b.0.up": 4}, {"b.0.up": 5})
    found = even(allocation)
    assert found.zeros["b.0.up"].tolist() == [zeros] * 3
    assert found.experts is None
    assert found.manifest["settings"] == {"rule": "uniform"}
