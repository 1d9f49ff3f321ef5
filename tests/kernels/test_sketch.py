"""The kernels of the sketches against plain torch on the CPU: counts to the last one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from entangle.kernels import sketch as kernels
from entangle.seeding import torch_rng
from entangle.stats import bins
from entangle.stats.edges import N_BINS, PER_OCTAVE, magnitude_edges

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def _numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Gaussian numbers; with some NaN, infinite, huge, and equal ones if there are many."""
    y = 3 * torch.randn(rows, columns, generator=torch_rng(0, "sketch kernels", rows, columns)) + 1
    if rows > 20 and columns > 5:
        y[3, 1], y[4, 1], y[4, 2], y[5, 2] = torch.nan, torch.inf, -torch.inf, torch.inf
        y[rows // 2, 3], y[-1, 4], y[rows // 2, -1] = torch.nan, torch.nan, torch.inf
        y[6, 0], y[7, 3], y[8, 3] = 3e4, 1e-6, -1e-6
        if dtype != torch.float16:
            y[9, 0], y[10, 4] = 1e12, -3e38
        y[11:, 5] = 1.5
    return y.to(dtype)


def _counted(index: Tensor, n_bins: int) -> Tensor:
    counts = [torch.bincount(one.long(), minlength=n_bins) for one in index.t()]
    return torch.stack(counts).int()


def _add_outputs(
    y: Tensor, location: Tensor, scale: Tensor, device: str = "cpu"
) -> dict[str, Tensor]:
    n = y.shape[1]
    state: dict[str, Any] = {
        "counts": torch.zeros(n, N_BINS, dtype=torch.int32),
        "powers": torch.zeros(4, n, dtype=torch.float64),
        "group_powers": torch.ones(2, n, dtype=torch.float64),
        "low": torch.full((n,), torch.inf),
        "high": torch.full((n,), -torch.inf),
        "nan": torch.zeros(n, dtype=torch.bool),
        "inf": torch.zeros(n, dtype=torch.bool),
    }
    state = {name: value.to(device) for name, value in state.items()}
    kernels.add_outputs(y, location.to(device), scale.to(device), **state)
    return {name: value.cpu() for name, value in state.items()}


def _assert_added(
    y: Tensor, location: Tensor, scale: Tensor, *, columns: slice = slice(None), step: int = 1
) -> None:
    """Compare what is added of some columns of every ``step``-th row, which are not copied."""
    location, scale = location[columns], scale[columns]
    x = (y[::step, columns].float() - location) / scale
    found = _add_outputs(y.to(DEVICE)[::step, columns], location, scale, DEVICE)
    assert torch.equal(found["nan"], x.isnan().any(0))
    assert torch.equal(found["inf"], x.isinf().any(0))
    x.nan_to_num_(0.0, 0.0, 0.0)
    assert torch.equal(found["low"], x.amin(0))
    assert torch.equal(found["high"], x.amax(0))
    assert torch.equal(found["counts"], _counted(bins.signed_index(x), N_BINS))
    for k, power in enumerate(found["powers"], start=1):
        size = x.double().abs().pow(k).sum(0)
        assert ((power - x.double().pow(k).sum(0)).abs() <= 1e-5 * size).all()
    torch.testing.assert_close(found["group_powers"], found["powers"][:2] + 1)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "neurons"), [(1, 1), (2, 2), (5, 3), (40, 130), (2100, 66), (300, 9001)]
)
def test_outputs(dtype: torch.dtype, tokens: int, neurons: int) -> None:
    y = _numbers(tokens, neurons, dtype)
    location = torch.randn(neurons, generator=torch_rng(1, "sketch kernels"))
    scale = torch.rand(neurons, generator=torch_rng(2, "sketch kernels")) + 0.5
    location[5:6] = 1.5
    _assert_added(y, location, scale)
    scale[::5] = 1e-3  # many far outputs
    _assert_added(y, location, scale)
    if neurons > 5:
        scale[3], scale[4], scale[5] = 1e-35, 3e33, 1e-42  # to be divided by with care
        _assert_added(y, location, scale)


@DTYPES
@pytest.mark.parametrize("columns", [slice(1, None), slice(1, 66), slice(2, 64), slice(0, 5)])
def test_outputs_of_some_columns(dtype: torch.dtype, columns: slice) -> None:
    location, scale = torch.zeros(67), torch.ones(67)
    for width in (66, 67):
        y = _numbers(150, width, dtype)
        _assert_added(y, location[:width], scale[:width], columns=columns)
        _assert_added(y, location[:width], scale[:width], columns=columns, step=2)


def test_outputs_give_the_same_bytes_each_time() -> None:
    y = _numbers(4000, 700, torch.bfloat16).to(DEVICE)
    one, two = (_add_outputs(y, torch.zeros(700), torch.ones(700), DEVICE) for _ in range(2))
    for name, value in one.items():
        assert torch.equal(value.view(torch.uint8), two[name].view(torch.uint8)), name


def _assert_pairs_added(
    first: Tensor, second: Tensor, distance: Tensor, scale: Tensor, starts: tuple[int, int]
) -> None:
    (rows, n), n_bins = first.shape, 3 * PER_OCTAVE
    state = {
        "counts": torch.zeros(n, n_bins, dtype=torch.int32, device=DEVICE),
        "sums": torch.zeros(2, n, dtype=torch.float64, device=DEVICE),
        "highest": torch.zeros(n, device=DEVICE),
    }
    there = scale.to(DEVICE)
    kernels.add_pairs(first, second, distance.to(DEVICE), there, starts=starts, **state)
    statistics = kernels.pair_statistics(
        state["counts"], state["sums"], state["highest"], there, n_pairs=int((distance > 0).sum())
    ).cpu()
    found = {name: value.cpu() for name, value in state.items()}
    a, b = ((start + torch.arange(len(distance))) % rows for start in starts)
    kept = distance > 0
    dy = (first.cpu()[a].float() - second.cpu()[b].float()).abs()[kept]
    assert torch.equal(found["counts"], _counted(bins.magnitude_index(dy / scale, n_bins), n_bins))
    slope = (dy.double() / distance[kept, None].double()).sum(0)
    wanted = torch.stack([slope, dy.double().sum(0)])
    torch.testing.assert_close(found["sums"], wanted, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(found["highest"], dy.amax(0), rtol=0, atol=0, equal_nan=True)
    mean = wanted / len(dy)
    torch.testing.assert_close(statistics[::2], mean, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(statistics[3], dy.amax(0).double(), rtol=0, atol=0, equal_nan=True)
    _assert_medians(statistics[1], dy, scale)


def _assert_medians(found: Tensor, dy: Tensor, scale: Tensor) -> None:
    """Medians are interpolated in the bin of the middle one; NaN in the first and the last bin."""
    edges = torch.from_numpy(magnitude_edges(3 * PER_OCTAVE))
    index = bins.magnitude_index(dy / scale, len(edges) - 1).long()
    bin_ = index.sort(0).values[(len(dy) - 1) // 2]
    below, inside = (index < bin_).sum(0), (index == bin_).sum(0)
    part = (len(dy) / 2 - below.double()) / inside
    wanted = scale * (edges[bin_] + part * edges.diff()[bin_])
    wanted[(bin_ == 0) | (bin_ == len(edges) - 2) | dy.isnan().any(0)] = torch.nan
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize(("rows", "neurons"), [(1, 1), (2, 3), (65, 70), (1500, 66), (300, 9001)])
def test_pairs(dtype: torch.dtype, rows: int, neurons: int) -> None:
    y = _numbers(2 * rows, neurons, dtype)
    if dtype != torch.float16:
        y.clamp_(-1e30, 1e30)
    distance = torch.rand(rows, generator=torch_rng(3, "sketch kernels", rows)) + 0.1
    if rows > 20:
        distance[::9], distance[5] = 0, torch.nan
    scale = torch.rand(neurons, generator=torch_rng(4, "sketch kernels")) + 1
    first, second = y.to(DEVICE).split(rows)
    for starts, n_pairs in (((0, 0), rows), ((rows // 2, rows - 1), rows), ((rows - 1, 0), 2)):
        _assert_pairs_added(first, second, distance[1 - rows % 2 :][:n_pairs], scale, starts)
    if neurons > 5:
        scale[3], scale[4], scale[5] = 1e-35, 3e33, 1e-42
        _assert_pairs_added(first, second, distance, scale, (0, rows // 3))
        _assert_pairs_added(first[:, 1:], second[:, 1:], distance, scale[1:], (0, 0))


@DTYPES
@pytest.mark.parametrize("features", [64, 7, 515])
def test_row_distances(dtype: torch.dtype, features: int) -> None:
    x = torch.randn(34, features, generator=torch_rng(5, "sketch kernels")).to(dtype)
    for first, second in ((x[:17], x[17:]), (x[1:17], x[18:])):
        rows = len(first)
        for starts, n_pairs in (((0, 0), None), ((3, 0), rows), ((0, rows - 1), 5), ((1, 2), 0)):
            a, b = ((s + torch.arange(rows if n_pairs is None else n_pairs)) % rows for s in starts)
            wanted = (first[a].float() - second[b].float()).norm(dim=1)
            there = (half.to(DEVICE) for half in (first, second))
            found = kernels.row_distances(*there, starts=starts, n_pairs=n_pairs).cpu()
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("neurons", [1, 70])
def test_close_group(neurons: int) -> None:
    fold, joined = 8, N_BINS // 8
    x = 5 * torch.randn(200, neurons, generator=torch_rng(6, "sketch kernels")).exp()
    x[:, ::3] *= -1
    counts = _counted(bins.signed_index(x), N_BINS)
    now = counts.view(neurons, joined, fold).sum(2, dtype=torch.int32)
    closed, group = now // 3, torch.ones_like(now)
    there = {"closed": closed.to(DEVICE), "group": group.to(DEVICE)}
    ends = {"low": x.amin(0).to(DEVICE), "high": x.amax(0).to(DEVICE)}
    kernels.close_group(counts.to(DEVICE), **there, **ends)
    assert torch.equal(there["closed"].cpu(), now)
    assert torch.equal(there["group"].cpu(), group + now - closed)


def test_a_grid_covers_all_neurons_and_no_part_counts_too_many() -> None:
    device = torch.device(DEVICE)
    for tokens, neurons in ((1, 1), (4096, 11008), (4096, 4096), (10**6, 64), (10**6, 50257)):
        tiles, parts = kernels._grid(tokens, neurons, device)
        assert 64 * (tiles - 1) < neurons <= 64 * tiles
        assert parts >= 1
        assert -(-tokens // parts) <= 60_000


@DTYPES
@pytest.mark.parametrize("neurons", [64, 130])
def test_outputs_of_several_layers(dtype: torch.dtype, neurons: int) -> None:
    y = _numbers(3000, 2 * neurons, dtype).to(DEVICE)[:, :neurons]  # as gate among gate and up
    ends = [(0, 700), (700, 700), (700, 701), (800, 3000)]
    blocks = kernels.RowBlocks(ends, y.device)
    location = torch.randn(4 * neurons, generator=torch_rng(1, "layers")).to(DEVICE)
    scale = (torch.rand(4 * neurons, generator=torch_rng(2, "layers")) + 0.5).to(DEVICE)

    def state(n: int) -> dict[str, Any]:
        return {
            "counts": torch.zeros(n, N_BINS, dtype=torch.int32, device=DEVICE),
            "powers": torch.zeros(4, n, dtype=torch.float64, device=DEVICE),
            "group_powers": torch.zeros(2, n, dtype=torch.float64, device=DEVICE),
            "low": torch.full((n,), torch.inf, device=DEVICE),
            "high": torch.full((n,), -torch.inf, device=DEVICE),
            "nan": torch.zeros(n, dtype=torch.bool, device=DEVICE),
            "inf": torch.zeros(n, dtype=torch.bool, device=DEVICE),
        }

    at_once = state(4 * neurons)
    kernels.add_outputs(y, location, scale, **at_once, blocks=blocks)
    for number, (start, end) in enumerate(ends):
        own = slice(number * neurons, (number + 1) * neurons)
        alone = state(neurons)
        if end > start:
            kernels.add_outputs(y[start:end], location[own], scale[own], **alone)
        for name, value in alone.items():
            there = at_once[name][..., own] if "powers" in name else at_once[name][own]
            if "powers" in name:
                torch.testing.assert_close(there, value, rtol=1e-5, atol=1e-3)
            else:
                assert torch.equal(there, value), name


@DTYPES
def test_sums_of_squares_of_several_layers(dtype: torch.dtype) -> None:
    x = torch.randn(2000, 130, generator=torch_rng(0, "squares")).to(dtype).to(DEVICE)[:, :100]
    ends = [(0, 3), (3, 3), (10, 2000)]
    found = torch.ones(3, 100, dtype=torch.float64, device=DEVICE)
    kernels.add_squares(x, kernels.RowBlocks(ends, x.device), found)
    for own, (start, end) in zip(found, ends, strict=True):
        torch.testing.assert_close(
            own, x[start:end].double().square().sum(0) + 1, rtol=1e-5, atol=0
        )
