"""Hidden states of a text between two blocks: what a model that runs block by block holds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entangle.memory import by_device, give_back
from entangle.models.blocks import BlockRunner
from entangle.ranks import Ranks, current
from entangle.recording.stream import ByteBudget, TokenStore, ahead, as_budget

if TYPE_CHECKING:
    from entangle.recording.recorder import Recorder

PASS_TOKENS_GPU = 2**15
"""Most tokens that a GPU runs a block on at once."""
_PASS_NUMBERS_GPU = 2**27
"""Of the widest activation of a pass, so that what a block holds beside its records stays small."""


class HiddenStates:
    """Hidden states of fixed batches of sequences, kept within a byte budget.

    Parameters
    ----------
    batches
        Token ids of each batch, (sequences, tokens).
    memory
        Bytes in memory, or a budget shared with others; what is beyond spills (`TokenStore`). While
        they advance, the states before and after a block are held.
    joined
        Whether a GPU may run blocks on larger batches than these, which only rounding depends on,
        and several ranks share out these passes, each holding the states of its own; else the
        batches are a rank's own.
    """

    def __init__(
        self,
        batches: Sequence[Int[Tensor, "_ _"]],
        *,
        memory: int | ByteBudget,
        joined: bool = True,
    ) -> None:
        self._batches, self._budget = batches, as_budget(memory)
        self._joins = joined
        self._passes = batches
        self._first = batches[0] if len(batches) else torch.zeros(0, 0, dtype=torch.int64)
        self._store = TokenStore(self._budget)

    def enter(self, runner: BlockRunner) -> None:
        """Fill with what enters the first block."""
        if self._batches and self._joins:
            device = runner.enter(self._batches[0])[0].device
            most = by_device(device, cpu=0, gpu=_most_tokens(runner.widest))
            self._passes = _joined(self._batches, most)
            self._take_part(current())
        for ids in self._passes:
            self._store.append(runner.enter(ids)[0].flatten(0, -2))

    def _take_part(self, ranks: Ranks) -> None:
        """Keep the passes of this rank, and the batches that they are made of."""
        ends = [0, *accumulate(ids.numel() for ids in self._passes)]
        own = ranks.part(len(self._passes))
        begins = [0, *accumulate(ids.numel() for ids in self._batches)]
        self._batches = [
            ids
            for ids, begin in zip(self._batches, begins, strict=False)
            if ends[own.start] <= begin < ends[own.stop]
        ]
        self._passes = [self._passes[i] for i in own]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (token ids, hidden states of shape (sequences, tokens, features)), in order."""
        return self._split(self._batches)

    @property
    def first(self) -> Int[Tensor, "sequences tokens"]:
        """Token ids of the first batch of all."""
        return self._first

    @property
    def pass_tokens(self) -> list[int]:
        """Tokens of each batch of `passes`."""
        return [ids.numel() for ids in self._passes]

    def passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As iterating, in batches to run a block on: larger ones on a GPU."""
        return self._split(self._passes)

    def _split(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        ends = list(accumulate(ids.numel() for ids in batches))
        spans = (
            partial(self._store.span, end - ids.numel(), end)
            for ids, end in zip(batches, ends, strict=True)
        )
        found = ahead(spans) if self._store.in_file else (span() for span in spans)
        for ids, rows in zip(batches, found, strict=True):
            yield ids, rows.unflatten(0, tuple(ids.shape))

    def run(
        self, runner: BlockRunner, index: int, recorder: "Recorder | None" = None
    ) -> Iterator[Tensor]:
        """Yield what block ``index`` makes of every pass, recorded if so asked."""
        with nullcontext() if recorder is None else recorder.watching():
            for ids, hidden in self.passes():
                with nullcontext() if recorder is None else recorder.one_pass(tuple(ids.shape)):
                    found = runner.run(index, hidden, runner.enter(ids)[1])
                yield found

    def advance(self, runner: BlockRunner, index: int, recorder: "Recorder | None" = None) -> None:
        """Replace the states of every batch by what block ``index`` makes of them."""
        self.follow(self.run(runner, index, recorder))

    def follow(self, found: Iterable[Tensor]) -> None:
        """Replace the states of all batches by others, given in their order."""
        following = TokenStore(self._budget)
        try:
            for states in found:
                following.append(states.flatten(0, -2))
        except BaseException:
            following.close()
            raise
        self._store.close()
        self._store = following
        give_back()

    def close(self) -> None:
        """Give the memory and the temporary file back."""
        self._store.close()


def _most_tokens(widest: int) -> int:
    """Return how many tokens to run a block on at once on a GPU, its widest layer so wide."""
    return max(1, min(PASS_TOKENS_GPU, _PASS_NUMBERS_GPU // widest))


def _joined(batches: Sequence[Tensor], most: int) -> list[Tensor]:
    """Join neighbouring batches of sequences of one length, up to so many tokens."""
    joined: list[Tensor] = []
    for ids in batches:
        last = joined[-1] if joined else None
        fits = last is not None and last.numel() + ids.numel() <= most
        if fits and last is not None and last.shape[1] == ids.shape[1]:
            joined[-1] = torch.cat([last, ids])
        else:
            joined.append(ids)
    return joined


def last_by_blocks(
    runner: BlockRunner,
    batches: Sequence[Int[Tensor, "_ _"]],
    *,
    memory: int | ByteBudget,
    report: Callable[[int], None] = lambda _blocks: None,
) -> Iterator[tuple[Int[Tensor, "_ _"], Float[Tensor, "_ _ _"]]]:
    """Run all batches through one block after the other; yield ids and the last block's output.

    In order; what the model makes of it (`BlockRunner.leave`) is its own forward pass, bit for bit.

    Parameters
    ----------
    runner
        The model's blocks.
    batches
        Token ids of each batch, (sequences, tokens).
    memory
        Bytes of hidden states in memory, or a budget; what is beyond spills (`TokenStore`).
    report
        Called with 1 after each block.
    """
    with closing(HiddenStates(batches, memory=memory, joined=False)) as states:
        states.enter(runner)
        for index in range(runner.n_blocks):
            states.advance(runner, index)
            report(1)
        yield from states
