"""What methods of activation sparsity look at: a model's layers, what they read, and a text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from entangle.activation.neurons import FeedForward, feed_forwards
from entangle.activation.rules import Routing, Window
from entangle.errors import InvalidInput
from entangle.models.layers import Layer, find_layers, list_layers, refuse_experts
from entangle.models.loading import LanguageModel
from entangle.recording.groups import shared_inputs
from entangle.recording.hooks import forward, observe
from entangle.recording.recorder import Recorded, Recorder, of_one_group
from entangle.texts.calibration_set import CalibrationSet

SCOPES = ("mlp", "all")
"""Linears of the blocks that may be sparse: of the feed-forward part, or with attention's too."""


@dataclass(frozen=True)
class Masks:
    """How activations are masked, and which tokens are scored."""

    scope: str = "mlp"
    form: str | None = None
    dense_prefix: int = 0
    prefix: int = 0

    @property
    def first(self) -> int:
        """First tokens of a window whose activations are not masked."""
        return max(self.prefix, self.dense_prefix)

    def describe(self) -> dict[str, object]:
        """Return what differs from the usual, JSON-serialisable."""
        usual = Masks()
        return {k: v for k, v in asdict(self).items() if v != getattr(usual, k)}


@dataclass(frozen=True, eq=False)
class Norm:
    """What stands in front of layers, where it is a norm."""

    gain: Float[Tensor, " features"] | None
    """Factors of a root-mean-square norm; None for another one."""


@dataclass(frozen=True, eq=False)
class Routed:
    """A layer of several experts, of which every token has one."""

    nonzeros: Float64[Tensor, "experts features"]
    """Non-zero weights of every column of every expert."""
    routing: Routing
    """Which expert a token goes to; layers that read one input share it."""
    share: Float64[Tensor, " experts"]
    """Of the calibration text's tokens."""
    router: int
    """Multiply-adds of the router for a token."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the layers of a scope, and the calibration text."""

    model: LanguageModel
    calibration: CalibrationSet
    scope: str
    """One of `SCOPES`."""
    window: Window
    stand_ins: Sequence[Layer] = ()
    """Layers that are in the place of linears of the scope: those of `routed`."""
    routed: Mapping[str, Routed] = field(default_factory=dict)
    """Layers of several experts, by name."""

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The linears of the blocks that are in scope."""
        if self.stand_ins:
            return tuple(self.stand_ins)
        found = find_layers(self.module, "all", "mlp" if self.scope == "mlp" else None)
        refuse_experts(found, "activation sparsity")
        return tuple(layer for layer in found if layer.block is not None)

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.model.module

    @cached_property
    def everything(self) -> int:
        """Weights of all linear layers of the dense model, the head included."""
        layers = (*self.stand_ins, *list_layers(self.module))  # expanded ones are among both
        return sum({layer.name: math.prod(layer.shape) for layer in layers}.values())

    @cached_property
    def nonzeros(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Non-zero weights of every column and of every row of a layer, float64, by its name."""
        plain = [layer for layer in self.layers if layer.name not in self.routed]
        kept = {layer.name: layer.weight != 0 for layer in plain}
        return {name: (one.sum(0).double(), one.sum(1).double()) for name, one in kept.items()}

    @cached_property
    def groups(self) -> list[list[Layer]]:
        """Layers that read one input."""
        ids = next(iter(of_one_group(self.calibration)))[1]
        return shared_inputs(self.module, self.layers, ids[:1, :16])

    @cached_property
    def parts(self) -> tuple[FeedForward, ...]:
        """The feed-forward parts."""
        return feed_forwards(self.module, next(iter(of_one_group(self.calibration)))[1])

    @cached_property
    def norms(self) -> Mapping[str, Norm]:
        """The norm whose output a layer reads, by the layer's name, where there is one."""
        stand_ins = [
            Layer(name, 0, name.rpartition(".")[2], child, transposed=False)
            for name, child in self.module.named_modules()
            if "norm" in type(child).__name__.lower() and not list(child.children())
        ]
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        read: dict[str, Tensor] = {}

        def keep(layer: Layer, inputs: Tensor, outputs: Tensor) -> None:
            seen[layer.name] = inputs, outputs

        def note(layer: Layer, inputs: Tensor, _outputs: Tensor) -> None:
            read[layer.name] = inputs

        ids = next(iter(of_one_group(self.calibration)))[1]
        with observe(stand_ins, keep), observe(self.layers, note):
            forward(self.module, ids[:1, :16])
        return {
            name: Norm(_gain(before, after))
            for name, inputs in read.items()
            for before, after in seen.values()
            if after.shape == inputs.shape and torch.equal(after, inputs)
        }

    def gain(self, layer: Layer) -> Float[Tensor, " features"]:
        """Return the factors of the root-mean-square norm in front of a layer.

        Raises
        ------
        InvalidInput
            If another norm, or none, stands there.
        """
        norm = self.norms.get(layer.name)
        if norm is None or norm.gain is None:
            raise InvalidInput(
                f"layer {layer.name!r} must read what a root-mean-square norm gives; it does not."
            )
        return norm.gain

    def watch(self, layers: Sequence[Layer], take: Callable[[Recorded], None]) -> None:
        """Run the dense model over the calibration text and hand on what layers see."""
        recorder = Recorder(layers, take, compared=False, lenient=True)
        recorder.run(self.module, of_one_group(self.calibration))


def _gain(before: Tensor, after: Tensor) -> Tensor | None:
    """Return the factors that a root-mean-square norm has applied; None if it is another one."""
    x, y = before.double().flatten(0, -2), after.double().flatten(0, -2)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    gain = (unit * y).sum(0) / unit.square().sum(0)
    close = (gain * unit - y).abs().max() <= 0.02 * y.abs().max()
    return gain.float() if bool(close) else None
