"""`expand`: replace the MLP linears of a model by routed sparse experts.

What an expansion costs and loses: one row a layer, and sums over the model.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from entangle.doors import brought
from entangle.errors import InvalidInput, MemoryLimit
from entangle.evaluation import EvaluationText, Perplexity, as_evaluation
from entangle.evaluation.perplexity import windows_by_default
from entangle.experts.block_files import distinct_routers
from entangle.experts.build import (
    Allocated,
    ExpandedLayer,
    Plan,
    build_blocks,
    check_shared,
    describe_allocation,
    planned_experts,
    planned_pattern,
    planned_sparsity,
    structural_copy,
)
from entangle.experts.checkpoint import BlockWriters, BuildFolder, refuse_saving
from entangle.experts.router import ROUTERS, Kind
from entangle.experts.solver import ExpertSettings, Sparsity, check_solvable
from entangle.experts.spread import share_built
from entangle.experts.storage import Storage
from entangle.memory import check_memory, memory_for, refuse_beyond
from entangle.models.blocks import evaluates
from entangle.models.layers import (
    DEFAULT_PROJ,
    Layer,
    LayerSpec,
    Projections,
    asked_by_name,
    find_blocks,
    find_layers,
    layer_specs,
    list_fused_experts,
    list_layers,
    projections,
)
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.models.mixtures import put_layer
from entangle.pruning import PRUNERS
from entangle.ranks import current
from entangle.recording.groups import shared_inputs
from entangle.recording.states import HiddenStates
from entangle.recording.stream import ByteBudget
from entangle.results.expansion import KIND, ExpansionReport, costs_to_write
from entangle.runs.places import check_room
from entangle.runs.progress import Progress, ProgressBar
from entangle.runs.provenance import RunClock, agree_on, claims_out, expand_user, make_manifest
from entangle.runs.unfinished import PLANNED
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source


def block_rows(expanded: Sequence[ExpandedLayer]) -> list[dict[str, object]]:
    """Return the row of every layer of a block: see `layer_row`."""
    routers = distinct_routers(expanded)
    return [layer_row(one, router=routers.index(one.module.routing)) for one in expanded]


def layer_row(expanded: ExpandedLayer, *, router: int) -> dict[str, object]:
    """Return one layer's row: sparsity, error, damping, clusters, and costs beside the dense ones.

    ``sparsity`` is the share that was pruned; where weights are quantised, more may round to zero,
    and ``nonzeros`` counts what is stored. ``relative_error`` is the squared output error over the
    calibration tokens divided by that of a zero output. ``flops`` are multiplications and additions
    for a token of average cluster; ``router_flops`` those of the router's product with its k
    directions. ``bytes`` are what the checkpoint stores of the experts; ``router_bytes`` what it
    stores of the router as it runs: mean, directions and offsets, or the keys of the random
    control. The layers of a block with one number ``router`` share it, and its costs are in the row
    of each of them.

    Parameters
    ----------
    expanded
        A layer that was built, not read.
    router
        Number of its router within the block.
    """
    layer, module, experts = expanded.layer, expanded.module, expanded.experts
    packed = expanded.packed
    assert experts is not None  # noqa: S101
    assert packed is not None  # noqa: S101
    k, rows, columns = module.weight.shape
    nonzeros = int(module.weight.count_nonzero())
    fitted = module.routing.router
    statistics = fitted.statistics
    width = module.weight.element_size()
    kept = (module.weight != 0).sum((1, 2)).double().cpu()
    share = experts.tokens.double().cpu() / max(1, int(experts.tokens.sum()))
    return {
        "layer": layer.name,
        "block": layer.block,
        "projection": layer.projection,
        "experts": k,
        "sparsity": experts.realised_sparsity,
        "relative_error": float(experts.squared_error.sum()) / max(experts.energy, 1e-300),
        "damping": float(experts.damping.max()),
        "smallest_cluster": int(experts.tokens.min()),
        "largest_cluster": int(experts.tokens.max()),
        "effective_clusters": statistics.effective_clusters,
        "explained_variance": float(statistics.explained_variance.sum()),
        "inertia": statistics.inertia,
        "shrunk": experts.shrunk,
        "nonzeros": nonzeros,
        "bytes": sum(tensor.nbytes for tensor in packed.tensors.values()),
        "flops": 2 * float((kept * share).sum()),
        "router": router,
        "router_flops": 2 * columns * k if fitted.centroids.shape[1] else 0,
        "router_bytes": fitted.stored_bytes,
        "dense_weights": rows * columns,
        "dense_bytes": rows * columns * width,
    }


def model_costs(module: nn.Module, rows: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Return costs of the whole model as multiples of the dense one's.

    Counted are all linear layers, the head included: ``flops`` for a token, stored ``nonzeros`` of
    the weights, and stored ``bytes`` (bitmaps included). Routers are included in flops and bytes,
    once for layers that share one. Of a mixture all experts are stored, and as many as a token is
    sent to are active: the flops of each count by its `Layer.share`, and are NaN where that is. All
    are NaN of a model with experts that cannot be addressed (`list_fused_experts`): it is not known
    what they cost, and they may be most of it.

    Parameters
    ----------
    module
        The dense model.
    rows
        From `block_rows`.
    """
    table = pd.DataFrame(list(rows))
    width = next(module.parameters()).element_size()
    layers = list_layers(module)
    dense = sum(math.prod(layer.shape) for layer in layers)
    if table.empty:
        return {"flops": 1.0, "nonzeros": 1.0, "bytes": 1.0}
    if any("experts" in fused.name.split(".") for fused in list_fused_experts(module)):
        return dict.fromkeys(("flops", "nonzeros", "bytes"), math.nan)
    share = table["layer"].map({layer.name: layer.share for layer in layers})
    others = dense - int(table["dense_weights"].sum())
    active = sum(math.prod(layer.shape) * layer.share for layer in layers)
    still = active - float((table["dense_weights"] * share).sum())
    shared = table.assign(router_flops=table["router_flops"] * share)
    routers = shared.drop_duplicates(["block", "router"])[["router_flops", "router_bytes"]].sum()
    flops = float((table["flops"] * share).sum() + routers["router_flops"])
    stored = float(table["bytes"].sum() + routers["router_bytes"])
    return {
        "flops": (2 * still + flops) / (2 * active),
        "nonzeros": (others + float(table["nonzeros"].sum())) / dense,
        "bytes": (others * width + stored) / (dense * width),
    }


_PROBE = 4  # tokens that show which layers read one input


@dataclass(frozen=True, eq=False)
class Expansion:
    """An expanded model and what it cost."""

    model: LanguageModel | None
    """The expanded model; None if its experts were dropped after they were written. Its module
    cannot ``save_pretrained``, which knows no routers: checkpoints are written with ``out``."""
    layers: pd.DataFrame
    """One row a layer, from `entangle.experts.expand.block_rows`."""
    costs: Mapping[str, float]
    """Multiples of the dense model: flops, nonzeros, bytes."""
    perplexity: Perplexity | None
    """On the evaluation text, if one was given."""
    manifest: Mapping[str, object]
    """Model, calibration set, settings, versions."""
    run: Mapping[str, object]
    """Seconds and peak memory of the process that built it."""

    @property
    def report(self) -> ExpansionReport:
        """What it cost, without the model: as it is loaded from the folder of a checkpoint."""
        return ExpansionReport(self.layers, self.manifest, self.run)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


@claims_out
@evaluates
def expand(
    model: AnyModel,
    calibration: Source,
    *,
    experts: int = 16,
    sparsity: float | None = 0.7,
    pattern: str = "row",
    pruner: str = "sparsegpt",
    layers: LayerSpec = "all",
    proj: Projections = DEFAULT_PROJ,
    allocation: Allocated | None = None,
    router: Kind = "kmeans",
    restarts: int = 10,
    bits: int | None = None,
    group_size: int | None = None,
    damping: float = 0.01,
    format: str = "bitmap",  # noqa: A002 - the word that the file's config has
    values: str | None = None,
    seed: int = 0,
    memory: int | None = None,
    evaluation: Source | None = None,
    out: str | os.PathLike[str] | None = None,
    keep: bool = True,
    resume: bool = False,
    force: bool = False,
    extra: Callable[[Expansion, Path], object] | None = None,
    progress: bool | None = None,
) -> Expansion:
    """Expand a model: one router and k sparse experts in place of each chosen linear layer.

    Block by block, on the hidden states that come out of the already expanded blocks, the inputs of
    the block's dense layers are recorded, a router (PCA and k-means) is fitted on each distinct
    input, and every layer's own dense weight is pruned once for each cluster with that cluster's
    gram matrix.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Left unchanged; the expanded model shares all tensors that were not
        replaced.
    calibration
        Text that the routers and experts are fitted on: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings.
    experts
        Experts (clusters) a layer; 1 is plain pruning.
    sparsity
        Share of zeros in [0, 1]; None with an n:m pattern of numbers, such as ``2:4``.
    pattern, pruner, bits, group_size, damping
        As in `entangle.pruning.prune` (``pruner`` is its ``method``).
    layers, proj
        Layers to expand, as in `entangle.models.layers.find_layers`; the MLP linears by default.
    allocation
        In place of ``sparsity``: an `entangle.allocation.Allocation` for these layers of this
        model, whose number of zeros every row of every expert gets exactly, in groups if it was
        made for n:m, and whose numbers of experts, if it has any, replace ``experts``; or
        sparsities by layer name, for all rows or one value a row.
    router
        ``kmeans``, or the controls ``random`` (clusters without meaning) and ``single``.
    restarts
        k-means seedings, of which the best is kept.
    format
        How experts are stored: ``bitmap``; ``delta``, as exact and faster on GPUs, slow on CPUs; or
        ``n16`` for a pattern of n of 16 weights, such as ``5:16`` (`entangle.packed.formats`).
    values
        How their values are stored: ``bfloat16``, ``float16`` or ``float32``; by default as the
        model's (float32 of a float64 model), or with at most 8 ``bits`` the codes of the
        quantisation grid, in 4 or 8 bits. Later blocks see what is stored.
    seed
        Seed of the routers and of random pruning.
    memory
        Bytes for hidden states and recorded inputs, half of what is free on the model's device by
        default; what is beyond spills (`entangle.recording.stream.TokenStore`).
    evaluation
        Text (from `entangle.load_evaluation`, or what that takes) whose hidden states follow the
        build, so that the perplexity is known at its end even if the experts do not fit into
        memory.
    out
        Folder of the checkpoint, which `entangle.load_expanded` loads and, for a model from
        transformers, ``from_pretrained``. Blocks are written as they are made.
    keep
        Whether to keep the experts in memory; with ``out`` they need not be.
    resume
        Go on with an unfinished build of the same settings in ``out``.
    force
        Replace an existing checkpoint, or an unfinished build.
    extra
        Called with the expansion and its folder, before that takes the name ``out``, to add files.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If a setting is out of range or does not fit the model.
    NumericalError
        If activations are not finite or a gram cannot be factorised; the message names the layer.

    References
    ----------
    arXiv 2405.15756, algorithms A1 and A2.
    """
    return build(
        model, calibration, experts=experts, sparsity=sparsity, pattern=pattern, pruner=pruner,
        layers=layers, proj=proj, allocation=allocation, router=router, restarts=restarts,
        bits=bits, group_size=group_size, damping=damping, format=format, values=values, seed=seed,
        memory=memory, evaluation=evaluation, out=out, keep=keep, resume=resume, force=force,
        extra=extra, progress=progress, folders=BuildFolder,
    )  # fmt: skip


def build(
    model: AnyModel,
    calibration: Source,
    *,
    experts: int,
    sparsity: float | None,
    pattern: str,
    pruner: str,
    layers: LayerSpec,
    proj: Projections,
    allocation: Allocated | None,
    router: Kind,
    restarts: int,
    bits: int | None,
    group_size: int | None,
    damping: float,
    format: str,  # noqa: A002
    values: str | None,
    seed: int,
    memory: int | None,
    evaluation: Source | None,
    out: str | os.PathLike[str] | None,
    keep: bool,
    resume: bool,
    force: bool,
    extra: Callable[[Expansion, Path], object] | None,
    progress: bool | None,
    folders: type[BuildFolder],
) -> Expansion:
    """Do what `expand` does; ``folders`` is how ``out`` is written."""
    clock = RunClock()
    check_memory(memory)
    settings = ExpertSettings(
        router=router, restarts=restarts, seed=seed, pruner=pruner,
        pattern=planned_pattern(allocation, pattern), bits=bits, group_size=group_size,
        damping=damping,
    )  # fmt: skip
    storage = Storage(format, values, settings.bits, settings.pattern, settings.group_size)
    proj = projections(proj)
    layers = layer_specs(layers)
    dense = as_language_model(model)
    calibration = as_calibration(calibration, dense)
    text = None if evaluation is None else as_evaluation(evaluation, dense)
    memory = memory_for(memory, dense.module)
    copied = structural_copy(dense.module)
    chosen = find_layers(copied, layers, proj)
    if "mlp" in (proj or ()):
        _refuse_fused(copied, chosen)
    counts = planned_experts(chosen, allocation, experts, tokens=calibration.n_tokens)
    sparsities = planned_sparsity(
        chosen, allocation, sparsity=sparsity, pattern=pattern, digest=dense.digest
    )
    plan = _plan(
        chosen, named=asked_by_name(layers, chosen), experts=counts, sparsity=sparsities,
        settings=settings, storage=storage,
    )  # fmt: skip
    _check_room(plan, sparsities, out=out, keep=keep)
    if len(set(counts.values())) > 1:
        check_shared(
            shared_inputs(copied, chosen, calibration.rows.sequence(0)[None, :_PROBE]), counts
        )
    manifest = make_manifest(
        KIND,
        model=_describe_model(dense),
        calibration=calibration.describe(),
        evaluation=None if text is None else text.describe(),
        settings=_settings(plan) | describe_allocation(allocation),
    )
    command = manifest.pop("command")
    agree_on(**{name: manifest[name] for name in PLANNED})
    folder, ranks = None, current()
    if out is not None and ranks.rank == 0:  # which writes for all
        folder = folders(Path(out), manifest, resume=resume, force=force)
    sink = _Sink(plan, folder, copied, keep=keep)
    budget = ByteBudget(memory)
    streams = _streams(calibration, text, dense.vocab_size, budget)
    with ProgressBar("expanding", enabled=progress) as bar, _memory_limit():
        bar.start(len(find_blocks(copied)[1]), "blocks")
        runner = build_blocks(
            copied, plan, streams, memory=budget, finished=sink.finished,
            done=lambda index, expanded: sink.done(index, expanded, bar),
            writer=sink.writers.of,
        )  # fmt: skip
        sink.writers.finish()
        perplexity = None
        if text is not None:
            losses = [torch.zeros(0, dtype=torch.float64)]
            for ids, h in streams[1]:
                losses.append(text.losses_in_parts(runner.leave_in_parts(h, ids), ids))
            perplexity = Perplexity.of(ranks.joined(torch.cat(losses)), text)
    costs = model_costs(dense.module, sink.rows)
    table = pd.DataFrame(sink.rows)
    made = {row["layer"] for row in sink.rows}
    silent = [layer.name for layer in chosen if layer.name not in made]
    manifest |= {
        "costs": costs_to_write(costs), **_describe_perplexity(perplexity),
        "layers_without_tokens": silent,
    }  # fmt: skip
    refuse_saving(copied)
    expanded = LanguageModel(copied, dense.tokenizer, dense.name, "expansion", dense.revision)
    result = Expansion(
        expanded if sink.keep else None, table, costs, perplexity, manifest, clock.read(memory)
    )
    if folder is None:
        return result
    del streams, runner  # what is added may need as much memory
    result = replace(result, run={"command": command, **result.run})
    add = None if extra is None else partial(extra, result)
    return replace(result, run=folder.finish(table, manifest, result.run, dense=dense, extra=add))


def _check_room(
    plan: Plan,
    sparsity: Mapping[str, Sparsity],
    *,
    out: str | os.PathLike[str] | None,
    keep: bool,
) -> None:
    """Refuse experts that memory, or the disk, certainly has no room for."""
    held, written = [], 0.0
    for layers in plan.layers.values():
        sizes = [plan.experts[one.name] * math.prod(one.shape) for one in layers]
        held.append(
            sum(n * one.weight.element_size() for n, one in zip(sizes, layers, strict=True))
        )
        for n, one in zip(sizes, layers, strict=True):
            share = sparsity[one.name]
            kept = 0.0 if share is None else 1 - float(torch.as_tensor(share).double().mean())
            bits = plan.settings.bits
            width = one.weight.element_size() if bits is None else bits / 8
            written += n * kept * width + (0 if share is None else n / 8)
    if out is not None:
        check_room(out, int(written))
    refuse_beyond(
        sum(held) if keep else max(held, default=0), next(iter(plan.layers.values()))[0].device,
        what="holding the experts",
        remedy="ask for fewer --experts (experts), or keep them on the disk alone (keep=False)",
    )  # fmt: skip


def _streams(
    calibration: CalibrationSet,
    evaluation: EvaluationText | None,
    vocab_size: int,
    budget: ByteBudget,
) -> list[HiddenStates]:
    """Return the hidden states that follow the build."""
    streams = [HiddenStates([ids for _, ids in calibration.batches()], memory=budget)]
    if evaluation is not None:
        batch = windows_by_default(evaluation.seq_len, vocab_size)
        streams.append(
            HiddenStates([ids for _, ids in evaluation.rows.batches(batch)], memory=budget)
        )
    return streams


class _Sink:
    """Takes finished blocks: notes their report, writes them, and drops them if so asked."""

    def __init__(
        self, plan: Plan, folder: BuildFolder | None, module: nn.Module, *, keep: bool
    ) -> None:
        self.rows: list[dict[str, object]] = []
        self.keep = keep
        self._plan, self._folder, self._module = plan, folder, module
        self._read: list[dict[str, object]] = []
        self._builds = False
        self.writers = BlockWriters(folder)

    def finished(self, index: int) -> Sequence[ExpandedLayer] | None:
        """Return what an earlier run has made of a block, or None; the first rank reads it."""
        found, layers, ranks = None, self._plan.layers[index], current()
        if self._folder is not None:
            found = self._folder.read(index, layers)
        self._read = [] if found is None else found[1]
        if ranks.size == 1:
            self._builds = found is None
            return None if found is None else found[0]
        own = None if found is None else [(one.layer, one.module) for one in found[0]]
        shared = share_built(ranks, own, layers)
        self._builds = shared is None
        return None if shared is None else [ExpandedLayer(*one, None) for one in shared]

    def done(self, index: int, expanded: Sequence[ExpandedLayer], bar: Progress) -> None:
        """Take over the layers of a block."""
        made = [one for one in expanded if one.experts is not None]
        rows = block_rows(made) if made else self._read if expanded else []
        if current().size > 1:
            rows = current().exchange(rows)[self.writers.of(index) if self._builds else 0]
        self.rows += rows
        if self._builds and expanded:
            self.writers.write(index, made, rows)
        self._builds = False
        for one in () if self.keep else expanded:
            put_layer(self._module, one.layer.name, one.layer.module)
        if current().rank == 0:
            bar.advance()


def _plan(
    layers: Sequence[Layer],
    *,
    named: bool,
    experts: Mapping[str, int],
    sparsity: Mapping[str, Sparsity],
    settings: ExpertSettings,
    storage: Storage,
) -> Plan:
    by_block: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.block is None:
            raise InvalidInput(f"layer {layer.name!r} lies outside the blocks; leave it out.")
        by_block.setdefault(layer.block, []).append(layer)
        check_solvable(layer, sparsity[layer.name], settings)
    if set(experts.values()) == {1}:
        settings = replace(settings, router="single")
    return Plan(by_block, sparsity, experts, named, settings, storage)


def _refuse_fused(module: nn.Module, chosen: Sequence[Layer]) -> None:
    """Raise where the feed-forward part of a chosen block is a mixture held in one parameter."""
    blocks = {layer.block for layer in chosen}
    for fused in list_fused_experts(module):
        if fused.block in blocks and "experts" in fused.name.split("."):
            raise InvalidInput(
                f"the mixture {fused.name!r} holds its experts in {fused.why}, which cannot be "
                "expanded; name the linear layers to expand (layers=…, proj=None)."
            )


def _settings(plan: Plan) -> dict[str, object]:
    """Describe a plan for the manifest; vectors of sparsities by their digest."""
    counts = set(plan.experts.values())
    plugins = brought(ROUTERS, [plan.settings.router]) | brought(PRUNERS, [plan.settings.pruner])
    return {
        "sparsity": {name: _describe_sparsity(share) for name, share in plan.sparsity.items()},
        "experts": counts.pop() if len(counts) == 1 else dict(plan.experts),
        **asdict(plan.settings),
        **({"plugins": plugins} if plugins else {}),
        "format": plan.storage.format,
        "values": plan.storage.values,
    }


def _describe_perplexity(perplexity: Perplexity | None) -> dict[str, object]:
    """Describe a perplexity for the manifest: NaN and infinity, which JSON lacks, by their flag."""
    if perplexity is None:
        return {"perplexity": None}
    finite = None if perplexity.flag else perplexity.value
    return {"perplexity": finite, "perplexity_flag": perplexity.flag}


def _describe_model(model: LanguageModel) -> dict[str, object]:
    """Describe a model for the manifest, with the place of one that is not known by its name."""
    if model.source not in ("folder", "gguf"):
        return model.describe()
    return model.describe() | {"path": os.path.realpath(expand_user(model.name))}


def _describe_sparsity(share: Sparsity) -> object:
    if not isinstance(share, Tensor):
        return share
    values = share.detach().cpu().double().contiguous()
    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return {"mean": float(values.mean()), "rows": values.numel(), "sha256": digest}


@contextmanager
def _memory_limit() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryLimit(
            "memory ran out while expanding; lower --experts (experts), --n-seq or --memory "
            "(memory), or drop the experts as they are written (keep=False)."
        ) from error
