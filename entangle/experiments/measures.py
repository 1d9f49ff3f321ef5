"""What is measured of every arm: raw numbers a window and a pair, and the rows made of them.

What an ablation must know of the dense model: scores and gram matrices, from one pass.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from entangle.checks import choices
from entangle.errors import InvalidInput
from entangle.evaluation import (
    DenseReference,
    Divergence,
    EvaluationText,
    MinimalPairs,
    PairScores,
    Perplexity,
    accuracy_difference,
    compare_with_dense,
    minimal_pair_scores,
    perplexity_ratio,
)
from entangle.evaluation.perplexity import affix_effect, measure_perplexity, tell
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.recording.recorder import Recorded, Recorder, of_one_group, told
from entangle.results.scores import NeuronScores
from entangle.runs.progress import ProgressBar
from entangle.scoring.score import score_layers
from entangle.stats.gram import Gram, GramResult
from entangle.stats.intervals import Interval, window_mean_interval
from entangle.texts.calibration_set import CalibrationSet

Arrays = Mapping[str, NDArray[np.float64]]
"""Raw numbers of one arm: ``loss``, ``kl`` and ``agreement`` a window; ``good`` and ``bad`` a
pair."""

MEASURES = ("perplexity", "divergence", "pairs")
"""What can be asked for: perplexity; KL and top-1 agreement with the dense model; minimal pairs."""


@dataclass(frozen=True, eq=False)
class Protocol:
    """What arms are measured on."""

    text: EvaluationText | None
    """For perplexity and divergence."""
    pairs: MinimalPairs | None
    """For minimal-pair accuracy."""
    measures: tuple[str, ...]
    """From `MEASURES`."""

    @classmethod
    def of(
        cls,
        text: EvaluationText | None,
        pairs: MinimalPairs | None,
        measures: str | Iterable[str] | None,
    ) -> "Protocol":
        """Check what is asked for; by default everything that there is text or pairs for."""
        if measures is None:
            measures = [*(["perplexity"] if text else []), *(["pairs"] if pairs else [])]
            if not measures:
                raise InvalidInput("nothing is measured; give `evaluation` (a text) or `pairs`.")
        measures = choices("measures", measures, MEASURES, kind="measure")
        needs_text = {"perplexity", "divergence"} & set(measures)
        if needs_text and text is None:
            raise InvalidInput(f"{min(needs_text)} needs a text; give `evaluation`.")
        if "pairs" in measures and pairs is None:
            raise InvalidInput("minimal-pair accuracy needs pairs; give `pairs`.")
        return cls(text, pairs, tuple(measures))

    def describe(self) -> dict[str, object]:
        """Return the texts and measures, JSON-serialisable."""
        return {
            "text": None if self.text is None else self.text.describe(),
            "pairs": None if self.pairs is None else self.pairs.describe(),
            "measures": list(self.measures),
        }


class Meter:
    """Measures a model as it is at the time, and remembers the dense one.

    Parameters
    ----------
    model
        Dense when this is made; edited, inside its blocks only, when it is measured.
    protocol
        What to measure, and on what.
    memory
        Bytes for the dense hidden states that divergence needs.
    progress
        Show progress bars of the dense model's measurement.
    """

    def __init__(
        self,
        model: LanguageModel,
        protocol: Protocol,
        *,
        memory: int,
        progress: bool | None = False,
    ) -> None:
        self._model, self._protocol, self._progress = model, protocol, progress
        self._reference: DenseReference | None = None
        if protocol.text is not None and progress is not False:
            tell(affix_effect(model, protocol.text.rows.sequence(0), protocol.text.settings))
        if "divergence" in protocol.measures and protocol.text is not None:
            self._reference = DenseReference(model, protocol.text, memory=memory, progress=progress)
        self.dense = self.measure()
        """Raw numbers of the dense model."""
        self._progress = False

    def measure(self) -> dict[str, NDArray[np.float64]]:
        """Return the raw numbers of the model as it is."""
        text, pairs, found = self._protocol.text, self._protocol.pairs, {}
        progress = self._progress
        if self._reference is not None:
            seen = compare_with_dense(self._model, self._reference, progress=progress)
            found["loss"] = seen.perplexity.window_losses
            found["kl"] = seen.window_kl
            found["agreement"] = seen.window_agreements.astype(np.float64)
        elif text is not None and "perplexity" in self._protocol.measures:
            found["loss"] = measure_perplexity(self._model, text, progress=progress).window_losses
        if pairs is not None and "pairs" in self._protocol.measures:
            scores = minimal_pair_scores(self._model, pairs, progress=progress)
            found["good"], found["bad"] = scores.good, scores.bad
        return {name: np.ascontiguousarray(values) for name, values in found.items()}

    def close(self) -> None:
        """Forget the dense hidden states."""
        if self._reference is not None:
            self._reference.close()


def measure_rows(
    found: Arrays, dense: Arrays, protocol: Protocol, *, seed: int
) -> list[dict[str, object]]:
    """Return ``measure``, ``value``, ``low``, ``high`` of everything that was measured of an arm.

    ``perplexity`` (percentile bootstrap over windows), ``perplexity_ratio`` to the dense model
    (the same windows resampled for both), ``kl`` in nats a token and ``top1_agreement``,
    ``accuracy`` and ``accuracy:PARADIGM`` (Wilson), and ``accuracy_difference`` to the dense model
    (the same pairs resampled for both).
    """
    rows: list[dict[str, object]] = []

    def add(measure: str, interval: Interval) -> None:
        values = {"value": interval.value, "low": interval.low, "high": interval.high}
        rows.append({"measure": measure, **values})

    if "loss" in found:
        _text_rows(add, found, dense, protocol, seed)
    if "good" in found and protocol.pairs is not None:
        scores, base = (
            PairScores(arrays["good"], arrays["bad"], protocol.pairs, {})
            for arrays in (found, dense)
        )
        for row in scores.table(seed=seed).to_dict("records"):
            name = "accuracy" if row["paradigm"] == "overall" else f"accuracy:{row['paradigm']}"
            add(name, Interval(row["accuracy"], row["low"], row["high"]))
        add("accuracy_difference", accuracy_difference(scores, base, seed=seed))
    return rows


def _text_rows(
    add: Callable[[str, Interval], None],
    found: Arrays,
    dense: Arrays,
    protocol: Protocol,
    seed: int,
) -> None:
    text = protocol.text
    if text is None:
        return
    settings = text.describe(), text.n_tokens, text.n_words, text.n_bytes
    result, base = (Perplexity(arrays["loss"], *settings) for arrays in (found, dense))
    counts = text.window_tokens
    loss = window_mean_interval(found["loss"], counts, seed=seed)
    with np.errstate(over="ignore"):
        low, high = float(np.exp(loss.low)), float(np.exp(loss.high))
    add("perplexity", Interval(result.value, low, high))
    add("perplexity_ratio", perplexity_ratio(result, base, seed=seed))
    if "kl" in found:
        seen = Divergence(
            result, base, np.array(found["kl"]), found["agreement"].astype(np.int64), counts
        )
        for name in ("kl", "top1_agreement"):
            add(name, seen.interval(name, seed=seed))


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
