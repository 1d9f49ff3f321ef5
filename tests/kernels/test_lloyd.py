import pytest
import torch

from entangle.experts import clusters
from entangle.kernels import lloyd
from entangle.seeding import torch_rng


@pytest.mark.parametrize(("tokens", "dims"), [(5000, 70), (4096, 8), (1, 1)])
def test_halves_are_padded_by_zeros(tokens: int, dims: int) -> None:
    points = torch.randn(tokens, dims, generator=torch_rng(0, "lloyd-tests", tokens))
    halves = lloyd.halves(points)
    assert (halves.shape[0] % 4096, halves.shape[1] % 8) == (0, 0)
    assert halves.numel() < (tokens + 4096) * (dims + 8)
    assert torch.equal(halves[:tokens, :dims], points.bfloat16())
    assert int(halves.count_nonzero()) == tokens * dims


@pytest.mark.gpu
@pytest.mark.parametrize(("dims", "k"), [(100, 16), (70, 5), (344, 24)])
@pytest.mark.parametrize("products", [2**26, 2**18])
def test_iterations_of_halves_are_plain_ones_of_the_rounded_points(
    dims: int, k: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(lloyd, "_MOST_PRODUCTS", products)
    points = torch.randn(9000, dims, generator=torch_rng(1, "lloyd-tests", dims))
    centres = torch.randn(k, dims, generator=torch_rng(2, "lloyd-tests", dims))
    points += 0.2 * centres[torch.arange(9000) % k]
    points = points.bfloat16().float()
    squares = points.double().square().sum()
    seeds = points[: 3 * k].view(3, k, dims)
    limits = torch.stack([squares, torch.zeros(()).double(), torch.full((), -torch.inf).double()])
    assert lloyd.fits_halves(points.cuda(), seeds.cuda())
    found = lloyd.Restarts(
        seeds.cuda(),
        torch.full((3,), torch.inf, dtype=torch.float64, device="cuda"),
        torch.zeros(3, dtype=torch.int32, device="cuda"),
        torch.ones(3, dtype=torch.int32, device="cuda"),
    )
    halves = lloyd.halves(points.cuda())
    lloyd.iterate_halves(halves, found, limits.cuda(), tokens=9000, times=5, most=4)
    centroids = seeds
    for _ in range(4):
        rounded = centroids.bfloat16().float()
        centroids, inertias, emptied = clusters._step(points, rounded, squares)
        assert not emptied.any()
    assert found.iterations.tolist() == [4, 4, 4]
    assert found.active.tolist() == [0, 0, 0]
    torch.testing.assert_close(found.inertias.cpu(), inertias, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.centroids.cpu(), centroids, rtol=0, atol=0.05)
