"""`ablate`: arms × strengths × seeds, each measured on the same texts."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from entangle.allocation.allocation import Allocation
from entangle.checks import choices, finite, names, several, share, shares, whole, wholes
from entangle.evaluation import MinimalPairs, as_evaluation
from entangle.evaluation.perplexity import as_causal_model
from entangle.experiments.arms import INTERVENTIONS, ROUTERS
from entangle.experiments.engine import Sweep
from entangle.experiments.measures import Protocol
from entangle.experiments.request import (
    DEFAULT,
    ArmFolder,
    Request,
    is_finished,
    scores_of,
    silent_layers,
)
from entangle.experiments.selection import Selection
from entangle.memory import check_memory, memory_for
from entangle.models.blocks import evaluates
from entangle.models.layers import (
    DEFAULT_PROJ,
    LayerSpec,
    Projections,
    asked_by_name,
    find_layers,
    layer_specs,
)
from entangle.models.loading import AnyModel
from entangle.results.ablation import KIND, AblationResult, load_ablation
from entangle.results.scores import NeuronScores
from entangle.runs.provenance import RunClock, claims_out, make_manifest
from entangle.seeding import check_seed
from entangle.texts.calibration import as_calibration
from entangle.texts.given import Source


@claims_out
@evaluates
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
    selections: str | Selection | Iterable[str | Selection] = DEFAULT,
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
    seed, layers = check_seed(seed), layer_specs(layers)
    check_memory(memory)
    dense = as_causal_model(model)
    budget = memory_for(memory, dense.module)
    chosen = find_layers(dense.module, layers, proj)
    named = asked_by_name(layers, chosen)
    if scores is not None and not named:
        silent = silent_layers(scores)
        chosen = tuple(layer for layer in chosen if layer.name not in silent)
    text = None if evaluation is None else as_evaluation(evaluation, dense)
    size = 0.03 if fraction is None and count is None else fraction
    request = Request(
        several("selections", selections, Selection), names("by", by),
        None if size is None else share("fraction", size, zero=False),
        None if count is None else whole("count", count, least=1),
        scope, whole("seeds", seeds, least=1), seed,
    )  # fmt: skip
    sweep = Sweep(
        model=dense,
        layers=chosen,
        calibration=as_calibration(calibration, dense),
        protocol=Protocol.of(text, pairs, measures),
        request=request,
        interventions=choices("interventions", interventions, INTERVENTIONS, kind="intervention"),
        strengths=shares("strengths", strengths),
        edit_strengths=shares("edit_strengths", edit_strengths),
        experts=wholes("experts", experts, least=1),
        routers=choices("router", router, ROUTERS),
        allocation=allocation,
        scores=None if scores is None else scores_of(scores, chosen, dense),
        damping=finite("damping", damping, least=0),
        match=match,
        md=md,
        seed=seed,
        memory=budget,
        named=named,
    )
    sweep.check()
    manifest = make_manifest(
        KIND, model=dense.describe(), calibration=sweep.calibration.describe(),
        evaluation=sweep.protocol.describe(), settings=sweep.settings(),
    )  # fmt: skip
    folder = None
    if out is not None:
        if resume and is_finished(out, KIND, manifest, force=force):
            return load_ablation(out)
        folder = ArmFolder(out, manifest, resume=resume, force=force)
    fields = sweep.run(folder, progress=progress)
    result = AblationResult(**fields, manifest=manifest | clock.read(budget))
    if folder is not None and out is not None:
        result.save(out, force=force, extra=None if extra is None else partial(extra, result))
        folder.remove()
    return result
