import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.pruning.masks import (
    Pattern,
    count_zeros,
    dead_first,
    parse_pattern,
    prune_block,
    prune_groups,
    prune_smallest,
)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("row", Pattern("row")),
        ("layer", Pattern("layer")),
        ("block", Pattern("block")),
        ("2:4", Pattern("n:m", 2, 4)),
        ("0:3", Pattern("n:m", 0, 3)),
        ("16:16", Pattern("n:m", 16, 16)),
        ("n:8", Pattern("n:m", None, 8)),
    ],
)
def test_parse_pattern(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    ["", "rows", "4:2", "0:0", "-1:2", "2:4 ", "2/4", "a:b", "n:0", "n:", "n:m", "n:-4", "N:4"],
)
def test_unknown_pattern(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"`pattern`.*block"):
        parse_pattern(text)


def test_counts_round_halves_to_the_even_integer() -> None:
    shares = torch.tensor([0, 0.05, 0.15, 0.25, 0.7, 1], dtype=torch.float64)
    assert count_zeros(shares, 10).tolist() == [0, 0, 2, 2, 7, 10]
    assert count_zeros(torch.tensor(0.7), 10).item() == 7


@settings(deadline=None)
@given(data=st.data(), lines=st.integers(1, 4), n=st.integers(1, 12))
def test_prune_smallest_is_a_stable_sort(data: st.DataObject, lines: int, n: int) -> None:
    entry = st.sampled_from([-2.0, 0.0, 1.0, 1.5, 3.0])  # few values, so that many are equal
    values = data.draw(
        st.lists(st.lists(entry, min_size=n, max_size=n), min_size=lines, max_size=lines)
    )
    budget = data.draw(st.lists(st.integers(0, n), min_size=lines, max_size=lines))
    width = data.draw(st.integers(1, n))
    pruned = prune_smallest(torch.tensor(values), torch.tensor(budget), width)
    for line, count, row in zip(values, budget, pruned.tolist(), strict=True):
        chosen = np.argsort(line, kind="stable")[:count]
        assert row == [j in chosen for j in range(width)]


def test_prune_smallest_without_lines() -> None:
    pruned = prune_smallest(torch.empty(2, 0, 3), torch.empty(2, 0, dtype=torch.int64))
    assert pruned.shape == (2, 0, 3)


def test_prune_groups_keeps_the_best_of_each() -> None:
    saliency = torch.tensor([[4.0, 1, 3, 2, 1, 1, 1, 9]])
    pruned = prune_groups(saliency, torch.tensor([3]), 4)
    assert pruned.tolist() == [[False, True, True, True, True, True, True, False]]
    pruned = prune_groups(saliency, torch.tensor([1]), 4)
    assert pruned.nonzero().tolist() == [[0, 1], [0, 4]]


def test_lines_lose_numbers_of_their_own_in_every_group() -> None:
    saliency = torch.tensor([[4.0, 1, 3, 2, 1, 1, 1, 9]]).expand(4, -1)
    pruned = prune_groups(saliency, torch.tensor([0, 1, 2, 4]), 4)
    marks = ["........", ".x..x...", ".x.xxx..", "xxxxxxxx"]
    assert ["".join("x" if one else "." for one in line) for line in pruned.tolist()] == marks


def test_block_rule_prunes_one_more_than_asked_and_all_ties() -> None:
    saliency = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    assert prune_block(saliency, 0.5).tolist() == [[[True, True, True], [True, False, False]]]
    tied = torch.tensor([[[1.0, 2, 2], [2, 5, 6]]])
    assert prune_block(tied, 0.2).sum() == 4  # int(6 * 0.2) = 1, the 2nd smallest is 2
    dead = torch.tensor([[[-1.0, -2, 0], [4, 5, 6]]])
    assert prune_block(dead, 0.1).sum() == 3  # the threshold is never below 0


def test_block_rule_ends() -> None:
    saliency = torch.rand(2, 3, 4)
    assert not prune_block(saliency, 0).any()
    assert prune_block(saliency, 1).all()


def test_dead_inputs_come_first_by_magnitude() -> None:
    weight = torch.tensor([[[3.0, -2, 0, 1]]])
    dead = torch.tensor([[True, True, True, False]])
    ranked = dead_first(torch.tensor([[[5.0, 6, 7, 0]]]), weight, dead)
    assert ranked.argsort().tolist() == [[[2, 1, 0, 3]]]
    assert torch.equal(dead_first(ranked, weight, ~dead & dead), ranked)


def test_groups_of_no_rows() -> None:
    assert prune_groups(torch.ones(2, 0, 8), torch.ones(2, 0, dtype=torch.int64), 4).shape == (
        2,
        0,
        8,
    )
