"""Scoring by sketches: statistics of all layers from one pass, nothing recorded."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, on_gpu
from entangle.memory import gpus_among
from entangle.models.layers import Layer
from entangle.models.streaming import comes_by_blocks
from entangle.precision import full_precision
from entangle.ranks import ALONE, current
from entangle.recording.recorder import Batch, Batches, Recorded, Recorder
from entangle.recording.together import RecordedExperts
from entangle.scoring.finer import FinerOutputs, SharedSquares
from entangle.scoring.layer_scores import (
    LayerSummary,
    MeasuredLayer,
    how_many,
    mapped,
    summarise,
    weight_norms,
)
from entangle.scoring.spread import (
    FirstPlaces,
    LayerCounts,
    own_batches,
    pool_counts,
    share_places,
    share_summaries,
)
from entangle.scoring.together import MixtureCounts
from entangle.seeding import numpy_rng
from entangle.stats.bins import Scratch, to_host
from entangle.stats.mapping_difficulty import PairSketch
from entangle.stats.sketch import OutputSketch


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
        self._seed, self.share = seed, share
        self.batch = 0
        """Number of the batch in the text."""

    def of(self, rows: Float[Tensor, "tokens features"]) -> _Pairs:
        """Return the pairs of the tokens that a layer received."""
        starts, count = self._drawn(rows.shape[0])
        return _Pairs(starts, _distances(*_halves(rows), starts=starts, n_pairs=count))

    def _drawn(self, n_tokens: int) -> tuple[tuple[int, int], int]:
        """Draw which tokens make pair 0, and return how many pairs there are."""
        half = n_tokens // 2
        count = min(half, round(half * self.share))
        if count == 0:
            return (0, 0), 0
        rng = numpy_rng(self._seed, "pairs", self.batch, n_tokens)
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
    memory: int | None = None,
    watch: Callable[[Recorded], None] | None = None,
    may_be_silent: bool = False,
) -> tuple[list[LayerSummary], Recorder]:
    """Score layers in one pass over the batches, which several ranks share out.

    Parameters
    ----------
    module, layers, batches, n_groups, seed
        As in `entangle.scoring.exact.score_exact`.
    pair_share
        Share of each batch's tokens that is paired for the mapping difficulty; 0 leaves it out.
        A pair joins a token of the batch's first half with one of its second half.
    report
        Called with the number of sequences after each batch.
    memory
        As in `entangle.recording.recorder.Recorder.run`.
    watch
        Called with what every layer received and gave in every pass; every rank sees all of it.
    may_be_silent
        Leave out layers that see no token instead of refusing them.
    """
    ranks = current() if watch is None else ALONE
    work, squares, split = Scratch(), SharedSquares(), ranks.size > 1
    at_once = MixtureCounts(  # who watches sees every layer by itself, and so do several ranks
        layers if watch is None and not split else (),
        n_groups=n_groups, scratch=work, squares=squares,
    )  # fmt: skip
    known = at_once.counts()
    counts = {
        layer.name: known.get(layer.name)
        or LayerCounts(
            OutputSketch(layer.out_features, n_groups=n_groups, scratch=work, split=split),
            PairSketch(layer.out_features, scratch=work, split=split),
            FinerOutputs(layer, squares, split=split),
        )
        for layer in layers
    }
    pairing, places = _Pairing(seed=seed, share=pair_share), FirstPlaces(ranks, counts, layers)
    pass_of = _Passes(counts, squares, pairing, places, watch, at_once)
    again, late = list[Layer](), list[Layer]()

    def settle(own: Sequence[Layer]) -> None:
        heard = pool_counts(ranks, counts, own)
        PairSketch.settle(counts[layer.name].pairs for layer in heard)
        pass_of.summarise(heard, here=comes_by_blocks(module), norms=split)
        for layer in own:
            counts.pop(layer.name, None)

    def finish(own: Sequence[Layer]) -> None:
        others, mine = share_places(ranks, counts, own)
        again.extend(mine)
        late.extend(others)
        names = {layer.name for layer in others}
        settle([layer for layer in own if layer.name not in names])

    def run(chosen: Sequence[Layer], *, first: bool) -> Recorder:
        own, drop = own_batches(numbered, ranks)
        compared = watch is not None  # who watches may read the weights
        recorder = Recorder(
            chosen, pass_of.update, compared=compared, lenient=may_be_silent,
            at_once=pass_of.update_experts if known else None,
        )  # fmt: skip
        said = report if first and not drop else _unheard
        told = pass_of.told(own, recorder, drop=drop, first=first, report=said)
        told = replace(told, sample=numbered[0][1][1])
        done = finish if first else None
        recorder.run(module, told, memory=memory, whole=ranks.size == 1, after=done)
        return recorder

    numbered = list(enumerate(batches))
    with full_precision(), torch.no_grad(), closing(pass_of):
        recorder = run(layers, first=True)
        if ranks.size > 1:
            recorder.join(ranks)
            if again:
                run(again, first=False)
            settle(late)
        found = share_summaries(ranks, pass_of.summaries(), pass_of.names, layers)
        order = {layer.name: place for place, layer in enumerate(layers)}
        return sorted(found, key=lambda one: order[one.layer.name]), recorder


def _unheard(_sequences: int) -> None:
    """Report nothing: of batches that another rank reports, or that were reported before."""


@dataclass(frozen=True, eq=False)
class _Job:
    """Measures some layers."""

    device: torch.device
    work: Callable[[], list[LayerSummary]]

    def __call__(self) -> list[LayerSummary]:
        with torch.no_grad():
            return self.work()


class _Passes:
    """Counts what layers give in every pass, and measures what was counted."""

    def __init__(
        self,
        counts: Mapping[str, LayerCounts],
        squares: SharedSquares,
        pairing: _Pairing,
        places: FirstPlaces,
        watch: Callable[[Recorded], None] | None,
        at_once: MixtureCounts,
    ) -> None:
        self._counts, self._squares, self._pairing, self._watch = counts, squares, pairing, watch
        self._at_once = at_once
        self._pairs: dict[int, _Pairs] = {}
        self._places = places
        self._fresh: set[str] = set()
        """Layers that were seen in the pass under way."""
        self.names: list[str] = []
        """Of the layers of `summaries`, where every layer is measured by itself."""
        self._found: list[Iterable[LayerSummary]] = []
        self._under_way: list[Future[list[LayerSummary]]] = []
        self._pool = ThreadPoolExecutor(max(1, torch.get_num_threads()))

    def told(
        self,
        own: Sequence[tuple[int, Batch]],
        recorder: Recorder,
        *,
        drop: bool,
        first: bool,
        report: Callable[[int], None],
    ) -> Batches:
        """Return batches to run; of those that are to ``drop``, the places of the bins alone stay.

        ``first`` tells of batches of which the first places bins (`FirstPlaces`).
        """

        def before(place: int) -> None:
            self._pairing.batch = own[place][0]
            self._squares.forget()
            self._fresh.clear()
            self._places.before(first=first and place == 0)

        def after(_place: int) -> None:
            self._places.after()
            for name in self._fresh if drop else ():
                self._counts[name].placed_at(self._counts[name].places())
                recorder.tokens[name] = 0

        return Batches([batch for _, batch in own], before, after, report)

    def update(self, seen: Recorded) -> None:
        """Count what a layer gave."""
        if self._watch is not None:
            self._watch(seen)
        name = seen.layer.name
        own, new = self._counts[name], name not in self._fresh
        self._fresh.add(name)
        if new:
            self._places.fetch(name)
        rows = own.finer.of(seen.inputs, seen.outputs)
        own.outputs.update(rows, group=seen.group)
        if self._pairing.share > 0:
            if seen.leads:  # what was found for other inputs is done with
                self._pairs.clear()
                self._pairs[seen.source] = self._pairing.of(seen.inputs)
            _add_pairs(rows, own.pairs, self._pairs[seen.source])
        if new:
            self._places.tell(name)

    def update_experts(self, seen: RecordedExperts) -> None:
        """Count what the experts of a mixture gave."""
        found: dict[str, _Pairs] = {}

        def count(pairs: PairSketch, inputs: Tensor, rows: Tensor, source: str) -> None:
            if source not in found:
                found[source] = self._pairing.of(inputs)
            _add_pairs(rows, pairs, found[source])

        self._at_once.update(seen, count if self._pairing.share > 0 else None)

    def summarise(self, layers: Sequence[Layer], *, here: bool, norms: bool) -> None:
        """Measure and summarise what was counted of layers.

        Where weights go again (``here``), what is asked of them is taken before this returns; on a
        CPU the rest goes on beside the next layers. ``norms`` asks for norms of weights then too.
        """
        jobs = self._jobs(layers, here=here, norms=norms)
        self.names += [layer.name for layer in layers]
        if layers and not gpus_among(layer.device for layer in layers):
            tasks = [self._pool.submit(job) for job in jobs]
            self._collect()
            self._under_way = tasks
            if not here:
                self._collect()
            return
        found = chain.from_iterable(mapped(_Job.__call__, jobs, at_once=how_many(layers)))
        self._found.append(list(found) if here else found)

    def _jobs(self, layers: Sequence[Layer], *, here: bool, norms: bool) -> list["_Job"]:
        """Return what measures layers, one projection of a mixture's experts together."""
        jobs, done = list[_Job](), set[str]()
        on_cpu = not gpus_among(layer.device for layer in layers)
        for one in self._at_once.take({layer.name for layer in layers}):
            done |= {layer.name for layer in one.layers}
            of_weight = one.weight_norms() if here or not on_cpu else None
            if here:
                one.keep()
            work = partial(one.summaries, pairs=self._pairing.share > 0, norms=of_weight)
            jobs.append(_Job(one.layers[0].device, work))
        for layer in (layer for layer in layers if layer.name not in done):
            own, of_weight = self._counts[layer.name], None
            if on_cpu and (norms or here):
                of_weight = weight_norms(layer)
            if on_cpu or here:
                own.finer.keep()
            asked = norms or here
            jobs.append(_Job(layer.device, partial(self._summary, layer, own, of_weight, asked)))
        return jobs

    def summaries(self) -> Iterator[LayerSummary]:
        """Yield all summaries as they are done, in the order in which they were asked for."""
        self._collect()
        yield from chain.from_iterable(self._found)

    def close(self) -> None:
        """End what goes on beside."""
        self._pool.shutdown(cancel_futures=True)

    def _collect(self) -> None:
        """Wait for what is under way."""
        self._found.append([one for task in self._under_way for one in task.result()])
        self._under_way = []

    def _summary(
        self, layer: Layer, own: LayerCounts, norms: Tensor | None, asked: bool
    ) -> list[LayerSummary]:
        if asked and norms is None:
            (norms,) = to_host([weight_norms(layer)])
        found = summarise(self._measure(layer, own), norms)
        if norms is not None:  # the next blocks' neurons are counted where these were
            own.outputs.release()
            own.pairs.release()
        return [found]

    def _measure(self, layer: Layer, own: LayerCounts) -> MeasuredLayer:
        found = own.outputs.result()
        return MeasuredLayer(
            layer=layer,
            shape=found.shape,
            sketch=found,
            pairs=own.pairs.result() if self._pairing.share > 0 else None,
            wd_bound=found.wd_bound,
            method="sketch",
            rounding=own.finer.error(found.shape, found.location),
        )
