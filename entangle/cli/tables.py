"""What commands print on standard output: lines, tables, JSON."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from entangle.errors import EntangleError, visible
from entangle.runs.progress import on_terminal

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


_WIDEST = 10_000


def say(*lines: str) -> None:
    """Print lines in which what cannot be seen is spelled out (`entangle.errors.visible`).

    Raises
    ------
    EntangleError
        As `print_table`.
    """
    _write("".join(f"{visible(line)}\n" for line in lines))


def _write(text: str) -> None:
    with _writing():
        print(text, end="")


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise no_output(error) from error


def no_output(error: OSError) -> EntangleError:
    """Give up standard output, which has no room, for example; return what is said of it."""
    abandon(sys.stdout)
    reason = error.strerror or error
    return EntangleError(f"standard output cannot be written: {reason}; send it elsewhere.")


def abandon(stream: Any) -> None:
    """Send what a stream still holds, and all that follows, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def print_table(
    frame: "pd.DataFrame", *, title: str, formats: Mapping[str, str], optional: Sequence[str] = ()
) -> None:
    """Print a frame as a table, never cropping a value; what cannot be seen is spelled out.

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

    Raises
    ------
    EntangleError
        If standard output cannot be written.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    available = console.width if on_terminal(sys.stdout) else sys.maxsize
    left_out: list[str] = []
    for name in ("", *optional):
        if name in frame.columns:
            frame = frame.drop(columns=name)
            left_out.append(name)
        table = _table(frame, formats)
        needed = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
        if needed <= available:
            break
    with _writing(), console.capture() as printed:
        console.print(visible(title), style="italic", soft_wrap=True)
        console.width = needed
        console.print(table)
    _write(printed.get())
    if left_out:
        say(f"Left out for want of room: {', '.join(left_out)}.")


def print_text(pieces: Sequence[tuple[str, str]]) -> None:
    """Print pieces of one text, each in a style of rich's; what cannot be seen is spelled out.

    Raises
    ------
    EntangleError
        As `print_table`.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    text = Text(overflow="fold")
    for piece, style in pieces:
        text.append(visible(piece), style=style)
    with _writing(), console.capture() as printed:
        console.print(text)
    _write(printed.get())


def _table(frame: "pd.DataFrame", formats: Mapping[str, str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in frame.columns:
        numeric = frame[name].dtype.kind in "iuf" or name in formats
        table.add_column(visible(str(name)), justify="right" if numeric else "left", no_wrap=True)
    for row in frame.itertuples(index=False):
        cells = zip(frame.columns, row, strict=True)
        table.add_row(*(_cell(value, formats.get(str(name), "")) for name, value in cells))
    return table


def _cell(value: object, specification: str) -> str:
    import pandas as pd

    missing = value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
    return "–" if missing else visible(format(value, specification))


def records(frame: "pd.DataFrame") -> list[dict[str, object]]:
    """Return the rows of a frame as JSON values, with null for missing ones."""
    rows: list[dict[str, object]] = json.loads(frame.to_json(orient="records", double_precision=15))
    return rows


def print_json(content: Mapping[str, object] | Sequence[object]) -> None:
    """Print JSON on standard output, in ASCII: no text in it acts on a terminal or is lost."""
    _write(json.dumps(content, indent=2, allow_nan=False) + "\n")
