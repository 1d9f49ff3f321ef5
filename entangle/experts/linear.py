"""Modules that compute with experts, and how a checkpoint stores their weights.

The dense output is never computed where all neurons have experts (`ExpandedLinear`); where only
some have (`RowExperts`), the others are the dense layer's. Stored are a bitmap and the non-zeros.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from entangle.errors import InvalidInput, unknown_name
from entangle.experts.router import Router
from entangle.models.layers import Layer
from entangle.models.mixtures import put_layer


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

    @property
    def k(self) -> int:
        """Number of experts."""
        return self.router.k

    def follow(self, given: Tensor, masked: Tensor) -> None:
        """Send the tokens of an input that was masked where those that were given go."""
        self._last = weakref.ref(masked), masked._version, self(given)

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

    @property
    def in_features(self) -> int:
        """Width of a token."""
        return int(self.weight.shape[2])

    @property
    def out_features(self) -> int:
        """Number of neurons."""
        return int(self.weight.shape[1])

    def extra_repr(self) -> str:
        """Describe the shape for ``print(model)``."""
        experts, out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, experts={experts}"


class RowExperts(nn.Module):
    """A dense layer whose chosen neurons are computed by the expert of each token's cluster.

    All other neurons, and all neurons where every expert equals the dense rows, are the dense
    layer's, bit for bit. A token costs the dense layer and the chosen rows of one expert.

    Parameters
    ----------
    layer
        The dense layer; its module is called as it is, and its bias is that of the experts.
    rows
        Indices of the chosen neurons, all different, shape (rows,).
    weight
        Their weights in every expert, (experts, rows, in_features).
    routing
        Which expert a token goes to; shared by the layers that read the same input. Not needed for
        a single expert.

    Raises
    ------
    InvalidInput
        If the indices or shapes do not fit the layer or the routing.
    """

    def __init__(
        self,
        layer: Layer,
        rows: Int64[Tensor, " rows"],
        weight: Float[Tensor, "experts rows in_features"],
        routing: SharedRouting | None = None,
    ) -> None:
        super().__init__()
        _check(layer, rows, weight, routing)
        dense = layer.weight
        rows, weight = rows.to(dense.device), weight.to(dense.device)
        bias = None if layer.bias is None else layer.bias[rows]
        self.dense = layer.module
        self.rows: Int64[Tensor, " rows"]
        self.register_buffer("rows", rows, persistent=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.routing = routing
        self._unchanged = bool((weight == dense[rows]).all())

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the dense layer's output, the chosen columns overwritten by the experts'."""
        outputs: Tensor = self.dense(x)
        if self._unchanged:
            return outputs
        chosen = self._chosen(x).to(outputs.dtype)
        shape = (*x.shape[:-1], self.rows.numel())
        return outputs.index_copy(-1, self.rows, chosen.reshape(shape))

    def _chosen(self, x: Tensor) -> Tensor:
        """Return the outputs of the chosen rows, (tokens, rows), in the order of the tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        if self.routing is None or self.weight.shape[0] == 1:
            return nn.functional.linear(tokens, self.weight[0], self.bias)
        clusters = self.routing(x)
        counts = torch.bincount(clusters, minlength=self.weight.shape[0]).tolist()
        outputs = tokens.new_empty(tokens.shape[0], self.weight.shape[1])
        for expert, index in enumerate(clusters.argsort(stable=True).split(counts)):
            if index.numel():
                chosen = nn.functional.linear(tokens[index], self.weight[expert], self.bias)
                outputs[index] = chosen.to(outputs.dtype)
        return outputs

    def extra_repr(self) -> str:
        """Describe the shape for ``print(model)``."""
        experts, rows, in_features = self.weight.shape
        return f"rows={rows}, in_features={in_features}, experts={experts}"


def _check(layer: Layer, rows: Tensor, weight: Tensor, routing: SharedRouting | None) -> None:
    index = rows.tolist()
    if len(set(index)) < len(index) or not all(0 <= row < layer.out_features for row in index):
        raise InvalidInput(
            f"`rows` must be different indices in [0, {layer.out_features}) of layer "
            f"{layer.name!r}; got {index[:8]}."
        )
    experts = weight.shape[0] if routing is None else routing.router.k
    if experts < 1 or tuple(weight.shape) != (experts, len(index), layer.in_features):
        raise InvalidInput(
            f"`weight` must have shape (experts, rows, in_features) = ({experts}, {len(index)}, "
            f"{layer.in_features}) for layer {layer.name!r}; got {tuple(weight.shape)}."
        )
    if routing is None and experts > 1:
        raise InvalidInput(f"`routing` must tell which of {experts} experts to take; got None.")
    if routing is not None and routing.router.features != layer.in_features:
        raise InvalidInput(
            f"`routing` must be fitted on tokens of {layer.in_features} features; "
            f"got {routing.router.features}."
        )


@contextmanager
def installed(
    module: nn.Module, replacements: Mapping[str, nn.Module]
) -> Iterator[Mapping[str, nn.Module]]:
    """Put modules in the place of others inside the ``with`` block.

    Parameters
    ----------
    module
        The model, changed in place; however the block ends, the very objects that were there
        before are put back.
    replacements
        New modules by full dotted name.

    Yields
    ------
    Mapping
        The modules that were replaced, by name.

    Raises
    ------
    UnknownName
        If the model has no module of a name; nothing is replaced then.
    """
    present = dict(module.named_modules(remove_duplicate=False))
    for name in replacements:
        if not name or name not in present:
            raise unknown_name("module", name, present)
    originals = {name: present[name] for name in replacements}
    try:
        for name, replacement in replacements.items():
            put_layer(module, name, replacement)
        yield originals
    finally:
        for name, original in originals.items():
            put_layer(module, name, original)


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
