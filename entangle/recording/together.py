"""Watch all experts of a mixture at once, instead of one projection after the other."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from entangle.models.grouped import RoutedRows
from entangle.models.layers import Layer
from entangle.models.mixtures import ExpertBank, ExpertLinear, together

Watched = dict[str, dict[int, Layer]]
"""Layers of one mixture by projection and number of the expert."""


@dataclass(frozen=True, eq=False)
class RecordedExperts:
    """What the experts of one mixture received and gave on the tokens of one pass."""

    name: str
    """Name of the mixture."""
    layers: Mapping[str, Mapping[int, Layer]]
    """Those that are watched, by projection and number."""
    rows: RoutedRows
    """Of all experts."""
    group: int = 0
    """Group of the batch."""

    def blocks(self) -> Iterator[tuple[str, Layer, slice]]:
        """Yield every layer that is watched, after its projection, and which rows are its."""
        for key, named in self.layers.items():
            for number, layer in named.items():
                yield key, layer, slice(*self.rows.starts[number : number + 2])


def projection_of(layer: Layer) -> tuple[ExpertBank, str, int] | None:
    """Return mixture, projection and number of an expert's layer; None of another layer."""
    linear = layer.module
    if not isinstance(linear, ExpertLinear):
        return None
    key = next(key for key, stack in linear.bank.stacks.items() if stack is linear.stack)
    return linear.bank, key, linear.number


def by_mixture(layers: Sequence[Layer]) -> list[tuple[ExpertBank, Watched]]:
    """Return the mixtures that layers are of, and which of them are each one's."""
    found: dict[int, tuple[ExpertBank, Watched]] = {}
    for layer in layers:
        place = projection_of(layer)
        if place is not None:
            bank, key, number = place
            own = found.setdefault(id(bank), (bank, defaultdict(dict)))[1]
            own[key][number] = layer
    return list(found.values())


@contextmanager
def watched_together(
    layers: Sequence[Layer],
    mixtures: Sequence[tuple[ExpertBank, Watched]],
    tell: Callable[[ExpertBank, RecordedExperts], None],
) -> Iterator[Sequence[Layer]]:
    """Be told of the experts among layers, all of a mixture at once, inside the ``with`` block.

    ``mixtures`` are those of `by_mixture` of the layers, or none of them.

    Yields
    ------
    sequence of Layer
        Those that must be watched one by one: no experts, or of a mixture that cannot run at once
        (one whose experts are hooked or replaced, or that does not say whose its tokens are).
    """
    with ExitStack() as stack:
        done = set[str]()
        for bank, own in mixtures:
            if bank.can_run_together:
                stack.enter_context(together(bank, partial(_told, tell, bank, own)))
                done |= {layer.name for named in own.values() for layer in named.values()}
        yield [layer for layer in layers if layer.name not in done] if done else layers


def _told(
    tell: Callable[[ExpertBank, RecordedExperts], None],
    bank: ExpertBank,
    own: Watched,
    rows: RoutedRows,
) -> None:
    with torch.inference_mode(False), torch.no_grad():
        tell(bank, RecordedExperts(bank.name, own, rows))
