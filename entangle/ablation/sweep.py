"""`ablate`: arms × strengths × seeds, each measured on the same texts."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from entangle.ablation.arms import PRUNERS, Arm, check_settings, plan_allocated, plan_arms
from entangle.ablation.bench import Bench
from entangle.ablation.folder import ArmFolder
from entangle.ablation.matched import search_matched
from entangle.ablation.measures import Meter, Protocol
from entangle.ablation.request import DEFAULT, Request
from entangle.ablation.result import KIND, AblationResult
from entangle.ablation.selection import Selection, check_scores_fit
from entangle.ablation.statistics import layer_statistics
from entangle.ablation.tables import result_tables
from entangle.allocation.allocation import Allocation
from entangle.allocation.labels import zeros_digest
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
    selections: Sequence[str | Selection] = DEFAULT,
    by: str | Sequence[str] = "wd",
    fraction: float | None = None,
    count: int | None = None,
    scope: str = "layer",
    seeds: int = 5,
    interventions: Sequence[str] = ("prune",),
    strengths: Sequence[float] = (0.9, 0.95, 0.99),
    allocation: Allocation | None = None,
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
    columns = [by] if isinstance(by, str) else list(dict.fromkeys(by))
    request = Request(
        selections, columns, 0.03 if fraction is None and count is None else fraction, count,
        scope, seeds, seed,
    )  # fmt: skip
    request.check(chosen)
    check_settings(
        interventions, strengths=strengths, edit_strengths=edit_strengths, experts=experts
    )
    outside = [layer.name for layer in chosen if layer.block is None]
    if "divergence" in protocol.measures and outside:
        raise InvalidInput(
            f"divergence must be measured with layers inside the blocks only; got {outside[0]!r}, "
            "which the dense model's own logits pass too: leave it out, or measure perplexity."
        )
    if match:
        _check_match(protocol, request, interventions, experts)
    allocated: list[Arm] | None = None
    if allocation is not None:
        _check_alone(selections, match=match)
        allocation.check(chosen, dense.digest)
        allocated = plan_allocated(allocation, interventions, experts=experts)
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
    if scores is not None:
        known_by = ("calibration", "settings")
        settings["scores"] = {name: scores.manifest.get(name) for name in known_by}
    if allocation is not None:
        zeros = {"zeros_sha256": zeros_digest(allocation), "overall": allocation.overall}
        settings["allocation"] = dict(allocation.manifest) | zeros
        settings |= {"selections": ["all", "allocation"], "strengths": [allocation.overall]}
    manifest = make_manifest(
        KIND,
        model=dense.describe(),
        calibration=calibration.describe(),
        evaluation=protocol.describe(),
        settings=settings,
    )
    folder = None
    if out is not None:
        folder = ArmFolder(out, manifest, resume=resume, force=force)
    if scores is not None:
        check_scores_fit(scores, dense)
        scores = _only(scores, chosen)
    prunes = [name for name in interventions if name in PRUNERS]
    known = layer_statistics(
        dense, calibration, chosen, scores=scores, md=md, seed=seed, progress=progress,
        grams=bool(prunes) and (1 in experts or match),
    )  # fmt: skip
    if allocated is None:
        picked = request.selections(known.scores.frame)
        arms = plan_arms(
            picked, interventions, strengths=strengths, edit_strengths=edit_strengths,
            experts=experts,
        )  # fmt: skip
    else:
        arms = allocated
        picked = list(dict.fromkeys(arm.selection for arm in arms))
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


def _check_match(
    protocol: Protocol, request: Request, interventions: Sequence[str], experts: Sequence[int]
) -> None:
    """Refuse a search for matched controls that would have nothing to match."""
    if not {"perplexity", "divergence"} & set(protocol.measures):
        raise InvalidInput(
            "`match` compares perplexities; give `evaluation`, and measure perplexity."
        )
    first = request.columns[0]
    tops = [one for one in request.wanted if isinstance(one, Selection) and one.rule == "top"]
    if "top" not in request.wanted and first not in [one.by for one in tops]:
        raise InvalidInput(f"`match` needs the selection top {first}; add top to `selections`.")
    if 1 not in experts and set(interventions) <= set(PRUNERS):
        raise InvalidInput(f"`match` needs arms with 1 expert; got `experts` {list(experts)}.")


def _check_alone(selections: Sequence[str | Selection], *, match: bool) -> None:
    """Refuse what has no meaning beside an allocation, which says how sparse each row is."""
    if tuple(selections) not in (DEFAULT, ("all",)):
        raise InvalidInput(
            "with `allocation` all rows of its layers are pruned; leave `selections` out."
        )
    if match:
        raise InvalidInput("`match` needs a top selection, which `allocation` has not; drop one.")


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
    with ProgressBar("ablating", enabled=progress) as bar, ExitStack() as stack:
        bar.start(len(arms) + 1, "arms")
        meter = stack.enter_context(closing(Meter(model, protocol, memory=memory)))
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
