"""Documents from the `datasets` library: data sets of the Hugging Face Hub and local folders."""

import ast
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from entangle.calibration.files import Document, choose_column, text_value
from entangle.errors import EntangleError, InvalidInput, Unavailable, unknown_name
from entangle.models.hub import caches_alone, check_data_set


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


def read_hub(request: HubRequest) -> Iterator[Document]:
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
        dataset = datasets.load_dataset(
            request.name, request.config, split=request.split, streaming=request.streaming
        )
    return _documents(dataset, request)


def _documents(dataset: Any, request: HubRequest) -> Iterator[Document]:
    where = f"data set {request.name!r}"
    column = None
    for row in _rows(dataset, request):
        if column is None:
            column = choose_column(_is_text(dataset, row), request.column, where=where)
        yield [text_value(row[column], column, where)]


def _rows(dataset: Any, request: HubRequest) -> Iterator[dict[str, Any]]:
    rows = iter(dataset)
    while True:
        with plain_errors(request):
            row = next(rows, None)
        if row is None:
            return
        yield row


def _is_text(dataset: Any, row: dict[str, Any]) -> dict[str, bool]:
    if dataset.features is None:
        return {name: isinstance(value, str) for name, value in row.items()}
    texts = ("string", "large_string", "string_view")
    return {name: getattr(kind, "dtype", None) in texts for name, kind in dataset.features.items()}


@contextmanager
def plain_errors(request: HubRequest) -> Iterator[None]:
    """Turn the library's errors into one line, and hold back its own log lines about them."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # whichever client

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
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
    return unknown_name(f"{kind} of data set {request.name!r}", value, names)
