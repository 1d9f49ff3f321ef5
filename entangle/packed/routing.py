"""Which expert a token goes to: the fitted router folded into one product, and its control.

A router sends a token x to the cluster c with the largest ``(x − mean) · directions_c + offset_c``,
in float32. The control of random clusters hashes the token's bits.
"""

import weakref
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from entangle.kernels.dispatch import dispatch
from entangle.packed import gpu
from entangle.precision import full_precision

_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shift and multiplier of splitmix64's finaliser."""


def hash_clusters(
    x: Float[Tensor, "tokens features"], key: Int64[Tensor, " features"], *, k: int
) -> Int64[Tensor, " tokens"]:
    """Give every token the cluster in [0, k) that its bits hash to.

    The sum over features is exact integer arithmetic modulo 2**64, hence the same in any order;
    splitmix64's finaliser then spreads it over all bits. -0.0 counts as 0.0.
    """
    bits = (x.float() + 0.0).view(torch.int32).to(torch.int64)
    mixed = (bits * key).sum(-1)
    for shift, multiplier in _MIX:
        mixed = (mixed ^ _shift_right(mixed, shift)) * (multiplier - 2**64)
    return (_shift_right(mixed ^ _shift_right(mixed, 31), 33) * k) >> 31


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


@dispatch(gpu.route, where=gpu.fits_route)
def nearest(
    x: Float[Tensor, "tokens features"],
    mean: Float32[Tensor, " features"],
    directions: Float32[Tensor, "k features"],
    offset: Float32[Tensor, " k"],
) -> Int64[Tensor, " tokens"]:
    """Return the cluster with the largest ``(x − mean) · directions + offset``, in float32."""
    with full_precision():
        return torch.addmm(offset, x.float() - mean, directions.T).argmax(-1)


def _nearest(x: Tensor, mean: Tensor, directions: Tensor, offset: Tensor) -> Tensor:
    return nearest(x, mean, directions, offset)


_operator: Any = torch.library.custom_op(
    "entangle::sparse_route",
    _nearest,
    mutates_args=(),
    schema="(Tensor x, Tensor mean, Tensor directions, Tensor offset) -> Tensor",
)
_operator.register_fake(lambda x, *_others: x.new_empty(x.shape[0], dtype=torch.int64))


Made = TypeVar("Made", bound=nn.Module)


def keep_dtypes(module: Made, before: Mapping[str, Tensor | None]) -> Made:
    """Give buffers back the dtype and bits that they had before a module was cast."""
    for name, tensor in before.items():
        now = module._buffers[name]
        if tensor is not None and now is not None and now.dtype != tensor.dtype:
            module._buffers[name] = tensor.to(now.device)
    return module


class PackedRouter(nn.Module):
    """Sends tokens to clusters, for all the layers that read one input.

    Parameters
    ----------
    kind
        ``kmeans`` or ``random``; a single expert has no router.
    experts
        Number of clusters.
    features
        Width of a token.
    device
        Where the zeros are that it holds at first.
    """

    mean: Tensor
    directions: Tensor
    offset: Tensor
    key: Tensor

    def __init__(
        self, kind: str, experts: int, features: int, *, device: str | None = None
    ) -> None:
        super().__init__()
        self.kind, self.experts, self.features = kind, experts, features
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        shapes: dict[str, tuple[int, ...]] = {"key": (features,)}
        if kind != "random":
            shapes = {"mean": (features,), "directions": (experts, features), "offset": (experts,)}
        dtype = torch.int64 if kind == "random" else torch.float32
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Int64[Tensor, " tokens"]:
        """Return the cluster of every token, in reading order.

        The layers that read one input pass the same tensor, for which the answer is kept. Not where
        it could be another's: an inference tensor does not count its writes, and a graph that is
        captured runs again on other tokens.
        """
        if torch.compiler.is_compiling() or x.is_inference():
            return self._route(x)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._route(x)
        last = self._last
        if last is None or last[0]() is not x or last[1] != x._version:
            last = self._last = weakref.ref(x), x._version, self._route(x)
        return last[2]

    def __getstate__(self) -> dict[str, object]:
        """Leave the last input out of copies."""
        return self.__dict__ | {"_last": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedRouter":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return keep_dtypes(self, before)

    def describe(self) -> dict[str, Any]:
        """Return what it is made with, as JSON can hold it."""
        return {"kind": self.kind, "experts": self.experts, "features": self.features}

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None

    def _route(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if self.kind == "random":
            return hash_clusters(tokens, self.key, k=self.experts)
        route = _operator if torch.compiler.is_compiling() else nearest
        found: Tensor = route(tokens, self.mean, self.directions, self.offset)
        return found

    def extra_repr(self) -> str:
        """Describe the shape for ``print(model)``."""
        return f"{self.kind}, features={self.features}, experts={self.experts}"
