"""Scoring shared out to several ranks: sequences by sketch, layers by the exact method.

Batches are shared out. The first rank's first one places a layer's bins; the others run one of
theirs beside it, and wait at every layer for its places. What was counted of a layer comes together
on one rank, in the order of the sequences, and is measured there; every rank gets the summaries,
one of each rank's in turn, while the next ones are measured.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entangle.models.layers import Layer
from entangle.ranks import Ranks
from entangle.recording.recorder import Batch
from entangle.results.scores import LayerHistograms
from entangle.scoring.finer import FinerOutputs
from entangle.scoring.layer_scores import LayerSummary
from entangle.stats.bins import ToAdd, add_in_order
from entangle.stats.mapping_difficulty import PairSketch
from entangle.stats.sketch import OutputSketch


@dataclass(eq=False)
class LayerCounts:
    """What is counted of one layer."""

    outputs: OutputSketch
    """Its outputs."""
    pairs: PairSketch
    """Differences of pairs of them."""
    finer: FinerOutputs
    """Which of them are computed again."""
    common: Sequence[bool] = (False, False, False)
    """Which of `places` the first rank has told to all."""

    def places(self) -> list[Tensor | None]:
        """Return what the first tokens decide: bins of both, and which outputs are computed again.

        As float32 of one row a number; None for what is not decided.
        """
        again, pairs = self.finer.again, self.pairs.place
        return [
            self.outputs.place,
            None if pairs is None else pairs[None],
            None if again is None else again.float()[None],
        ]

    def placed_at(self, places: Sequence[Tensor | None]) -> None:
        """Begin anew with what `places` gave."""
        outputs, pairs, again = places
        if outputs is not None:
            self.outputs = self.outputs.placed_at(outputs)
        self.pairs = self.pairs.placed_at(None if pairs is None else pairs[0])
        self.finer = self.finer.decided(None if again is None else again[0] > 0)

    def known(self, used: tuple[int, int]) -> list[Any]:
        """Return what all ranks must know of this to `pool` it, as JSON takes it.

        ``used`` is what `OutputSketch.used` says of its outputs.
        """
        return [self.outputs.known(used), self.pairs.known(), self.finer.known()]

    def pool(self, ranks: Ranks, known: Sequence[Sequence[Any]], *, to: int) -> ToAdd:
        """Put what all ranks counted together on rank ``to``, as one would have counted it."""
        outputs, pairs, finer = zip(*known, strict=True)
        return [
            *self.outputs.pool(ranks, outputs, to=to),
            *self.pairs.pool(ranks, pairs, to=to),
            *self.finer.pool(ranks, finer, to=to),
        ]


_ALIGNED = 8  # bytes
_ROWS = (2, 1, 1)  # of each of `LayerCounts.places`


def own_batches(
    numbered: Sequence[tuple[int, Batch]], ranks: Ranks
) -> tuple[list[tuple[int, Batch]], bool]:
    """Return this rank's part of the batches, of which the first rank has the first.

    A rank for which none is left runs the first one too, and drops what it counts of it, as the
    second of what is returned tells.
    """
    start, stop = (-(-(ranks.rank + i) * len(numbered) // ranks.size) for i in (0, 1))
    return (list(numbered[start:stop]), False) if start < stop else ([numbered[0]], True)


class FirstPlaces:
    """Where the first rank's first batch places the bins, told to the others layer by layer.

    The others, which run a batch of their own meanwhile, hear of one layer after the other until
    they have that which they are to count, or the first batch has ended: a layer that it did not
    reach, such as an expert, is placed by whoever reaches it (`share_places` then says whose
    places count).

    Parameters
    ----------
    ranks
        Who counts.
    counts
        Of every layer, by name.
    layers
        All of them.
    """

    def __init__(
        self, ranks: Ranks, counts: Mapping[str, LayerCounts], layers: Sequence[Layer]
    ) -> None:
        self._ranks, self._counts = ranks, counts
        self._homes = {layer.name: (layer.out_features, layer.device) for layer in layers}
        self._open = False
        """Whether more may be told: the first batch is under way."""

    def before(self, *, first: bool) -> None:
        """Hear of a batch before it runs, and whether it is this rank's ``first``."""
        self._open = first and self._ranks.size > 1

    def after(self) -> None:
        """Hear of the end of a batch."""
        if self._open and self._ranks.rank == 0:
            self._ranks.told(b"")
            self._open = False
        while self._open:
            self._hear()

    def tell(self, name: str) -> None:
        """Tell of a layer's places, just found, if this is the first batch."""
        if self._open and self._ranks.rank == 0:
            own = self._counts[name]
            places = own.places()
            found = [one for one in places if one is not None]
            if found:
                own.common = [one is not None for one in places]
                self._ranks.told(json.dumps([name, own.common]).encode())
                flat = torch.cat([one.flatten().float() for one in found])
                self._ranks.broadcast(flat, by=0, met=True)

    def fetch(self, name: str) -> None:
        """Give a layer that this rank is to count its places, if the first batch finds some."""
        own = self._counts[name]
        while self._open and self._ranks.rank and own.outputs.place is None:
            self._hear()

    def _hear(self) -> None:
        content = self._ranks.told(None)
        self._open = bool(content)
        if not content:
            return
        name, common = json.loads(content)
        own, (width, device) = self._counts[name], self._homes[name]
        sizes = [n * width if there else 0 for n, there in zip(_ROWS, common, strict=True)]
        flat = torch.empty(sum(sizes), device=device)
        self._ranks.broadcast(flat, by=0, met=True)
        parts = [part.view(-1, width) if len(part) else None for part in flat.split(sizes)]
        own.placed_at(parts)
        own.common = common


def share_places(
    ranks: Ranks, counts: Mapping[str, LayerCounts], layers: Sequence[Layer]
) -> tuple[list[Layer], list[Layer]]:
    """Give all ranks the bins of the first rank that has placed them.

    Returns
    -------
    late : list of Layer
        Those that some rank has counted in other bins, and must count again: experts that the
        first batch did not reach.
    again : list of Layer
        Those of them that this rank must. They are empty now.
    """
    if ranks.size == 1:
        return [], []
    own = {layer.name: counts[layer.name].places() for layer in layers}
    known = ranks.exchange(
        [[[one is not None for one in own[layer.name]], counts[layer.name].common]
         for layer in layers]
    )  # fmt: skip
    chosen = [_chosen(had) for had in zip(*known, strict=True)]
    if all(rank is None for places in chosen for rank in places):
        return [], []
    again = []
    received = _received(ranks, own, chosen, layers)
    for layer in layers:
        theirs = received[layer.name]
        if all(map(_same, own[layer.name], theirs)):
            continue
        if counts[layer.name].outputs.n_tokens:
            again.append(layer)
        counts[layer.name].placed_at(theirs)
    names = {name for own in ranks.exchange([layer.name for layer in again]) for name in own}
    return [layer for layer in layers if layer.name in names], again


def pool_counts(
    ranks: Ranks, counts: dict[str, LayerCounts], layers: Sequence[Layer]
) -> list[Layer]:
    """Put what all ranks counted of each layer together on one rank, in turn.

    Returns
    -------
    list of Layer
        Those that this rank has now, of those that saw a token; it lets go of the others' counts.
    """
    own = [counts[layer.name] for layer in layers]
    if ranks.size == 1:
        return [layer for layer, one in zip(layers, own, strict=True) if one.outputs.n_tokens]
    used = OutputSketch.used([one.outputs for one in own])
    known = ranks.exchange(
        [[one.outputs.n_tokens, one.known(ends)] for one, ends in zip(own, used, strict=True)]
    )
    found = {
        layer.name: [what for _, what in every]
        for layer, *every in zip(layers, *known, strict=True)
        if any(tokens for tokens, _ in every)
    }
    heard = [layer for layer in layers if layer.name in found]
    sums: ToAdd = []
    for number, layer in enumerate(heard):
        sums += counts[layer.name].pool(ranks, found[layer.name], to=number % ranks.size)
        if number % ranks.size != ranks.rank:
            del counts[layer.name]
    add_in_order(sums)
    return heard[ranks.rank :: ranks.size]


def _chosen(had: Sequence[tuple[list[bool], list[bool]]]) -> list[int | None]:
    """Return whose places of a layer all get: those of the first rank to have them.

    ``had`` tells what each has, and what of it the first rank has told. Nobody's (None) where
    nobody has any, or all have all of them from the first rank.
    """
    if all(there == told for there, told in had):
        return [None] * len(_ROWS)
    return [
        next((rank for rank, (there, _) in enumerate(had) if there[j]), None)
        for j in range(len(_ROWS))
    ]


def _same(mine: Tensor | None, theirs: Tensor | None) -> bool:
    return theirs is None or (mine is not None and torch.equal(mine, theirs))


def _received(
    ranks: Ranks,
    own: Mapping[str, Sequence[Tensor | None]],
    chosen: Sequence[Sequence[int | None]],
    layers: Sequence[Layer],
) -> dict[str, list[Tensor | None]]:
    """Return every layer's places, from the ranks that are ``chosen``; one message a rank."""
    found: dict[str, list[Tensor | None]] = {layer.name: [None] * 3 for layer in layers}
    for rank in sorted({one for places in chosen for one in places if one is not None}):
        wanted = [
            (layer, j)
            for layer, places in zip(layers, chosen, strict=True)
            for j in range(3)
            if places[j] == rank
        ]
        sizes = [_ROWS[j] * layer.out_features for layer, j in wanted]
        flat = torch.empty(sum(sizes), device=layers[0].device)
        if rank == ranks.rank:
            flat = torch.cat([_there(own[layer.name][j], flat) for layer, j in wanted])
        ranks.broadcast(flat, by=rank)
        for (layer, j), part in zip(wanted, flat.split(sizes), strict=True):
            found[layer.name][j] = part.view(_ROWS[j], -1).to(layer.device)
    return found


def _there(place: Tensor | None, like: Tensor) -> Tensor:
    assert place is not None  # noqa: S101
    return place.flatten().to(like)


def share_summaries(
    ranks: Ranks, own: Iterable[LayerSummary], mine: Sequence[str], layers: Sequence[Layer]
) -> list[LayerSummary]:
    """Return the summaries of all ranks, in the order of the layers.

    Parameters
    ----------
    ranks
        Who measured.
    own
        This rank's, each as it is done: it goes to the others while the next is measured.
    mine
        Names of their layers, in the same order.
    layers
        All layers.
    """
    if ranks.size == 1:
        return list(own)
    every, known = ranks.exchange(list(mine)), {layer.name: layer for layer in layers}
    found: dict[str, LayerSummary] = {}
    on_gpu = any(layer.device.type == "cuda" for layer in layers)
    beside = torch.cuda.Stream() if on_gpu else None  # waits for none of what is being measured
    coming = iter(own)
    coming = chain(list(islice(coming, 1)), coming)  # all begin, before one waits for another
    for turn in range(max(map(len, every))):
        names = [own[turn] if turn < len(own) else None for own in every]
        one = next(coming) if names[ranks.rank] is not None else None
        with torch.cuda.stream(beside):
            shared = _shared(ranks, one, [None if name is None else known[name] for name in names])
        found |= {summary.layer.name: summary for summary in shared}
    return [found[layer.name] for layer in layers if layer.name in found]


def _shared(
    ranks: Ranks, one: LayerSummary | None, layers: Sequence[Layer | None]
) -> list[LayerSummary]:
    """Return the summaries of layers of which every rank has one, or none."""
    described, content = (None, torch.empty(0)) if one is None else _packed(one)
    found = []
    for rank, head in enumerate(ranks.exchange([len(content), described])):
        layer, (size, theirs) = layers[rank], head
        if layer is None:
            continue
        if one is not None and rank == ranks.rank:
            ranks.broadcast(content, by=rank, met=True)
            found.append(one)
            continue
        sent = torch.empty(size, dtype=torch.uint8)
        ranks.broadcast(sent, by=rank, met=True)
        found.append(_unpacked(sent, layer, theirs))
    return found


def _packed(one: LayerSummary) -> tuple[list[Any], Tensor]:
    """Return what `_unpacked` needs of a layer, as JSON takes it, and all arrays' bytes."""
    own = {f"numbers.{name}": array for name, array in one.numbers.items()}
    shape = {f.name: getattr(one.histograms, f.name) for f in fields(LayerHistograms)}
    own |= {f"histograms.{k}": v for k, v in shape.items() if isinstance(v, np.ndarray)}
    own |= {} if one.norms is None else {"norms.": one.norms.numpy()}
    places: dict[str, Any] = {}
    size = 0
    for name, array in own.items():
        places[name] = [size, array.dtype.str, array.shape]
        size += -(-array.nbytes // _ALIGNED) * _ALIGNED
    content = torch.empty(size, dtype=torch.uint8)
    for name, array in own.items():
        place = content.numpy()[places[name][0] :][: array.nbytes]
        np.copyto(place.view(array.dtype).reshape(array.shape), array)
    return [places, one.n_tokens, one.row, one.histograms.first_bin], content


def _unpacked(content: Tensor, layer: Layer, described: Sequence[Any]) -> LayerSummary:
    """Return a layer's summary, whose arrays stay where they came."""
    places, n_tokens, row, first = described
    parts: dict[str, dict[str, np.ndarray]] = {"numbers": {}, "histograms": {}, "norms": {}}
    for key, (start, kind, shape) in places.items():
        n_bytes = math.prod(shape) * np.dtype(kind).itemsize
        part, _, name = key.partition(".")
        place = content.numpy()[start : start + n_bytes]
        parts[part][name] = place.view(kind).reshape(shape)
    histograms = LayerHistograms(first_bin=first, **parts["histograms"])
    norms = torch.from_numpy(parts["norms"][""]) if parts["norms"] else None
    return LayerSummary(layer, n_tokens, parts["numbers"], row, histograms, norms)
