"""What is packed comes back bit for bit, at every width, and takes the bytes it should."""

import pytest
import torch

from entangle.errors import InvalidInput
from entangle.packed.formats import Codes, Layout, lanes_of, pack, unpack


def sparse(k: int, rows: int, cols: int, share: float, dtype: torch.dtype) -> torch.Tensor:
    rng = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(k, rows, cols, generator=rng)
    return (weight * (torch.rand(k, rows, cols, generator=rng) >= share)).to(dtype)


def of_16(weight: torch.Tensor, n: int) -> torch.Tensor:
    """Keep the first ceil(n r / 16) of every block, r its columns."""
    weight = weight.clone()
    weight[weight == 0] = 1
    for start in range(0, weight.shape[-1], 16):
        r = min(16, weight.shape[-1] - start)
        order = torch.rand(*weight.shape[:-1], r).argsort(-1)
        weight[..., start : start + r] *= order < -(-n * r // 16)
    return weight


def rows_of(layout: Layout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([unpack(tensors, layout, e) for e in range(layout.experts)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cols", [1, 7, 16, 63, 64, 100, 576])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("form", ["bitmap", "delta"])
def test_any_zeros_give_back_the_weight(
    form: str, dtype: torch.dtype, cols: int, share: float
) -> None:
    weight = sparse(3, 5, cols, share, dtype)
    weight[1, 2] = 0
    layout, tensors = pack(weight, form)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == layout.tensors()
    assert torch.equal(rows_of(layout, tensors), weight)
    assert torch.equal(unpack(tensors, layout, 2, slice(1, 4)), weight[2, 1:4])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("cols", [1, 16, 40, 64, 576, 640, 1536, 4096])
def test_n_of_16_gives_back_the_weight(n: int, cols: int) -> None:
    weight = of_16(sparse(2, 3, cols, 0.0, torch.bfloat16), n)
    weight[0, 1, : cols // 2] = 0
    layout, tensors = pack(weight, "n16", kept=n)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == layout.tensors()
    assert torch.equal(rows_of(layout, tensors), weight)
    at = lanes_of(cols, n, 16)
    assert at.blocks * 16 >= cols
    assert at.steps * at.chunk >= at.rounds * n
    if cols >= 576:
        assert at.lanes * at.steps * at.chunk <= 1.15 * n * cols / 16


@pytest.mark.parametrize("form", ["bitmap", "delta", "n16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("grouped", [False, True])
def test_codes_give_back_the_grid(form: str, bits: int, grouped: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    k, rows, cols = 2, 6, 300
    scale, zero = torch.rand(k, rows, generator=rng) + 0.1, torch.full((k, rows), 2.0 ** (bits - 1))
    steps = torch.randint(1, 256, (k, rows, 3), dtype=torch.uint8, generator=rng)
    grid = Codes(bits, scale, zero, steps if grouped else None)
    code = torch.randint(0, 2**bits, (k, rows, cols), generator=rng)
    kept = of_16(torch.ones(k, rows, cols), 5) != 0
    weight = torch.where(kept, (code - zero[..., None]) * grid.unit(cols), 0)
    layout, tensors = pack(weight, form, codes=grid)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == layout.tensors()
    assert torch.equal(rows_of(layout, tensors), weight)
    off = weight.clone()
    off[kept] += 0.4 * grid.unit(cols).expand_as(off)[kept]
    with pytest.raises(InvalidInput, match="grid"):
        pack(off, form, codes=grid)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_four_bits_take_the_bytes_they_should(share: float) -> None:
    """Expert bytes of int4 with groups of 128 against bfloat16: 0.4 of a bitmap, 0.43 of n16."""
    k, rows, cols = 1, 8, 4096
    grid = Codes(4, torch.ones(k, rows), torch.full((k, rows), 8.0),
                 torch.full((k, rows, 32), 3, dtype=torch.uint8))  # fmt: skip
    order = torch.rand(k, rows, cols).argsort(-1)
    exact = torch.where(order >= share * cols, 3.0, 0.0)
    blocks = of_16(torch.ones(k, rows, cols), 8 if share == 0.5 else 5) * 3
    for form, weight, most in (("bitmap", exact, 0.4), ("n16", blocks, 0.43)):
        size = [
            sum(t.numel() * t.element_size() for t in pack(weight, form, **how)[1].values())
            for how in ({"codes": grid}, {"values": "bfloat16"})
        ]
        assert size[0] <= most * size[1]


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.ones(1, 2, 32)
    with pytest.raises(InvalidInput, match="16 values, more than 8"):
        pack(weight, "n16", kept=8)
    with pytest.raises(InvalidInput, match="overflows float16"):
        pack(weight * 1e6, values="float16")
