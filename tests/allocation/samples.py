"""Allocations for the tests of what is done with them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from entangle.allocation import Allocation
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel

Zeros = Mapping[str, Sequence[int]]


def made(
    zeros: Zeros,
    widths: Mapping[str, int],
    experts: Mapping[str, int] | None = None,
    *,
    pattern: str = "row",
) -> Allocation:
    """Return an allocation by hand; layer ``b.N.…`` lies in block N."""
    names = list(zeros)
    return Allocation(
        zeros={name: torch.tensor(list(zeros[name]), dtype=torch.int64) for name in names},
        in_features={name: widths[name] for name in names},
        experts=None if experts is None else dict(experts),
        manifest={"settings": {"rule": "protect", "by": ["wd"]}},
        blocks={n: int(n.split(".")[1]) for n in names if n.startswith("b.")},
        pattern=pattern,
    )


def random_allocation(
    model: LanguageModel,
    *,
    seed: int = 0,
    proj: str | None = "mlp",
    dense_rows: bool = True,
    group: int | None = None,
) -> Allocation:
    """Return unequal zeros for all rows of some layers of a model, its digest in the manifest.

    With a ``group`` of m neighbours the pattern is n:m.
    """
    rng = np.random.default_rng(seed)
    layers = find_layers(model.module, "all", proj)
    zeros = {}
    for layer in layers:
        step = 1 if group is None else layer.in_features // group
        counts = step * rng.integers(0, layer.in_features // step + 1, layer.out_features)
        if dense_rows:
            counts[:2] = 0
        zeros[layer.name] = torch.from_numpy(counts.astype(np.int64))
    return Allocation(
        zeros=zeros,
        in_features={layer.name: layer.in_features for layer in layers},
        experts=None,
        manifest={"model": model.describe(), "settings": {"rule": "drawn", "by": []}},
        blocks={layer.name: layer.block for layer in layers if layer.block is not None},
        pattern="row" if group is None else f"n:{group}",
    )


def layers_of(allocation: Allocation) -> tuple[Layer, ...]:
    """Return layers of the shapes of an allocation, in its order."""
    return tuple(
        Layer(
            name, allocation.blocks.get(name), name.rpartition(".")[2],
            torch.nn.Linear(allocation.in_features[name], len(zeros), bias=False), False,
        )
        for name, zeros in allocation.zeros.items()
    )  # fmt: skip


def same_zeros(a: Allocation, b: Allocation) -> bool:
    """Tell whether two allocations have the same layers in one order, with the same zeros."""
    return list(a.zeros) == list(b.zeros) and all(
        torch.equal(a.zeros[name], b.zeros[name]) for name in a.zeros
    )


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    """Allocations of a few small layers."""
    names = [f"b.{i // 2}.{'up' if i % 2 == 0 else 'down'}" for i in range(draw(st.integers(1, 5)))]
    widths = {name: draw(st.integers(1, 9)) for name in names}
    zeros = {
        name: draw(st.lists(st.integers(0, widths[name]), min_size=1, max_size=6)) for name in names
    }
    return made(zeros, widths)


@st.composite
def grouped_allocations(draw: st.DrawFn) -> Allocation:
    """Allocations in groups of m neighbours, of a few small layers."""
    names = [f"b.{i}.up" for i in range(draw(st.integers(1, 5)))]
    group = draw(st.integers(1, 5))
    steps = {name: draw(st.integers(1, 9)) for name in names}
    zeros = {
        name: [step * n for n in draw(st.lists(st.integers(0, group), min_size=1, max_size=6))]
        for name, step in steps.items()
    }
    return made(zeros, {name: group * steps[name] for name in names}, pattern=f"n:{group}")
