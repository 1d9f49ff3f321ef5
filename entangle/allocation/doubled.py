"""Run a model with every block twice: dense, and pruned on the same inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from entangle.allocation.measurements import Measurements, square_sum
from entangle.calibration import CalibrationSet
from entangle.models.layers import Layer, find_blocks
from entangle.pruning.masks import prune_smallest
from entangle.recording.hooks import forward
from entangle.recording.order import look_at
from entangle.recording.recorder import Recorded, Recorder
from entangle.recording.surgery import Change, changed_rows

SEQUENCES = 8
"""Calibration sequences that are run, all in one batch, so of one length (`_first`)."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """How much pruning changes the inputs of layers inside their own block."""

    error: float
    """Sum over layers of ``‖n / Σn − n' / Σn'‖₂ / in_features``, n and n' the norms of the inputs
    over the tokens, dense and pruned."""
    difference: Mapping[str, Float[Tensor, " _"]]
    """``n − n'`` of each layer, (in_features,)."""


@contextmanager
def aligner(
    measured: Measurements,
) -> Iterator[Callable[[Mapping[str, Float[Tensor, " _"]]], Alignment]]:
    """Yield a function that tells how much pruning to given sparsities changes layers' inputs.

    Sparsities are of each neuron, by layer name. Block after block is pruned by Wanda, and the
    inputs of its layers are compared before and after: each block runs twice on what comes out of
    the pruned blocks before it, dense, which also gives the norms for Wanda, and pruned, which is
    handed on. Weights are put back bit for bit. Layers outside the blocks are not pruned.

    Parameters
    ----------
    measured
        Model, layers and calibration set.
    """
    doubled = _Doubled(measured)
    blocks = find_blocks(measured.model.module)[1]
    with doubled.recorder.watching(), _replaced(blocks, doubled.run_twice):
        yield doubled.align


class _Doubled:
    """What is pruned, and the sums of squares of inputs seen so far."""

    def __init__(self, measured: Measurements) -> None:
        self.layers = tuple(layer for layer in measured.layers if layer.block is not None)
        self._module, self._ids = measured.model.module, _first(measured.calibration)
        self._sparsity: Mapping[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        dense = Recorder(self.layers, lambda _seen: None, affine="pruning")
        dense.run(self._module, [(0, self._ids)])
        habits = look_at(self._module, self.layers, self._ids)
        self.recorder = Recorder(self.layers, self._note, compared=False, habits=habits)
        """Watches the layers, whose weights change meanwhile."""

    def align(self, sparsity: Mapping[str, Float[Tensor, " _"]]) -> Alignment:
        """Run the model once, every block twice."""
        self._sparsity = sparsity
        self._dense: dict[str, Tensor] = {}
        self._sparse: dict[str, Tensor] = {}
        with self.recorder.one_pass(tuple(self._ids.shape)):
            forward(self._module, self._ids)
        norms = {
            name: (self._dense[name].sqrt(), after.sqrt()) for name, after in self._sparse.items()
        }
        error = sum(
            float((before / before.sum() - after / after.sum()).nan_to_num().norm()) / len(before)
            for before, after in norms.values()
        )
        return Alignment(error, {name: before - after for name, (before, after) in norms.items()})

    def _note(self, seen: Recorded) -> None:
        """Add the squares of an input to the sums of the run that is on."""
        name = seen.layer.name
        self._squares[name] = self._squares.get(name, 0) + square_sum(seen.inputs)

    def run_twice(self, index: int, run: Callable[[], Any]) -> Any:
        """Run a block dense, then pruned; return what the pruned one gives."""
        layers = [layer for layer in self.layers if layer.block == index]
        self._squares = self._dense
        found = run()
        seen = [layer for layer in layers if layer.name in self._dense]
        if not seen:
            return found
        self._squares = self._sparse
        with _pruned(seen, self._dense, self._sparsity):
            return run()


def _first(calibration: CalibrationSet) -> Int64[Tensor, "sequences tokens"]:
    """Return the first sequences that are long enough; of unequal ones as makes most tokens."""
    rows = calibration.rows
    falling = sorted(rows.lengths, reverse=True)[:SEQUENCES]
    count = max(range(1, len(falling) + 1), key=lambda n: (n * falling[n - 1], n))
    length = falling[count - 1]
    long = (i for i, own in enumerate(rows.lengths) if own >= length)
    return torch.stack([rows.sequence(i)[:length] for i in islice(long, count)])


@contextmanager
def _pruned(
    layers: Sequence[Layer], squares: Mapping[str, Tensor], sparsity: Mapping[str, Tensor]
) -> Iterator[None]:
    """Zero the weights of least ``|w| · ‖X_j‖₂`` of each row inside the ``with`` block."""
    changes: list[Change] = []
    for layer in layers:
        weight = layer.weight
        saliency = weight.abs().float() * squares[layer.name].sqrt().float()
        budget = (sparsity[layer.name] * weight.shape[1]).long().to(weight.device)
        pruned = weight.masked_fill(prune_smallest(saliency, budget), 0)
        changes.append((layer, torch.arange(layer.out_features), pruned))
    with changed_rows(changes):
        yield


@contextmanager
def _replaced(
    blocks: nn.ModuleList, call: Callable[[int, Callable[[], Any]], Any]
) -> Iterator[None]:
    """Call ``call(index, run)`` where block ``index`` is called; ``run()`` is the block itself."""
    own = [block.__dict__.get("forward") for block in blocks]  # accelerate, for one, sets it
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = partial(_call, call, index, block.forward)
        yield
    finally:
        for block, kept in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            block.__dict__.update({} if kept is None else {"forward": kept})


def _call(
    call: Callable[[int, Callable[[], Any]], Any],
    index: int,
    run: Callable[..., Any],
    *args: object,
    **kwargs: object,
) -> Any:
    return call(index, partial(run, *args, **kwargs))
