"""What commands print on standard output: lines, tables, JSON, CSV, LaTeX."""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from entangle.errors import EntangleError, InvalidInput, visible
from entangle.runs.progress import on_terminal, tell

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table as RichTable


_WIDEST = 10_000


def say(*lines: str) -> None:
    """Print lines in which what cannot be seen is spelled out (`entangle.errors.visible`).

    Raises
    ------
    EntangleError
        As `print_table`.
    """
    write("".join(f"{visible(line)}\n" for line in lines))


def write(text: str) -> None:
    """Print a text as it is, with no line end of its own.

    Raises
    ------
    EntangleError
        As `print_table`.
    """
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


@dataclass(frozen=True)
class Table:
    """One of a command's tables: what it holds, and how people read it."""

    name: str
    """What ``--table`` calls it."""
    frame: "pd.DataFrame"
    """Plain values: what ``--csv`` and ``--latex`` write."""
    title: str
    """Line above the table."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Of the columns that are shown, as in `print_table`."""
    keys: Sequence[str] = ()
    """Columns that tell rows apart: never dropped. The first one if none is named."""
    optional: Sequence[str] = ()
    """Columns to drop first where there is no room, the least important first; then come all others
    but the keys, from the right."""
    shown: "pd.DataFrame | None" = None
    """What is printed where it is not ``frame``: columns left out, renamed or joined."""


def present(
    arguments: argparse.Namespace,
    tables: Sequence[Table],
    content: Mapping[str, object] | Sequence[object],
    *,
    said: Sequence[str] = (),
    out: object = None,
) -> None:
    """Print what a command found, in the format that its options ask for.

    In a format nothing else is on standard output: all lines go to standard error.

    Parameters
    ----------
    arguments
        With the options of `entangle.cli.options.add_table_options`.
    tables
        The most important one first: ``--csv`` writes it, or the one that ``--table`` names. Others
        that are empty are not printed.
    content
        What ``--json`` prints.
    said
        Lines below the tables.
    out
        Where the result is, None if it is nowhere; told last, and by ``--json`` in ``content``.

    Raises
    ------
    InvalidInput
        If there is no table of the name that is asked for.
    EntangleError
        As `print_table`.
    """
    if arguments.json:
        print_json(content)
        return
    chosen = [one for one in tables if arguments.table in (None, one.name)]
    if not chosen:
        there = ", ".join(one.name for one in tables)
        raise InvalidInput(
            f"this result has no table {arguments.table!r}; it has {there}.{_at(out)}"
        )
    where = [] if out is None else [_at(out).strip()]
    if arguments.csv or arguments.latex:
        write(_csv(chosen[0].frame) if arguments.csv else "\n".join(map(_latex, chosen)))
        others = [one.name for one in tables if one is not chosen[0]]
        if arguments.csv and arguments.table is None and others:
            tell(f"this is the table {chosen[0].name}; --table names another: {', '.join(others)}")
        for line in (*said, *where):
            tell(line)
        return
    for place, one in enumerate(chosen):
        if len(one.frame) or not place:
            shown = one.frame if one.shown is None else one.shown
            print_table(
                shown, title=one.title, formats=one.formats, keys=one.keys, optional=one.optional,
                wide=arguments.wide,
            )  # fmt: skip
    say(*said, *where)


def _at(out: object) -> str:
    return "" if out is None else f" Saved to {out}."


def _latex(table: Table) -> str:
    from entangle.runs.tables import latex_table

    return latex_table(table.frame, caption=table.title)


def _csv(frame: "pd.DataFrame") -> str:
    """Return a frame as CSV, numbers in full; for a terminal what cannot be seen is spelled out."""
    import pandas as pd

    if on_terminal(sys.stdout):
        texts = frame.select_dtypes(exclude="number").columns
        spelled = {n: frame[n].map(lambda v: v if pd.isna(v) else visible(str(v))) for n in texts}
        frame = frame.assign(**spelled).rename(columns=lambda name: visible(str(name)))
    return frame.to_csv(index=False, lineterminator="\n")


def print_table(
    frame: "pd.DataFrame",
    *,
    title: str,
    formats: Mapping[str, str],
    keys: Sequence[str] = (),
    optional: Sequence[str] = (),
    wide: bool = False,
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
    keys, optional
        As in `Table`: which columns are left out where the terminal is too narrow. They are named
        below the table. Where the keys alone have no room, every row is printed as a block of
        lines, one a column. Off a terminal all columns are printed.
    wide
        Print all columns on a terminal too, however wide it is.

    Raises
    ------
    EntangleError
        If standard output cannot be written.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    available = console.width if on_terminal(sys.stdout) and not wide else sys.maxsize
    keys = keys or [str(name) for name in frame.columns[:1]]
    others = [str(name) for name in reversed(frame.columns) if name not in (*keys, *optional)]
    whole, left_out = frame, []
    for name in ("", *(name for name in optional if name not in keys), *others):
        if name in frame.columns:
            frame = frame.drop(columns=name)
            left_out.append(name)
        table = _table(frame, formats)
        needed = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
        if needed <= available:
            break
    else:
        say(title, "", *_blocks(whole, formats))
        return
    with _writing(), console.capture() as printed:
        console.print(visible(title), style="italic", soft_wrap=True)
        console.width = needed
        console.print(table)
    write(printed.get())
    if left_out:
        say(f"Left out for want of room: {', '.join(left_out)}; --wide prints all.")


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
    write(printed.get())


def _blocks(frame: "pd.DataFrame", formats: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of every row, one a column, and an empty one after it."""
    names = [visible(str(name)) for name in frame.columns]
    longest = max(map(len, names), default=0)
    for row in frame.itertuples(index=False):
        for label, name, value in zip(names, frame.columns, row, strict=True):
            yield f"  {label:<{longest}}  {_cell(value, formats.get(str(name), ''))}"
        yield ""


def _table(frame: "pd.DataFrame", formats: Mapping[str, str]) -> "RichTable":
    from rich import box
    from rich.table import Table as RichTable

    table = RichTable(box=box.SIMPLE_HEAD)
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
    write(json.dumps(content, indent=2, allow_nan=False) + "\n")
