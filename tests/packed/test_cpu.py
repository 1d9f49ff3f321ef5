"""Products on the CPU against float64 ones with the unpacked weights, in every form."""

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from entangle.errors import InvalidInput
from entangle.kernels import native
from entangle.packed import cpu
from entangle.packed.formats import Codes, Layout, Packed, pack, unpack

VALUES = ("bfloat16", "float16", "float32", "int8", "int8 steps", "int4", "int4 steps")
FORMS = native.forms()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the kernels be of one form alone."""
    monkeypatch.setattr(native, "forms", lambda: (request.param,))
    return str(request.param)


def packed(
    kind: str, values: str, cols: int, rows: int = 9, k: int = 3
) -> tuple[Layout, dict[str, Tensor]]:
    """Pack random experts: 7 of 10 zeros or 5 of 16 kept, some rows and one expert empty."""
    rng = torch.Generator().manual_seed(cols)
    order = torch.rand(k, rows, -(-cols // 16), 16, generator=rng).argsort(-1).argsort(-1)
    mask = (order < 5).flatten(2)[..., :cols]
    if kind == "bitmap":
        mask = torch.rand(k, rows, cols, generator=rng) >= 0.7
        mask[0, 0] = True
    mask[1:2, -1] = False
    mask[2:3] = False
    if not values.startswith("int"):
        return pack(torch.randn(k, rows, cols, generator=rng) * mask, kind, values=values)
    bits = int(values[3])
    zero = torch.randint(0, 2**bits, (k, rows), generator=rng).float()
    steps = torch.randint(1, 256, (k, rows, -(-cols // 128)), dtype=torch.uint8, generator=rng)
    scale = torch.rand(k, rows, generator=rng) + 0.1
    grid = Codes(bits, scale, zero, steps if "steps" in values else None)
    code = torch.randint(0, 2**bits, (k, rows, cols), generator=rng)
    return pack(torch.where(mask, (code - zero[..., None]) * grid.unit(cols), 0), kind, codes=grid)


def error(
    found: Tensor, x: Tensor, clusters: Tensor, tensors: Mapping[str, Tensor], layout: Layout
) -> float:
    """Return the largest error as a share of Σ|w||x|."""
    weight = torch.stack([unpack(tensors, layout, e) for e in range(layout.experts)]).double()
    exact = torch.einsum("toc,tc->to", weight[clusters], x.double())
    size = torch.einsum("toc,tc->to", weight[clusters].abs(), x.double().abs())
    wrong = (found.double() - exact).abs()
    assert bool((wrong[size == 0] == 0).all())
    return float((wrong / size.clamp_min(1e-300)).max())


@pytest.mark.parametrize("kind", ["bitmap", "n16"])
@pytest.mark.parametrize("values", VALUES)
def test_products_are_those_of_the_unpacked_weight(form: str, kind: str, values: str) -> None:
    rng = torch.Generator().manual_seed(0)
    for cols in (1, 7, 16, 63, 100, 576, 1536, 4096):
        layout, tensors = packed(kind, values, cols)
        for tokens in (1, 3, 8) if cols == 100 else (3,):
            x = torch.randn(tokens, cols, generator=rng)
            clusters = torch.arange(tokens) % 3
            found = cpu.linear(x, clusters, tensors, layout)
            assert found.shape == (tokens, 9)
            assert error(found, x, clusters, tensors, layout) <= 1e-6, (cols, tokens)


@pytest.mark.parametrize("kind", ["bitmap", "n16"])
@pytest.mark.parametrize("values", VALUES)
def test_rows_come_back_bit_for_bit(form: str, kind: str, values: str) -> None:
    for cols in (1, 300):
        layout, tensors = packed(kind, values, cols)
        for dtype in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            if dtype == torch.float16 and values.startswith("int"):
                continue  # some overflow
            for expert, rows in ((0, slice(None)), (1, slice(3, 9)), (0, slice(4, 4))):
                found = cpu.unpack(tensors, layout, expert, rows, dtype)
                expected = unpack(tensors, layout, expert, rows, dtype)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["bitmap", "n16"])
@pytest.mark.parametrize("clusters", [[1], [0] * 8, [0, 1, 0, 0, 1], [2, 0] * 6, []])
def test_tokens_of_any_experts(form: str, kind: str, clusters: list[int]) -> None:
    """Whatever stands beside a token, its product is the same."""
    layout, tensors = packed(kind, "bfloat16", 576, rows=33)
    x = torch.randn(len(clusters), 576, generator=torch.Generator().manual_seed(1))
    found = cpu.linear(x, torch.tensor(clusters, dtype=torch.int64), tensors, layout)
    for token, cluster in enumerate(clusters):
        alone = cpu.linear(x[token : token + 1], torch.tensor([cluster]), tensors, layout)
        assert torch.equal(found[token], alone[0])


@pytest.mark.parametrize("kind", ["bitmap", "n16"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(form: str, kind: str, bad: float) -> None:
    layout, tensors = packed(kind, "float32", 100)
    x = torch.randn(2, 100)
    x[1, 99] = bad
    found = cpu.linear(x, torch.tensor([0, 0]), tensors, layout).isfinite()
    assert bool(found[0].all())
    assert not bool(found[1].any())


@pytest.mark.parametrize("kind", ["bitmap", "n16"])
def test_any_number_of_threads_gives_the_same(
    form: str, kind: str, threads: Callable[[int], None]
) -> None:
    layout, tensors = packed(kind, "int4 steps", 576, rows=501)
    x, clusters = torch.randn(3, 576), torch.tensor([0, 1, 0])
    found = []
    for n in (1, 2, 3):
        threads(n)
        found.append(cpu.linear(x, clusters, tensors, layout))
        assert torch.equal(cpu.unpack(tensors, layout, 1), unpack(tensors, layout, 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_x_is_summed_in_float32(dtype: torch.dtype) -> None:
    layout, tensors = packed("bitmap", "bfloat16", 300)
    x, clusters = torch.randn(2, 300).to(dtype), torch.tensor([0, 1])
    bias = torch.randn(9)
    wide = cpu.linear(x.float(), clusters, tensors, layout, bias)
    found = cpu.linear(x, clusters, tensors, layout, bias)
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))
    plain = cpu.linear(x.float(), clusters, tensors, layout)
    assert torch.equal(plain + bias, wide)


@pytest.mark.parametrize("kind", [("bitmap", "bitmap"), ("n16", "n16"), ("bitmap", "n16")])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_gated(kind: tuple[str, str], activation: str) -> None:
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": silu, "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
        "relu": relu, "relu2": lambda x: relu(x) ** 2,
    }  # fmt: skip
    gate, up = (
        Packed(tensors, layout, bias)
        for form, cols, bias in zip(kind, (200, 200), (None, torch.randn(9)), strict=True)
        for layout, tensors in [packed(form, "bfloat16", cols)]
    )
    x, clusters = torch.randn(3, 200), torch.tensor([1, 0, 0])
    assert cpu.fits_gated(x, clusters, gate, up, activation)
    found = cpu.gated(x, clusters, gate, up, activation)
    expected = acts[activation](cpu.linear(x, clusters, *gate)) * cpu.linear(x, clusters, *up)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["bitmap", "n16"])
@pytest.mark.parametrize("values", ["bfloat16", "int4 steps"])
def test_files_are_read_where_they_lie(form: str, kind: str, values: str, tmp_path: Path) -> None:
    """One row in a mapped file, at any address."""
    layout, tensors = packed(kind, values, 16 * 127, rows=1, k=1)
    x = torch.randn(1, layout.in_features)
    expected = cpu.linear(x, torch.tensor([0]), tensors, layout)
    for odd in (1, 3, 8):
        file = tmp_path / f"{odd}.safetensors"
        save_file({"a": torch.zeros(odd, dtype=torch.uint8), **tensors}, file)
        with safe_open(file, "pt") as opened:
            mapped = {name: opened.get_tensor(name) for name in tensors}
        found = cpu.linear(x, torch.tensor([0]), mapped, layout)
        assert torch.equal(found, expected)
    shifted = {name: moved(tensor) for name, tensor in tensors.items()}
    assert torch.equal(cpu.linear(x, torch.tensor([0]), shifted, layout), expected)


@pytest.mark.parametrize("kind", ["bitmap", "n16"])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.skipif(sys.platform != "linux", reason="guards a page as Linux does")
def test_nothing_is_read_behind_a_tensor(form: str, kind: str, values: str) -> None:
    """Each tensor ends where the memory of the process ends: a byte more would end the process."""
    for cols in (7, 300):
        layout, tensors = packed(kind, values, cols)
        guarded = {name: at_the_end(tensor) for name, tensor in tensors.items()}
        x, clusters = torch.randn(3, cols), torch.tensor([0, 1, 2])
        found = cpu.linear(x, clusters, guarded, layout)
        assert torch.equal(found, cpu.linear(x, clusters, tensors, layout))
        for expert in range(3):
            rows = cpu.unpack(guarded, layout, expert)
            assert torch.equal(rows, unpack(tensors, layout, expert))


def at_the_end(tensor: Tensor) -> Tensor:
    """Return a copy that ends with its page, behind which lies one that cannot be read."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.c_void_p(start + pages)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    count, offset = tensor.numel(), pages - size
    found = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)
    return found.copy_(tensor.flatten()).view(tensor.shape)


def moved(tensor: Tensor) -> Tensor:
    """Return a copy whose address is no multiple of its numbers' size."""
    raw = torch.empty(tensor.numel() * tensor.element_size() + 1, dtype=torch.uint8)
    raw[1:] = tensor.flatten().view(torch.uint8)
    odd = torch.frombuffer(raw.numpy().data, dtype=tensor.dtype, offset=1)
    return odd.view(tensor.shape)


def test_what_does_not_fit() -> None:
    layout, tensors = packed("bitmap", "float32", 100)
    x, one = torch.randn(1, 100), torch.tensor([0])
    assert cpu.fits(x, one, tensors, layout)
    assert not cpu.fits(x.double(), one, tensors, layout)
    assert not cpu.fits(x.requires_grad_(), one, tensors, layout)
    assert not cpu.fits(x.expand(cpu.TOKENS + 1, -1), one, tensors, layout)
    with torch.no_grad():
        assert cpu.fits(x, one, tensors, layout)
    for clusters in (3, -1):
        with pytest.raises(InvalidInput, match=f"3 experts; got number {clusters}"):
            cpu.linear(x, torch.tensor([clusters]), tensors, layout)
    with pytest.raises(InvalidInput, match="100 features"):
        cpu.linear(x[:, :50], one, tensors, layout)
    with pytest.raises(InvalidInput, match="`values`"):
        cpu.linear(x, one, tensors | {"values": tensors["values"][:-8]}, layout)


def test_without_llvm_nothing_fits_and_it_is_said_once() -> None:
    code = """
import logging, sys
sys.modules["llvmlite"] = None
logging.basicConfig(format="%(message)s", stream=sys.stdout)
import torch
from entangle.packed import cpu
from entangle.packed.formats import pack
layout, tensors = pack(torch.eye(2)[None])
print([cpu.fits(torch.ones(1, 2), torch.tensor([0]), tensors, layout) for _ in range(2)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, fits = done.stdout.splitlines()
    assert "llvmlite" in said
    assert fits == "[False, False]"
