"""Where an allocation puts its zeros: sparsities of rows, and of layers along the model."""

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.save import record, sign
from entangle.plotting.style import (
    PALETTE,
    SPARE_COLORS,
    Column,
    axes_or_new,
    column_width,
    join_clauses,
    legend_above,
    make_room,
    panel_grid,
    paper_style,
    plain_number,
)
from entangle.plotting.summaries import Floats, check_columns

VALUE_LABELS: dict[str, str] = {
    "sparsity": "zeros of the layer (%)",
    "experts": "experts of the layer",
}

_WRITER = "an `Allocation`, from `entangle allocate`, has such tables."
_COLORS = (PALETTE["output"], PALETTE["top"], *SPARE_COLORS, PALETTE["typical"])
_MARKERS = "o^sDvPX<>"
_BINS, _PANEL_INCHES = 50, 2.2
_LEAST_SPAN = 2.0  # percentage points


def plot_row_sparsity(
    neurons: pd.DataFrame,
    *,
    overall: float | None = None,
    ax: Axes | None = None,
    legend: bool = True,
) -> Axes:
    """Draw the histogram of the rows' sparsities, counts on a log scale.

    Parameters
    ----------
    neurons
        One row a neuron, as `entangle.allocation.Allocation.neurons`: ``sparsity`` in [0, 1].
    overall
        Share of zeros of all layers together, drawn as a line.
    ax
        Where to draw; None makes a new figure.
    legend
        Write a legend on top.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure.

    Raises
    ------
    InvalidInput
        If the column is missing, or a sparsity is not in [0, 1].
    """
    values = 100.0 * _shares(neurons, "neurons")
    given, ax = ax is not None, axes_or_new(ax)
    counts, edges = np.histogram(values, np.linspace(0.0, 100.0, _BINS + 1))
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    label = f"{len(values):,} rows: {low if low == high else f'{low} to {high}'} %"
    patch = ax.stairs(counts, edges, baseline=0.1, fill=True, color=PALETTE["output"], label=label)
    record(patch, panel="rows", series=label, x=edges[:-1], x_right=edges[1:], y=counts)
    entries: list[tuple[Artist, str]] = [(patch, label)]
    if overall is not None:
        entries.append(_draw_overall(ax, overall, panel="rows", vertical=True))
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.set_ylim(bottom=0.7)
    ax.set(xlim=(-1.0, 101.0), xlabel="zeros of the row (%)", ylabel="rows")
    if legend:
        key = legend_above(ax, entries, clauses=[])
        if not given:
            make_room(key)
    return ax


def plot_layer_profile(
    layers: pd.DataFrame,
    *,
    value: str = "sparsity",
    overall: float | None = None,
    ax: Axes | None = None,
    legend: bool = True,
) -> Axes:
    """Draw a value of every layer against its block, one line a projection.

    Parameters
    ----------
    layers
        One row a layer, as `entangle.allocation.Allocation.layers`: ``block``, ``projection`` and
        the column ``value``. Layers outside the blocks are left out and counted.
    value
        ``"sparsity"``, drawn in %, or ``"experts"``.
    overall
        Share of zeros of all layers together, drawn as a line beside sparsities.
    ax, legend
        As in `plot_row_sparsity`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure.

    Raises
    ------
    InvalidInput, UnknownName
        If a column is missing, no layer lies in a block, or there is no such value.
    """
    value = choice("value", value, VALUE_LABELS, kind="value of a layer")
    check_columns(layers, ("layer", "block", "projection", value), name="layers", writer=_WRITER)
    inside = layers[layers["block"].notna()]
    if inside.empty:
        raise InvalidInput(
            f"`layers` must hold at least one layer inside the blocks; got none among "
            f"{len(layers)}."
        )
    given, ax = ax is not None, axes_or_new(ax)
    entries: list[tuple[Artist, str]] = []
    for number, (name, part) in enumerate(inside.groupby("projection", sort=False)):
        part = part.sort_values("block", kind="stable")
        block = part["block"].to_numpy(np.float64)
        numbers = part[value].to_numpy(np.float64) * (100.0 if value == "sparsity" else 1.0)
        (line,) = ax.plot(
            block,
            numbers,
            color=_COLORS[number % len(_COLORS)],
            marker=_MARKERS[number % len(_MARKERS)],
            lw=0.8,
            markersize=max(2.0, 4.0 - 0.8 * number),  # equal values of two are both seen
            markeredgewidth=0.0,
            label=str(name),
        )
        record(
            line, panel=f"layers: {value}", series=str(name), x=block, y=numbers,
            layer=part["layer"].to_numpy(),
        )  # fmt: skip
        entries.append((line, str(name)))
    if overall is not None and value == "sparsity":
        entries.append(_draw_overall(ax, overall, panel="layers: sparsity", vertical=False))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if value == "sparsity":
        _widen(ax)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_ylim(bottom=0.0)
    ax.set(xlabel="block", ylabel=VALUE_LABELS[value])
    if legend:
        left_out = len(layers) - len(inside)
        clauses = [f"{left_out} layer(s) outside the blocks left out"] if left_out else []
        key = legend_above(ax, entries, clauses=clauses)
        if not given:
            make_room(key)
    return ax


def figure_allocation(
    layers: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    title: str = "",
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw an allocation: sparsities of its rows, its layers, and their experts if it has them.

    Parameters
    ----------
    layers, neurons
        `entangle.allocation.Allocation.layers` and ``neurons``.
    title
        What made the allocation, written on top, for example ``"protect, top 3 % by wd"``.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels; three with experts.

    Raises
    ------
    InvalidInput
        What the panels refuse, or an unknown ``column`` or ``digest``.
    """
    check_columns(
        layers, ("rows", "in_features", "zeros", "sparsity"), name="layers", writer=_WRITER
    )
    weights = layers["rows"] * layers["in_features"]
    overall = float(layers["zeros"].sum() / weights.sum())
    values = ["sparsity"]
    if "experts" in layers.columns:
        values.append("experts")
    with paper_style(column=column):
        figure, axes = panel_grid(1 + len(values), column=column)
        plot_row_sparsity(neurons, overall=overall, ax=axes[0])
        for ax, value in zip(axes[1:], values, strict=True):
            plot_layer_profile(layers, value=value, overall=overall, ax=ax)
        heights = [_legend_inches(ax) for ax in axes]
        down = len({ax.get_subplotspec().rowspan.start for ax in axes})  # type: ignore[union-attr]
        figure.set_figheight(down * (_PANEL_INCHES + max(heights)))
        if title:
            figure.suptitle(join_clauses([title], inches=column_width(column)), parse_math=False)
        return sign(figure, digest)


def _shares(table: pd.DataFrame, name: str) -> Floats:
    check_columns(table, ("sparsity",), name=name, writer=_WRITER)
    values = table["sparsity"].to_numpy(np.float64, na_value=np.nan)
    wrong = values[~((values >= 0.0) & (values <= 1.0))]
    if len(wrong):
        raise InvalidInput(f"`{name}` must have sparsities in [0, 1]; got {wrong[0]:g}.")
    return values


def _draw_overall(ax: Axes, overall: float, *, panel: str, vertical: bool) -> tuple[Line2D, str]:
    draw = ax.axvline if vertical else ax.axhline
    label = f"all layers: {100.0 * overall:.4g} %"
    line = draw(100.0 * overall, color=PALETTE["gaussian"], lw=0.8, ls=":", zorder=1.9)
    line.set_label(label)
    place = {"x": 100.0 * overall, "y": np.nan} if vertical else {"x": np.nan, "y": 100.0 * overall}
    record(line, panel=panel, series=label, **place)
    return line, label


def _widen(ax: Axes) -> None:
    """Make the y axis span at least `_LEAST_SPAN`, so that rounding looks like what it is."""
    low, high = ax.get_ylim()
    missing = max(0.0, _LEAST_SPAN - (high - low))
    ax.set_ylim(low - missing / 2, high + missing / 2)


def _legend_inches(ax: Axes) -> float:
    legend, figure = ax.get_legend(), ax.get_figure(root=True)
    assert legend is not None  # noqa: S101 - every panel has one
    assert figure is not None  # noqa: S101
    return float(legend.get_window_extent().height / figure.dpi)
