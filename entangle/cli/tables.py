"""Tables on standard output."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_WIDE = 200


def print_table(frame: "pd.DataFrame", *, title: str, formats: Mapping[str, str]) -> None:
    """Print a frame as a table.

    Parameters
    ----------
    frame
        What to print, one column each, in order.
    title
        Line above the table.
    formats
        Format specification of a column, for example ``.4f``; others are printed as they are.
        NaN and missing values are printed as a dash.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in frame.columns:
        numeric = frame[name].dtype.kind in "iuf" or name in formats
        table.add_column(str(name), justify="right" if numeric else "left", no_wrap=True)
    for row in frame.itertuples(index=False):
        cells = zip(frame.columns, row, strict=True)
        table.add_row(*(_cell(value, formats.get(str(name), "")) for name, value in cells))
    width = None if sys.stdout.isatty() else _WIDE
    Console(width=width, highlight=False).print(table)


def _cell(value: object, specification: str) -> str:
    import pandas as pd

    missing = value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
    return "–" if missing else format(value, specification)


def records(frame: "pd.DataFrame") -> list[dict[str, object]]:
    """Return the rows of a frame as JSON values, with null for missing ones."""
    rows: list[dict[str, object]] = json.loads(frame.to_json(orient="records", double_precision=15))
    return rows


def print_json(content: Mapping[str, object] | Sequence[object]) -> None:
    """Print JSON on standard output."""
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
