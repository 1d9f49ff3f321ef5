"""Modules that compute with packed experts, in place of a linear layer or of a gated MLP.

What they hold is what lies in a file: nothing is unpacked but tiles that are in use.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.packed.activations import ACTIVATIONS
from entangle.packed.formats import Layout, Packed, unpack
from entangle.packed.products import OPERATORS, described, gated, linear
from entangle.packed.routing import PackedRouter, keep_dtypes

__all__ = ["Gating", "PackedGated", "PackedLinear", "PackedRouter", "gating_of"]


class PackedLinear(nn.Module):
    """Sends every token through the packed expert of its cluster.

    Parameters
    ----------
    layout
        Shape and format of the experts; the tensors are buffers of the layout's names.
    bias
        Whether there is one, common to all experts.
    router
        Held by a module of the model and shared by the layers that read the same input; None for a
        single expert.
    dtype
        Of the bias, and what ``weight.dtype`` tells of: ``weight`` has no elements, so that nothing
        but this module takes the file's for a dense layer's.
    """

    weight: Tensor
    router: PackedRouter | None

    def __init__(
        self, layout: Layout, *, bias: bool, router: PackedRouter | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        fits = router is None or (router.experts, router.features) == (
            layout.experts, layout.in_features,
        )  # fmt: skip
        if not fits or (router is None and layout.experts > 1):
            raise InvalidInput(
                f"a layer of {layout.experts} experts of {layout.in_features} inputs needs their "
                f"router; got {router}."
            )
        self.layout, self.experts = layout, layout.experts
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self._described, self._names = described(layout), tuple(layout.tensors())
        for name, (shape, kind) in layout.tensors().items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind))
        self.register_buffer("weight", torch.zeros(0, dtype=dtype))
        own = nn.Parameter(torch.zeros(layout.out_features, dtype=dtype), requires_grad=False)
        self.bias = own if bias else None
        object.__setattr__(self, "router", router)

    @classmethod
    def of(
        cls,
        layout: Layout,
        tensors: Mapping[str, Tensor],
        bias: Float[Tensor, " out_features"] | None,
        router: PackedRouter | None,
        dtype: torch.dtype,
    ) -> "PackedLinear":
        """Return a layer of given tensors, which are not copied."""
        with torch.device("meta"):
            made = cls(layout, bias=bias is not None, router=router, dtype=dtype)
        device = tensors["values"].device
        for name, tensor in tensors.items():
            made._buffers[name] = tensor
        made._buffers["weight"] = torch.zeros(0, dtype=dtype, device=device)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        before = self.tensors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return keep_dtypes(self, before)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by name, in the order of the layout."""
        return {name: self._buffers[name] for name in self._names}  # type: ignore[misc]

    @property
    def packed(self) -> Packed:
        """The layer as the products take it."""
        return Packed(self.tensors, self.layout, self.bias)

    def operands(self) -> tuple[list[Tensor], str, Tensor | None]:
        """Return the layer as the operators take it."""
        return [getattr(self, name) for name in self._names], self._described, self.bias

    def clusters(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        """Return the expert of every token, in reading order."""
        if self.router is None:
            return x.new_zeros(x.shape[:-1].numel(), dtype=torch.int64)
        found: Tensor = self.router(x)
        return found

    def dense(self, expert: int) -> Float[Tensor, "out_features in_features"]:
        """Return one expert with its zeros."""
        return unpack(self.tensors, self.layout, expert)

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the output of every token's own expert, in the order of the tokens.

        Raises
        ------
        InvalidInput
            If a gradient of ``x`` is asked for.
        """
        _check_gradient(x)
        clusters, tokens = self.clusters(x), _tokens(x)
        if torch.compiler.is_compiling():
            found = OPERATORS["linear"](tokens, clusters, *self.operands())
        else:
            found = linear(tokens, clusters, *self.packed)
        return found.view(*x.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Describe the shape for ``print(model)``."""
        at = self.layout
        return (
            f"in_features={at.in_features}, out_features={at.out_features}, experts={at.experts}, "
            f"format={at.format}, values={at.values}, bias={self.bias is not None}"
        )


@dataclass(frozen=True)
class Gating:
    """The children of a gated MLP, which computes ``down(activation(gate(x)) * up(x))``."""

    gate: str
    up: str
    down: str
    activation: str
    """One of `entangle.packed.activations.ACTIVATIONS`."""

    def describe(self) -> dict[str, str]:
        """Return the fields as JSON can hold them."""
        return asdict(self)


class PackedGated(nn.Module):
    """In place of a gated MLP whose gate and up have packed experts: both in one step.

    Parameters
    ----------
    gating
        Names of the children, which stay the same.
    gate, up
        They read the same input and share its router.
    down
        Packed or not.
    """

    def __init__(
        self, gating: Gating, gate: PackedLinear, up: PackedLinear, down: nn.Module
    ) -> None:
        super().__init__()
        self.gating = gating
        for name, child in ((gating.gate, gate), (gating.up, up), (gating.down, down)):
            self.add_module(name, child)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Return ``down(activation(gate(x)) * up(x))``; a token is routed once for both.

        Raises
        ------
        InvalidInput
            If a gradient of ``x`` is asked for.
        """
        _check_gradient(x)
        gate: PackedLinear = getattr(self, self.gating.gate)
        up: PackedLinear = getattr(self, self.gating.up)
        clusters, tokens = gate.clusters(x), _tokens(x)
        if torch.compiler.is_compiling():
            parts = (*gate.operands(), *up.operands())
            hidden = OPERATORS["gated"](tokens, clusters, *parts, self.gating.activation)
        else:
            hidden = gated(tokens, clusters, gate.packed, up.packed, self.gating.activation)
        hidden = hidden.view(*x.shape[:-1], gate.out_features)
        found: Tensor = getattr(self, self.gating.down)(hidden)
        return found


def _tokens(x: Tensor) -> Tensor:
    """Return the rows of ``x`` as they lie behind one another, in autocast's dtype inside it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(kind))
    return x.reshape(-1, x.shape[-1]).contiguous()


def _check_gradient(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise InvalidInput(
            "packed experts have no gradients; run the model under torch.no_grad(), or keep the "
            "input from requiring one."
        )


_NARROW, _WIDE = 6, 10


def gating_of(module: nn.Module, gate_and_up: tuple[str, str]) -> Gating | None:
    """Tell how a module gates, if it does: found by trying it on small layers in place of its own.

    Parameters
    ----------
    module
        Perhaps a gated MLP; it is not run itself, and stays as it is.
    gate_and_up
        Names of two of its children, of which one may gate the other.

    Returns
    -------
    Gating or None
        None if the module computes anything else, or holds more than three layers.
    """
    own = {name.partition(".")[0] for name, _ in module.named_parameters()}
    down = own - set(gate_and_up)
    if len(own) != 3 or len(down) != 1 or any("." in name for name in gate_and_up):
        return None
    last = down.pop()
    trial = _with_small_layers(module, gate_and_up, last)
    for gate, up in permutations(gate_and_up):
        for activation in ACTIVATIONS:
            gating = Gating(gate, up, last, activation)
            if _computes(trial, gating):
                return gating
    return None


def _with_small_layers(module: nn.Module, gate_and_up: tuple[str, str], down: str) -> nn.Module:
    """Return a copy whose three layers are small random ones in float64."""
    memo: dict[int, object] = {id(getattr(module, n)): None for n in (*gate_and_up, down)}
    trial = copy.deepcopy(module, memo)
    rng = torch.Generator().manual_seed(0)
    for name in (*gate_and_up, down):
        sizes = (_WIDE, _NARROW) if name == down else (_NARROW, _WIDE)
        layer = nn.Linear(*sizes, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
        trial.add_module(name, layer)
    return trial.eval()


@torch.no_grad()
def _computes(module: nn.Module, gating: Gating) -> bool:
    """Tell whether a module of small layers computes what a gated MLP does."""
    x = torch.linspace(-2, 2, 4 * _NARROW, dtype=torch.float64).view(1, 4, _NARROW)
    gate, up, down = (module.get_submodule(n) for n in (gating.gate, gating.up, gating.down))
    expected = down(ACTIVATIONS[gating.activation](gate(x)) * up(x))
    try:
        found = module(x)
    except Exception:
        return False
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and bool(torch.allclose(found, expected, rtol=1e-9, atol=1e-9))
    )
