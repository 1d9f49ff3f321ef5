"""Ranks share out the batches of a text, and place bins where the first batch does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entangle.models.layers import find_layers
from entangle.ranks import Ranks
from entangle.scoring.finer import FinerOutputs, SharedSquares
from entangle.scoring.spread import FirstPlaces, LayerCounts, _chosen, own_batches
from entangle.seeding import torch_rng
from entangle.stats.bins import GROUP_FOLD
from entangle.stats.mapping_difficulty import PairSketch
from entangle.stats.sketch import OutputSketch

LAYER = find_layers(nn.ModuleDict({"layer": nn.Linear(4, 6)}), ["layer"], None)[0]


class Board(Ranks):
    """One of two ranks in one process, of which the second hears what the first has told."""

    def __init__(self, rank: int, size: int, said: list[Any]) -> None:
        super().__init__(leads=rank == 0)
        self.rank, self.size, self.said = rank, size, said

    def told(self, content: bytes | None, *, by: int = 0) -> bytes:
        assert by == 0
        if self.rank:
            return bytes(self.said.pop(0))
        assert content is not None
        self.said.append(content)
        return content

    def broadcast(self, tensor: Tensor, *, by: int, met: bool = False) -> None:
        assert by == 0
        assert met
        if self.rank:
            tensor.copy_(self.said.pop(0))
        else:
            self.said.append(tensor.clone())


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 64])
def test_every_batch_is_counted_once_and_the_first_by_the_first_rank(size: int, count: int) -> None:
    batches = [(i, (0, torch.zeros(1, 1))) for i in range(count)]
    found = [own_batches(batches, Board(rank, size, [])) for rank in range(size)]
    counted = [number for own, drop in found if not drop for number, _ in own]
    assert counted == list(range(count))
    assert not found[0][1]
    for own, drop in found:
        assert not drop or [number for number, _ in own] == [0]
        assert len(own) <= -(-count // size)  # nobody does more than a share


def counts() -> LayerCounts:
    return LayerCounts(
        OutputSketch(6, split=True), PairSketch(6, split=True),
        FinerOutputs(LAYER, SharedSquares(), split=True),
    )  # fmt: skip


def outputs(seed: int) -> Tensor:
    return torch.randn(40, 6, generator=torch_rng(seed, "outputs"))


Two = list[tuple[LayerCounts, FirstPlaces]]


@pytest.fixture
def two() -> Two:
    """The counts of both of two ranks that begin with their first batch, and their places."""
    said: list[Any] = []
    made = []
    for rank in (0, 1):
        own = counts()
        places = FirstPlaces(Board(rank, 2, said), {"layer": own}, [LAYER])
        places.before(first=True)
        made.append((own, places))
    return made


def test_bins_of_all_ranks_are_those_of_the_first_batch(two: Two) -> None:
    (first, tells), (second, hears) = two
    first.outputs.update(outputs(0))
    first.pairs.update(outputs(0)[:20], outputs(0)[20:], torch.ones(20))
    tells.tell("layer")
    hears.fetch("layer")
    second.outputs.update(outputs(1))
    hears.fetch("layer")  # has its places, and waits for nothing
    assert second.outputs.n_tokens == 40
    for mine, theirs in zip(second.places(), first.places(), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or torch.equal(mine, theirs)
    alone = counts()
    alone.outputs.update(outputs(1))
    assert not torch.equal(alone.places()[0], second.places()[0])  # type: ignore[arg-type]


def test_nobody_waits_for_a_layer_that_the_first_batch_does_not_reach(two: Two) -> None:
    (_, tells), (own, hears) = two
    tells.tell("layer")  # of which no row came
    with pytest.raises(IndexError):  # nothing was told: the first batch may still come to it
        hears.fetch("layer")
    tells.after()
    hears.fetch("layer")
    assert own.outputs.place is None
    hears.after()


def test_what_was_told_of_other_layers_counts_too(two: Two) -> None:
    (first, tells), (own, hears) = two
    first.outputs.update(outputs(0))
    tells.tell("layer")
    tells.after()
    hears.after()  # of a batch that did not reach the layer
    assert torch.equal(own.places()[0], first.places()[0])  # type: ignore[arg-type]


def test_places_that_all_have_from_the_first_rank_are_not_sent_again() -> None:
    told, nothing, more = [True, False, True], [False] * 3, [True, True, True]
    assert _chosen([(told, told)] * 3) == [None, None, None]
    assert _chosen([(nothing, nothing)] * 3) == [None, None, None]
    assert _chosen([(told, told), (more, told)]) == [0, 1, 0]  # all begin anew, so get all
    assert _chosen([(nothing, nothing), (told, nothing)]) == [1, None, 1]


def test_the_bins_that_are_used_are_those_that_hold_counts() -> None:
    sketches = [OutputSketch(6) for _ in range(3)]
    sketches[0].update(outputs(0))
    sketches[2].update(outputs(0) * torch.linspace(1, 9, 40)[:, None])
    for own, (first, last) in zip(sketches, OutputSketch.used(sketches), strict=True):
        counts = own._counts.sum(0).nonzero() // GROUP_FOLD if own.n_tokens else torch.empty(0)
        assert (own.n_tokens > 0) == (first <= last)
        assert len(counts) == 0 or (first, last) == (int(counts.min()), int(counts.max()))


def test_later_batches_neither_tell_nor_wait(two: Two) -> None:
    (first, tells), (own, hears) = two
    first.outputs.update(outputs(0))
    tells.after()
    hears.after()
    for _, one in two:
        one.before(first=False)
    tells.tell("layer")
    hears.fetch("layer")
    assert own.outputs.place is None
