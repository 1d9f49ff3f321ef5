"""The modes of one neuron's outputs, with frequent tokens and contexts of each."""

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from entangle.checks import whole
from entangle.errors import InvalidInput
from entangle.plotting.axes import Entry, output_limits, wd_text
from entangle.plotting.choices import DECOMPOSE, choose
from entangle.plotting.contexts import LINE_INCHES, HeadLine, Line, context_lines, write_lines
from entangle.plotting.save import record
from entangle.plotting.signature import sign
from entangle.plotting.sparse_outputs import Y_LABEL
from entangle.plotting.style import (
    PALETTE,
    Column,
    PaperFigure,
    Side,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    column_width,
    paper_style,
    settle_ticks,
)
from entangle.plotting.summaries import OutputDensity, check_columns, output_density

X_LABEL = "standardised output (σ)"
_COLUMNS = ("layer", "neuron", "mode", "left", "right", "tokens", "share")
_COLORS: list[str] = [sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 4, 3, 5, 9, 8)]
_PANEL_INCHES, _PANEL_WIDTH, _PAD, _MOST_TOKENS = 2.1, 2.3, 0.08, 10


def plot_modes(
    modes: pd.DataFrame,
    *,
    histogram: pd.DataFrame,
    mean: float,
    std: float,
    layer: str | None = None,
    neuron: int | None = None,
    legend: bool = True,
    ax: Axes | None = None,
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
        Name the modes with their tokens; otherwise only n.
    ax
        Where to draw; None makes a new figure.

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
    ax = axes_or_new(ax)
    entries = _draw(ax, rows, shape, mean, std)
    add_title(ax, name)
    skyline = 0.5 * (shape.edges[:-1] + shape.edges[1:]), 1.2 * shape.density
    if legend:
        add_legend(ax, entries, side=_side(shape), skyline=skyline)
    else:
        add_note(ax, [f"n = {shape.n:,} tokens"], side=_side(shape), skyline=skyline)
    return ax


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
    column: Column = "double",
    digest: str | None = None,
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
        Of the run, for the small print; see `entangle.plotting.signature.sign`.

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
    shape = output_density(histogram, mean=mean, std=std, label=f"neuron {first['neuron']}")
    texts = _contexts(contexts, str(first["layer"]), int(first["neuron"]))
    texts = texts.assign(output=(texts["output"] - mean) / std)
    lines = _lines(rows, texts, whole("per_mode", per_mode, least=0))
    with paper_style(column=column):
        figure, panel, table = beside_table(len(lines), column=column)
        _draw(panel, rows, shape, mean, std)
        write_lines(table, lines)
        figure.draw_without_rendering()  # the panel's width decides how the title is broken
        title = neuron_title(int(first["neuron"]), str(first["layer"]), wd, shape.n)
        add_title(panel, title)
        return sign(figure, digest)


def beside_table(lines: int, *, column: Column) -> tuple[Figure, Axes, Axes]:
    """Make a figure with a panel and an axes for lines of text, below it or (double) beside it."""
    whole, text = column_width(column), lines * LINE_INCHES
    single = column == "single"
    height = _PANEL_INCHES + text + 2 * _PAD if single else max(_PANEL_INCHES, text) + 2 * _PAD
    if single:
        low = (text + 2 * _PAD) / height
        rect = 0.0, low, 1.0, 1.0 - low
        place = _PAD / whole, _PAD / height, 1.0 - 2 * _PAD / whole, text / height
    else:
        left, pad = _PANEL_WIDTH / whole, _PAD / height
        rect = 0.0, 0.0, left, 1.0
        place = left + _PAD / whole, pad, 1.0 - left - 2 * _PAD / whole, 1.0 - 2 * pad
    figure = PaperFigure(figsize=(whole, height), layout=ConstrainedLayoutEngine(rect=rect))
    panel, table = figure.subplots(), figure.add_axes(place)
    settle_ticks([panel])
    return figure, panel, table


def neuron_title(neuron: int, layer: str, wd: float | None, tokens: int) -> str:
    """Return three lines: the neuron with its WD, its layer, and n."""
    first = ", ".join(filter(None, (f"neuron {neuron}", wd_text(wd, None))))
    return f"{first}\n{layer}\nn = {tokens:,} tokens"


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
    for place, (_, row) in enumerate(rows.iterrows()):
        color, name = _COLORS[place % len(_COLORS)], f"mode {row['mode']}"
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
    bell = np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)
    (line,) = ax.plot(x, bell, color=PALETTE["gaussian"], lw=0.7, ls="--", label="Gaussian")
    record(line, panel="modes", series="Gaussian", x=x, y=bell)
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, xlim=limits)
    ax.set_ylim(0.0, 1.25 * max(float(shape.density.max()), float(bell.max())))
    return [*entries, (line, "Gaussian")]


def _number(ax: Axes, x: float, place: int, text: str, color: str) -> None:
    """Write a mode's number at the top, in turn at two heights."""
    ax.text(
        x, 0.97 - 0.09 * (place % 2), text, transform=ax.get_xaxis_transform(), ha="center",
        va="top", fontsize=6.5, color="black", clip_on=True,
        bbox={"boxstyle": "circle,pad=0.15", "facecolor": color, "alpha": 0.35, "lw": 0},
    )  # fmt: skip


def _lines(modes: pd.DataFrame, contexts: pd.DataFrame, per_mode: int) -> list[Line]:
    check_columns(modes, ("top_tokens",), name="modes", writer=DECOMPOSE)
    lines: list[Line] = []
    for place, (_, row) in enumerate(modes.iterrows()):
        share = f"{100 * row['share']:.3g} % of the tokens (n = {int(row['tokens']):,})"
        color = _COLORS[place % len(_COLORS)]
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
