"""Ranks share out the batches of a text, and place bins where the first batch does."""

import pytest
import torch
from torch import Tensor, nn

from entangle.models.layers import find_layers
from entangle.ranks import RankLost, Ranks
from entangle.scoring import spread
from entangle.scoring.layer_scores import FinerOutputs, SharedSquares
from entangle.scoring.spread import FirstPlaces, LayerCounts, own_batches
from entangle.seeding import torch_rng
from entangle.stats.mapping_difficulty import PairSketch
from entangle.stats.sketch import OutputSketch

LAYER = find_layers(nn.ModuleDict({"layer": nn.Linear(4, 6)}), ["layer"], None)[0]


class Board(Ranks):
    """One of several ranks in one process, which share what they post."""

    def __init__(self, rank: int, size: int, posts: dict[str, bytes]) -> None:
        super().__init__(leads=rank == 0)
        self.rank, self.size, self.posts = rank, size, posts

    def post(self, name: str, content: bytes) -> None:
        self.posts[name] = content

    def posted(self, name: str) -> bytes | None:
        return self.posts.get(name)

    def check(self) -> None:
        raise RankLost("waits though nothing can come")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 64])
def test_every_batch_is_counted_once_and_the_first_by_the_first_rank(size: int, count: int) -> None:
    batches = [(i, (0, torch.zeros(1, 1))) for i in range(count)]
    found = [own_batches(batches, Board(rank, size, {})) for rank in range(size)]
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


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> tuple[FirstPlaces, FirstPlaces]:
    """The places of both of two ranks, in the same run."""
    posts: dict[str, bytes] = {}
    made = []
    for rank in (0, 1):
        monkeypatch.setattr(spread, "_RUNS", iter([5]))
        made.append(FirstPlaces(Board(rank, 2, posts)))
        made[-1].before(first=True)
    return made[0], made[1]


def test_bins_of_all_ranks_are_those_of_the_first_batch(
    two: tuple[FirstPlaces, FirstPlaces],
) -> None:
    first, second = counts(), counts()
    first.outputs.update(outputs(0))
    first.pairs.update(outputs(0)[:20], outputs(0)[20:], torch.ones(20))
    two[0].tell("layer", first)
    two[1].fetch("layer", second, torch.device("cpu"))
    second.outputs.update(outputs(1))
    assert second.outputs.n_tokens == 40
    for mine, theirs in zip(second.places(), first.places(), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or torch.equal(mine, theirs)
    alone = counts()
    alone.outputs.update(outputs(1))
    assert not torch.equal(alone.places()[0], second.places()[0])  # type: ignore[arg-type]


def test_nobody_waits_for_a_layer_that_the_first_batch_does_not_reach(
    two: tuple[FirstPlaces, FirstPlaces],
) -> None:
    own = counts()
    with pytest.raises(RankLost):  # the first batch may still come to it
        two[1].fetch("expert", own, torch.device("cpu"))
    two[0].after()
    two[1].fetch("expert", own, torch.device("cpu"))
    assert own.outputs.place is None
    two[1].after()
    for one in two:  # of the next block
        one.before(first=True)
    with pytest.raises(RankLost):
        two[1].fetch("other", own, torch.device("cpu"))


def test_later_batches_neither_tell_nor_wait(two: tuple[FirstPlaces, FirstPlaces]) -> None:
    own = counts()
    own.outputs.update(outputs(0))
    for one in two:
        one.after()
        one.before(first=False)
    two[0].tell("late", own)
    two[1].fetch("late", other := counts(), torch.device("cpu"))
    assert other.outputs.place is None
