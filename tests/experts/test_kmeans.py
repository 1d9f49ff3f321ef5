import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.experts import clusters
from entangle.experts import clusters as module
from entangle.experts.clusters import Product, kmeans
from entangle.precision import full_precision, tensor_cores
from entangle.seeding import torch_rng
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


@pytest.mark.parametrize(("tokens", "dims", "k"), [(300, 5, 4), (257, 1, 3), (40, 3, 17)])
def test_seeds_are_those_of_one_restart_after_another(tokens: int, dims: int, k: int) -> None:
    points = torch.randn(tokens, dims, generator=torch_rng(0, "side-by-side", tokens))
    found = clusters.seeds(points, k, restarts=3, seed=1)
    assert found is not None
    expected = torch.stack([clusters._plus_plus(points, k, 1, restart) for restart in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_too_few_different_points() -> None:
    points = torch.ones(10, 2)
    points[0] = 2
    assert clusters.seeds(points, 3, restarts=2, seed=0) is None
    assert clusters.seeds(points, 2, restarts=2, seed=0) is not None


def _iterated(points: torch.Tensor, centroids: torch.Tensor, most: int) -> tuple[torch.Tensor, ...]:
    squares = points.square().sum(dtype=torch.float64)
    enough = float(clusters.TOLERANCE * points.var(0, correction=0).mean())
    return clusters.iterate(
        points, centroids, lambda before: clusters._step(points, before, squares)[:2],
        clusters._cluster_sums, squares=squares, enough=enough, most=most,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "dims", "k"), [(600, 5, 4), (900, 70, 6), (257, 1, 3)])
def test_iterations_come_to_rest_where_the_plain_ones_do(tokens: int, dims: int, k: int) -> None:
    points = torch.randn(tokens, dims, generator=torch_rng(1, "side-by-side", tokens))
    points[: tokens // 3] += 3
    seeds = torch.stack([clusters._plus_plus(points, k, 1, restart) for restart in range(3)])
    plain, inertias, iterations = clusters._lloyd(points, seeds.clone())
    found, own_inertias, own_iterations = _iterated(points, seeds.clone(), 300)
    torch.testing.assert_close(own_inertias, inertias, rtol=1e-3, atol=0)
    torch.testing.assert_close(found, plain, rtol=0, atol=0.05)
    assert ((own_iterations >= iterations) & (own_iterations <= iterations + 4)).all()


def test_a_restart_with_an_empty_cluster_goes_on() -> None:
    points = torch.randn(300, 3, generator=torch_rng(2, "side-by-side"))
    points[:100] += 6
    centroids = torch.stack([points[[0, 200, 250]], torch.full((3, 3), 1e3)])
    centroids[1, 0] = 0
    found, inertias, _ = _iterated(points, centroids, 300)
    labels = torch.cdist(points[None], found).argmin(2)
    assert [len(one.unique()) for one in labels] == [3, 3]
    nearest = torch.cdist(points[None].double(), found.double()).amin(2).square().sum(1)
    torch.testing.assert_close(inertias, nearest, rtol=0.01, atol=0)


@pytest.mark.parametrize("most", [300, 30])
def test_both_phases_end_when_the_inertia_hardly_falls(most: int) -> None:
    points = torch.randn(3000, 70, generator=torch_rng(4, "side-by-side"))
    seeds = torch.stack([clusters._plus_plus(points, 6, 1, restart) for restart in range(3)])
    squares = points.square().sum(dtype=torch.float64)
    inertias, iterations = [], []
    for one in seeds:
        centroids, count = one[None], 0
        for allowed in (most - 10, 10):
            fall, before, here = 1.0, torch.inf, 0
            while fall > 1e-5 and here < allowed:
                centroids, now, _ = clusters._step(points, centroids, squares)
                fall, before, here = (before - float(now)) / float(now), float(now), here + 1
            count += here
        inertias.append(before)
        iterations.append(count)
    found = _iterated(points, seeds.clone(), most)
    assert found[2].tolist() == iterations
    torch.testing.assert_close(found[1].tolist(), inertias, rtol=1e-7, atol=0)
    plain = clusters._lloyd(points, seeds.clone())
    assert int(plain[2].min()) > max(iterations)
    assert float(found[1].min() / plain[1].min()) < 1.001


def test_at_most_ten_iterations_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(2000, 70, generator=torch_rng(5, "side-by-side"))
    used, plain = [], clusters._cluster_sums

    def sums(x: Tensor, centroids: Tensor, product: Product) -> tuple[Tensor, Tensor]:
        used.append(product)
        return plain(x, centroids, product)

    monkeypatch.setattr(clusters, "_cluster_sums", sums)
    found = _iterated(points, points[:12].view(2, 6, 70).clone(), 25)
    assert found[2].tolist() == [25, 25]
    assert used == [tensor_cores] * 16 + [full_precision] * 10


@pytest.mark.parametrize("most", [1, 5, 12])
def test_no_more_iterations_than_allowed(most: int) -> None:
    points = torch.randn(2000, 4, generator=torch_rng(3, "side-by-side"))
    seeds = torch.stack([clusters._plus_plus(points, 8, 1, restart) for restart in range(2)])
    assert _iterated(points, seeds, most)[2].tolist() == [most, most]
