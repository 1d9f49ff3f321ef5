"""`prune`: a model with zeros in its weights, written as an ordinary Hugging Face folder.

The same build as an expansion's with one expert; in the end every layer has a plain weight again.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from entangle.allocation.allocation import Allocation
from entangle.errors import InvalidInput
from entangle.experts.block_files import disk_refusals
from entangle.experts.build import Allocated, ExpandedLayer, structural_copy
from entangle.experts.checkpoint import BuildFolder
from entangle.experts.expand import Expansion, build
from entangle.experts.folder import INDEX, STREAMED_BYTES
from entangle.experts.linear import ExpandedLinear, SharedRouting
from entangle.experts.router import fit_router
from entangle.models.blocks import evaluates
from entangle.models.layers import (
    DEFAULT_PROJ,
    Layer,
    LayerSpec,
    Projections,
    find_blocks,
    find_layers,
    layer_specs,
    list_layers,
    projections,
)
from entangle.models.loading import AnyModel, LanguageModel, as_language_model, load_model
from entangle.models.mixtures import ExpertLinear
from entangle.models.pretrained import quiet
from entangle.models.shards import present
from entangle.models.streaming import is_streamed
from entangle.results.expansion import PruneReport, read_run, write_run
from entangle.runs.places import check_room
from entangle.runs.provenance import claims_out, output_folder, write_json
from entangle.texts.given import Source


@dataclass(frozen=True, eq=False)
class Pruned(Expansion):
    """A pruned model and what it cost."""

    model: LanguageModel
    """The pruned model: the dense one's class, with plain weights that hold zeros."""

    @property
    def report(self) -> PruneReport:
        """What it cost, without the model: as it is loaded from its folder."""
        return PruneReport(self.layers, self.manifest, self.run)


@claims_out
@evaluates
def prune(
    model: AnyModel,
    calibration: Source,
    *,
    sparsity: float | None = 0.7,
    pattern: str = "row",
    pruner: str = "sparsegpt",
    layers: LayerSpec = "all",
    proj: Projections = DEFAULT_PROJ,
    allocation: Allocated | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    damping: float = 0.01,
    seed: int = 0,
    memory: int | None = None,
    evaluation: Source | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    extra: Callable[[Pruned, Path], object] | None = None,
    progress: bool | None = None,
) -> Pruned:
    """Prune a model; what is written is an ordinary model that any tool reads.

    Block by block, on the hidden states that come out of the blocks already pruned, as
    `entangle.expand` with one expert does. `entangle.expand` with ``experts=1`` writes the same
    weights packed.

    Parameters
    ----------
    model
        As in `entangle.expand`; left unchanged. The pruned model shares all tensors that were not
        pruned.
    calibration
        Text that the weights are pruned on, as in `entangle.expand`.
    sparsity
        Share of zeros in [0, 1]; None with an n:m pattern of numbers, such as ``2:4``. With 0 and
        ``bits`` the weights are only quantised.
    pattern, pruner, bits, group_size, damping
        As in `entangle.pruning.prune` (``pruner`` is its ``method``).
    layers, proj
        As in `entangle.expand`; they must have plain weights of their own.
    allocation
        As in `entangle.expand`; numbers of experts do not count.
    seed
        Seed of random pruning.
    memory, evaluation
        As in `entangle.expand`.
    out
        Folder of the model: configuration, weights in their own dtype with the zeros in place,
        tokenizer, and beside them ``manifest.json``, ``layers.parquet`` and ``run.json``.
        transformers reads it, as does `entangle.load_model`; only these three are ours.
    resume, force
        As in `entangle.expand`.
    extra
        Called with the result and its folder, before that takes the name ``out``, to add files.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If a setting is out of range or does not fit the model, or the model is no transformers one
        and ``out`` is given.
    NumericalError
        If activations are not finite or a gram cannot be factorised; the message names the layer.
    """
    dense = as_language_model(model)
    layers, proj = layer_specs(layers), projections(proj)
    _check_plain(dense, find_layers(dense.module, layers, proj), written=out is not None)
    if isinstance(allocation, Allocation):
        allocation = replace(allocation, experts=None)

    if out is not None and not Path(os.fspath(out)).exists():  # what is there may be resumed
        weights = dense.module.parameters()
        check_room(out, sum(one.numel() * one.element_size() for one in weights))
    streams = is_streamed(dense.module) and out is not None  # written from the blocks' files
    chosen = find_layers(dense.module, layers, proj) if streams else ()
    for layer in chosen:
        if isinstance(layer.module, ExpertLinear):
            raise InvalidInput(
                f"{layer.name!r} is part of an expert, which cannot be written while the model is "
                "streamed; load it whole (stream=False), or leave its experts out."
            )

    def write(expansion: Expansion, folder: Path) -> None:
        if streams:
            pruned = _written(expansion, folder)
        else:
            pruned = _pruned(dense, expansion, out)
            _save(pruned.model, folder)
        if extra is not None:
            extra(pruned, folder)

    expansion = build(
        dense, calibration, experts=1, sparsity=sparsity, pattern=pattern, pruner=pruner,
        layers=layers, proj=proj, allocation=allocation, router="single", restarts=1, bits=bits,
        group_size=group_size, damping=damping, format="bitmap", values=None, seed=seed,
        memory=memory, evaluation=evaluation, out=out, keep=not streams, resume=resume, force=force,
        extra=write, progress=progress, folders=PrunedFolder,
    )  # fmt: skip
    return (
        _written(expansion, Path(os.fspath(out)))
        if streams and out
        else _pruned(dense, expansion, out)
    )


def _check_plain(dense: LanguageModel, layers: Sequence[Layer], *, written: bool) -> None:
    for layer in layers:
        layer.check_writable("pruning")
        if layer.offloaded:
            raise InvalidInput(
                f"layer {layer.name!r} lies outside memory (device_map), where it cannot be "
                "pruned; load the model on one device."
            )
    if written and not hasattr(dense.module, "save_pretrained"):
        raise InvalidInput(
            f"only a model of transformers can be written; {type(dense.module).__name__} has no "
            "save_pretrained: leave `out` out."
        )


def _pruned(
    dense: LanguageModel, expansion: Expansion, out: str | os.PathLike[str] | None
) -> Pruned:
    assert expansion.model is not None  # noqa: S101 - it is kept
    module = plain_module(dense.module, expansion.model.module)
    name, source = (dense.name, "memory") if out is None else (os.fspath(out), "folder")
    model = LanguageModel(module, dense.tokenizer, name, source, None)
    manifest = {**expansion.manifest, "kind": PruneReport.KIND}
    return Pruned(**vars(expansion) | {"model": model, "manifest": manifest})


def _written(expansion: Expansion, folder: Path) -> Pruned:
    """Return what was pruned of a model larger than memory, which is streamed as well."""
    model = load_model(folder, stream=True)
    manifest = {**expansion.manifest, "kind": PruneReport.KIND}
    return Pruned(**vars(expansion) | {"model": model, "manifest": manifest})


def plain_module(dense: nn.Module, expanded: nn.Module) -> nn.Module:
    """Return the dense model with the weights of a build with one expert.

    Parameters
    ----------
    dense
        Not changed; the tensors of all other layers are shared.
    expanded
        The same model, with an `ExpandedLinear` of one expert in place of some layers.
    """
    copied = structural_copy(dense)
    layers, own = {layer.name: layer for layer in list_layers(copied)}, set[int]()
    for name, module in expanded.named_modules():
        if isinstance(module, ExpandedLinear):
            layer, weight = layers[name], module.weight.detach()[0]
            if isinstance(layer.module, ExpertLinear):
                stack = layer.module.stack
                if id(stack.stored) not in own:
                    stack.make_own()
                    own.add(id(stack.stored))
                layer.weight.copy_(weight)
                continue
            stored = weight.T.contiguous() if layer.transposed else weight
            layer.module.register_parameter("weight", nn.Parameter(stored, requires_grad=False))
    return copied


def _save_streamed(
    dense: LanguageModel, pruned: Callable[[int], Mapping[str, Tensor]], folder: Path
) -> None:
    """Write a model that is larger than memory, some tensors at a time.

    ``pruned(block)`` gives the weights of a block that are not the dense ones, by parameter name.
    """
    module: Any = dense.module
    state = remove_tied_weights_from_state_dict(module.state_dict(keep_vars=True), module)
    blocks = re.compile(rf"{re.escape(find_blocks(module)[0])}\.(\d+)\.")
    index, shard, size, total, last = dict[str, str](), dict[str, Tensor](), 0, 0, -1
    own: Mapping[str, Tensor] = {}
    with quiet(), disk_refusals():
        for number, (name, tensor) in enumerate(state.items(), 1):
            found = blocks.match(name)
            block = -1 if found is None else int(found[1])
            if block != last:
                own, last = {} if block < 0 else pruned(block), block
            shard[name] = own[name] if name in own else present(tensor).detach().cpu().contiguous()
            size += shard[name].nbytes
            if size > STREAMED_BYTES or number == len(state):
                file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
                save_file(shard, folder / file, {"format": "pt"})
                index |= dict.fromkeys(shard, file)
                total, size, shard = total + size, 0, {}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(folder)
        if module.can_generate():
            module.generation_config.save_pretrained(folder)
        if dense.tokenizer is not None:
            dense.tokenizer.save_pretrained(folder)


def _save(model: LanguageModel, folder: Path) -> None:
    """Write model and tokenizer as transformers does."""
    module: Any = model.module
    try:
        with quiet(), disk_refusals():
            module.save_pretrained(folder)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"transformers cannot write the pruned model: {error}") from error


class PrunedFolder(BuildFolder):
    """Where a pruned model is written: block by block, and in the end as a whole."""

    def __init__(
        self, final: Path, manifest: Mapping[str, object], *, resume: bool, force: bool
    ) -> None:
        super().__init__(final, {**manifest, "kind": PruneReport.KIND}, resume=resume, force=force)

    def read(
        self, index: int, layers: Sequence[Layer]
    ) -> tuple[list[ExpandedLayer], list[dict[str, object]]] | None:
        """Read a block that an earlier run has written, or None."""
        if not self._finished:
            return super().read(index, layers)
        weights, table = self._made_before
        rows = table[table["layer"].isin([layer.name for layer in layers])]
        return [
            _expanded(layer, weights[layer.name])
            for layer in layers
            if layer.name in set(rows["layer"])
        ], [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]

    @cached_property
    def _made_before(self) -> tuple[Mapping[str, Tensor], pd.DataFrame]:
        """Weights and report of a finished model, whose files are what was written."""
        report = PruneReport.load(self.path)
        module = load_model(str(self.path), device="cpu").module
        return {layer.name: layer.weight for layer in list_layers(module)}, report.layers

    def _weights(self, dense: LanguageModel, table: pd.DataFrame, block: int) -> dict[str, Tensor]:
        """Return the pruned weights of a block as they were written, by parameter name."""
        made = set(table["layer"])
        layers = [one for one in list_layers(dense.module) if one.block == block]
        found = super().read(block, [one for one in layers if one.name in made])
        weights = {}
        for one in () if found is None else found[0]:
            weight = one.module.weight.detach()[0].cpu()
            stored = weight.T if one.layer.transposed else weight
            weights[f"{one.layer.name}.weight"] = stored.contiguous()
        return weights

    def finish(
        self,
        table: pd.DataFrame,
        manifest: Mapping[str, object],
        run: Mapping[str, object],
        *,
        dense: LanguageModel,
        extra: Callable[[Path], object] | None = None,
    ) -> Mapping[str, object]:
        """Write the report, and the model (``extra``), and take the final name."""
        if self._finished:
            return read_run(self.path) or run
        with output_folder(self.final, force=self._force) as folder:
            table.to_parquet(folder / "layers.parquet", index=False)
            write_json(folder / "manifest.json", {**manifest, "kind": PruneReport.KIND})
            write_run(folder, run)
            if is_streamed(dense.module):
                _save_streamed(dense, partial(self._weights, dense, table), folder)
            if extra is not None:
                extra(folder)
        self._unfinished.remove()
        return run


def _expanded(layer: Layer, weight: Tensor) -> ExpandedLayer:
    """Return a layer with one expert."""
    router = fit_router([torch.zeros(1, layer.in_features)], 1, kind="single", seed=0)
    weight = weight.to(layer.device, layer.weight.dtype)[None].contiguous()
    routing = SharedRouting(router.to(layer.device))
    return ExpandedLayer(layer, ExpandedLinear(weight, layer.bias, routing), None)
