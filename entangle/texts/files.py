"""Documents from files on disk: plain text, JSON lines and Parquet.

A document is an iterable of consecutive blocks of its text, so that a plain-text file of any size
can be read a block at a time.

Which column of a table is the text.

A column ``text`` is used or refused, never replaced by another. Without one, a column is taken only
where it is the one that holds text at all, and this is said.

The files of a folder that are text, and the split of a data set that each belongs to.

A file belongs to the split that its name tells, by the rules of the `datasets` library for a
repository: a name such as ``data/train-00000-of-00001.parquet``, else a folder called by a split's
keyword, else a keyword in the file's name, between characters that are no letters. Files about the
data are no text: hidden ones, those that begin with ``_``, and those that are known by name.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from entangle.errors import InvalidInput, unknown_name
from entangle.runs.progress import tell
from entangle.runs.reading import decoding, reason, regular_file

ROWS = 1000
"""Rows that are looked at where no schema tells what a column holds."""
_BYTES = 2**26  # of such rows

TEXT = "text"
"""Name of the column that is the text wherever there is one."""


@dataclass(frozen=True)
class Column:
    """What a column holds."""

    kind: str
    """Its type, for messages."""
    text: bool
    """Whether every value is a text or null, and some may be a text."""
    candidate: bool
    """Whether it holds text in some form: so that taking another column would be a guess."""
    partly: bool = False
    """Whether some values are texts and others are not; which is refused where one is met."""


NULL = Column("null", text=True, candidate=False)
_TEXTS = ("string", "large_string", "string_view", "large_string_view")
_INSIDE = re.compile(r"string|binary|json|translation", re.IGNORECASE)


def named_kind(kind: str) -> Column:
    """Return what a column of an Arrow type, given by its name, holds."""
    if kind == "null":
        return NULL
    return Column(kind, text=kind in _TEXTS, candidate=bool(_INSIDE.search(kind)))


class Look:
    """What columns hold, by the rows that were looked at.

    Parameters
    ----------
    column
        The column asked for: once it, or else ``text``, was seen with a text, it is clear.
    """

    def __init__(self, column: str | None) -> None:
        self.rows, self._size = 0, 0
        self._clear = column or TEXT
        self._kinds: dict[str, dict[str, bool]] = {}

    def enough(self, row: Mapping[str, Any], *, size: int = 0) -> bool:
        """Look at a row, of so many bytes; return whether to stop."""
        self.rows, self._size = self.rows + 1, self._size + size
        for name, value in row.items():
            known, kind = self._kinds.setdefault(str(name), {}), _kind(value)
            known[kind] = known.get(kind, False) or _holds_text(value)
        seen = isinstance(row.get(self._clear), str)
        return seen or self.rows >= ROWS or self._size >= _BYTES

    @property
    def columns(self) -> dict[str, Column]:
        """What each column holds, in the order in which they came."""
        return {name: _column(kinds) for name, kinds in self._kinds.items()}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return "string" if isinstance(value, str) else type(value).__name__


def _holds_text(value: object) -> bool:
    """Tell whether there is a text anywhere in a value, which may be nested to any depth."""
    inside = [value]
    while inside:
        one = inside.pop()
        if isinstance(one, str | bytes):
            return True
        if isinstance(one, Mapping):
            inside += one.values()
        elif isinstance(one, list | tuple):
            inside += one
    return False


def _column(kinds: Mapping[str, bool]) -> Column:
    known = [kind for kind in kinds if kind != "null"]
    if not known:
        return NULL
    return Column(
        " or ".join(known),
        text=known == ["string"],
        candidate=any(kinds.values()),
        partly="string" in known and len(known) > 1,
    )


def choose_column(columns: Mapping[str, Column], column: str | None, *, where: str) -> str:
    """Return the column to read: the one asked for, else ``text``, else the only one with text.

    The last is said on standard error.

    Parameters
    ----------
    columns
        Every column's name and what it holds.
    column
        The column asked for.
    where
        The file or data set, for the message.

    Raises
    ------
    UnknownName
        If ``column`` does not exist.
    InvalidInput
        If it, or ``text``, holds no text, or none was asked for and the choice is not clear.
    """
    texts = [name for name, one in columns.items() if one.text and one.candidate]
    if column is not None and column not in columns:
        raise unknown_name(f"column of {where}", column, columns)
    wanted = column or (TEXT if TEXT in columns else None)
    if wanted is not None:
        if not columns[wanted].text and not columns[wanted].partly:
            raise InvalidInput(
                f"`column` {wanted!r} of {where} holds no text but {columns[wanted].kind}; "
                f"{_listing(texts)}."
            )
        return wanted
    candidates = [name for name, one in columns.items() if one.candidate]
    if len(candidates) != 1 or not texts:
        raise InvalidInput(
            f"{where} has no column `{TEXT}`; name one with `column`: {_listing(texts)}; "
            f"all columns: {', '.join(columns) or 'none'}."
        )
    tell(f"the text of {where} is its column {texts[0]!r}, the only one with text")
    return texts[0]


def _listing(texts: list[str]) -> str:
    return f"columns with text: {', '.join(texts) or 'none'}"


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


EVERY_SPLIT = "all"
"""The split that means all files of a folder."""

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of the splits, by the `datasets` library (``data_files.SPLIT_KEYWORDS``)."""

_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}.*")
_WORDS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?=$|[-._ 0-9])", re.IGNORECASE)
    for split, words in KEYWORDS.items()
}
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|copying|authors|contributing|requirements|vocab|"
    r"merges|checksums?|(md5|sha\d*)sums?)([-._][a-z]{2})?\.txt|"
    r"(manifest|metadata|meta|index|dataset_infos?|dataset_dict|state|(\w+_)?config|vocab|"
    r"special_tokens_map|added_tokens|tokenizer|package|croissant|citation|stats|"
    r"[\w.-]+\.index)\.json",
    re.IGNORECASE,
)
_LARGEST = 2**24  # bytes of one JSON object that is looked at
_MOST_NAMED = 5


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder to read."""

    files: list[Path]
    """Sorted by name, with subfolders."""
    split: str | None
    """The split that they are; None where the folder has none."""
    left_out: list[str]
    """Names of files with a readable ending that are about the data."""

    def settings(self) -> dict[str, object]:
        """Return what was read, for the settings of a text."""
        split = {} if self.split is None else {"split": self.split}
        left_out = {"left_out": self.left_out} if self.left_out else {}
        return {"n_files": len(self.files), **split, **left_out}


def split_of(name: PurePosixPath) -> str | None:
    """Return the split that a file's path inside its folder tells of, None where it tells none."""
    shard = _SHARD.fullmatch(name.name)
    if shard is not None and name.parent.name == "data":
        return _keyword(shard["split"], whole=True) or shard["split"]
    for part in (*reversed(name.parts[:-1]), name.name):
        if found := _keyword(part):
            return found
    return None


def _keyword(part: str, *, whole: bool = False) -> str | None:
    for split, words in _WORDS.items():
        if part in KEYWORDS[split] if whole else words.search(part):
            return split
    return None


def folder_files(
    folder: Path, split: str | None, *, column: str | None, splits: Sequence[str]
) -> FolderFiles | None:
    """Choose the files of a folder to read.

    Parameters
    ----------
    folder
        With readable files in or below it.
    split
        The split asked for, `EVERY_SPLIT` for all files; None for the first of ``splits`` that
        there is, or all files of a folder without splits.
    column
        The column asked for: a JSON object that has it is text.
    splits
        Taken without ``split``.

    Returns
    -------
    FolderFiles or None
        None where a split is asked for and no file tells of one: the `datasets` library knows.

    Raises
    ------
    InvalidInput
        If there are no readable files, a file may be text or about the data, only some files tell
        of a split, or files of one split lie in several folders, which are several data sets.
    UnknownName
        If there is no such split.
    """
    found = _readable(folder)
    about = [name for name in found if _is_about(folder, name, column)]
    names = [name for name in found if name not in about]
    if not names and split not in (None, EVERY_SPLIT):
        return None
    if not names:
        raise InvalidInput(
            f"folder '{folder}' holds no {', '.join(READERS)} file of text; to read it as a folder "
            "of the `datasets` library, name its `split`."
        )
    left_out = [str(name) for name in about]
    if left_out:
        tell(f"left out of '{folder}', as files about the data: {_listed(left_out)}")
    told = {name: split_of(name) for name in names}
    present = sorted({one for one in told.values() if one is not None})
    if split == EVERY_SPLIT or not _are_splits(present):
        if split not in (None, EVERY_SPLIT):
            return None
        return FolderFiles([folder / name for name in names], split, left_out)
    chosen = _chosen(folder, told, present, split, splits)
    own = [name for name, one in told.items() if one == chosen]
    _check_one_set(folder, own, chosen)
    return FolderFiles([folder / name for name in own], chosen, left_out)


def _are_splits(present: Sequence[str]) -> bool:
    """Tell whether names are of splits; one alone without a keyword is the name of the data."""
    return len(present) > 1 or any(name in KEYWORDS for name in present)


def _chosen(
    folder: Path,
    told: dict[PurePosixPath, str | None],
    present: Sequence[str],
    split: str | None,
    splits: Sequence[str],
) -> str:
    if split is not None:
        if split not in present:
            raise unknown_name(f"split of folder '{folder}'", split, [*present, EVERY_SPLIT])
        return split
    others = [str(name) for name, one in told.items() if one is None]
    if others:
        some = next(str(name) for name, one in told.items() if one is not None)
        raise InvalidInput(
            f"folder '{folder}' holds files of splits ({', '.join(present)}; such as '{some}') "
            f"beside others ({_listed(others)}); name the `split` to read, or `{EVERY_SPLIT}` for "
            "every file."
        )
    chosen = next((one for one in splits if one in present), None)
    if chosen is None:
        raise unknown_name(
            f"split of folder '{folder}'", splits[0], present,
            f"Name its `split`, or `{EVERY_SPLIT}` for every file.",
        )  # fmt: skip
    if chosen != splits[0]:
        tell(f"'{folder}' has no split {splits[0]}; its split {chosen} is read")
    return chosen


def _check_one_set(folder: Path, files: Sequence[PurePosixPath], split: str) -> None:
    """Refuse files of one split that lie side by side in several folders: configurations."""
    above = {tuple(_above(name)) for name in files}
    if len(above) > 1:
        places = sorted("/".join(parts) or "." for parts in above)
        raise InvalidInput(
            f"split {split!r} of folder '{folder}' lies in several folders ({_listed(places)}), "
            "which are data sets of their own: give one of them."
        )


def _above(name: PurePosixPath) -> Iterator[str]:
    """Yield the folders above the one that is called by a split, ``data`` left out."""
    for part in name.parts[:-1]:
        if _keyword(part):
            return
        if part != "data":
            yield part


def _readable(folder: Path) -> list[PurePosixPath]:
    """Return the names of files with a readable ending, hidden ones left out, sorted."""
    with decoding(folder, remedy="give a folder that can be listed"):
        found = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix() for path in found}
    return [
        PurePosixPath(name)
        for name in sorted(names)
        if PurePosixPath(name).suffix.lower() in READERS and "/." not in f"/{name}"
    ]


def _is_about(folder: Path, name: PurePosixPath, column: str | None) -> bool:
    """Tell whether a file is about the data; refuse one that may be either."""
    if any(part.startswith("_") for part in name.parts) or _ABOUT.fullmatch(name.name):
        return True
    if name.suffix.lower() != ".json":
        return False
    alone = _single_object(folder / name)
    if alone is None or (column or "text") in alone:
        return False
    raise InvalidInput(
        f"'{folder / name}' is one JSON object without `{column or 'text'}`, which may be about "
        "the data or be text itself: move it, or begin its name with _ to leave it out; give the "
        "file, or its `column`, to read it."
    )


def _single_object(path: Path) -> dict[str, object] | None:
    """Return the JSON object that is all that a file holds; None for lines of objects."""
    with decoding(regular_file(path), remedy="give UTF-8 text"):
        if path.stat().st_size > _LARGEST:
            return None
        content = path.read_bytes()
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)})" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def has_configurations(folder: Path) -> bool:
    """Tell whether a folder's README lays out its files, as in a repository of the Hub."""
    path = folder / "README.md"
    if not path.is_file():
        return False
    with decoding(path, remedy="give UTF-8 text"):
        text = path.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    return head is not None and re.search(r"^configs:", head[1], flags=re.MULTILINE) is not None
