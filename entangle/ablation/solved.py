"""Pruned rows of every layer, solved once for all the arms that use them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.allocation.allocation import Allocation
from entangle.allocation.steps import ROW
from entangle.errors import InvalidInput, NumericalError
from entangle.models.layers import Layer
from entangle.pruning import prune
from entangle.stats.gram import GramResult

Rows = Mapping[str, NDArray[np.int64]]
Level = float | Allocation
"""How sparse rows are: a share of zeros in [0, 1] for all, or each as an allocation says."""


@dataclass(frozen=True, eq=False)
class SolvedRows:
    """Sparse weights of some rows of a layer at several levels."""

    rows: Int64[Tensor, " rows"]
    """Indices in ascending order."""
    weight: Mapping[Level, Float[Tensor, "rows in_features"]]
    """By level, in the layer's dtype, on the CPU."""
    realised: Mapping[Level, Float[Tensor, " rows"]]
    """Share of zeros of every row, by level."""

    def take(
        self, wanted: NDArray[np.int64], level: Level
    ) -> tuple[Float[Tensor, "chosen in_features"], Float[Tensor, " chosen"]]:
        """Return the weights and realised sparsities of some of the rows."""
        place = torch.searchsorted(self.rows, torch.tensor(wanted))
        return self.weight[level][place], self.realised[level][place]


def solve_rows(
    layers: Sequence[Layer],
    rows: Rows,
    grams: Mapping[str, GramResult],
    *,
    sparsities: Sequence[Level],
    pruner: str = "sparsegpt",
    damping: float = 0.01,
    seed: int = 0,
) -> dict[str, SolvedRows]:
    """Prune rows of dense layers to an exact number of zeros each.

    Rows do not depend on one another, so all rows and sparsities of the layers that read one input
    are solved together, with one factorisation of its gram.

    Parameters
    ----------
    layers
        Layers of the dense model.
    rows
        Indices in ascending order by layer name; layers without any are left out.
    grams
        ``XᵀX`` of each layer's inputs, by layer name.
    sparsities
        Shares of zeros in [0, 1], or allocations that hold all of the layers, all of one pattern.
    pruner, damping, seed
        As in `entangle.pruning.prune` (``pruner`` is its ``method``). The zeros of ``"random"``
        also depend on which rows and sparsities are solved together.

    Raises
    ------
    InvalidInput
        If the allocations' patterns differ.
    NumericalError
        If a gram cannot be factorised; the message names the layers.
    """
    pattern = _pattern(sparsities)
    solved: dict[str, SolvedRows] = {}
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        if len(rows.get(layer.name, ())):
            groups.setdefault(id(grams[layer.name]), []).append(layer)
    for members in groups.values():
        chosen = [torch.tensor(rows[layer.name]) for layer in members]
        dense = torch.cat(
            [layer.weight[i.to(layer.device)] for layer, i in zip(members, chosen, strict=True)]
        )
        shares = torch.cat([_shares(level, members, chosen) for level in sparsities])
        try:
            result = prune(
                dense.repeat(len(sparsities), 1),
                grams[members[0].name].gram.to(dense.device),
                method=pruner, sparsity=shares.to(dense.device), pattern=pattern,
                damping=damping, seed=seed,
            )  # fmt: skip
        except NumericalError as error:
            names = ", ".join(layer.name for layer in members)
            raise NumericalError(f"{names}: {error}") from error
        weight = result.weight.cpu().unflatten(0, (len(sparsities), -1))
        zeros = result.realised_sparsity.cpu().unflatten(0, (len(sparsities), -1))
        start = 0
        for layer, index in zip(members, chosen, strict=True):
            own = slice(start, start + len(index))
            solved[layer.name] = SolvedRows(
                index,
                {level: weight[i, own] for i, level in enumerate(sparsities)},
                {level: zeros[i, own] for i, level in enumerate(sparsities)},
            )
            start = own.stop
    return solved


def _pattern(levels: Sequence[Level]) -> str:
    """Return the pattern of all levels; that of a share of zeros is ``row``."""
    patterns = {one.pattern if isinstance(one, Allocation) else ROW for one in levels} or {ROW}
    if len(patterns) > 1:
        raise InvalidInput(
            f"`sparsities` must have one pattern; got {' and '.join(sorted(patterns))}: solve them "
            "one after the other."
        )
    return patterns.pop()


def _shares(
    level: Level, layers: Sequence[Layer], rows: Sequence[Int64[Tensor, " _"]]
) -> Float[Tensor, " all_rows"]:
    """Return the share of zeros of every chosen row of some layers, float64."""
    if not isinstance(level, Allocation):
        return torch.full((sum(map(len, rows)),), float(level), dtype=torch.float64)
    pairs = zip(layers, rows, strict=True)
    return torch.cat([level.sparsity[layer.name][index] for layer, index in pairs])
