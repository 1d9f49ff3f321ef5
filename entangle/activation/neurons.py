"""The layers of feed-forward parts, found by running them, and masks of their neurons."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from entangle.activation.rules import Rule, Window
from entangle.models.layers import Layer, find_layers
from entangle.packed.activations import ACTIVATIONS
from entangle.recording.hooks import forward, observe

_PROBE = 8  # tokens that show what is computed
_CLOSE = 1e-3


class Part(NamedTuple):
    """Some of a layer's neurons: all, or a half where two layers are one."""

    layer: Layer
    start: int
    size: int

    def of(self, outputs: Float[Tensor, "... rows"]) -> Float[Tensor, "... part"]:
        """Return the part's outputs."""
        return outputs.narrow(-1, self.start, self.size)


@dataclass(frozen=True, eq=False)
class FeedForward:
    """``down(act(gate(x)) · up(x))``, or ``down(act(up(x)))`` without a gate."""

    gate: Part | None
    up: Part | None
    """None where what comes before is not known: `down` alone is."""
    down: Layer
    activation: str | None
    """One of `ACTIVATIONS`; None where it is not known."""


def feed_forwards(
    module: nn.Module, ids: Int64[Tensor, "sequences tokens"]
) -> tuple[FeedForward, ...]:
    """Return the feed-forward parts of a model's blocks, by what they compute on a few tokens.

    Parameters
    ----------
    module
        The model.
    ids
        Token ids; a few are used.
    """
    layers = find_layers(module, "all", "mlp")
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(layer: Layer, inputs: Tensor, outputs: Tensor) -> None:
        seen[layer.name] = inputs.flatten(0, -2), outputs.flatten(0, -2)

    with observe(layers, keep):
        forward(module, ids[:1, :_PROBE])
    found = []
    for layer in layers:
        others = [one for one in layers if one.block == layer.block and one.name in seen]
        if layer.name in seen:
            made = _made_of(seen[layer.name][0], others, seen)
            if made is not None:
                gate, up, activation = made
                found.append(FeedForward(gate, up, layer, activation))
    return tuple(found)


def _parts(layers: Sequence[Layer], size: int) -> Iterator[Part]:
    for layer in layers:
        for start in range(0, layer.out_features - size + 1, size):
            if layer.out_features in (size, 2 * size):
                yield Part(layer, start, size)


def _made_of(
    z: Tensor, layers: Sequence[Layer], seen: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Part | None, Part, str] | None:
    """Return gate, up and activation that give ``z`` best; None if none gives it nearly."""
    parts = [
        (part, part.of(seen[part.layer.name][1]))
        for part in _parts(layers, z.shape[-1])
        if len(seen[part.layer.name][1]) == len(z)
    ]
    found: list[tuple[float, tuple[Part | None, Part, str]]] = []
    for name, activation in ACTIVATIONS.items():
        for first, a in parts:
            opened = activation(a)  # in the model's own precision
            found.append((_apart(opened, z), (None, first, name)))
            found += [
                (_apart(opened * b, z), (first, second, name))
                for second, b in parts if first != second
            ]  # fmt: skip
    wrong, made = min(found, key=lambda one: one[0], default=(1.0, None))
    return made if wrong <= max(_CLOSE, 2 * torch.finfo(z.dtype).eps) else None


def _apart(found: Tensor, z: Tensor) -> float:
    """Return the largest difference, over the largest of what is wanted."""
    size, wrong = z.double().abs().max(), (found.double() - z.double()).abs().max()
    return float(wrong / size) if size > 0 else float(wrong > 0)


@dataclass(eq=False)
class NeuronRule(Rule):
    """Keep the neurons of a feed-forward part whose activation is large.

    The score is |act(gate)| · scale where there is a gate, and what enters `down` otherwise.
    """

    part: FeedForward | None = None
    spares_up: bool = True
    """Whether a gate decides, so that `up` need not compute what goes."""
    gates: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of gates in the pass that runs, by name."""

    def activation(self, x: Float[Tensor, "... neurons"]) -> Float[Tensor, "... neurons"]:
        """Return the scores of the neurons whose outputs ``x`` are, before `scale`."""
        assert self.part is not None  # noqa: S101
        gate = self.part.gate
        if gate is None or self.part.activation is None:
            return x.float().abs()
        opened = gate.of(self.gates[gate.layer.name]).view(x.shape)
        return ACTIVATIONS[self.part.activation](opened.float()).abs()

    def score(self, x: Float[Tensor, "... neurons"]) -> Float[Tensor, "... neurons"]:
        """Return how much every neuron matters."""
        scores = self.activation(x)
        return scores if self.scale is None else scores * self.scale

    def __call__(self, x: Float[Tensor, "... neurons"]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the neurons' outputs with those that go set to 0, and which are kept."""
        keep = self.chosen(self.score(x))
        if self.window.dense:
            keep |= ~self.window.of(x, self.window.dense)
        self.count(keep)
        return torch.where(keep, x, 0.0), keep


class Chooser:
    """Chooses a sequence's neurons from its first tokens."""

    def __init__(self, kind: str, share: float, votes: float = 0.2) -> None:
        self.kind, self.share, self.votes = kind, share, votes

    def __call__(
        self, z: Float[Tensor, "sequences tokens neurons"]
    ) -> Bool[Tensor, "sequences neurons"]:
        """Return which neurons are kept for the rest of every sequence."""
        count = int(self.share * z.shape[-1] + 1e-9)
        if count == z.shape[-1]:  # none goes, those without a vote neither
            return torch.ones_like(z[:, 0], dtype=torch.bool)
        z = z.float()
        if self.kind == "griffin":
            unit = z / z.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
            best = unit.norm(dim=1).topk(count).indices
            return torch.zeros_like(z[:, 0], dtype=torch.bool).scatter_(-1, best, True)
        votes = torch.zeros_like(z[:, 0])
        for place, states in enumerate(z):
            most = int(self.votes * float((states > 0).sum(-1).double().mean()))
            chosen = states.topk(most).indices.flatten()
            votes[place] = torch.bincount(chosen, minlength=z.shape[-1]).to(votes)
        best = votes.topk(count)
        keep = torch.zeros_like(votes, dtype=torch.bool).scatter_(-1, best.indices, True)
        return keep & (votes > 0)


@dataclass(eq=False)
class PromptRule(NeuronRule):
    """Keep the neurons that the first tokens of a sequence chose, for all tokens after them."""

    chooser: Chooser | None = None

    def __call__(self, x: Float[Tensor, "... neurons"]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the neurons' outputs with those that go set to 0, and which are kept."""
        assert self.chooser is not None  # noqa: S101
        late = self.window.of(x, self.window.dense)
        states = x.view(*self.window.shape, x.shape[-1])
        chosen = self.chooser(states[:, : self.window.dense])[:, None].expand_as(states)
        keep = chosen.reshape(x.shape) | ~late
        self.count(keep)
        return torch.where(keep, x, 0.0), keep


__all__ = ["Chooser", "FeedForward", "NeuronRule", "Part", "PromptRule", "Window", "feed_forwards"]
