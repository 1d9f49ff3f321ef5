"""Expand a model block by block, on the hidden states of the blocks already expanded.

First the plan: sparsity of every row and experts of every layer, as they are asked for or as an
allocation says.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from numpy import ndarray
from torch import Tensor, float64, nn

from entangle.allocation.allocation import Allocation
from entangle.checks import real, tensor_of, whole
from entangle.errors import InvalidInput, NumericalError
from entangle.experts.linear import ExpandedLinear, SharedRouting
from entangle.experts.router import Router
from entangle.experts.solver import (
    Experts,
    ExpertSettings,
    Sparsity,
    cluster_grams,
    clusters_at_once,
    solve_experts,
    whole_gram,
)
from entangle.experts.spread import (
    cluster_shares,
    join_experts,
    share_inputs,
    share_packing,
    share_router,
    share_totals,
    solve_shares,
)
from entangle.experts.storage import Storage
from entangle.memory import by_device, give_back
from entangle.models.blocks import BlockRunner
from entangle.models.layers import Layer
from entangle.models.mixtures import put_layer
from entangle.models.streaming import release
from entangle.packed.formats import Packed
from entangle.ranks import current
from entangle.recording.hooks import Habits, look_at
from entangle.recording.recorder import Recorded, Recorder
from entangle.recording.states import PASS_TOKENS_GPU, HiddenStates
from entangle.recording.stream import ByteBudget, TokenStore, as_budget

Made = TypeVar("Made")
Fitted = tuple[Router, Tensor | None]
"""A router, and the clusters of the tokens that it was fitted on where they are known."""
_RAM = torch.device("cpu")
_GRAM_TOKENS = 2**13
_GRAM_NUMBERS_GPU = 2**28
_GRAM_BYTES = 2**30
"""Of the grams of all clusters on a CPU, beyond which the clusters are solved in parts."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be built; the fields are explained at `entangle.expand`."""

    layers: Mapping[int, Sequence[Layer]]
    """Layers to expand, by block."""
    sparsity: Mapping[str, Sparsity]
    """Sparsity of each layer, by its full name."""
    experts: Mapping[str, int]
    """Number of experts of each layer, equal where layers read one input."""
    named: bool = True
    """Whether the layers were asked for by name, so that one that sees no token is refused; else
    it is left as it is."""
    settings: ExpertSettings = field(default_factory=ExpertSettings)
    """How; the router is that of the layers with several experts."""
    storage: Storage = field(default_factory=Storage)
    """How the experts are stored."""

    @property
    def last(self) -> int:
        """Index of the last block with layers to expand; -1 if there is none."""
        return max(self.layers, default=-1)


Allocated = Allocation | Mapping[str, float | Tensor]
"""An allocation, or sparsities by layer name: for all rows, or one value a row."""


def planned_sparsity(
    layers: Sequence[Layer],
    allocation: Allocated | None,
    *,
    sparsity: float | None,
    pattern: str,
    digest: str,
) -> dict[str, Sparsity]:
    """Return the sparsity of every layer.

    Parameters
    ----------
    layers
        Layers to expand.
    allocation
        Decides, if given; one of class `Allocation` must be for these layers, and no others, of
        this model.
    sparsity
        Of all layers without an allocation.
    pattern
        As in `entangle.pruning.prune`; with an allocation ``row``, or the allocation's own.
    digest
        Of the model.

    Raises
    ------
    InvalidInput
        Naming what does not fit.
    """
    if allocation is None:
        share = _share(sparsity)
        return {layer.name: share for layer in layers}
    if isinstance(allocation, Allocation):
        if pattern not in ("row", allocation.pattern):
            own = "" if allocation.pattern == "row" else f" or its own, {allocation.pattern!r}"
            raise InvalidInput(
                "an allocation gives every row a number of zeros, which needs `pattern` 'row'"
                f"{own}; got {pattern!r}."
            )
        allocation.check(layers, digest)
        return {layer.name: allocation.sparsity[layer.name] for layer in layers}
    if not isinstance(allocation, Mapping):
        raise InvalidInput(
            "`allocation` must be an Allocation, from entangle.allocation.load_allocation, or "
            f"sparsities by layer name; got {type(allocation).__name__}."
        )
    for layer in layers:
        if allocation.get(layer.name) is None:
            raise InvalidInput(f"`allocation` must name every layer; {layer.name!r} is missing.")
    return {layer.name: _share(allocation[layer.name]) for layer in layers}


def _share(sparsity: object) -> Sparsity:
    """Return one sparsity as a float, several as a tensor."""
    if sparsity is None or isinstance(sparsity, Tensor):
        return sparsity
    if isinstance(sparsity, Sequence | ndarray) and not isinstance(sparsity, str):
        return tensor_of("sparsity", sparsity, float64)
    return real("sparsity", sparsity)


def planned_pattern(allocation: Allocated | None, pattern: str) -> str:
    """Return the pattern to prune in: that of an allocation that was made for n:m is its own."""
    return allocation.pattern if isinstance(allocation, Allocation) else pattern


def planned_experts(
    layers: Sequence[Layer], allocation: Allocated | None, experts: int, *, tokens: int
) -> dict[str, int]:
    """Return the number of experts of every layer: the allocation's, if it has any.

    Raises
    ------
    InvalidInput
        If a number is below 1 or above the number of ``tokens`` to calibrate on.
    """
    experts = whole("experts", experts, least=1)
    counts = {layer.name: experts for layer in layers}
    if isinstance(allocation, Allocation) and allocation.experts is not None:
        counts = {name: allocation.experts[name] for name in counts}
    for count in dict.fromkeys(counts.values()):
        check_experts(count, tokens=tokens)
    return counts


def check_experts(count: int, *, tokens: int) -> None:
    """Raise `InvalidInput` unless so many experts can be fitted on so many tokens."""
    if whole("experts", count, least=1) > tokens:
        raise InvalidInput(
            f"`experts` must be at most the number of tokens to calibrate on, {tokens}; got "
            f"{count}."
        )


def describe_allocation(allocation: Allocated | None) -> dict[str, object]:
    """Return what a manifest's settings record of an allocation; nothing for other sparsities."""
    if not isinstance(allocation, Allocation):
        return {}
    return {"allocation": dict(allocation.manifest) | {"overall": allocation.overall}}


def check_shared(groups: Sequence[Sequence[Layer]], experts: Mapping[str, int]) -> None:
    """Raise `InvalidInput` unless layers that read one input have equally many experts.

    They share a router, so that a token goes to the expert of one number in all of them.

    Parameters
    ----------
    groups
        From `entangle.recording.groups.shared_inputs`.
    experts
        By layer name.
    """
    for members in groups:
        first = members[0].name
        for layer in members[1:]:
            if experts[layer.name] != experts[first]:
                raise InvalidInput(
                    f"layers {first!r} and {layer.name!r} read one input and share a router, so "
                    f"their numbers of experts must be equal; got {experts[first]} and "
                    f"{experts[layer.name]}."
                )


@dataclass(frozen=True, eq=False)
class ExpandedLayer:
    """One layer that was expanded."""

    layer: Layer
    """The dense layer."""
    module: ExpandedLinear
    """What takes its place."""
    experts: Experts | None
    """What its experts lost; None for a layer that was read from a checkpoint."""
    packed: Packed | None = None
    """Its experts as they are stored, without the bias; None where they were read."""


def structural_copy(module: nn.Module) -> nn.Module:
    """Copy a model's modules but not its tensors, so that layers can be replaced in the copy.

    A ``forward`` that was set on a module, and that holds modules of the model, holds those of the
    copy.
    """
    release(module)
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    copied = copy.deepcopy(module, memo)
    for one in copied.modules():
        if isinstance(one.__dict__.get("forward"), FunctionType):
            one.__dict__["forward"] = _with_copies(one.__dict__["forward"], memo)
    return copied


def _with_copies(value: Any, memo: Mapping[int, Any]) -> Any:
    """Return a function with its closure's modules, functions and methods those of the copy."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _with_copies(value.__self__, memo))
    if not isinstance(value, FunctionType) or value.__closure__ is None:
        return value
    cells = [CellType(_with_copies(cell.cell_contents, memo)) for cell in value.__closure__]
    made = FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = value.__kwdefaults__
    return made


def check_own_modules(layers: Iterable[Layer]) -> None:
    """Raise `InvalidInput` for a layer whose module is also used elsewhere in the model.

    Its experts would be fitted on what it receives at one of these places only.
    """
    for layer in layers:
        if layer.aliases:
            raise InvalidInput(
                f"layer {layer.name!r} is also used as {layer.aliases[0]!r}, so that it cannot "
                "have experts of its own; leave it out, or give both places modules of their own."
            )


def build_blocks(
    module: nn.Module,
    plan: Plan,
    streams: Sequence[HiddenStates],
    *,
    memory: int | ByteBudget,
    finished: Callable[[int], Sequence[ExpandedLayer] | None],
    done: Callable[[int, Sequence[ExpandedLayer]], None],
    writer: Callable[[int], int] = lambda _block: 0,
) -> BlockRunner:
    """Replace the planned layers of ``module``, one block after the other.

    Parameters
    ----------
    module
        The model; its layers are replaced in place (see `structural_copy`).
    plan
        Which layers, and how.
    streams
        Hidden states that follow the build. The first is the calibration set, whose inputs to the
        block's dense layers the experts are fitted on; it goes no further than the last of them,
        and is closed there.
    memory
        Bytes for the recorded inputs of one block, or a budget shared with the streams.
    finished
        Gives the layers of a block that an earlier run has built, or None.
    done
        Called with the index and the layers of each block, after all streams have passed it.
    writer
        Gives the rank that packs and reports a block's experts.

    Returns
    -------
    BlockRunner
        The model's blocks, to leave the last one with (`BlockRunner.leave`).
    """
    runner = BlockRunner(module)
    planned = [layer for layers in plan.layers.values() for layer in layers]
    check_own_modules(planned)
    made = 0
    habits = look_at(module, planned, streams[0].first) if planned else {}
    for stream in streams:
        stream.enter(runner)
    for index in range(runner.n_blocks):
        layers = plan.layers.get(index, ())
        expanded = finished(index) if layers else ()
        if expanded is None:
            expanded = _expand_block(
                runner, streams[0], index, layers, plan, memory, habits, writer(index)
            )
        for one in expanded:
            put_layer(module, one.layer.name, one.module)
        for stream in streams if index < plan.last else streams[1:]:
            stream.advance(runner, index)
        for one in expanded:
            one.module.routing.forget()
        made += len(expanded)
        done(index, expanded)
    if planned and not made:
        raise InvalidInput(
            f"none of {len(planned)} layers, such as {planned[0].name!r}, sees a token in a "
            "forward pass; give a model that runs its layers as modules."
        )
    return runner


def _expand_block(
    runner: BlockRunner,
    calibration: HiddenStates,
    index: int,
    layers: Sequence[Layer],
    plan: Plan,
    memory: int | ByteBudget,
    habits: Mapping[str, Habits],
    writer: int,
) -> list[ExpandedLayer]:
    """Expand the layers of one block; the last one closes the calibration stream."""
    expanded: list[ExpandedLayer] = []

    def replay(recorder: Recorder) -> None:
        for _ in calibration.run(runner, index, recorder):
            pass

    with ExitStack() as stack:
        groups = record_inputs(
            layers, replay, memory=memory, stack=stack, passes=calibration.pass_tokens,
            habits=habits, named=plan.named,
        )  # fmt: skip
        if index == plan.last:
            calibration.close()
        groups = share_inputs(current(), groups, layers, budget=as_budget(memory), stack=stack)
        if not plan.named:  # experts of a mixture that see fewer tokens than clusters stay
            wanted = plan.experts
            groups = [(own, one) for own, one in groups if one.n_tokens >= wanted[own[0].name]]
        ready = _prepared(groups, plan)
        # The largest record first: it goes before there are many experts beside it.
        for number in sorted(range(len(groups)), key=lambda i: -groups[i][1].n_bytes):
            members, store = groups[number]
            expanded += _naming(members, _expand_group, members, store, plan, ready[number], writer)
            give_back()
    order = {layer.name: i for i, layer in enumerate(layers)}
    expanded.sort(key=lambda one: order[one.layer.name])
    return [_packed(one, plan.storage, writer) for one in expanded]


def _packed(one: ExpandedLayer, storage: Storage, writer: int) -> ExpandedLayer:
    """Pack a layer's experts for the rank that reports them, where that is not done."""
    if one.packed is not None:
        return one
    dense, weight = one.layer.weight, one.module.weight
    return replace(one, packed=share_packing(current(), storage, dense, weight, to=writer))


@dataclass(eq=False)
class _Prepared:
    """What is known of one input before its experts are solved."""

    in_parts: bool
    """Whether its clusters are solved without all their grams at once, on all ranks."""
    fits: int = 0
    """The rank that fits the router."""
    sums: int = 0
    """The rank that sums the gram of all tokens, where it is another."""
    fitted: Fitted | None = None
    gram: Tensor | None = None


def _prepared(groups: Sequence[tuple[list[Layer], TokenStore]], plan: Plan) -> list[_Prepared]:
    """Fit this rank's part of the routers; where another does, sum the gram meanwhile."""
    ranks, found = current(), list[_Prepared]()
    for number, (members, store) in enumerate(groups):
        large = _is_large(plan.experts[members[0].name], members[0], store)
        in_parts = all(ranks.exchange(_lies_on_gpu(store) or large))
        found.append(_Prepared(in_parts, number % ranks.size, (number + 1) % ranks.size))
    for one, (members, store) in zip(found, groups, strict=True):
        device = members[0].device
        if one.fits == ranks.rank:
            k = plan.experts[members[0].name]
            one.fitted = _naming(members, plan.settings.fit, store, k, device)
        elif one.sums == ranks.rank and one.in_parts:
            one.gram = _naming(members, whole_gram, store, device)
    return found


def record_inputs(
    layers: Sequence[Layer],
    run: Callable[[Recorder], None],
    *,
    memory: int | ByteBudget,
    stack: ExitStack,
    passes: Sequence[int],
    habits: Mapping[str, Habits],
    named: bool = True,
) -> list[tuple[list[Layer], TokenStore]]:
    """Record what layers of a block receive; neighbours with one input share a record.

    Parameters
    ----------
    layers
        Layers to watch.
    run
        Called once; runs the block with the recorder that it receives.
    memory
        Bytes for the records, or a budget shared with others; what is beyond spills (`TokenStore`).
    stack
        Closes the records when it is closed.
    passes
        Tokens of each pass, for `TokenStore.reserve`.
    habits
        From `entangle.recording.hooks.look_at`.
    named
        Whether the layers were asked for by name. If not, those that see no token are left out.

    Returns
    -------
    list of (layers, record)
        Every distinct input, (tokens, in_features), with the layers that read it, in the order in
        which they ran.

    Raises
    ------
    InvalidInput
        If a layer sees no token, or does something else than to multiply by its weight.
    """
    budget, stores = as_budget(memory), dict[int, TokenStore]()

    def keep(found: Recorded) -> None:
        if found.source not in stores:
            stores[found.source] = stack.enter_context(TokenStore(budget))
            stores[found.source].reserve(passes, found.inputs)
        if found.leads:
            stores[found.source].append(found.inputs)

    recorder = Recorder(layers, keep, affine="pruning", lenient=not named, habits=habits)
    run(recorder)
    alone = current().size == 1
    if alone and named and layers:
        recorder.check_all_seen()
    recorder.check_sources()
    if not alone:
        recorder.join(current(), seen=named and bool(layers))
    return [(own, stores[source]) for source, own in enumerate(recorder.sources)]


def _naming(layers: Sequence[Layer], work: Callable[..., Made], *given: object) -> Made:
    """Do some work on layers; an error names them."""
    try:
        return work(*given)
    except (InvalidInput, NumericalError) as error:
        raise type(error)(f"{', '.join(layer.name for layer in layers)}: {error}") from error


def _expand_group(
    layers: Sequence[Layer],
    store: TokenStore,
    plan: Plan,
    ready: _Prepared,
    writer: int = 0,
) -> list[ExpandedLayer]:
    """Solve experts of some layers for the clusters of their common input."""
    ranks = current()
    device, k = layers[0].device, plan.experts[layers[0].name]
    router, labels = share_router(
        ranks, ready.fitted, by=ready.fits, tokens=store.n_tokens, device=device
    )
    sparsity = [plan.sparsity[layer.name] for layer in layers]
    most = max(1, _GRAM_NUMBERS_GPU // layers[0].in_features)
    at_once = by_device(device, cpu=_GRAM_TOKENS, gpu=min(PASS_TOKENS_GPU, most))
    if ready.in_parts:
        if labels is None:
            blocks = store.blocks(PASS_TOKENS_GPU)
            labels = torch.cat([router.route(rows.to(device)) for _, rows in blocks])
        run = clusters_at_once(layers, store.n_bytes, plan.settings, k)
        shares = cluster_shares(k, len(layers), ranks, at_once=run)
        totals = share_totals(ranks, layers, ready.gram, labels, k, by=ready.sums)
        ready.gram = None
        solved = solve_shares(ranks, layers, store, labels, sparsity, plan.settings, shares, totals)
        store.close()
    else:
        shares = cluster_shares(k, len(layers), ranks, at_once=k)
        split = shares[0] if ranks.size > 1 and k >= ranks.size else ()
        grams, _ = cluster_grams(store, router, device, at_once=at_once, shares=split)
        store.close()
        solved = [
            solve_experts(layer, grams, share, plan.settings, clusters=own[ranks.rank])
            if len(own[ranks.rank])
            else None
            for layer, share, own in zip(layers, sparsity, shares, strict=True)
        ]
    routing = SharedRouting(router)
    made = []
    for layer, part, own in zip(layers, solved, shares, strict=True):
        experts = join_experts(ranks, layer, part, own)
        packed, weight = None, experts.weight
        writes = ranks.rank == writer
        if plan.storage.rounds(weight.dtype):  # else when the records are gone (`_packed`)
            packed, weight = plan.storage.pack(layer.weight, weight)
        module = ExpandedLinear(weight, layer.bias, routing)
        made.append(ExpandedLayer(layer, module, experts if writes else None, packed))
    return made


def _is_large(k: int, layer: Layer, store: TokenStore) -> bool:
    """Tell whether the grams of all clusters are too much for RAM at once, but not the record."""
    return not store.in_file and k > 1 and 4 * k * layer.in_features**2 > _GRAM_BYTES


def _lies_on_gpu(store: TokenStore) -> bool:
    """Tell whether all rows of a record are on one GPU, or in RAM where that had no room."""
    if store.in_file or store.device.type != "cuda":
        return False
    return all(rows.device in (store.device, _RAM) for rows in store.chunks())
