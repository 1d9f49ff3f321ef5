"""What was measured: frames with a manifest. Read, compared and drawn without torch."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entangle.results.base import Result

CLASSES = {
    "scores": "scores.NeuronScores",
    "ablation": "ablation.AblationResult",
    "comparison": "comparison.Comparison",
    "decomposition": "decomposition.Decomposition",
    "allocation": "allocation.AllocationReport",
    "expansion": "expansion.ExpansionReport",
    "pruning": "expansion.PruneReport",
    "difference": "difference.Difference",
    "study": "study.Study",
    "trace": "study.Trace",
    "anchor": "anchor.Anchor",
}
"""Module and class of every kind of result."""


def kind_of(path: str | os.PathLike[str]) -> str:
    """Return the kind of a result: an allocation is a file, of a folder the manifest tells it.

    Where no manifest can be read, it is a kind whose loading says so.
    """
    from entangle.errors import InvalidInput, Unavailable
    from entangle.runs.provenance import expand_user
    from entangle.runs.reading import read_object

    place = expand_user(path)
    if place.is_file():
        return "allocation"
    try:
        return str(read_object(place / "manifest.json", remedy="make the result anew").get("kind"))
    except (InvalidInput, Unavailable):
        return "scores"


def load_result(path: str | os.PathLike[str]) -> "Result":
    """Load a result of any kind, without torch: of allocations and expansions the report.

    Raises
    ------
    UnknownName
        If there is no such kind of result.
    InvalidInput, Unavailable
        If the folder or file is missing, incomplete or corrupt.
    """
    from entangle.checks import choice

    module, _, name = CLASSES[
        choice("path", kind_of(path), CLASSES, kind="kind of result")
    ].partition(".")
    made: type[Result] = getattr(import_module(f"entangle.results.{module}"), name)
    return made.load(path)
