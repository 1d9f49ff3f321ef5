"""Packed experts on a GPU give what float64 products with the unpacked weights give."""

import pytest
import torch
from torch import Tensor

from entangle.packed import gpu
from entangle.packed.activations import ACTIVATIONS
from entangle.packed.formats import FORMATS, Codes, Packed, pack, unpack

pytestmark = pytest.mark.gpu
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = ((40, 100), (1, 7), (33, 576), (48, 4096), (16, 14336))


def layer(k: int, rows: int, cols: int, form: str, values: str, *, n: int = 5) -> Packed:
    """Return packed random experts, one of them with an empty row."""
    rng = torch.Generator().manual_seed(rows + cols)
    weight = torch.randn(k, rows, cols, generator=rng)
    if form == "n16":
        padded = torch.rand(k, rows, -(-cols // 16), 16, generator=rng)
        keep = (padded.argsort(-1).argsort(-1) < n).flatten(2)[..., :cols]
    else:
        keep = torch.rand(k, rows, cols, generator=rng) < 0.3
    keep[0, rows // 2] = False
    grid = None
    if values.startswith("int"):
        bits = int(values[3:])
        zero = torch.full((k, rows), 2.0 ** (bits - 1))
        scale = (torch.rand(k, rows, generator=rng) + 0.5) / 2.0 ** (bits + 6)
        steps = torch.randint(1, 256, (k, rows, -(-cols // 128)), dtype=torch.uint8, generator=rng)
        grid = Codes(bits, scale, zero, steps if cols > 100 else None)
        code = torch.randint(0, 2**bits, weight.shape, generator=rng)
        weight = (code - zero[..., None]) * grid.unit(cols)
    else:
        weight = weight.to(FLOATS[values])
    layout, tensors = pack(weight * keep, form, codes=grid)
    bias = torch.randn(rows, generator=rng)
    return Packed({name: t.cuda() for name, t in tensors.items()}, layout, bias.cuda())


def exact(x: Tensor, clusters: Tensor, one: Packed) -> tuple[Tensor, Tensor]:
    """Return the float64 outputs, and the sums of absolute products."""
    dense = torch.stack([unpack(one.tensors, one.layout, e) for e in range(one.layout.experts)])
    dense, wide = dense.double()[clusters], x.double()[..., None]
    assert one.bias is not None
    size = (dense.abs() @ wide.abs())[..., 0] + one.bias.double().abs()
    return (dense @ wide)[..., 0] + one.bias.to(x.dtype).double(), size


@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
@pytest.mark.parametrize("values", ["bfloat16", "float16", "float32", "int8", "int4"])
@pytest.mark.parametrize("form", FORMATS)
def test_outputs_are_those_of_the_weights(form: str, values: str, tokens: int) -> None:
    # every kernel is compiled: each case takes two of the shapes
    turn = tokens + len(values) + len(form)
    for number, (rows, cols) in enumerate(SHAPES[turn % 5 :: 3]):
        one = layer(4 if number % 3 else 1, rows, cols, form, values)
        for dtype in (list(FLOATS.values())[(number + tokens) % 3],):
            x = torch.randn(tokens, cols, device="cuda").to(dtype)
            clusters = torch.randint(0, one.layout.experts, (tokens,), device="cuda")
            found = gpu.linear(x, clusters, one.tensors, one.layout, one.bias)
            assert found.dtype == dtype
            wanted, size = exact(x, clusters, one)
            tiled = (
                tokens > gpu.DECODED
            )  # where the unpacked weight is rounded to the input's dtype
            allowed = 1e-6 * size + torch.finfo(dtype).eps * (wanted.abs() + tiled * size)
            worst = ((found.double() - wanted).abs() / allowed).max()
            assert worst <= 1, (rows, cols, dtype, float(worst))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("form", FORMATS)
def test_gate_and_up_in_one_launch(form: str, activation: str, tokens: int) -> None:
    gate, up = layer(2, 96, 256, form, "float32"), layer(2, 96, 256, form, "float32", n=4)
    if form == "n16":
        up = Packed(up.tensors, up.layout, None)
        gate = layer(2, 96, 256, form, "float32", n=4)
    x = torch.randn(tokens, 256, device="cuda") * 0.2
    clusters = torch.randint(0, 2, (tokens,), device="cuda")
    assert gpu.fits_gated(x, clusters, gate, up, activation)
    found = gpu.gated(x, clusters, gate, up, activation)
    a = gpu.linear(x, clusters, *gate)
    b = gpu.linear(x, clusters, *up)
    torch.testing.assert_close(found, ACTIVATIONS[activation](a) * b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 16, 100])
@pytest.mark.parametrize("cols", [7, 576, 4096])
def test_tokens_go_to_the_largest_product(k: int, cols: int) -> None:
    mean, directions = torch.randn(cols, device="cuda"), torch.randn(k, cols, device="cuda")
    offset = torch.randn(k, device="cuda")
    for dtype in FLOATS.values():
        x = (torch.randn(8, cols, device="cuda") * 3).to(dtype)
        scores = (x.double() - mean.double()) @ directions.double().T + offset.double()
        found = gpu.route(x, mean, directions, offset)
        best = scores.max(1).values
        torch.testing.assert_close(
            scores.gather(1, found[:, None])[:, 0], best, rtol=1e-5, atol=1e-3
        )
    offset[:] = 0
    same = gpu.route(torch.zeros(2, cols, device="cuda"), mean * 0, directions, offset)
    assert same.tolist() == [0, 0]


def test_a_graph_holds_the_calls_and_follows_its_inputs() -> None:
    one = layer(4, 64, 4096, "bitmap", "bfloat16")
    x, clusters = (
        torch.randn(1, 4096, device="cuda").bfloat16(),
        torch.zeros(1, dtype=torch.int64, device="cuda"),
    )
    gpu.linear(x, clusters, *one)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gpu.linear(x, clusters, *one)
    for expert in (2, 1):
        clusters.fill_(expert)
        x.normal_()
        graph.replay()
        assert torch.equal(found, gpu.linear(x, clusters, *one))


def test_what_is_not_finite_stays_so_and_touches_its_own_columns_alone() -> None:
    for form in ("bitmap", "n16"):
        one = layer(1, 64, 576, form, "float32")
        x = torch.randn(1, 576, device="cuda")
        x[0, 300] = float("inf")
        clusters = torch.zeros(1, dtype=torch.int64, device="cuda")
        found = gpu.linear(x, clusters, *one)
        kept = unpack(one.tensors, one.layout, 0)[:, 300] != 0
        assert not found[0, kept].isfinite().any()
        if form == "bitmap":
            assert found[0, ~kept].isfinite().all()
