"""The runs that a page is made of: found in folders, recognised, and checked to belong together."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from entangle.errors import InvalidInput
from entangle.results import CLASSES, kind_of, load_result
from entangle.results.ablation import AblationResult
from entangle.results.base import Result
from entangle.results.scores import NeuronScores
from entangle.runs.provenance import expand_user
from entangle.runs.sealing import manifest_digest

_MANIFEST = "manifest.json"
_OF_MODELS = ("study", "trace")
"""Kinds of results of more than one model."""


@dataclass(frozen=True, eq=False)
class Run:
    """One result, as a page shows it."""

    name: str
    """What the reader calls it: the end of its path."""
    kind: str
    """As its manifest says."""
    result: Result = field(repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 of its manifest."""
        return manifest_digest(self.result.manifest)

    @property
    def told(self) -> tuple[list[str], pd.DataFrame]:
        """Lines that sum it up, and its table."""
        return self.result._told()


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one page."""

    scores: NeuronScores
    """What the page is about."""
    runs: tuple[Run, ...]
    """All of them, the scores first."""
    notes: tuple[str, ...]
    """What of them the page does not hold, in sentences."""

    def of_kind(self, kind: str) -> list[Run]:
        """Return the runs of one kind, in the order in which they were named."""
        return [one for one in self.runs if one.kind == kind]


def open_runs(paths: Iterable[str | os.PathLike[str]]) -> Runs:
    """Load results from their folders, or from folders that hold several.

    Parameters
    ----------
    paths
        Each a result, or a folder of results. Scores must be among them, or an ablation, which
        holds its own.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If one is no result or damaged, or as `together`.
    """
    paths = list(paths)
    listed = [one for given in paths for one in _results(Path(given))]
    found = [Run(_named(path), kind, load_result(path)) for path, kind in listed if kind]
    left_out = [_named(path) for path, kind in listed if kind is None]
    scored = [one for one in found if one.kind == "scores"]
    ablated = [one for one in found if isinstance(one.result, AblationResult)]
    if not scored and ablated and isinstance(ablated[0].result, AblationResult):
        scored = [Run(f"{ablated[0].name}/scores", "scores", ablated[0].result.scores)]
    if len(scored) != 1:
        names = f"{len(scored)} ({', '.join(one.name for one in scored)})" if scored else "none"
        raise InvalidInput(
            f"a report is about one result of `entangle score`; got {names}: name one, and what "
            "was made of the same model beside it."
        )
    scores = scored[0].result
    assert isinstance(scores, NeuronScores)  # noqa: S101
    others = [one for one in found if one is not scored[0]]
    opened = together(scores, others, name=scored[0].name)
    notes = [f"{one} has no place on the page, so it is left out." for one in left_out]
    notes += [
        f"{_named(one)} lies deeper than results are looked for, so it is left out: name it."
        for given in paths
        for one in _deeper(Path(given), {path.resolve() for path, _ in listed})
    ]
    return replace(opened, notes=(*opened.notes, *notes))


def together(scores: NeuronScores, others: Sequence[Run], *, name: str = "scores") -> Runs:
    """Put scores and other runs of the same model together.

    Parameters
    ----------
    scores
        Of at least one neuron.
    others
        Runs of other kinds.
    name
        What the reader calls the scores.

    Raises
    ------
    InvalidInput
        If a run is of another model, or has no layer or neuron of the scores.
    """
    if scores.frame.empty:
        raise InvalidInput("the scores of a report must hold at least one neuron; got none.")
    notes = [note for one in others for note in _check(scores, one)]
    return Runs(scores, (Run(name, "scores", scores), *others), tuple(notes))


def _named(path: Path) -> str:
    return "/".join(path.resolve().parts[-2:])


def _results(given: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield a result, or the results in a folder that is none itself, and the kind of each.

    Of what stands beside results in a folder, and is none that a page shows, it is None.
    """
    path = expand_user(given)
    inner = []
    if path.is_dir() and not (path / _MANIFEST).exists():
        inner = sorted(one.parent for one in path.glob(f"*/{_MANIFEST}"))
    for one in inner or [path]:
        kind = kind_of(one)
        yield one, kind if kind in CLASSES or not inner else None


def _deeper(given: Path, known: set[Path]) -> Iterator[Path]:
    """Yield results that stand one folder deeper, in a folder that is none or in that of scores."""
    path = expand_user(given)
    whole = path.is_file() or (path / _MANIFEST).exists()
    for home in [path] if whole else sorted(path.iterdir()):
        if not (home / _MANIFEST).exists() or kind_of(home) == NeuronScores.KIND:
            found = (one.parent for one in sorted(home.glob(f"*/{_MANIFEST}")))
            yield from (
                one for one in found if one.resolve() not in known and kind_of(one) in CLASSES
            )


def _check(scores: NeuronScores, one: Run) -> Iterator[str]:
    """Refuse a run of another model or of other layers; yield what is left out, and why."""
    if one.kind in _OF_MODELS:
        yield f"{one.name} ({one.kind}) is of several models, and is drawn by `entangle figures`."
        return
    ours, theirs = (_digest(found.manifest) for found in (scores, one.result))
    if ours is not None and theirs is not None and ours != theirs:
        raise InvalidInput(
            f"{one.name!r} ({one.kind}) is of the model {_model(one.result)!r} with digest "
            f"{theirs[:12]}…, the scores of {_model(scores)!r} with {ours[:12]}…; leave it out, or "
            "name the scores of its model."
        )
    if theirs is None or ours is None:
        yield f"{one.name} does not say which weights it was made from."
    sizes = dict(zip(scores.layers["layer"], scores.layers["n_neurons"], strict=True))
    largest = _neurons(one.result)
    unknown = [layer for layer in largest if layer not in sizes]
    if largest and len(unknown) == len(largest):
        raise InvalidInput(
            f"{one.name!r} ({one.kind}) holds {_some(unknown)}, none of which the scores hold; "
            "score these layers too, or leave it out."
        )
    if unknown:
        yield f"Of {one.name} the layers that were not scored are left out: {_some(unknown)}."
    for layer, neuron in largest.items():
        if layer in sizes and neuron >= sizes[layer]:
            raise InvalidInput(
                f"{one.name!r} ({one.kind}) names neuron {neuron} of layer {layer!r}, of which the "
                f"scores hold {sizes[layer]}; name runs of one model."
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _neurons(result: Any) -> dict[str, int]:
    """Return the largest neuron that a run speaks of, by layer; empty where it names none."""
    found: dict[str, int] = {}
    layers = getattr(result, "layers", None)
    if isinstance(layers, pd.DataFrame) and "layer" in layers:
        found |= dict.fromkeys(map(str, layers["layer"]), -1)
    for table in ("neurons", "selections"):
        frame = getattr(result, table, None)
        if isinstance(frame, pd.DataFrame) and len(frame):
            for layer, neuron in frame.groupby("layer", sort=False)["neuron"].max().items():
                found[str(layer)] = max(found.get(str(layer), -1), int(neuron))
    return found


def _model(result: Result) -> str:
    model = result.manifest.get("model")
    return str(model.get("name")) if isinstance(model, Mapping) else "unknown"


def _digest(manifest: Mapping[str, object]) -> str | None:
    model = manifest.get("model")
    found = model.get("digest") if isinstance(model, Mapping) else None
    return found if isinstance(found, str) else None
