"""`decompose`: everything that the figures about neurons and experts need, from one pass."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import pandas as pd

from entangle.ablation.row_solve import RowSettings
from entangle.calibration import CalibrationSet, Source, as_calibration
from entangle.checks import share, whole, wholes
from entangle.decomposition.group import Parts, Request, decompose_group
from entangle.decomposition.recorded import record_groups
from entangle.decomposition.result import KIND, Decomposition
from entangle.decomposition.tables import COLUMNS, joined
from entangle.errors import InvalidInput, NumericalError
from entangle.memory import check_memory, memory_for, work_bytes
from entangle.models.evaluating import evaluates
from entangle.models.layers import Layer, LayerSpec, Projections, find_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.modes.neuron import Neurons, check_neurons
from entangle.precision import full_precision
from entangle.progress import Progress, ProgressBar
from entangle.provenance import RunClock, make_manifest
from entangle.routing.router import Kind


@evaluates
def decompose(
    model: AnyModel,
    calibration: Source,
    *,
    layer: LayerSpec,
    proj: Projections = None,
    neurons: Neurons | None = None,
    experts: int | Iterable[int] = (1, 2, 4, 8, 16),
    sparsity: float = 0.9,
    pruner: str = "sparsegpt",
    router: Kind = "kmeans",
    contexts: int = 8,
    pairs: int = 2000,
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
    treated by itself, as by `entangle.ablation.routed.fit_rows`: routers with k clusters, all rows
    pruned for each cluster, outputs compared with the dense ones on the same tokens.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Left unchanged.
    calibration
        Text that everything is fitted and measured on: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings.
    layer, proj
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
    contexts, pairs
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
    rows = RowSettings.checked(
        share("sparsity", sparsity), experts, pruner=pruner, router=router, damping=damping,
        restarts=restarts, seed=seed, md=True,
    )  # fmt: skip
    check_memory(memory)
    near = share("near", near, zero=False)
    contexts, pairs = whole("contexts", contexts, least=0), whole("pairs", pairs, least=0)
    separated = whole("separated", separated, least=0)
    neurons = None if neurons is None else wholes("neurons", neurons, least=0)
    dense = as_language_model(model)
    calibration = as_calibration(calibration, dense)
    layers = find_layers(dense.module, layer, proj)
    _check_fit(layers, neurons, calibration, rows)
    budget = memory_for(memory, dense.module)
    request = Request(
        rows, neurons, contexts, pairs, separated, near, work_bytes(budget), budget // 2
    )
    with ProgressBar("decomposing", enabled=progress) as bar:
        tables = _tables(dense, calibration, layers, request, budget - request.memory, bar)
    manifest = _manifest(dense, calibration, layers, request, clock.read(budget))
    return Decomposition(**tables, manifest=manifest)


def _manifest(
    model: LanguageModel,
    calibration: CalibrationSet,
    layers: Sequence[Layer],
    request: Request,
    spent: Mapping[str, object],
) -> dict[str, object]:
    rows = request.rows
    settings = {
        "layers": [one.name for one in layers], "neurons": request.neurons,
        "experts": list(rows.experts), "sparsity": rows.sparsities[0], "pruner": rows.pruner,
        "router": rows.router, "damping": rows.damping, "restarts": rows.restarts,
        "contexts": request.contexts, "pairs": request.pairs, "separated": request.separated,
        "near": request.near, "seed": rows.seed,
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
    request: Request,
    memory: int,
    bar: Progress,
) -> dict[str, pd.DataFrame]:
    parts: Parts = {name: [] for name in COLUMNS}
    with ExitStack() as stack, full_precision():
        steps = len(layers) * len(request.rows.experts)
        bar.start(calibration.n_seq + steps, "sequences and routers")
        groups = record_groups(
            model.module, layers, calibration, memory=memory, stack=stack, report=bar.advance
        )
        for members, inputs in groups:
            try:
                found = decompose_group(
                    members, inputs, calibration, model.tokenizer, request,
                    report=bar.advance,
                )  # fmt: skip
            except NumericalError as error:
                names = ", ".join(one.name for one in members)
                raise NumericalError(f"{names}: {error}") from error
            inputs.close()
            for name, own in found.items():
                parts[name] += own
    order = [one.name for one in layers]
    tables = {name: joined(name, own, order) for name, own in parts.items()}
    tables["neurons"] = _with_ri(tables["neurons"], order, request.rows.experts)
    return tables


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
    key = ["layer", "neuron"]
    single = neurons.loc[neurons["experts"] == 1].set_index(key)["rmse"]
    before = single.reindex(pd.MultiIndex.from_frame(neurons[key])).to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        ri = np.where(neurons["experts"] == 1, 1.0, before / neurons["rmse"].to_numpy())
    return neurons.assign(ri=ri)


def _check_fit(
    layers: Sequence[Layer],
    neurons: Neurons | None,
    calibration: CalibrationSet,
    rows: RowSettings,
) -> None:
    for layer in layers:
        if layer.offloaded:
            raise InvalidInput(
                f"the weights of layer {layer.name!r} are offloaded, so it cannot be decomposed; "
                "choose a device map that keeps it on a device."
            )
        if neurons is not None:
            check_neurons(layer, neurons)
    if max(rows.experts) > calibration.n_tokens:
        raise InvalidInput(
            f"`experts` must be at most the number of tokens to calibrate on, "
            f"{calibration.n_tokens}; got {max(rows.experts)}."
        )
