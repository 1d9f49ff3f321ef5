"""Documents from the `datasets` library: data sets of the Hugging Face Hub and local folders."""

import ast
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from entangle.errors import EntangleError, InvalidInput, Unavailable, UnknownName, unknown_name
from entangle.models.hub import caches_alone, check_data_set
from entangle.runs.reading import no_pickles
from entangle.texts.files import (
    Column,
    Document,
    Look,
    choose_column,
    named_kind,
    refuse_late_text,
    text_value,
)


class UnknownSplit(UnknownName):
    """A data set has no such split."""


@dataclass(frozen=True)
class HubRequest:
    """One split of one data set."""

    name: str
    """Id on the Hub (``owner/name``) or a local folder."""
    config: str | None
    """Configuration; None for the only one."""
    split: str
    """Split, for example ``train``."""
    column: str | None
    """Column of text; None for ``text`` or the only one."""
    streaming: bool = True
    """Read row by row over the network, or download once into the library's cache."""


@dataclass(frozen=True, eq=False)
class HubDocuments:
    """The documents of a data set, read as they are asked for."""

    documents: Iterator[Document]
    """One a row."""
    column: str | None
    """The column that holds the text; None where there is no row."""

    def __iter__(self) -> Iterator[Document]:
        return self.documents


SHORT_NAMES = {
    "wikitext2": HubRequest(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", streaming=False
    ),
    "c4": HubRequest("allenai/c4", "en", "train", "text"),
}
"""The usual calibration texts; WikiText-2 is small, so it is downloaded once and kept."""


def hub_request(
    source: str, *, split: str | None, config: str | None, column: str | None
) -> HubRequest:
    """Resolve a short name or an id; what is given replaces a short name's own settings.

    Without ``split`` it is ``train``.
    """
    short = SHORT_NAMES.get(source, HubRequest(source, None, "train", None))
    return HubRequest(
        short.name,
        config or short.config,
        split or short.split,
        column or short.column,
        streaming=short.streaming,
    )


def read_hub(request: HubRequest) -> HubDocuments:
    """Open a data set and return its documents, one a row, read as they are asked for.

    Raises
    ------
    UnknownName
        If the data set, its configuration, split or column does not exist.
    Unavailable
        If the Hub cannot be reached or refuses.
    InvalidInput
        If the data set cannot be read as text.
    """
    check_data_set(request.name)
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS

    if request.name in FORMATS:
        raise InvalidInput(
            f"{request.name!r} is a file format, not a data set; give the path of a file or folder."
        )
    with plain_errors(request), caches_alone():
        _check_files(request)
        dataset = datasets.load_dataset(
            request.name, request.config, split=request.split, streaming=request.streaming
        )
    return _documents(dataset, request)


def check_column(source: str, column: str, *, config: str | None, splits: Sequence[str]) -> None:
    """Refuse a column that a data set does not have, at the first of some splits that it has.

    Parameters
    ----------
    source
        Short name or id.
    column
        What is looked for.
    config
        Configuration; None for the only one.
    splits
        Tried in order. Where there is none of them nothing is refused: the reading says so.

    Raises
    ------
    UnknownName, Unavailable, InvalidInput
        As `read_hub`.
    """
    for split in splits:
        try:
            read_hub(hub_request(source, split=split, config=config, column=column))
        except UnknownSplit:
            continue
        return


def _check_files(request: HubRequest) -> None:
    """Check that the files of a local folder, which its README may name, lie in the folder."""
    import datasets

    folder = Path(request.name).expanduser()
    if not folder.is_dir():
        return
    homes = Path(os.path.abspath(folder)), Path(os.path.realpath(folder))  # noqa: PTH100
    found = datasets.load_dataset_builder(request.name, request.config).config.data_files or {}
    for file in (str(one) for files in found.values() for one in files):
        if not any(Path(os.path.normpath(file)).is_relative_to(home) for home in homes):
            raise InvalidInput(
                f"its README or .huggingface.yaml must name files of its own folder; got {file!r}: "
                "give that file itself"
            )


def _documents(dataset: Any, request: HubRequest) -> HubDocuments:
    where = f"data set {request.name!r}"
    rows = _rows(dataset, request)
    columns = feature_columns(dataset.features)
    if columns is None:
        columns, rows = look_at(rows, request.column)
    if not columns:
        return HubDocuments(iter(()), request.column)
    column = choose_column(columns, request.column, where=where)

    def documents() -> Iterator[Document]:
        for row in rows:
            if request.column is None:
                refuse_late_text(row, column, where)
            yield [text_value(row.get(column), column, where)]

    return HubDocuments(documents(), column)


def look_at(
    rows: Iterator[dict[str, Any]], column: str | None
) -> tuple[dict[str, Column], Iterator[dict[str, Any]]]:
    """Look at the first rows; return what the columns hold, and all rows."""
    look, seen = Look(column), list[dict[str, Any]]()
    for row in rows:
        seen.append(row)
        if look.enough(row):
            break
    return look.columns, chain(seen, rows)


def feature_columns(features: Any) -> dict[str, Column] | None:
    """Return what the columns of a data set hold, by its features; None where it has none."""
    if features is None:
        return None
    return {name: named_kind(_kind(feature)) for name, feature in features.items()}


def _kind(feature: Any) -> str:
    """Name a column's type: that of its values, or how the library writes a nested one."""
    if type(feature).__name__ == "ClassLabel":
        return "int64"
    dtype = getattr(feature, "dtype", None)
    plain = type(feature).__name__ == "Value"
    return str(dtype) if plain else " ".join(repr(feature).split())


def _rows(dataset: Any, request: HubRequest) -> Iterator[dict[str, Any]]:
    rows = iter(dataset)
    while True:
        with plain_errors(request):
            row = next(rows, None)
        if row is None:
            return
        yield row


@contextmanager
def plain_errors(request: HubRequest) -> Iterator[None]:
    """Turn the library's errors into one line, and hold back its own log lines about them.

    Nothing is unpickled inside the block.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # whichever client

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with no_pickles("it"):
            yield
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError, HTTPError) as error:
        raise _translate(error, request) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _translate(error: Exception, request: HubRequest) -> EntangleError:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    message = " ".join(str(error).split())[:300]
    if isinstance(error, DatasetNotFoundError):
        return _not_found(message, request)
    if isinstance(error, ValueError) and (wrong := _wrong_name(message, request)):
        return wrong
    network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
    if network and not isinstance(error, DataFilesNotFoundError | EmptyDatasetError):
        return Unavailable(
            f"data set {request.name!r} cannot be reached ({message}); check the network, or give "
            "a local file, a folder, or `demo`."
        )
    return InvalidInput(f"data set {request.name!r} cannot be read as text ({message}).")


def _not_found(message: str, request: HubRequest) -> EntangleError:
    login = "log in with `hf auth login`"
    if "gated" in message:
        return Unavailable(f"{message} Ask for access on its page and {login}.")
    return unknown_name(
        "data set",
        request.name,
        ["demo", *SHORT_NAMES],
        f"The Hugging Face Hub has none that you can read; check the id, or {login}.",
    )


def _wrong_name(message: str, request: HubRequest) -> EntangleError | None:
    """Read the names that exist out of the library's message about a split or configuration."""
    found = re.search(
        r"(Bad split|Unknown split|BuilderConfig|Config name is missing)"
        r".*?(\[[^]]*\])(?:\.| Example|$)",
        message,
    )
    if found is None:
        return None
    names = [str(name) for name in ast.literal_eval(found[2])]
    if found[1] == "Config name is missing":
        return InvalidInput(
            f"data set {request.name!r} has several configurations; name one with `config`: "
            f"{', '.join(names[:20])}."
        )
    kind = "split" if "split" in found[1] else "configuration"
    value = request.split if kind == "split" else str(request.config)
    error = unknown_name(f"{kind} of data set {request.name!r}", value, names)
    return UnknownSplit(str(error)) if kind == "split" else error
