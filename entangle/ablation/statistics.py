"""What an ablation must know of the dense model: scores and gram matrices, from one pass."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.progress import ProgressBar
from entangle.recording.recorder import Recorded, Recorder, of_one_group, told
from entangle.scoring.score import score_layers
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
        self._source: dict[str, int] = {}
        self._grams: dict[int, Gram] = {}
        self._tokens: Counter[str | int] = Counter()

    def __call__(self, seen: Recorded) -> None:
        """Add what one layer received in one pass."""
        seen.check_affine("pruning")
        self._source[seen.layer.name] = seen.source
        self._tokens[seen.layer.name] += len(seen.inputs)
        if not seen.leads:
            return
        self._tokens[seen.source] += len(seen.inputs)
        if seen.source not in self._grams:
            self._grams[seen.source] = Gram(
                seen.layer.in_features, device=seen.inputs.device, dtype=torch.float32
            )
        self._grams[seen.source].update(seen.inputs)

    def result(self) -> dict[str, GramResult]:
        """Return the gram of every layer."""
        for name, source in self._source.items():
            if self._tokens[name] != self._tokens[source]:
                raise InvalidInput(
                    f"layer {name!r} has the input of another layer in some of its runs only; "
                    "take it alone."
                )
        results = {source: gram.result() for source, gram in self._grams.items()}
        return {name: results[source] for name, source in self._source.items()}


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
    named: bool = True,
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
    named
        Whether the layers were asked for by name. If not, those that see no token are left out.
    """
    watch = GramWatch()
    if scores is None:
        scores = score_layers(
            model, calibration, layers, may_be_silent=not named, method="sketch", md=md,
            seed=seed, progress=progress, watch=watch if grams else None,
        )  # fmt: skip
    elif grams:
        _run(model, calibration, layers, watch, progress)
    return LayerStatistics(scores, watch.result())


def _run(
    model: LanguageModel,
    calibration: CalibrationSet,
    layers: Sequence[Layer],
    watch: Callable[[Recorded], None],
    progress: bool | None,
) -> None:
    with ProgressBar("calibrating", enabled=progress) as bar:
        bar.start(calibration.n_seq, "sequences")

        Recorder(layers, watch).run(model.module, told(of_one_group(calibration), bar.advance))
