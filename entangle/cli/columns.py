"""Names of columns that options give, checked against what there is, before any work.

What a file holds is told by its head: the schema of a Parquet table, the first rows of JSON lines,
the first line of a CSV. A hub data set is opened at its split, and read as far as it takes to tell.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entangle.checks import choice
from entangle.cli.options import names
from entangle.doors import with_installed
from entangle.errors import InvalidInput, UnknownName
from entangle.runs.provenance import expand_user
from entangle.runs.reading import decoding, regular_file

SCORED = (
    "block", "neuron", "wd", "wd_se", "wd_bound", "ks", "mean", "std", "skewness",
    "excess_kurtosis", "weight_norm", "md", "n_tokens",
)  # fmt: skip
"""Numeric columns that scores have."""
DERIVED = {"variance": "std", "abs_mean": "mean", "abs_skewness": "skewness"}
"""Columns that ablations compute, and what from."""
_LISTED = ("layer", "neuron")
_TEXTS: Mapping[str, tuple[str, str, str, Sequence[str]]] = {
    "column": ("calibration", "split", "calibration_config", ("train",)),
    "evaluation_column": (
        "evaluation", "evaluation_split", "evaluation_config", ("test", "validation"),
    ),
}  # fmt: skip
"""Options that name the column of a text; those that name the text, its split and configuration;
and the splits that are tried where none is named."""


def check_columns(given: Mapping[str, object]) -> None:
    """Check every option of a command that names columns.

    Raises
    ------
    UnknownName
        If there is no such column; the closest are listed.
    InvalidInput, Unavailable
        If a file cannot be read.
    """
    by, scores = given.get("by"), given.get("scores")
    there = scores is None or _table(scores).is_file()  # or the reading says what is wrong
    if isinstance(by, str) and there:
        allocates = given.get("command") == "allocate"
        separator, without = ("+", (*_LISTED[1:], "block")) if allocates else (",", ())
        known = scored_columns(scores, derived=not allocates)
        known = [one for one in known if one not in without]
        for one in by.split(separator):
            choice("by", one.strip(), known, kind="column", remedy="Choose a numeric column.")
    select = given.get("select")
    for name in names(select) if isinstance(select, str) else ():
        if name.lower().endswith((".csv", ".parquet")):
            _check_listed(name)
    for option, (text, split, config, unnamed) in _TEXTS.items():
        column, source, chosen = given.get(option), given.get(text), given.get(split)
        if isinstance(column, str) and isinstance(source, str):
            splits = unnamed if chosen is None else [chosen]
            _check_text(source, column, given.get(config), splits)


def scored_columns(scores: object = None, *, derived: bool = False) -> list[str]:
    """Return the numeric columns of scores, and those that can be ``derived`` from them.

    Parameters
    ----------
    scores
        Folder of the scores; those that all have without one.
    derived
        Whether columns count that are computed.
    """
    known = with_installed("columns", SCORED)
    found = list(known) if scores is None else list(_numeric(_table(scores)))
    return found + [name for name, source in DERIVED.items() if derived and source in found]


def _table(scores: object) -> Path:
    return expand_user(str(scores)) / "scores.parquet"


def _numeric(table: Path) -> Iterator[str]:
    from pyarrow import types

    for field in _schema(table):
        if types.is_integer(field.type) or types.is_floating(field.type):
            yield field.name


def _schema(path: Path) -> Sequence[Any]:
    import pyarrow.parquet as pq

    with decoding(regular_file(path), remedy="make or get the file anew"):
        return list(pq.read_schema(path))


def _check_listed(name: str) -> None:
    """Refuse a list of neurons without the columns that name them."""
    file = expand_user(name)
    if file.suffix.lower() == ".parquet":
        found = [field.name for field in _schema(file)]
    else:
        remedy = "give a table with columns layer and neuron"
        with decoding(regular_file(file), remedy=remedy), file.open(encoding="utf-8-sig") as handle:
            found = next(csv.reader(handle), [])
    missing = [one for one in _LISTED if one not in found]
    if missing:
        raise InvalidInput(
            f"{name!r} must have the column {missing[0]!r}; add it. It has: {', '.join(found)}."
        )


def _check_text(source: str, column: str, config: object, splits: Sequence[object]) -> None:
    """Refuse a column that a text does not have: no file of it on the disk, or the data set."""
    from entangle.texts.documents import as_path, refuse
    from entangle.texts.hub import check_column

    path = as_path(source)
    if path is not None:
        _check_files(path, column)
    elif source == "demo":
        refuse("'demo'", column=column)
    else:
        known = None if config is None else str(config)
        check_column(source, column, config=known, splits=[str(one) for one in splits])


def _check_files(path: Path, column: str) -> None:
    """Refuse a column that no file of a text on the disk has."""
    from entangle.texts.files import READERS, file_column

    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    unknown: UnknownName | None = None
    for file in files:
        if file.suffix.lower() not in READERS or file.suffix.lower() == ".txt":
            continue
        try:
            file_column(file, column)
            return
        except UnknownName as error:
            unknown = unknown or error
        except InvalidInput:
            return  # what else is wrong, the reading says
    if unknown is not None:
        raise unknown
