"""The arms of an ablation: who is touched, how, and how strongly."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from entangle.ablation.interventions import OUTPUT_EDITS
from entangle.ablation.selection import Selection
from entangle.errors import InvalidInput, unknown_name

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
    """Sparsity of a pruned row, or share in [0, 1] of an edit of outputs."""
    experts: int = 1
    """Routed experts that hold the pruned rows; 1 without a router."""

    @property
    def prunes(self) -> bool:
        """Whether rows are pruned; otherwise outputs are edited."""
        return self.intervention in PRUNERS

    def describe(self) -> dict[str, object]:
        """Return what makes the arm, JSON-serialisable."""
        return {
            "selection": self.selection.describe(),
            "intervention": self.intervention,
            "strength": self.strength,
            "experts": self.experts,
        }

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
        return f"{self.intervention} {self.selection.name}{seed} at {self.strength:g}{routed}"


def check_settings(
    interventions: Sequence[str],
    *,
    strengths: Sequence[float],
    edit_strengths: Sequence[float],
    experts: Sequence[int],
) -> None:
    """Check the settings of arms, before any work is done.

    Raises
    ------
    UnknownName, InvalidInput
        If an intervention does not exist, a strength lies outside [0, 1], a number of experts is
        below 1, or one of the lists is empty.
    """
    for name in interventions:
        if name not in INTERVENTIONS:
            raise unknown_name("intervention", name, INTERVENTIONS)
    for name, values in (("strengths", strengths), ("edit_strengths", edit_strengths)):
        for value in values:
            if not 0.0 <= value <= 1.0:
                raise InvalidInput(f"`{name}` must lie in [0, 1]; got {value}.")
    for count in experts:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidInput(f"`experts` must be integers of at least 1; got {count!r}.")
    if not (interventions and strengths and edit_strengths and experts):
        raise InvalidInput(
            "there is no arm to run: give at least one intervention, strength and number of "
            "experts."
        )


def plan_arms(
    selections: Sequence[Selection],
    interventions: Sequence[str],
    *,
    strengths: Sequence[float],
    edit_strengths: Sequence[float],
    experts: Sequence[int],
) -> list[Arm]:
    """Return every combination that makes sense: several experts only where rows are pruned."""
    check_settings(
        interventions, strengths=strengths, edit_strengths=edit_strengths, experts=experts
    )
    return [
        Arm(selection, intervention, float(strength), count)
        for intervention in dict.fromkeys(interventions)
        for strength in dict.fromkeys(strengths if intervention in PRUNERS else edit_strengths)
        for count in (dict.fromkeys(experts) if intervention in PRUNERS else (1,))
        for selection in selections
    ]
