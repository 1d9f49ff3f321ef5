from collections.abc import Callable

import numpy as np
import pytest
import torch

from entangle.errors import InvalidInput, NumericalError
from entangle.experts.routed_rows import solve_rows
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.pruning import prune
from entangle.stats.gram import GramResult
from tests.allocation.samples import random_allocation

Tiny = Callable[[str], LanguageModel]


def _gram(features: int, *, seed: int = 0) -> GramResult:
    x = torch.randn(4 * features, features, generator=torch.Generator().manual_seed(seed))
    return GramResult(x.T @ x, x.sum(0), len(x))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
def test_rows_equal_those_of_a_layer_pruned_alone(tiny: Tiny, name: str, pruner: str) -> None:
    layers = find_layers(tiny(name).module, 0, "mlp")
    by_width = {w: _gram(w) for w in {layer.in_features for layer in layers}}
    grams = {layer.name: by_width[layer.in_features] for layer in layers}
    rows = {layer.name: np.array([1, 4, 7]) for layer in layers}
    solved = solve_rows(layers, rows, grams, sparsities=(0.25, 0.75), pruner=pruner)
    for layer in layers:
        for sparsity in (0.25, 0.75):
            alone = prune(
                layer.weight, grams[layer.name].gram, method=pruner, sparsity=sparsity
            )  # fmt: skip
            weight, zeros = solved[layer.name].take(np.array([1, 7]), sparsity)
            torch.testing.assert_close(weight, alone.weight[[1, 7]], rtol=1e-4, atol=1e-5)
            assert zeros.tolist() == alone.realised_sparsity[[1, 7]].tolist()
            assert (weight == 0).sum(1).tolist() == [round(sparsity * layer.in_features)] * 2


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude", "random"])
def test_groups_hold_the_zeros_of_their_row(tiny: Tiny, pruner: str) -> None:
    model = tiny("gpt2")
    layers = find_layers(model.module, "all", "mlp")
    by_width = {w: _gram(w) for w in {layer.in_features for layer in layers}}
    grams = {layer.name: by_width[layer.in_features] for layer in layers}
    first, second = (random_allocation(model, seed=seed, group=8) for seed in (0, 1))
    rows = {layer.name: np.array([0, 3, 5, 6]) for layer in layers}
    solved = solve_rows(layers, rows, grams, sparsities=(first, second), pruner=pruner)
    for layer in layers:
        for level in (first, second):
            weight, zeros = solved[layer.name].take(rows[layer.name], level)
            groups = (weight == 0).unflatten(1, (-1, 8)).sum(2)
            each = level.zeros[layer.name][[0, 3, 5, 6]] // groups.shape[1]
            assert torch.equal(groups, each[:, None].expand_as(groups))
            torch.testing.assert_close(zeros, (each / 8).to(zeros.dtype))
    with pytest.raises(InvalidInput, match=r"`sparsities`.*n:8"):
        solve_rows(layers, rows, grams, sparsities=(first, 0.5))


def test_layers_without_rows_are_left_out(tiny: Tiny) -> None:
    layers = find_layers(tiny("llama").module, 0, "mlp")
    grams = {layer.name: _gram(layer.in_features) for layer in layers}
    solved = solve_rows(layers, {layers[1].name: np.array([0])}, grams, sparsities=(0.5,))
    assert list(solved) == [layers[1].name]


def test_sparsity_0_and_1(tiny: Tiny) -> None:
    (layer, *_) = find_layers(tiny("llama").module, 0, "mlp")
    grams = {layer.name: _gram(layer.in_features)}
    solved = solve_rows([layer], {layer.name: np.array([2, 3])}, grams, sparsities=(0.0, 1.0))
    kept, _ = solved[layer.name].take(np.array([2, 3]), 0.0)
    assert torch.equal(kept, layer.weight[2:4])
    gone, _ = solved[layer.name].take(np.array([2, 3]), 1.0)
    assert not gone.any()


def test_a_broken_gram_names_the_layers(tiny: Tiny) -> None:
    (layer, *_) = find_layers(tiny("llama").module, 0, "mlp")
    width = layer.in_features
    bad = GramResult(torch.full((width, width), torch.nan), torch.zeros(width), 1)
    with pytest.raises(NumericalError, match=layer.name):
        solve_rows([layer], {layer.name: np.array([0])}, {layer.name: bad}, sparsities=(0.5,))
