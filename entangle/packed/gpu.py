"""Products with packed experts on NVIDIA GPUs: a few tokens by kernels, many by unpacking tiles.

A few tokens (decoding) read every weight of their experts once, packed; nothing is asked of the
host, so that CUDA graphs can hold the calls. For more tokens (prefill) tiles of the experts in use
are unpacked in front of a dense product, grouped by expert.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.kernels.dispatch import launch, shared_limit, usable
from entangle.packed.activations import ACTIVATIONS
from entangle.packed.formats import Layout, Packed

DECODED = 8
"""Tokens up to which the kernels for a few tokens are taken."""
SCRATCH = 2**27
"""Bytes of unpacked weights at a time."""
_INPUTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_VALUES = {"int4": 0, "int8": 0, "bfloat16": 1, "float16": 2, "float32": 3}
_STATIC = 48 * 2**10  # bytes of shared memory that a kernel may ask for by itself
_RING = 4096  # bytes of values that a warp of `bitmap` holds; twice that of float32


def fits(x: Tensor, *_others: object, **_settings: object) -> bool:
    """Tell whether this way is open: tokens on a GPU, in a dtype and width the kernels know."""
    if x.dtype not in _INPUTS or not usable(x):
        return False
    line = x.shape[-1] * x.element_size() + 64  # a row that is unpacked, in shared memory
    known = torch.cuda.get_device_capability(x.device) >= (8, 0)
    return known and line <= shared_limit(x.device)


def linear(
    x: Float[Tensor, "tokens in_features"],
    clusters: Int64[Tensor, " tokens"],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "tokens out_features"]:
    """Do what `entangle.packed.products.linear` does."""
    one = Packed(tensors, layout, bias)
    if x.shape[0] > DECODED or not _narrow(layout, x.device):
        return _many(x, clusters, one)
    return _few(x, clusters, [one], "relu")


def gated(
    x: Float[Tensor, "tokens in_features"],
    clusters: Int64[Tensor, " tokens"],
    gate: Packed,
    up: Packed,
    activation: str,
) -> Float[Tensor, "tokens out_features"]:
    """Do what `entangle.packed.products.gated` does."""
    if x.shape[0] > DECODED or not _narrow(gate.layout, x.device):
        return ACTIVATIONS[activation](_many(x, clusters, gate)) * _many(x, clusters, up)
    return _few(x, clusters, [gate, up], activation)


def fits_gated(x: Tensor, _clusters: Tensor, gate: Packed, up: Packed, activation: str) -> bool:
    """Tell whether `gated` can do it: both layers are packed alike."""
    a, b = gate.layout, up.layout
    alike = (a.format, a.values, a.kept, a.grouped) == (b.format, b.values, b.kept, b.grouped)
    alike &= (a.out_features, a.in_features) == (b.out_features, b.in_features)
    return alike and activation in ACTIVATIONS and fits(x)


def route(
    x: Float[Tensor, "tokens features"],
    mean: Float[Tensor, " features"],
    directions: Float[Tensor, "k features"],
    offset: Float[Tensor, " k"],
) -> Int64[Tensor, " tokens"]:
    """Do what `entangle.packed.products.route` does, for a few tokens in one launch."""
    k, cols = directions.shape
    clusters = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    launch(
        "route", "route", grid=(8, x.shape[0]), threads=512,
        arguments=[x.contiguous(), mean, directions, offset, clusters],
        defined={"INPUT": _INPUTS[x.dtype], "COLS": cols, "K": k}, early=True,
    )  # fmt: skip
    return clusters


def fits_route(x: Tensor, _mean: Tensor, directions: Tensor, _offset: Tensor) -> bool:
    """Tell whether `route` can do it: a few tokens, on a GPU whose thread blocks form clusters."""
    k, cols = directions.shape
    shared = 4 * (8 * k + 4 * math.ceil(cols / 32))
    few = 0 < x.shape[0] <= DECODED and shared <= _STATIC
    return few and fits(x) and torch.cuda.get_device_capability(x.device) >= (9, 0)


def _narrow(layout: Layout, device: torch.device) -> bool:
    """Tell whether a token and what two warps hold fit into a thread block's shared memory."""
    return 4 * _tile(layout) + 2**15 <= shared_limit(device)


@dataclass(frozen=True)
class Geometry:
    """How a kernel is launched."""

    warps: int
    """A thread block's."""
    blocks: int
    """Thread blocks a token."""
    together: int
    """Rows that a lane of ``n16`` works on at once; units of eight values of ``delta``."""
    depth: int
    """Steps of them whose weights are under way at once."""
    tokens: int
    """Most tokens that share the reading of an expert."""
    shared: int
    """Bytes of shared memory a thread block."""
    defined: Mapping[str, int]
    """Names that the kernel is compiled with."""


@cache
def geometry(
    layout: Layout, dtype: torch.dtype, tokens: int, matrices: int, activation: str,
    device: int, warps: int = 0, waves: int = 2, together: int = 0,
) -> Geometry:  # fmt: skip
    """Return how the kernel for a few tokens is launched; the last three are for tuning."""
    width = 2 if dtype != torch.float32 else 4
    unit, depth = 1, 1
    if layout.format == "n16":
        together, depth = _steps(layout, tokens, together)
        unit = 32 // layout.lanes.lanes * together
    together = together or 1
    limit = shared_limit(torch.device("cuda", device))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    units = math.ceil(layout.out_features / unit)
    if not warps:  # as measured on one H200
        warps, waves = {"n16": (16, 2), "delta": (28, 2), "bitmap": (32, 1)}[layout.format]
        if layout.format == "delta" and layout.bits != 16:
            warps = 20  # more would leave too few registers
    at_once = min(_power(tokens), 16 // width)
    while True:
        blocks = min(processors * waves, units)
        block_rows = math.ceil(units / blocks) * unit
        results = math.ceil(matrices * at_once * block_rows * 4 / 16) * 16
        tile = math.ceil(_tile(layout) * (4 if at_once == 1 else at_once * width) / 16) * 16
        ring = warps * _RING * max(1, layout.bits // 16) + warps * 128
        shared = tile + results + ring * (layout.format == "bitmap")
        if shared * waves <= limit or (waves == 1 and shared <= limit):
            break
        if waves > 1:
            waves -= 1
        elif at_once > 1:
            at_once //= 2
        else:
            warps = max(matrices, warps // 4 * 2)
    crowded = waves > 1 and tokens <= 2  # the sums of more tokens take registers
    defined = {
        **_names(layout), "SINGLE": int(layout.experts == 1), "INPUT": _INPUTS[dtype],
        "TOKENS": at_once, "MATRICES": matrices, "ACTIVATION": list(ACTIVATIONS).index(activation),
        "WARPS": warps, "MOST_ROWS": block_rows, "DEPTH": depth, "BLOCKS": 1 + crowded,
        "UNITS" if layout.format == "delta" else "TOGETHER": together,
    }  # fmt: skip
    return Geometry(warps, blocks, together, depth, at_once, shared, defined)


def _few(x: Tensor, clusters: Tensor, layers: list[Packed], activation: str) -> Tensor:
    layout = layers[0].layout
    tokens = x.shape[0]
    found = x.new_empty(tokens, layout.out_features)
    if not tokens:
        return found
    at = geometry(layout, x.dtype, tokens, len(layers), activation, x.device.index)
    x, given = _aligned(x), [one for layer in layers for one in _arguments(layer, x.dtype)]
    for start in range(0, tokens, at.tokens):
        part = slice(start, start + at.tokens)
        launch(
            "sparse", "product", grid=(at.blocks, 1 if layout.experts == 1 else len(x[part])),
            threads=32 * at.warps,
            shared_bytes=at.shared, defined=at.defined,
            arguments=[x[part], clusters[part], found[part], x[part].shape[0], *given],
            early=True,
        )  # fmt: skip
    return found


def _arguments(layer: Packed, dtype: torch.dtype) -> list[Tensor | int]:
    tensors, values = layer.tensors, layer.tensors["values"]
    names = ("scale", "zero", "steps")
    places = tensors["bitmap" if layer.layout.format == "bitmap" else "index"]
    bias = 0 if layer.bias is None else layer.bias.to(dtype)
    return [
        places, tensors.get("starts", 0), values, *(tensors.get(name, 0) for name in names),
        bias, values.numel() * values.element_size(),
    ]  # fmt: skip


def _steps(layout: Layout, tokens: int, together: int) -> tuple[int, int]:
    """Return rows of a lane of ``n16`` at once, if not given, and their steps under way.

    As measured on one H200: codes are decoded, so that fewer of them need be under way.
    """
    steps, words = layout.lanes.steps, sum(_words(layout))
    if not together and layout.coded:
        together = 2 if steps <= 3 and words <= 4 else 1
    elif not together:
        together = 4 if steps <= 3 and tokens <= 2 else 2 if steps <= 8 else 1
        while together > 1 and together * words > 20:
            together //= 2
    under_way = (16 if layout.coded else 20) // (together * words)
    return together, max(1, min(math.ceil(steps / 2), under_way))


def _tile(layout: Layout) -> int:
    """Return the columns that shared memory has a place for."""
    if layout.format == "bitmap":
        return math.ceil(layout.in_features / 1024) * 33 * 32
    if layout.format == "delta":
        return (layout.in_features + 31) // 8 * 8
    return layout.lanes.rounds * 16 * 32


def _words(layout: Layout) -> tuple[int, int]:
    """Return the registers that the places and the values of one step of ``n16`` take."""
    if layout.format != "n16":
        return 0, 0
    chunk = layout.lanes.chunk
    return max(1, chunk // 8), max(1, chunk * layout.bits // 32)


def _names(layout: Layout) -> dict[str, int]:
    """Return what the kernels' names of the layout stand for."""
    found = {
        "BITMAP": int(layout.format == "bitmap"), "DELTA": int(layout.format == "delta"),
        "BITS": layout.bits, "VALUE": _VALUES[layout.values], "GROUPED": int(layout.grouped),
        "ROWS": layout.out_features, "COLS": layout.in_features,
    }  # fmt: skip
    if layout.format == "n16":
        at = layout.lanes
        found |= {"KEPT": layout.kept, "LANES": at.lanes, "ROUNDS": at.rounds}
        found |= {"CHUNK": at.chunk, "STEPS": at.steps}
    return found


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _aligned(x: Tensor) -> Tensor:
    """Return the tokens one behind the other, where a GPU can read 16 bytes at once."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _many(x: Tensor, clusters: Tensor, layer: Packed) -> Tensor:
    """Return the outputs of many tokens, grouped by expert; in bfloat16 nothing asks the host."""
    layout = layer.layout
    if layout.experts == 1:
        return _one(x, clusters, layer)
    order = clusters.argsort(stable=True)
    numbers = torch.arange(layout.experts, device=x.device)
    ends = (clusters[:, None] <= numbers).sum(0, dtype=torch.int32)
    width = math.ceil(layout.in_features / 8) * 8
    tokens = torch.nn.functional.pad(x[order], (0, width - layout.in_features))
    outputs = x.new_empty(x.shape[0], layout.out_features)
    for first, dense in tiles(layer, ends, x.dtype, width):
        stop = first + dense.shape[1]
        outputs[:, first:stop] = _grouped(tokens, dense, ends)
    if layer.bias is not None:
        outputs += layer.bias.to(x.dtype)
    return torch.empty_like(outputs).index_copy_(0, order, outputs)


def _one(x: Tensor, clusters: Tensor, layer: Packed) -> Tensor:
    """Return the outputs of many tokens of a single expert."""
    layout = layer.layout
    width = math.ceil(layout.in_features / 8) * 8
    tokens = torch.nn.functional.pad(x, (0, width - layout.in_features))
    ends = torch.full((1,), x.shape[0], dtype=torch.int32, device=clusters.device)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    parts = [
        torch.nn.functional.linear(
            tokens, dense[0], None if bias is None else bias[first : first + dense.shape[1]]
        )
        for first, dense in tiles(layer, ends, x.dtype, width)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _grouped(tokens: Tensor, dense: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's tokens, which lie in a row, by its weight (experts, rows, cols)."""
    if tokens.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm") and not dense.shape[1] % 8:
        return torch._grouped_mm(tokens, dense.mT, offs=ends)
    outputs = tokens.new_empty(tokens.shape[0], dense.shape[1])
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        torch.mm(tokens[start:stop], dense[expert].mT, out=outputs[start:stop])
        start = stop
    return outputs


def tiles(
    layer: Packed, ends: Tensor, dtype: torch.dtype, width: int
) -> Iterator[tuple[int, Float[Tensor, "experts rows width"]]]:
    """Yield the first row and the unpacked rows of all experts in use, within `SCRATCH` bytes."""
    layout = layer.layout
    fit = SCRATCH // (layout.experts * width * dtype.itemsize) // 8 * 8
    rows = min(layout.out_features, max(8, fit))
    scratch = torch.empty(layout.experts * rows * width, dtype=dtype, device=ends.device)
    given = _arguments(layer, dtype)[:6]
    line = width * dtype.itemsize  # of the output, which a warp holds
    warps = max(1, min(8, shared_limit(ends.device) // (2 * line)))
    for first in range(0, layout.out_features, rows):
        count = min(rows, layout.out_features - first)
        launch(
            "unpack", "unpack", grid=(math.ceil(count / warps), layout.experts),
            threads=32 * warps, shared_bytes=warps * line,
            arguments=[scratch, ends, first, count, *given],
            defined={
                **_names(layout), "OUTPUT": _INPUTS[dtype], "WIDTH": width, "WARPS": warps,
            },
        )  # fmt: skip
        used = scratch[: layout.experts * count * width]
        yield first, used.view(layout.experts, count, width)
