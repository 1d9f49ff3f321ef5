"""Scoring shared out to several ranks: sequences by sketch, layers by the exact method.

Every rank runs the first batch, which places the bins; the first rank counts it. The other batches
are shared out. What was counted of a layer comes together on one rank, in the order of the
sequences, and is measured there; then every rank has all summaries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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

    def begin(self) -> None:
        """Begin anew with the places alone, after `outputs` were placed and not counted."""
        self.pairs = self.pairs.placed_at(self.pairs.place)
        self.finer = self.finer.decided(self.finer.again)

    def placed_at(self, places: Sequence[Tensor | None]) -> None:
        """Begin anew with what `places` gave."""
        outputs, pairs, again = places
        if outputs is not None:
            self.outputs = self.outputs.placed_at(outputs)
        self.pairs = self.pairs.placed_at(None if pairs is None else pairs[0])
        self.finer = self.finer.decided(None if again is None else again[0] > 0)

    def known(self) -> list[Any]:
        """Return what all ranks must know of this to `pool` it, as JSON takes it."""
        return [self.outputs.known(), self.pairs.known(), self.finer.known()]

    def pool(self, ranks: Ranks, known: Sequence[Sequence[Any]], *, to: int) -> None:
        """Put what all ranks counted together on rank ``to``, as one would have counted it."""
        outputs, pairs, finer = zip(*known, strict=True)
        self.outputs.pool(ranks, outputs, to=to)
        self.pairs.pool(ranks, pairs, to=to)
        self.finer.pool(ranks, finer, to=to)


_ALIGNED = 8  # bytes
_ROWS = (2, 1, 1)  # of each of `LayerCounts.places`


def own_batches(
    numbered: Sequence[tuple[int, Batch]], ranks: Ranks, *, first: bool = True
) -> list[tuple[int, Batch]]:
    """Return this rank's part of the batches, after the ``first``, which all ranks run."""
    if ranks.size == 1:
        return list(numbered)
    own = [numbered[index + 1] for index in ranks.part(len(numbered) - 1)]
    return [numbered[0], *own] if first else own


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
    known = ranks.exchange([[one is not None for one in own[layer.name]] for layer in layers])
    chosen = [
        [next((rank for rank, had in enumerate(known) if had[i][j]), None) for j in range(3)]
        for i in range(len(layers))
    ]
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
    seen = ranks.exchange([counts[layer.name].outputs.n_tokens for layer in layers])
    heard = [layer for layer, *tokens in zip(layers, *seen, strict=True) if any(tokens)]
    if ranks.size == 1:
        return heard
    known = ranks.exchange([counts[layer.name].known() for layer in heard])
    for number, layer in enumerate(heard):
        found = [own[number] for own in known]
        counts[layer.name].pool(ranks, found, to=number % ranks.size)
        if number % ranks.size != ranks.rank:
            del counts[layer.name]
    return heard[ranks.rank :: ranks.size]


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
    ranks: Ranks, own: Sequence[LayerSummary], layers: Sequence[Layer]
) -> list[LayerSummary]:
    """Return the summaries of all ranks, in the order of the layers."""
    if ranks.size == 1:
        return list(own)
    described, content = _packed(own)
    found, known = {one.layer.name: one for one in own}, {layer.name: layer for layer in layers}
    for rank, (size, theirs) in enumerate(ranks.exchange([len(content), described])):
        sent = content if rank == ranks.rank else torch.empty(size, dtype=torch.uint8)
        ranks.broadcast(sent, by=rank)
        if rank != ranks.rank:
            found |= {name: _unpacked(sent, known[name], one) for name, one in theirs.items()}
    return [found[layer.name] for layer in layers if layer.name in found]


def _packed(summaries: Sequence[LayerSummary]) -> tuple[dict[str, Any], Tensor]:
    """Return what `_unpacked` needs of each layer, as JSON takes it, and all arrays' bytes."""
    described: dict[str, Any] = {}
    arrays, size = list[tuple[int, np.ndarray]](), 0
    for one in summaries:
        own = {f"numbers.{name}": array for name, array in one.numbers.items()}
        shape = {f.name: getattr(one.histograms, f.name) for f in fields(LayerHistograms)}
        own |= {f"histograms.{k}": v for k, v in shape.items() if isinstance(v, np.ndarray)}
        own |= {} if one.norms is None else {"norms.": one.norms.numpy()}
        places = {}
        for name, array in own.items():
            places[name] = [size, array.dtype.str, array.shape]
            arrays.append((size, array))
            size += -(-array.nbytes // _ALIGNED) * _ALIGNED
        described[one.layer.name] = [places, one.n_tokens, one.row, one.histograms.first_bin]
    content = torch.zeros(size, dtype=torch.uint8)
    for start, array in arrays:
        place = content.numpy()[start : start + array.nbytes]
        np.copyto(place.view(array.dtype).reshape(array.shape), array)
    return described, content


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
