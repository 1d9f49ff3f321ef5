"""`fit_rows`: Sparse Expansion of chosen neurons only, all arms in one pass over the text."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial

import numpy as np
import pandas as pd
from torch import Tensor, nn

from entangle.ablation.routed_rows import FittedRows, RoutedRows, RowIndices, chosen_rows
from entangle.ablation.row_solve import RowGroup, RowSettings, fit_group, measure_group
from entangle.calibration import CalibrationSet, Source, as_calibration
from entangle.errors import NumericalError
from entangle.expansion.build import HiddenStates, check_own_modules, record_inputs
from entangle.expansion.packing import pack
from entangle.memory import check_memory, memory_for, work_bytes
from entangle.models.blocks import BlockRunner
from entangle.models.evaluating import evaluates
from entangle.models.layers import Layer
from entangle.models.loading import AnyModel, as_language_model
from entangle.progress import Progress, ProgressBar
from entangle.recording.order import look_at
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.routing.router import Kind

__all__ = ["RoutedRows", "fit_rows"]


@evaluates
def fit_rows(
    model: AnyModel,
    calibration: Source,
    rows: Mapping[str, RowIndices],
    *,
    sparsities: float | Iterable[float],
    experts: int | Iterable[int],
    pruner: str = "sparsegpt",
    router: Kind = "kmeans",
    damping: float = 0.01,
    restarts: int = 10,
    seed: int = 0,
    memory: int | None = None,
    md: bool = True,
    progress: bool | None = None,
) -> RoutedRows:
    """Fit routers and solve sparse experts for chosen neurons, in one pass over the text.

    The pass goes block by block on the hidden states of the *dense* model, so that all arms
    (selections, sparsities, numbers of experts) see the same inputs and one pass serves them all;
    `entangle.expand`, in contrast, hands on what the expanded blocks put out. Rows are pruned to an
    exact number of zeros each, independently of one another: give the union of all selections, and
    take any part of it from the result.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Left unchanged.
    calibration
        Text, as in `entangle.score`, that routers and experts are fitted on, and that all measures
        are taken on.
    rows
        Indices of the neurons to solve, by the layer's full dotted name.
    sparsities
        Shares of zeros in [0, 1].
    experts
        Numbers of experts; 1 is plain pruning, and the reference of the relative improvement.
    pruner, damping
        As in `entangle.pruning.prune` (``pruner`` is its ``method``). The zeros of ``"random"``
        also depend on which rows and sparsities are solved together.
    router
        ``"kmeans"``, or the control ``"random"``.
    restarts
        k-means seedings, of which the best is kept.
    seed
        Seed of the routers, of the pairs of tokens and of random pruning.
    memory
        Bytes for hidden states and the recorded inputs of one block, which spill beyond it, and for
        outputs, which take 1 GiB of it, at most a half; by default half of what is free on the
        model's device. The solved rows come on top, stored as their non-zeros.
    md
        Whether to measure mapping difficulty.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If a setting is out of range or does not fit the model.
    NumericalError
        If activations are not finite or a gram cannot be factorised; the message names the layers.

    References
    ----------
    arXiv 2405.15756: algorithm A1, relative improvement, weighted WD and MD, figure 3.
    """
    settings = RowSettings.checked(
        sparsities, experts, pruner=pruner, router=router, damping=damping, restarts=restarts,
        seed=seed, md=md,
    )  # fmt: skip
    check_memory(memory)
    dense = as_language_model(model)
    calibration = as_calibration(calibration, dense)
    chosen = chosen_rows(dense.module, rows)
    with ProgressBar("solving rows", enabled=progress) as bar:
        parts = _fit_blocks(
            dense.module, calibration, chosen, settings, memory_for(memory, dense.module), bar
        )
    order = {layer.name: i for i, (layer, _) in enumerate(chosen)}
    neurons = _with_ri(pd.concat([table for table, _ in parts], ignore_index=True))
    neurons = neurons.sort_values(
        ["layer", "neuron"], key=lambda c: c.map(order) if c.name == "layer" else c, kind="stable"
    ).reset_index(drop=True)
    fitted = {name: layer for _, layers in parts for name, layer in layers.items()}
    return RoutedRows(neurons, {name: fitted[name] for name in order})


def _fit_blocks(
    module: nn.Module,
    calibration: CalibrationSet,
    chosen: Sequence[tuple[Layer, Tensor]],
    settings: RowSettings,
    memory: int,
    bar: Progress,
) -> list[tuple[pd.DataFrame, dict[str, FittedRows]]]:
    rows = {layer.name: index for layer, index in chosen}
    check_own_modules(layer for layer, _ in chosen)
    blocks = max(layer.block for layer, _ in chosen if layer.block is not None) + 1
    runner, parts = BlockRunner(module), []
    bar.start(blocks, "blocks")
    work = work_bytes(memory)
    budget = ByteBudget(memory - work)
    with closing(HiddenStates([ids for _, ids in calibration.batches()], memory=budget)) as states:
        habits = look_at(module, [layer for layer, _ in chosen], states.first)
        states.enter(runner)
        for block in range(blocks):
            layers = [layer for layer, _ in chosen if layer.block == block]
            with ExitStack() as stack:
                groups = record_inputs(
                    layers, partial(states.advance, runner, block), memory=budget,
                    stack=stack, passes=states.pass_tokens, habits=habits,
                )  # fmt: skip
                for members, inputs in groups:
                    group = RowGroup.of(members, rows)
                    parts.append(_fit_one(group, inputs, settings, work))
            bar.advance()
    return parts


def _fit_one(
    group: RowGroup, inputs: TokenStore, settings: RowSettings, memory: int
) -> tuple[pd.DataFrame, dict[str, FittedRows]]:
    try:
        fits = dict(fit_group(group, inputs, settings))
        table = measure_group(group, inputs, fits, settings, memory=memory)
    except NumericalError as error:
        names = ", ".join(layer.name for layer in group.layers)
        raise NumericalError(f"{names}: {error}") from error
    fitted, start = {}, 0
    routers = {k: fit.router for k, fit in fits.items()}
    for layer, index in zip(group.layers, group.index, strict=True):
        own = slice(start, start + index.numel())
        packed = {
            (k, sparsity): pack(weight[:, own])
            for k, fit in fits.items()
            for sparsity, weight in zip(settings.sparsities, fit.weight, strict=True)
        }
        fitted[layer.name] = FittedRows(index.cpu(), layer.in_features, routers, packed)
        start = own.stop
    return table, fitted


def _with_ri(neurons: pd.DataFrame) -> pd.DataFrame:
    """Fill in the relative improvement."""
    key = ["layer", "neuron", "sparsity"]
    single = neurons.loc[neurons["experts"] == 1].set_index(key)["rmse"]
    before = single.reindex(pd.MultiIndex.from_frame(neurons[key])).to_numpy()
    after = neurons["rmse"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        ri = np.where(neurons["experts"] == 1, 1.0, before / after)
    return neurons.assign(ri=ri)
