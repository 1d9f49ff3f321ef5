"""Documents from files on disk: plain text, JSON lines and Parquet.

A document is an iterable of consecutive blocks of its text, so that a plain-text file of any size
can be read a block at a time.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entangle.calibration.columns import Column, Look, choose_column, named_kind
from entangle.errors import InvalidInput
from entangle.reading import decoding, reason, regular_file

Document = Iterable[str]
_BLOCK = 2**20  # characters of a plain-text file held at a time
_ROWS = 1024  # rows of a Parquet file held at a time
_UTF_8 = "convert it to UTF-8 text"


def read_file(
    path: Path, column: str | None = None, *, named: bool | None = None
) -> Iterator[Document]:
    r"""Yield the documents of one file: a row each, or the whole of a plain-text file.

    Text is UTF-8; a byte-order mark is dropped and line ends become ``\n``. A missing or null
    value is an empty document; blank lines between JSON lines are skipped. Without ``column`` it is
    that of `file_column`. ``named`` tells whether the user named it (by default, if it is given):
    if not, a column ``text`` that comes later is refused rather than passed over.

    Raises
    ------
    Unavailable
        If the file is missing or unreadable.
    InvalidInput
        If its ending is unknown, its content is corrupt or no text, or ``column`` does not fit.
    """
    if _ending(path) in (".jsonl", ".json"):
        return _json_lines(path, column, named=column is not None if named is None else named)
    return READERS[_ending(path)](path, column)


def file_column(path: Path, column: str | None = None) -> str | None:
    """Return the column that holds a file's text, as `choose_column`; None for plain text.

    Of JSON lines up to 1,000 are looked at, fewer where the column is clear before.

    Raises
    ------
    Unavailable, InvalidInput
        As `read_file`.
    """
    if _ending(path) == ".txt":
        return None
    look = _parquet_columns(path) if _ending(path) == ".parquet" else _json_columns(path, column)
    return choose_column(look, column, where=f"'{path}'") if look else column


def _ending(path: Path) -> str:
    if path.suffix.lower() not in READERS:
        raise InvalidInput(
            f"'{path}' cannot be read as text; a file must end in {', '.join(READERS)}."
        )
    return path.suffix.lower()


def _plain_text(path: Path, column: str | None) -> Iterator[Document]:
    if column is not None:
        raise InvalidInput(
            f"`column` {column!r} was given, but '{path}' is plain text; leave it out."
        )
    yield _blocks(path)


def _blocks(path: Path) -> Iterator[str]:
    with decoding(regular_file(path), remedy=_UTF_8), path.open(encoding="utf-8-sig") as handle:
        while block := handle.read(_BLOCK):
            if "\0" in block:
                raise InvalidInput(f"'{path}' is not plain text: it holds NUL characters.")
            yield block


def numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every line of a file that is not blank, after what to call it in a message.

    Raises
    ------
    Unavailable, InvalidInput
        If the file is missing or unreadable, or no regular file.
    """
    with decoding(regular_file(path), remedy=_UTF_8), path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield f"line {number} of '{path}'", line


def _json_lines(path: Path, column: str | None, *, named: bool = True) -> Iterator[Document]:
    chosen = file_column(path, column) or ""
    for where, line in numbered_lines(path):
        row = json_object(line, where)
        if not named:
            refuse_late_text(row, chosen, where)
        yield [text_value(row.get(chosen), chosen, where)]


def refuse_late_text(row: Mapping[str, Any], chosen: str, where: str) -> None:
    """Raise `InvalidInput` for a column ``text`` that comes after another one was chosen."""
    if chosen != "text" and row.get("text") is not None:
        raise InvalidInput(
            f"{where} has a column 'text', which no row at the beginning had, so {chosen!r} was "
            "read; name the one to read with `column`."
        )


def _json_columns(path: Path, column: str | None) -> Mapping[str, Column]:
    """Look at the first rows; a line that is wrong is left to the reading."""
    look = Look(column)
    for where, line in numbered_lines(path):
        try:
            row = json_object(line, where)
        except InvalidInput:
            if not look.rows:
                raise
            break
        if look.enough(row, size=len(line)):
            break
    return look.columns


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in a line of a file, or raise `InvalidInput` naming ``where``."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not valid JSON ({reason(error)}).") from error
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
    return well_formed(value)


def well_formed(text: str) -> str:
    """Return a text as valid Unicode: surrogates in pairs are joined, lone ones become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    chosen = file_column(path, column)
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[chosen]):
            yield from ([value or ""] for value in batch.column(0).to_pylist())


def _parquet_columns(path: Path) -> Mapping[str, Column]:
    with _parquet_file(path) as file:
        return {field.name: named_kind(str(_plain(field.type))) for field in file.schema_arrow}


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    remedy = "give a valid Parquet file"
    with decoding(regular_file(path), remedy=remedy), path.open("rb") as handle:
        yield pq.ParquetFile(handle)


def _plain(kind: Any) -> Any:
    import pyarrow.types as types

    return kind.value_type if types.is_dictionary(kind) else kind


READERS = {".txt": _plain_text, ".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet}
"""Reader of every kind of file, by its ending."""
