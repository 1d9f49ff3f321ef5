"""A model whose blocks come from their shards one at a time, and go again.

The module is an ordinary one without weights (on the meta device). A block is brought when its
``forward`` is called, stays until another one is, and the next one is read beside the work. Large
parts outside the blocks, such as the head, are brought for each call; of the token embedding only
the rows that are looked up. What runs the model block by block over hidden states reads each shard
once; a whole forward pass reads all of them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import core_model_loading as loading
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils.loading_report import LoadStateDictInfo

from entangle.errors import InvalidInput
from entangle.models.layers import find_blocks
from entangle.models.shards import (
    Recipe,
    Shards,
    StoredWeight,
    absent,
    brought,
    read_weights,
    stored_of,
)

_SMALL = 2**24
"""Bytes of a part outside the blocks up to which it is kept."""
_SEEN = 64
"""Inputs, at least, that a linear sees in a rehearsal."""
_KEPT = "entangle_source"  # attribute of a streamed module

Weights = Mapping[str, Tensor]
"""Values of a part's parameters, by their name inside the part."""


class BlockSource:
    """Brings the weights of a streamed model's parts, and takes them away.

    Parameters
    ----------
    blocks
        The blocks, in the order in which they run.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._place = {id(block): index for index, block in enumerate(self._blocks)}
        self._current: nn.Module | None = None
        self._installed: list[tuple[nn.Module, str, StoredWeight, int]] = []
        self._ready: dict[int, Future[Weights]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="entangle-shards")
        self._rehearsal: dict[object, Weights] | None = None
        self._short: dict[int, Tensor] = {}
        """Some columns of the weights of a rehearsal, by address."""
        self._held: list[tuple[nn.Module, str, StoredWeight, int]] = []
        self._keeps = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockSource":
        """Return a source of its own for the copied blocks."""
        copied = memo[id(self)] = BlockSource([])
        copied._blocks = [deepcopy(block, memo) for block in self._blocks]
        copied._place = {id(block): index for index, block in enumerate(copied._blocks)}
        return copied

    @property
    def is_rehearsing(self) -> bool:
        """Whether all blocks run with the weights of one."""
        return self._rehearsal is not None

    @contextmanager
    def bringing(self, part: nn.Module) -> Iterator[None]:
        """Have a part's weights there inside the ``with`` block; a block's stay after it."""
        index = self._place.get(id(part))
        if index is None:
            yield from self._bringing_other(part)
        elif self._rehearsal is not None:
            installed = _install(part, self._example(part, index))
            try:
                with self._shortened(part):
                    yield
            finally:
                _remove(installed)
        else:
            self._bring(part, index)
            yield

    def release(self) -> None:
        """Take all weights away that were brought."""
        _remove(self._installed)
        _remove(self._held)
        self._installed, self._held, self._current = [], [], None
        for waiting in self._ready.values():
            waiting.cancel()
        self._ready.clear()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep the parts outside the blocks, once they were brought, inside the ``with`` block."""
        before, self._keeps = self._keeps, True
        try:
            yield
        finally:
            self._keeps = before
            if not before and self._rehearsal is None:
                _remove(self._held)
                self._held = []

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Run all blocks of one build with the weights of the first of them, read once.

        For what depends on how a model runs its parts, not on their weights: wide linears see a few
        of their inputs alone, as a pass over few tokens would else read all weights for nothing.
        """
        if self._rehearsal is not None:
            yield
            return
        self._leave_current()
        self._rehearsal = {}
        try:
            yield
        finally:
            self._rehearsal = None
            self._short.clear()
            _remove(self._held)
            self._held = []

    @contextmanager
    def _shortened(self, part: nn.Module) -> Iterator[None]:
        """Let wide linears of a part see some of their inputs only, evenly spaced ones."""
        changed = [
            one for one in part.modules()
            if type(one) is nn.Linear and "forward" not in one.__dict__
            and one.in_features >= 2 * _SEEN and not one.weight.is_meta
        ]  # fmt: skip
        for one in changed:
            step, key = one.in_features // _SEEN, one.weight.data_ptr()
            if key not in self._short:
                self._short[key] = one.weight[:, ::step].contiguous()
            one.__dict__["forward"] = partial(_of_some, self._short[key], one.bias, step)
        try:
            yield
        finally:
            for one in changed:
                del one.__dict__["forward"]

    def _bring(self, block: nn.Module, index: int) -> None:
        """Make a block the current one, and have the next one read."""
        stale = any(stored.version != version for _, _, stored, version in self._installed)
        if self._current is block and not stale:
            return
        self._leave_current()
        waiting = self._ready.pop(index, None)
        for other in self._ready.values():
            other.cancel()
        self._ready.clear()
        self._installed = _install(
            block, self._read(block) if waiting is None else waiting.result()
        )
        self._current = block
        if index + 1 < len(self._blocks):
            following = self._blocks[index + 1]
            self._ready[index + 1] = self._pool.submit(self._read, following)

    def _leave_current(self) -> None:
        _remove(self._installed)
        self._installed, self._current = [], None

    def _bringing_other(self, part: nn.Module) -> Iterator[None]:
        """Bring a part outside the blocks for one call, or for as long as such parts are kept."""
        installed = _install(part, self._read(part))
        kept = self._keeps or self._rehearsal is not None
        if kept:
            self._held += installed
        try:
            yield
        finally:
            if not kept:
                _remove(installed)

    def _example(self, block: nn.Module, index: int) -> Weights:
        """Return the weights of the first block with parameters like this one's."""
        assert self._rehearsal is not None  # noqa: S101
        alike = tuple((name, tuple(p.shape), p.dtype) for name, p in _missing(block).items())
        if alike not in self._rehearsal:
            waiting = self._ready.get(index)
            if waiting is None:
                waiting = Future()
                waiting.set_result(self._read(block))
                if index == 0:  # the first that will be asked for
                    self._ready[index] = waiting
            self._rehearsal[alike] = waiting.result()
        return self._rehearsal[alike]

    @staticmethod
    def _read(part: nn.Module) -> Weights:
        missing = _missing(part)
        stored = {name: stored_of(parameter) for name, parameter in missing.items()}
        found = read_weights(one for one in stored.values() if one is not None)
        return {name: found[one] for name, one in stored.items() if one is not None}


def _of_some(weight: Tensor, bias: Tensor | None, step: int, x: Tensor) -> Tensor:
    return nn.functional.linear(x[..., ::step], weight, bias)


def _missing(part: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a part that are to be brought, by name."""
    return {
        name: parameter
        for name, parameter in part.named_parameters()
        if parameter.is_meta and stored_of(parameter) is not None
    }


def _install(part: nn.Module, weights: Weights) -> list[tuple[nn.Module, str, StoredWeight, int]]:
    """Put values in the place of parameters; return what was replaced."""
    installed = []
    for name, parameter in _missing(part).items():
        stored = stored_of(parameter)
        assert stored is not None  # noqa: S101
        path, _, key = name.rpartition(".")
        owner, values = part.get_submodule(path), weights[name]
        if stored.overlays:
            values = stored.overlaid(values.clone())
        owner._parameters[key] = brought(stored, values)
        installed.append((owner, key, stored, stored.version))
    return installed


def _remove(installed: Sequence[tuple[nn.Module, str, StoredWeight, int]]) -> None:
    for owner, key, stored, _ in installed:
        there = owner._parameters.get(key)
        if there is not None and stored_of(there) is stored:
            owner._parameters[key] = absent(stored, there)


class _Brought:
    """The ``forward`` of a part that is brought when it runs."""

    def __init__(self, part: nn.Module, source: BlockSource) -> None:
        self.part, self.source = part, source

    def __call__(self, *args: object, **kwargs: object) -> object:
        with self.source.bringing(self.part):
            return type(self.part).forward(self.part, *args, **kwargs)


class _LookedUp(_Brought):
    """The ``forward`` of a token embedding, of which only the rows that are asked for are read.

    An embedding with a ``forward`` of its own is believed to look up and nothing more of the ids
    once the rows alone gave what the whole table gives.
    """

    def __init__(self, part: nn.Module, source: BlockSource) -> None:
        super().__init__(part, source)
        self.believed = True if type(part).forward is nn.Embedding.forward else None

    def __call__(self, *args: object, **kwargs: object) -> object:
        found = self._by_rows(args[0]) if len(args) == 1 and not kwargs else None
        if found is not None and self.believed:
            return found
        whole = super().__call__(*args, **kwargs)
        if found is not None and self.believed is None:
            self.believed = isinstance(whole, Tensor) and torch.equal(whole, found)
        return whole

    def _by_rows(self, ids: object) -> Tensor | None:
        """Look up in the rows that are asked for; None where they cannot be had alone."""
        table = self.part._parameters["weight"]
        stored = stored_of(table)
        if table is None or stored is None or not table.is_meta or not isinstance(ids, Tensor):
            return None
        known, place = ids.unique(return_inverse=True)
        inside = known.numel() and int(known[0]) >= 0 and int(known[-1]) < table.shape[0]
        rows = stored.rows(known.cpu()) if inside and self.believed is not False else None
        if rows is None:  # what is out of range, the embedding itself refuses
            return None
        self.part._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        padding: Any = (
            self.part.padding_idx
        )  # a row that may not be among these, only for gradients
        self.part.padding_idx = None  # type: ignore[assignment]
        try:
            found = type(self.part).forward(self.part, place.to(rows.device))
        finally:
            self.part._parameters["weight"], self.part.padding_idx = table, padding
        return found if isinstance(found, Tensor) else None


def source_of(module: nn.Module) -> BlockSource | None:
    """Return what brings a module's weights; None for one whose weights are there."""
    found = module.__dict__.get(_KEPT)
    return found if isinstance(found, BlockSource) else None


def is_streamed(module: nn.Module) -> bool:
    """Tell whether a module's weights come block by block."""
    return source_of(module) is not None


def comes_by_blocks(module: nn.Module) -> bool:
    """Tell whether a whole forward pass would read all shards, so that blocks are to be walked."""
    source = source_of(module)
    return source is not None and not source.is_rehearsing


def release(module: nn.Module) -> None:
    """Take away what was brought of a streamed module's weights; nothing otherwise."""
    source = source_of(module)
    if source is not None:
        source.release()


@contextmanager
def kept_outside(module: nn.Module) -> Iterator[None]:
    """Keep what a streamed module brings outside its blocks, such as the head, meanwhile."""
    source = source_of(module)
    with nullcontext() if source is None else source.keeping():
        yield


@contextmanager
def rehearsing(module: nn.Module) -> Iterator[None]:
    """Run a streamed module's blocks with the weights of one inside the ``with`` block.

    For what depends on how a model runs, not on its weights. Other modules run as they are.
    """
    source = source_of(module)
    if source is None:
        yield
        return
    with source.rehearsing():
        yield


def open_streamed(
    auto: Any,
    config: hf.PreTrainedConfig,
    files: Sequence[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
) -> tuple[hf.PreTrainedModel, Mapping[str, Any]]:
    """Return a model whose blocks come from shards, and transformers' report of its weights.

    Names, conversions, dtypes, ties and buffers are those that transformers itself gives a model
    that it loads whole.

    Parameters
    ----------
    auto
        The class that builds it.
    config
        Of the model.
    files
        Its safetensors files.
    dtype
        Of the parameters.
    device
        Where it runs.
    folder
        Where it lies.

    Raises
    ------
    InvalidInput
        If a shard is damaged, or the model has no blocks.
    """
    config.name_or_path = str(folder)
    with torch.device("meta"), init.no_tie_weights(), init.meta_device_safe_creation_ops():
        model: hf.PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    shards = Shards(files)
    recipes, unexpected = _recipes(model, shards, dtype)
    stored = {
        name: StoredWeight(name, recipe, device) for name, recipe in _by_target(recipes).items()
    }
    report = _finish(model, stored, recipes, unexpected, device)
    _attach(model)
    model.eval()  # type: ignore[no-untyped-call]
    return model, vars(report)


def _recipes(
    model: hf.PreTrainedModel, shards: Shards, dtype: torch.dtype
) -> tuple[list[Recipe], set[str]]:
    """Return how every parameter is made, and stored names that no parameter has."""
    known = get_model_conversion_mapping(model)
    renamings = [one for one in known if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in known if isinstance(one, loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    made: dict[str, Recipe] = {}
    unexpected: set[str] = set()
    for name in sorted(shards.slabs, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = loading.rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            unexpected.add(target)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        kind = _dtype_of(model, target, wanted[target], dtype)
        recipe = made.setdefault(target, Recipe(shards, [], kind, target, converter, model))
        recipe.sources = [*recipe.sources, (name, pattern or name)]
    return list(made.values()), unexpected


def _dtype_of(
    model: hf.PreTrainedModel, name: str, empty: Tensor, dtype: torch.dtype
) -> torch.dtype:
    """Return the dtype that transformers gives a parameter: some models keep parts in float32."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    if plan:
        search, by_group, _ = loading.build_glob_alternation(list(plan))
        match = search.search(name)
        if match is not None and match.lastgroup is not None:
            return plan[by_group[match.lastgroup]]
    return empty.dtype


def _by_target(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Return the recipe of every parameter; a conversion may make several."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        names = [recipe.first] if recipe.converter is None else list(recipe.shapes())
        found |= dict.fromkeys(names, recipe)
    return found


def _finish(
    model: Any,
    stored: dict[str, StoredWeight],
    recipes: Sequence[Recipe],
    unexpected: set[str],
    device: torch.device,
) -> Any:
    """Give a model without weights its parameters in shards, its buffers and its ties."""
    shapes = {name: one for recipe in recipes for name, one in recipe.shapes().items()}
    wanted = model.state_dict(keep_vars=True)
    report: Any = LoadStateDictInfo(
        missing_keys=set(wanted) - set(stored), unexpected_keys=unexpected, mismatched_keys=set(),
        conversion_errors={}, error_msgs=[], skipped_pp_keys=set(),
    )  # fmt: skip
    for name in set(stored) - set(wanted):
        unexpected.add(name)
        del stored[name]
    _drop_equal(model, stored, report)
    for name, one in stored.items():
        like = shapes[name].to(one.recipe.dtype)
        if like.shape != wanted[name].shape:
            report.mismatched_keys.add((name, tuple(like.shape), tuple(wanted[name].shape)))
            continue
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        if key in owner._buffers:
            owner._buffers[key] = one.read()
        else:
            owner._parameters[key] = absent(one, like)
        getattr(owner, key)._is_hf_initialized = True
    _settle(model, report, device)
    return report


def _settle(model: Any, report: Any, device: torch.device) -> None:
    """Compute buffers that are not stored, tie, and leave out what may be missing."""
    model.mark_tied_weights_as_initialized(report)
    tied: set[str] = set(model.all_tied_weights_keys)
    lacking: set[str] = report.missing_and_mismatched() - tied
    large = [name for name in lacking if _n_bytes(model, name) > _SMALL]
    if not large:  # or it is refused for them
        model._move_missing_keys_from_meta_to_device(lacking, None, None, None)
        model._initialize_missing_keys(False)
        model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(report)
    for buffer_owner in model.modules():
        for key, buffer in buffer_owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffer_owner._buffers[key] = buffer.to(device)


def _n_bytes(model: Any, name: str) -> int:
    found: Tensor = model.get_parameter_or_buffer(name)
    return found.numel() * found.element_size()


def _drop_equal(model: Any, stored: dict[str, StoredWeight], report: LoadStateDictInfo) -> None:
    """Tie weights that are stored twice, as transformers does where their values are equal."""
    for target, source in model.all_tied_weights_keys.items():
        if target not in stored or source not in stored:
            continue
        first, second = stored[target], stored[source]
        if torch.equal(first.read(), second.read()):
            del stored[target]
            report.missing_keys.add(target)
        else:
            first.digest = second.digest = None


def _attach(model: nn.Module) -> None:
    """Let the parts of a model be brought when they run."""
    name, blocks = find_blocks(model)
    source = BlockSource(list(blocks))
    model.__dict__[_KEPT] = source
    for block in blocks:
        block.__dict__["forward"] = _Brought(block, source)
    getter = getattr(model, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    inside, kept = re.compile(rf"{re.escape(name)}\.\d"), dict[StoredWeight, nn.Parameter]()
    for path, part in model.named_modules():
        own = [p for p in part._parameters.values() if p is not None and stored_of(p) is not None]
        if not own or inside.match(path):
            continue
        large = sum(p.numel() * p.element_size() for p in own) > _SMALL
        if not large or next(part.children(), None) is not None:
            _keep(part, kept)
        elif part is table and isinstance(part, nn.Embedding) and part.max_norm is None:
            part.__dict__["forward"] = _LookedUp(part, source)
        else:
            part.__dict__["forward"] = _Brought(part, source)


def _keep(part: nn.Module, kept: dict[StoredWeight, nn.Parameter]) -> None:
    """Bring a part's own parameters for good; ``kept`` has those of the parts before it."""
    for key, parameter in list(part._parameters.items()):
        stored = stored_of(parameter)
        if parameter is not None and stored is not None and parameter.is_meta:
            if stored not in kept:
                kept[stored] = brought(stored, stored.read())
            part._parameters[key] = kept[stored]


def check_streamable(config: hf.PreTrainedConfig, auto: Any, folder: Path) -> None:
    """Raise `InvalidInput` for a model that cannot come block by block."""
    if auto is not hf.AutoModelForCausalLM:
        raise InvalidInput(
            f"only a causal language model can be streamed; {str(folder)!r} ({config.model_type}) "
            "is none: leave --stream (stream) out."
        )
