from typing import Any

import numpy as np
import pytest

from entangle.errors import InvalidInput, UnknownName
from entangle.experiments.arms import INTERVENTIONS, PRUNERS, AblationArm, check_settings, plan_arms
from entangle.experiments.interventions import OUTPUT_EDITS
from entangle.experiments.selection import Selection

ROWS = {"a": np.array([0, 2])}
TOP, RANDOM = Selection("top", "wd", None, ROWS), Selection("random", None, 3, ROWS)
SETTINGS: dict[str, Any] = {"strengths": (0.5, 0.9), "edit_strengths": (1.0,), "experts": (1, 4)}


def test_the_names_of_interventions() -> None:
    assert set(INTERVENTIONS) == set(PRUNERS) | set(OUTPUT_EDITS)


def test_experts_and_sparsities_are_for_pruners_only() -> None:
    arms = plan_arms([TOP, RANDOM], ["prune", "zero"], **SETTINGS)
    pruned = [(a.strength, a.experts) for a in arms if a.pruner and a.selection is TOP]
    assert pruned == [(0.5, 1), (0.5, 4), (0.9, 1), (0.9, 4)]
    assert [(a.strength, a.experts) for a in arms if a.pruner is None] == [(1.0, 1)] * 2


def test_an_arm_is_planned_once() -> None:
    twice: dict[str, Any] = {"strengths": (0.5, 0.5), "edit_strengths": (1.0,), "experts": (1, 1)}
    assert len(plan_arms([TOP], ["prune", "prune"], **twice)) == 1


def test_keys_differ_whenever_arms_differ() -> None:
    other = Selection("top", "wd", None, {"a": np.array([0, 3])})
    arms = plan_arms([TOP, RANDOM, other], ["prune", "zero"], **SETTINGS)
    assert len({arm.key for arm in arms}) == len(arms)
    assert AblationArm(TOP, "prune", 0.5).key == AblationArm(TOP, "prune", 0.5).key


def test_labels() -> None:
    assert AblationArm(TOP, "prune", 0.95, 16).label == "prune top wd at 0.95, 16 experts"
    assert AblationArm(RANDOM, "zero", 1.0).label == "zero random (seed 3) at 1"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"interventions": ["prun"]}, UnknownName),
        ({"interventions": []}, InvalidInput),
        ({"strengths": [1.01]}, InvalidInput),
        ({"strengths": [float("nan")]}, InvalidInput),
        ({"edit_strengths": []}, InvalidInput),
        ({"experts": [True]}, InvalidInput),
    ],
)
def test_bad_settings(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_settings(**{"interventions": ["prune"], **SETTINGS, **wrong})
