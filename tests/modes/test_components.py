import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from entangle.experts.rows import Clusters
from entangle.modes.groups import components_needed, relative_errors, sliced_distances
from tests.modes.stores import normal, store_of
from tests.reference import decomposition as reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_components_against_singular_values(share: float) -> None:
    """Clusters of more and of fewer tokens than the 12 features, with a common offset."""
    tokens = normal(90, 12) * torch.linspace(3, 0.1, 12) + 20
    labels = torch.tensor([0] * 60 + [1] * 25 + [2] * 4 + [3])[torch.randperm(90)]
    found = components_needed(store_of(tokens), Clusters.of(labels, 5), CPU, share=share)
    expected = [
        reference.components_needed(tokens[labels == c].double().numpy(), share) for c in range(5)
    ]
    assert found == expected
    assert found[3:] == [0, 0]


def test_components_far_from_zero() -> None:
    tokens = normal(2000, 12) * torch.linspace(3, 0.1, 12) + 2e4
    clusters = Clusters.of(torch.zeros(2000, dtype=torch.int64), 1)
    expected = reference.components_needed(tokens.double().numpy(), 0.999)
    assert components_needed(store_of(tokens), clusters, CPU, share=0.999) == [expected]


def test_components_by_hand() -> None:
    """Variance 9 along one axis and 1 along another: the first holds exactly 90 %."""
    tokens = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
    clusters = Clusters.of(torch.zeros(4, dtype=torch.int64), 1)
    assert components_needed(store_of(tokens), clusters, CPU, share=0.89) == [1]
    assert components_needed(store_of(tokens), clusters, CPU, share=0.91) == [2]
    assert components_needed(store_of(torch.ones(4, 3)), clusters, CPU) == [0]


def test_components_of_a_spilled_store() -> None:
    tokens, labels = normal(50, 6), torch.arange(50) % 2
    clusters = Clusters.of(labels, 2)
    with store_of(tokens, memory=0) as spilled:
        found = components_needed(spilled, clusters, CPU)
    assert found == components_needed(store_of(tokens), clusters, CPU)


@pytest.mark.parametrize("memory", [1, 2**20])
def test_errors_against_plain_loops(memory: int) -> None:
    tokens, weight, bias = normal(40, 6), normal(5, 6, name="w"), normal(5, name="b")
    labels = torch.arange(40) % 3
    sparse = weight + 0.3 * normal(4, 5, 6, name="change")
    found = relative_errors(
        weight, bias, sparse, store_of(tokens), Clusters.of(labels, 4), memory=memory
    )
    dense = (tokens @ weight.T + bias).double().numpy()
    for c in range(3):
        own = (labels == c).numpy()
        moved = (tokens @ sparse[c].T + bias).double().numpy()
        assert found[c] == pytest.approx(reference.relative_error(dense[own], moved[own]), rel=1e-4)
    assert np.isnan(found[3])


def test_errors_by_hand() -> None:
    """One neuron with outputs 0 and 2 that an expert halves: (0 + 1) / (1 + 1)."""
    tokens, weight = torch.tensor([[0.0], [2.0]]), torch.ones(1, 1)
    clusters = Clusters.of(torch.zeros(2, dtype=torch.int64), 1)
    halved = torch.full((1, 1, 1), 0.5)
    found = relative_errors(
        weight, torch.zeros(1), halved, store_of(tokens), clusters, memory=2**20
    )
    assert found.tolist() == [0.5]


def test_losing_every_weight() -> None:
    """Zeroing all weights loses the outputs' whole size, their mean included."""
    tokens, weight = normal(30, 4), normal(3, 4, name="w")
    clusters = Clusters.of(torch.zeros(30, dtype=torch.int64), 1)
    error = relative_errors(
        weight, torch.zeros(3), torch.zeros(1, 3, 4), store_of(tokens), clusters, memory=2**20
    )
    outputs = tokens @ weight.T
    size = outputs.square().sum() / (outputs - outputs.mean(0)).square().sum()
    assert error[0] == pytest.approx(float(size), rel=1e-4)
    assert error[0] > 1


def test_sliced_distances_of_one_feature_are_distances_along_the_line() -> None:
    tokens, labels = normal(90, 1), torch.tensor([0] * 50 + [1] * 30 + [2] * 10)
    found = sliced_distances(store_of(tokens), Clusters.of(labels, 4), seed=0)
    values = tokens[:, 0].double().numpy()
    for cluster in range(3):
        own = (labels == cluster).numpy()
        expected = wasserstein_distance(values[own], values[~own])
        assert found[cluster] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(found[3])


def test_sliced_distances_by_hand_and_their_properties() -> None:
    """Two points 5 apart: a random direction sees less, on average 5 · 2 / π in two dimensions."""
    tokens, labels = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).repeat(40, 1), torch.arange(80) % 2
    clusters = Clusters.of(labels, 2)
    first, second = sliced_distances(store_of(tokens), clusters, seed=0)
    assert first == pytest.approx(10 / np.pi, rel=0.2)
    assert second == pytest.approx(first, rel=1e-12)  # seen from the same directions
    moved = sliced_distances(store_of(tokens * 2 + 100), clusters, seed=0)
    np.testing.assert_allclose(moved, [2 * first, 2 * second], rtol=1e-6)
    alone = sliced_distances(store_of(tokens), Clusters.of(labels * 0, 1), seed=0)
    assert np.isnan(alone).tolist() == [True]
    assert sliced_distances(store_of(tokens), clusters, seed=0) == [first, second]
    assert sliced_distances(store_of(tokens), clusters, seed=1) != [first, second]
