"""Documents from files on disk: plain text, JSON lines and Parquet.

A document is an iterable of consecutive blocks of its text, so that a plain-text file of any size
can be read a block at a time.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entangle.errors import InvalidInput, Unavailable, unknown_name

Document = Iterable[str]
_BLOCK = 2**20  # characters of a plain-text file held at a time
_ROWS = 1024  # rows of a Parquet file held at a time


def choose_column(is_text: Mapping[str, bool], column: str | None, *, where: str) -> str:
    """Return the column to read: the one asked for, else ``text``, else the only one with text.

    Parameters
    ----------
    is_text
        Every column's name and whether it holds text.
    column
        The column asked for.
    where
        The file or data set, for the message.

    Raises
    ------
    UnknownName
        If ``column`` does not exist.
    InvalidInput
        If it holds no text, or none was asked for and the choice is not clear.
    """
    texts = [name for name, text in is_text.items() if text]
    if column is not None and column not in is_text:
        raise unknown_name(f"column of {where}", column, is_text)
    if column is not None and column not in texts:
        raise InvalidInput(f"`column` {column!r} of {where} holds no text; {_listing(texts)}.")
    chosen = column or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if chosen is None:
        raise InvalidInput(
            f"{where} has no column `text`; name one with `column`: {_listing(texts)}; "
            f"all columns: {', '.join(is_text) or 'none'}."
        )
    return chosen


def _listing(texts: list[str]) -> str:
    return f"columns with text: {', '.join(texts) or 'none'}"


def text_files(folder: Path) -> list[Path]:
    """Return the readable files in and below ``folder``, hidden ones left out, sorted by name.

    Raises
    ------
    InvalidInput
        If there are none.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    readable = [
        path
        for name, path in sorted(files.items())
        if path.suffix.lower() in READERS and path.is_file() and "/." not in f"/{name}"
    ]
    if not readable:
        raise InvalidInput(
            f"folder '{folder}' holds no {', '.join(READERS)} file; to read it as a folder of the "
            "`datasets` library, name its `split`."
        )
    return readable


def read_file(path: Path, column: str | None = None) -> Iterator[Document]:
    r"""Yield the documents of one file: a row each, or the whole of a plain-text file.

    Text is UTF-8; a byte-order mark is dropped and line ends become ``\n``. A missing or null
    value is an empty document; blank lines between JSON lines are skipped.

    Raises
    ------
    Unavailable
        If the file is missing or unreadable.
    InvalidInput
        If its ending is unknown, its content is corrupt or no text, or ``column`` does not fit.
    """
    if path.suffix.lower() not in READERS:
        raise InvalidInput(
            f"'{path}' cannot be read as text; a file must end in {', '.join(READERS)}."
        )
    return READERS[path.suffix.lower()](path, column)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong while ``path`` is read into one clear line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"'{path}' is not UTF-8 text ({error.reason}); convert it to UTF-8."
        ) from error
    except OSError as error:
        raise Unavailable(
            f"'{path}' cannot be read ({error.strerror or error}); check the path."
        ) from error


def _plain_text(path: Path, column: str | None) -> Iterator[Document]:
    if column is not None:
        raise InvalidInput(
            f"`column` {column!r} was given, but '{path}' is plain text; leave it out."
        )
    yield _blocks(path)


def _blocks(path: Path) -> Iterator[str]:
    with readable(path), path.open(encoding="utf-8-sig") as handle:
        while block := handle.read(_BLOCK):
            if "\0" in block:
                raise InvalidInput(f"'{path}' is not plain text: it holds NUL characters.")
            yield block


def _json_lines(path: Path, column: str | None) -> Iterator[Document]:
    chosen = column
    with readable(path), path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            where = f"line {number} of '{path}'"
            row = json_object(line, where)
            if chosen is None or chosen not in row:
                is_text = {name: isinstance(value, str) for name, value in row.items()}
                chosen = choose_column(is_text, chosen, where=where)
            yield [text_value(row[chosen], chosen, where)]


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in a line of a file, or raise `InvalidInput` naming ``where``."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not valid JSON ({error}).") from error
    if not isinstance(row, dict):
        raise InvalidInput(
            f"{where} is not a JSON object; every line must be one object with a column of text."
        )
    return row


def text_value(value: object, column: str, where: str) -> str:
    """Return a row's text, empty for null; raise `InvalidInput` if it is anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidInput(
            f"`column` {column!r} must hold text; {where} has {type(value).__name__}."
        )
    return value


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with readable(path), path.open("rb") as handle:
        try:
            file = pq.ParquetFile(handle)
            is_text = {field.name: _is_text(field.type) for field in file.schema_arrow}
            chosen = choose_column(is_text, column, where=f"'{path}'")
            for batch in file.iter_batches(batch_size=_ROWS, columns=[chosen]):
                yield from ([value or ""] for value in batch.column(0).to_pylist())
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise InvalidInput(f"'{path}' is not a valid Parquet file ({reason}).") from error


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


READERS = {".txt": _plain_text, ".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet}
"""Reader of every kind of file, by its ending."""
