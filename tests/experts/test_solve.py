from dataclasses import replace

import pytest
import torch
from torch import nn

from entangle.errors import NumericalError
from entangle.experts import build
from entangle.experts.build import Plan
from entangle.experts.router import Kind
from entangle.experts.rows import RowGroup, fit_group
from entangle.experts.solver import ExpertSettings, solve_experts
from entangle.models.layers import Layer
from entangle.pruning import METHODS, prune
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.stats.gram import ClusterGrams, ClusterGramsResult


def layer_of(weight: torch.Tensor) -> Layer:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return Layer("mlp", 0, "mlp", module, transposed=False)


def stored(tokens: torch.Tensor) -> TokenStore:
    store = TokenStore(ByteBudget(2**30))
    store.append(tokens)
    return store


def problem(
    tokens: int = 300, features: int = 12, k: int = 3
) -> tuple[Layer, torch.Tensor, torch.Tensor, ClusterGramsResult]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, features, generator=rng) * torch.linspace(0.5, 2.0, features)
    labels = torch.arange(tokens) % k
    grams = ClusterGrams(k, features)
    grams.update(x, labels)
    layer = layer_of(torch.randn(7, features, generator=rng))
    return layer, x, labels, grams.result()


def test_experts_are_the_layer_pruned_with_each_clusters_gram() -> None:
    layer, x, labels, grams = problem()
    solved = solve_experts(layer, grams, 0.5, ExpertSettings())
    for cluster in range(3):
        own = x[labels == cluster]
        alone = prune(layer.weight, own.T @ own, sparsity=0.5)
        torch.testing.assert_close(solved.weight[cluster], alone.weight, rtol=1e-4, atol=1e-5)
    assert (solved.weight == 0).sum(2).eq(6).all()
    assert solved.realised_sparsity == 0.5
    assert solved.shrunk == 0


def test_errors_are_those_of_the_tokens_themselves() -> None:
    layer, x, labels, grams = problem()
    solved = solve_experts(layer, grams, 0.75, ExpertSettings())
    dense = x.double() @ layer.weight.double().T
    assert solved.energy == pytest.approx(float(dense.square().sum()), rel=1e-5)
    for cluster in range(3):
        own = x[labels == cluster].double()
        off = own @ solved.weight[cluster].double().T - dense[labels == cluster]
        assert float(solved.squared_error[cluster]) == pytest.approx(
            float(off.square().sum()), rel=1e-4
        )


def test_a_cluster_below_the_rank_is_shrunk_by_hand() -> None:
    # 2 inputs; cluster 0 has one token (1, 0), cluster 1 has (0, 2) three times.
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    grams = ClusterGrams(2, 2)
    grams.update(x, torch.tensor([0, 1, 1, 1]))
    layer = layer_of(torch.tensor([[1.0, 0.9]]))
    solved = solve_experts(layer, grams.result(), 0.5, ExpertSettings(pruner="wanda"))
    # G₀ + (2 − 1) · G / 4 = diag(1 + 1/4, 3): 1·√1.25 < 0.9·√3, so the first weight falls,
    # although the cluster's only token has nothing in the second input.
    assert solved.shrunk == 1
    assert solved.weight[0].tolist() == [[0.0, pytest.approx(0.9)]]


def test_an_empty_cluster_gets_the_layers_own_gram() -> None:
    layer, _, _, grams = problem()
    empty = ClusterGramsResult(
        gram=torch.cat([grams.gram, torch.zeros(1, 12, 12)]),
        total=torch.cat([grams.total, torch.zeros(1, 12, dtype=grams.total.dtype)]),
        count=torch.cat([grams.count, torch.zeros(1, dtype=torch.int64)]),
    )
    solved = solve_experts(layer, empty, 0.5, ExpertSettings())
    whole = prune(layer.weight, grams.gram.sum(0), sparsity=0.5)
    torch.testing.assert_close(solved.weight[3], whole.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruner", ["sparsegpt", "random"])
def test_experts_in_smaller_batches_are_the_same(
    monkeypatch: pytest.MonkeyPatch, pruner: str
) -> None:
    layer, _, _, grams = problem()
    whole = solve_experts(layer, grams, 0.5, ExpertSettings(pruner=pruner))
    monkeypatch.setattr("entangle.experts.solver._WORK_BYTES", 1)
    single = solve_experts(layer, grams, 0.5, ExpertSettings(pruner=pruner))
    torch.testing.assert_close(single.weight, whole.weight)
    assert torch.equal(single.weight == 0, whole.weight == 0)


def test_one_sparsity_a_row() -> None:
    layer, _, _, grams = problem()
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.0])
    solved = solve_experts(layer, grams, shares, ExpertSettings())
    assert (solved.weight == 0).sum(2)[0].tolist() == [0, 3, 6, 9, 12, 6, 0]
    assert torch.equal(solved.weight[1, 0], layer.weight[0])


def test_a_broken_gram_is_named() -> None:
    layer, _, _, grams = problem()
    broken = ClusterGramsResult(grams.gram.clone().fill_(torch.nan), grams.total, grams.count)
    with pytest.raises(NumericalError):
        solve_experts(layer, broken, 0.5, ExpertSettings())


@pytest.mark.parametrize("router", ["kmeans", "random"])
@pytest.mark.parametrize("pruner", METHODS)
def test_rows_inside_experts_are_an_expansion_restricted_to_them(pruner: str, router: Kind) -> None:
    """To the bit where the same rows are solved together; else to the rounding of their products.

    But for random pruning, whose draws depend on which rows are solved together.
    """
    rng = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 12, generator=rng) * torch.linspace(0.5, 2.0, 12)
    gate, up = (replace(layer_of(torch.randn(n, 12, generator=rng)), name=f"{n}") for n in (40, 70))
    rows = {"40": torch.tensor([3, 8, 31]), "70": torch.tensor([0, 2, 69])}
    settings = ExpertSettings(pruner=pruner, router=router, restarts=2, seed=3)
    group = RowGroup.of([gate, up], rows)
    found = fit_group(group, stored(inputs), 20, [0.5], settings, md=False)
    assert found.shrunk > 0

    def expanded(*layers: Layer) -> torch.Tensor:
        names = {layer.name: layer for layer in layers}
        plan = Plan(
            {0: layers}, dict.fromkeys(names, 0.5), dict.fromkeys(names, 20), True, settings
        )
        store = stored(inputs)
        [ready] = build._prepared([(list(layers), store)], plan)
        made = [one.module for one in build._expand_group(layers, store, plan, ready)]
        assert torch.equal(made[0].routing.router.centroids, found.router.centroids)
        return torch.cat(
            [
                one.weight[:, rows.get(name, slice(None))]
                for name, one in zip(names, made, strict=True)
            ],
            1,
        )

    assert torch.equal(found.weight[0], expanded(layer_of(group.weight)))
    if pruner != "random":
        whole = expanded(gate, up)
        assert torch.equal(whole == 0, found.weight[0] == 0)
        torch.testing.assert_close(whole, found.weight[0], rtol=0, atol=1e-6)
