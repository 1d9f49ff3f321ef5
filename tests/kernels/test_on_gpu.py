"""Every kernel against the plain version of the same thing on the CPU."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from entangle.experts.clusters import kmeans
from entangle.scoring.sketched import _add_pairs, _Pairing
from entangle.seeding import torch_rng
from entangle.stats.mapping_difficulty import PairSketch, draw_pairs, mapping_difficulty
from entangle.stats.sketch import OutputSketch
from entangle.stats.wasserstein import shape_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def _outputs(tokens: int, neurons: int) -> Tensor:
    """Outputs by token: Gaussian, skewed, constant, lattice, with a NaN and an infinity."""
    y = torch.randn(tokens, neurons, generator=torch_rng(0, "kernels", tokens, neurons))
    y[:, 1::7] = y[:, 1::7].exp()
    y[:, 2::7] = 1
    y[:, 3::7] = y[:, 3::7].round()
    if tokens > 10:
        y[3, 4::7], y[5, 5::7] = torch.nan, torch.inf
    return y


def _assert_close(a: object, b: object, tolerance: float) -> None:
    for field in fields(a):  # type: ignore[arg-type]
        here, there = getattr(a, field.name), getattr(b, field.name)
        if isinstance(here, Tensor) and here.is_floating_point():
            torch.testing.assert_close(
                here, there.cpu(), rtol=tolerance, atol=tolerance, equal_nan=True
            )
        elif isinstance(here, Tensor) and here.dtype == torch.bool:
            assert torch.equal(here, there.cpu()), field.name


@DTYPES
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (130, 70), (2000, 4096), (700, 64)])
def test_sketch(dtype: torch.dtype, tokens: int, neurons: int) -> None:
    y = _outputs(tokens, neurons).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        sketch = OutputSketch(neurons, n_groups=3)
        for group, part in enumerate(y.to(device).split(tokens // 3 + 1)):
            sketch.update(part, group=group)
        results.append(sketch.result())
    _assert_close(results[0].shape, results[1].shape, 1e-3)
    _assert_close(results[0], results[1], 1e-3)
    moved = (results[0].counts - results[1].counts.cpu()).abs().sum()
    assert int(moved) <= 1e-5 * y.numel() + 2


@DTYPES
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_pairs(dtype: torch.dtype, share: float) -> None:
    x = torch.randn(901, 20, generator=torch_rng(1, "kernels"))
    x[:300], x[450:700] = x[0], x[0]
    y = torch.randn(901, 300, generator=torch_rng(2, "kernels")).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        sketch, pairing = PairSketch(300), _Pairing(seed=0, share=share)
        for batch in range(4):
            pairing.batch = batch
            rows = y.roll(batch, 0) * (1 + batch)
            _add_pairs(rows.to(device), sketch, pairing.of(x.to(device)))
        results.append(sketch.result())
    _assert_close(results[0], results[1], 1e-4)
    for name in ("n_pairs", "n_identical"):
        assert getattr(results[0], name) == getattr(results[1], name) > 0
    for name in ("dx_max", "dx_mean"):
        assert getattr(results[0], name) == pytest.approx(getattr(results[1], name), rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 3001, 32768, 60_000])
def test_exact_distances(tokens: int) -> None:
    y = _outputs(tokens, 14).T.contiguous()
    if tokens > 3:
        y[13] = 1 + 1e-6 * y[13].nan_to_num(0, 0, 0)  # few places, many values
    _assert_close(shape_statistics(y), shape_statistics(y.cuda()), 2e-6)


@pytest.mark.parametrize("tokens", [2, 3, 3001])
def test_exact_pairs(tokens: int) -> None:
    y = torch.randn(9, tokens, generator=torch_rng(4, "kernels"))
    pairs = draw_pairs(tokens, seed=0)
    distance = torch.rand(pairs.shape[1], generator=torch_rng(5, "kernels")) + 0.1
    here = mapping_difficulty(y, pairs, distance)
    _assert_close(here, mapping_difficulty(y.cuda(), pairs, distance), 1e-5)


@pytest.mark.parametrize(("dims", "k"), [(1, 3), (18, 16), (64, 17), (100, 16)])
def test_kmeans(dims: int, k: int) -> None:
    points = torch.randn(5000, dims, generator=torch_rng(6, "kernels", dims))
    points[:2000] += 4
    here, there = (kmeans(x, k, restarts=3, seed=1) for x in (points, points.cuda()))
    torch.testing.assert_close(there.restart_inertias, here.restart_inertias, rtol=1e-2, atol=1e-6)
    again = kmeans(points.cuda(), k, restarts=3, seed=1)
    assert torch.equal(again.centroids, there.centroids)
