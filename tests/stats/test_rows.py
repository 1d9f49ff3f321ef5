"""The exact method's kernel against the plain versions of what it measures."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from entangle.kernels.exact import fits
from entangle.seeding import torch_rng
from entangle.stats.bins import fetched
from entangle.stats.rows import measure_rows
from entangle.stats.sketch import OutputSketch, SketchResult
from entangle.stats.wasserstein import ShapeStatistics, shape_statistics

COLUMNS = ("wd", "ks", "mean", "std", "skewness", "excess_kurtosis")
FLAGS = ("constant", "nan", "inf")
PLACES = ("location", "scale", "low", "high")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _outputs(tokens: int) -> Tensor:
    """Neurons: Gaussian, skewed, constant, lattice, tiny, far from 0, crowded, NaN, infinite."""
    y = torch.randn(18, tokens, generator=torch_rng(0, "rows", tokens))
    y[1] = y[1].exp() ** 2
    y[2] = 3
    y[3] = y[3].round()
    y[4] *= 1e-30
    y[5] = 1e3 + 0.01 * y[5]
    y[6, ::2], y[6, 1::2] = 1 + 1e-4 * y[6, ::2], 1000 * y[6, 1::2]
    if tokens > 10:
        y[7, 3], y[8, 5] = torch.nan, torch.inf
    return y


def _plain(y: Tensor, bounds: list[int]) -> tuple[ShapeStatistics, SketchResult]:
    sketch = OutputSketch(len(y), n_groups=len(bounds) - 1)
    for group, (start, end) in enumerate(pairwise(bounds)):
        sketch.update(y.t()[start:end], group=group)
    return shape_statistics(y), sketch.result(distances=False)


def _measured(y: Tensor, bounds: list[int]) -> tuple[ShapeStatistics, SketchResult]:
    rows, _ = fetched(measure_rows(y, bounds), None)
    return rows.results(y)


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param(bounds, id=str(bounds[-1]), marks=on_gpu)
        for bounds in (
            [0, 1],
            [0, 1, 2],
            [0, 0, 65, 130],
            [0, 1000, 1001, 3001],
            [0, 2000, 2000, 8000],
            [2048 * i for i in range(17)],
        )
    ],
)
def test_is_the_plain_version(bounds: list[int]) -> None:
    y = _outputs(bounds[-1])
    assert fits(y.cuda(), groups=len(bounds) - 1)
    shape, sketch = _plain(y, bounds)
    found, found_sketch = _measured(y.cuda(), bounds)
    for name in COLUMNS:
        here, there = getattr(shape, name), getattr(found, name)
        torch.testing.assert_close(there, here, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert all(torch.equal(getattr(shape, name), getattr(found, name)) for name in FLAGS)
    for name in ("wd_se", "wd_halves", "wd_without"):
        here, there = getattr(sketch, name), getattr(found_sketch, name)
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5, equal_nan=True)
    for name in PLACES:
        here, there = getattr(sketch, name), getattr(found_sketch, name)
        torch.testing.assert_close(there, here, rtol=1e-6, atol=0)
    moved = (sketch.counts - found_sketch.counts).abs().sum()
    assert int(moved) <= 1e-5 * y.numel()
    assert found_sketch.n_tokens == y.shape[1]


@pytest.mark.parametrize("bounds", [pytest.param([0, 4096, 8192], marks=on_gpu)])
def test_repeats_to_the_bit(bounds: list[int]) -> None:
    y = _outputs(bounds[-1]).cuda()
    first, second = (_measured(y, bounds) for _ in range(2))
    for name in COLUMNS:
        here, there = getattr(first[0], name), getattr(second[0], name)
        assert torch.equal(here.nan_to_num(), there.nan_to_num()), name
    assert torch.equal(first[1].wd_se.nan_to_num(), second[1].wd_se.nan_to_num())


@pytest.mark.parametrize(
    ("shape", "groups"),
    [pytest.param(s, g, marks=on_gpu) for s, g in [((2, 60_000), 1), ((2, 100), 33), ((0, 5), 1)]],
)
def test_refuses_long_rows_many_groups_and_nothing(shape: tuple[int, int], groups: int) -> None:
    assert not fits(torch.zeros(shape, device="cuda"), groups=groups)


@pytest.mark.parametrize("offset", [pytest.param(1, marks=on_gpu)])
def test_leaves_rows_off_16_bytes_to_the_plain_version(offset: int) -> None:
    y = torch.randn(4 * 64 + offset, generator=torch_rng(1, "rows")).cuda()[offset:].view(4, 64)
    assert not fits(y, groups=1)
    torch.testing.assert_close(shape_statistics(y).wd.cpu(), shape_statistics(y.cpu()).wd)


def test_leaves_other_devices_to_the_plain_version() -> None:
    assert not fits(torch.zeros(2, 100), groups=1)
