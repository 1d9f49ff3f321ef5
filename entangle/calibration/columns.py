"""Which column of a table is the text.

A column ``text`` is used or refused, never replaced by another. Without one, a column is taken only
where it is the one that holds text at all, and this is said.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entangle.errors import InvalidInput, unknown_name
from entangle.progress import tell

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
