import pytest
import torch
from torch import Tensor

from entangle.experts import clusters
from entangle.experts.clusters import Product
from entangle.precision import full_precision, tensor_cores
from entangle.seeding import torch_rng


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
