"""Ablations: which neurons are touched, how the model is changed, and what that does to it."""

from warnings import warn

from entangle.experiments.ablate import ablate
from entangle.experiments.arms import INTERVENTIONS
from entangle.experiments.interventions import (
    OUTPUT_EDITS,
    RowEdit,
    edited_outputs,
    mean_outputs,
    pruned_rows,
    swapped_rows,
)
from entangle.experiments.selection import (
    SELECTION_RULES,
    Selection,
    check_scores_fit,
    read_selection,
    select,
    select_listed,
)
from entangle.results.ablation import AblationResult, load_ablation

__all__ = [
    "INTERVENTIONS",
    "OUTPUT_EDITS",
    "SELECTION_RULES",
    "AblationResult",
    "RowEdit",
    "Selection",
    "ablate",
    "check_scores_fit",
    "edited_outputs",
    "load_ablation",
    "mean_outputs",
    "pruned_rows",
    "read_selection",
    "select",
    "select_listed",
    "swapped_rows",
]


def __getattr__(name: str) -> object:
    if name == "RULES":
        warn("experiments.RULES is SELECTION_RULES now", DeprecationWarning, 2)
        return SELECTION_RULES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
