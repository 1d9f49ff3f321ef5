"""Scoring by sketches: statistics of all layers from one pass, nothing recorded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, on_gpu
from entangle.models.layers import Layer
from entangle.precision import full_precision
from entangle.recording.recorder import Batch, Recorded, Recorder
from entangle.scoring.layer_scores import (
    FinerOutputs,
    LayerSummary,
    MeasuredLayer,
    SharedSquares,
    how_many,
    mapped,
    summarise,
)
from entangle.seeding import numpy_rng
from entangle.stats.bins import Scratch
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

    def add_to(self, sketch: PairSketch, rows: Tensor) -> None:
        """Add the rows (tokens, neurons) of both tokens of each pair."""
        _add_pairs(rows, sketch, self)


def _add_at_once(rows: Tensor, sketch: PairSketch, pairs: _Pairs) -> None:
    sketch.update(*_halves(rows), pairs.distance, starts=pairs.starts)


@dispatch(_add_at_once, where=on_gpu)
def _add_pairs(rows: Tensor, sketch: PairSketch, pairs: _Pairs) -> None:
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

    def next_batch(self) -> None:
        """Begin a batch."""
        self._batch += 1

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
    work = Scratch()
    outputs = {
        layer.name: OutputSketch(layer.out_features, n_groups=n_groups, scratch=work)
        for layer in layers
    }
    differences = {layer.name: PairSketch(layer.out_features, scratch=work) for layer in layers}
    pairing, pairs = _Pairing(seed=seed, share=pair_share), dict[int, _Pairs]()
    squares = SharedSquares()
    counted = {layer.name: FinerOutputs(layer, squares) for layer in layers}

    def reported() -> Iterator[Batch]:
        for batch in batches:
            pairing.next_batch()
            squares.forget()
            yield batch
            report(batch[1].shape[0])

    def update(seen: Recorded) -> None:
        if watch is not None:
            watch(seen)
        name = seen.layer.name
        rows = counted[name].of(seen.inputs, seen.outputs)
        outputs[name].update(rows, group=seen.group)
        if pair_share > 0:
            if seen.leads:  # what was found for other inputs is done with
                pairs.clear()
                pairs[seen.source] = pairing.of(seen.inputs)
            pairs[seen.source].add_to(differences[name], rows)

    def measure(layer: Layer) -> MeasuredLayer:
        found = outputs[layer.name].result()
        return MeasuredLayer(
            layer=layer,
            shape=found.shape,
            sketch=found,
            pairs=differences[layer.name].result() if pair_share > 0 else None,
            wd_bound=found.wd_bound,
            method="sketch",
            rounding=counted[layer.name].error(found.shape, found.location),
        )

    with full_precision(), torch.no_grad():
        compared = watch is not None  # who watches may read the weights
        recorder = Recorder(layers, update, compared=compared, lenient=may_be_silent)
        recorder.run(module, reported())
        heard = [layer for layer in layers if outputs[layer.name].n_tokens]
        PairSketch.settle(differences.values())
        at_once = how_many(heard)
        if at_once > 1:
            found = list(mapped(lambda one: summarise(measure(one)), heard, at_once=at_once))
            return found, recorder
        measured = [measure(layer) for layer in heard]
    with ThreadPoolExecutor() as pool:  # sorting, most of the work, lets threads run beside it
        return list(pool.map(summarise, measured)), recorder
