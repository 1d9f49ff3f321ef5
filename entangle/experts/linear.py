"""A linear layer whose weight depends on the cluster that its input belongs to.

Sparse experts as a bitmap and their non-zeros: how a checkpoint stores them.

What an allocation asks of an expansion: sparsity of every row, experts of every layer.
"""

import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor, float64, nn

from entangle.allocation.allocation import Allocation
from entangle.checks import real, tensor_of, whole
from entangle.errors import InvalidInput
from entangle.experts.router import Router
from entangle.experts.solver import Sparsity
from entangle.models.layers import Layer


class SharedRouting:
    """Routes tokens for all the layers that read one input, such as gate and up, once.

    Parameters
    ----------
    router
        Fitted router; it follows the tokens to their device.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def __call__(self, x: Float[Tensor, "*batch features"]) -> Int64[Tensor, " tokens"]:
        """Return the cluster of every token, in reading order, shape (tokens,)."""
        if x.is_inference():  # it does not count its writes, so it could have been changed
            return self._route(x)
        if self._last is None or self._last[0]() is not x or self._last[1] != x._version:
            self._last = weakref.ref(x), x._version, self._route(x)
        return self._last[2]

    def __getstate__(self) -> dict[str, object]:
        """Leave the last input out of copies."""
        return {"router": self.router, "_last": None}

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None

    def _route(self, x: Tensor) -> Tensor:
        if self.router.centroids.device != x.device:
            self.router = self.router.to(x.device)
        return self.router.route(x).flatten()


class ExpandedLinear(nn.Module):
    """Sends every token through the expert of its cluster; the dense output is never computed.

    Parameters
    ----------
    weight
        Experts, shape (experts, out_features, in_features); sparse, stored with their zeros.
    bias
        Shape (out_features,), common to all experts, or None.
    routing
        Shared by the layers that read the same input.
    """

    def __init__(
        self,
        weight: Float[Tensor, "experts out_features in_features"],
        bias: Float[Tensor, " out_features"] | None,
        routing: SharedRouting,
    ) -> None:
        super().__init__()
        if weight.shape[0] != routing.router.k or weight.shape[2] != routing.router.features:
            raise InvalidInput(
                f"`weight` must hold one expert a cluster, ({routing.router.k}, out_features, "
                f"{routing.router.features}); got {tuple(weight.shape)}."
            )
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.routing = routing

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the output of every token's own expert, in the order of the tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        clusters = self.routing(x)
        order = clusters.argsort(stable=True)
        counts = torch.bincount(clusters, minlength=self.weight.shape[0]).tolist()
        outputs = nn.functional.linear(tokens[:0], self.weight[0], self.bias)  # autocast's dtype
        outputs = outputs.new_empty(tokens.shape[0], self.weight.shape[1])
        for expert, index in enumerate(order.split(counts)):
            if index.numel():
                chosen = nn.functional.linear(tokens[index], self.weight[expert], self.bias)
                outputs[index] = chosen
        return outputs.reshape(*x.shape[:-1], self.weight.shape[1])

    def extra_repr(self) -> str:
        """Describe the shape for ``print(model)``."""
        experts, out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, experts={experts}"


Packed = tuple[UInt8[Tensor, " bytes"], Float[Tensor, " nonzeros"]]


def pack(weight: Float[Tensor, "*shape"]) -> Packed:
    """Split a sparse tensor into a bitmap (one bit an element, in reading order) and non-zeros.

    The values keep their dtype and bits; a negative zero comes back as a zero.
    """
    kept = (weight != 0).flatten().cpu()
    bitmap = torch.from_numpy(np.packbits(kept.numpy()))
    return bitmap, weight.flatten().cpu()[kept].clone()


def unpack(packed: Packed, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """Put the non-zeros back into a dense tensor of ``shape``.

    Raises
    ------
    InvalidInput
        If the bitmap does not fit the shape or the number of values.
    """
    bitmap, values = packed
    size = int(np.prod(shape))
    if bitmap.numel() != (size + 7) // 8:
        raise InvalidInput(f"a bitmap of {bitmap.numel()} bytes must hold {size} bits.")
    kept = torch.from_numpy(np.unpackbits(bitmap.cpu().numpy(), count=size)).bool()
    if int(kept.sum()) != values.numel():
        raise InvalidInput(f"{values.numel()} values must fill {int(kept.sum())} places.")
    dense = torch.zeros(size, dtype=values.dtype)
    dense[kept] = values.cpu()
    return dense.reshape(shape)


Allocated = Allocation | Mapping[str, float | Tensor]
"""An allocation, or sparsities by layer name: for all rows, or one value a row."""


def planned_sparsity(
    layers: Sequence[Layer],
    allocation: Allocated | None,
    *,
    sparsity: float | None,
    pattern: str,
    digest: str,
) -> dict[str, Sparsity]:
    """Return the sparsity of every layer.

    Parameters
    ----------
    layers
        Layers to expand.
    allocation
        Decides, if given; one of class `Allocation` must be for these layers, and no others, of
        this model.
    sparsity
        Of all layers without an allocation.
    pattern
        As in `entangle.pruning.prune`; with an allocation ``row``, or the allocation's own.
    digest
        Of the model.

    Raises
    ------
    InvalidInput
        Naming what does not fit.
    """
    if allocation is None:
        share = _share(sparsity)
        return {layer.name: share for layer in layers}
    if isinstance(allocation, Allocation):
        if pattern not in ("row", allocation.pattern):
            own = "" if allocation.pattern == "row" else f" or its own, {allocation.pattern!r}"
            raise InvalidInput(
                "an allocation gives every row a number of zeros, which needs `pattern` 'row'"
                f"{own}; got {pattern!r}."
            )
        allocation.check(layers, digest)
        return {layer.name: allocation.sparsity[layer.name] for layer in layers}
    if not isinstance(allocation, Mapping):
        raise InvalidInput(
            "`allocation` must be an Allocation, from entangle.allocation.load_allocation, or "
            f"sparsities by layer name; got {type(allocation).__name__}."
        )
    for layer in layers:
        if allocation.get(layer.name) is None:
            raise InvalidInput(f"`allocation` must name every layer; {layer.name!r} is missing.")
    return {layer.name: _share(allocation[layer.name]) for layer in layers}


def _share(sparsity: object) -> Sparsity:
    """Return one sparsity as a float, several as a tensor."""
    if sparsity is None or isinstance(sparsity, Tensor):
        return sparsity
    if isinstance(sparsity, Sequence | ndarray) and not isinstance(sparsity, str):
        return tensor_of("sparsity", sparsity, float64)
    return real("sparsity", sparsity)


def planned_pattern(allocation: Allocated | None, pattern: str) -> str:
    """Return the pattern to prune in: that of an allocation that was made for n:m is its own."""
    return allocation.pattern if isinstance(allocation, Allocation) else pattern


def planned_experts(
    layers: Sequence[Layer], allocation: Allocated | None, experts: int, *, tokens: int
) -> dict[str, int]:
    """Return the number of experts of every layer: the allocation's, if it has any.

    Raises
    ------
    InvalidInput
        If a number is below 1 or above the number of ``tokens`` to calibrate on.
    """
    experts = whole("experts", experts, least=1)
    counts = {layer.name: experts for layer in layers}
    if isinstance(allocation, Allocation) and allocation.experts is not None:
        counts = {name: allocation.experts[name] for name in counts}
    for count in dict.fromkeys(counts.values()):
        check_experts(count, tokens=tokens)
    return counts


def check_experts(count: int, *, tokens: int) -> None:
    """Raise `InvalidInput` unless so many experts can be fitted on so many tokens."""
    if whole("experts", count, least=1) > tokens:
        raise InvalidInput(
            f"`experts` must be at most the number of tokens to calibrate on, {tokens}; got "
            f"{count}."
        )


def describe_allocation(allocation: Allocated | None) -> dict[str, object]:
    """Return what a manifest's settings record of an allocation; nothing for other sparsities."""
    if not isinstance(allocation, Allocation):
        return {}
    return {"allocation": dict(allocation.manifest) | {"overall": allocation.overall}}


def check_shared(groups: Sequence[Sequence[Layer]], experts: Mapping[str, int]) -> None:
    """Raise `InvalidInput` unless layers that read one input have equally many experts.

    They share a router, so that a token goes to the expert of one number in all of them.

    Parameters
    ----------
    groups
        From `entangle.recording.recorder.shared_inputs`.
    experts
        By layer name.
    """
    for members in groups:
        first = members[0].name
        for layer in members[1:]:
            if experts[layer.name] != experts[first]:
                raise InvalidInput(
                    f"layers {first!r} and {layer.name!r} read one input and share a router, so "
                    f"their numbers of experts must be equal; got {experts[first]} and "
                    f"{experts[layer.name]}."
                )
