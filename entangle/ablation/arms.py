"""The arms of an ablation: who is touched, how, and how strongly."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from entangle.ablation.interventions import OUTPUT_EDITS
from entangle.ablation.selection import Selection
from entangle.ablation.solved import Level
from entangle.allocation.allocation import Allocation
from entangle.allocation.even import even
from entangle.allocation.labels import nominal_sparsity, rule_label, zeros_digest
from entangle.checks import choice, share, whole
from entangle.errors import InvalidInput

ROUTERS = ("kmeans", "random")
"""Routers of several experts; ``random`` is the control, whose clusters mean nothing."""

PRUNERS = {
    "prune": "sparsegpt",
    "prune-wanda": "wanda",
    "prune-magnitude": "magnitude",
    "prune-random": "random",
}
"""Interventions that prune rows, and the pruner of each."""

INTERVENTIONS = (*PRUNERS, *OUTPUT_EDITS)
"""All interventions: pruners of rows, and edits of outputs."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One changed model."""

    selection: Selection
    """Which neurons."""
    intervention: str
    """From `INTERVENTIONS`."""
    strength: float
    """Sparsity of a pruned row (of all rows together with an allocation), or share in [0, 1] of an
    edit of outputs."""
    experts: int = 1
    """Routed experts that hold the pruned rows; 1 without a router."""
    allocation: Allocation | None = None
    """Zeros of every row, in place of one sparsity for all."""
    router: str = ""
    """From `ROUTERS` where there are several experts, else empty."""

    @property
    def prunes(self) -> bool:
        """Whether rows are pruned; otherwise outputs are edited."""
        return self.intervention in PRUNERS

    @property
    def level(self) -> Level:
        """How sparse its rows are."""
        return self.strength if self.allocation is None else self.allocation

    def describe(self) -> dict[str, object]:
        """Return what makes the arm, JSON-serialisable."""
        described: dict[str, object] = {
            "selection": self.selection.describe(),
            "intervention": self.intervention,
            "strength": self.strength,
            "experts": self.experts,
        }
        if self.allocation is not None:
            described["allocation"] = zeros_digest(self.allocation)
        if self.router:
            described["router"] = self.router
        return described

    @property
    def key(self) -> str:
        """Digest of `describe`, which names the arm's file."""
        content = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """A short line for progress bars."""
        seed = "" if self.selection.seed is None else f" (seed {self.selection.seed})"
        routed = "" if self.experts == 1 else f", {self.experts} experts"
        routed += " of random clusters" if self.router == "random" else ""
        return f"{self.intervention} {self.selection.name}{seed} at {self.strength:g}{routed}"


def check_settings(
    interventions: Sequence[str],
    *,
    strengths: Sequence[float],
    edit_strengths: Sequence[float],
    experts: Sequence[int],
    routers: Sequence[str] = ROUTERS[:1],
) -> None:
    """Check the settings of arms, before any work is done.

    Raises
    ------
    UnknownName, InvalidInput
        If an intervention or a router does not exist, a strength lies outside [0, 1], a number of
        experts is below 1, or one of the lists is empty.
    """
    for name in interventions:
        choice("interventions", name, INTERVENTIONS, kind="intervention")
    for name in routers:
        choice("router", name, ROUTERS)
    for name, values in (("strengths", strengths), ("edit_strengths", edit_strengths)):
        for value in values:
            share(name, value)
    for count in experts:
        whole("experts", count, least=1)
    if not (interventions and strengths and edit_strengths and experts and routers):
        raise InvalidInput(
            "there is no arm to run: give at least one intervention, strength, number of experts "
            "and router."
        )


def plan_arms(
    selections: Sequence[Selection],
    interventions: Sequence[str],
    *,
    strengths: Sequence[float],
    edit_strengths: Sequence[float],
    experts: Sequence[int],
    routers: Sequence[str] = ROUTERS[:1],
) -> list[Arm]:
    """Return every combination that makes sense, once.

    Several experts only where rows are pruned, and routers only where there are several experts.
    """
    check_settings(
        interventions, strengths=strengths, edit_strengths=edit_strengths, experts=experts,
        routers=routers,
    )  # fmt: skip
    return [
        Arm(selection, intervention, float(strength), count, router=router)
        for intervention in dict.fromkeys(interventions)
        for strength in dict.fromkeys(strengths if intervention in PRUNERS else edit_strengths)
        for count in (dict.fromkeys(experts) if intervention in PRUNERS else (1,))
        for router in (dict.fromkeys(routers) if count > 1 else ("",))
        for selection in selections
    ]


def plan_allocated(
    allocation: Allocation, interventions: Sequence[str], *, experts: Sequence[int]
) -> list[Arm]:
    """Return two arms an intervention: every row as the allocation says, and the same zeros evenly.

    Parameters
    ----------
    allocation
        Zeros of every row of its layers, all of which are pruned.
    interventions
        Pruners, from `PRUNERS`.
    experts
        Must be 1 alone.

    Raises
    ------
    UnknownName, InvalidInput
        If an intervention does not exist or prunes nothing, or experts are asked for.
    """
    check_settings(interventions, strengths=(0.0,), edit_strengths=(0.0,), experts=experts)
    for name in interventions:
        if name not in PRUNERS:
            raise InvalidInput(
                f"an allocation says how rows are pruned; the intervention {name!r} prunes none: "
                "leave it out."
            )
    if set(experts) != {1}:
        raise InvalidInput(
            f"with an allocation `experts` must be 1; got {list(experts)}: `entangle.expand` "
            "(`entangle expand --allocation`) builds experts from it."
        )
    rows = {name: np.arange(len(zeros)) for name, zeros in allocation.zeros.items()}
    for index in rows.values():
        index.flags.writeable = False
    selections = (
        Selection("all", None, None, rows),
        Selection("allocation", rule_label(allocation), None, rows),
    )
    return [
        Arm(selection, intervention, nominal_sparsity(allocation), 1, level)
        for intervention in dict.fromkeys(interventions)
        for selection, level in zip(selections, (even(allocation), allocation), strict=True)
    ]
