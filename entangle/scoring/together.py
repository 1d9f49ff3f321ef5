"""What is counted of all experts of a mixture at once, and measured of them at once."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from entangle.kernels.dispatch import dispatch
from entangle.kernels.sketch import RowBlocks
from entangle.models.layers import Layer
from entangle.precision import row_parts
from entangle.recording.together import RecordedExperts, by_mixture
from entangle.scoring.finer import SharedSquares
from entangle.scoring.finer_experts import FinerExperts, block_squares
from entangle.scoring.layer_scores import (
    LayerSummary,
    MeasuredLayer,
    summarise_together,
    weight_norms,
)
from entangle.scoring.spread import LayerCounts
from entangle.stats.bins import Scratch
from entangle.stats.mapping_difficulty import PairSketch
from entangle.stats.sketches import OutputSketches

PairCounter = Callable[[PairSketch, Tensor, Tensor, str], None]


class ExpertCounts:
    """What is counted of one projection of some of a mixture's experts.

    Parameters
    ----------
    layers
        The experts' layers by number.
    key
        The projection.
    n_groups, scratch, squares
        As in `entangle.stats.sketch.OutputSketch` and `entangle.scoring.finer.FinerOutputs`.
    """

    def __init__(
        self,
        layers: Mapping[int, Layer],
        key: str,
        *,
        n_groups: int,
        scratch: Scratch,
        squares: SharedSquares,
    ) -> None:
        self.key, self.numbers, self.layers = key, list(layers), list(layers.values())
        first: Any = self.layers[0].module
        width = first.out_features
        self._outputs = OutputSketches(len(self.layers), width, n_groups=n_groups, scratch=scratch)
        self._finer = FinerExperts(self.layers, first.stack, self.numbers, squares)
        self.each = [
            LayerCounts(own, PairSketch(width, scratch=scratch), finer)
            for own, finer in zip(self._outputs.each, self._finer.each, strict=True)
        ]
        """What is counted of every layer, which may be counted by itself too."""

    def update(self, seen: RecordedExperts, blocks: RowBlocks, squares: Tensor) -> None:
        """Count what all experts gave in a pass; ``squares`` are those of their inputs, summed."""
        x, y = seen.rows.inputs[self.key], seen.rows.outputs[self.key]
        irregular = self._finer.irregular(x, y, blocks, squares)
        self._outputs.update(y, blocks.without(irregular), group=seen.group)
        if irregular:
            others = set(range(len(self.layers))).difference(irregular)
            rows = self._finer.finer(x, y, blocks, irregular)
            self._outputs.update(rows, blocks.without(others), group=seen.group)

    def rows(
        self, seen: RecordedExperts, place: int, block: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs of one layer in a pass, and its outputs as they are counted."""
        own, finer = slice(*block), self._finer.each[place]
        x, y = seen.rows.inputs[self.key][own], seen.rows.outputs[self.key][own]
        return x, finer.finer(x, y) if finer.computes else y

    def weight_norms(self) -> Tensor:
        """Return the Euclidean norm of every weight row of all layers, on the CPU."""
        return expert_norms(self.layers, self.numbers).cpu()

    def keep(self) -> None:
        """Take from the weights what `summaries` needs of them; no tokens come after this."""
        self._finer.keep()

    def summaries(self, *, pairs: bool, norms: Tensor | None = None) -> list[LayerSummary]:
        """Measure and summarise the layers that saw a token; ``norms`` as in `LayerSummary`."""
        found, width = list[LayerSummary](), self.layers[0].out_features
        for own, sketch, used in self._outputs.result():
            rounding = self._finer.error(sketch.shape, sketch.location, own)
            measured = MeasuredLayer(
                layer=self.layers[own[0]], shape=sketch.shape, sketch=sketch, pairs=None,
                wd_bound=sketch.wd_bound, method="sketch", rounding=rounding,
            )  # fmt: skip
            found += summarise_together(
                measured,
                [self.layers[i] for i in own],
                [self._outputs.each[i].n_tokens for i in own],
                [self.each[i].pairs.result() if pairs else None for i in own],
                used,
                None if norms is None else norms.unflatten(0, (-1, width))[own].flatten(),
            )
        return found


def _norms_at_once(layers: Sequence[Layer], numbers: Sequence[int]) -> Tensor:
    first: Any = layers[0].module
    weight = first.stack.weight
    parts = row_parts(len(numbers), max(1, _NORMS_AT_ONCE // weight[0].numel()))
    norms = [torch.linalg.vector_norm(weight[numbers[part]].float(), dim=2) for part in parts]
    return torch.cat(norms).flatten().double()


@dispatch(_norms_at_once, where=lambda layers, _numbers: layers[0].device.type == "cuda")
def expert_norms(layers: Sequence[Layer], _numbers: Sequence[int]) -> Float64[Tensor, " neurons"]:
    """Return the Euclidean norm of every weight row of one projection of experts, float64."""
    return torch.cat([weight_norms(layer) for layer in layers])


_NORMS_AT_ONCE = 2**26


class MixtureCounts:
    """What is counted of the experts among some layers, by mixture and projection."""

    def __init__(
        self, layers: Sequence[Layer], *, n_groups: int, scratch: Scratch, squares: SharedSquares
    ) -> None:
        self._found = {
            bank.name: [
                ExpertCounts(named, key, n_groups=n_groups, scratch=scratch, squares=squares)
                for key, named in own.items()
            ]
            for bank, own in by_mixture(layers)
        }
        """By name of the mixture, one a projection."""

    def take(self, names: Collection[str]) -> list[ExpertCounts]:
        """Return those with a layer of these names, and let go of them."""
        found = []
        for own in self._found.values():
            ready = [one for one in own if not {x.name for x in one.layers}.isdisjoint(names)]
            found += ready
            own[:] = [one for one in own if one not in ready]
        return found

    def counts(self) -> dict[str, LayerCounts]:
        """Return what is counted of every expert's layer, by name."""
        return {
            layer.name: counts
            for own in self._found.values()
            for one in own
            for layer, counts in zip(one.layers, one.each, strict=True)
        }

    def update(self, seen: RecordedExperts, pairs: PairCounter | None) -> None:
        """Count what a mixture gave in a pass, and pairs of it by a function, if one is given.

        The function is called with a layer's pair sketch, its inputs and outputs as counted, and a
        word that is the same for layers of the same inputs.
        """
        summed: list[tuple[Tensor, RowBlocks, Tensor]] = []
        for one in self._found[seen.name]:
            x = seen.rows.inputs[one.key]
            starts = seen.rows.starts
            ends = [(starts[i], starts[i + 1]) for i in one.numbers]
            known = [(b, own) for rows, b, own in summed if rows is x and list(b.ends) == ends]
            if not known:
                blocks = RowBlocks(ends, x.device)
                known = [(blocks, block_squares(x, blocks))]
                summed.append((x, *known[0]))
            blocks, squares = known[0]
            one.update(seen, blocks, squares)
            for place, block in enumerate(blocks.ends if pairs is not None else ()):
                if pairs is not None and block[1] > block[0]:
                    inputs, rows = one.rows(seen, place, block)
                    pairs(one.each[place].pairs, inputs, rows, f"{id(x)} {block[0]}")
