"""The one way of experimenting: arms are made from the dense model, measured, and kept.

`entangle.ablate` and `entangle.compare` say which arms there are, how each is made and what tables
come of their raw numbers; everything else about them is here, and the same for both.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, load_file
from safetensors.numpy import save as to_safetensors

from entangle.checks import choices
from entangle.doors import brought
from entangle.errors import EntangleError, InvalidInput
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
from entangle.evaluation.measures import MEASURES as DOOR
from entangle.evaluation.measures import is_own, measure_own
from entangle.evaluation.perplexity import measure_perplexity
from entangle.models.loading import LanguageModel
from entangle.ranks import Ranks, apart, current
from entangle.runs.progress import Progress, ProgressBar
from entangle.runs.provenance import RunClock, agree_on, expand_user, make_manifest
from entangle.runs.reading import READ_ERRORS
from entangle.runs.unfinished import PLANNED, Unfinished, is_made
from entangle.stats.intervals import Interval, window_mean_interval
from entangle.texts.calibration_set import CalibrationSet

Arrays = Mapping[str, NDArray[np.float64]]
"""Raw numbers of one arm: ``loss``, ``kl`` and ``agreement`` a window; ``good`` and ``bad`` a
pair; others that an experiment has of its own."""

_RUNS = count()
MEASURES = ("perplexity", "divergence", "pairs")
"""What can be asked for: perplexity; KL and top-1 agreement with the dense model; minimal pairs."""
WINDOW, PAIR = ("loss", "kl", "agreement"), ("good", "bad")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What arms are measured on."""

    text: EvaluationText | None
    """For perplexity and divergence."""
    pairs: MinimalPairs | None = None
    """For minimal-pair accuracy."""
    measures: tuple[str, ...] = MEASURES[:1]
    """From `entangle.evaluation.measures.MEASURES`."""
    prefix: int = 0
    """First tokens of every window that perplexity is not scored on."""

    @classmethod
    def of(
        cls,
        text: EvaluationText | None,
        pairs: MinimalPairs | None,
        measures: str | Iterable[str] | None,
    ) -> "Evaluation":
        """Check what is asked for; by default everything that there is text or pairs for."""
        if measures is None:
            measures = [*(["perplexity"] if text else []), *(["pairs"] if pairs else [])]
            if not measures:
                raise InvalidInput("nothing is measured; give `evaluation` (a text) or `pairs`.")
        measures = choices("measures", measures, DOOR, kind="measure")
        own = set(filter(is_own, measures))
        needs_text = ({"perplexity", "divergence"} & set(measures)) | own
        if needs_text and text is None:
            raise InvalidInput(f"{min(needs_text)} needs a text; give `evaluation`.")
        if "pairs" in measures and pairs is None:
            raise InvalidInput("minimal-pair accuracy needs pairs; give `pairs`.")
        return cls(text, pairs, tuple(measures))

    def describe(self) -> dict[str, object]:
        """Return the texts and measures, JSON-serialisable."""
        plugins = brought(DOOR, self.measures)
        return {
            "text": None if self.text is None else self.text.describe(),
            "pairs": None if self.pairs is None else self.pairs.describe(),
            "measures": list(self.measures),
            **({"plugins": plugins} if plugins else {}),
        }

    def measure(
        self,
        model: LanguageModel,
        reference: DenseReference | None = None,
        *,
        progress: bool | None = False,
    ) -> dict[str, NDArray[np.float64]]:
        """Return the raw numbers of a model as it is; divergence is from ``reference``."""
        found = {}
        if reference is not None:
            seen = compare_with_dense(model, reference, progress=progress)
            found["loss"] = seen.perplexity.window_losses
            found["kl"] = seen.window_kl
            found["agreement"] = seen.window_agreements.astype(np.float64)
        elif self.text is not None and "perplexity" in self.measures:
            seen_loss = measure_perplexity(model, self.text, prefix=self.prefix, progress=progress)
            found["loss"] = seen_loss.window_losses
        if self.pairs is not None and "pairs" in self.measures:
            scores = minimal_pair_scores(model, self.pairs, progress=progress)
            found["good"], found["bad"] = scores.good, scores.bad
        found |= self.measured_own(model)
        return {name: np.ascontiguousarray(values) for name, values in found.items()}

    @property
    def own(self) -> list[str]:
        """Measures of one's own."""
        return [name for name in self.measures if is_own(name)]

    def measured_own(self, model: LanguageModel) -> dict[str, NDArray[np.float64]]:
        """Return the values of windows of measures of one's own, by ``own:`` and their name."""
        if not self.own or self.text is None:
            return {}
        found = measure_own(model, self.text, self.own, prefix=self.prefix)
        return {f"own:{name}": values for name, values in found.items()}

    def perplexity(self, found: Arrays) -> Perplexity:
        """Return the perplexity that the losses of windows amount to."""
        text = self.text
        assert text is not None  # noqa: S101  (there are losses)
        return Perplexity.of(torch.tensor(found["loss"]), text, prefix=self.prefix)

    def rows(self, found: Arrays, dense: Arrays, *, seed: int) -> list[dict[str, object]]:
        """Return ``measure``, ``value``, ``low``, ``high`` of everything measured of an arm.

        ``perplexity`` (percentile bootstrap over windows), ``perplexity_ratio`` to the dense model
        (the same windows resampled for both), ``kl`` in nats a token and ``top1_agreement``,
        ``accuracy`` and ``accuracy:PARADIGM`` (Wilson), and ``accuracy_difference`` to the dense
        model (the same pairs resampled for both).
        """
        known: list[tuple[str, Interval]] = []
        if "loss" in found and self.text is not None:
            result, base = self.perplexity(found), self.perplexity(dense)
            counts = self.text.window_tokens
            loss = window_mean_interval(found["loss"], counts, seed=seed)
            with np.errstate(over="ignore"):
                low, high = float(np.exp(loss.low)), float(np.exp(loss.high))
            known.append(("perplexity", Interval(result.value, low, high)))
            known.append(("perplexity_ratio", perplexity_ratio(result, base, seed=seed)))
            if "kl" in found:
                agreements = found["agreement"].astype(np.int64)
                seen = Divergence(result, base, np.array(found["kl"]), agreements, counts)
                known += [(k, seen.interval(k, seed=seed)) for k in ("kl", "top1_agreement")]
        for name in self.own:
            values = found[f"own:{name}"]
            known.append(
                (name, window_mean_interval(values, np.ones(len(values), np.int64), seed=seed))
            )
        if "good" in found and self.pairs is not None:
            ours, theirs = (PairScores(a["good"], a["bad"], self.pairs, {}) for a in (found, dense))
            for row in ours.table(seed=seed).to_dict("records"):
                paradigm = row["paradigm"]
                name = "accuracy" if paradigm == "overall" else f"accuracy:{paradigm}"
                known.append((name, Interval(row["accuracy"], row["low"], row["high"])))
            difference = accuracy_difference(ours, theirs, seed=seed)
            known.append(("accuracy_difference", difference))
        return [{"measure": name} | vars(interval) for name, interval in known]


class Arm(ABC):
    """One changed model: what is changed, and the key under which it is kept."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return what makes the arm, JSON-serialisable."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, object]:
        """Columns of the tables that name the arm."""

    @property
    @abstractmethod
    def label(self) -> str:
        """A short line for messages."""

    @property
    def key(self) -> str:
        """Digest of `describe`, which names the arm's file."""
        content = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


AnyArm = TypeVar("AnyArm", bound=Arm)


class Experiment(ABC, Generic[AnyArm]):
    """Arms, what they are measured on, and where those that are finished are kept.

    Parameters
    ----------
    model
        Dense; every arm is made from it.
    calibration, evaluation
        What arms are fitted to and measured on.
    seed
        Of everything random.
    memory
        Bytes that hidden states and recorded inputs may take.
    """

    kind: ClassVar[str]
    """Of the result's manifest, and its noun in messages."""
    ending: ClassVar[str]
    """Of the hidden folder of finished arms; the title of the progress bar."""
    result: ClassVar[Callable[..., Any]]
    """Makes the result from its tables and ``manifest``."""
    load: ClassVar[Callable[..., Any]]
    """Reads one that was saved."""

    def __init__(
        self,
        model: LanguageModel,
        calibration: CalibrationSet,
        evaluation: Evaluation,
        *,
        seed: int,
        memory: int,
    ) -> None:
        self.model, self.calibration, self.evaluation = model, calibration, evaluation
        self.seed, self.memory = seed, memory
        self.dense: Arrays = {}
        """Raw numbers of the dense model."""
        self._kept: Unfinished | None = None
        self._heard: set[str] = set()
        """Files of arms that are finished, and told of."""

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """Return what a manifest records of the settings, JSON-serialisable."""

    @abstractmethod
    def prepare(self, held: ExitStack, *, progress: bool | None) -> Sequence[AnyArm]:
        """Measure the dense model (`dense`), make what arms need, and return them.

        ``held`` is closed when all are measured.
        """

    @abstractmethod
    def measure(self, arm: AnyArm) -> Arrays:
        """Make an arm from the dense weights and return its raw numbers, those of `dense`."""

    @abstractmethod
    def tables(self, arms: Sequence[AnyArm], found: Sequence[Arrays]) -> dict[str, Any]:
        """Return the result's fields from the raw numbers of all arms."""

    def steps(self, arms: Sequence[AnyArm]) -> int:  # noqa: ARG002
        """Return how many measurements `search` counts, at most."""
        return 0

    def search(self, arms: Sequence[AnyArm], found: Sequence[Arrays], bar: Progress) -> None:
        """Measure arms that depend on what the others came to (`measured`); none by default."""

    def evaluated(self) -> dict[str, object]:
        """Return what a manifest records of the evaluation."""
        return self.evaluation.describe()

    def run(
        self,
        clock: RunClock,
        out: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        force: bool = False,
        extra: Callable[[Any, Path], object] | None = None,
        progress: bool | None = None,
    ) -> Any:
        """Measure every arm that is not finished, and return the result, saved if it has a name.

        Parameters
        ----------
        clock
            Measures the run.
        out, resume, force, extra, progress
            As in `entangle.ablate`. Of several ranks (`entangle.ranks`) the first reads and writes;
            each makes what arms need, and takes the next arm when it is done with one.

        Raises
        ------
        InvalidInput
            If the result exists, or is unfinished and not to be resumed, or of other settings.
        EntangleError
            What an arm raises; the message begins with its label. Arms before it are kept.
        """
        manifest = make_manifest(
            self.kind, model=self.model.describe(), calibration=self.calibration.describe(),
            evaluation=self.evaluated(), settings=self.settings(),
        )  # fmt: skip
        agree_on(**{name: manifest[name] for name in PLANNED})
        shared = current()
        if out is not None:
            finished = shared.leads and resume and not force and self._is_finished(out, manifest)
            if shared.exchange(finished)[0]:
                return type(self).load(out)
        if out is not None and shared.leads:
            self._kept = Unfinished(
                out, manifest, what=self.kind, ending=self.ending, resume=resume, force=force
            )
        with ExitStack() as held:
            held.enter_context(apart())
            arms = self.prepare(held, progress=progress)
            bar = held.enter_context(ProgressBar(self.ending, enabled=progress, shared=shared))
            bar.start(len(arms) + self.steps(arms), "arms")
            found = self._all_measured(arms, bar, shared)
            self.search(arms, found, bar if shared.leads else Progress())
        tables = self.tables(arms, found)
        result = type(self).result(**tables, manifest=manifest | clock.read(self.memory))
        shared.exchange("made")  # on all ranks, before one writes
        if self._kept is not None:
            result.save(out, force=force, extra=None if extra is None else partial(extra, result))
            self._kept.remove()
        return result

    def _all_measured(self, arms: Sequence[AnyArm], bar: Progress, ranks: Ranks) -> list[Arrays]:
        """Return the raw numbers of all arms; a rank takes the next when it is done with one."""
        if ranks.size == 1:
            return [self.measured(arm, bar) for arm in arms]
        names = [f"arm-{arm.key}.safetensors" for arm in arms]
        kept = [self._read(name) is not None for name in names] if ranks.leads else []
        kept = ranks.exchange(kept)[0]
        waiting = [i for i in range(len(arms)) if not kept[i]]
        found: dict[int, Arrays] = {}
        if ranks.leads:  # before it takes new ones, so that the bar shows them
            found = {i: self.measured(arms[i], bar) for i in range(len(arms)) if kept[i]}
        here = f"{next(_RUNS)}/"  # all ranks run the same experiments
        while (place := ranks.tally(f"{here}arms", 1, 0) - 1) < len(waiting):
            i = waiting[place]
            found[i] = self.measured(arms[i], bar)
            ranks.post(here + names[i], to_safetensors(dict(found[i])))
            if ranks.leads:
                self._keep_posted(arms, names, ranks, here)
        own = [(i, to_safetensors(dict(one))) for i, one in sorted(found.items())]
        numbers = ranks.exchange([[i, len(content)] for i, content in own])
        every = ranks.gather(b"".join(content for _, content in own))
        for listed, content in zip(numbers, every, strict=True):
            start = 0
            for i, length in listed:
                found.setdefault(i, load(content[start : start + length]))
                start += length
        if ranks.leads:
            self._keep_posted(arms, names, ranks, here)
        return [found[i] for i in range(len(arms))]

    def _keep_posted(
        self, arms: Sequence[AnyArm], names: Sequence[str], ranks: Ranks, here: str
    ) -> None:
        """Keep the arms that other ranks have measured since."""
        for arm, name in zip(arms, names, strict=True):
            content = None if name in self._heard else ranks.posted(here + name)
            if content is not None:
                self._heard.add(name)
                if self._kept is not None:
                    self._kept.keep(name, partial(_write, content))
                self.done(arm, load(content))

    def measured(self, arm: AnyArm, bar: Progress, *, key: str | None = None) -> Arrays:
        """Return an arm's raw numbers, measured unless they are kept, and count it as done."""
        name = f"arm-{key or arm.key}.safetensors"
        found = self._read(name)
        known = found is not None
        if found is None:
            try:
                found = self.measure(arm)
            except EntangleError as error:
                raise type(error)(f"{arm.label}: {error}") from error
            if self._kept is not None:
                self._kept.keep(name, partial(_write, to_safetensors(dict(found))))
        self._heard.add(name)
        self.done(arm, found, known=known)
        bar.advance()
        return found

    def done(self, arm: AnyArm | None, found: Arrays, *, known: bool = False) -> None:
        """Hear of an arm that is finished, or was (``known``); None is the dense model."""

    def _read(self, name: str) -> Arrays | None:
        """Return a finished arm's numbers; refuse others than those measured of the dense model."""
        path = None if self._kept is None else self._kept.find(name)
        if path is None:
            return None
        try:
            found = dict(load_file(path))
            kinds = {name: (one.dtype, one.shape) for name, one in found.items()}
            if kinds != {name: (one.dtype, one.shape) for name, one in self.dense.items()}:
                raise ValueError(f"it holds {', '.join(sorted(found))}, not what is measured")
        except READ_ERRORS as error:
            raise InvalidInput(
                f"{str(path)!r} is damaged or of another version ({error}); remove it and go on "
                "with --resume (resume=True)."
            ) from error
        return found

    def _is_finished(self, out: str | os.PathLike[str], manifest: Mapping[str, object]) -> bool:
        """Tell whether the result is there; refuse one of another model, texts or settings."""
        if not (expand_user(out) / "manifest.json").is_file():
            return False
        if not is_made(out, self.kind, manifest, ending=self.ending):
            raise InvalidInput(
                f"{str(out)!r} holds a finished {self.kind} of another model, text or settings, "
                "which cannot be resumed; name another folder or use --force (force=True) to "
                "replace it."
            )
        return True


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def numbered(
    name: str, columns: Mapping[str, object], found: Arrays, wanted: Sequence[str]
) -> pd.DataFrame | None:
    """Return raw numbers with a column that numbers them, and those that name their arm."""
    chosen = {one: found[one] for one in wanted if one in found}
    if not chosen:
        return None
    table = pd.DataFrame(chosen).rename_axis(name).reset_index()
    return table.assign(**columns)  # type: ignore[arg-type]
