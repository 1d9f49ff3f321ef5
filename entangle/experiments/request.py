"""Which selections a sweep is asked for, and the selections themselves.

What is refused before an ablation begins, as it would fail after minutes otherwise.

Where a sweep keeps its finished arms, so that a killed sweep goes on where it was.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from entangle.allocation.allocation import Allocation
from entangle.allocation.experts import zeros_digest
from entangle.checks import choice, finite, share, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.evaluation.perplexity import check_fits
from entangle.experiments.arms import PRUNERS
from entangle.experiments.measures import Protocol
from entangle.experiments.selection import (
    DERIVED,
    MATCHED,
    SCOPES,
    SCORED,
    Selection,
    check_scores_fit,
    column,
    select,
)
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.runs.provenance import expand_user
from entangle.runs.reading import READ_ERRORS
from entangle.runs.unfinished import Unfinished, is_made
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet

DEFAULT = ("top", "bottom", "random")
"""Selections of an ablation, unless others are asked for."""


@dataclass(frozen=True, eq=False)
class Request:
    """Which selections are asked for; the fields are explained at `entangle.ablate`."""

    wanted: Sequence[str | Selection]
    columns: Sequence[str]
    fraction: float | None
    count: int | None
    scope: str
    seeds: int
    seed: int

    def check(
        self, layers: Sequence[Layer], *, md: bool = True, scores: pd.DataFrame | None = None
    ) -> None:
        """Raise `UnknownName` or `InvalidInput` for what can be seen before neurons are scored.

        Parameters
        ----------
        layers
            Those whose neurons are changed.
        md
            Whether mapping difficulty will be computed.
        scores
            Table of scores made before, if there are some.
        """
        known = (*DEFAULT, *MATCHED, "all")
        for one in self.wanted:
            if not isinstance(one, Selection):
                choice("selections", one, known, kind="selection")
        if not self.wanted or not self.columns:
            raise InvalidInput("`selections` and `by` must name at least one; got none.")
        whole("seeds", self.seeds, least=1)
        if self.count is not None:
            whole("count", self.count, least=1)
        if self.fraction is not None:
            share("fraction", self.fraction, zero=False)
        if (self.fraction is None) == (self.count is None):
            raise InvalidInput(
                "a selection takes exactly one of `fraction` and `count`; got "
                f"{self.fraction} and {self.count}: drop one of them."
            )
        choice("scope", self.scope, SCOPES)
        self._check_columns(md=md, scores=scores)
        sizes = {layer.name: layer.out_features for layer in layers}
        self._check_sizes(sizes)
        for one in self.wanted:
            if isinstance(one, Selection):
                _check_rows(one, sizes)

    def _check_columns(self, *, md: bool, scores: pd.DataFrame | None) -> None:
        known = (*SCORED, *(name for name, (source, _) in DERIVED.items() if source in SCORED))
        for name in self.columns:
            if scores is None and name not in known:
                raise unknown_name("column", name, known, "Choose a column of the scores.")
            missing = not md if scores is None else column(scores, name).isna().all()
            if missing and (scores is not None or name == "md"):
                raise InvalidInput(
                    f"`by` {name} needs scores that hold it; compute it (for md: md=True, without "
                    "--no-md), or rank by another column."
                )

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Refuse more neurons than there are, with as many again for matched controls."""
        pools = {f"layer {name!r}": size for name, size in sizes.items()}
        if self.scope == "model":
            pools = {"the model": sum(sizes.values())}
        matched = any(isinstance(one, str) and one in MATCHED for one in self.wanted)
        if not matched and not {*DEFAULT} & {one for one in self.wanted if isinstance(one, str)}:
            return
        for name, size in pools.items():
            count = self.count or max(1, round((self.fraction or 0.0) * size))
            if count > size:
                raise InvalidInput(
                    f"a selection of {count} neurons does not fit {name}, which has {size}; lower "
                    "`fraction` or `count`."
                )
            if matched and self.scope == "layer" and 2 * count > size:
                raise InvalidInput(
                    f"matched controls of {count} neurons do not fit {name} beside the top ones, "
                    f"as it has {size}; lower `fraction` or `count`."
                )

    def describe(self) -> dict[str, object]:
        """Return the request, JSON-serialisable."""
        named = [s if isinstance(s, str) else s.describe() for s in self.wanted]
        return {
            "selections": named, "by": list(self.columns), "fraction": self.fraction,
            "count": self.count, "scope": self.scope, "seeds": self.seeds,
        }  # fmt: skip

    def selections(self, frame: pd.DataFrame) -> list[Selection]:
        """Return every selection, random ones once a seed; no two may have one name."""
        found = list(self._each(frame))
        names = [(one.rule, one.by, one.seed) for one in found]
        for name, one in zip(names, found, strict=True):
            if names.count(name) > 1:
                raise InvalidInput(
                    f"two selections are called {one.name!r} and could not be told apart; ablate "
                    "them one after the other."
                )
        return found

    def _each(self, frame: pd.DataFrame) -> Iterator[Selection]:
        size: dict[str, Any] = {"fraction": self.fraction, "count": self.count, "scope": self.scope}
        for one in dict.fromkeys(self.wanted):
            if isinstance(one, Selection):
                yield one
            elif one == "all":
                yield select(frame, one)
            elif one in ("top", "bottom"):
                for column in self.columns:
                    yield select(frame, one, by=column, **size)
            else:
                like = None
                if one in MATCHED:
                    like = select(frame, "top", by=self.columns[0], **size)
                for draw in range(self.seed, self.seed + self.seeds):
                    options: dict[str, Any] = size if like is None else {"like": like}
                    yield select(frame, one, seed=draw, **options)


def _check_rows(selection: Selection, sizes: Mapping[str, int]) -> None:
    """Check that the rows of a selection are neurons of the chosen layers, given by their sizes."""
    if not selection.n_rows:
        raise InvalidInput(f"the selection {selection.name!r} must hold a neuron; got none.")
    for name, rows in selection.rows.items():
        if name not in sizes:
            raise unknown_name(
                f"layer of the selection {selection.name!r} among the chosen ones:", name, sizes,
                "Choose its layer too (`layers`, --layer).",
            )  # fmt: skip
        outside = [int(row) for row in rows if not 0 <= row < sizes[name]]
        if outside or len(set(rows.tolist())) < len(rows):
            raise InvalidInput(
                f"rows of layer {name!r} in the selection {selection.name!r} must be different "
                f"and in 0..{sizes[name] - 1}; got {outside[:1] or 'one twice'}: select from the "
                "scores of this model."
            )


def check_fit(
    model: LanguageModel,
    layers: Sequence[Layer],
    calibration: CalibrationSet,
    protocol: Protocol,
    *,
    experts: Sequence[int],
    damping: float,
) -> None:
    """Check that texts and numbers of experts fit the model and one another.

    Raises
    ------
    InvalidInput
        If they do not.
    """
    as_calibration(calibration, model)
    if protocol.text is not None:
        check_fits(model, protocol.text)
    if protocol.pairs is not None and model.tokenizer is None:
        raise InvalidInput("minimal pairs need a tokenizer; load the model with its own.")
    if max(experts) > calibration.n_tokens:
        raise InvalidInput(
            f"`experts` must be at most the number of calibration tokens, {calibration.n_tokens}; "
            f"got {max(experts)}: give more text or fewer experts."
        )
    finite("damping", damping, least=0)
    outside = [layer.name for layer in layers if layer.block is None]
    if "divergence" in protocol.measures and outside:
        raise InvalidInput(
            f"divergence must be measured with layers inside the blocks only; got {outside[0]!r}, "
            "which the dense model's own logits pass too: leave it out, or measure perplexity."
        )
    if max(experts) > 1 and outside:
        raise InvalidInput(
            f"several experts must hold rows of layers inside the blocks; got {outside[0]!r}: "
            "leave it out, or take 1 expert."
        )


def check_match(
    protocol: Protocol, request: Request, interventions: Sequence[str], experts: Sequence[int]
) -> None:
    """Refuse a search for matched controls that would have nothing to match."""
    if not {"perplexity", "divergence"} & set(protocol.measures):
        raise InvalidInput(
            "`match` compares perplexities; give `evaluation`, and measure perplexity."
        )
    first = request.columns[0]
    tops = [one for one in request.wanted if isinstance(one, Selection) and one.rule == "top"]
    if "top" not in request.wanted and first not in [one.by for one in tops]:
        raise InvalidInput(f"`match` needs the selection top {first}; add top to `selections`.")
    if 1 not in experts and set(interventions) <= set(PRUNERS):
        raise InvalidInput(f"`match` needs arms with 1 expert; got `experts` {list(experts)}.")


def check_alone(selections: Sequence[str | Selection], *, match: bool) -> None:
    """Refuse what has no meaning beside an allocation, which says how sparse each row is."""
    if tuple(selections) not in (DEFAULT, ("all",)):
        raise InvalidInput(
            "with `allocation` all rows of its layers are pruned; leave `selections` out."
        )
    if match:
        raise InvalidInput("`match` needs a top selection, which `allocation` has not; drop one.")


def allocated_settings(allocation: Allocation) -> dict[str, object]:
    """Return what a manifest records of an ablation by an allocation."""
    zeros = {"zeros_sha256": zeros_digest(allocation), "overall": allocation.overall}
    return {
        "allocation": dict(allocation.manifest) | zeros,
        "selections": ["all", "allocation"],
        "strengths": [allocation.overall],
    }


def silent_layers(scores: NeuronScores) -> set[str]:
    """Return the layers that scores left out because they saw no token."""
    settings = scores.manifest.get("settings")
    found = settings.get("layers_without_tokens") if isinstance(settings, dict) else None
    return {str(name) for name in found or ()}


def scores_of(scores: NeuronScores, layers: Sequence[Layer], model: LanguageModel) -> NeuronScores:
    """Return the scores of some layers; refuse those of another model, or that lack a layer."""
    check_scores_fit(scores, model)
    names = [layer.name for layer in layers]
    for name in names:
        if name not in scores.histograms:
            raise unknown_name(
                "scored layer", name, scores.histograms,
                "Score it too, or ablate only the layers that were scored.",
            )  # fmt: skip
    return NeuronScores(
        frame=scores.frame[scores.frame["layer"].isin(names)].reset_index(drop=True),
        layers=scores.layers[scores.layers["layer"].isin(names)].reset_index(drop=True),
        histograms={name: scores.histograms[name] for name in names},
        manifest=scores.manifest,
    )


_ENDING = "ablating"


def is_finished(
    final: str | os.PathLike[str], kind: str, manifest: Mapping[str, object], *, force: bool
) -> bool:
    """Tell whether a sweep to be resumed is finished: its result is there, of these settings.

    With ``force`` it never is, since results are replaced then.

    Raises
    ------
    InvalidInput
        If a result is there that is of another model, texts or settings, or no ablation.
    """
    if force or not (expand_user(final) / "manifest.json").is_file():
        return False
    if not is_made(final, kind, manifest, ending=_ENDING):
        raise InvalidInput(
            f"{str(final)!r} holds a finished ablation of another model, text or settings, which "
            "cannot be resumed; name another folder or use --force (force=True) to replace it."
        )
    return True


class ArmFolder:
    """Files of finished arms under a hidden name beside the final folder, made with the first.

    Parameters
    ----------
    final
        Name of the finished result.
    manifest
        What is measured; a sweep is resumed only by one of the same model, texts and settings.
    resume
        Go on with an unfinished sweep, if there is one.
    force
        Replace a finished result, and an unfinished sweep unless it is resumed.

    Raises
    ------
    InvalidInput
        If the result exists, or an unfinished sweep that is not to be resumed or differs.
    """

    def __init__(
        self,
        final: str | os.PathLike[str],
        manifest: Mapping[str, object],
        *,
        resume: bool,
        force: bool,
    ) -> None:
        self._unfinished = Unfinished(
            final, manifest, what="ablation", ending=_ENDING, resume=resume, force=force
        )

    def read(
        self, key: str, like: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]] | None:
        """Return the raw numbers of a finished arm, or None.

        Raises
        ------
        InvalidInput
            If its file is damaged, or its numbers are no others' of the names and shapes of
            ``like``, those of the dense model.
        """
        path = self._unfinished.find(_file(key))
        if path is None:
            return None
        try:
            found = dict(load_file(path))
        except READ_ERRORS as error:
            raise _damaged(path, str(error)) from error
        kinds = {name: (one.dtype, one.shape) for name, one in found.items()}
        wanted = {name: (np.dtype(np.float64), one.shape) for name, one in like.items()}
        if kinds != wanted:
            raise _damaged(path, f"it holds {sorted(found)}, not what was measured")
        return found

    def write(self, key: str, found: Mapping[str, NDArray[np.float64]]) -> None:
        """Keep the raw numbers of an arm; the file appears when it is complete."""
        content = to_safetensors(dict(found))

        def write(path: Path) -> None:
            path.write_bytes(content)

        self._unfinished.keep(_file(key), write)

    def remove(self) -> None:
        """Remove the arms' files, once the result is saved."""
        self._unfinished.remove()


def _damaged(path: Path, why: str) -> InvalidInput:
    return InvalidInput(
        f"{str(path)!r} is damaged ({why}); remove it and go on with --resume (resume=True)."
    )


def _file(key: str) -> str:
    return f"arm-{key}.safetensors"
