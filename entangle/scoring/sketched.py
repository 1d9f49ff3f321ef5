"""Scoring by sketches: statistics of all layers from one pass, nothing recorded."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from entangle.models.layers import Layer
from entangle.precision import full_precision
from entangle.recording.hooks import Batch, SeenTensor, run_observed
from entangle.scoring.measured import MeasuredLayer
from entangle.seeding import torch_rng
from entangle.stats.mapping_difficulty import PairSketch
from entangle.stats.sketch import OutputSketch


class _Pairing:
    """Draws the pairs of each batch, and remembers the last input's distances."""

    def __init__(self, *, seed: int, share: float) -> None:
        self._seed, self._share, self._batch = seed, share, -1
        self._last: SeenTensor | None = None
        self._drawn: dict[int, Tensor] = {}

    def next_batch(self) -> None:
        """Forget the pairs of the batch before."""
        self._batch += 1
        self._drawn.clear()
        self._last = None

    def of(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return pairs (2, pairs) of token indices and their input distances (pairs,)."""
        if self._last is None or not self._last.same_as(inputs):
            rows = inputs.flatten(0, -2)
            first, second = pairs = self._pairs(rows.shape[0]).to(rows.device)
            self._found = pairs, (rows[first].float() - rows[second].float()).norm(dim=1)
            self._last = SeenTensor.of(inputs)
        return self._found

    def _pairs(self, n_tokens: int) -> Tensor:
        """Pair tokens of the first half of the batch with tokens of the second."""
        if n_tokens not in self._drawn:
            half = n_tokens // 2
            count = min(half, round(half * self._share))
            rng = torch_rng(self._seed, "pairs", self._batch, n_tokens)
            first, second = (torch.randperm(half, generator=rng)[:count] for _ in range(2))
            self._drawn[n_tokens] = torch.stack([first, second + half])
        return self._drawn[n_tokens]


def score_sketched(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    *,
    n_groups: int,
    pair_share: float,
    seed: int,
    report: Callable[[int], None],
) -> list[MeasuredLayer]:
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
    """
    outputs = {layer.name: OutputSketch(layer.out_features, n_groups=n_groups) for layer in layers}
    differences = {layer.name: PairSketch(layer.out_features) for layer in layers}
    pairing = _Pairing(seed=seed, share=pair_share)

    def reported() -> Iterator[Batch]:
        for batch in batches:
            pairing.next_batch()
            yield batch
            report(batch[1].shape[0])

    def update(group: int, layer: Layer, inputs: Tensor, produced: Tensor) -> None:
        rows = produced.flatten(0, -2)
        outputs[layer.name].update(rows, group=group)
        if pair_share > 0:
            differences[layer.name].update(rows, *pairing.of(inputs))

    with full_precision(), torch.no_grad():
        run_observed(module, layers, reported(), update)
        results = {name: sketch.result() for name, sketch in outputs.items()}
    return [
        MeasuredLayer(
            layer=layer,
            shape=results[layer.name].shape,
            sketch=results[layer.name],
            pairs=differences[layer.name].result() if pair_share > 0 else None,
            wd_bound=results[layer.name].wd_bound,
            method="sketch",
        )
        for layer in layers
    ]
