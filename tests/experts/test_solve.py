import pytest
import torch
from torch import nn

from entangle.errors import NumericalError
from entangle.experts.solver import SolverSettings, solve_experts
from entangle.models.layers import Layer
from entangle.pruning import prune
from entangle.stats.gram import ClusterGrams, ClusterGramsResult


def layer_of(weight: torch.Tensor) -> Layer:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return Layer("mlp", 0, "mlp", module, transposed=False)


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
    solved = solve_experts(layer, grams, 0.5, SolverSettings())
    for cluster in range(3):
        own = x[labels == cluster]
        alone = prune(layer.weight, own.T @ own, sparsity=0.5)
        torch.testing.assert_close(solved.weight[cluster], alone.weight, rtol=1e-4, atol=1e-5)
    assert (solved.weight == 0).sum(2).eq(6).all()
    assert solved.realised_sparsity == 0.5
    assert solved.shrunk == 0


def test_errors_are_those_of_the_tokens_themselves() -> None:
    layer, x, labels, grams = problem()
    solved = solve_experts(layer, grams, 0.75, SolverSettings())
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
    solved = solve_experts(layer, grams.result(), 0.5, SolverSettings(pruner="wanda"))
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
    solved = solve_experts(layer, empty, 0.5, SolverSettings())
    whole = prune(layer.weight, grams.gram.sum(0), sparsity=0.5)
    torch.testing.assert_close(solved.weight[3], whole.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruner", ["sparsegpt", "random"])
def test_experts_in_smaller_batches_are_the_same(
    monkeypatch: pytest.MonkeyPatch, pruner: str
) -> None:
    layer, _, _, grams = problem()
    whole = solve_experts(layer, grams, 0.5, SolverSettings(pruner))
    monkeypatch.setattr("entangle.experts.solver._WORK_BYTES", 1)
    single = solve_experts(layer, grams, 0.5, SolverSettings(pruner))
    torch.testing.assert_close(single.weight, whole.weight)
    assert torch.equal(single.weight == 0, whole.weight == 0)


def test_one_sparsity_a_row() -> None:
    layer, _, _, grams = problem()
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.0])
    solved = solve_experts(layer, grams, shares, SolverSettings())
    assert (solved.weight == 0).sum(2)[0].tolist() == [0, 3, 6, 9, 12, 6, 0]
    assert torch.equal(solved.weight[1, 0], layer.weight[0])


def test_a_broken_gram_is_named() -> None:
    layer, _, _, grams = problem()
    broken = ClusterGramsResult(grams.gram.clone().fill_(torch.nan), grams.total, grams.count)
    with pytest.raises(NumericalError):
        solve_experts(layer, broken, 0.5, SolverSettings())
