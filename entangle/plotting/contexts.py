"""Tokens in their contexts, one line each, with the token in a box in the middle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.text import Annotation

from entangle.plotting.save import record
from entangle.plotting.style import axes_or_new
from entangle.plotting.summaries import check_columns
from entangle.plotting.text import (
    MONO_ADVANCE,
    mono_families,
    printable,
    shorten,
    text_families,
    width,
)

LINE_INCHES = 0.124
"""Height of a line of a table."""
_POINTS = 6.4  # a cell is a whole number of pixels at 150 and at 300 dots an inch
_CELL = _POINTS * MONO_ADVANCE  # points
_SLACK = 0.95
_NOTE_CELLS, _TOKEN_CELLS = 8, 18
_MOST = 500  # characters: more than any line holds, and few enough to measure
_COLUMNS = ("token", "before", "after", "output")
_WRITER = "the command `entangle decompose` writes such tables."


@dataclass(frozen=True)
class ContextLine:
    """A token in its context."""

    before: str
    token: str
    after: str
    note: str
    """Before the context: at most 8 characters."""
    color: str
    """Of the token's box and the note."""
    series: str
    """What the line stands for, in the table of what is drawn."""
    output: float
    """The neuron's output on the token, in the units shown."""


@dataclass(frozen=True)
class HeadLine:
    """A line of plain text above others."""

    text: str
    color: str | None = None
    """Of a square before the text."""


Line = ContextLine | HeadLine


def plot_contexts(
    contexts: pd.DataFrame, *, color: str = "#0173b2", ax: Axes | None = None
) -> Axes:
    """Write tokens in their contexts, one line each, with the neuron's output before it.

    Control characters, and characters that no font in use has, are written as escapes
    (`entangle.plotting.text.printable`); what does not fit the width is cut.

    Parameters
    ----------
    contexts
        ``token``, ``before``, ``after`` (texts) and ``output``, as the ``contexts`` of
        `entangle.modes.neuron_modes`.
    color
        Of the boxes around the tokens.
    ax
        Where to write; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure, without axis lines.

    Raises
    ------
    InvalidInput
        Missing columns or no rows.
    """
    check_columns(contexts, _COLUMNS, name="contexts", writer=_WRITER)
    ax = axes_or_new(ax)
    write_lines(ax, context_lines(contexts, color=color, series="context"))
    return ax


def context_lines(contexts: pd.DataFrame, *, color: str, series: str) -> list[ContextLine]:
    """Make a line of every row: ``token``, ``before``, ``after`` and ``output``."""
    return [
        ContextLine(
            before=str(row["before"]),
            token=str(row["token"]),
            after=str(row["after"]),
            note=signed(float(row["output"])),
            color=color,
            series=series,
            output=float(row["output"]),
        )
        for _, row in contexts.iterrows()
    ]


def signed(value: float) -> str:
    """Return a number with its sign in 8 characters at most."""
    return (
        f"{value:+.2f}".replace("-", "−") if abs(value) < 1e4 else f"{value:+.0e}".replace("-", "−")
    )


def write_lines(ax: Axes, lines: Sequence[Line]) -> None:
    """Write lines from the top of ``ax`` down, which loses its axis lines."""
    figure = ax.get_figure(root=True)
    assert figure is not None  # noqa: S101 - an axes that draws belongs to a figure
    room = _SLACK * 72.0 * ax.bbox.width / figure.dpi
    ax.set_axis_off()
    for number, line in enumerate(lines):
        if isinstance(line, HeadLine):
            _write_head(ax, number, line, room)
        else:
            _write_context(ax, number, line, room)


def _write_head(ax: Axes, number: int, line: HeadLine, room: float) -> None:
    indent = 0.0 if line.color is None else 2.0 * _CELL
    if line.color is not None:
        _write(ax, "■", number, at=0.0, room=room, color=line.color)
    family = text_families()
    _write(ax, printable(line.text), number, at=indent, room=room - indent, family=family)


def _write_context(ax: Axes, number: int, line: ContextLine, room: float) -> None:
    before, token, after = map(printable, (line.before, line.token, line.after))
    noted = _NOTE_CELLS * _CELL
    anchor = noted + 0.5 * (room - noted) - 3.0 * _CELL
    gap = 0.3 * _CELL
    _write(ax, line.note, number, at=noted - _CELL, room=noted, ha="right")
    _write(ax, before, number, at=anchor - gap, room=anchor - noted - gap, ha="right")
    text = _write(ax, token, number, at=anchor, room=_TOKEN_CELLS * _CELL)
    text.set_bbox({"facecolor": line.color, "alpha": 0.3, "edgecolor": "none", "pad": 0.5})
    right = anchor + _width(text) + gap
    _write(ax, after, number, at=right, room=room - right)
    record(
        text, panel="contexts", series=line.series, x=line.output, y=np.nan, token=token,
        before=before, after=after,
    )  # fmt: skip


def _write(
    ax: Axes,
    text: str,
    number: int,
    *,
    at: float,
    room: float,
    ha: Literal["left", "right"] = "left",
    color: str = "black",
    family: list[str] | None = None,
) -> Annotation:
    """Write text into line ``number``, cut to the room it has, with no part in the layout.

    Left-aligned text loses its end, right-aligned text its beginning. ``at`` (from the left edge)
    and ``room`` are in points. Glyphs of fallback fonts, and of small screens, are not as wide as
    the font says: what is written is measured.
    """
    text = text[:_MOST] if ha == "left" else text[-_MOST:]
    written = ax.annotate(
        text, (0.0, 1.0), xycoords="axes fraction", textcoords="offset points",
        xytext=(at, -72.0 * LINE_INCHES * (number + 0.5)), ha=ha, va="center_baseline",
        color=color, fontsize=_POINTS, family=family or mono_families(), parse_math=False,
        annotation_clip=False,
    )  # fmt: skip
    written.set_in_layout(False)
    keep = "start" if ha == "left" else "end"
    while (taken := _width(written)) > room:
        cells = min(int(width(text) * room / taken), width(text) - 1)
        shorter = shorten(text, max(1, cells), keep=keep)
        if shorter == text:  # nothing of it takes a cell
            break
        text = shorter
        written.set_text(text)
    return written


def _width(text: Annotation) -> float:
    """Return the width of a text in points."""
    figure = text.get_figure(root=True)
    assert figure is not None  # noqa: S101 - it was written into one
    return float(72.0 * text.get_window_extent().width / figure.dpi)
