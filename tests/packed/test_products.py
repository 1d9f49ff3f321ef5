"""Products with packed experts are those with the experts' dense weights."""

import pytest
import torch
from torch.nn.functional import silu

from entangle.packed.activations import ACTIVATIONS
from entangle.packed.formats import Codes, Packed, pack, unpack
from entangle.packed.products import gated, linear


def packed(
    k: int, rows: int, cols: int, form: str = "bitmap", dtype: torch.dtype = torch.float32
) -> Packed:
    rng = torch.Generator().manual_seed(rows * cols + k)
    weight = torch.randn(k, rows, cols, generator=rng)
    weight *= torch.rand(k, rows, cols, generator=rng) < 0.3
    layout, tensors = pack(weight.to(dtype), form)
    return Packed(tensors, layout, torch.randn(rows, generator=rng))


def coded(k: int, rows: int, cols: int, form: str) -> Packed:
    rng = torch.Generator().manual_seed(0)
    scale = torch.rand(k, rows, generator=rng) + 0.1
    levels = torch.randint(-8, 8, (k, rows, cols), generator=rng)
    levels *= torch.rand(k, rows, cols, generator=rng) < 0.3
    codes = Codes(4, scale, torch.full((k, rows), 8.0))
    layout, tensors = pack(levels * scale[..., None], form, codes=codes)
    return Packed(tensors, layout)


def expected(x: torch.Tensor, clusters: torch.Tensor, one: Packed) -> torch.Tensor:
    weight = torch.stack(
        [unpack(one.tensors, one.layout, e).double() for e in range(one.layout.experts)]
    )
    found = torch.einsum("ti,toi->to", x.double(), weight[clusters])
    return found if one.bias is None else found + one.bias.double()


@pytest.mark.parametrize("form", ["bitmap", "n16"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 7), (3, 64), (40, 100)])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_linear(form: str, rows: int, cols: int, tokens: int) -> None:
    one = packed(4, rows, cols, form)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, cols, generator=rng)
    clusters = torch.randint(4, (tokens,), generator=rng)
    torch.testing.assert_close(linear(x, clusters, *one), expected(x, clusters, one).float())


@pytest.mark.parametrize("form", ["bitmap", "n16"])
def test_codes(form: str) -> None:
    one, x = coded(3, 6, 40, form), torch.randn(5, 40)
    clusters = torch.tensor([2, 0, 2, 1, 0])
    torch.testing.assert_close(linear(x, clusters, *one), expected(x, clusters, one).float())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_has_the_inputs_dtype(stored: torch.dtype, dtype: torch.dtype) -> None:
    one, x = packed(2, 8, 64, dtype=stored), torch.randn(3, 64).to(dtype)
    clusters = torch.tensor([1, 0, 1])
    found = linear(x, clusters, *one)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected(x, clusters, one).to(dtype), rtol=0.02, atol=0.02)


def test_tiles_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x, clusters = packed(2, 40, 30), torch.randn(4, 30), torch.tensor([0, 1, 1, 0])
    whole = linear(x, clusters, *one)
    monkeypatch.setattr("entangle.packed.products._TILE_BYTES", 40 * 30 * 7)
    torch.testing.assert_close(linear(x, clusters, *one), whole)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation: str) -> None:
    gate, up, x = packed(2, 12, 30), packed(2, 12, 30, "n16"), torch.randn(4, 30)
    clusters = torch.tensor([0, 1, 1, 0])
    first, second = (expected(x, clusters, one).float() for one in (gate, up))
    found = gated(x, clusters, gate, up, activation)
    torch.testing.assert_close(found, ACTIVATIONS[activation](first) * second)


def test_activations_by_hand() -> None:
    x = torch.tensor([-1.0, 2.0])
    assert ACTIVATIONS["relu2"](x).tolist() == [0.0, 4.0]
    torch.testing.assert_close(ACTIVATIONS["silu"](x), silu(x))
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), x * torch.special.ndtr(x))
