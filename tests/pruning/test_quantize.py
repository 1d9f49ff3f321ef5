import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.pruning.grid import check_bits, fit_grid, quantize
from entangle.seeding import torch_rng


def test_by_hand() -> None:
    # Range [-1, 2], 2 bits: step 3 / 3 = 1, values -1, 0, 1, 2.
    weight = torch.tensor([[[-1.0, 2, 0.4, 0.6, 1.4, -0.6]]])
    assert quantize(weight, 2).tolist() == [[[-1, 2, 0, 1, 1, -1]]]


def test_a_row_of_one_sign_reaches_to_zero() -> None:
    # Range [0, 3], step 1: without zero it would be [2, 3] with step 1/3.
    assert quantize(torch.tensor([[[3.0, 2.4, 2.6]]]), 2).tolist() == [[[3, 2, 3]]]
    assert quantize(torch.tensor([[[-3.0, -2.4, -2.6]]]), 2).tolist() == [[[-3, -2, -3]]]


def test_a_row_of_zeros_stays() -> None:
    weight = torch.zeros(1, 2, 3)
    grid = fit_grid(weight, 4)
    assert torch.equal(grid.scale, torch.full((1, 2), 2 / 15))
    assert torch.equal(quantize(weight, 4), weight)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), bits=st.integers(1, 8))
def test_properties(seed: int, bits: int) -> None:
    weight = torch.randn(2, 3, 40, generator=torch_rng(seed, "quantize")).double()
    rounded = quantize(weight, bits)
    step = fit_grid(weight, bits).scale[..., None]
    # Off by half a step; at the ends by a whole one, since the grid is shifted to contain zero.
    assert ((weight - rounded).abs() <= step * (1 + 1e-9)).all()
    assert ((weight - rounded).abs() <= step / 2 * (1 + 1e-9)).double().mean() > 0.8
    assert max(len(set(row)) for row in rounded.flatten(0, 1).tolist()) <= 2**bits
    torch.testing.assert_close(quantize(weight * 4, bits), rounded * 4)
    assert torch.equal(
        weight, torch.randn(2, 3, 40, generator=torch_rng(seed, "quantize")).double()
    )


@pytest.mark.parametrize("bits", [0, 17, -3, True])
def test_bits_out_of_range(bits: int) -> None:
    expected = rf"`bits`.*\[1, 16\].*{bits}"
    with pytest.raises(InvalidInput, match=expected):
        check_bits(bits)
    assert check_bits(None) is None


def test_the_ends_stay_on_the_grid() -> None:
    # Range [-1.5, 1.5], 2 bits: step 1, zero at index round(1.5) = 2, so the values are -2 … 1.
    weight = torch.tensor([[[-1.5, 1.5, 0.4, 0.6]]])
    assert quantize(weight, 2).tolist() == [[[-2, 1, 0, 1]]]
    assert fit_grid(weight, 2).top == 3
