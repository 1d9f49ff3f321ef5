"""What an ablation must know of the dense model: scores and gram matrices, from one pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entangle.calibration import CalibrationSet
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.progress import ProgressBar
from entangle.recording.hooks import SeenTensor, run_observed
from entangle.scoring.score import score
from entangle.scoring.scores import NeuronScores
from entangle.stats.gram import Gram, GramResult


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Scores of some layers' neurons, and the gram matrix of each layer's inputs."""

    scores: NeuronScores
    """One row a neuron."""
    grams: Mapping[str, GramResult]
    """``XᵀX`` by layer name; layers that read one input share the object; empty if not wanted."""


class GramWatch:
    """Accumulates the grams of watched layers; layers with one input share an accumulator."""

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}
        self._grams: dict[str, Gram] = {}
        self._last: tuple[str, SeenTensor] | None = None

    def __call__(self, layer: Layer, inputs: Tensor, _outputs: Tensor) -> None:
        """Add the inputs of one run of a layer, (..., in_features)."""
        shared = self._last is not None and self._last[1].same_as(inputs)
        if layer.name not in self._owner:
            same = self._owner[self._last[0]] if self._last is not None and shared else layer.name
            self._owner[layer.name] = same
        if self._owner[layer.name] == layer.name:
            rows = inputs.flatten(0, -2)
            if layer.name not in self._grams:
                self._grams[layer.name] = Gram(
                    layer.in_features, device=rows.device, dtype=torch.float32
                )
            self._grams[layer.name].update(rows)
        self._last = layer.name, SeenTensor.of(inputs)

    def result(self) -> dict[str, GramResult]:
        """Return the gram of every layer."""
        results = {name: gram.result() for name, gram in self._grams.items()}
        return {name: results[owner] for name, owner in self._owner.items()}


def layer_statistics(
    model: LanguageModel,
    calibration: CalibrationSet,
    layers: Sequence[Layer],
    *,
    scores: NeuronScores | None = None,
    grams: bool = True,
    md: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> LayerStatistics:
    """Score layers and accumulate their grams in one pass over the calibration set.

    Parameters
    ----------
    model, calibration, layers
        What to run, on what, and which layers to watch.
    scores
        Scores made before; then only the grams are accumulated, and without them nothing runs.
    grams
        Whether pruning needs the grams.
    md, seed, progress
        As in `entangle.score`.
    """
    watch = GramWatch()
    if scores is None:
        names = [layer.name for layer in layers]
        scores = score(
            model, calibration, layers=names, method="sketch", md=md, seed=seed,
            progress=progress, watch=watch if grams else None,
        )  # fmt: skip
    elif grams:
        _run(model, calibration, layers, watch, progress)
    return LayerStatistics(scores, watch.result())


def _run(
    model: LanguageModel,
    calibration: CalibrationSet,
    layers: Sequence[Layer],
    watch: Callable[[Layer, Tensor, Tensor], None],
    progress: bool | None,
) -> None:
    with ProgressBar("calibrating", enabled=progress) as bar:
        bar.start(calibration.n_seq, "sequences")

        def batches() -> object:
            for _, ids in calibration.batches():
                yield 0, ids
                bar.advance(len(ids))

        run_observed(
            model.module, layers, batches(),  # type: ignore[arg-type]
            lambda _group, layer, inputs, outputs: watch(layer, inputs, outputs),
        )  # fmt: skip
