"""The neurons that share a budget, layer after layer, as flat vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

Reals = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Layers and their neurons; a vector over neurons runs through the layers in order."""

    names: tuple[str, ...]
    """Full layer names in module order."""
    blocks: tuple[int | None, ...]
    """Transformer block of each layer, None outside the blocks."""
    counts: Counts
    """Neurons of each layer."""
    widths: Counts
    """Weights of one neuron of each layer (in_features)."""

    @cached_property
    def starts(self) -> Counts:
        """Index of each layer's first neuron."""
        ends: Counts = np.cumsum(self.counts)
        return ends - self.counts

    @cached_property
    def weights(self) -> Counts:
        """Weights of each neuron, (neurons,)."""
        return np.repeat(self.widths, self.counts)

    @cached_property
    def layer(self) -> Counts:
        """Index of each neuron's layer, (neurons,)."""
        return np.repeat(np.arange(len(self.names)), self.counts)

    @property
    def layer_weights(self) -> Counts:
        """Weights of each layer."""
        return self.counts * self.widths

    @property
    def n_weights(self) -> int:
        """Weights of all layers."""
        return int(self.layer_weights.sum())

    @cached_property
    def groups(self) -> Counts:
        """Index of the block of each layer; every layer outside the blocks is one of its own."""
        pairs = zip(self.names, self.blocks, strict=True)
        keys = [name if block is None else block for name, block in pairs]
        order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return np.array([order[key] for key in keys], dtype=np.int64)

    def spread(self, values: Reals) -> Reals:
        """Repeat one value a layer for each of its neurons."""
        return np.repeat(values, self.counts)

    def total(self, values: Reals) -> Reals:
        """Sum one value a neuron over each layer."""
        sums: Reals = np.add.reduceat(values, self.starts)
        return sums

    def mean(self, values: Reals) -> Reals:
        """Average one value a neuron over each layer."""
        return self.total(values) / self.counts

    def join(self, parts: Mapping[str, Tensor]) -> Reals:
        """Put one vector a layer behind each other, as float64."""
        return torch.cat([parts[name].double().cpu() for name in self.names]).numpy()

    def split_reals(self, values: Reals) -> dict[str, Float[Tensor, " _"]]:
        """Cut a vector over neurons into one a layer, float64."""
        parts = torch.from_numpy(np.ascontiguousarray(values)).split(self.counts.tolist())
        return dict(zip(self.names, parts, strict=True))

    def split(self, values: Counts) -> dict[str, Int64[Tensor, " _"]]:
        """Cut a vector over neurons into one a layer."""
        parts = torch.from_numpy(values).split(self.counts.tolist())
        return {name: part.clone() for name, part in zip(self.names, parts, strict=True)}
