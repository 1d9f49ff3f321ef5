"""Exact scoring: record a layer's inputs once, recompute its outputs some neurons at a time."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from entangle.kernels import exact
from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, on_gpu
from entangle.memory import WORK_BYTES, by_device, give_back, gpus_among, work_bytes
from entangle.models.layers import Layer
from entangle.models.streaming import comes_by_blocks
from entangle.precision import exact_in_half, full_precision, multiply, row_parts
from entangle.recording.recorder import Batch, Recorded, Recorder, told
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.scoring.layer_scores import (
    LayerSummary,
    MeasuredLayer,
    how_many,
    mapped,
    summarise,
    weight_norms,
)
from entangle.stats.bins import fetched
from entangle.stats.mapping_difficulty import MappingDifficulty, TokenPairs, draw_pairs
from entangle.stats.rows import measure_rows
from entangle.stats.sketch import OutputSketch, SketchResult
from entangle.stats.wasserstein import (
    FeatureSizes,
    OutputError,
    ShapeStatistics,
    output_error,
    reach,
    shape_statistics,
)

_LOG = logging.getLogger(__name__)

_BLOCK_TOKENS = 8192
_BLOCK_TOKENS_GPU = 2**15
_WORK_BYTES_GPU = 2**33
_JOINED_BYTES_GPU = 2**33
_BYTES_AN_OUTPUT = 16  # of which the outputs themselves take 8


@dataclass(eq=False)
class RecordedInputs:
    """Inputs that one or several layers received, and where each group of sequences lies."""

    store: TokenStore
    outputs: dict[str, TokenStore] = field(default_factory=dict)
    """The outputs, by layer name, of layers that do not multiply by their weight."""
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    """(group, first token, token after the last), in order."""

    _pairs: dict[torch.device, TokenPairs] = field(default_factory=dict, init=False)
    _sizes: FeatureSizes | None = field(default=None, init=False)
    _drawing: Lock = field(default_factory=Lock, init=False)

    def pairs(self, *, seed: int, device: torch.device) -> TokenPairs:
        """Return pairs of the tokens, for outputs on a device; the same ones every time."""
        with self._drawing:  # layers that share the inputs may ask at the same time
            if device not in self._pairs:
                drawn = _drawn(self.store.n_tokens, seed, device)
                distance = _input_distance(self.store, drawn)
                self._pairs[device] = TokenPairs.of(drawn, distance, device=device)
            return self._pairs[device]

    def sizes(self) -> FeatureSizes:
        """Return the sizes of the inputs; measured once."""
        with self._drawing:
            if self._sizes is None:
                self._sizes = FeatureSizes.of(rows for _, rows in self.store.blocks(_BLOCK_TOKENS))
            return self._sizes

    def add(self, group: int, rows: Float[Tensor, "tokens features"]) -> None:
        """Append the rows of a pass."""
        start = self.store.n_tokens
        self.store.append(rows)
        if self.spans and self.spans[-1][0] == group:
            start = self.spans.pop()[1]
        self.spans.append((group, start, self.store.n_tokens))


def score_exact(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    *,
    n_groups: int,
    md: bool,
    seed: int,
    memory: int,
    report: Callable[[int], None],
    watch: Callable[[Recorded], None] | None = None,
    may_be_silent: bool = False,
    whole: bool = True,
) -> tuple[list[LayerSummary], Recorder]:
    """Score layers from all their outputs; arguments as in `entangle.scoring.score.score`.

    The outputs are computed from the inputs in float32, but for layers that do something else than
    to multiply by their weight, whose own outputs are recorded beside the inputs.

    ``memory`` (bytes) holds recorded inputs, which spill beyond it (`TokenStore`), but for what the
    outputs of the neurons take that are worked on: 1 GiB, 8 GiB on a GPU, at most a half. ``whole``
    is that of `Recorder.run`.
    """
    found: dict[str, LayerSummary] = {}
    with full_precision():
        batches, at_once = list(batches), how_many(layers)
        work_space = work_bytes(memory, WORK_BYTES if at_once == 1 else _WORK_BYTES_GPU)
        budget = ByteBudget(memory - work_space)
        passes, watched = [ids.numel() for _, ids in batches], told(batches, report)
        here = comes_by_blocks(module)

        def work(layer: Layer, one: RecordedInputs) -> LayerSummary:
            share = work_space // at_once
            measured = _score_layer(layer, one, n_groups=n_groups, md=md, seed=seed, memory=share)
            summary = summarise(measured, weight_norms(layer).cpu() if here else None)
            give_back()
            return summary

        def score(recorded: Mapping[str, RecordedInputs], own: Sequence[Layer]) -> None:
            heard = [layer for layer in own if layer.name in recorded]
            if md and at_once > 1:  # to wait for each of them would keep a thread from work
                for layer in heard:
                    recorded[layer.name].pairs(seed=seed, device=layer.device)
            made = mapped(lambda one: work(one, recorded[one.name]), heard, at_once=at_once)
            for layer, summary in zip(heard, made, strict=True):
                found[layer.name] = summary
                report(1)

        recorder = _record(
            module, layers, watched, budget, watch, may_be_silent, passes, whole, score
        )
    return [found[layer.name] for layer in layers if layer.name in found], recorder


def _record(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    budget: ByteBudget,
    watch: Callable[[Recorded], None] | None,
    may_be_silent: bool,
    passes: Sequence[int],
    whole: bool,
    done: Callable[[Mapping[str, RecordedInputs], Sequence[Layer]], None],
) -> Recorder:
    """Record the inputs of each layer; neighbours with the same input tensor share a record.

    ``passes`` gives the tokens of each batch; ``done`` is called with the records of some layers
    and these layers, and the records are closed.
    """
    recorded: dict[str, RecordedInputs] = {}
    by_source: dict[int, RecordedInputs] = {}
    stack = ExitStack()

    def keep(found: Recorded) -> None:
        if watch is not None:
            watch(found)
        name = found.layer.name
        if found.leads and found.source not in by_source:
            store = stack.enter_context(TokenStore(budget))
            store.reserve(passes, found.inputs)
            by_source[found.source] = RecordedInputs(store)
        one = recorded.setdefault(name, by_source[found.source])
        if found.leads:
            one.add(found.group, found.inputs)
        if not found.affine:
            if name not in one.outputs:
                one.outputs[name] = stack.enter_context(TokenStore(budget))
            one.outputs[name].append(found.outputs)

    def after(own: Sequence[Layer]) -> None:
        recorder.check_sources()
        give_back()
        done(recorded, own)
        stack.close()
        recorded.clear()

    recorder = Recorder(layers, keep, lenient=may_be_silent)
    with stack:
        recorder.run(module, batches, memory=budget, after=after, whole=whole)
    return recorder


def _score_layer(
    layer: Layer, inputs: RecordedInputs, *, n_groups: int, md: bool, seed: int, memory: int
) -> MeasuredLayer:
    store = inputs.store
    pairs = inputs.pairs(seed=seed, device=layer.device) if md else None
    parts: list[_Measured] = []
    neurons = memory // (_BYTES_AN_OUTPUT * store.n_tokens)
    observed = inputs.outputs.get(layer.name)
    weight, bias = (None, None) if observed is not None else (layer.weight, layer.bias)
    for part in row_parts(layer.out_features, neurons):
        if weight is None:
            assert observed is not None  # noqa: S101
            outputs = _columns(observed, part, layer.device)
        else:
            outputs = _outputs(weight, bias, store, part)
        parts.append(_measured(outputs, inputs.spans, pairs, n_groups=n_groups))
    shape = _joined([part.shape for part in parts])
    sketch = _joined([part.sketch for part in parts])
    differences = [part.pairs for part in parts if part.pairs is not None]
    return MeasuredLayer(
        layer=layer,
        shape=shape,
        sketch=sketch,
        pairs=_joined(differences) if differences else None,
        wd_bound=torch.zeros_like(shape.wd).masked_fill(shape.wd.isnan(), torch.nan),
        method="exact",
        rounding=_rounding(layer, inputs, shape, sketch),
    )


def _rounding(
    layer: Layer, inputs: RecordedInputs, shape: ShapeStatistics, sketch: SketchResult
) -> OutputError:
    """Return how far the outputs that were measured are rounded."""
    observed = inputs.outputs.get(layer.name)
    if observed is not None:  # how they were computed is not known
        return output_error(
            shape.mean, shape.std, sketch.location, reach=torch.zeros_like(shape.mean),
            in_features=layer.in_features, dtype=observed.dtype,
        )  # fmt: skip
    return output_error(
        shape.mean, shape.std, sketch.location,
        reach=reach(layer.weight, inputs.sizes().rms()),
        in_features=layer.in_features,
        dtype=torch.float32,
        bias=None if layer.bias is None else layer.bias.cpu().double(),
    )  # fmt: skip


class _Measured(NamedTuple):
    """What was measured of some neurons' outputs, on the CPU."""

    shape: ShapeStatistics
    sketch: SketchResult
    pairs: MappingDifficulty | None


def _measured_at_once(
    outputs: Tensor, spans: Sequence[tuple[int, int, int]], pairs: TokenPairs | None, n_groups: int
) -> _Measured:
    """Do what `_measured` does; the GPU is waited for once."""
    difference = None if pairs is None else pairs.difficulty(outputs)
    bounds = [0, *(end for _, _, end in spans)]
    rows, difference = fetched(measure_rows(outputs, bounds), difference)
    shape, sketch = rows.results(outputs)
    without = sketch.wd_without.new_full((n_groups, len(outputs)), torch.nan)
    without[[group for group, _, _ in spans]] = sketch.wd_without
    return _Measured(shape, replace(sketch, wd_without=without), difference)


def _fits(outputs: Tensor, spans: Sequence[tuple[int, int, int]], _pairs: object, **_: int) -> bool:
    return exact.fits(outputs, groups=len(spans))


@dispatch(_measured_at_once, where=_fits)
def _measured(
    outputs: Tensor, spans: Sequence[tuple[int, int, int]], pairs: TokenPairs | None, n_groups: int
) -> _Measured:
    """Measure outputs of shape (neurons, tokens), whose groups of sequences are ``spans``."""
    difference = None if pairs is None else pairs.difficulty(outputs)
    sketch = OutputSketch(outputs.shape[0], n_groups=n_groups)
    by_token = _by_token(outputs)
    for group, first, end in spans:
        sketch.update(by_token[first:end], group=group)
    shape, difference = fetched(shape_statistics(outputs), difference)
    return _Measured(shape, sketch.result(distances=False), difference)


@dispatch(lambda outputs: outputs.t().contiguous(), where=on_gpu)
def _by_token(outputs: Tensor) -> Tensor:
    """Return outputs by token: on the CPU as they lie, on a GPU as kernels want them."""
    return outputs.t()


def _columns(store: TokenStore, part: slice, device: torch.device) -> Tensor:
    """Return the recorded outputs of some neurons, float32, shape (neurons, tokens)."""
    found = [rows[:, part].to(device).float().T for _, rows in store.blocks(_BLOCK_TOKENS)]
    return torch.cat(found, dim=1)


def _outputs(dense: Tensor, all_bias: Tensor | None, store: TokenStore, part: slice) -> Tensor:
    """Compute the outputs of some neurons on all tokens, float32, shape (neurons, tokens).

    Products of 16-bit numbers are exact in float32, so a GPU multiplies those of 16-bit weights
    and inputs as they are.
    """
    weight = dense[part]
    as_is = exact_in_half(weight.dtype, weight.device) and store.dtype == weight.dtype
    factor = weight if as_is else weight.float()
    bias = None if all_bias is None else all_bias[part, None].float()
    outputs = torch.empty(weight.shape[0], store.n_tokens, device=weight.device)
    at_once = by_device(weight.device, cpu=_BLOCK_TOKENS, gpu=_BLOCK_TOKENS_GPU)
    for start, rows in _inputs(store, at_once, whole=as_is):
        rows, target = rows.to(weight.device), outputs[:, start : start + rows.shape[0]]
        if not as_is:
            multiply(factor, rows.float(), out=target)
        elif target.is_contiguous():
            torch.mm(factor, rows.T, out_dtype=torch.float32, out=target)
        else:
            target.copy_(torch.mm(factor, rows.T, out_dtype=torch.float32))
        if bias is not None:
            target += bias
    return outputs


def _inputs(store: TokenStore, at_once: int, *, whole: bool) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first token, inputs) in order: if ``whole``, all at once on a GPU."""
    tokens = _joined_rows(store) if whole else None
    if tokens is not None:
        yield 0, tokens
    else:
        yield from store.blocks(at_once)


@lru_cache(maxsize=4)
def _drawn(n_tokens: int, seed: int, device: torch.device) -> Tensor:
    """Draw the pairs of all layers with so many tokens, where their outputs are."""
    return draw_pairs(n_tokens, seed=seed).to(device)


def _joined_rows(store: TokenStore) -> Tensor | None:
    """Return a record as one tensor if a GPU holds it, and has room for it twice for a moment."""
    held = store.in_memory and gpus_among([store.device])
    if not held or store.n_bytes > _JOINED_BYTES_GPU:
        return None
    try:
        return store.joined()
    except torch.OutOfMemoryError:
        _LOG.warning("GPU memory ran out: inputs of %d tokens are read in blocks", store.n_tokens)
        return None


def _distance_at_once(store: TokenStore, pairs: Tensor) -> Tensor:
    tokens = store.joined()
    first, second = pairs.to(tokens.device)
    return kernels.row_distances(tokens[first], tokens[second])


def _is_joined(store: TokenStore, _pairs: Tensor) -> bool:
    tokens = _joined_rows(store)
    return tokens is not None and tokens.is_contiguous() and kernels.fits(tokens, 1)


@dispatch(_distance_at_once, where=_is_joined)
def _input_distance(store: TokenStore, pairs: Tensor) -> Tensor:
    """Return ‖x_a − x_b‖₂ of every pair, float32, shape (pairs,)."""
    parts = pairs.split(_BLOCK_TOKENS, dim=1)
    return torch.cat(
        [(store.take(a).float() - store.take(b).float()).norm(dim=1).cpu() for a, b in parts]
    )


Part = TypeVar("Part", ShapeStatistics, SketchResult, MappingDifficulty)


def _joined(parts: Sequence[Part]) -> Part:
    """Join the results of chunks of neurons along the neurons."""
    first = parts[0]
    if len(parts) == 1:
        return first
    joined = {}
    for f in fields(first):
        values = [getattr(part, f.name) for part in parts]
        if isinstance(values[0], ShapeStatistics):
            joined[f.name] = _joined(values)
        elif isinstance(values[0], Tensor):
            axis = 1 if f.name in ("wd_halves", "wd_without") else 0
            joined[f.name] = torch.cat(values, dim=axis)
        else:
            joined[f.name] = values[0]
    return replace(first, **joined)
