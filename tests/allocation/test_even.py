from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from entangle.allocation import Allocation
from entangle.allocation.allocation import _handed_out, even
from tests.allocation.samples import allocations, grouped_allocations, made, same_zeros


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


@settings(max_examples=200, deadline=None)
@given(allocation=grouped_allocations())
def test_groups_keep_the_same_budget(allocation: Allocation) -> None:
    """That zeros are whole steps of every row is checked by `Allocation` itself."""
    found = even(allocation)
    assert found.n_zeros == allocation.n_zeros
    assert found.pattern == allocation.pattern
    for width in set(allocation.in_features.values()):
        rows = [found.zeros[n] for n, one in found.in_features.items() if one == width]
        low, high = torch.cat(rows).aminmax()
        assert int(high - low) in (0, width // int(allocation.pattern[2:]))
    assert same_zeros(even(found), found)


@pytest.mark.parametrize("mean", [0.1, 0.37, 0.5, 0.93])
def test_rows_of_a_model_in_groups_lie_within_a_step_of_the_mean(mean: float) -> None:
    widths = {"b.0.up": 576, "b.0.down": 1536, "b.1.up": 576, "b.1.down": 1536}
    rows = {"b.0.up": 1536, "b.0.down": 576, "b.1.up": 1536, "b.1.down": 576}
    rng = np.random.default_rng(0)
    zeros = {n: rng.binomial(4, mean, rows[n]) * (widths[n] // 4) for n in widths}
    allocation = made({n: one.tolist() for n, one in zeros.items()}, widths, pattern="n:4")
    found = even(allocation)
    assert found.n_zeros == allocation.n_zeros
    for name, one in found.zeros.items():
        off = one.double() / widths[name] - allocation.overall
        assert float(off.abs().max()) <= 0.25
        assert abs(float(off.mean())) <= 0.001


def test_groups_by_hand() -> None:
    widths = {"b.0.up": 4, "b.0.down": 6}
    found = even(made({"b.0.up": [4, 0, 2, 4], "b.0.down": [0, 3]}, widths, pattern="n:2"))
    # 13 of 28 weights, in steps of 2 and 3: 1.86 steps of 3 and 3.71 of 2. The sum is odd, so that
    # there is one step of 3, or three; the nearer is one, which leaves 10, five steps of 2.
    assert found.zeros["b.0.down"].sum() == 3
    assert sorted(found.zeros["b.0.up"].tolist()) == [2, 2, 2, 4]
    # 3 of 10 weights: as near as can be were one step of 3, which is what there is
    found = even(made({"b.0.up": [0], "b.0.down": [3]}, widths, pattern="n:2"))
    assert [zeros.tolist() for zeros in found.zeros.values()] == [[0], [3]]


def test_where_an_even_spread_has_no_room_each_width_keeps_its_own() -> None:
    # 6 of 8 weights, in steps of whole rows: 1.5 of the two rows of 3, but with one of them there
    # are 3 zeros left for two rows of 1
    zeros = {"b.0.up": [0, 0], "b.0.down": [3, 3]}
    found = even(made(zeros, {"b.0.up": 1, "b.0.down": 3}, pattern="n:1"))
    assert {name: one.tolist() for name, one in found.zeros.items()} == zeros


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


@settings(max_examples=100, deadline=None)
@given(allocation=allocations())
def test_rows_take_turns_so_that_every_run_holds_its_share(allocation: Allocation) -> None:
    """The first k rows hold the share of their weights, to half a zero, for every k."""
    found, weights, zeros = even(allocation), 0, 0
    total = sum(len(one) * allocation.in_features[name] for name, one in allocation.zeros.items())
    for name, rows in found.zeros.items():
        for row in rows.tolist():
            weights, zeros = weights + allocation.in_features[name], zeros + row
            assert abs(zeros - allocation.n_zeros * weights / total) <= 0.5 + 1e-9


@settings(max_examples=100, deadline=None)
@given(allocation=grouped_allocations())
def test_rows_of_a_step_take_turns_too(allocation: Allocation) -> None:
    found, group = even(allocation), int(allocation.pattern[2:])
    for width in set(allocation.in_features.values()):
        own = [found.zeros[n] for n, one in found.in_features.items() if one == width]
        steps = (torch.cat(own) // (width // group)).double()
        share = torch.arange(1, len(steps) + 1) * steps.mean()
        assert float((steps.cumsum(0) - share).abs().max()) <= 0.5 + 1e-9


def test_steps_of_three_sizes_are_shared_out_by_hand() -> None:
    """Ten rows each of steps of 4, 2 and 1: 35 zeros are half a step a row, 36 leave one over."""
    rows = {4: 10, 2: 10, 1: 10}
    assert _handed_out(rows, 35) == {4: 5, 2: 5, 1: 5}
    assert _handed_out(rows, 36) == {4: 5, 2: 5, 1: 6}  # 16 left: 5.33 of 2, then what is left
    # a mean of 2.2 steps of 6, but 10 is no sum of 4s: 16 (one step) and 4 (three) are; 3 is nearer
    assert _handed_out({6: 3, 4: 3}, 22) == {6: 3, 4: 1}
