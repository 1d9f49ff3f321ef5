"""The zeros of rows and layers, and what else layers have along the depth of a model."""

from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, choosing, picked
from entangle.plotting.outputs import Entry, plural
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.style import (
    PALETTE,
    SPARE_COLORS,
    add_title,
    axes_or_new,
    explain_above,
    ink,
    plain_number,
)
from entangle.plotting.summaries import Floats, check_columns

VALUE_LABELS: dict[str, str] = {
    "sparsity": "zeros of the layer (%)",
    "experts": "experts of the layer",
    "relative_error": "relative error (%)",
}

_PROFILES = {
    "rows": "zeros of the rows", "sparsity": "zeros of the layers",
    "experts": "experts that each layer gets",
}  # fmt: skip
_SAID = {
    "rows": "how many rows have which share of zeros (counts on a log scale)",
    "sparsity": "the zeros of every layer along the model",
    "experts": "how many experts the allocation gives to every layer",
}
ALL_LAYERS = "all layers"
_ALLOCATION = "an `Allocation`, from `entangle allocate`, has such tables."
_LINES = (PALETTE["output"], PALETTE["top"], *SPARE_COLORS, PALETTE["typical"])
_MARKERS = "o^sDvPX<>"
_ROW_BINS, _PANEL_INCHES = 50, 1.9
_LEAST_SPAN = 2.0  # percentage points


@axes_level
def plot_row_sparsity(
    neurons: pd.DataFrame,
    *,
    overall: float | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the histogram of the rows' sparsities, counts on a log scale.

    Parameters
    ----------
    neurons
        One row a neuron, as `entangle.allocation.Allocation.neurons`: ``sparsity`` in [0, 1].
    overall
        Share of zeros of all layers together, drawn as a line.
    legend
        Write a legend on top.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure.

    Raises
    ------
    InvalidInput
        If the column is missing, or a sparsity is not in [0, 1].
    """
    neurons = _of_picked(neurons)
    values = 100.0 * _sparsities(neurons, "neurons")
    own, ax = ax is None, axes_or_new(ax, options)
    counts, edges = np.histogram(values, np.linspace(0.0, 100.0, _ROW_BINS + 1))
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    label = f"rows (n = {len(values):,}: {low if low == high else f'{low} to {high}'} %)"
    entries: list[Entry] = []
    if asked_for("rows", label):
        color = ink("output", None, "rows", label)
        patch = ax.stairs(counts, edges, baseline=0.1, fill=True, color=color, label=label)
        record(patch, panel="rows", series=label, x=edges[:-1], x_right=edges[1:], y=counts)
        entries.append((patch, label))
    if overall is not None and asked_for(ALL_LAYERS):
        entries.append(_draw_overall(ax, overall, panel="rows", vertical=True))
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.set_ylim(bottom=0.7)
    ax.set(xlim=(-1.0, 101.0), xlabel="zeros of the row (%)", ylabel="rows")
    explain_above(ax, entries, legend=legend, own=own)
    return ax


@axes_level
def plot_layer_profile(
    layers: pd.DataFrame,
    *,
    value: str = "sparsity",
    overall: float | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw a value of every layer against its block, one line a projection.

    Parameters
    ----------
    layers
        One row a layer, as `entangle.allocation.Allocation.layers`: ``block``, ``projection`` and
        the column ``value``. Layers outside the blocks are left out and counted.
    value
        ``"sparsity"`` or ``"relative_error"`` (squared output error, that of zero outputs being 1),
        drawn in %, or ``"experts"``.
    overall
        Share of zeros of all layers together, drawn as a line beside sparsities.
    legend, ax
        As in `plot_row_sparsity`.
    options
        See `entangle.plotting.options.PlotOptions`.

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
    needed = ("layer", "block", "projection", value)
    check_columns(layers, needed, name="layers", writer=_ALLOCATION)
    layers = _of_picked(layers)
    inside = layers[layers["block"].notna()]
    if inside.empty:
        raise InvalidInput(
            f"`layers` must hold at least one layer inside the blocks; got none among "
            f"{len(layers)}."
        )
    own, ax = ax is None, axes_or_new(ax, options)
    entries: list[Entry] = []
    lines = list(enumerate(inside.groupby("projection", sort=False)))
    for number, (name, part) in picked(lines, lambda line: str(line[1][0]), least=1):
        part = part.sort_values("block", kind="stable")
        block = part["block"].to_numpy(np.float64)
        numbers = part[value].to_numpy(np.float64) * (1.0 if value == "experts" else 100.0)
        name, rank = str(name), min(number, 3)  # what lies below is wider: both are seen
        color = ink(name, _LINES[number % len(_LINES)])
        (line,) = ax.plot(
            block, numbers, color=color, marker=_MARKERS[number % len(_MARKERS)], label=name,
            lw=(2.6, 1.4, 0.8, 0.6)[rank], alpha=0.5 if rank == 0 else 1.0,
            markersize=(6.0, 4.0, 2.8, 2.2)[rank], markeredgewidth=0.0,
        )  # fmt: skip
        record(
            line, panel=f"layers: {value}", series=name, x=block, y=numbers,
            layer=part["layer"].to_numpy(),
        )  # fmt: skip
        entries.append((line, name))
    if overall is not None and value == "sparsity" and asked_for(ALL_LAYERS):
        entries.append(_draw_overall(ax, overall, panel="layers: sparsity", vertical=False))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if value == "sparsity":
        _widen(ax)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=value == "experts"))
        ax.set_ylim(bottom=0.0)
    ax.set(xlabel="block", ylabel=VALUE_LABELS[value])
    left_out = len(layers) - len(inside)
    said = [f"{left_out} layer(s) outside the blocks left out"] if left_out and legend else []
    explain_above(ax, entries, said, legend=legend, own=own)
    return ax


@figure_level
def figure_allocation(
    layers: pd.DataFrame, neurons: pd.DataFrame, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw an allocation: sparsities of its rows, its layers, and their experts if it has them.

    Parameters
    ----------
    layers, neurons
        `entangle.allocation.Allocation.layers` and ``neurons``.
    options
        See `entangle.plotting.options.FigureOptions`; ``title`` tells what made the allocation, for
        example ``"protect, top 3 % by wd"``.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels; three with experts.

    Raises
    ------
    InvalidInput
        What the panels refuse, or an option out of range.
    """
    check_columns(
        layers, ("rows", "in_features", "zeros", "sparsity"), name="layers", writer=_ALLOCATION
    )
    layers = _of_picked(layers)
    neurons = _of_picked(neurons)
    weights = layers["rows"] * layers["in_features"]
    overall = float(layers["zeros"].sum() / weights.sum())
    known = [name for name in _PROFILES if name != "experts" or name in layers.columns]
    values = picked(known, _PROFILES.__getitem__, panels=True)
    with paper(options) as page:
        across = 1 if page.column == "single" else len(values)
        axes = page.grid(len(values), across=across, panel_inches=_PANEL_INCHES)
        for ax, value in zip(axes, values, strict=True):
            if value == "rows":
                plot_row_sparsity(neurons, overall=overall, legend=False, ax=ax)
            else:
                plot_layer_profile(layers, value=value, overall=overall, legend=False, ax=ax)
            add_title(ax, _PROFILES[value])
        outside = int(layers["block"].isna().sum())
        caption = (
            f"An allocation of {100 * overall:.4g} % zeros over {plural(len(layers), 'layer')}",
            *(_SAID[value] for value in values),
            f"{plural(outside, 'layer')} outside the blocks left out" if outside else "",
        )
        return page.finish(caption)


def _of_picked(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the layers that are wanted."""
    if not choosing() or "layer" not in table.columns:
        return table
    found = picked(table["layer"].unique(), str, panels=True)
    kept: pd.DataFrame = table[table["layer"].isin(found)]
    return kept


def _sparsities(table: pd.DataFrame, name: str) -> Floats:
    check_columns(table, ("sparsity",), name=name, writer=_ALLOCATION)
    values = table["sparsity"].to_numpy(np.float64, na_value=np.nan)
    wrong = values[~((values >= 0.0) & (values <= 1.0))]
    if len(wrong):
        raise InvalidInput(f"`{name}` must have sparsities in [0, 1]; got {wrong[0]:g}.")
    return values


def _draw_overall(ax: Axes, overall: float, *, panel: str, vertical: bool) -> tuple[Line2D, str]:
    draw = ax.axvline if vertical else ax.axhline
    label = f"{ALL_LAYERS}: {100.0 * overall:.4g} %"
    line = draw(
        100.0 * overall, color=ink("gaussian", None, ALL_LAYERS), lw=0.8, ls=":", zorder=1.9
    )
    line.set_label(label)
    place = {"x": 100.0 * overall, "y": np.nan} if vertical else {"x": np.nan, "y": 100.0 * overall}
    record(line, panel=panel, series=label, **place)
    return line, label


def _widen(ax: Axes) -> None:
    """Make the y axis span at least `_LEAST_SPAN`, so that rounding looks like what it is."""
    low, high = ax.get_ylim()
    missing = max(0.0, _LEAST_SPAN - (high - low))
    ax.set_ylim(low - missing / 2, high + missing / 2)
