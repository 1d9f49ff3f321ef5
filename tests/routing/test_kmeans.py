import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.routing import kmeans as module
from entangle.routing.kmeans import kmeans
from tests.reference import routing as reference


def blobs(count: int, dims: int, centres: int, *, spread: float = 0.3, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(centres, dims, generator=rng)
    which = torch.randint(0, centres, (count,), generator=rng)
    points = means[which] + spread * torch.randn(count, dims, generator=rng)
    return points - points.mean(0)


def test_two_pairs_by_hand() -> None:
    points = torch.tensor([[-6.0], [-4.0], [3.0], [7.0]])
    found = kmeans(points, 2, restarts=4, seed=0)
    assert sorted(found.centroids.flatten().tolist()) == [-5.0, 5.0]
    assert found.labels[0] == found.labels[1] != found.labels[2]
    assert found.labels[2] == found.labels[3]
    assert found.inertia == 10.0
    assert found.restart_inertias.tolist() == [10.0] * 4


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_best_of_all_partitions(seed: int) -> None:
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
    found = kmeans(points - points.mean(0), 3, restarts=40, seed=seed)
    expected = reference.best_inertia(points.double().numpy(), 3)
    assert found.inertia == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", [3, 10, 11])  # the smallest inertia alone changes them
def test_rounding_changes_no_order_of_clusters(seed: int) -> None:
    points = blobs(400, 4, 3, seed=seed)
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(seed))
    found = kmeans(points, 3, restarts=20, seed=seed)
    for size in (1e-6, 3e-6):
        moved = kmeans(points + size * noise, 3, restarts=20, seed=seed)
        assert torch.equal(found.labels, moved.labels)


def test_the_result_is_a_fixed_point() -> None:
    points = blobs(300, 4, 9, spread=1.0)
    found = kmeans(points, 5, restarts=3, seed=1)
    exact = points.double().numpy()
    centroids = found.centroids.double().numpy()
    labels = reference.nearest(exact, np.zeros(4), np.eye(4), centroids)
    assert found.labels.tolist() == labels
    assert found.inertia == pytest.approx(reference.inertia(exact, labels), rel=1e-3)
    assert found.inertia == pytest.approx(float(found.restart_inertias.min()), rel=1e-3)
    for cluster in range(5):
        mean = exact[np.array(labels) == cluster].mean(0)
        np.testing.assert_allclose(centroids[cluster], mean, atol=0.05)


@pytest.mark.parametrize(("spread", "k"), [(0.3, 8), (1.0, 8), (3.0, 5)])
def test_as_good_as_scikit_learn(spread: float, k: int) -> None:
    points = blobs(2000, 6, 8, spread=spread)
    oracle = SklearnKMeans(k, n_init=10, random_state=0).fit(points.double().numpy())
    found = kmeans(points, k, restarts=10, seed=0)
    assert found.inertia == pytest.approx(oracle.inertia_, rel=0.01)


def test_more_restarts_extend_fewer_and_are_never_worse() -> None:
    points = blobs(400, 3, 20, spread=1.0)
    few, many = (kmeans(points, 12, restarts=count, seed=3) for count in (2, 6))
    np.testing.assert_allclose(many.restart_inertias[:2], few.restart_inertias, rtol=1e-5)
    assert many.inertia <= few.inertia * (1 + 1e-6)
    assert len(set(many.restart_inertias.tolist())) > 1


def test_order_of_the_points_does_not_matter_for_separated_clusters() -> None:
    points = blobs(200, 3, 4, spread=0.05)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    plain, mixed = (kmeans(p, 4, restarts=5, seed=0) for p in (points, points[order]))
    assert mixed.inertia == pytest.approx(plain.inertia, rel=1e-4)
    pairs = set(zip(plain.labels[order].tolist(), mixed.labels.tolist(), strict=True))
    assert len(pairs) == 4


def test_blocks_do_not_change_the_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(500, 3, 6)
    whole = kmeans(points, 6, restarts=3, seed=0)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 400)
    parts = kmeans(points, 6, restarts=3, seed=0)
    assert torch.equal(parts.labels, whole.labels)
    torch.testing.assert_close(parts.centroids, whole.centroids)


def test_an_empty_cluster_moves_to_the_farthest_point() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    seeds = torch.tensor([[[0.5], [100.0]], [[0.5], [11.0]]])
    centroids, inertias, _ = module._lloyd(points, seeds)
    assert centroids.squeeze(2).tolist() == [[0.5, 11.0], [0.5, 11.0]]
    assert inertias.tolist() == [2.5, 2.5]


def test_two_empty_clusters_move_to_different_points() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [20.0]])
    seeds = torch.tensor([[[0.0], [90.0], [100.0]]])
    centroids, inertias, _ = module._lloyd(points, seeds)
    assert sorted(centroids.flatten().tolist()) == [0.5, 10.0, 20.0]
    assert inertias.tolist() == [0.5]


def test_as_many_clusters_as_distinct_points() -> None:
    distinct = torch.tensor([[-3.0, 1.0], [0.0, 0.0], [2.0, 5.0], [9.0, -1.0]])
    points = distinct.repeat(6, 1)
    found = kmeans(points, 4, restarts=2, seed=0)
    assert found.inertia == pytest.approx(0.0, abs=1e-3)
    assert torch.bincount(found.labels).tolist() == [6, 6, 6, 6]


def test_too_few_distinct_points() -> None:
    points = torch.tensor([[-0.1, 1.3], [0.7, 2.2], [0.4, 0.3]]).repeat(5, 1)
    with pytest.raises(InvalidInput, match=r"k=4.*\b3\b"):
        kmeans(points, 4, restarts=2, seed=0)


def test_one_point_and_one_cluster() -> None:
    found = kmeans(torch.zeros(1, 3), 1, restarts=2, seed=0)
    assert found.labels.tolist() == [0]
    assert found.inertia == 0.0


def test_one_cluster_is_the_mean() -> None:
    points = blobs(50, 3, 2) + 1.0
    found = kmeans(points, 1, restarts=1, seed=0)
    torch.testing.assert_close(found.centroids[0], points.mean(0))
