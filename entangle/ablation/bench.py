"""The dense model with everything solved that the arms of a sweep need."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from entangle.ablation.arms import PRUNERS, Arm
from entangle.ablation.interventions import RowEdit, edited_outputs, mean_outputs, swapped_rows
from entangle.ablation.routed import fit_rows
from entangle.ablation.routed_rows import RoutedRows
from entangle.ablation.row_experts import installed
from entangle.ablation.selection import select
from entangle.ablation.solved import Level, SolvedRows, solve_rows
from entangle.ablation.statistics import LayerStatistics
from entangle.ablation.tables import realised_sparsity
from entangle.calibration import CalibrationSet
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.pruning.masks import count_zeros
from entangle.routing.router import Kind

Rows = Mapping[str, NDArray[np.int64]]
"""Sorted row indices by layer name."""


class Bench:
    """The dense model with everything solved that its arms need.

    Parameters
    ----------
    model, layers, statistics, calibration
        The model, the layers whose neurons are changed, what is known of them, and the text.
    arms
        All arms that may be applied.
    damping, seed
        Of the pruners.
    """

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[Layer],
        statistics: LayerStatistics,
        calibration: CalibrationSet,
        arms: Sequence[Arm],
        *,
        damping: float,
        seed: int,
    ) -> None:
        self._model, self._calibration, self._arms = model, calibration, arms
        self._layers = {layer.name: layer for layer in layers}
        self._statistics, self._damping, self._seed = statistics, damping, seed
        self._solved: dict[tuple[str, Level], dict[str, SolvedRows]] = {}
        self._routed: dict[tuple[str, str], RoutedRows] = {}
        for pruner in dict.fromkeys(PRUNERS[arm.intervention] for arm in arms if arm.prunes):
            plain = [a for a in arms if PRUNERS.get(a.intervention) == pruner and a.experts == 1]
            self._solve(pruner, plain)

    @cached_property
    def _means(self) -> dict[str, torch.Tensor]:
        return mean_outputs(self._statistics.scores)

    @property
    def neurons(self) -> pd.DataFrame:
        """One row a routed neuron; see `RoutedRows.neurons`."""
        tables = [
            routed.neurons.assign(pruner=pruner, router=router)
            for (pruner, router), routed in self._routed.items()
        ]
        if not tables:
            return pd.DataFrame({"layer": []})
        joined = pd.concat(tables, ignore_index=True)
        joined.loc[joined["experts"] == 1, "router"] = ""
        key = ["layer", "neuron", "experts", "sparsity", "pruner", "router"]
        names = [name for name in joined.columns if name != "router"]
        names.insert(names.index("experts") + 1, "router")
        return joined[names].drop_duplicates(key, ignore_index=True)

    def fit(self, *, memory: int, md: bool, progress: bool | None) -> None:
        """Fit routers and solve experts for the rows of all arms that have several."""
        routed = [arm for arm in self._arms if arm.prunes and arm.experts > 1]
        for pruner, router in dict.fromkeys((PRUNERS[a.intervention], a.router) for a in routed):
            own = [a for a in routed if (PRUNERS[a.intervention], a.router) == (pruner, router)]
            self._routed[pruner, router] = fit_rows(
                self._model, self._calibration, union_rows(arm.selection.rows for arm in own),
                sparsities=sorted({arm.strength for arm in own}),
                experts=[1, *dict.fromkeys(arm.experts for arm in own)],
                pruner=pruner, router=cast("Kind", router), damping=self._damping,
                seed=self._seed, memory=memory, md=md, progress=progress,
            )  # fmt: skip

    def applied(self, arm: Arm) -> AbstractContextManager[object]:
        """Return a context in which the model is changed as the arm says, and restored after."""
        rows = arm.selection.rows
        if not arm.prunes:
            layers = [self._layers[name] for name in rows]
            return edited_outputs(
                layers, arm.selection, arm.intervention, strength=arm.strength, means=self._means
            )
        if arm.experts > 1:
            routed = self._routed[PRUNERS[arm.intervention], arm.router]
            made = routed.modules(self._model, rows, arm.experts, arm.strength)
            return installed(self._model.module, made)
        solved = self._solved[PRUNERS[arm.intervention], arm.level]
        edits = [
            RowEdit(
                self._layers[name],
                torch.from_numpy(chosen.copy()),
                solved[name].take(chosen, arm.level)[0],
            )
            for name, chosen in rows.items()
        ]
        return swapped_rows(edits)

    def realised(self, arm: Arm) -> NDArray[np.float64]:
        """Return the share of zeros of every selected row; empty where outputs are edited."""
        if not arm.prunes:
            return np.zeros(0)
        name = PRUNERS[arm.intervention]
        if arm.experts > 1:
            return realised_sparsity(self._routed[name, arm.router].neurons, arm)
        solved, rows = self._solved[name, arm.level], arm.selection.rows.items()
        parts = [solved[layer].take(own, arm.level)[1] for layer, own in rows]
        return np.concatenate([part.double().numpy() for part in parts])

    def planned(self, arm: Arm) -> NDArray[np.float64]:
        """Return the share of zeros that every selected row is to have, to whole weights.

        In the order of `realised`; empty where outputs are edited.
        """
        shares = [np.zeros(0)]
        for name, own in arm.selection.rows.items() if arm.prunes else ():
            width = self._layers[name].in_features
            if arm.allocation is None:
                share = torch.full((len(own),), arm.strength, dtype=torch.float64)
                zeros = count_zeros(share, width)
            else:
                zeros = arm.allocation.zeros[name][torch.tensor(own)]
            shares.append(zeros.double().numpy() / width)
        return np.concatenate(shares)

    def nested(self, arm: Arm) -> None:
        """Solve all rows for the pruner and strength of an arm, so that any part can be pruned."""
        if not arm.prunes:
            return
        whole = select(self._statistics.scores.frame, "all")
        self._solve(PRUNERS[arm.intervention], [Arm(whole, arm.intervention, arm.strength)])

    def bottom(self, arm: Arm, *, by: str, fraction: float) -> Arm:
        """Return the same intervention on a share of the scored neurons, lowest in ``by`` first."""
        frame = self._statistics.scores.frame
        frame = frame[frame["flag"] == ""]
        lowest = select(frame, "bottom", by=by, fraction=fraction)
        return Arm(lowest, arm.intervention, arm.strength)

    @property
    def n_neurons(self) -> int:
        """Neurons of all layers."""
        return len(self._statistics.scores.frame)

    def _solve(self, pruner: str, arms: Sequence[Arm]) -> None:
        strengths = sorted({arm.strength for arm in arms if arm.allocation is None})
        allocations = dict.fromkeys(arm.allocation for arm in arms if arm.allocation is not None)
        levels: list[Level] = [*strengths, *allocations]
        if not levels:
            return
        solved = solve_rows(
            list(self._layers.values()), union_rows(arm.selection.rows for arm in arms),
            self._statistics.grams, sparsities=levels, pruner=pruner, damping=self._damping,
            seed=self._seed,
        )  # fmt: skip
        self._solved |= {(pruner, level): solved for level in levels}


def union_rows(several: Iterable[Rows]) -> dict[str, NDArray[np.int64]]:
    """Return the rows that are in any of some selections, sorted, by layer name."""
    joined: dict[str, list[NDArray[np.int64]]] = {}
    for rows in several:
        for name, chosen in rows.items():
            joined.setdefault(name, []).append(chosen)
    return {name: np.unique(np.concatenate(parts)) for name, parts in joined.items()}
