"""The perplexity-matched control: how many unremarkable neurons cost as much as the top ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.experiments.arms import AblationArm
from entangle.experiments.experiment import Arrays
from entangle.runs.progress import Progress

if TYPE_CHECKING:
    from entangle.experiments.ablate import Ablation

STEPS = 6
MOST_STEPS = STEPS + 1
"""Evaluations of one search, at most."""
COLUMNS = ["intervention", "strength", "by", "fraction", "loss", "target", "matched", "low", "high"]


class _Step(NamedTuple):
    """An evaluation of a search."""

    arm: AblationArm
    found: Arrays
    loss: float


@dataclass(frozen=True, eq=False)
class Matched:
    """What the searches for matched controls found."""

    steps: pd.DataFrame
    """One row an evaluation; see `search_matched`."""
    arms: tuple[AblationArm, ...]
    """Of every search that reached the target, the arm that came closest; rule ``matched``."""
    found: tuple[Arrays, ...]
    """Their raw numbers."""


def to_match(arms: Sequence[AblationArm], by: str) -> list[int]:
    """Return the places of the arms that are matched: top neurons by a column, one expert."""
    chosen = [(arm.selection.rule, arm.selection.by, arm.experts) for arm in arms]
    return [place for place, one in enumerate(chosen) if one == ("top", by, 1)]


def search_matched(
    experiment: "Ablation",
    arms: Sequence[AblationArm],
    results: Sequence[Arrays],
    *,
    by: str,
    bar: Progress,
    steps: int = STEPS,
) -> Matched:
    """Find the share of neurons, lowest in ``by`` first, that costs as much as the top selection.

    Parameters
    ----------
    experiment
        Measures arms, or reads those that are kept. The rows of a step are solved with all others
        of their layers, which random pruning depends on, and it is kept by itself.
    arms, results
        Arms that were measured and their raw numbers; those of `to_match` are matched.
    by
        Column that is ranked.
    bar
        Counts `MOST_STEPS` a search.
    steps
        Evaluations for each, the first of them with all neurons; one more where all of them cost
        as much as the top ones.

    Returns
    -------
    Matched
        ``steps`` has one row an evaluation: ``fraction`` of each layer's neurons and the mean
        ``loss`` (nats a window) that it gave, next to the ``target``; ``matched`` is the fraction
        at which the loss reaches the target, interpolated in the logarithm of the fraction between
        ``low`` and ``high``, which bracket it. NaN where all neurons together cost less than the
        top ones, and where as many neurons as the top ones cost no less than these (``low`` is 0
        then).

    References
    ----------
    arXiv 2509.24198: 35 to 50 % of the neurons with a low WD cost as much as 2 % with a high one.
    """
    rows: list[tuple[object, ...]] = []
    closest: list[_Step] = []
    for place in to_match(arms, by):
        arm, target = arms[place], mean_loss(results[place]["loss"])
        experiment.nested(arm)
        seen: list[_Step] = []
        tried: list[tuple[float, float]] = []

        def loss(fraction: float, arm: AblationArm = arm, seen: list[_Step] = seen) -> float:
            nested = experiment.bottom(arm, by=by, fraction=fraction)
            found = experiment.measured(nested, bar, key=f"step-{nested.key}")
            seen.append(_Step(nested, found, mean_loss(found["loss"])))
            return seen[-1].loss

        share = arm.selection.n_rows / experiment.n_neurons
        matched, low, high = bisect_fraction(loss, target, low=share, steps=steps, tried=tried)
        bar.advance(steps + 1 - len(tried))
        rows += [
            (arm.intervention, arm.strength, by, fraction, value, target, matched, low, high)
            for fraction, value in tried
        ]
        if math.isfinite(matched) and math.isfinite(target):
            gaps = [abs(one.loss - target) for one in seen]
            closest.append(seen[int(np.argmin(gaps))])
    return Matched(
        pd.DataFrame(rows, columns=COLUMNS),
        tuple(_named(one.arm) for one in closest),
        tuple(one.found for one in closest),
    )


def _named(arm: AblationArm) -> AblationArm:
    return replace(arm, selection=replace(arm.selection, rule="matched"))


def bisect_fraction(
    loss: Callable[[float], float],
    target: float,
    *,
    low: float,
    steps: int,
    tried: list[tuple[float, float]],
) -> tuple[float, float, float]:
    """Return where a rising loss reaches ``target`` on [low, 1], and the bracket around it.

    The bracket is halved on a log scale. ``tried`` takes every (fraction, loss) in order. All is
    NaN if the loss at 1 stays below the target. Where no loss below the target was seen, that at
    ``low`` is measured too; if it reaches the target, the answer is NaN and the bracket (0, low).
    """
    top, bottom = (1.0, loss(1.0)), (low, -math.inf)
    tried.append(top)
    if not top[1] >= target:
        return math.nan, math.nan, math.nan
    for _ in range(steps - 1):
        middle = math.sqrt(bottom[0] * top[0])
        tried.append((middle, loss(middle)))
        if tried[-1][1] >= target:
            top = tried[-1]
        else:
            bottom = tried[-1]
    if bottom[1] == -math.inf and low < 1.0:
        bottom = low, loss(low)
        tried.append(bottom)
        if bottom[1] >= target:
            return math.nan, 0.0, low
    share = 0.5
    if math.isfinite(bottom[1]) and math.isfinite(top[1]) and top[1] > bottom[1]:
        share = (target - bottom[1]) / (top[1] - bottom[1])
    found = bottom[0] * (top[0] / bottom[0]) ** share
    return min(max(found, bottom[0]), top[0]), bottom[0], top[0]


def mean_loss(losses: NDArray[np.float64]) -> float:
    """Return the mean loss of a window in nats; infinite where a loss is not finite."""
    return float(losses.mean()) if np.isfinite(losses).all() else math.inf
