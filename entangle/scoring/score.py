"""Score the neurons of a model's layers.

Scoring by sketches: statistics of all layers from one pass, nothing recorded.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from entangle.checks import choice, whole
from entangle.errors import InvalidInput, MemoryLimit
from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, on_gpu
from entangle.memory import check_memory, memory_for
from entangle.models.blocks import evaluates
from entangle.models.layers import (
    DEFAULT_PROJ,
    Layer,
    LayerSpec,
    Projections,
    asked_by_name,
    find_layers,
    layer_specs,
)
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.precision import full_precision
from entangle.ranks import ALONE, Ranks, current
from entangle.recording.recorder import Batch, Recorded, Recorder
from entangle.results.scores import KIND, NeuronScores
from entangle.runs.progress import Progress, ProgressBar
from entangle.runs.provenance import RunClock, agree_on, make_manifest
from entangle.scoring.exact import score_exact
from entangle.scoring.layer_scores import (
    FinerOutputs,
    LayerSummary,
    MeasuredLayer,
    SharedSquares,
    how_many,
    layer_table,
    mapped,
    neuron_table,
    summarise,
)
from entangle.scoring.spread import LayerCounts, own_batches, share_places, share_summaries
from entangle.seeding import check_seed, numpy_rng
from entangle.stats.bins import Scratch
from entangle.stats.mapping_difficulty import MAX_PAIRS, PairSketch
from entangle.stats.sketch import OutputSketch
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs that join the two halves of a batch, both read from one of their tokens on."""

    starts: tuple[int, int]
    """The tokens of pair 0, counted from the start of their half; round the end of each half, the
    next pairs have the next ones."""
    distance: Tensor
    """Distance between the inputs of each pair, (pairs,)."""


def _add_at_once(rows: Tensor, sketch: PairSketch, pairs: _Pairs) -> None:
    sketch.update(*_halves(rows), pairs.distance, starts=pairs.starts)


@dispatch(_add_at_once, where=on_gpu)
def _add_pairs(rows: Tensor, sketch: PairSketch, pairs: _Pairs) -> None:
    """Add the rows (tokens, neurons) of both tokens of each pair."""
    first, second = _halves(rows)
    for one, two, own in _runs(first.shape[0], pairs.starts, pairs.distance.shape[0]):
        sketch.update(first[one], second[two], pairs.distance[own])


class _Pairing:
    """Draws the pairs of each batch.

    Token i of a batch's first half goes with token i + shift of its second half, counted round the
    end; the shift, and where to begin if not all tokens are paired, are drawn for every batch.
    Pairs are disjoint, and runs of tokens need not be gathered one by one.
    """

    def __init__(self, *, seed: int, share: float) -> None:
        self._seed, self._share, self._batch = seed, share, -1

    def next_batch(self, index: int | None = None) -> None:
        """Begin the next batch, or that of a number."""
        self._batch = self._batch + 1 if index is None else index

    def of(self, rows: Float[Tensor, "tokens features"]) -> _Pairs:
        """Return the pairs of the tokens that a layer received."""
        starts, count = self._drawn(rows.shape[0])
        return _Pairs(starts, _distances(*_halves(rows), starts=starts, n_pairs=count))

    def _drawn(self, n_tokens: int) -> tuple[tuple[int, int], int]:
        """Draw which tokens make pair 0, and return how many pairs there are."""
        half = n_tokens // 2
        count = min(half, round(half * self._share))
        if count == 0:
            return (0, 0), 0
        rng = numpy_rng(self._seed, "pairs", self._batch, n_tokens)
        start, shift = (int(value) for value in rng.integers(half, size=2))
        return (start, (start + shift) % half), count


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    half = rows.shape[0] // 2
    return rows[:half], rows[half : 2 * half]


def _runs(half: int, starts: tuple[int, int], count: int) -> list[tuple[slice, slice, slice]]:
    """Return runs of pairs in which neither half's end is passed: tokens of both, and pairs."""
    cuts = sorted({0, count, *(half - start for start in starts if half - start < count)})
    runs = []
    for low, high in pairwise(cuts):
        first, second = ((start + low) % half for start in starts)
        n = high - low
        runs.append((slice(first, first + n), slice(second, second + n), slice(low, high)))
    return runs


@dispatch(kernels.row_distances, where=kernels.fits_rows)
def _distances(first: Tensor, second: Tensor, starts: tuple[int, int], n_pairs: int) -> Tensor:
    """Return the Euclidean distances of pairs of rows, float32."""
    runs = _runs(first.shape[0], starts, n_pairs)
    parts = [(first[one].float() - second[two].float()).norm(dim=1) for one, two, _ in runs]
    return torch.cat(parts) if parts else torch.empty(0, device=first.device)


def score_sketched(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    *,
    n_groups: int,
    pair_share: float,
    seed: int,
    report: Callable[[int], None],
    watch: Callable[[Recorded], None] | None = None,
    may_be_silent: bool = False,
) -> tuple[list[LayerSummary], Recorder]:
    """Score layers in one pass over the batches.

    Parameters
    ----------
    module, layers, batches, n_groups, seed
        As in `entangle.scoring.exact.score_exact`.
    pair_share
        Share of each batch's tokens that is paired for the mapping difficulty; 0 leaves it out.
        A pair joins a token of the batch's first half with one of its second half.
    report
        Called with the number of sequences after each batch.
    watch
        Called with what every layer received and gave in every pass.
    may_be_silent
        Leave out layers that see no token instead of refusing them.
    """
    ranks = current() if watch is None else ALONE  # who watches sees all that is counted
    work, squares, split = Scratch(), SharedSquares(), ranks.size > 1
    counts = {
        layer.name: LayerCounts(
            OutputSketch(layer.out_features, n_groups=n_groups, scratch=work, split=split),
            PairSketch(layer.out_features, scratch=work, split=split),
            FinerOutputs(layer, squares, split=split),
        )
        for layer in layers
    }
    pairing, pairs = _Pairing(seed=seed, share=pair_share), dict[int, _Pairs]()
    batches = batches if ranks.size == 1 else list(batches)

    def update(seen: Recorded) -> None:
        if watch is not None:
            watch(seen)
        own = counts[seen.layer.name]
        rows = own.finer.of(seen.inputs, seen.outputs)
        own.outputs.update(rows, group=seen.group)
        if pair_share > 0:
            if seen.leads:  # what was found for other inputs is done with
                pairs.clear()
                pairs[seen.source] = pairing.of(seen.inputs)
            _add_pairs(rows, own.pairs, pairs[seen.source])

    def measure(layer: Layer) -> MeasuredLayer:
        own = counts[layer.name]
        found = own.outputs.result()
        return MeasuredLayer(
            layer=layer,
            shape=found.shape,
            sketch=found,
            pairs=own.pairs.result() if pair_share > 0 else None,
            wd_bound=found.wd_bound,
            method="sketch",
            rounding=own.finer.error(found.shape, found.location),
        )

    def counted(chosen: Sequence[Layer], *, first: bool) -> Recorder:
        """Run this rank's batches, after the first of all, which places the bins, if so asked."""
        compared = watch is not None  # who watches may read the weights
        recorder = Recorder(chosen, update, compared=compared, lenient=may_be_silent)

        def reported() -> Iterator[Batch]:
            for index, batch in own_batches(batches, ranks, first=first):
                pairing.next_batch(index)
                squares.forget()
                yield batch
                if index or ranks.rank == 0:
                    report(batch[1].shape[0] if first else 0)
                else:  # it is the first rank that counts the first batch
                    for own in counts.values():
                        own.placed_at(own.places())
                    recorder.tokens = dict.fromkeys(recorder.tokens, 0)

        recorder.run(module, reported(), whole=ranks.size == 1)
        return recorder

    with full_precision(), torch.no_grad():
        recorder = counted(layers, first=True)
        if ranks.size > 1:
            recorder.join(ranks)
            again = share_places(ranks, counts, layers)
            if again:
                counted(again, first=False)
        heard = [layer for layer in layers if recorder.tokens[layer.name]]
        for number, layer in enumerate(heard):
            counts[layer.name].pool(ranks, to=number % ranks.size)
        own = heard[ranks.rank :: ranks.size]
        PairSketch.settle(counts[layer.name].pairs for layer in own)
        at_once = how_many(own)
        if at_once > 1:
            found = list(mapped(lambda one: summarise(measure(one)), own, at_once=at_once))
            return share_summaries(ranks, found, layers), recorder
        measured = [measure(layer) for layer in own]
    with ThreadPoolExecutor() as pool:  # sorting, most of the work, lets threads run beside it
        return share_summaries(ranks, list(pool.map(summarise, measured)), layers), recorder


Method = Literal["auto", "exact", "sketch"]
SCORING_METHODS: tuple[Method, ...] = ("auto", "exact", "sketch")

AUTO_EXACT_BYTES = 2**30
"""Recorded inputs up to which ``auto`` is exact where no memory was asked for."""

EXACT_GROUPS, SKETCH_GROUPS = 16, 8


@evaluates
def score(
    model: AnyModel = "demo",
    calibration: Source = "demo",
    *,
    layers: LayerSpec = "all",
    proj: Projections = DEFAULT_PROJ,
    method: Method = "auto",
    md: bool = True,
    seed: int = 0,
    memory: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    watch: Callable[[Recorded], None] | None = None,
) -> NeuronScores:
    """Score every neuron of some layers: distance from a Gaussian, moments, mapping difficulty.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`.
    calibration
        A calibration set, or whatever else `entangle.load_calibration` takes, with its default
        settings: a name, a path, strings, token ids.
    layers, proj
        Layers to score, as in `entangle.models.layers.find_layers`. Those that see no token in a
        forward pass are left out, and named in the manifest, unless they were asked for by name.
    method
        ``exact`` records the layers' inputs and sorts every neuron's outputs; ``sketch`` measures
        all layers in one forward pass, in memory that does not grow with the tokens; ``auto`` is
        exact where the recorded inputs take at most 1 GiB, whatever the machine has, or half of
        ``memory`` if that is given. The manifest says which it was.
    md
        Whether to compute the mapping difficulty.
    seed
        Seed of the pairs of tokens.
    memory
        Bytes for recorded inputs and work space of the exact method (the model not counted); by
        default half of what is free on the model's device.
    batch_size
        Sequences in one forward pass; by default as many as make 4,096 tokens.
    progress
        Show a progress bar on standard error; by default if that is a terminal.
    watch
        Called with an `entangle.recording.recorder.Recorded` of every layer and pass, so that other
        statistics of the same tokens need no forward pass of their own. It must not change it.

    Returns
    -------
    NeuronScores
        One row a neuron. ``wd_se`` is a jackknife over groups of whole sequences: 16 (exact) or 8
        (sketch), fewer if there are fewer sequences.

    Raises
    ------
    InvalidInput, UnknownName
        If the layers, the settings or the calibration set do not fit the model.
    MemoryLimit
        If memory runs out.

    References
    ----------
    arXiv 2405.15756, eq. 1 (WD) and eq. 2 (MD).
    """
    check_memory(memory)
    seed, layers = check_seed(seed), layer_specs(layers)
    language_model = as_language_model(model)
    chosen = find_layers(language_model.module, layers, proj)
    return score_layers(
        language_model, calibration, chosen, may_be_silent=not asked_by_name(layers, chosen),
        method=method, md=md, seed=seed, memory=memory, batch_size=batch_size, progress=progress,
        watch=watch,
    )  # fmt: skip


def score_layers(
    language_model: LanguageModel,
    calibration: Source,
    chosen: Sequence[Layer],
    *,
    may_be_silent: bool,
    method: Method = "auto",
    md: bool = True,
    seed: int = 0,
    memory: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    watch: Callable[[Recorded], None] | None = None,
) -> NeuronScores:
    """Score layers that were found; arguments as in `score`.

    ``may_be_silent`` leaves out layers that see no token, and names them in the manifest.
    """
    clock = RunClock()
    check_seed(seed)
    _check_readable(chosen)
    calibration = as_calibration(calibration, language_model)
    resolved = _resolve_method(method, language_model, chosen, calibration, memory)
    budget = memory_for(memory, language_model.module)
    groups = _n_groups(resolved, calibration.n_seq)
    per_pass = _batch_size(batch_size, calibration)
    asked = {"layers": [layer.name for layer in chosen], "method": resolved, "md": md, "seed": seed}
    model, text = language_model.describe(), calibration.describe()
    agree_on(model=model, calibration=text, settings=asked | {"batch_size": per_pass})
    with ProgressBar(f"scoring ({resolved})", enabled=progress) as bar:
        try:
            measured, recorder = _measuring(
                resolved, language_model, chosen, calibration,
                n_groups=groups, per_pass=per_pass, md=md, seed=seed, memory=budget, bar=bar,
                watch=watch, may_be_silent=may_be_silent,
            )()  # fmt: skip
            frame = neuron_table(measured, language_model.name)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            raise MemoryLimit(
                f"memory ran out while scoring {len(chosen)} layer(s) by the {resolved} method on "
                f"{per_pass} × {calibration.seq_len} tokens at a time; lower --seq-len (seq_len), "
                "--batch-size (batch_size), --memory (memory) or the number of layers."
            ) from error
    manifest = make_manifest(
        KIND,
        model=model,
        calibration=text,
        settings={
            "layers": [one.layer.name for one in measured],
            "layers_without_tokens": sorted(
                {layer.name for layer in chosen} - {one.layer.name for one in measured}
            ),
            **({"pooled_depths": recorder.depths} if recorder.depths else {}),
            "method": resolved,
            "n_groups": groups,
            "batch_size": per_pass,
            "md": md,
            "seed": seed,
        },
        **clock.read(budget),
    )
    return NeuronScores(
        frame=frame,
        layers=layer_table(measured),
        histograms={one.layer.name: one.histograms for one in measured},
        manifest=manifest,
    )


def _out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; torch has no class of its own for that on the CPU."""
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or "you tried to allocate" in str(error)


def _check_readable(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.offloaded:
            raise InvalidInput(
                f"the weights of layer {layer.name!r} are offloaded, so it cannot be scored; "
                "choose a device map that keeps it on a device."
            )


def _resolve_method(
    method: str,
    model: LanguageModel,
    layers: Sequence[Layer],
    calibration: CalibrationSet,
    memory: int | None,
) -> Literal["exact", "sketch"]:
    method = choice("method", method, SCORING_METHODS)
    recorded = sum(layer.in_features for layer in layers)
    needed = calibration.n_tokens * recorded * model.dtype.itemsize
    most = AUTO_EXACT_BYTES if memory is None else memory // 2
    if method == "exact" or (method == "auto" and needed <= most):
        return "exact"
    return "sketch"


def _n_groups(method: str, n_seq: int) -> int:
    if method == "exact":
        return min(EXACT_GROUPS, n_seq)
    return n_seq if n_seq < SKETCH_GROUPS else min(SKETCH_GROUPS, n_seq // 2)


def _batch_size(asked: int | None, calibration: CalibrationSet) -> int:
    if asked is None:
        return calibration.per_pass
    return whole("batch_size", asked, least=1)


def _batches(calibration: CalibrationSet, n_groups: int, per_pass: int) -> Iterator[Batch]:
    """Yield batches whose sequences all belong to one group; groups are runs of sequences."""
    bounds = [group * calibration.n_seq // n_groups for group in range(n_groups + 1)]
    for group, (start, end) in enumerate(pairwise(bounds)):
        for _, ids in calibration.rows.batches(per_pass, start, end):
            yield group, ids


def _measuring(
    method: str,
    model: LanguageModel,
    layers: Sequence[Layer],
    calibration: CalibrationSet,
    *,
    n_groups: int,
    per_pass: int,
    md: bool,
    seed: int,
    memory: int,
    bar: Progress,
    watch: Callable[[Recorded], None] | None,
    may_be_silent: bool,
) -> Callable[[], tuple[list[LayerSummary], Recorder]]:
    """Return the call that measures the layers by a method."""
    batches = _batches(calibration, n_groups, per_pass)
    if method == "exact":
        ranks = current() if watch is None else ALONE
        bar.start(calibration.n_seq * ranks.size + len(layers), "sequences and layers")
        return partial(
            _exact_on_ranks, model.module, layers, batches, ranks,
            n_groups=n_groups, md=md, seed=seed, memory=memory, report=bar.advance, watch=watch,
            may_be_silent=may_be_silent,
        )  # fmt: skip
    bar.start(calibration.n_seq, "sequences")
    paired = min(MAX_PAIRS, calibration.n_tokens // 2) if md else 0
    return partial(
        score_sketched, model.module, layers, batches,
        n_groups=n_groups, pair_share=2 * paired / calibration.n_tokens, seed=seed,
        report=bar.advance, watch=watch, may_be_silent=may_be_silent,
    )  # fmt: skip


def _exact_on_ranks(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    ranks: Ranks,
    *,
    may_be_silent: bool,
    **settings: Any,
) -> tuple[list[LayerSummary], Recorder]:
    """Score each rank's part of the layers, from all tokens."""
    if ranks.size == 1:
        return score_exact(module, layers, batches, may_be_silent=may_be_silent, **settings)
    joined = Recorder(layers, lambda _found: None, lenient=may_be_silent)
    own, found = [layers[i] for i in ranks.part(len(layers))], list[LayerSummary]()
    if own:
        found, recorder = score_exact(
            module, own, batches, may_be_silent=may_be_silent, whole=False, **settings
        )
        joined.take_over(recorder)
    joined.join(ranks)
    return share_summaries(ranks, found, layers), joined
