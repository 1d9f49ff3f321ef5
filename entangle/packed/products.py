"""Products of tokens with the packed expert of each token's cluster.

The plain versions are right on every device: they unpack the experts in use, tile by tile, in front
of a dense product. There, as for many tokens on a GPU, weights that are stored as codes are rounded
to the dtype of the tokens; the kernels for a few tokens multiply them in float32. Inside
`torch.compile` the modules call them as operators (`OPERATORS`).
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from entangle.kernels.dispatch import dispatch
from entangle.packed import cpu, gpu
from entangle.packed.activations import ACTIVATIONS
from entangle.packed.formats import VALUES, Layout, Packed, unpack

_TILE_BYTES = 2**26
_WEIGHT_BYTES = 40  # of scratch that unpacking takes a weight
_unpacked = dispatch(cpu.unpack, where=cpu.unpacks)(unpack)


@dispatch(gpu.linear, where=gpu.fits)
@dispatch(cpu.linear, where=cpu.fits)
def linear(
    x: Float[Tensor, "tokens in_features"],
    clusters: Int64[Tensor, " tokens"],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "tokens out_features"]:
    """Return the output of every token's own expert.

    Parameters
    ----------
    x
        Of any float dtype.
    clusters
        Expert of each token, on the same device.
    tensors, layout
        From `entangle.packed.formats.pack`.
    bias
        Common to all experts.

    Returns
    -------
    Tensor
        In the dtype of ``x``; sums are those of a dense product of the device, in float32.
    """
    outputs = x.new_empty(x.shape[0], layout.out_features)
    order = clusters.argsort(stable=True)
    counts = torch.bincount(clusters, minlength=layout.experts).tolist()
    wide = x.dtype if layout.coded else torch.promote_types(x.dtype, VALUES[layout.values])
    at_once = max(1, _TILE_BYTES // (_WEIGHT_BYTES * layout.in_features))
    for expert, index in enumerate(order.split(counts)):
        for start in range(0, layout.out_features if index.numel() else 0, at_once):
            rows = slice(start, min(start + at_once, layout.out_features))
            weight = _unpacked(tensors, layout, expert, rows, wide)
            own = None if bias is None else bias[rows].to(wide)
            outputs[index, rows] = dense_linear(x[index].to(wide), weight, own).to(x.dtype)
    return outputs


@dispatch(gpu.gated, where=gpu.fits_gated)
@dispatch(cpu.gated, where=cpu.fits_gated)
def gated(
    x: Float[Tensor, "tokens in_features"],
    clusters: Int64[Tensor, " tokens"],
    gate: Packed,
    up: Packed,
    activation: str,
) -> Float[Tensor, "tokens out_features"]:
    """Return ``activation(gate(x)) * up(x)``, in the dtype of ``x``.

    Parameters
    ----------
    x, clusters
        As for `linear`.
    gate, up
        The two layers, which read the same input.
    activation
        One of `ACTIVATIONS`.
    """
    first, second = linear(x, clusters, *gate), linear(x, clusters, *up)
    return ACTIVATIONS[activation](first) * second


def described(layout: Layout) -> str:
    """Return a layout as an operator takes it."""
    return json.dumps(layout.describe())


@cache
def _layout(text: str) -> Layout:
    return Layout(**json.loads(text))


def packed_of(tensors: list[Tensor], text: str, bias: Tensor | None) -> Packed:
    """Return the layer whose tensors an operator is given, in the order of its layout."""
    layout = _layout(text)
    return Packed(dict(zip(layout.tensors(), tensors, strict=True)), layout, bias)


def _linear(
    x: Tensor, clusters: Tensor, tensors: list[Tensor], layout: str, bias: Tensor | None
) -> Tensor:
    return linear(x, clusters, *packed_of(tensors, layout, bias))


def _linear_shape(
    x: Tensor,
    clusters: Tensor,  # noqa: ARG001
    tensors: list[Tensor],  # noqa: ARG001
    layout: str,
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape[0], _layout(layout).out_features)


def _gated(
    x: Tensor,
    clusters: Tensor,
    gate: list[Tensor],
    gate_layout: str,
    gate_bias: Tensor | None,
    up: list[Tensor],
    up_layout: str,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    first = packed_of(gate, gate_layout, gate_bias)
    return gated(x, clusters, first, packed_of(up, up_layout, up_bias), activation)


def _gated_shape(x: Tensor, _clusters: Tensor, _gate: object, layout: str, *_others: Any) -> Tensor:
    return x.new_empty(x.shape[0], _layout(layout).out_features)


def _operator(name: str, schema: str, run: Any, shape: Any) -> Any:
    made = torch.library.custom_op(f"entangle::{name}", run, mutates_args=(), schema=schema)
    made.register_fake(shape)
    return made


OPERATORS: dict[str, Any] = {
    "linear": _operator(
        "sparse_linear",
        "(Tensor x, Tensor clusters, Tensor[] tensors, str layout, Tensor? bias) -> Tensor",
        _linear,
        _linear_shape,
    ),
    "gated": _operator(
        "sparse_gated",
        "(Tensor x, Tensor clusters, Tensor[] gate, str gate_layout, Tensor? gate_bias, "
        "Tensor[] up, str up_layout, Tensor? up_bias, str activation) -> Tensor",
        _gated,
        _gated_shape,
    ),
}
"""The products as operators that `torch.compile` calls as they are."""
