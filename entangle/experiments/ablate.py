"""`ablate`: arms × strengths × seeds, each measured on the same texts."""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from entangle.allocation.allocation import Allocation
from entangle.allocation.experts import zeros_digest
from entangle.checks import choices, finite, names, several, share, shares, whole, wholes
from entangle.errors import InvalidInput, NumericalError
from entangle.evaluation import DenseReference, MinimalPairs, as_evaluation
from entangle.evaluation.logits import as_causal_model, check_fits
from entangle.evaluation.perplexity import affix_effect, tell
from entangle.experiments.arms import (
    INTERVENTIONS,
    MOST_STEPS,
    SELECTIONS,
    AblationArm,
    ArmPlan,
    Matched,
    search_matched,
    to_match,
)
from entangle.experiments.experiment import PAIR, WINDOW, Arrays, Evaluation, Experiment, numbered
from entangle.experiments.interventions import (
    LayerStatistics,
    RowEdit,
    edited_outputs,
    layer_statistics,
    mean_outputs,
    swapped_rows,
)
from entangle.experiments.selection import Selection, scores_of, select, silent_layers, union_rows
from entangle.experts.linear import installed
from entangle.experts.routed_rows import Level, RoutedRows, SolvedRows, fit_rows, solve_rows
from entangle.experts.router import ROUTERS
from entangle.memory import check_memory, memory_for
from entangle.models.blocks import evaluating
from entangle.models.layers import (
    DEFAULT_PROJ,
    Layer,
    LayerSpec,
    Projections,
    asked_by_name,
    find_layers,
    layer_specs,
)
from entangle.models.loading import AnyModel, LanguageModel
from entangle.pruning.masks import count_zeros
from entangle.results.ablation import KIND, AblationResult, layer_set, load_ablation
from entangle.results.scores import NeuronScores
from entangle.runs.progress import Progress
from entangle.runs.provenance import RunClock, claimed
from entangle.scoring.columns import is_own
from entangle.seeding import check_seed
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source


def ablate(
    model: AnyModel,
    calibration: Source,
    *,
    evaluation: Source | None = None,
    pairs: MinimalPairs | None = None,
    measures: str | Iterable[str] | None = None,
    scores: NeuronScores | None = None,
    layers: LayerSpec = "all",
    proj: Projections = DEFAULT_PROJ,
    selections: str | Selection | Iterable[str | Selection] = SELECTIONS,
    by: str | Iterable[str] = "wd",
    fraction: float | None = None,
    count: int | None = None,
    scope: str = "layer",
    seeds: int = 5,
    interventions: str | Iterable[str] = ("prune",),
    strengths: float | Iterable[float] = (0.9, 0.95, 0.99),
    allocation: Allocation | None = None,
    edit_strengths: float | Iterable[float] = (1.0,),
    experts: int | Iterable[int] = (1,),
    router: str | Iterable[str] = "kmeans",
    damping: float = 0.01,
    match: bool = False,
    md: bool = True,
    seed: int = 0,
    memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    extra: Callable[[AblationResult, Path], object] | None = None,
    progress: bool | None = None,
) -> AblationResult:
    """Change chosen neurons of a model, and measure what that costs.

    Scores and gram matrices come from one pass over the calibration set; routed experts
    (``experts`` above 1) need a second one for all arms together. Every arm starts from the dense
    weights, and the model is left bit-identical.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a causal language model, or a
        `LanguageModel`.
    calibration
        Text for scores, grams and routers: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings.
    evaluation, pairs
        Another text (from `entangle.load_evaluation`, or what that takes), and minimal pairs, to
        measure every arm on; at least one of them.
    measures
        Of ``perplexity``, ``divergence`` (KL and top-1 agreement with the dense model) and
        ``pairs``; by default perplexity and pairs where there is a text and pairs.
    scores
        Scores of this model made before; by default the chosen layers are scored.
    layers, proj
        Layers whose neurons are changed, as in `entangle.models.layers.find_layers`.
    selections
        ``top``, ``bottom``, ``random``, ``random-norm`` and ``random-variance`` (random, but
        matched to the top selection row for row), ``all``, or a `Selection` of your own.
    by
        Columns that ``top`` and ``bottom`` rank, as in `select`; matched controls resemble the top
        selection of the first one.
    fraction, count, scope
        How many neurons, as in `select`; 3 % of each layer by default.
    seeds
        Number of draws of every random selection.
    interventions
        ``prune`` (SparseGPT), ``prune-wanda``, ``prune-magnitude``, ``prune-random``: each selected
        row to an exact number of zeros. ``zero``, ``mean``, ``clamp-negative``, ``clamp-positive``,
        ``flip-negative``: edits of the selected neurons' outputs.
    strengths
        Sparsities of pruned rows, in [0, 1].
    allocation
        In place of ``selections`` and ``strengths``: all rows of its layers, which must be the
        chosen ones, are pruned to its zeros (selection ``allocation``, ``by`` its rule), and to the
        same number of zeros spread evenly (selection ``all``); ``strength`` is its overall
        sparsity.
    edit_strengths
        Shares in [0, 1] of an edit that are mixed into the outputs.
    experts
        Numbers of experts that hold pruned rows, as in `fit_rows`; 1 is plain pruning.
    router
        ``kmeans``, the control ``random``, whose clusters mean nothing, or both.
    damping
        As in `entangle.pruning.prune`.
    match
        Also search, for each intervention and strength without experts, the share of neurons with
        the lowest values of the first ``by`` that costs as much perplexity as the top ones; the
        share that comes closest is an arm too (selection ``matched``).
    md
        Whether to compute mapping difficulty.
    seed
        Seed of everything random.
    memory
        Bytes for hidden states and recorded inputs; half of what is free on the model's device by
        default.
    out
        Folder of the result. Arms are kept beside it as they finish.
    resume
        Skip the arms that an unfinished run of the same settings has finished; if all is finished,
        return the result.
    force
        Replace an existing result, or an unfinished run.
    extra
        Called with the result and its folder, before that takes the name ``out``, to add files,
        such as figures.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If a setting is out of range or does not fit the model, or scores are of another model.
    NumericalError
        If a pruned row holds another number of zeros than its arm's strength means for rows of its
        width, activations are not finite, or a gram cannot be factorised.

    References
    ----------
    arXiv 2405.15756, figures 3 and 5; arXiv 2509.24198 (edits of outputs).
    """
    clock = RunClock()
    with ExitStack() as held:
        held.enter_context(claimed(out))
        seed, layers = check_seed(seed), layer_specs(layers)
        check_memory(memory)
        dense = as_causal_model(model)
        held.enter_context(evaluating(dense.module))
        chosen = find_layers(dense.module, layers, proj)
        named = asked_by_name(layers, chosen)
        if scores is not None and not named:
            silent = silent_layers(scores)
            chosen = tuple(layer for layer in chosen if layer.name not in silent)
        text = None if evaluation is None else as_evaluation(evaluation, dense)
        size = 0.03 if fraction is None and count is None else fraction
        plan = ArmPlan(
            wanted=several("selections", selections, Selection),
            columns=names("by", by),
            fraction=None if size is None else share("fraction", size, zero=False),
            count=None if count is None else whole("count", count, least=1),
            scope=scope,
            seeds=whole("seeds", seeds, least=1),
            seed=seed,
            interventions=choices(
                "interventions", interventions, INTERVENTIONS, kind="intervention"
            ),
            strengths=shares("strengths", strengths),
            edit_strengths=shares("edit_strengths", edit_strengths),
            experts=wholes("experts", experts, least=1),
            routers=choices("router", router, ROUTERS),
            allocation=allocation,
            match=match,
        )
        experiment = Ablation(
            dense, as_calibration(calibration, dense), Evaluation.of(text, pairs, measures),
            layers=chosen, plan=plan, damping=finite("damping", damping, least=0), md=md,
            scores=None if scores is None else scores_of(scores, chosen, dense), named=named,
            seed=seed, memory=memory_for(memory, dense.module),
        )  # fmt: skip
        experiment.check()
        found: AblationResult = experiment.run(
            clock, out, resume=resume, force=force, extra=extra, progress=progress
        )
        return found


class Ablation(Experiment[AblationArm]):
    """Neurons that are changed, with everything solved that the arms need.

    Parameters
    ----------
    model, calibration, evaluation, seed, memory
        As in `Experiment`.
    layers
        Those whose neurons are changed.
    plan
        Which arms there are.
    scores
        Of these layers, made before.
    damping, md
        As in `ablate`.
    named
        Whether the layers were asked for by name. If not, those that see no token are left out.
    """

    kind, ending = KIND, "ablating"
    result, load = AblationResult, staticmethod(load_ablation)

    def __init__(
        self,
        model: LanguageModel,
        calibration: CalibrationSet,
        evaluation: Evaluation,
        *,
        layers: Sequence[Layer],
        plan: ArmPlan,
        scores: NeuronScores | None = None,
        damping: float = 0.01,
        md: bool = True,
        named: bool = True,
        seed: int = 0,
        memory: int,
    ) -> None:
        super().__init__(model, calibration, evaluation, seed=seed, memory=memory)
        self.layers = {layer.name: layer for layer in layers}
        self.plan, self._scores, self._named = plan, scores, named
        self._damping, self._md = damping, md
        self._reference: DenseReference | None = None
        self._matched = Matched(pd.DataFrame({"intervention": []}), (), ())
        self._known: LayerStatistics
        self._solved: dict[tuple[str, Level], dict[str, SolvedRows]] = {}
        self._routed: dict[tuple[str, str], RoutedRows] = {}

    def check(self) -> None:
        """Refuse what can be seen to fail before any model runs.

        Raises
        ------
        UnknownName, InvalidInput
            As `ablate`.
        """
        table, plan = None if self._scores is None else self._scores.frame, self.plan
        plan.check(list(self.layers.values()), self.evaluation, md=self._md, scores=table)
        self._check_fit(max(plan.experts))
        if plan.allocation is not None:
            plan.allocation.check(list(self.layers.values()), self.model.digest)
        plan.arms(table)

    def _check_fit(self, experts: int) -> None:
        """Check that texts and numbers of experts fit the model and one another."""
        as_calibration(self.calibration, self.model)
        if self.evaluation.text is not None:
            check_fits(self.model, self.evaluation.text)
        if self.evaluation.pairs is not None and self.model.tokenizer is None:
            raise InvalidInput("minimal pairs need a tokenizer; load the model with its own.")
        if experts > self.calibration.n_tokens:
            raise InvalidInput(
                "`experts` must be at most the number of calibration tokens, "
                f"{self.calibration.n_tokens}; got {experts}: give more text or fewer experts."
            )
        outside = [name for name, layer in self.layers.items() if layer.block is None]
        if "divergence" in self.evaluation.measures and outside:
            raise InvalidInput(
                f"divergence must be measured with layers inside the blocks only; got "
                f"{outside[0]!r}, which the dense model's own logits pass too: leave it out, or "
                "measure perplexity."
            )
        if experts > 1 and outside:
            raise InvalidInput(
                f"several experts must hold rows of layers inside the blocks; got {outside[0]!r}: "
                "leave it out, or take 1 expert."
            )

    def settings(self) -> dict[str, object]:
        """Return what a manifest records, JSON-serialisable."""
        settings: dict[str, object] = {
            "layers": list(self.layers),
            **self.plan.describe(),
            "damping": self._damping,
            "match": self.plan.match,
            "md": self._md,
            "seed": self.seed,
        }
        if self._scores is not None:
            known_by = ("calibration", "settings")
            settings["scores"] = {name: self._scores.manifest.get(name) for name in known_by}
        one = self.plan.allocation
        if one is not None:
            zeros = {"zeros_sha256": zeros_digest(one), "overall": one.overall}
            settings["allocation"] = dict(one.manifest) | zeros
        return settings

    def prepare(self, held: ExitStack, *, progress: bool | None) -> list[AblationArm]:
        """Measure the dense model, calibrate, and solve the rows of all arms.

        The dense model is measured first, so that a text or pairs that it cannot be measured on
        are refused before the calibration. Routers are fitted where there are several experts.
        """
        text, divergence = self.evaluation.text, "divergence" in self.evaluation.measures
        shared = divergence and self.plan.prunes and max(self.plan.experts) > 1
        memory = self.memory // 2 if shared else self.memory
        if text is not None and progress is not False:
            tell(affix_effect(self.model, text.rows.sequence(0), text.settings))
        if text is not None and divergence:
            self._reference = held.enter_context(
                DenseReference(self.model, text, memory=memory, progress=progress)
            )
        self.dense = self.evaluation.measure(self.model, self._reference, progress=progress)
        self._known = known = layer_statistics(
            self.model, self.calibration, list(self.layers.values()), scores=self._scores,
            grams=self.plan.prunes and (1 in self.plan.experts or self.plan.match),
            md=self._md, seed=self.seed, progress=progress, named=self._named,
            columns=[name for name in self.plan.columns if is_own(name)],
        )  # fmt: skip
        self.layers = {n: one for n, one in self.layers.items() if n in known.scores.histograms}
        arms = self.plan.arms(known.scores.frame) or []
        for pruner in dict.fromkeys(arm.pruner for arm in arms if arm.pruner):
            self._solve(pruner, [a for a in arms if a.pruner == pruner and a.experts == 1])
        routed = [(arm, (arm.pruner, arm.router)) for arm in arms if arm.pruner and arm.experts > 1]
        for pruner, router in dict.fromkeys(key for _, key in routed):
            own = [arm for arm, key in routed if key == (pruner, router)]
            self._routed[str(pruner), router] = fit_rows(
                self.model, self.calibration, union_rows(arm.selection.rows for arm in own),
                sparsities=sorted({arm.strength for arm in own}),
                experts=[1, *dict.fromkeys(arm.experts for arm in own)],
                pruner=str(pruner), router=router, damping=self._damping,
                seed=self.seed, memory=memory, md=self._md, progress=progress,
            )  # fmt: skip
        return arms

    def steps(self, arms: Sequence[AblationArm]) -> int:
        """Return how many measurements the search for matched controls counts."""
        return len(to_match(arms, self.plan.columns[0])) * MOST_STEPS if self.plan.match else 0

    def search(self, arms: Sequence[AblationArm], found: Sequence[Arrays], bar: Progress) -> None:
        """Search for matched controls, if they are asked for."""
        if self.plan.match:
            self._matched = search_matched(self, arms, found, by=self.plan.columns[0], bar=bar)

    def _solve(self, pruner: str, arms: Sequence[AblationArm]) -> None:
        strengths = sorted({arm.strength for arm in arms if arm.allocation is None})
        allocations = dict.fromkeys(arm.allocation for arm in arms if arm.allocation is not None)
        levels: list[Level] = [*strengths, *allocations]
        if not levels:
            return
        solved = solve_rows(
            list(self.layers.values()), union_rows(arm.selection.rows for arm in arms),
            self._known.grams, sparsities=levels, pruner=pruner, damping=self._damping,
            seed=self.seed,
        )  # fmt: skip
        self._solved |= {(pruner, level): solved for level in levels}

    def measure(self, arm: AblationArm) -> Arrays:
        """Change the model as an arm says, measure it, and restore it."""
        with self.applied(arm):
            return self.evaluation.measure(self.model, self._reference)

    def applied(self, arm: AblationArm) -> AbstractContextManager[object]:
        """Return a context in which the model is changed as the arm says, and restored after."""
        rows = arm.selection.rows
        if arm.pruner is None:
            layers = [self.layers[name] for name in rows]
            return edited_outputs(
                layers, arm.selection, arm.intervention, strength=arm.strength, means=self._means
            )
        if arm.experts > 1:
            routed = self._routed[arm.pruner, arm.router]
            made = routed.modules(self.model, rows, arm.experts, arm.strength)
            return installed(self.model.module, made)
        solved = self._solved[arm.pruner, arm.level]
        edits = [
            RowEdit(
                self.layers[name],
                torch.from_numpy(chosen.copy()),
                solved[name].take(chosen, arm.level)[0],
            )
            for name, chosen in rows.items()
        ]
        return swapped_rows(edits)

    @cached_property
    def _means(self) -> dict[str, torch.Tensor]:
        return mean_outputs(self._known.scores)

    def realised(self, arm: AblationArm) -> NDArray[np.float64]:
        """Return the share of zeros of every selected row; empty where outputs are edited."""
        if arm.pruner is None:
            return np.zeros(0)
        if arm.experts > 1:
            table = self._routed[arm.pruner, arm.router].neurons
            own = table[(table["experts"] == arm.experts) & (table["sparsity"] == arm.strength)]
            index = own.set_index(["layer", "neuron"])["realised_sparsity"]
            wanted = pd.MultiIndex.from_frame(arm.selection.frame[["layer", "neuron"]])
            return np.asarray(index.reindex(wanted), dtype=np.float64)
        solved, rows = self._solved[arm.pruner, arm.level], arm.selection.rows.items()
        parts = [solved[layer].take(own, arm.level)[1] for layer, own in rows]
        return np.concatenate([part.double().numpy() for part in parts])

    def planned(self, arm: AblationArm) -> NDArray[np.float64]:
        """Return the share of zeros that every selected row is to have, to whole weights.

        In the order of `realised`; empty where outputs are edited.
        """
        shares = [np.zeros(0)]
        for name, own in arm.selection.rows.items() if arm.pruner else ():
            width = self.layers[name].in_features
            if arm.allocation is None:
                share = torch.full((len(own),), arm.strength, dtype=torch.float64)
                zeros = count_zeros(share, width)
            else:
                zeros = arm.allocation.zeros[name][torch.tensor(own)]
            shares.append(zeros.double().numpy() / width)
        return np.concatenate(shares)

    def nested(self, arm: AblationArm) -> None:
        """Solve all rows for the pruner and strength of an arm, so that any part can be pruned."""
        if arm.pruner is not None:
            whole = select(self._known.scores.frame, "all")
            self._solve(arm.pruner, [AblationArm(whole, arm.intervention, arm.strength)])

    def bottom(self, arm: AblationArm, *, by: str, fraction: float) -> AblationArm:
        """Return the same intervention on a share of the scored neurons, lowest in ``by`` first."""
        frame = self._known.scores.frame
        frame = frame[frame["flag"] == ""]
        lowest = select(frame, "bottom", by=by, fraction=fraction)
        return AblationArm(lowest, arm.intervention, arm.strength)

    @property
    def n_neurons(self) -> int:
        """Neurons of all layers."""
        return len(self._known.scores.frame)

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

    def tables(self, arms: Sequence[AblationArm], found: Sequence[Arrays]) -> dict[str, Any]:
        """Return the fields of an `AblationResult`."""
        matched, picked = self._matched, dict.fromkeys(arm.selection for arm in arms)
        every = zip([*arms, *matched.arms], [*found, *matched.found], strict=True)
        rows, windows, pairs = [], [], []
        for arm, arrays in [(None, self.dense), *every]:
            zeros = np.zeros(0) if arm is None else self.realised(arm)
            if arm is not None:
                check_sparsity(arm, zeros, self.planned(arm))
            chosen = {} if arm is None else arm.selection.rows
            where = {
                "model": self.model.name,
                "layers": f"{len(chosen)} layer{'s' * (len(chosen) > 1)}" if chosen else "none",
                "layer_set": layer_set(chosen),
            }
            extra = {
                "n_rows": 0 if arm is None else arm.selection.n_rows,
                "realised_sparsity": zeros.mean() if len(zeros) else np.nan,
                "realised_low": zeros.min() if len(zeros) else np.nan,
                "realised_high": zeros.max() if len(zeros) else np.nan,
            }
            key = DENSE if arm is None else arm.columns
            measured = self.evaluation.rows(arrays, self.dense, seed=self.seed)
            rows += [{**where, **key, **row, **extra} for row in measured]
            windows.append(numbered("window", key, arrays, WINDOW))
            pair = numbered("pair", key, arrays, PAIR)
            if pair is not None and self.evaluation.pairs is not None:
                pairs.append(pair.assign(paradigm=list(self.evaluation.pairs.paradigms)))
        chosen_rows = [
            one.frame.assign(selection=one.rule, by=one.by or "", seed=one.seed) for one in picked
        ]
        return {
            "frame": _typed(pd.DataFrame(rows)),
            "windows": _joined(windows, "window"),
            "pairs": _joined(pairs, "pair"),
            "selections": _typed(pd.concat(chosen_rows, ignore_index=True)),
            "neurons": self.neurons,
            "matched": matched.steps,
            "scores": self._known.scores,
        }


DENSE = {"selection": "dense", "by": "", "seed": None, "intervention": "dense", "strength": 0.0,
         "experts": 1, "router": ""}  # fmt: skip
_TOLERANCE = 1e-6  # of a share of zeros, a float32: less than one weight of any row


def check_sparsity(
    arm: AblationArm, zeros: NDArray[np.float64], wanted: NDArray[np.float64]
) -> None:
    """Raise `NumericalError` unless every row of an arm holds the zeros planned for its width.

    A strength is a share of a row's weights, rounded to whole ones. So arms of one strength are
    equally sparse wherever their rows are equally wide, and differ by that rounding elsewhere.
    """
    if zeros.shape != wanted.shape:
        raise NumericalError(f"{arm.label} must have {len(wanted)} pruned rows; got {len(zeros)}.")
    wrong = np.flatnonzero(~(np.abs(zeros - wanted) <= _TOLERANCE))
    if len(wrong):
        layer, row = arm.selection.frame.iloc[wrong[0]]
        raise NumericalError(
            f"row {row} of layer {layer!r} must hold a share of {wanted[wrong[0]]:.6f} zeros "
            f"in the arm {arm.label}; got {zeros[wrong[0]]:.6f} ({len(wrong)} such rows)."
        )


def _joined(tables: Sequence[pd.DataFrame | None], name: str) -> pd.DataFrame:
    known = [_typed(table) for table in tables if table is not None]
    if not known:
        return pd.DataFrame({name: pd.Series(dtype="int64")})
    return _typed(pd.concat(known, ignore_index=True))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Store seeds as integers that may be missing."""
    return table.astype({"seed": "Int64"})
