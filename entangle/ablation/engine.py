"""A sweep that has been asked for: checked, described, and carried out."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from entangle.ablation.arms import PRUNERS, Arm, check_settings, plan_allocated, plan_arms
from entangle.ablation.bench import Bench
from entangle.ablation.checks import allocated_settings, check_alone, check_fit, check_match
from entangle.ablation.folder import ArmFolder
from entangle.ablation.matched import MOST_STEPS, Matched, search_matched, to_match
from entangle.ablation.measures import Arrays, Meter, Protocol
from entangle.ablation.request import Request
from entangle.ablation.runner import ArmRunner
from entangle.ablation.selection import Selection
from entangle.ablation.statistics import layer_statistics
from entangle.ablation.tables import result_tables
from entangle.allocation.allocation import Allocation
from entangle.calibration import CalibrationSet
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.progress import ProgressBar
from entangle.scoring.scores import NeuronScores


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
