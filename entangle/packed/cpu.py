"""Fast products with packed experts on CPUs.

The kernels (`entangle.packed.cpu_kernels`) are compiled for the processor at hand when they are
first used, some hundredths of a second each. Sums are float32, each row's by one thread in one
order: results do not depend on the number of threads, which is torch's.
"""

import ctypes
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import gelu, pad, relu, silu

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.packed import native
from entangle.packed.cpu_kernels import Kernel, product, unpacking
from entangle.packed.formats import BLOCK, VALUES, Layout, Packed

TOKENS = 16
"""Tokens up to which a product with the packed rows is faster than unpacking them."""
_SMALL = 1 << 15  # weights of a product that more threads would not make faster
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
}


def fits(
    x: Tensor,
    clusters: Tensor,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Tensor | None = None,
) -> bool:
    """Tell whether `linear` can take these, and is faster than unpacking; same arguments."""
    learns = torch.is_grad_enabled() and (x.requires_grad or _learns(bias))
    return (
        x.device.type == clusters.device.type == tensors["values"].device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and len(x) <= TOKENS
        and x.shape[1] == layout.in_features
        and not (learns or torch.compiler.is_compiling())
        and bool(native.forms())
    )


def _learns(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def fits_gated(x: Tensor, clusters: Tensor, gate: Packed, up: Packed, activation: str) -> bool:
    """Tell whether `gated` can take these, and is faster than unpacking; same arguments."""
    known = activation in _ACTIVATIONS
    return known and fits(x, clusters, *gate) and fits(x, clusters, *up)


def linear(
    x: Float[Tensor, "tokens in_features"],
    clusters: Int64[Tensor, " tokens"],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "tokens out_features"]:
    """Return every token's product with its expert; sums in float32.

    Parameters
    ----------
    x
        In any float dtype, in which the result is returned.
    clusters
        Each token's expert.
    tensors, layout
        From `entangle.packed.formats.pack`.
    bias
        Added to every row's sum.

    Raises
    ------
    InvalidInput
        If a token's expert is none of the layer's, or a tensor is not the layout's.
    """
    (found,) = _products(x, clusters, [Packed(tensors, layout, bias)])
    return found.to(x.dtype)


def gated(
    x: Float[Tensor, "tokens in_features"],
    clusters: Int64[Tensor, " tokens"],
    gate: Packed,
    up: Packed,
    activation: str,
) -> Float[Tensor, "tokens out_features"]:
    """Return ``activation(gate(x)) · up(x)``, both products in one pass; see `linear`.

    Parameters
    ----------
    activation
        silu, gelu, gelu_tanh, relu or relu2; applied in float32.
    """
    act = _ACTIVATIONS[choice("activation", activation, tuple(_ACTIVATIONS))]
    one, two = _products(x, clusters, [gate, up])
    return (act(one) * two).to(x.dtype)


def unpack(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    expert: int,
    rows: slice = slice(None),
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "rows cols"]:
    """Return what `entangle.packed.formats.unpack` does, many times faster; CPU tensors only."""
    first, stop, _ = rows.indices(layout.out_features)
    _check_experts([expert], layout)
    own = torch.float32 if layout.coded else VALUES[layout.values]
    wanted = own if dtype is None else dtype
    form = native.forms()[0]
    narrow = wanted is torch.bfloat16 or (wanted is torch.float16 and form != "scalar")
    tile = wanted if narrow else torch.float32
    found = torch.empty(max(0, stop - first), layout.in_features, dtype=tile)
    name = str(tile).removeprefix("torch.")
    kernel = Kernel(form, _shape(layout), 0, name)
    _work(kernel, [(Packed(tensors, layout), found)], [[expert]], (first, max(first, stop)))
    return found.to(wanted)


def _products(x: Tensor, clusters: Tensor, parts: Sequence[Packed]) -> list[Tensor]:
    """Return the products of the same tokens with some layers, in float32."""
    if len(parts) > 1 and (
        _shape(parts[0].layout) != _shape(parts[1].layout)
        or parts[0].layout.out_features != parts[1].layout.out_features
    ):
        return [found for part in parts for found in _products(x, clusters, [part])]
    layout = parts[0].layout
    with torch.no_grad():
        wide = _padded(x, layout)
        found = [torch.empty(len(x), layout.out_features) for _ in parts]
        experts = clusters.tolist()
        for part in parts:
            _check_experts(experts, part.layout)
        for tokens, groups in _groups(experts).items():
            kernel = Kernel(native.forms()[0], _shape(layout), tokens)
            both = list(zip(parts, found, strict=True))
            _work(kernel, both, groups, (0, layout.out_features), wide)
    return [
        out if part.bias is None else out.add_(part.bias)
        for part, out in zip(parts, found, strict=True)
    ]


def _padded(x: Tensor, layout: Layout) -> Tensor:
    """Return x in float32, its rows filled up to whole words or blocks by zeros."""
    if x.shape[1] != layout.in_features:
        raise InvalidInput(
            f"`x` must have {layout.in_features} features, as the layer; got {x.shape[1]}."
        )
    cols = _width(layout)
    wide = x.detach().to(torch.float32)
    return wide.contiguous() if cols == x.shape[1] else pad(wide, (0, cols - x.shape[1]))


@cache
def _width(layout: Layout) -> int:
    """Return the columns of the layer, those that fill up the last word or blocks included."""
    if layout.format == "bitmap":
        return layout.in_features + -layout.in_features % 64
    return layout.lanes.blocks * BLOCK


def _check_experts(experts: Sequence[int], layout: Layout) -> None:
    for expert in experts:
        if not 0 <= expert < layout.experts:
            raise InvalidInput(f"the layer has {layout.experts} experts; got number {expert}.")


def _groups(experts: Sequence[int]) -> dict[int, list[list[int]]]:
    """Return, by the tokens that a kernel takes at once, the expert and tokens of every group.

    Tokens of one expert share the reading of its weights; where they are fewer than the kernel
    takes, the last stands there again.
    """
    of: dict[int, list[int]] = defaultdict(list)
    for token, expert in enumerate(experts):
        of[expert].append(token)
    found: dict[int, list[list[int]]] = defaultdict(list)
    for expert, tokens in of.items():
        for start in range(0, len(tokens), 8):
            mine = tokens[start : start + 8]
            size = 1 << (len(mine) - 1).bit_length()
            found[size].append([expert, *mine, *[mine[-1]] * (size - len(mine))])
    return found


@cache
def _shape(layout: Layout) -> Layout:
    """Return what of a layout a kernel depends on."""
    cols = layout.in_features if layout.format == "n16" else 1
    return replace(layout, experts=1, out_features=1, in_features=cols, stored=0)


@cache
def _sizes(layout: Layout) -> tuple[dict[str, int], int, Tensor]:
    """Return the numbers of every tensor, those of a row of ``n16``, and its table of columns."""
    sizes = {name: torch.Size(shape).numel() for name, (shape, _) in layout.tensors().items()}
    if layout.format == "bitmap":
        return sizes, 0, torch.empty(0)
    at = layout.lanes
    step, lane, rest = torch.meshgrid(
        *(torch.arange(n) for n in (at.steps, at.lanes, at.chunk)), indexing="ij"
    )
    turn = (step * at.chunk + rest) // layout.kept
    block = torch.where(turn < at.rounds, lane + at.lanes * turn, 0)
    return sizes, block.numel(), (BLOCK * block).flatten().int()


def _work(
    kernel: Kernel,
    parts: Sequence[tuple[Packed, Tensor]],
    groups: Sequence[Sequence[int]],
    rows: tuple[int, int],
    x: Tensor | None = None,
) -> None:
    """Let torch's threads work on some rows of layers of one shape, and write to their tensors."""
    layout = parts[0][0].layout
    _, stored, table = _sizes(layout)
    numbers = [number for group in groups for number in group]
    listed = (ctypes.c_int64 * len(numbers))(*numbers)
    threads = _threads(layout, rows)
    chunk = max(2, (rows[1] - rows[0]) * len(parts) // (8 * threads) & ~1)
    chunks = -(-(rows[1] - rows[0]) // chunk)
    buffer = 4 * ((stored or _width(layout)) + 48)
    scratch = (kernel.rows + 1) * (buffer + 4 * _width(layout))
    room = torch.empty(threads * scratch, dtype=torch.uint8)
    job = [
        0, 0, chunks * len(parts), chunks, chunk, *rows, layout.out_features, layout.in_features,
        stored, 0 if x is None else x.data_ptr(), 4 * _width(layout), parts[0][1].stride(0)
        * parts[0][1].element_size(), len(groups), ctypes.addressof(listed), room.data_ptr(),
        scratch, buffer, table.data_ptr(),
    ]  # fmt: skip
    for part, out in parts:
        job += [*_addresses(part), out.data_ptr()]
    native.run(_compiled(kernel), job, threads)


def _threads(layout: Layout, rows: tuple[int, int]) -> int:
    """Return how many threads share the work: one where it is little."""
    little = (rows[1] - rows[0]) * layout.in_features < _SMALL
    return 1 if little else torch.get_num_threads()


@cache
def _compiled(kernel: Kernel) -> Callable[[int], None]:
    text = product(kernel) if kernel.tokens else unpacking(kernel)
    return native.compiled(text, "work", kernel.form)


def _addresses(part: Packed) -> list[int]:
    """Return where a layer's tensors stand, in the order of `Part`; 0 for those it has not."""
    sizes, stored, _ = _sizes(part.layout)
    names = ("index" if stored else "bitmap", "starts", "values", "scale", "zero", "steps")
    found = []
    for name in names:
        tensor = part.tensors[name] if name in sizes else None
        if tensor is not None and (tensor.numel() != sizes[name] or not tensor.is_contiguous()):
            raise InvalidInput(
                f"the packed `{name}` must be contiguous and hold {sizes[name]} numbers; got "
                f"{tuple(tensor.shape)}."
            )
        found.append(0 if tensor is None else tensor.data_ptr())
    return found
