import pytest
import torch

from entangle.routing import kmeans, side_by_side
from entangle.seeding import torch_rng


@pytest.mark.parametrize(("tokens", "dims", "k"), [(300, 5, 4), (257, 1, 3), (40, 3, 17)])
def test_seeds_are_those_of_one_restart_after_another(tokens: int, dims: int, k: int) -> None:
    points = torch.randn(tokens, dims, generator=torch_rng(0, "side-by-side", tokens))
    found = side_by_side.seeds(points, k, restarts=3, seed=1)
    assert found is not None
    expected = torch.stack([kmeans._plus_plus(points, k, 1, restart) for restart in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_too_few_different_points() -> None:
    points = torch.ones(10, 2)
    points[0] = 2
    assert side_by_side.seeds(points, 3, restarts=2, seed=0) is None
    assert side_by_side.seeds(points, 2, restarts=2, seed=0) is not None
