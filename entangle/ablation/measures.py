"""What is measured of every arm: raw numbers a window and a pair, and the rows made of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
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
from entangle.evaluation.affix_effect import affix_effect, tell
from entangle.evaluation.perplexity import measure_perplexity
from entangle.models.loading import LanguageModel
from entangle.stats.intervals import Interval, window_mean_interval

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
