"""The modes of one neuron's outputs, with frequent tokens and contexts of each.

Tokens in their contexts, one line each, with the token in a box in the middle.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Annotation

from entangle.checks import whole
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, picked
from entangle.plotting.outputs import Entry, output_limits, wd_text
from entangle.plotting.page import Paper, axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.style import (
    COLORBLIND,
    MONO_ADVANCE,
    PALETTE,
    PaperFigure,
    Side,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    ink,
    mono_families,
    printable,
    settle_ticks,
    shorten,
    text_families,
    width,
)
from entangle.plotting.summaries import (
    DECOMPOSE,
    OutputDensity,
    bell_curve,
    check_columns,
    choose,
    output_density,
)

LINE_INCHES = 0.124
"""Height of a line of a table."""
_POINTS = 6.4  # a cell is a whole number of pixels at 150 and at 300 dots an inch
_CELL = _POINTS * MONO_ADVANCE  # points
_SLACK = 0.95
_NOTE_CELLS, _TOKEN_CELLS = 8, 18
_MOST = 500  # characters: more than any line holds, and few enough to measure
_CONTEXT_COLUMNS = ("token", "before", "after", "output")


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


@axes_level
def plot_contexts(
    contexts: pd.DataFrame,
    *,
    color: str = PALETTE["output"],
    modes: pd.DataFrame | None = None,
    per_mode: int = 4,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Write tokens in their contexts, one line each, with the neuron's output before it.

    Control characters, and characters that no font in use has, are written as escapes
    (`entangle.plotting.style.printable`); what does not fit the width is cut.

    Parameters
    ----------
    contexts
        ``token``, ``before``, ``after`` (texts) and ``output``, as the ``contexts`` of
        `entangle.modes.neuron_modes`.
    color
        Of the boxes around the tokens.
    modes
        Of the same neuron, as in `plot_modes`, with ``top_tokens`` (JSON lists of [token, count,
        share of the mode]): contexts, then with ``mode``, stand under the head of their mode and in
        its colour.
    per_mode
        Contexts shown of every mode.
    ax
        Where to write; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure, without axis lines.

    Raises
    ------
    InvalidInput
        Missing columns or no rows.
    """
    check_columns(contexts, _CONTEXT_COLUMNS, name="contexts", writer=DECOMPOSE)
    ax = axes_or_new(ax, options)
    if modes is None:
        lines = context_lines(contexts, color=ink("context", color), series="context")
        numbered = picked(enumerate(lines), lambda line: f"context {line[0]}", least=1)
        write_lines(ax, [line for _, line in numbered])
    else:
        write_lines(ax, _lines(modes, contexts, whole("per_mode", per_mode, least=0)))
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


X_LABEL, Y_LABEL = "standardised output (σ)", "density (per σ)"
_COLUMNS = ("layer", "neuron", "mode", "left", "right", "tokens", "share")
_COLORS = tuple(COLORBLIND[i] for i in (0, 1, 2, 4, 3, 5, 9, 8))
_PANEL_INCHES, _PANEL_WIDTH, _PAD, _MOST_TOKENS = 2.1, 2.3, 0.08, 10


@axes_level
def plot_modes(
    modes: pd.DataFrame,
    *,
    histogram: pd.DataFrame,
    mean: float,
    std: float,
    layer: str | None = None,
    neuron: int | None = None,
    legend: bool = True,
    notes: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the density of one neuron's outputs, shaded by mode.

    Parameters
    ----------
    modes
        A row a mode, as `entangle.modes.neuron_modes` makes it: ``layer``, ``neuron``, ``mode``,
        ``left`` and ``right`` (borders in model units, the outermost endless), ``tokens``,
        ``share``.
    histogram, mean, std
        Of the neuron's outputs, in model units, as in `entangle.plotting.plot_output_distribution`.
    layer, neuron
        Which; may be left out where ``modes`` holds only one.
    legend
        Name the modes with their tokens.
    notes
        Without a legend, write n.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure, in standard deviations from the mean. Every mode's number
        stands above it.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, something that the table does not hold, a constant neuron.
    """
    rows = _modes(modes, layer, neuron)
    name = f"neuron {rows['neuron'].iloc[0]}"
    shape = output_density(histogram, mean=mean, std=std, label=name)
    ax = axes_or_new(ax, options)
    entries = _draw(ax, rows, shape, mean, std)
    add_title(ax, name)
    skyline = 0.5 * (shape.edges[:-1] + shape.edges[1:]), 1.2 * shape.density
    if legend:
        add_legend(ax, entries, side=_side(shape), skyline=skyline)
    elif notes:
        add_note(ax, [f"n = {shape.n:,} tokens"], side=_side(shape), skyline=skyline)
    return ax


@figure_level
def figure_modes(
    modes: pd.DataFrame,
    contexts: pd.DataFrame,
    histogram: pd.DataFrame,
    *,
    mean: float,
    std: float,
    wd: float | None = None,
    layer: str | None = None,
    neuron: int | None = None,
    per_mode: int = 4,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw the modes of one neuron beside their most frequent tokens and example contexts.

    Parameters
    ----------
    modes
        As in `plot_modes`, with ``top_tokens``: JSON lists of [token, count, share of the mode].
    contexts
        A row an example, as `entangle.modes.neuron_modes` makes it: ``layer``, ``neuron``,
        ``mode``, ``rank``, ``output`` (model units), ``token``, ``before``, ``after``.
    histogram, mean, std
        Of the neuron's outputs, in model units.
    wd
        The neuron's WD in σ, for the title.
    layer, neuron
        Which; may be left out where ``modes`` holds only one.
    per_mode
        Contexts shown of every mode, the first by ``rank``.
    column
        Width: ``"single"`` puts the texts below the distribution, ``"double"`` beside it.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        The distribution and the texts. Control characters, and characters that no font in use has,
        are written as escapes.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_modes` refuses.
    """
    rows = _modes(modes, layer, neuron)
    first = rows.iloc[0]
    texts = _contexts(contexts, str(first["layer"]), int(first["neuron"]))
    texts = texts.assign(output=(texts["output"] - mean) / std)
    with paper(options) as page:
        panel, table = beside_table(page, len(_lines(rows, texts, per_mode)))
        plot_modes(
            rows, histogram=histogram, mean=mean, std=std, legend=False, notes=False, ax=panel
        )
        plot_contexts(texts, modes=rows, per_mode=per_mode, ax=table)
        page.figure.draw_without_rendering()  # the panel's width decides how the title is broken
        add_title(panel, neuron_title(first, wd))
        caption = (
            f"The modes of the outputs of neuron {first['neuron']} of {first['layer']} "
            f"(n = {round(histogram['count'].sum()):,} tokens), with the most frequent tokens of "
            "each and some of them in their contexts",
            "dashed: the Gaussian of the same mean and standard deviation; numbers before the "
            "texts: outputs in σ",
        )
        return page.finish(caption, shared=False)


def beside_table(page: Paper, lines: int) -> tuple[Axes, Axes]:
    """Make a panel and an axes for lines of text, below it or, on two columns, beside it."""
    whole, text = page.inches, lines * LINE_INCHES
    single = page.column == "single"
    height = _PANEL_INCHES + text + 2 * _PAD if single else max(_PANEL_INCHES, text) + 2 * _PAD
    if single:
        low = (text + 2 * _PAD) / height
        rect = 0.0, low, 1.0, 1.0 - low
        place = 2 * _PAD / whole, _PAD / height, 1.0 - 3 * _PAD / whole, text / height
    else:
        left, pad = _PANEL_WIDTH / whole, _PAD / height
        rect = 0.0, 0.0, left, 1.0
        place = left + 2 * _PAD / whole, pad, 1.0 - left - 3 * _PAD / whole, 1.0 - 2 * pad
    page.figure = PaperFigure(figsize=(whole, height), layout=ConstrainedLayoutEngine(rect=rect))
    panel, table = page.figure.subplots(), page.figure.add_axes(place)
    settle_ticks([panel])
    page.axes = [panel, table]
    return panel, table


def neuron_title(row: pd.Series, wd: float | None) -> str:
    """Return two lines: the neuron with its WD, and its layer."""
    first = ", ".join(filter(None, (f"neuron {row['neuron']}", wd_text(wd, None))))
    return f"{first}\n{row['layer']}"


def _modes(modes: pd.DataFrame, layer: str | None, neuron: int | None) -> pd.DataFrame:
    check_columns(modes, _COLUMNS, name="modes", writer=DECOMPOSE)
    rows = choose(modes, name="modes", layer=layer, neuron=neuron).sort_values("mode")
    left, right = rows["left"].to_numpy(np.float64), rows["right"].to_numpy(np.float64)
    if not ((left < right).all() and (right[:-1] <= left[1:]).all()):
        raise InvalidInput(
            "`modes` must have left < right, ascending from mode to mode; got borders "
            f"{', '.join(f'{value:.4g}' for value in right[:8])}; {DECOMPOSE}"
        )
    return rows


def _contexts(contexts: pd.DataFrame, layer: str, neuron: int) -> pd.DataFrame:
    needed = ("layer", "neuron", "mode", "rank", "output", "token", "before", "after")
    check_columns(contexts, needed, name="contexts", writer=DECOMPOSE)
    kept = choose(contexts, name="contexts", layer=layer, neuron=neuron)
    return kept.sort_values(["mode", "rank"], kind="stable")


def _side(shape: OutputDensity) -> Side:
    low, high = shape.edges[[0, -1]]
    return "right" if shape.quantile(0.5) <= 0.5 * (low + high) else "left"


def _draw(
    ax: Axes, rows: pd.DataFrame, shape: OutputDensity, mean: float, std: float
) -> list[Entry]:
    limits = output_limits(shape, center=0.0, scale=1.0)
    entries: list[Entry] = []
    for place, row in _picked_modes(rows):
        color, name = _color(place, row), f"mode {row['mode']}"
        left, right = ((float(row[end]) - mean) / std for end in ("left", "right"))
        edges = np.unique(np.clip(np.append(shape.edges, [left, right]), left, right))
        edges = edges[np.isfinite(edges)]
        density = shape.at(0.5 * (edges[:-1] + edges[1:]))
        bars = ax.stairs(density, edges, fill=True, lw=0, alpha=0.7, color=color, label=name)
        record(
            bars, panel="modes", series=name, x=edges[:-1], y=density, x_right=edges[1:],
            tokens=int(row["tokens"]),
        )  # fmt: skip
        entries.append((bars, f"{name} (n = {int(row['tokens']):,})"))
        shown = max(left, limits[0]), min(right, limits[1])
        ax.axvspan(*shown, color=color, alpha=0.08, lw=0, zorder=0.5)
        _number(ax, 0.5 * (shown[0] + shown[1]), place, str(row["mode"]), color)
    x = np.linspace(*limits, 401)
    bell = bell_curve(x)
    if asked_for("Gaussian"):
        color = ink("gaussian", None, "Gaussian")
        (line,) = ax.plot(x, bell, color=color, lw=0.7, ls="--", label="Gaussian")
        record(line, panel="modes", series="Gaussian", x=x, y=bell)
        entries.append((line, "Gaussian"))
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, xlim=limits)
    ax.set_ylim(0.0, 1.25 * max(float(shape.density.max()), float(bell.max())))
    return entries


def _number(ax: Axes, x: float, place: int, text: str, color: str) -> None:
    """Write a mode's number at the top, in turn at two heights."""
    ax.text(
        x, 0.97 - 0.09 * (place % 2), text, transform=ax.get_xaxis_transform(), ha="center",
        va="top", fontsize=6.5, color="black", clip_on=True,
        bbox={"boxstyle": "circle,pad=0.15", "facecolor": color, "alpha": 0.35, "lw": 0},
    )  # fmt: skip


def _color(place: int, row: pd.Series) -> str:
    return ink(f"mode {row['mode']}", _COLORS[place % len(_COLORS)])


def _picked_modes(modes: pd.DataFrame) -> list[tuple[int, pd.Series]]:
    """Return the wanted modes, with the places that give them their colours."""
    rows = [(place, row) for place, (_, row) in enumerate(modes.iterrows())]
    return picked(rows, lambda row: f"mode {row[1]['mode']}", least=1)


def _lines(modes: pd.DataFrame, contexts: pd.DataFrame, per_mode: int) -> list[Line]:
    check_columns(modes, ("top_tokens",), name="modes", writer=DECOMPOSE)
    lines: list[Line] = []
    for place, row in _picked_modes(modes):
        share = f"{100 * row['share']:.3g} % of the tokens (n = {int(row['tokens']):,})"
        color = _color(place, row)
        lines.append(HeadLine(f"mode {row['mode']}: {share}, outputs in σ:", color=color))
        tokens = _top_tokens(str(row["top_tokens"]))
        lines.append(HeadLine(f"most frequent: {tokens}"))
        kept = contexts[contexts["mode"] == row["mode"]].head(per_mode)
        lines += context_lines(kept, color=color, series=f"mode {row['mode']}")
        lines.append(HeadLine(""))
    return lines[:-1]


def _top_tokens(text: str) -> str:
    """Return tokens with their share of the mode, for example ``"· the" 42 %``."""
    try:
        found: Sequence[tuple[str, int, float]] = json.loads(text)
        return ", ".join(
            f"“{token}”\u00a0{100 * share:.2g}\u00a0%" for token, _, share in found[:_MOST_TOKENS]
        )
    except (ValueError, TypeError) as error:
        raise InvalidInput(
            "`modes` must hold JSON lists of [token, count, share] in top_tokens; got "
            f"{text[:60]!r}; {DECOMPOSE}"
        ) from error
