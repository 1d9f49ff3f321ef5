import pytest
import torch

from entangle.errors import InvalidInput
from entangle.pruning import prune, prune_magnitude, prune_wanda
from tests.pruning.problems import make


def test_by_hand() -> None:
    # Input norms sqrt(9) = 3, sqrt(1) = 1, sqrt(4) = 2. Saliencies of row 0: 3, 2, 8; of row 1: 6,
    # 7, 4. One zero each. Losses: pruned weight squared times its input's power: 4 * 1 and 4 * 4.
    weight = torch.tensor([[1.0, -2, 4], [2, 7, -2]])
    gram = torch.tensor([[9.0, 0, 1], [0, 1, 1], [1, 1, 4]])
    result = prune_wanda(weight, gram, sparsity=1 / 3)
    assert result.weight.tolist() == [[1, 0, 4], [2, 7, 0]]
    assert result.loss_per_neuron.tolist() == [4, 16]
    assert result.damping.item() == 0


def test_only_the_diagonal_decides() -> None:
    weight, gram = make(2, 5, 20)
    diagonal = torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    full = prune_wanda(weight, gram, sparsity=0.4)
    assert torch.equal(full.mask, prune_wanda(weight, diagonal, sparsity=0.4).mask)


@pytest.mark.parametrize("pattern", ["row", "layer", "block", "3:4"])
def test_equal_inputs_are_magnitude(pattern: str) -> None:
    weight, gram = make(1, 5, 140)
    gram.diagonal(dim1=-2, dim2=-1).fill_(1e5)
    sparsity = 0.25
    wanda = prune_wanda(weight, gram, sparsity=sparsity, pattern=pattern)
    magnitude = prune_magnitude(weight, sparsity=sparsity, pattern=pattern)
    assert torch.equal(wanda.mask, magnitude.mask)


def test_order_of_columns() -> None:
    weight, gram = make(1, 5, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    base = prune_wanda(weight, gram, sparsity=0.4)
    moved = prune_wanda(weight[..., order], gram[:, order][..., order], sparsity=0.4)
    assert torch.equal(moved.mask, base.mask[..., order])


def test_dead_inputs_go_first() -> None:
    gram = torch.diag(torch.tensor([0.0, 1, 0, 1]))
    result = prune_wanda(torch.tensor([[3.0, 0.1, 2, 1]]), gram, sparsity=0.25)
    assert result.mask.tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_needs_a_gram(method: str) -> None:
    with pytest.raises(InvalidInput, match=r"`gram`.*\bNone\b"):
        prune(torch.ones(2, 2), None, method=method, sparsity=0.5)
