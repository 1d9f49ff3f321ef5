"""Sparse rows of chosen neurons, solved once for all the arms that use them.

`fit_rows`: routed experts, from one pass over the text, and what they do to the neurons' outputs.
`solve_rows`: plainly pruned rows, from grams that are known.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from entangle.allocation.allocation import ROW, Allocation
from entangle.checks import different, several, shares, whole, wholes
from entangle.errors import InvalidInput, NumericalError, unknown_name
from entangle.experts.build import check_own_modules, record_inputs
from entangle.experts.linear import Packed, RowExperts, SharedRouting, pack, unpack
from entangle.experts.router import Kind, Router
from entangle.experts.rows import RowGroup, fit_group, measure_group, with_ri
from entangle.experts.solver import ExpertSettings, prune_part
from entangle.memory import check_memory, memory_for, work_bytes
from entangle.models.blocks import BlockRunner, evaluating
from entangle.models.layers import LISTING, Layer, find_layers, list_layers
from entangle.models.loading import AnyModel, as_language_model
from entangle.recording.hooks import look_at
from entangle.recording.states import HiddenStates
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.runs.progress import Progress, ProgressBar
from entangle.stats.gram import GramResult
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source

RowIndices = Sequence[int] | np.ndarray | Tensor
"""Indices of neurons of one layer."""


@dataclass(frozen=True, eq=False)
class FittedRows:
    """The solved rows of one layer."""

    rows: Int64[Tensor, " rows"]
    """Their indices, in ascending order."""
    in_features: int
    """Inputs of a neuron."""
    routers: Mapping[int, Router]
    """By number of experts; the very object is shared by the layers that read one input."""
    packed: Mapping[tuple[int, float], Packed] = field(repr=False)
    """Weights (experts, rows, in_features) by number of experts and sparsity."""


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """Routed sparse experts of chosen neurons, at several sparsities and numbers of experts."""

    neurons: pd.DataFrame
    """One row a (layer, neuron, experts, sparsity):

    ``layer``, ``block``, ``projection``, ``neuron``, ``experts``, ``sparsity``
        Which neuron, and how it was solved.
    ``rmse``
        Root mean square of routed sparse minus dense output over all calibration tokens.
    ``ri``
        ``rmse`` at one expert and the same sparsity divided by ``rmse``: 1 at one expert, NaN if
        one expert was not among the numbers asked for, or where both are 0.
    ``output_wd``
        W1 between the sparse and the dense outputs, in dense standard deviations.
    ``wd``, ``md``
        WD and mapping difficulty of the dense outputs over all tokens.
    ``weighted_wd``, ``weighted_md``
        The same inside the clusters, averaged with the clusters' tokens as weights.
    ``wd_skipped``, ``md_skipped``
        Clusters that contribute 0, since there is no distribution or no pair to measure.
    ``realised_sparsity``
        Share of the neuron's weights, over all experts, that the masks remove.
    ``smallest_cluster``, ``shrunk``, ``damping``
        Tokens of the smallest cluster, clusters with fewer tokens than inputs, and the largest
        damping that a cluster needed.

    Without mapping difficulty the three ``md`` columns are missing. Errors are those on the
    calibration tokens, which a cluster with few tokens overfits, and few tokens raise a cluster's
    WD (`entangle.stats.wasserstein.null_floor`): compare both with ``router="random"``.
    """
    layers: Mapping[str, FittedRows] = field(repr=False)
    """The solved rows by the layer's name."""

    def router(self, layer: str, k: int) -> Router:
        """Return the router with k clusters of a layer's inputs."""
        routers = self._layer(layer).routers
        if k not in routers:
            raise InvalidInput(f"`k` must be one of {list(routers)}, which were fitted; got {k}.")
        return routers[k]

    def weight(
        self, layer: str, rows: RowIndices, k: int, sparsity: float
    ) -> Float[Tensor, "k rows in_features"]:
        """Return the sparse weights of some neurons in k experts, on the CPU.

        Parameters
        ----------
        layer
            Full dotted name.
        rows
            Indices of neurons, in the order wanted.
        k, sparsity
            A number of experts and a sparsity that were asked for.

        Raises
        ------
        InvalidInput, UnknownName
            If something was not fitted.
        """
        fitted, wanted = self._layer(layer), row_indices(layer, rows)
        self.router(layer, k)
        if (k, sparsity) not in fitted.packed:
            known = sorted({share for _, share in fitted.packed})
            raise InvalidInput(
                f"`sparsity` must be one of {known}, which were fitted; got {sparsity}."
            )
        place = {row: i for i, row in enumerate(fitted.rows.tolist())}
        for row in wanted.tolist():
            if row not in place:
                raise InvalidInput(
                    f"`rows` must be among the {len(place)} rows of layer {layer!r} that were "
                    f"fitted; got {row}: fit the union of all selections."
                )
        whole = unpack(fitted.packed[k, sparsity], (k, len(place), fitted.in_features))
        return whole[:, [place[row] for row in wanted.tolist()]]

    def modules(
        self, model: AnyModel, selection: Mapping[str, RowIndices], k: int, sparsity: float
    ) -> dict[str, RowExperts]:
        """Make the modules that take the place of the selected layers.

        Parameters
        ----------
        model
            The dense model that the rows were fitted on.
        selection
            Indices of neurons by the layer's full dotted name; a layer with none is left out.
        k, sparsity
            A number of experts and a sparsity that were asked for.

        Returns
        -------
        dict of RowExperts
            By layer name, for `installed`. Layers that read one input share their routing.
        """
        module = as_language_model(model).module
        routings: dict[int, SharedRouting] = {}
        made = {}
        for name, rows in selection.items():
            chosen = row_indices(name, rows)
            if not chosen.numel():
                continue
            weight, router = self.weight(name, chosen, k, sparsity), self.router(name, k)
            routing = routings.setdefault(id(router), SharedRouting(router))
            layer = find_layers(module, name)[0]
            made[name] = RowExperts(layer, chosen, weight, routing if k > 1 else None)
        return made

    def _layer(self, name: str) -> FittedRows:
        if name not in self.layers:
            raise unknown_name("fitted layer", name, self.layers)
        return self.layers[name]


def row_indices(layer: str, rows: RowIndices) -> Int64[Tensor, " rows"]:
    """Return indices of neurons as a tensor, or raise `InvalidInput` naming the layer."""
    name = f"rows[{layer!r}]"
    values = [whole(name, one, least=0) for one in several(name, rows, empty=True)]
    return torch.tensor(values, dtype=torch.int64)


def chosen_rows(
    module: nn.Module, rows: Mapping[str, RowIndices]
) -> list[tuple[Layer, Int64[Tensor, " chosen"]]]:
    """Return the layers that have rows, in module order, with their indices in ascending order.

    Raises
    ------
    UnknownName, InvalidInput
        If there is no such layer, it lies outside the blocks, an index is outside it, or there is
        no row at all.
    """
    layers = {layer.name: layer for layer in list_layers(module)}
    for name in rows:
        if name not in layers:
            raise unknown_name("layer", name, layers, LISTING)
    chosen = []
    for name, layer in layers.items():
        index = row_indices(name, rows.get(name, ())).unique()
        if not index.numel():
            continue
        if layer.block is None:
            raise InvalidInput(f"layer {name!r} lies outside the blocks; leave it out.")
        if int(index[0]) < 0 or int(index[-1]) >= layer.out_features:
            raise InvalidInput(
                f"`rows` of layer {name!r} must lie in [0, {layer.out_features}); "
                f"got {int(index[0])} to {int(index[-1])}."
            )
        chosen.append((layer, index))
    if not chosen:
        raise InvalidInput("`rows` must name at least one neuron; got none.")
    return chosen


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
    settings = ExpertSettings(
        router=router, restarts=restarts, seed=seed, pruner=pruner, damping=damping
    )
    sweep = _Sweep(
        tuple(different("experts", wholes("experts", experts, least=1))),
        tuple(different("sparsities", shares("sparsities", sparsities))), settings, md,
    )  # fmt: skip
    check_memory(memory)
    dense = as_language_model(model)
    calibration = as_calibration(calibration, dense)
    chosen = chosen_rows(dense.module, rows)
    budget = memory_for(memory, dense.module)
    work = work_bytes(budget)
    with (
        evaluating(dense.module),
        ProgressBar("solving rows", enabled=progress) as bar,
        closing(_recorded(dense.module, calibration, chosen, budget - work, bar)) as recorded,
    ):
        parts = list(starmap(partial(_fit_one, sweep=sweep, memory=work), recorded))
    order = {layer.name: i for i, (layer, _) in enumerate(chosen)}
    neurons = with_ri(pd.concat([table for table, _ in parts], ignore_index=True))
    neurons = neurons.sort_values(
        ["layer", "neuron"], key=lambda c: c.map(order) if c.name == "layer" else c, kind="stable"
    ).reset_index(drop=True)
    fitted = {name: layer for _, layers in parts for name, layer in layers.items()}
    return RoutedRows(neurons, {name: fitted[name] for name in order})


@dataclass(frozen=True, eq=False)
class _Sweep:
    """All that rows are solved for; the fields are explained at `fit_rows`."""

    experts: tuple[int, ...]
    sparsities: tuple[float, ...]
    settings: ExpertSettings
    md: bool


def _recorded(
    module: nn.Module,
    calibration: CalibrationSet,
    chosen: Sequence[tuple[Layer, Tensor]],
    memory: int,
    bar: Progress,
) -> Generator[tuple[RowGroup, TokenStore]]:
    """Yield the chosen rows of the layers that read one input, and that input, block by block."""
    rows = {layer.name: index for layer, index in chosen}
    check_own_modules(layer for layer, _ in chosen)
    blocks = max(layer.block for layer, _ in chosen if layer.block is not None) + 1
    runner, budget = BlockRunner(module), ByteBudget(memory)
    bar.start(blocks, "blocks")
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
                    yield RowGroup.of(members, rows), inputs
            bar.advance()


def _fit_one(
    group: RowGroup, inputs: TokenStore, sweep: _Sweep, memory: int
) -> tuple[pd.DataFrame, dict[str, FittedRows]]:
    try:
        fit = partial(
            fit_group,
            group,
            inputs,
            sparsities=sweep.sparsities,
            settings=sweep.settings,
            md=sweep.md,
        )
        fits = list(map(fit, sweep.experts))
        table = measure_group(group, inputs, fits, seed=sweep.settings.seed, memory=memory)
    except NumericalError as error:
        names = ", ".join(layer.name for layer in group.layers)
        raise NumericalError(f"{names}: {error}") from error
    fitted, start = {}, 0
    routers = {fit.router.k: fit.router for fit in fits}
    for layer, index in zip(group.layers, group.index, strict=True):
        own = slice(start, start + index.numel())
        packed = {
            (fit.router.k, sparsity): pack(weight[:, own])
            for fit in fits
            for sparsity, weight in zip(fit.sparsities, fit.weight, strict=True)
        }
        fitted[layer.name] = FittedRows(index.cpu(), layer.in_features, routers, packed)
        start = own.stop
    return table, fitted


RowsByLayer = Mapping[str, NDArray[np.int64]]
Level = float | Allocation
"""How sparse rows are: a share of zeros in [0, 1] for all, or each as an allocation says."""


@dataclass(frozen=True, eq=False)
class SolvedRows:
    """Sparse weights of some rows of a layer at several levels."""

    rows: Int64[Tensor, " rows"]
    """Indices in ascending order."""
    weight: Mapping[Level, Float[Tensor, "rows in_features"]]
    """By level, in the layer's dtype, on the CPU."""
    realised: Mapping[Level, Float[Tensor, " rows"]]
    """Share of zeros of every row, by level."""

    def take(
        self, wanted: NDArray[np.int64], level: Level
    ) -> tuple[Float[Tensor, "chosen in_features"], Float[Tensor, " chosen"]]:
        """Return the weights and realised sparsities of some of the rows."""
        place = torch.searchsorted(self.rows, torch.tensor(wanted))
        return self.weight[level][place], self.realised[level][place]


def solve_rows(
    layers: Sequence[Layer],
    rows: RowsByLayer,
    grams: Mapping[str, GramResult],
    *,
    sparsities: Sequence[Level],
    pruner: str = "sparsegpt",
    damping: float = 0.01,
    seed: int = 0,
) -> dict[str, SolvedRows]:
    """Prune rows of dense layers to an exact number of zeros each.

    Rows do not depend on one another, so all rows and sparsities of the layers that read one input
    are solved together, with one factorisation of its gram.

    Parameters
    ----------
    layers
        Layers of the dense model.
    rows
        Indices in ascending order by layer name; layers without any are left out.
    grams
        ``XᵀX`` of each layer's inputs, by layer name.
    sparsities
        Shares of zeros in [0, 1], or allocations that hold all of the layers, all of one pattern.
    pruner, damping, seed
        As in `entangle.pruning.prune` (``pruner`` is its ``method``). The zeros of ``"random"``
        also depend on which rows and sparsities are solved together.

    Raises
    ------
    InvalidInput
        If the allocations' patterns differ.
    NumericalError
        If a gram cannot be factorised; the message names the layers.
    """
    settings = ExpertSettings(
        pruner=pruner, pattern=_pattern(sparsities), damping=damping, seed=seed
    )
    solved: dict[str, SolvedRows] = {}
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        if len(rows.get(layer.name, ())):
            groups.setdefault(id(grams[layer.name]), []).append(layer)
    for members in groups.values():
        chosen = [torch.tensor(rows[layer.name]) for layer in members]
        dense = torch.cat(
            [layer.weight[i.to(layer.device)] for layer, i in zip(members, chosen, strict=True)]
        )
        shares = torch.cat([_shares(level, members, chosen) for level in sparsities])
        try:
            found = prune_part(
                dense.repeat(len(sparsities), 1),
                grams[members[0].name].gram[None].to(dense.device),
                shares.to(dense.device),
                settings,
            )
        except NumericalError as error:
            names = ", ".join(layer.name for layer in members)
            raise NumericalError(f"{names}: {error}") from error
        weight = found.weight[0].cpu().unflatten(0, (len(sparsities), -1))
        zeros = found.realised[0].cpu().unflatten(0, (len(sparsities), -1))
        start = 0
        for layer, index in zip(members, chosen, strict=True):
            own = slice(start, start + len(index))
            solved[layer.name] = SolvedRows(
                index,
                {level: weight[i, own] for i, level in enumerate(sparsities)},
                {level: zeros[i, own] for i, level in enumerate(sparsities)},
            )
            start = own.stop
    return solved


def _pattern(levels: Sequence[Level]) -> str:
    """Return the pattern of all levels; that of a share of zeros is ``row``."""
    patterns = {one.pattern if isinstance(one, Allocation) else ROW for one in levels} or {ROW}
    if len(patterns) > 1:
        raise InvalidInput(
            f"`sparsities` must have one pattern; got {' and '.join(sorted(patterns))}: solve them "
            "one after the other."
        )
    return patterns.pop()


def _shares(
    level: Level, layers: Sequence[Layer], rows: Sequence[Int64[Tensor, " _"]]
) -> Float[Tensor, " all_rows"]:
    """Return the share of zeros of every chosen row of some layers, float64."""
    if not isinstance(level, Allocation):
        return torch.full((sum(map(len, rows)),), float(level), dtype=torch.float64)
    pairs = zip(layers, rows, strict=True)
    return torch.cat([level.sparsity[layer.name][index] for layer, index in pairs])
