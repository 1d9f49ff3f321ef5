"""Scoring by sketches: statistics of all layers from one pass, nothing recorded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor, nn

from entangle.kernels import sketch as kernels
from entangle.models.layers import Layer
from entangle.precision import full_precision
from entangle.recording.hooks import Batch, Callback, SeenTensor, run_observed
from entangle.scoring.measured import MeasuredLayer
from entangle.scoring.side_by_side import how_many, mapped
from entangle.scoring.tables import LayerSummary, summarise
from entangle.seeding import numpy_rng
from entangle.stats.mapping_difficulty import PairSketch
from entangle.stats.scratch import Scratch
from entangle.stats.sketch import OutputSketch

Segment = tuple[slice, slice, Tensor]
"""Two runs of tokens, paired in order, and the distance between their inputs, (pairs,)."""


class _Pairing:
    """Draws the pairs of each batch, and remembers the last input's distances.

    Token i of a batch's first half goes with token i + shift of its second half, counted round the
    end; the shift, and where to begin if not all tokens are paired, are drawn for every batch.
    Pairs are disjoint, and runs of tokens need not be gathered one by one.
    """

    def __init__(self, *, seed: int, share: float) -> None:
        self._seed, self._share, self._batch = seed, share, -1
        self._last: SeenTensor | None = None
        self._found: list[Segment] = []

    def next_batch(self) -> None:
        """Begin a batch."""
        self._batch += 1
        self._last = None

    def of(self, inputs: Tensor) -> list[Segment]:
        """Return the pairs of the tokens of ``inputs`` (..., in_features)."""
        if self._last is None or not self._last.same_as(inputs):
            rows = inputs.flatten(0, -2)
            self._found = [
                (first, second, _distances(rows[first], rows[second]))
                for first, second in self._runs(rows.shape[0])
            ]
            self._last = SeenTensor.of(inputs)
        return self._found

    def _runs(self, n_tokens: int) -> list[tuple[slice, slice]]:
        half = n_tokens // 2
        count = min(half, round(half * self._share))
        if count == 0:
            return []
        rng = numpy_rng(self._seed, "pairs", self._batch, n_tokens)
        start, shift = (int(value) for value in rng.integers(half, size=2))
        steps = {0, count, half - start, (-start - shift) % half, (-start - shift) % half + half}
        cuts = sorted(step for step in steps if 0 <= step <= count)
        runs = []
        for low, high in pairwise(cuts):
            first, second = (start + low) % half, half + (start + shift + low) % half
            runs.append((slice(first, first + high - low), slice(second, second + high - low)))
        return runs


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Return the Euclidean distances of rows, float32."""
    if kernels.fits(first, 1) and first.stride() == second.stride():
        return kernels.row_distances(first, second)
    distances: Tensor = (first.float() - second.float()).norm(dim=1)
    return distances


def _paired(
    rows: Tensor, runs: list[Segment], *, together: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the rows of both tokens of each run; on a GPU, if so asked, of all runs ``together``.

    To gather rows costs a GPU less than several small kernels. Where bins are placed by the first
    run, it must come alone.
    """
    if not (together and rows.is_cuda and len(runs) > 1):
        for one, two, distance in runs:
            yield rows[one], rows[two], distance
        return
    first, second, distances = zip(*runs, strict=True)
    yield (
        torch.cat([rows[run] for run in first]),
        torch.cat([rows[run] for run in second]),
        torch.cat(distances),
    )


def score_sketched(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    *,
    n_groups: int,
    pair_share: float,
    seed: int,
    report: Callable[[int], None],
    watch: Callback | None = None,
    may_be_silent: bool = False,
) -> list[LayerSummary]:
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
        Called with every layer, its inputs and its outputs.
    may_be_silent
        Leave out layers that see no token instead of refusing them.
    """
    work = Scratch()
    outputs = {
        layer.name: OutputSketch(layer.out_features, n_groups=n_groups, scratch=work)
        for layer in layers
    }
    differences = {layer.name: PairSketch(layer.out_features, scratch=work) for layer in layers}
    pairing = _Pairing(seed=seed, share=pair_share)

    def reported() -> Iterator[Batch]:
        for batch in batches:
            pairing.next_batch()
            yield batch
            report(batch[1].shape[0])

    def update(group: int, layer: Layer, inputs: Tensor, produced: Tensor) -> None:
        if watch is not None:
            watch(layer, inputs, produced)
        rows = produced.flatten(0, -2)
        outputs[layer.name].update(rows, group=group)
        if pair_share > 0:
            sketch, runs = differences[layer.name], pairing.of(inputs)
            for first, second, distance in _paired(rows, runs, together=sketch.is_placed):
                sketch.update(first, second, distance)

    def measure(layer: Layer) -> MeasuredLayer:
        found = outputs[layer.name].result()
        return MeasuredLayer(
            layer=layer,
            shape=found.shape,
            sketch=found,
            pairs=differences[layer.name].result() if pair_share > 0 else None,
            wd_bound=found.wd_bound,
            method="sketch",
        )

    with full_precision(), torch.no_grad():
        run_observed(module, layers, reported(), update, may_be_silent=may_be_silent)
        heard = [layer for layer in layers if outputs[layer.name].n_tokens]
        at_once = how_many(heard)
        if at_once > 1:
            return list(mapped(lambda one: summarise(measure(one)), heard, at_once=at_once))
        measured = [measure(layer) for layer in heard]
    with ThreadPoolExecutor() as pool:  # sorting, most of the work, lets threads run beside it
        return list(pool.map(summarise, measured))
