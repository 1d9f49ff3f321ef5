import pytest
import torch
from torch import Tensor

from entangle.errors import InvalidInput, UnknownName
from entangle.experiments.interventions import RowEdit, pruned_rows, swapped_rows
from entangle.models.layers import Layer, find_layers
from entangle.pruning import prune
from entangle.seeding import torch_rng
from tests.experiments.toys import bits, differing, identity
from tests.tiny_models import TINY


def gram_of(layer: Layer) -> Tensor:
    x = torch.randn(200, layer.in_features, generator=torch_rng(1, "inputs"))
    return x.T @ x


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude", "random"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bert"])
def test_pruned_rows_hold_the_zeros_asked_for(name: str, pruner: str) -> None:
    module = TINY[name]()
    before, layer, rows = bits(module), find_layers(module, 1)[-2], torch.tensor([6, 1, 3])
    gram = gram_of(layer)
    result = pruned_rows(layer, gram, rows, 0.75, pruner=pruner)
    zeros = round(0.75 * layer.in_features)
    assert result.weight.shape == (3, layer.in_features)
    assert (result.weight == 0).sum(1).tolist() == [zeros] * 3
    assert result.realised_sparsity.tolist() == pytest.approx([zeros / layer.in_features] * 3)
    assert differing(before, bits(module)) == set()
    dense = layer.weight[rows]
    assert torch.equal(pruned_rows(layer, gram, rows, 0, pruner=pruner).weight, dense)
    assert not pruned_rows(layer, gram, rows, 1, pruner=pruner).weight.any()
    if pruner != "random":
        whole = prune(layer.weight, gram, method=pruner, sparsity=0.75).weight[rows]
        torch.testing.assert_close(result.weight, whole)
    with swapped_rows([RowEdit(layer, rows, result.weight)]):
        assert (layer.weight == 0).sum(1)[rows].tolist() == [zeros] * 3
    assert differing(before, bits(module)) == set()


def test_random_pruning_follows_the_seed_and_the_layer() -> None:
    one, other = find_layers(TINY["llama"](), 1, "gate_proj") + find_layers(
        TINY["llama"](), 1, "up_proj"
    )
    rows = torch.arange(8)

    def mask(layer: Layer, seed: int) -> Tensor:
        return pruned_rows(layer, None, rows, 0.5, pruner="random", seed=seed).mask

    assert torch.equal(mask(one, 0), mask(one, 0))
    assert not torch.equal(mask(one, 0), mask(one, 1))
    assert not torch.equal(mask(one, 0), mask(other, 0))


def test_pruning_that_is_refused() -> None:
    layer, rows = identity(), torch.tensor([0])
    with pytest.raises(UnknownName, match="'sparse'"):
        pruned_rows(layer, None, rows, 0.5, pruner="sparse")
    with pytest.raises(InvalidInput, match=r"`gram`.*\bNone\b"):
        pruned_rows(layer, None, rows, 0.5)
    with pytest.raises(InvalidInput, match=r"`sparsity`.*\[0, 1\].*\b1\.5\b"):
        pruned_rows(layer, None, rows, 1.5, pruner="magnitude")
    with pytest.raises(InvalidInput, match=r"'0'.*\[9\]"):
        pruned_rows(layer, None, torch.tensor([9]), 0.5, pruner="magnitude")
