"""Grids of groups of 128 columns: symmetric, in whole steps of a row's scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.pruning import METHODS, prune
from entangle.pruning.grid import fit_grids, fit_groups, quantize
from entangle.seeding import torch_rng
from tests.pruning.problems import make
from tests.reference.sparsegpt import sparsegpt as reference


def test_by_hand() -> None:
    # 3 bits: indices -4 … 3. The first group reaches up to 3 · 255 (255 apart), the second down to
    # -4 · 100 (100 apart), the third to 3 · 1.25, which is rounded up to whole steps of 1.
    weight = torch.zeros(1, 2, 300)
    weight[0, 0, :4] = torch.tensor([765.0, -1020, 120, 130])
    weight[0, 0, 128:131] = torch.tensor([-400.0, 149, 151])
    weight[0, 0, 299] = 3.75
    found = fit_groups(weight, 3)
    assert found.scale.tolist() == [[1, torch.finfo(torch.float32).tiny]]
    assert found.steps.tolist() == [[[255, 100, 2], [1, 1, 1]]]
    rounded = quantize(weight, 3, 128)
    assert rounded[0, 0, :4].tolist() == [765, -1020, 0, 255]
    assert rounded[0, 0, 128:131].tolist() == [-400, 100, 200]
    assert rounded[0, 0, 299] == 4
    assert not rounded[0, 1].any()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    bits=st.integers(2, 8),
    cols=st.sampled_from([1, 100, 128, 129, 300]),
    power=st.sampled_from([-100, 0, 100]),
)
def test_properties(seed: int, bits: int, cols: int, power: int) -> None:
    rng = torch_rng(seed, "groups")
    weight = torch.randn(2, 3, cols, generator=rng) * 2.0**power
    weight *= torch.logspace(0, 3, cols)
    before = weight.clone()
    rounded, (scale, steps) = quantize(weight, bits, 128), fit_groups(weight, bits)
    assert torch.equal(weight, before)
    unit = (scale[..., None] * steps).repeat_interleave(128, -1)[..., :cols]
    assert ((weight - rounded).abs() <= unit * 0.50001).all()  # nothing is cut off
    assert (steps.amax(-1) == 255).all()
    index = rounded / unit
    torch.testing.assert_close(index, index.round(), rtol=1e-5, atol=1e-5)
    assert index.min() > -(2 ** (bits - 1)) - 0.1
    assert index.max() < 2 ** (bits - 1) - 0.9
    assert torch.equal(quantize(weight * 4, bits, 128), rounded * 4)
    alone = torch.cat([quantize(row, bits, 128) for row in weight.split(1, 1)], 1)
    assert torch.equal(alone, rounded)


def test_one_group_of_one_scale_is_the_symmetric_grid_of_the_row() -> None:
    weight = torch.tensor([[[-8.0, 1, 2.6, 7]]])
    assert quantize(weight, 4, 128).round(decimals=5).tolist() == [[[-8, 1, 3, 7]]]
    assert len(fit_grids(weight, 4, 128)) == 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["row", "layer", "block", "2:5"])
def test_every_method_lands_on_the_grid(method: str, pattern: str) -> None:
    weight, gram = make(2, 4, 150, dtype=torch.float32)
    sparsity = 0.6
    result = prune(
        weight, gram, method=method, sparsity=sparsity, pattern=pattern, bits=4, group_size=128
    )
    scale, steps = fit_groups(weight, 4)
    unit = (scale[..., None] * steps).repeat_interleave(128, -1)[..., :150]
    index = result.weight / unit
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-5)
    assert index.abs().max() <= 8.001
    assert not result.weight[~result.mask].any()
    if method != "sparsegpt":
        assert torch.equal(result.weight, quantize(weight, 4, 128) * result.mask)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bits", [2, 4])
def test_matches_the_reference(bits: int, sparsity: float) -> None:
    weight, gram = (part[0] for part in make(1, 4, 150))
    weight[:, 128:] *= 0.1
    found = prune(weight, gram, sparsity=sparsity, bits=bits, group_size=128)
    options = {"sparsity": sparsity, "bits": bits, "span": 128}
    expected, kept = reference(weight.numpy(), gram.numpy(), **options)  # type: ignore[arg-type]
    assert torch.equal(found.mask, torch.from_numpy(kept))
    torch.testing.assert_close(found.weight, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_a_pattern_of_groups_that_cross_the_grids() -> None:
    weight, gram = (part[0] for part in make(1, 3, 150))
    weight[:, 128:] *= 0.1
    found = prune(weight, gram, pattern="10:30", bits=4, group_size=128)
    expected, kept = reference(weight.numpy(), gram.numpy(), group=(10, 30), bits=4, span=128)
    assert torch.equal(found.mask, torch.from_numpy(kept))
    torch.testing.assert_close(found.weight, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_groups_lose_less_than_rows_where_columns_differ() -> None:
    weight, gram = make(1, 8, 256)
    weight[..., 128:] *= 0.05
    gram[:, 128:, 128:] *= 400
    losses = [
        prune(weight, gram, sparsity=0.5, bits=4, group_size=size).loss_per_neuron.sum()
        for size in (None, 128)
    ]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("bits", "group_size"), [(4, 64), (4, 0), (4, True), (None, 128), (1, 128), (9, 128)]
)
def test_group_sizes_that_are_refused(bits: int | None, group_size: int) -> None:
    with pytest.raises(InvalidInput, match="group_size"):
        prune(
            torch.ones(2, 256), method="magnitude", sparsity=0.5, bits=bits, group_size=group_size
        )
