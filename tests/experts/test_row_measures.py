import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from entangle.experts.rows import (
    Clusters,
    dense_outputs,
    output_errors,
    pair_tokens,
    rmse,
    sorted_distance,
    weighted_md,
    weighted_wd,
)
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.seeding import torch_rng
from entangle.stats.mapping_difficulty import draw_pairs, mapping_difficulty
from entangle.stats.wasserstein import judge_products, shape_statistics
from tests.reference import mapping_difficulty as reference_md
from tests.reference import routed_rows as reference

# Outputs −1 and 1 are at E|1 − |Z|| = 4Φ(1) − 3 − 2φ(0) + 4φ(1) from N(0, 1).
TWO_POINTS = 4 * 0.8413447460685429 - 3 - 2 * 0.3989422804014327 + 4 * 0.24197072451914337


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_rng(0, "row measures", *shape))


def stored(inputs: Tensor) -> TokenStore:
    store = TokenStore(ByteBudget(2**20))
    for chunk in inputs.split(7):
        store.append(chunk)
    return store


def test_weighted_wd_by_hand() -> None:
    # Cluster 0: tokens 0 and 3; cluster 1: tokens 1, 2, 5; cluster 2: token 4; cluster 3: none.
    clusters = Clusters.of(torch.tensor([0, 1, 1, 0, 2, 1]), 4)
    outputs = torch.tensor([[1.0, 4.0, 4.0, 5.0, 9.0, 4.0], [2.0, 0.0, 3.0, 2.0, 7.0, 1.5]])
    weighted, skipped = weighted_wd(outputs, clusters)
    assert clusters.order.tolist() == [0, 3, 1, 2, 5, 4]
    assert float(weighted[0]) == pytest.approx(2 / 6 * TWO_POINTS, abs=1e-9)
    three = float(shape_statistics(torch.tensor([[0.0, 3.0, 1.5]])).wd)
    assert float(weighted[1]) == pytest.approx(3 / 6 * three, abs=1e-9)
    assert skipped.tolist() == [3, 3]


def test_a_cluster_of_one_repeated_token_contributes_nothing() -> None:
    rng = torch_rng(0, "repeated")
    inputs = torch.randn(400, 900, generator=rng)
    inputs[:60] = inputs[0]
    weight = torch.randn(6, 900, generator=rng)
    labels = (torch.arange(400) >= 60).long()
    noise = 2e-5 * torch.randn(6, 60, generator=rng)  # as pieces of other sizes would give
    outputs = weight @ inputs.T
    outputs[:, :60] = outputs[:, :1] + noise
    sizes = torch.stack([own.square().mean(0).sqrt() for own in inputs.split([60, 340])])
    judge = judge_products(weight, torch.zeros(6), sizes)
    weighted, skipped = weighted_wd(outputs, Clusters.of(labels, 2), judge=judge)
    assert skipped.tolist() == [1] * 6
    torch.testing.assert_close(weighted, 340 / 400 * shape_statistics(outputs[:, 60:]).wd)


def test_weighted_wd_against_quadrature() -> None:
    outputs, labels = noise(3, 60), torch.arange(60) ** 2 % 5
    weighted, skipped = weighted_wd(outputs, Clusters.of(labels, 5))
    for row, value in zip(outputs.double().numpy(), weighted.tolist(), strict=True):
        assert value == pytest.approx(reference.weighted_wd(row, labels.tolist()), abs=1e-6)
    assert (skipped == 2).all()


def test_one_cluster_gives_the_measures_of_all_tokens() -> None:
    inputs, weight = noise(50, 4), noise(3, 4)
    store, everything = stored(inputs), Clusters.of(torch.zeros(50, dtype=torch.int64), 1)
    outputs = dense_outputs(weight, torch.zeros(3), store)
    drawn = pair_tokens(everything, store, seed=3)
    pairs = draw_pairs(50, seed=3)
    assert torch.equal(drawn.pairs, pairs)
    distance = (inputs[pairs[0]] - inputs[pairs[1]]).norm(dim=1)
    md = mapping_difficulty(outputs, pairs, distance).md()
    torch.testing.assert_close(weighted_md(outputs, everything, drawn)[0], md)
    wd = shape_statistics(outputs).wd
    torch.testing.assert_close(weighted_wd(outputs, everything)[0], wd)


def test_weighted_md_against_plain_loops() -> None:
    inputs, weight = noise(40, 4), noise(2, 4)
    inputs[::9] = inputs[0]  # some pairs have identical inputs
    labels = torch.arange(40) % 3
    clusters, store = Clusters.of(labels, 3), stored(inputs)
    drawn = pair_tokens(clusters, store, seed=1)
    outputs = dense_outputs(weight, torch.zeros(2), store)
    weighted, skipped = weighted_md(outputs, clusters, drawn)
    assert skipped.tolist() == [0, 0]
    for neuron, found in enumerate(weighted.tolist()):
        expected = 0.0
        for cluster in range(3):
            pairs = [(a, b) for a, b in drawn.pairs.T.tolist() if labels[a] == cluster]
            expected += int((labels == cluster).sum()) / 40 * reference_md.mapping_difficulty(
                outputs[neuron].tolist(), inputs.tolist(), pairs
            )  # fmt: skip
        assert found == pytest.approx(expected, rel=1e-5)


def test_pairs_are_disjoint_and_stay_inside_their_cluster() -> None:
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 1, 1, 0, 0])
    inputs = noise(10, 4)
    drawn = pair_tokens(Clusters.of(labels, 4), stored(inputs), seed=0)
    first, second = drawn.pairs
    assert drawn.sizes == (2, 2, 0, 0)
    assert torch.equal(labels[first], labels[second])
    assert labels[first].tolist() == [0, 0, 1, 1]
    assert drawn.pairs.unique().numel() == drawn.pairs.numel()
    torch.testing.assert_close(drawn.distance, (inputs[first] - inputs[second]).norm(dim=1))


def test_clusters_without_a_pair_to_measure_contribute_nothing() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    inputs = torch.tensor([[0.0], [1.0], [3.0], [7.0], [5.0], [5.0], [2.0]])
    clusters, store = Clusters.of(labels, 4), stored(inputs)
    drawn = pair_tokens(clusters, store, seed=0)
    outputs = torch.stack([inputs[:, 0], torch.ones(7)])
    weighted, skipped = weighted_md(outputs, clusters, drawn)
    assert skipped.tolist() == [3, 4]  # cluster 1: identical inputs; 2 and 3: no pair
    assert float(weighted[1]) == 0
    assert float(weighted[0]) > 0


@given(st.lists(st.tuples(*[st.floats(-100, 100, width=32)] * 2), min_size=1, max_size=30))
def test_distance_of_two_samples_against_pot(values: list[tuple[float, float]]) -> None:
    first, second = np.array(values, dtype=np.float64).T
    found = sorted_distance(
        torch.from_numpy(first).sort().values[None], torch.from_numpy(second).sort().values[None]
    )
    assert float(found) == pytest.approx(float(ot.wasserstein_1d(first, second)), abs=1e-9)
    assert float(found) == pytest.approx(
        float(ot.emd2_1d(first, second, metric="euclidean")), abs=1e-6
    )


def test_rmse_by_hand() -> None:
    assert rmse(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == pytest.approx(
        [math.sqrt(12.5), 0]
    )


def test_errors_are_those_of_each_tokens_expert() -> None:
    inputs, change = noise(30, 4), noise(3, 2, 4)
    labels = torch.arange(30) ** 2 % 3
    found = output_errors(change, stored(inputs), Clusters.of(labels, 3))
    expected = reference.routed_outputs(
        inputs.double().numpy(), labels.tolist(), change.double().numpy(), None
    )
    torch.testing.assert_close(found.double().T, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
