import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.experts.linear import pack, unpack


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 19)),
    kept=st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_packing_keeps_every_bit(
    shape: tuple[int, ...], kept: float, dtype: torch.dtype, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=rng).to(dtype)
    weight = weight * (torch.rand(shape, generator=rng) < kept)
    bitmap, values = pack(weight)
    assert values.numel() == int((weight != 0).sum())
    assert bitmap.numel() == (weight.numel() + 7) // 8
    assert torch.equal(unpack((bitmap, values), shape), weight)


def test_a_packed_row_by_hand() -> None:
    bitmap, values = pack(torch.tensor([[0.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 4.0]]))
    assert bitmap.tolist() == [0b01001000, 0b10000000]
    assert values.tolist() == [2.0, 3.0, 4.0]


def test_what_does_not_fit_is_refused() -> None:
    bitmap, values = pack(torch.ones(2, 9))
    with pytest.raises(InvalidInput, match="8 bits"):
        unpack((bitmap, values), (8,))
    with pytest.raises(InvalidInput, match="18 places"):
        unpack((bitmap, values[:-1]), (2, 9))
