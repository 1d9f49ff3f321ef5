"""The value that a rule makes: how many weights of every neuron are zero.

The neurons that share a budget, layer after layer, as flat vectors.

The same budget, spread evenly: what an allocation is compared with.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.models.layers import Layer
from entangle.results.allocation import ROW as ROW
from entangle.results.allocation import AllocationReport, step_size

Reals = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayerRows:
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


def step_sizes(rows: LayerRows, pattern: str) -> Counts:
    """Return the weights that a neuron can lose at a time: 1, or ``in_features / m``.

    Raises
    ------
    InvalidInput
        For an unknown pattern, or one that does not divide a layer's inputs.
    """
    layers = zip(rows.names, rows.widths.tolist(), strict=True)
    return np.repeat([step_size(name, width, pattern) for name, width in layers], rows.counts)


@dataclass(frozen=True, eq=False)
class Allocation(AllocationReport):
    """Zeros of every neuron of some layers of one model, to prune with."""

    zeros: Mapping[str, Int64[Tensor, " _"]]
    """Zeros per neuron, (rows,), by full layer name in module order, int64 on the CPU."""

    def __post_init__(self) -> None:
        for name, zeros in self.zeros.items():
            _check_vector(name, zeros)
        super().__post_init__()

    @cached_property
    def sparsity(self) -> dict[str, Float[Tensor, " _"]]:
        """Share of zeros of every neuron, (rows,) float64, by layer name.

        Times ``in_features`` and rounded it is ``zeros`` again, which is what
        `entangle.pruning.prune` makes of it.
        """
        return {name: one.double() / self.in_features[name] for name, one in self.zeros.items()}

    def check(self, layers: Sequence[Layer], digest: str | None = None) -> None:
        """Check that the allocation is for these layers of this model.

        Parameters
        ----------
        layers
            The layers that are to be pruned. The budget holds over all layers of the allocation,
            so that it must cover each of them and no others.
        digest
            `entangle.models.loading.LanguageModel.digest`; None is not compared.

        Raises
        ------
        InvalidInput
            Naming what does not fit: another model, a layer too few or too many, another shape.
        """
        model = self.manifest.get("model")
        made_for = model.get("digest") if isinstance(model, Mapping) else None
        if digest is not None and made_for is not None and digest != made_for:
            raise InvalidInput(
                f"the allocation was made for a model of digest {str(made_for)[:12]}…; this one "
                f"has {digest[:12]}…: allocate from scores of this model."
            )
        for layer in layers:
            self._check_layer(layer)
        found = {layer.name for layer in layers}
        for name in self.zeros:
            if name not in found:
                raise InvalidInput(
                    f"the allocation's budget includes layer {name!r}, which is not among the "
                    f"{len(found)} layer(s) to prune: choose the layers that it was made for."
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Allocation":
        """Load an allocation that `save` wrote; errors as `AllocationReport.load`."""
        found = AllocationReport.load(path)
        given = {one.name: getattr(found, one.name) for one in fields(found)}
        zeros = {name: torch.from_numpy(one) for name, one in found.zeros.items()}
        return cls(**given | {"zeros": zeros})

    def _check_layer(self, layer: Layer) -> None:
        if layer.name not in self.zeros:
            raise InvalidInput(
                f"the allocation has no layer {layer.name!r}: choose the layers that it was made "
                "for, or score that layer too."
            )
        shape = (self.rows(layer.name), self.in_features[layer.name])
        if layer.shape != shape:
            raise InvalidInput(
                f"layer {layer.name!r} has shape {layer.shape}, the allocation is for {shape}: "
                "allocate from scores of this model."
            )


def load_allocation(path: str | os.PathLike[str]) -> Allocation:
    """Load an allocation that `Allocation.save` wrote.

    Raises
    ------
    InvalidInput
        If the file is missing, truncated, altered, or something else.
    """
    return Allocation.load(path)


def _check_vector(name: str, zeros: Tensor) -> None:
    if zeros.ndim != 1 or zeros.dtype != torch.int64 or not len(zeros) or zeros.is_cuda:
        raise InvalidInput(
            f"`zeros` of {name!r} must be a CPU vector of int64, one a neuron; got "
            f"{tuple(zeros.shape)} of {zeros.dtype} on {zeros.device}."
        )


def even(allocation: Allocation) -> Allocation:
    """Spread an allocation's zeros evenly over its rows: every row as near to the mean as can be.

    The sum is the same to the weight. Where the mean is no whole number of zeros a row, the rows
    take turns in rounding up and down. With an n:m pattern, which stays, they do so in its steps;
    where the sum cannot be met otherwise, rows of one width lie off the mean together.

    Returns
    -------
    Allocation
        Without numbers of experts; its manifest says rule ``uniform``.
    """
    counts = [allocation.rows(name) for name in allocation.zeros]
    widths = np.repeat(list(allocation.in_features.values()), counts)
    if allocation.pattern == ROW:
        upto = np.cumsum(widths.astype(np.float64)) * (allocation.n_zeros / widths.sum())
        spread = np.diff(np.rint(upto).astype(np.int64), prepend=0)
    else:
        spread = _in_steps(allocation, counts)
    zeros = torch.from_numpy(spread).split(counts)
    return Allocation(
        zeros=dict(zip(allocation.zeros, zeros, strict=True)),
        in_features=allocation.in_features,
        experts=None,
        manifest=dict(allocation.manifest) | {"settings": {"rule": "uniform"}},
        blocks=allocation.blocks,
        pattern=allocation.pattern,
    )


def _in_steps(allocation: Allocation, counts: list[int]) -> Counts:
    """Return the zeros of each row, whole steps of an n:m pattern."""
    layers = allocation.in_features.items()
    sizes = [step_size(name, width, allocation.pattern) for name, width in layers]
    steps = np.repeat(sizes, counts)
    rows = {size: int((steps == size).sum()) for size in sorted(set(sizes), reverse=True)}
    handed = _handed_out(rows, allocation.n_zeros)
    group = next(iter(allocation.in_features.values())) // sizes[0]
    if any(not 0 <= handed[size] <= rows[size] * group for size in rows):
        zeros = torch.cat(list(allocation.zeros.values())).numpy()
        handed = {size: int(zeros[steps == size].sum()) // size for size in rows}
    spread = np.zeros_like(steps)
    for size, number in handed.items():
        upto = np.rint(np.arange(1, rows[size] + 1) * (number / rows[size])).astype(np.int64)
        spread[steps == size] = size * np.diff(upto, prepend=0)
    return spread


def _handed_out(rows: Mapping[int, int], total: int) -> dict[int, int]:
    """Return how many steps of each size add up to the total, each number near to an even share.

    Parameters
    ----------
    rows
        Rows of each size of a step, the largest first.
    total
        Zeros, a sum of such steps.
    """
    handed: dict[int, int] = {}
    sizes = list(rows)
    for place, size in enumerate(sizes):
        mean = total * rows[size] / sum(one * rows[one] for one in sizes[place:])
        rest = math.gcd(*sizes[place + 1 :])  # what smaller steps can add up to; 0 without any
        near = range(round(mean) - rest, round(mean) + rest + 1)
        fitting = [number for number in near if rest and (total - number * size) % rest == 0]
        off = [abs(number - mean) for number in fitting]
        handed[size] = fitting[off.index(min(off))] if fitting else total // size
        total -= handed[size] * size
    return handed
