"""The kernels for CPUs against the plain versions that they take the place of."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from entangle.kernels import binned, counting, native, weights
from entangle.stats import bins
from entangle.stats.bins import mean_and_std
from entangle.stats.mapping_difficulty import PairSketch
from entangle.stats.sketch import OutputSketch, place_bins
from entangle.stats.wasserstein import reach

FORMS = native.forms()
STATE = ("_counts", "_group_counts", "_low", "_high", "_nan", "_inf")


@pytest.fixture(params=FORMS, autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "forms", lambda: (request.param,))
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _outputs(tokens: int = 70, neurons: int = 85, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return outputs of many shapes, some not finite, for tiles of 16 neurons and a rest."""
    y = torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(0))
    y[:, 3] = y[:, 3].exp() ** 6  # beyond the bins
    y[:, 4] = 7.0
    y[:, 5] = torch.where(y[:, 5] > 1.5, y[:, 5] * 1e6, 0.0)
    y[2, 6], y[3, 7], y[4, 8] = torch.nan, torch.inf, -torch.inf
    y[:, 9] = y[:, 9] - 300
    return y.to(dtype)


def _sketches(y: Tensor, n_groups: int) -> tuple[OutputSketch, OutputSketch]:
    """Return sketches counted by the kernel, and plainly, with the same bins."""
    one = OutputSketch(y.shape[1], n_groups=n_groups).placed_at(torch.stack(place_bins(y)))
    two = one.fork() if n_groups == 8 else one.placed_at(one.place)  # type: ignore[arg-type]
    parts = y.tensor_split(n_groups)
    one.update(parts[0], group=0)
    for group, part in enumerate(parts[1:], 1):
        one.update(part, group=group)
    two._add = lambda *given: OutputSketch._add.__wrapped__(two, *given)  # type: ignore[attr-defined,method-assign]
    for group, part in enumerate(parts):
        two.update(part, group=group)
    return one, two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outputs_are_counted_to_the_bit_and_summed_to_rounding(dtype: torch.dtype) -> None:
    one, two = _sketches(_outputs(dtype=dtype).clamp(-6e4, 6e4), 2)
    for name in STATE:
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    torch.testing.assert_close(one._powers, two._powers, rtol=2e-6, atol=1e-4)
    torch.testing.assert_close(one._group_powers, two._group_powers, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("n_groups", [2, 3, 8])
def test_distances_are_those_of_the_plain_version(n_groups: int) -> None:
    one, _ = _sketches(_outputs(), n_groups)
    one.result()
    good = ~(one._nan | one._inf)
    good[4] = False
    shift, spread = mean_and_std(one._powers / one.n_tokens)
    found = one._distances(one._counts, shift, spread, fold=1)
    plain = OutputSketch._distances.__wrapped__(one, one._counts, shift, spread, fold=1)  # type: ignore[attr-defined]
    for name in ("wd", "wd_bound", "ks"):
        first, second = (getattr(part, name)[good] for part in (found, plain))
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-13, msg=name)
    for first, second in zip(one._resample(), OutputSketch._resample.__wrapped__(one), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(
            first[..., good], second[..., good], rtol=1e-9, atol=1e-12, equal_nan=True
        )


def test_an_outlier_of_a_group_leaves_no_rounding_where_the_group_is_left_out() -> None:
    y = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    y[5] = 1e12
    one, alone = OutputSketch(3, n_groups=4), OutputSketch(3)
    for group, part in enumerate(y.tensor_split(4)):
        one.update(part, group=group)
    alone.update(y[64:])
    without = one.result().wd_without[0]
    _, _, plain = OutputSketch._resample.__wrapped__(one)  # type: ignore[attr-defined]
    torch.testing.assert_close(plain[0], without, rtol=1e-9, atol=0)
    torch.testing.assert_close(without, alone.result().shape.wd, rtol=0, atol=0.02)


def test_an_outlier_far_beyond_a_narrow_core_is_no_infinity() -> None:
    y = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * 1e-37
    y[3] = torch.tensor([100.0, 1e30])
    sketch = OutputSketch(2)
    sketch.update(y)
    found = sketch.result().shape
    assert not found.inf.any()
    assert not found.constant.any()
    torch.testing.assert_close(found.mean, y.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.std, y.double().std(0, correction=0), rtol=1e-6, atol=0)


def test_a_neuron_and_the_threads_know_nothing_of_one_another(threads: None) -> None:
    y, results = _outputs(), []
    for count, chosen in ((1, slice(0, 85)), (2, slice(0, 85)), (2, slice(20, 47))):
        torch.set_num_threads(count)
        one, _ = _sketches(y[:, chosen], 3)
        results.append(one.result())
    whole, again, some = results
    for name in ("wd", "ks", "mean", "std", "skewness", "excess_kurtosis"):
        first, second, third = (getattr(one.shape, name) for one in (whole, again, some))
        assert torch.equal(first.nan_to_num(), second.nan_to_num())
        assert torch.equal(first[20:47], third)
    assert torch.equal(whole.wd_bound[20:47], some.wd_bound)
    assert torch.equal(whole.wd_se[20:47], some.wd_se)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairs_are_counted_to_the_bit_and_summed_to_rounding(dtype: torch.dtype) -> None:
    y = _outputs(dtype=dtype)
    first, second = y[:30], y[30:60]
    dx = torch.rand(30, generator=torch.Generator().manual_seed(1)) + 0.5
    dx[7] = 0.0
    one = PairSketch(y.shape[1])
    one.update(first, second, dx)
    two = one.fork()
    two._count = lambda *given: PairSketch._count.__wrapped__(two, *given)  # type: ignore[attr-defined,method-assign]
    two.update(first, second, dx)
    for sketch in (one, two):
        assert (sketch.n_pairs, sketch.n_identical) == (29, 1)
    assert torch.equal(one._counts, two._counts)
    torch.testing.assert_close(one._sums, two._sums, rtol=2e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(one._dy_max, two._dy_max, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 15, 64, 203])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_over_the_rows_of_a_weight(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    if not native.reads(dtype):
        dtype = torch.float32
    weight = torch.randn(37, columns + 3, generator=generator).to(dtype)[:, :columns]
    sizes = torch.rand(2, columns, generator=generator)
    wide = weight.double()
    torch.testing.assert_close(weights.squares(weight), wide.square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        reach(weight, sizes), sizes.double() @ wide.abs().T, rtol=1e-6, atol=0
    )


def test_memory_that_was_given_back_holds_zeros() -> None:
    y, scratch = _outputs(), bins.Scratch()
    first = OutputSketch(y.shape[1], scratch=scratch)
    for group, part in enumerate(y.tensor_split(4)):
        first.update(part, group=2 * group)
    expected = first.result()
    held = {first._counts.data_ptr(), first._group_counts.data_ptr()}
    first.release()
    second = OutputSketch(y.shape[1], scratch=scratch)
    for group, part in enumerate(y.tensor_split(4)):
        second.update(part, group=2 * group)
    assert {second._counts.data_ptr(), second._group_counts.data_ptr()} == held
    found = second.result()
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.wd_se.nan_to_num(), expected.wd_se.nan_to_num())


def test_what_is_not_on_a_cpu_or_has_no_code_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    y, counts = torch.zeros(4, 8), torch.zeros(1, 4, 64, dtype=torch.int32)
    assert counting.fits(y)
    assert weights.fits(y)
    assert binned.fits(counts)
    assert not binned.fits(counts.long())
    assert not counting.fits(y.to("meta"))
    monkeypatch.setattr(native, "forms", lambda: ())
    assert not any((counting.fits(y), weights.fits(y), binned.fits(counts)))
