"""`ablate`: arms × strengths × seeds, each measured on the same texts."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from entangle.ablation.arms import PRUNERS, Arm, check_settings, plan_arms
from entangle.ablation.folder import ArmFolder
from entangle.ablation.interventions import RowEdit, edited_outputs, mean_outputs, swapped_rows
from entangle.ablation.matched import search_matched
from entangle.ablation.measures import Meter, Protocol
from entangle.ablation.result import KIND, AblationResult
from entangle.ablation.routed import fit_rows
from entangle.ablation.routed_rows import RoutedRows
from entangle.ablation.row_experts import installed
from entangle.ablation.selection import MATCHED, Selection, check_scores_fit, select
from entangle.ablation.solved import SolvedRows, solve_rows
from entangle.ablation.statistics import LayerStatistics, layer_statistics
from entangle.ablation.tables import realised_sparsity, result_tables
from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput, unknown_name
from entangle.evaluation import EvaluationText, MinimalPairs
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.progress import ProgressBar
from entangle.provenance import RunClock, make_manifest
from entangle.routing.router import Kind
from entangle.scoring.scores import NeuronScores
from entangle.seeding import check_seed

DEFAULT_MEMORY = 2 * 2**30
SELECT = ("top", "bottom", "random")
Rows = Mapping[str, NDArray[np.int64]]


def ablate(
    model: LanguageModel | nn.Module | str,
    calibration: CalibrationSet,
    *,
    evaluation: EvaluationText | None = None,
    pairs: MinimalPairs | None = None,
    measures: Sequence[str] | None = None,
    scores: NeuronScores | None = None,
    layers: int | str | Sequence[int | str] = "all",
    proj: str | None = "mlp",
    selections: Sequence[str | Selection] = SELECT,
    by: str | Sequence[str] = "wd",
    fraction: float | None = None,
    count: int | None = None,
    scope: str = "layer",
    seeds: int = 5,
    interventions: Sequence[str] = ("prune",),
    strengths: Sequence[float] = (0.9, 0.95, 0.99),
    edit_strengths: Sequence[float] = (1.0,),
    experts: Sequence[int] = (1,),
    router: Kind = "kmeans",
    damping: float = 0.01,
    match: bool = False,
    md: bool = True,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool | None = None,
) -> AblationResult:
    """Change chosen neurons of a model, and measure what that costs.

    Scores and gram matrices come from one pass over the calibration set; routed experts
    (``experts`` above 1) need a second one for all arms together. Every arm starts from the dense
    weights, and the model is left bit-identical.

    Parameters
    ----------
    model
        A model from `entangle.load_model`, its name, or a causal language model.
    calibration
        Text for scores, grams and routers.
    evaluation, pairs
        Another text, and minimal pairs, to measure every arm on; at least one of them.
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
    edit_strengths
        Shares in [0, 1] of an edit that are mixed into the outputs.
    experts
        Numbers of experts that hold pruned rows, as in `fit_rows`; 1 is plain pruning.
    router
        ``kmeans``, or the control ``random``, whose clusters mean nothing.
    damping
        As in `entangle.pruning.prune`.
    match
        Also search, for each intervention and strength without experts, the share of neurons with
        the lowest values of the first ``by`` that costs as much perplexity as the top ones.
    md
        Whether to compute mapping difficulty.
    seed
        Seed of everything random.
    memory
        Bytes for hidden states and recorded inputs.
    out
        Folder of the result. Arms are kept beside it as they finish.
    resume
        Skip the arms that an unfinished run of the same settings has finished.
    force
        Replace an existing result, or an unfinished run.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If a setting is out of range or does not fit the model, or scores are of another model.
    NumericalError
        If arms that are compared differ in their realised sparsity, activations are not finite, or
        a gram cannot be factorised.

    References
    ----------
    arXiv 2405.15756, figures 3 and 5; arXiv 2509.24198 (edits of outputs).
    """
    clock = RunClock()
    check_seed(seed)
    dense = as_language_model(model)
    chosen = find_layers(dense.module, layers, proj)
    protocol = Protocol.of(evaluation, pairs, measures)
    columns = [by] if isinstance(by, str) else list(by)
    request = _Request(
        selections, columns, 0.03 if fraction is None and count is None else fraction, count,
        scope, seeds, seed,
    )  # fmt: skip
    request.check()
    check_settings(
        interventions, strengths=strengths, edit_strengths=edit_strengths, experts=experts
    )
    if match and evaluation is None:
        raise InvalidInput("`match` compares perplexities; give `evaluation`.")
    settings = {
        "layers": [layer.name for layer in chosen],
        **request.describe(),
        "interventions": list(interventions),
        "strengths": list(strengths),
        "edit_strengths": list(edit_strengths),
        "experts": list(experts),
        "router": router,
        "damping": damping,
        "match": match,
        "seed": seed,
    }
    manifest = make_manifest(
        KIND,
        model=dense.describe(),
        calibration=calibration.describe(),
        evaluation=protocol.describe(),
        settings=settings,
    )
    folder = None
    if out is not None:
        plan = {key: manifest[key] for key in ("model", "calibration", "evaluation", "settings")}
        folder = ArmFolder(out, plan, resume=resume, force=force)
    if scores is not None:
        check_scores_fit(scores, dense)
        scores = _only(scores, chosen)
    prunes = [name for name in interventions if name in PRUNERS]
    known = layer_statistics(
        dense, calibration, chosen, scores=scores, md=md, seed=seed, progress=progress,
        grams=bool(prunes) and (1 in experts or match),
    )  # fmt: skip
    picked = list(request.selections(known.scores.frame))
    arms = plan_arms(
        picked, interventions, strengths=strengths, edit_strengths=edit_strengths, experts=experts
    )
    bench = Bench(dense, chosen, known, calibration, arms, damping=damping, seed=seed)
    routed = [k for k in experts if k > 1]
    if prunes and routed:
        bench.fit(routed, router=router, memory=memory, md=md, progress=progress)
    found, steps, dense_found = _run(
        dense, bench, arms, protocol, folder, match=columns[0] if match else None,
        memory=memory, progress=progress,
    )  # fmt: skip
    tables = result_tables(
        dense.name, arms, found, dense_found, protocol, picked,
        realised={id(arm): bench.realised(arm) for arm in arms}, seed=seed,
    )  # fmt: skip
    result = AblationResult(
        **tables, neurons=bench.neurons, matched=steps, scores=known.scores,
        manifest=manifest | clock.read(),
    )  # fmt: skip
    if folder is not None and out is not None:
        result.save(out, force=force)
        folder.remove()
    return result


@dataclass(frozen=True, eq=False)
class _Request:
    """Which selections are asked for."""

    wanted: Sequence[str | Selection]
    columns: Sequence[str]
    fraction: float | None
    count: int | None
    scope: str
    seeds: int
    seed: int

    def check(self) -> None:
        known = (*SELECT, *MATCHED, "all")
        for one in self.wanted:
            if not isinstance(one, Selection) and one not in known:
                raise unknown_name("selection", one, known)
        if not self.wanted or not self.columns:
            raise InvalidInput("`selections` and `by` must name at least one; got none.")
        if isinstance(self.seeds, bool) or self.seeds < 1:
            raise InvalidInput(f"`seeds` must be at least 1; got {self.seeds}.")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise InvalidInput(f"`fraction` must be in (0, 1]; got {self.fraction}.")

    def describe(self) -> dict[str, object]:
        named = [s if isinstance(s, str) else s.describe() for s in self.wanted]
        return {
            "selections": named, "by": list(self.columns), "fraction": self.fraction,
            "count": self.count, "scope": self.scope, "seeds": self.seeds,
        }  # fmt: skip

    def selections(self, frame: pd.DataFrame) -> Iterator[Selection]:
        """Yield every selection; random ones once a seed."""
        size = {"fraction": self.fraction, "count": self.count, "scope": self.scope}
        for one in dict.fromkeys(self.wanted):
            if isinstance(one, Selection):
                yield one
            elif one == "all":
                yield select(frame, one)
            elif one in ("top", "bottom"):
                for column in self.columns:
                    yield select(frame, one, by=column, **size)  # type: ignore[arg-type]
            else:
                like = None
                if one in MATCHED:
                    like = select(frame, "top", by=self.columns[0], **size)  # type: ignore[arg-type]
                for draw in range(self.seed, self.seed + self.seeds):
                    options = size if like is None else {"like": like}
                    yield select(frame, one, seed=draw, **options)  # type: ignore[arg-type]


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
        self._solved: dict[tuple[str, float], dict[str, SolvedRows]] = {}
        self._routed: dict[str, RoutedRows] = {}
        for pruner in {PRUNERS[arm.intervention] for arm in arms if arm.prunes}:
            plain = [a for a in arms if PRUNERS.get(a.intervention) == pruner and a.experts == 1]
            self._solve(pruner, plain)

    @cached_property
    def _means(self) -> dict[str, torch.Tensor]:
        return mean_outputs(self._statistics.scores.frame)

    @property
    def neurons(self) -> pd.DataFrame:
        """One row a routed neuron; see `RoutedRows.neurons`."""
        tables = [routed.neurons.assign(pruner=name) for name, routed in self._routed.items()]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"layer": []})

    def fit(
        self, experts: Sequence[int], *, router: Kind, memory: int, md: bool, progress: bool | None
    ) -> None:
        """Fit routers and solve experts for the rows of all arms that have several."""
        for name in {arm.intervention for arm in self._arms if arm.prunes and arm.experts > 1}:
            own = [arm for arm in self._arms if arm.intervention == name and arm.experts > 1]
            self._routed[PRUNERS[name]] = fit_rows(
                self._model, self._calibration, union_rows(arm.selection.rows for arm in own),
                sparsities=sorted({arm.strength for arm in own}), experts=[1, *experts],
                pruner=PRUNERS[name], router=router, damping=self._damping, seed=self._seed,
                memory=memory, md=md, progress=progress,
            )  # fmt: skip

    def applied(self, arm: Arm) -> AbstractContextManager[None]:
        """Return a context in which the model is changed as the arm says, and restored after."""
        rows = arm.selection.rows
        if not arm.prunes:
            layers = [self._layers[name] for name in rows]
            return edited_outputs(
                layers, arm.selection, arm.intervention, strength=arm.strength, means=self._means
            )
        if arm.experts > 1:
            routed = self._routed[PRUNERS[arm.intervention]]
            made = routed.modules(self._model, rows, arm.experts, arm.strength)
            return installed(self._model.module, made)
        solved = self._solved[PRUNERS[arm.intervention], arm.strength]
        edits = [
            RowEdit(self._layers[name], torch.from_numpy(chosen.copy()), solved[name].take(chosen, arm.strength)[0])
            for name, chosen in rows.items()
        ]
        return swapped_rows(edits)

    def realised(self, arm: Arm) -> NDArray[np.float64]:
        """Return the share of zeros of every selected row; empty where outputs are edited."""
        if not arm.prunes:
            return np.zeros(0)
        name = PRUNERS[arm.intervention]
        if arm.experts > 1:
            return realised_sparsity(self._routed[name].neurons, arm)
        solved, rows = self._solved[name, arm.strength], arm.selection.rows.items()
        parts = [solved[layer].take(own, arm.strength)[1] for layer, own in rows]
        return np.concatenate([part.double().numpy() for part in parts])

    def nested(self, arm: Arm) -> None:
        """Solve all rows for the pruner and strength of an arm, so that any part can be pruned."""
        if not arm.prunes:
            return
        whole = select(self._statistics.scores.frame, "all")
        self._solve(PRUNERS[arm.intervention], [Arm(whole, arm.intervention, arm.strength)])

    def bottom(self, arm: Arm, *, by: str, fraction: float) -> Arm:
        """Return the same intervention on a share of the neurons, lowest in ``by`` first."""
        frame = self._statistics.scores.frame
        lowest = select(frame, "bottom", by=by, fraction=fraction)
        return Arm(lowest, arm.intervention, arm.strength)

    @property
    def n_neurons(self) -> int:
        """Neurons of all layers."""
        return len(self._statistics.scores.frame)

    def _solve(self, pruner: str, arms: Sequence[Arm]) -> None:
        strengths = sorted({arm.strength for arm in arms})
        if not strengths:
            return
        solved = solve_rows(
            list(self._layers.values()), union_rows(arm.selection.rows for arm in arms),
            self._statistics.grams, sparsities=strengths, pruner=pruner, damping=self._damping,
            seed=self._seed,
        )  # fmt: skip
        self._solved |= {(pruner, strength): solved for strength in strengths}


def union_rows(several: Iterable[Rows]) -> dict[str, NDArray[np.int64]]:
    """Return the rows that are in any of some selections, sorted, by layer name."""
    joined: dict[str, list[NDArray[np.int64]]] = {}
    for rows in several:
        for name, chosen in rows.items():
            joined.setdefault(name, []).append(chosen)
    return {name: np.unique(np.concatenate(parts)) for name, parts in joined.items()}


def _run(
    model: LanguageModel,
    bench: Bench,
    arms: Sequence[Arm],
    protocol: Protocol,
    folder: ArmFolder | None,
    *,
    match: str | None,
    memory: int,
    progress: bool | None,
) -> tuple[list[dict[str, NDArray[np.float64]]], pd.DataFrame, dict[str, NDArray[np.float64]]]:
    """Measure every arm that is not finished yet."""
    results = []
    with ProgressBar("ablating", enabled=progress) as bar:
        bar.start(len(arms) + 1, "arms")
        meter = Meter(model, protocol, memory=memory)
        bar.advance()
        for arm in arms:
            found = None if folder is None else folder.read(arm.key)
            if found is None:
                with bench.applied(arm):
                    found = meter.measure()
                if folder is not None:
                    folder.write(arm.key, found)
            results.append(found)
            bar.advance()
        steps = pd.DataFrame({"intervention": []})
        if match is not None:
            steps = search_matched(bench, arms, results, meter, by=match)
        meter.close()
    return results, steps, meter.dense


def _only(scores: NeuronScores, layers: Sequence[Layer]) -> NeuronScores:
    """Return the scores of some layers."""
    names = [layer.name for layer in layers]
    for name in names:
        if name not in scores.histograms:
            raise unknown_name(
                "scored layer", name, scores.histograms,
                "Score it too, or ablate only the layers that were scored.",
            )  # fmt: skip
    return NeuronScores(
        frame=scores.frame[scores.frame["layer"].isin(names)].reset_index(drop=True),
        layers=scores.layers[scores.layers["layer"].isin(names)].reset_index(drop=True),
        histograms={name: scores.histograms[name] for name in names},
        manifest=scores.manifest,
    )
