"""Tables on standard output."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_WIDEST = 10_000


def print_table(
    frame: "pd.DataFrame", *, title: str, formats: Mapping[str, str], optional: Sequence[str] = ()
) -> None:
    """Print a frame as a table, never cropping a value.

    Parameters
    ----------
    frame
        What to print, one column each, in order.
    title
        Line above the table.
    formats
        Format specification of a column, for example ``.4f``; others are printed as they are.
        NaN and missing values are printed as a dash.
    optional
        Columns to leave out, in this order, where the terminal is too narrow; they are named below
        the table. Off a terminal all columns are printed.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    available = console.width if sys.stdout.isatty() else sys.maxsize
    left_out: list[str] = []
    for name in ("", *optional):
        if name in frame.columns:
            frame = frame.drop(columns=name)
            left_out.append(name)
        table = _table(frame, formats)
        needed = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
        if needed <= available:
            break
    console.print(title, style="italic", soft_wrap=True)
    console.width = needed
    console.print(table)
    if left_out:
        print(f"Left out for want of room: {', '.join(left_out)}.")


def _table(frame: "pd.DataFrame", formats: Mapping[str, str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in frame.columns:
        numeric = frame[name].dtype.kind in "iuf" or name in formats
        table.add_column(str(name), justify="right" if numeric else "left", no_wrap=True)
    for row in frame.itertuples(index=False):
        cells = zip(frame.columns, row, strict=True)
        table.add_row(*(_cell(value, formats.get(str(name), "")) for name, value in cells))
    return table


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
