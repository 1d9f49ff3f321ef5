"""Pairs of tokens: how far apart inputs and outputs are, and the pairs that a neuron parts most."""

from collections.abc import Iterable
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from entangle.checks import whole, wholes
from entangle.plotting.modes import (
    X_LABEL,
    Y_LABEL,
    ContextLine,
    HeadLine,
    Line,
    beside_table,
    neuron_title,
    signed,
    write_lines,
)
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, picked
from entangle.plotting.outputs import Entry, output_limits
from entangle.plotting.page import axes_level, figure_level, paper, share_axes
from entangle.plotting.save import record
from entangle.plotting.style import NOMINAL, Role, add_legend, add_note, add_title, axes_or_new, ink
from entangle.plotting.summaries import (
    DECOMPOSE,
    Floats,
    OutputDensity,
    check_columns,
    choose,
    finite_rows,
    output_density,
    usual_neurons,
)

_INPUTS = "input distance (÷ largest)"
_OUTPUTS = "output distance (÷ median)"
PAIRS = "token pairs"
TREND = "median (of each tenth; band: quartiles)"
MOST_POINTS = 3000
"""Largest number of pairs that are drawn one by one; more are counted in hexagons."""
_COLUMNS = ("layer", "neuron", "input_normalised", "output_normalised")
_BINS, _LEAST = 10, 5


@axes_level
def plot_distances(
    pairs: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    role: Role = "output",
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the output distance of token pairs against their input distance, for one neuron.

    Parameters
    ----------
    pairs
        ``pairs`` of a decomposition: ``layer``, ``neuron``, ``input_normalised`` (by the largest of
        the layer) and ``output_normalised`` (by the neuron's median).
    layer, neuron
        Which; may be left out where ``pairs`` holds only one.
    role
        What the neuron stands for; chooses the colour.
    legend
        Write a legend; otherwise only the numbers.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure. A line joins the medians of tenths of the pairs by input
        distance, a band their quartiles. The mean ratio is the mapping difficulty of these pairs.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, something that the table does not hold, no pair with different inputs.

    References
    ----------
    arXiv 2405.15756, equation 2 and figure 2 c, d.
    """
    rows, dropped = _different(choose(pairs, name="pairs", layer=layer, neuron=neuron))
    ax = axes_or_new(ax, options)
    title = f"{'' if role == 'output' else f'{role} '}neuron {rows['neuron'].iloc[0]}"
    entries = _draw_distances(ax, rows, role, panel=title)
    add_title(ax, f"{title}\n{_ratio(rows)}" if legend else title)
    notes = [_ratio(rows), f"n = {len(rows):,}\u00a0pairs", *dropped]
    skyline = tuple(rows[name].to_numpy(np.float64) for name in _COLUMNS[2:])
    if legend:
        said = "; ".join((f"(n = {len(rows):,})", *dropped))
        entries = [(e, f"{name} {said}" if name != TREND else name) for e, name in entries]
        add_legend(ax, entries, side="left", skyline=(skyline[0], skyline[1]))
    else:
        add_note(ax, notes, side="left", skyline=(skyline[0], skyline[1]))
    return ax


@figure_level
def figure_distances(
    pairs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    chosen: int | Iterable[int] | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw input against output distances of a Wasserstein neuron beside a typical one.

    Parameters
    ----------
    pairs, layer
        As in `plot_distances`.
    neurons
        ``neurons`` of the decomposition: ``layer``, ``neuron`` and ``wd``.
    chosen
        Numbers of neurons; None takes the one with the largest WD and one near the layer's median.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        A panel a neuron, with common axes.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_distances` refuses, or nothing to draw.

    References
    ----------
    arXiv 2405.15756, figure 2 c, d.
    """
    check_columns(pairs, _COLUMNS, name="pairs", writer=DECOMPOSE)
    rows = choose(pairs, name="pairs", layer=layer)
    name = str(rows["layer"].iloc[0])
    usual = dict(
        usual_neurons(choose(neurons, name="neurons", layer=name), rows["neuron"].unique().tolist())
    )
    asked = list(usual) if chosen is None else wholes("chosen", chosen, least=0)
    wanted = picked(asked, lambda one: (f"neuron {one}", usual.get(one, "")), panels=True)
    with paper(options) as page:
        across = min(len(wanted), 2)
        axes = page.grid(len(wanted), across=across, panel_inches=1.7)
        for ax, neuron in zip(axes, wanted, strict=True):
            role = usual.get(neuron, "output")
            plot_distances(rows, neuron=neuron, role=role, legend=False, ax=ax)
        share_axes(page.figure, axes, across=across)
        caption = (
            f"Output against input distance of token pairs, for single neurons of {name}",
            "mean ratio: output over input distance, the mapping difficulty (MD) of these pairs",
        )
        return page.finish(caption, title=name)


def _different(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the pairs with different inputs and finite distances, and what is left out."""
    check_columns(rows, _COLUMNS, name="pairs", writer=DECOMPOSE)
    columns, what = _COLUMNS[2:], "pair with different inputs and finite distances"
    kept, lost = finite_rows(rows, columns, name="pairs", what=what, positive=columns[0])
    return kept, [f"{lost:,} left out"] if lost else []


def _ratio(rows: pd.DataFrame) -> str:
    ratio = rows["output_normalised"] / rows["input_normalised"]
    return f"mean ratio = {ratio.mean():.3f}"


def _draw_distances(ax: Axes, rows: pd.DataFrame, role: Role, *, panel: str) -> list[Entry]:
    x, y = (rows[name].to_numpy(np.float64) for name in _COLUMNS[2:])
    draw = _draw_hexagons if len(x) > MOST_POINTS else _draw_points
    points = [draw(ax, x, y, role, panel)] if asked_for(PAIRS, role) else []
    ax.set(xlabel=_INPUTS, ylabel=_OUTPUTS)
    ax.set_ylim(bottom=0.0)
    trend = _draw_trend(ax, x, y, panel=panel) if asked_for("median") else []
    return [*points, *trend]


def _draw_points(ax: Axes, x: Floats, y: Floats, role: Role, panel: str) -> Entry:
    points = ax.scatter(
        x, y, s=3.0, color=ink(role, None, PAIRS), alpha=0.4, linewidths=0, label=PAIRS,
        rasterized=len(x) > 1000,
    )  # fmt: skip
    record(points, panel=panel, series=PAIRS, x=x, y=y)
    return points, PAIRS


def _draw_hexagons(ax: Axes, x: Floats, y: Floats, _role: Role, panel: str) -> Entry:
    name = f"{PAIRS} (darker: more)"
    cells = ax.hexbin(
        x, y, gridsize=40, mincnt=1, norm=LogNorm(), cmap="Greys", linewidths=0, label=name,
        rasterized=True,
    )  # fmt: skip
    places, count = np.asarray(cells.get_offsets()), np.asarray(cells.get_array())
    record(cells, panel=panel, series=PAIRS, x=places[:, 0], y=places[:, 1], count=count)
    return cells, name


def _draw_trend(ax: Axes, x: Floats, y: Floats, *, panel: str) -> list[Entry]:
    """Draw the median and the quartiles of tenths of the pairs, if these are not too few."""
    if len(x) < _BINS * _LEAST:
        return []
    parts = np.array_split(np.argsort(x, kind="stable"), _BINS)
    place = np.array([np.median(x[part]) for part in parts])
    low, middle, high = np.transpose([np.percentile(y[part], [25, 50, 75]) for part in parts])
    color = ink("gaussian", None, "median")
    ax.fill_between(place, low, high, fc=(color, 0.2), ec=(color, 0.8), lw=0.5, zorder=2.1)
    (line,) = ax.plot(
        place, middle, "o-", color=color, ms=2.0, lw=0.9, zorder=2.2, label=TREND
    )  # fmt: skip
    record(line, panel=panel, series="median", x=place, y=middle, y_low=low, y_high=high)
    return [(line, TREND)]


MOST_PAIRS = 12
_SIDES = ("a", "b")
_PAIR = (
    "layer", "neuron", "rank", "output_a", "output_b", "token_a", "token_b", "context_a",
    "context_b", "start_a", "end_a", "start_b", "end_b", "input_distance", "cosine",
    "output_distance",
)  # fmt: skip
_COLORS = (*NOMINAL[:5], NOMINAL[6])


@axes_level
def plot_separated_pairs(
    separated: pd.DataFrame,
    *,
    histogram: pd.DataFrame,
    mean: float,
    std: float,
    layer: str | None = None,
    neuron: int | None = None,
    most: int = 5,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw one neuron's outputs, and above them the pairs that it separates most.

    Parameters
    ----------
    separated
        ``separated`` of a decomposition, a row a pair: ``layer``, ``neuron``, ``rank``,
        ``output_a`` and ``output_b`` (model units), and for `figure_separated_pairs` tokens and
        contexts.
    histogram, mean, std
        Of the neuron's outputs, in model units, as in `entangle.plotting.plot_output_distribution`.
    layer, neuron
        Which; may be left out where ``separated`` holds only one.
    most
        Pairs to mark, the first by ``rank``, at most `MOST_PAIRS`.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure: a line a pair, full dot a, hollow dot b, with its number.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, something that the table does not hold, a constant neuron.
    """
    rows = _pairs(separated, layer, neuron, most)
    name = f"neuron {rows['neuron'].iloc[0]}"
    shape = output_density(histogram, mean=mean, std=std, label=name)
    ax = axes_or_new(ax, options)
    _draw_pairs(ax, rows, shape, mean, std)
    add_title(ax, f"{name}, n = {shape.n:,} tokens")
    return ax


@axes_level
def plot_pair_contexts(
    separated: pd.DataFrame,
    *,
    mean: float,
    std: float,
    layer: str | None = None,
    neuron: int | None = None,
    most: int = 5,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Write the contexts of the pairs that one neuron separates most, with its outputs in σ.

    Parameters
    ----------
    separated, mean, std, layer, neuron, most
        As in `plot_separated_pairs`.
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
    InvalidInput, UnknownName
        What `plot_separated_pairs` refuses.
    """
    lines = _lines(_pairs(separated, layer, neuron, most), mean, std)
    ax = axes_or_new(ax, options)
    write_lines(ax, lines)
    return ax


@figure_level
def figure_separated_pairs(
    separated: pd.DataFrame,
    histogram: pd.DataFrame,
    *,
    mean: float,
    std: float,
    wd: float | None = None,
    layer: str | None = None,
    neuron: int | None = None,
    most: int = 5,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw the token pairs that one neuron separates most, with their contexts.

    Parameters
    ----------
    separated, histogram, mean, std, layer, neuron, most
        As in `plot_separated_pairs`.
    wd
        The neuron's WD in σ, for the title.
    column
        Width: ``"single"`` puts the texts below the distribution, ``"double"`` beside it.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        The distribution with the pairs marked, and the pairs' texts with the outputs in σ.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_separated_pairs` refuses.
    """
    rows = _pairs(separated, layer, neuron, most)
    first = rows.iloc[0]
    with paper(options) as page:
        panel, table = beside_table(page, 3 * len(rows))
        plot_separated_pairs(rows, histogram=histogram, mean=mean, std=std, most=most, ax=panel)
        plot_pair_contexts(rows, mean=mean, std=std, most=most, ax=table)
        page.figure.draw_without_rendering()  # the panel's width decides how the title is broken
        add_title(panel, neuron_title(first, wd))
        caption = (
            f"Pairs of tokens that look alike to {first['layer']} and that neuron "
            f"{first['neuron']} sets apart most, over the distribution of its outputs "
            f"(n = {round(histogram['count'].sum()):,} tokens)",
            "full dot: the first of a pair, hollow dot: the second; numbers before the texts: "
            "outputs in σ",
        )
        return page.finish(caption, shared=False)


def _pairs(
    separated: pd.DataFrame, layer: str | None, neuron: int | None, most: int
) -> pd.DataFrame:
    check_columns(separated, _PAIR, name="separated", writer=DECOMPOSE)
    rows = choose(separated, name="separated", layer=layer, neuron=neuron)
    rows = rows.sort_values("rank", kind="stable")
    kept = picked(range(len(rows)), lambda i: f"pair {rows['rank'].iloc[i]}", least=1)
    return rows.iloc[kept].head(min(whole("most", most, least=1), MOST_PAIRS))


def _draw_pairs(
    ax: Axes, rows: pd.DataFrame, shape: OutputDensity, mean: float, std: float
) -> list[Entry]:
    left, right = shape.edges[:-1], shape.edges[1:]
    entries: list[Entry] = []
    if asked_for("output"):
        color = ink("typical", None, "output")
        bars = ax.stairs(shape.density, shape.edges, fill=True, lw=0, alpha=0.7, color=color)
        record(bars, panel="pairs", series="output", x=left, y=shape.density, x_right=right)
        entries.append((bars, "output"))
    low, high = output_limits(shape, center=0.0, scale=1.0)
    room = 0.06 * (len(rows) + 1)
    top = float(shape.density.max()) / (1.0 - room) * 1.05
    ends = (rows[["output_a", "output_b"]].to_numpy(np.float64) - mean) / std
    low, high = min(low, 1.05 * ends.min()), max(high, 1.05 * ends.max())
    for place, ((_, row), (a, b)) in enumerate(zip(rows.iterrows(), ends, strict=True)):
        color, y = _color(row), top * (1.0 - 0.06 * (place + 0.7))
        (line,) = ax.plot(
            [a, b], [y, y], "-o", color=color, lw=0.9, ms=3.0, markevery=[0], zorder=3
        )
        ax.plot([b], [y], "o", color=color, ms=3.0, mfc="white", mew=0.8, zorder=3)
        record(
            line, panel="pairs", series=f"pair {row['rank']}", x=[a, b], y=y,
            cosine=float(row["cosine"]), input_distance=float(row["input_distance"]),
        )  # fmt: skip
        ax.annotate(
            str(row["rank"]), (max(a, b), y), xytext=(4.0, 0.0), textcoords="offset points",
            ha="left", va="center", fontsize=6.0, color=color, annotation_clip=True,
        )  # fmt: skip
        entries.append((line, f"pair {row['rank']}"))
    pad = 0.06 * (high - low)
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, xlim=(low, high + pad), ylim=(0.0, top))
    return entries


def _lines(rows: pd.DataFrame, mean: float, std: float) -> list[Line]:
    lines: list[Line] = []
    for _, row in rows.iterrows():
        color = _color(row)
        numbers = (
            f"outputs {row['output_distance']:.2f} σ apart; "
            f"inputs: cosine {row['cosine']:.3f}, distance {row['input_distance']:.3g}"
        ).replace("-", "−")
        lines.append(HeadLine(f"pair {row['rank']}: {numbers}", color=color))
        lines += [_context(row, side, color, mean, std) for side in _SIDES]
    return lines


def _context(row: pd.Series, side: str, color: str, mean: float, std: float) -> ContextLine:
    text, output = str(row[f"context_{side}"]), float(row[f"output_{side}"])
    start, end = int(row[f"start_{side}"]), int(row[f"end_{side}"])
    mark = "●" if side == "a" else "○"
    return ContextLine(
        before=text[:start],
        token=text[start:end],
        after=text[end:],
        note=f"{mark}{signed((output - mean) / std):>6}",
        color=color,
        series=f"pair {row['rank']}, {side}",
        output=output,
    )


def _color(row: pd.Series) -> str:
    return ink(f"pair {row['rank']}", _COLORS[int(row["rank"]) % len(_COLORS)])
