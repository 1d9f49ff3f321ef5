"""`decompose`: everything that the figures about neurons and experts need, from one pass.

Decompose the layers that read one input: every table's part.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.checks import different, renamed, share, whole, wholes
from entangle.errors import InvalidInput, NumericalError
from entangle.experts.router import Kind
from entangle.experts.rows import RowFit, RowGroup, fit_group, measure_group, output_errors, with_ri
from entangle.experts.solver import ExpertSettings
from entangle.memory import check_memory, memory_for, work_bytes
from entangle.models.blocks import evaluates
from entangle.models.layers import DEFAULT_PROJ, Layer, LayerSpec, Projections, find_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.modes import describe_modes
from entangle.modes.groups import (
    Chosen,
    CommonBins,
    choose,
    components_needed,
    histogram_rows,
    relative_errors,
    score_rows,
    sliced_distances,
)
from entangle.modes.modes import Neurons, check_neurons
from entangle.modes.pairs import RouterMap, draw_all, near_pairs, pair_rows, separated_rows
from entangle.precision import full_precision
from entangle.recording.groups import record_groups
from entangle.recording.stream import TokenStore
from entangle.results.decomposition import COLUMNS, KIND, Decomposition, joined
from entangle.runs.progress import Progress, ProgressBar
from entangle.runs.provenance import RunClock, make_manifest
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet, SeenTokens, Tokens
from entangle.texts.given import Source
from entangle.texts.words import TokenText

Errors = NDArray[np.float64]
_Columns = dict[str, Sequence[int] | Sequence[float] | Errors]

Parts = dict[str, list[pd.DataFrame]]
"""Parts of the tables, by the table's name."""


@dataclass(frozen=True, eq=False)
class DecompositionPlan:
    """What is to be done; the fields are explained at `decompose`."""

    experts: Sequence[int]
    sparsity: float
    settings: ExpertSettings
    neurons: Sequence[int] | None
    contexts: int
    pairs: int
    separated: int
    near: float
    memory: int
    """Bytes for outputs and weights that are worked on."""
    most_outputs: int
    """Bytes that the outputs of the neurons looked at closely may take."""


def decompose_group(
    layers: Sequence[Layer],
    inputs: TokenStore,
    calibration: Tokens,
    tokenizer: PreTrainedTokenizerBase | None,
    request: DecompositionPlan,
    *,
    report: Callable[[int], None],
) -> Parts:
    """Make the tables of the layers that read one input.

    Parameters
    ----------
    layers
        The layers.
    inputs
        What they receive, (tokens, in_features), in the order of the calibration set.
    calibration, tokenizer
        The tokens and what writes them.
    request
        What to do.
    report
        Called with the number of (layer, number of experts) that have been dealt with.
    """
    rows = {layer.name: torch.arange(layer.out_features) for layer in layers}
    group = RowGroup.of(layers, rows)
    scored = score_rows(group, inputs, memory=request.memory)
    chosen = []
    for number, layer in enumerate(layers):
        own = scored[scored["layer"] == layer.name]
        wanted = choose(own) if request.neurons is None else list(request.neurons)
        chosen.append(Chosen.of(group, number, wanted, inputs, request.most_outputs))
    parts: Parts = defaultdict(list)
    _add_outputs(parts, group, scored, chosen, inputs, request, report)
    _add_tokens(parts, chosen, inputs, calibration, tokenizer, request)
    return parts


def _add_outputs(
    parts: Parts,
    group: RowGroup,
    scored: pd.DataFrame,
    chosen: Sequence[Chosen],
    inputs: TokenStore,
    request: DecompositionPlan,
    report: Callable[[int], None],
) -> None:
    """Add what depends on the experts: neurons, outputs, components, router_map."""
    device = group.weight.device
    on_map = RouterMap(inputs, device, seed=request.settings.seed)
    common = [CommonBins(one.outputs) for one in chosen]
    single: Tensor | None = None
    for run in _runs(sorted(request.experts, key=lambda k: k != 1), group, request.memory):
        fits = [
            fit_group(group, inputs, k, [request.sparsity], request.settings, md=True) for k in run
        ]
        measured = measure_group(
            group, inputs, fits, seed=request.settings.seed, memory=request.memory
        )
        parts["neurons"].append(measured.merge(scored.drop(columns="wd"), on=["layer", "neuron"]))
        for fit in fits:
            single = fit.weight[0] if fit.router.k == 1 else single
            needed = components_needed(inputs, fit.clusters, device)
            apart = sliced_distances(inputs, fit.clusters, seed=request.settings.seed)
            start = 0
            for one, bins in zip(chosen, common, strict=True):
                rows = slice(start, start + one.layer.out_features)
                start = rows.stop
                arm: dict[str, str | int | float] = {
                    "layer": one.layer.name,
                    "experts": fit.router.k,
                    "sparsity": request.sparsity,
                }
                errors, before = (
                    relative_errors(
                        group.weight[rows], group.bias[rows], sparse[:, rows], inputs,
                        fit.clusters, memory=request.memory,
                    )
                    if sparse is not None else np.full(fit.router.k, np.nan)
                    for sparse in (
                        fit.weight[0],
                        None if single is None else single.expand(fit.router.k, -1, -1),
                    )
                )  # fmt: skip
                columns: _Columns = {"components_90": needed, "error": errors, "sliced_wd": apart}
                columns["ri"] = _improvement(before, errors)
                parts["router_map"].append(on_map.rows(fit.clusters).assign(**arm))
                parts["components"].append(_clusters(fit, columns).assign(**arm))
                parts["outputs"] += [
                    histogram.assign(**arm)
                    for histogram in _histograms(group, one, bins, fit, inputs)
                ]
            report(len(chosen))


def _clusters(fit: RowFit, columns: _Columns) -> pd.DataFrame:
    """Return one row a cluster."""
    return pd.DataFrame({"cluster": range(fit.router.k), "tokens": fit.clusters.sizes, **columns})


def _improvement(before: Errors, after: Errors) -> Errors:
    """Return the ratio of root errors of one expert for all and of a cluster's own."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(before / after)


def _histograms(
    group: RowGroup, chosen: Chosen, bins: CommonBins, fit: RowFit, inputs: TokenStore
) -> Iterator[pd.DataFrame]:
    """Yield the histograms of the chosen neurons for one number of experts."""
    change = fit.weight[0][:, chosen.place].float() - group.weight[chosen.place].float()
    sparse = output_errors(change, inputs, fit.clusters).add_(chosen.outputs)
    for kind, outputs in (("dense", chosen.outputs), ("sparse", sparse)):
        for rows in histogram_rows(bins, chosen.neurons, outputs, fit.clusters):
            yield rows.assign(kind=kind)


def _add_tokens(
    parts: Parts,
    chosen: Sequence[Chosen],
    inputs: TokenStore,
    calibration: Tokens,
    tokenizer: PreTrainedTokenizerBase | None,
    request: DecompositionPlan,
) -> None:
    """Add what does not depend on the experts: pairs, separated, modes, contexts."""
    seed = request.settings.seed
    drawn = draw_all(inputs, seed=seed)
    near = near_pairs(inputs, drawn, near=request.near, seed=seed)
    text = TokenText(tokenizer)
    for one in chosen:
        found = {
            "pairs": pair_rows(one.outputs, one.neurons, drawn, most=request.pairs),
            "separated": separated_rows(
                one.outputs, one.neurons, near, inputs, calibration, text, most=request.separated
            ),
        }
        outputs = dict(zip(one.neurons, one.outputs.cpu().numpy(), strict=True))
        found["modes"], found["contexts"] = describe_modes(
            outputs, calibration, tokenizer, one.layer.name, per_mode=request.contexts, seed=seed
        )
        for name, rows in found.items():
            parts[name].append(rows.assign(layer=one.layer.name))


def _runs(experts: Sequence[int], group: RowGroup, memory: int) -> Iterator[list[int]]:
    """Part the numbers of experts so that the solved rows of a part fit into memory, if they can.

    Rows that are measured together share their dense outputs.
    """
    one_expert = group.weight.numel() * group.weight.element_size()
    run: list[int] = []
    for k in experts:
        if run and (sum(run) + k) * one_expert > memory:
            yield run
            run = []
        run.append(k)
    yield run


@renamed(layer="layers", pairs="token_pairs")
@evaluates
def decompose(
    model: AnyModel,
    calibration: Source,
    *,
    layers: LayerSpec,
    proj: Projections = DEFAULT_PROJ,
    neurons: Neurons | None = None,
    experts: int | Iterable[int] = (1, 2, 4, 8, 16),
    sparsity: float = 0.9,
    pruner: str = "sparsegpt",
    router: Kind = "kmeans",
    contexts: int = 8,
    token_pairs: int = 2000,
    separated: int = 20,
    near: float = 0.01,
    damping: float = 0.01,
    restarts: int = 10,
    seed: int = 0,
    memory: int | None = None,
    progress: bool | None = None,
) -> Decomposition:
    """Decompose the neurons of some layers into routed sparse experts, and describe both.

    One pass over the text records what the layers of the *dense* model receive. Each is then
    treated by itself, as by `entangle.experts.routed_rows.fit_rows`: routers with k clusters, all
    rows pruned for each cluster, outputs compared with the dense ones on the same tokens.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Left unchanged.
    calibration
        Text that everything is fitted and measured on: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings.
    layers, proj
        One or several layers, as in `entangle.models.layers.find_layers`.
    neurons
        Neurons to look at closely (histograms, pairs, modes), the same of every layer; by default
        the 3 of largest WD and the one nearest to the median WD.
    experts
        Numbers of experts; 1 is plain pruning, and the reference of the relative improvement.
    sparsity, pruner, damping
        Share of zeros in [0, 1], exact in every row; the others as in `entangle.pruning.prune`.
    router, restarts
        ``"kmeans"`` or the control ``"random"``; k-means seedings, of which the best is kept.
    contexts, token_pairs
        Examples of each mode; random pairs of tokens whose distances are kept.
    separated, near
        Pairs of tokens that a neuron separates most, among the nearest share of all pairs.
    seed
        Of routers, pairs, samples and random pruning. One seed gives the same bytes.
    memory
        Bytes for recorded inputs, which spill beyond it, and for outputs, which take 1 GiB of it,
        at most a half; by default half of what is free on the model's device. The solved rows of
        the largest number of experts and the solver come on top.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName, MemoryLimit
        If a setting is out of range or does not fit the model, the text or the memory.
    NumericalError
        If outputs are not finite or a gram cannot be factorised; the message names the layers.

    References
    ----------
    arXiv 2405.15756, algorithm A1, figures 1, 2, 5 to 8; arXiv 2509.24198 (separated tokens).
    """
    clock = RunClock()
    settings = ExpertSettings(
        router=router, restarts=restarts, seed=seed, pruner=pruner, damping=damping
    )
    sparsity = share("sparsity", sparsity)
    experts = different("experts", wholes("experts", experts, least=1))
    check_memory(memory)
    near = share("near", near, zero=False)
    contexts = whole("contexts", contexts, least=0)
    token_pairs = whole("token_pairs", token_pairs, least=0)
    separated = whole("separated", separated, least=0)
    neurons = None if neurons is None else wholes("neurons", neurons, least=0)
    dense = as_language_model(model)
    calibration = as_calibration(calibration, dense)
    chosen = find_layers(dense.module, layers, proj)
    _check_fit(chosen, neurons, calibration, max(experts))
    budget = memory_for(memory, dense.module)
    request = DecompositionPlan(
        experts,
        sparsity,
        settings,
        neurons,
        contexts,
        token_pairs,
        separated,
        near,
        work_bytes(budget),
        budget // 2,
    )
    with ProgressBar("decomposing", enabled=progress) as bar:
        tables = _tables(dense, calibration, chosen, request, budget - request.memory, bar)
    manifest = _manifest(dense, calibration, chosen, request, clock.read(budget))
    return Decomposition(**tables, manifest=manifest)


def _manifest(
    model: LanguageModel,
    calibration: CalibrationSet,
    layers: Sequence[Layer],
    request: DecompositionPlan,
    spent: Mapping[str, object],
) -> dict[str, object]:
    used = request.settings
    settings = {
        "layers": [one.name for one in layers], "neurons": request.neurons,
        "experts": list(request.experts), "sparsity": request.sparsity, "pruner": used.pruner,
        "router": used.router, "damping": used.damping, "restarts": used.restarts,
        "contexts": request.contexts, "pairs": request.pairs, "separated": request.separated,
        "near": request.near, "seed": used.seed,
    }  # fmt: skip
    return make_manifest(
        KIND,
        model=model.describe(),
        calibration=calibration.describe(),
        settings=settings,
        **spent,
    )


def _tables(
    model: LanguageModel,
    calibration: CalibrationSet,
    layers: Sequence[Layer],
    request: DecompositionPlan,
    memory: int,
    bar: Progress,
) -> dict[str, pd.DataFrame]:
    parts: Parts = {name: [] for name in COLUMNS}
    with ExitStack() as stack, full_precision():
        steps = len(layers) * len(request.experts)
        bar.start(calibration.n_seq + steps, "sequences and routers")
        groups = record_groups(
            model.module, layers, calibration, memory=memory, stack=stack, report=bar.advance
        )
        for members, inputs in groups:
            if max(request.experts) > inputs.n_tokens:
                raise InvalidInput(
                    f"layer {members[0].name!r} sees {inputs.n_tokens} tokens, fewer than "
                    f"`experts` {max(request.experts)}; lower `experts`, or give more text."
                )
            at = inputs.at
            seen = calibration if at is None else SeenTokens(calibration, at)
            try:
                found = decompose_group(
                    members, inputs, seen, model.tokenizer, request, report=bar.advance
                )
            except NumericalError as error:
                names = ", ".join(one.name for one in members)
                raise NumericalError(f"{names}: {error}") from error
            inputs.close()
            for name, own in found.items():
                parts[name] += own if at is None else [_in_text(name, one, at) for one in own]
    order = [one.name for one in layers]
    tables = {name: joined(name, own, order) for name, own in parts.items()}
    tables["neurons"] = _with_ri(tables["neurons"], order, request.experts)
    return tables


_PLACES = {
    "contexts": ["position"], "separated": ["position_a", "position_b"],
    "router_map": ["position"], "pairs": ["token_a", "token_b"],
}  # fmt: skip


def _in_text(name: str, rows: pd.DataFrame, at: Tensor) -> pd.DataFrame:
    """Return rows of a table with tokens of an expert counted over the whole text."""
    for column in _PLACES.get(name, ()):
        rows = rows.assign(**{column: at.numpy()[rows[column]]})
    return rows


def _with_ri(neurons: pd.DataFrame, layers: Sequence[str], experts: Sequence[int]) -> pd.DataFrame:
    """Sort by layer, neuron and number of experts, and fill in the relative improvement."""
    place: dict[object, Mapping[object, int]] = {
        "layer": {name: i for i, name in enumerate(layers)},
        "experts": {k: i for i, k in enumerate(experts)},
    }
    neurons = neurons.sort_values(
        ["layer", "neuron", "experts"],
        key=lambda column: column.map(place[column.name]) if column.name in place else column,
        ignore_index=True,
    )
    return with_ri(neurons)


def _check_fit(
    layers: Sequence[Layer],
    neurons: Neurons | None,
    calibration: CalibrationSet,
    experts: int,
) -> None:
    for layer in layers:
        if layer.offloaded:
            raise InvalidInput(
                f"the weights of layer {layer.name!r} are offloaded, so it cannot be decomposed; "
                "choose a device map that keeps it on a device."
            )
        if neurons is not None:
            check_neurons(layer, neurons)
    if experts > calibration.n_tokens:
        raise InvalidInput(
            f"`experts` must be at most the number of tokens to calibrate on, "
            f"{calibration.n_tokens}; got {experts}."
        )
