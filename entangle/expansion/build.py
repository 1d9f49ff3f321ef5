"""Expand a model block by block, on the hidden states of the blocks already expanded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entangle.expansion.linear import ExpandedLinear, SharedRouting
from entangle.expansion.solve import Experts, SolverSettings, Sparsity, solve_experts
from entangle.models.blocks import BlockRunner
from entangle.models.layers import Layer
from entangle.recording.hooks import observe, same_tensor
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.routing import fit_router
from entangle.routing.router import Kind
from entangle.stats.gram import ClusterGrams

_BLOCK_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be built; names as in `entangle.expand`."""

    layers: Mapping[int, Sequence[Layer]]
    """Layers to expand, by block."""
    sparsity: Mapping[str, Sparsity]
    """Sparsity of each layer, by its full name."""
    experts: int = 16
    router: Kind = "kmeans"
    restarts: int = 10
    seed: int = 0
    solver: SolverSettings = field(default_factory=SolverSettings)


@dataclass(frozen=True, eq=False)
class ExpandedLayer:
    """One layer that was expanded."""

    layer: Layer
    """The dense layer."""
    module: ExpandedLinear
    """What takes its place."""
    experts: Experts
    """What its experts lost."""


class HiddenStates:
    """Hidden states of fixed batches of sequences, kept within a byte budget."""

    def __init__(self, batches: Sequence[Int[Tensor, "sequences tokens"]], memory: int) -> None:
        self._batches, self._memory = batches, memory
        self._store = TokenStore(ByteBudget(memory))

    def enter(self, runner: BlockRunner) -> None:
        """Fill with what enters the first block."""
        for ids in self._batches:
            self._store.append(runner.enter(ids).flatten(0, -2))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (token ids, hidden states of shape (sequences, tokens, features)), in order."""
        start = 0
        for ids in self._batches:
            index = torch.arange(start, start + ids.numel())
            yield ids, self._store.take(index).unflatten(0, tuple(ids.shape))
            start += ids.numel()

    def advance(self, runner: BlockRunner, index: int) -> None:
        """Replace every batch by what block ``index`` makes of it."""
        following = TokenStore(ByteBudget(self._memory))
        for ids, hidden in self:
            following.append(runner.run(index, hidden, ids).flatten(0, -2))
        self._store.close()
        self._store = following
