"""A sweep that has been asked for: checked, described, and carried out.

The dense model with everything solved that the arms of a sweep need.

Arms measured one after the other, each kept as it finishes.

The perplexity-matched control: how many unremarkable neurons cost as much as the top ones.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from entangle.allocation.allocation import Allocation
from entangle.experiments.arms import (
    PRUNERS,
    Arm,
    check_settings,
    plan_allocated,
    plan_arms,
    realised_sparsity,
    result_tables,
)
from entangle.experiments.interventions import RowEdit, edited_outputs, mean_outputs, swapped_rows
from entangle.experiments.measures import Arrays, LayerStatistics, Meter, Protocol, layer_statistics
from entangle.experiments.request import (
    ArmFolder,
    Request,
    allocated_settings,
    check_alone,
    check_fit,
    check_match,
)
from entangle.experiments.selection import Selection, select
from entangle.experts.linear import installed
from entangle.experts.routed_rows import Level, RoutedRows, SolvedRows, fit_rows, solve_rows
from entangle.experts.router import Kind
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.pruning.masks import count_zeros
from entangle.results.scores import NeuronScores
from entangle.runs.progress import Progress, ProgressBar
from entangle.texts.calibration_set import CalibrationSet

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


class ArmRunner:
    """Applies arms, measures them, and reads those that are finished.

    Parameters
    ----------
    bench, meter
        Apply and measure arms.
    folder
        Where finished ones are kept; None keeps none.
    bar
        Counts every arm.
    """

    def __init__(
        self, bench: "Bench", meter: Meter, folder: ArmFolder | None, bar: Progress
    ) -> None:
        self.bench = bench
        """Of these arms."""
        self._meter, self._folder, self._bar = meter, folder, bar

    def run(self, arm: Arm, *, step: bool = False) -> Arrays:
        """Return the raw numbers of an arm, measured unless they are kept.

        Parameters
        ----------
        arm
            What to measure.
        step
            Whether it is a step of a search: its rows are solved with all others of their layers,
            which random pruning depends on, and it is kept by itself.
        """
        key = f"step-{arm.key}" if step else arm.key
        found: Arrays | None = None
        if self._folder is not None:
            found = self._folder.read(key, self._meter.dense)
        if found is None:
            with self.bench.applied(arm):
                measured = self._meter.measure()
            if self._folder is not None:
                self._folder.write(key, measured)
            found = measured
        self._bar.advance()
        return found

    def skip(self, count: int) -> None:
        """Count arms that turned out not to be needed."""
        self._bar.advance(count)


STEPS = 6
MOST_STEPS = STEPS + 1
"""Evaluations of one search, at most."""
COLUMNS = ["intervention", "strength", "by", "fraction", "loss", "target", "matched", "low", "high"]


class _Step(NamedTuple):
    """An evaluation of a search."""

    arm: Arm
    found: Arrays
    loss: float


@dataclass(frozen=True, eq=False)
class Matched:
    """What the searches for matched controls found."""

    steps: pd.DataFrame
    """One row an evaluation; see `search_matched`."""
    arms: tuple[Arm, ...]
    """Of every search that reached the target, the arm that came closest; rule ``matched``."""
    found: tuple[Arrays, ...]
    """Their raw numbers."""


def to_match(arms: Sequence[Arm], by: str) -> list[int]:
    """Return the places of the arms that are matched: top neurons by a column, one expert."""
    chosen = [(arm.selection.rule, arm.selection.by, arm.experts) for arm in arms]
    return [place for place, one in enumerate(chosen) if one == ("top", by, 1)]


def search_matched(
    runner: ArmRunner,
    arms: Sequence[Arm],
    results: Sequence[Arrays],
    *,
    by: str,
    steps: int = STEPS,
) -> Matched:
    """Find the share of neurons, lowest in ``by`` first, that costs as much as the top selection.

    Parameters
    ----------
    runner
        Measures arms, or reads those that are kept; counts `MOST_STEPS` a search.
    arms, results
        Arms that were measured and their raw numbers; those of `to_match` are matched.
    by
        Column that is ranked.
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
        runner.bench.nested(arm)
        seen: list[_Step] = []
        tried: list[tuple[float, float]] = []

        def loss(fraction: float, arm: Arm = arm, seen: list[_Step] = seen) -> float:
            nested = runner.bench.bottom(arm, by=by, fraction=fraction)
            found = runner.run(nested, step=True)
            seen.append(_Step(nested, found, mean_loss(found["loss"])))
            return seen[-1].loss

        share = arm.selection.n_rows / runner.bench.n_neurons
        matched, low, high = bisect_fraction(loss, target, low=share, steps=steps, tried=tried)
        runner.skip(steps + 1 - len(tried))
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


def _named(arm: Arm) -> Arm:
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

    def at(fraction: float) -> float:
        tried.append((fraction, loss(fraction)))
        return tried[-1][1]

    top, bottom = (1.0, at(1.0)), (low, -math.inf)
    if not top[1] >= target:
        return math.nan, math.nan, math.nan
    for _ in range(steps - 1):
        middle = math.sqrt(bottom[0] * top[0])
        value = at(middle)
        if value >= target:
            top = middle, value
        else:
            bottom = middle, value
    if bottom[1] == -math.inf and low < 1.0:
        bottom = low, at(low)
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


@dataclass(frozen=True, eq=False)
class Sweep:
    """What is to be done; the fields are explained at `entangle.ablate`."""

    model: LanguageModel
    layers: Sequence[Layer]
    calibration: CalibrationSet
    protocol: Protocol
    request: Request
    interventions: Sequence[str]
    strengths: Sequence[float]
    edit_strengths: Sequence[float]
    experts: Sequence[int]
    routers: Sequence[str]
    allocation: Allocation | None
    scores: NeuronScores | None
    damping: float
    match: bool
    md: bool
    seed: int
    memory: int
    named: bool = True
    """Whether the layers were asked for by name. If not, those that see no token are left out."""

    def check(self) -> None:
        """Refuse what can be seen to fail before any model runs.

        Raises
        ------
        UnknownName, InvalidInput
            As `entangle.ablate`.
        """
        check_settings(self.interventions, **self._levels)
        table = None if self.scores is None else self.scores.frame
        self.request.check(self.layers, md=self.md, scores=table)
        if self.match:
            check_match(self.protocol, self.request, self.interventions, self.experts)
        check_fit(
            self.model, self.layers, self.calibration, self.protocol,
            experts=self.experts, damping=self.damping,
        )  # fmt: skip
        if self.allocation is not None:
            check_alone(self.request.wanted, match=self.match)
            self.allocation.check(self.layers, self.model.digest)
        _ = self._planned

    def settings(self) -> dict[str, object]:
        """Return what a manifest records, JSON-serialisable."""
        settings: dict[str, object] = {
            "layers": [layer.name for layer in self.layers],
            **self.request.describe(),
            "interventions": list(self.interventions),
            **{name: list(values) for name, values in self._levels.items() if name != "routers"},
            "router": self.routers[0] if len(self.routers) == 1 else list(self.routers),
            "damping": self.damping,
            "match": self.match,
            "md": self.md,
            "seed": self.seed,
        }
        if self.scores is not None:
            known_by = ("calibration", "settings")
            settings["scores"] = {name: self.scores.manifest.get(name) for name in known_by}
        if self.allocation is not None:
            settings |= allocated_settings(self.allocation)
        return settings

    def run(self, folder: ArmFolder | None, *, progress: bool | None) -> dict[str, Any]:
        """Calibrate, measure every arm, and return the fields of an `AblationResult`.

        The dense model is measured first, so that a text or pairs that it cannot be measured on
        are refused before the calibration.
        """
        routed = self._prunes and max(self.experts) > 1
        shared = routed and "divergence" in self.protocol.measures
        memory = self.memory // 2 if shared else self.memory
        with ExitStack() as stack:
            meter = stack.enter_context(
                closing(Meter(self.model, self.protocol, memory=memory, progress=progress))
            )
            known = layer_statistics(
                self.model, self.calibration, self.layers, scores=self.scores, md=self.md,
                seed=self.seed, progress=progress,
                grams=self._prunes and (1 in self.experts or self.match), named=self.named,
            )  # fmt: skip
            heard = [one for one in self.layers if one.name in known.scores.histograms]
            arms = self._planned or self._arms(self.request.selections(known.scores.frame))
            bench = Bench(
                self.model, heard, known, self.calibration, arms,
                damping=self.damping, seed=self.seed,
            )  # fmt: skip
            bench.fit(memory=memory, md=self.md, progress=progress)
            found, matched = self._measure(bench, arms, meter, folder, progress)
        measured = [*arms, *matched.arms]
        tables = result_tables(
            self.model.name, measured, [*found, *matched.found], meter.dense, self.protocol,
            list(dict.fromkeys(arm.selection for arm in arms)),
            realised={id(arm): bench.realised(arm) for arm in measured},
            planned={id(arm): bench.planned(arm) for arm in measured}, seed=self.seed,
        )  # fmt: skip
        return tables | {
            "neurons": bench.neurons, "matched": matched.steps, "scores": known.scores,
        }  # fmt: skip

    def _measure(
        self,
        bench: Bench,
        arms: Sequence[Arm],
        meter: Meter,
        folder: ArmFolder | None,
        progress: bool | None,
    ) -> tuple[list[Arrays], Matched]:
        """Measure every arm that is not finished yet, and search for matched controls."""
        by = self.request.columns[0]
        searches = len(to_match(arms, by)) if self.match else 0
        with ProgressBar("ablating", enabled=progress) as bar:
            bar.start(len(arms) + searches * MOST_STEPS, "arms")
            runner = ArmRunner(bench, meter, folder, bar)
            results = [runner.run(arm) for arm in arms]
            if not self.match:
                return results, Matched(pd.DataFrame({"intervention": []}), (), ())
            return results, search_matched(runner, arms, results, by=by)

    @cached_property
    def _planned(self) -> list[Arm] | None:
        """The arms, if they are known before anything runs."""
        if self.allocation is not None:
            return plan_allocated(self.allocation, self.interventions, experts=self.experts)
        if self.scores is not None:
            return self._arms(self.request.selections(self.scores.frame))
        return None

    def _arms(self, selections: Sequence[Selection]) -> list[Arm]:
        return plan_arms(selections, self.interventions, **self._levels)

    @property
    def _levels(self) -> dict[str, Any]:
        return {
            "strengths": self.strengths, "edit_strengths": self.edit_strengths,
            "experts": self.experts, "routers": self.routers,
        }  # fmt: skip

    @property
    def _prunes(self) -> bool:
        return bool(PRUNERS.keys() & set(self.interventions))
