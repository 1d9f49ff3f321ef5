"""What a table of a result may hold: one declaration a column, checked when it is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from entangle.checks import shown
from entangle.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Column:
    """What a column holds."""

    kind: Literal["text", "whole", "real"]
    """Strings, integers or floats; a column of floats may hold integers."""
    low: float | int = -inf
    """Smallest value allowed."""
    high: float | int = inf
    """Largest value allowed."""
    null: bool = False
    """Whether values may be missing or NaN."""
    among: Sequence[str] = ()
    """All values that a text may be; nothing for any."""
    optional: bool = False
    """Whether the table may lack it."""

    @property
    def dtype(self) -> str:
        """Type of the column in pandas."""
        whole = "Int64" if self.null else "int64"
        return {"text": "str", "whole": whole, "real": "float64"}[self.kind]

    def fault(self, values: "pd.Series") -> str | None:
        """Return what is wrong with a column's values, None if nothing is."""
        from pandas.api import types

        known = values.dropna()
        if len(known) < len(values) and not self.null:
            return "has a missing value"
        if self.kind == "text":
            typed = known.dtype == self.dtype
            wrong = [] if typed else [one for one in known if not isinstance(one, str)]
            if self.among and not wrong:
                wrong = [one for one in known.unique().tolist() if one not in self.among]
            return f"must hold {self._rule()}; got {shown(wrong[0])}" if wrong else None
        of_kind = types.is_integer_dtype if self.kind == "whole" else types.is_numeric_dtype
        if not of_kind(values.dtype) and (len(known) or self.kind == "whole"):
            return f"must hold {self._rule()}; got {values.dtype}"
        if len(known) == 0:
            return None
        outside = known[(known < self.low) | (known > self.high)]
        return f"must hold {self._rule()}; got {outside.iloc[0]:g}" if len(outside) else None

    def _rule(self) -> str:
        if self.kind == "text":
            return f"one of {', '.join(map(repr, self.among))}" if self.among else "text"
        kind = "integers" if self.kind == "whole" else "numbers"
        ends = f" in [{self.low:g}, {self.high:g}]"
        return kind if (self.low, self.high) == (-inf, inf) else kind + ends


def texts(*among: str, null: bool = False, optional: bool = False) -> Column:
    """Return a column of strings, any or one of some."""
    return Column("text", null=null, among=among, optional=optional)


def integers(
    low: float | int = 0, high: float | int = inf, *, null: bool = False, optional: bool = False
) -> Column:
    """Return a column of integers, by default of at least 0."""
    return Column("whole", low, high, null=null, optional=optional)


def reals(
    low: float | int = -inf, high: float | int = inf, *, null: bool = True, optional: bool = False
) -> Column:
    """Return a column of floats, which may be NaN."""
    return Column("real", low, high, null=null, optional=optional)


def shares(*, null: bool = True, optional: bool = False) -> Column:
    """Return a column of floats in [0, 1]."""
    return reals(0, 1, null=null, optional=optional)


Schema = Mapping[str, Column]
"""Columns by name. A table may have others besides."""


def check_table(table: "pd.DataFrame", schema: Schema, path: Path) -> None:
    """Check a table that was read against its schema.

    Raises
    ------
    InvalidInput
        If a column is missing, doubled, of another type or out of range.
    """
    names = list(table.columns)
    for name, column in schema.items():
        if name not in names:
            if column.optional:
                continue
            raise broken(path, f"must have the column {name!r}")
        if names.count(name) > 1:
            raise broken(path, f"must have the column {name!r} once")
        fault = column.fault(table[name])
        if fault is not None:
            raise broken(path, f"column {name!r} {fault}")


def broken(path: Path, why: str) -> InvalidInput:
    """Return the error of a file of a result that breaks a rule."""
    return InvalidInput(f"{str(path)!r}: {why}; make the result anew.")
