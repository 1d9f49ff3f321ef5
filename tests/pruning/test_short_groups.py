"""Patterns n:m where m does not divide the columns: the last r columns keep ceil(n r / m)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.packed.formats import pack, unpack
from entangle.pruning import METHODS, prune
from entangle.pruning.masks import prune_groups, zeros_by_group
from entangle.pruning.problem import prepare
from tests.pruning.problems import magnitude, make
from tests.reference.groups import kept as reference
from tests.reference.sparsegpt import sparsegpt


def test_by_hand() -> None:
    # 2 of 4 stay; of the last 3 columns ceil(2 · 3 / 4) = 2, so that 1 goes.
    saliency = torch.tensor([[4.0, 1, 3, 2, 5, 1, 2]])
    assert prune_groups(saliency, torch.tensor([2]), 4).nonzero()[:, 1].tolist() == [1, 3, 5]
    # A row narrower than the group: of 3 columns ceil(1 · 3 / 16) = 1.
    few = torch.tensor([[4.0, 1, 3]])
    assert prune_groups(few, torch.tensor([15]), 16).tolist() == [[False, True, True]]
    assert zeros_by_group(7, 4).tolist() == [0, 1, 3, 5, 7]
    assert zeros_by_group(8, 4).tolist() == [0, 2, 4, 6, 8]
    assert zeros_by_group(1, 4).tolist() == [0, 0, 0, 0, 1]


@settings(deadline=None, max_examples=80)
@given(
    data=st.data(),
    method=st.sampled_from(METHODS),
    cols=st.integers(1, 50),
    group=st.integers(1, 20),
)
def test_every_block_holds_exactly_what_it_keeps(
    data: st.DataObject, method: str, cols: int, group: int
) -> None:
    n = data.draw(st.integers(0, group))
    weight, gram = make(2, 3, cols)
    result = prune(weight, gram, method=method, pattern=f"{n}:{group}")
    blocks = [part.sum(-1) for part in (result.weight != 0).split(group, -1)]
    widths = [min(group, cols - start) for start in range(0, cols, group)]
    assert [block.unique().tolist() for block in blocks] == [
        [math.ceil(n * width / group)] for width in widths
    ]
    zeros = cols - sum(math.ceil(n * width / group) for width in widths)
    assert (result.realised_sparsity == zeros / cols).all()
    by_row = prune(weight, gram, method=method, sparsity=1 - n / group, pattern=f"n:{group}")
    assert torch.equal(by_row.weight, result.weight)
    by_count = prune(weight, gram, method=method, sparsity=zeros / cols, pattern=f"n:{group}")
    assert torch.equal(by_count.weight, result.weight)


@pytest.mark.parametrize("group", [5, 7, 16])
def test_the_choice_is_that_of_a_loop(group: int) -> None:
    weight, _ = make(1, 6, 41)
    zeros = torch.arange(6) % (group + 1)
    found = magnitude(weight, sparsity=zeros / group, pattern=f"n:{group}")
    assert found.mask[0].tolist() == reference(weight[0].abs().tolist(), zeros.tolist(), group)


@pytest.mark.parametrize(("n", "group"), [(5, 16), (8, 16), (3, 7), (20, 45)])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_matches_the_reference(n: int, group: int, bits: int | None, block: int) -> None:
    weight, gram = (part[0] for part in make(1, 5, 58))
    found = prune(weight, gram, pattern=f"{n}:{group}", bits=bits, block_size=block)
    expected, kept = sparsegpt(weight.numpy(), gram.numpy(), group=(n, group), bits=bits)
    assert torch.equal(found.mask, torch.from_numpy(kept))
    torch.testing.assert_close(found.weight, torch.from_numpy(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cols", [1, 15, 40, 100])
def test_what_is_pruned_is_packed_as_n16(cols: int) -> None:
    weight, gram = make(2, 4, cols, dtype=torch.float32)
    sparse = prune(weight, gram, pattern="5:16").weight
    layout, tensors = pack(sparse, "n16", kept=5)
    assert torch.equal(torch.stack([unpack(tensors, layout, e) for e in (0, 1)]), sparse)


@pytest.mark.parametrize("pattern", ["2:8", "n:8"])
def test_widths_of_whole_groups_count_as_ever(pattern: str) -> None:
    problem = prepare(torch.ones(3, 24), None, sparsity=0.75, pattern=pattern, rows=None, bits=None)
    assert problem.budget.tolist() == [[18] * 3]
    assert problem.zeros_a_group.tolist() == [[6] * 3]


@pytest.mark.parametrize("sparsity", [0.7, torch.tensor([0.5, 0.25, 0.15])])
def test_counts_that_fit_no_block(sparsity: float | torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"`sparsity`.*\b2\b.*\b8\b columns.*\b4\b; got (14|3)"):
        magnitude(torch.ones(3, 20), sparsity=sparsity, pattern="n:8")
