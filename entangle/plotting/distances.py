"""Pairs of tokens: how far apart a neuron's inputs are, and its outputs."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from entangle.checks import wholes
from entangle.errors import InvalidInput
from entangle.plotting.axes import Entry
from entangle.plotting.choices import DECOMPOSE, choose, usual_neurons
from entangle.plotting.save import record
from entangle.plotting.signature import sign
from entangle.plotting.style import (
    PALETTE,
    Column,
    Role,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    header_legend,
    panel_grid,
    paper_style,
    share_axes,
)
from entangle.plotting.summaries import Floats, check_columns

X_LABEL = "input distance (÷ largest)"
Y_LABEL = "output distance (÷ median)"
TREND = "median of each tenth; band: quartiles"
MOST_POINTS = 3000
"""Largest number of pairs that are drawn one by one; more are counted in hexagons."""
_COLUMNS = ("layer", "neuron", "input_normalised", "output_normalised")
_BINS, _LEAST = 10, 5


def plot_distances(
    pairs: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    role: Role = "output",
    legend: bool = True,
    ax: Axes | None = None,
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
    ax = axes_or_new(ax)
    title = f"{'' if role == 'output' else f'{role} '}neuron {rows['neuron'].iloc[0]}"
    entries = _draw(ax, rows, role, panel=title)
    add_title(ax, title)
    notes = [_ratio(rows), f"n = {len(rows):,}\u00a0pairs", *dropped]
    skyline = tuple(rows[name].to_numpy(np.float64) for name in _COLUMNS[2:])
    if legend:
        (points, name), *others = entries
        first = (points, "; ".join((f"{name} (n = {len(rows):,})", *dropped)))
        add_legend(ax, [first, *others], side="left", skyline=(skyline[0], skyline[1]))
        ax.set_title(f"{title}\n{_ratio(rows)}", parse_math=False)
    else:
        add_note(ax, notes, side="left", skyline=(skyline[0], skyline[1]))
    return ax


def figure_distances(
    pairs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    chosen: int | Iterable[int] | None = None,
    column: Column = "double",
    digest: str | None = None,
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
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.signature.sign`.

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
    wanted = list(usual) if chosen is None else wholes("chosen", chosen, least=0)
    with paper_style(column=column):
        across = min(len(wanted), 2)
        figure, axes = panel_grid(len(wanted), column=column, across=across)
        figure.set_figheight(0.3 + 1.7 * -(-len(wanted) // across))
        for ax, neuron in zip(axes, wanted, strict=True):
            role = usual.get(neuron, "output")
            plot_distances(rows, neuron=neuron, role=role, legend=False, ax=ax)
        share_axes(figure, axes, column=column, across=across)
        clauses = [name, "mean ratio: output ÷ input distance, the MD of these pairs"]
        header_legend(figure, axes, column=column, clauses=clauses)
        return sign(figure, digest)


def _different(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the pairs with different inputs and finite distances, and what is left out."""
    check_columns(rows, _COLUMNS, name="pairs", writer=DECOMPOSE)
    numbers = rows[list(_COLUMNS[2:])].to_numpy(np.float64, na_value=np.nan)
    kept = np.isfinite(numbers).all(axis=1) & (numbers[:, 0] > 0.0)
    if not kept.any():
        raise InvalidInput(
            "`pairs` must hold at least one pair with different inputs and finite distances; got "
            f"{len(rows)} without; {DECOMPOSE}"
        )
    lost = int((~kept).sum())
    return rows[kept], [f"{lost:,} left out"] if lost else []


def _ratio(rows: pd.DataFrame) -> str:
    ratio = rows["output_normalised"] / rows["input_normalised"]
    return f"mean ratio = {ratio.mean():.3f}"


def _draw(ax: Axes, rows: pd.DataFrame, role: Role, *, panel: str) -> list[Entry]:
    x, y = (rows[name].to_numpy(np.float64) for name in _COLUMNS[2:])
    draw = _draw_hexagons if len(x) > MOST_POINTS else _draw_points
    points = draw(ax, x, y, role, panel)
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)
    ax.set_ylim(bottom=0.0)
    return [points, *_draw_trend(ax, x, y, panel=panel)]


def _draw_points(ax: Axes, x: Floats, y: Floats, role: Role, panel: str) -> Entry:
    points = ax.scatter(
        x, y, s=3.0, color=PALETTE[role], alpha=0.4, linewidths=0, label="token pairs",
        rasterized=len(x) > 1000,
    )  # fmt: skip
    record(points, panel=panel, series="token pairs", x=x, y=y)
    return points, "token pairs"


def _draw_hexagons(ax: Axes, x: Floats, y: Floats, _role: Role, panel: str) -> Entry:
    name = "token pairs (darker: more)"
    cells = ax.hexbin(
        x, y, gridsize=40, mincnt=1, norm=LogNorm(), cmap="Greys", linewidths=0, label=name,
        rasterized=True,
    )  # fmt: skip
    places, count = np.asarray(cells.get_offsets()), np.asarray(cells.get_array())
    record(cells, panel=panel, series="token pairs", x=places[:, 0], y=places[:, 1], count=count)
    return cells, name


def _draw_trend(ax: Axes, x: Floats, y: Floats, *, panel: str) -> list[Entry]:
    """Draw the median and the quartiles of tenths of the pairs, if these are not too few."""
    if len(x) < _BINS * _LEAST:
        return []
    parts = np.array_split(np.argsort(x, kind="stable"), _BINS)
    place = np.array([np.median(x[part]) for part in parts])
    low, middle, high = np.transpose([np.percentile(y[part], [25, 50, 75]) for part in parts])
    ink = PALETTE["gaussian"]
    ax.fill_between(place, low, high, fc=(ink, 0.2), ec=(ink, 0.8), lw=0.5, zorder=2.1)
    (line,) = ax.plot(
        place, middle, "o-", color=ink, ms=2.0, lw=0.9, zorder=2.2, label=TREND
    )  # fmt: skip
    record(line, panel=panel, series="median", x=place, y=middle, y_low=low, y_high=high)
    return [(line, TREND)]
