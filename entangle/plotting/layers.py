"""What layers have along the depth of a model: WD, and the zeros and experts of an allocation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.outputs import Entry, plural
from entangle.plotting.save import FigureOptions, paper, record
from entangle.plotting.scores import WD_LABEL
from entangle.plotting.style import (
    PALETTE,
    SPARE_COLORS,
    add_title,
    axes_or_new,
    explain_above,
    ink,
    plain_number,
)
from entangle.plotting.summaries import Floats, check_columns, check_top

MOST_RIDGES = 32
"""Largest number of layers in a ridge plot; of more, evenly spaced ones are drawn."""
MOST_GROUPS = 6
"""Largest number of projections with panels of their own; more are drawn together."""
_OVERLAP = 2.2
_BINS, _MOST_MARKS, _TICK_INCHES = 48, 120, 0.32
_COLORS = "Greys"


@dataclass(frozen=True)
class _Group:
    """Layers that are drawn in one panel, from the first to the last block."""

    name: str
    depth: Floats
    """(layers,) block, or the layer's place."""
    depth_label: str
    names: list[str]
    """(layers,) full names."""
    edges: Floats
    """(bins + 1,) in σ."""
    share: Floats
    """(layers, bins) share of the layer's neurons in %."""
    threshold: Floats
    """(layers,) smallest WD among the layer's top neurons."""
    largest: Floats
    """(layers,) largest WD."""
    tops: list[Floats]
    """(layers,) WDs of the top neurons."""
    n: int
    """Neurons."""


def plot_wd_ridge(
    scores: pd.DataFrame, *, top: float = 0.03, bins: Floats | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the WD distributions of layers above one another, the top neurons as red strokes.

    Parameters
    ----------
    scores
        One row a neuron: ``layer``, ``neuron``, ``wd`` and, where known, ``block``.
    top
        Share in (0, 1] of each layer's neurons, by WD, to mark.
    bins
        Edges of the bins in σ, ascending; chosen from the table if None.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure. Of more than `MOST_RIDGES` layers evenly spaced ones are
        drawn, the first and the last among them; the title says so.

    Raises
    ------
    InvalidInput
        Missing columns, no finite WD, ``top`` out of range.
    """
    group = _one_group(scores, top, bins)
    ax = axes_or_new(ax)
    said = _draw_ridge(ax, group)
    add_title(ax, ", ".join(filter(None, (f"n = {group.n:,} neurons", said))))
    return ax


def plot_wd_heatmap(
    scores: pd.DataFrame,
    *,
    top: float = 0.03,
    bins: Floats | None = None,
    shares: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the WD distributions of layers as rows of a heat map.

    Parameters
    ----------
    scores, top, bins, ax
        As in `plot_wd_ridge`; any number of layers.
    shares
        Shares of a layer's neurons, in %, at the ends of the colours; chosen from the table if
        None.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure: the darker, the larger the share of the layer's neurons,
        on a log scale; a line at the smallest WD of the top neurons, dots at the largest WD. More
        than 120 layers are parted into 120 runs, with the median and the maximum of each.

    Raises
    ------
    InvalidInput
        As `plot_wd_ridge`.
    """
    group = _one_group(scores, top, bins)
    ax = axes_or_new(ax)
    _draw_heatmap(ax, group, LogNorm(*(shares or _shares([group]))))
    add_title(ax, f"n = {group.n:,} neurons")
    return ax


def figure_wd_by_layer(
    scores: pd.DataFrame, *, top: float = 0.03, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw WD along the model's depth: a panel a projection, of ridges, or heat maps if too many.

    Parameters
    ----------
    scores
        One row a neuron: ``layer``, ``neuron``, ``wd`` and, where known, ``block`` and
        ``projection``. Any number of layers.
    top
        Share in (0, 1] of each layer's neurons, by WD, to mark.
    options
        See `entangle.plotting.save.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        A panel a projection; one panel for all layers where there are more than `MOST_GROUPS`
        projections, or one projection comes twice in a block. Heat maps take the place of ridges
        where a panel has more than `MOST_RIDGES` layers.

    Raises
    ------
    InvalidInput
        Missing columns, no finite WD, ``top`` out of range.
    """
    parts, edges, dropped = _parts(scores, top)
    groups = [_group(name, rows, edges, top) for name, rows in parts]
    heat = max(len(group.names) for group in groups) > MOST_RIDGES
    shares = _shares(groups)
    with paper(options) as page:
        across = 1 if page.column == "single" else min(3, len(groups))
        axes = page.grid(len(groups), across=across, panel_inches=1.6 if across == 1 else 2.3)
        for number, (ax, (name, rows)) in enumerate(zip(axes, parts, strict=True)):
            if heat:
                plot_wd_heatmap(rows, top=top, bins=edges, shares=shares, ax=ax)
            else:
                plot_wd_ridge(rows, top=top, bins=edges, ax=ax)
            add_title(ax, name)
            ax.set(xlabel="", ylabel=ax.get_ylabel() if number % across == 0 else "")
        if heat:
            scale = ScalarMappable(LogNorm(*shares), _COLORS)
            bar = page.figure.colorbar(scale, ax=axes, aspect=40)
            bar.set_label("neurons of the layer (%)")
            bar.ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
        page.figure.supxlabel(WD_LABEL)
        if not heat:
            (strokes,) = axes[0].plot([], "|", color=ink("top"), ms=5.0)
            strokes.set_label(f"top {100 * top:.3g} % by WD")
        n, layers = sum(g.n for g in groups), sum(len(g.names) for g in groups)
        caption = (
            f"WD of {n:,} neurons of {plural(layers, 'layer')} along the depth of the model; "
            + ("colours: share of a layer's neurons" if heat else "grey: a layer's distribution"),
            *dropped,
        )
        return page.finish(caption)


def _one_group(scores: pd.DataFrame, top: float, bins: Floats | None) -> _Group:
    rows, _ = _finite(scores, top)
    return _group("", rows, _edges(rows) if bins is None else bins, top)


def _parts(
    scores: pd.DataFrame, top: float
) -> tuple[list[tuple[str, pd.DataFrame]], Floats, list[str]]:
    """Return the rows by projection, common edges of bins, and what is left out."""
    rows, dropped = _finite(scores, top)
    parts = [("all layers", rows)]
    if "projection" in rows.columns and rows["projection"].nunique() <= MOST_GROUPS:
        by = [(str(name), part) for name, part in rows.groupby("projection", sort=False)]
        if by and all(_by_block(_layers(part)) for _, part in by):
            parts = by
    return parts, _edges(rows), dropped


def _finite(scores: pd.DataFrame, top: float) -> tuple[pd.DataFrame, list[str]]:
    check_top(top)
    check_columns(scores, ("layer", "neuron", "wd"), name="scores")
    wd = scores["wd"].to_numpy(np.float64, na_value=np.nan)
    kept = np.isfinite(wd) & (wd > 0.0)
    if not kept.any():
        raise InvalidInput(
            f"`scores` must hold at least one finite WD above 0; got none in {len(scores):,} rows; "
            "score other neurons with `entangle score`."
        )
    lost = int((~kept).sum())
    layers = scores["layer"].nunique() - scores.loc[kept, "layer"].nunique()
    whole = f", {layers:,} whole layers" if layers else ""
    return scores[kept], [f"{lost:,} without WD left out{whole}"] if lost else []


def _edges(rows: pd.DataFrame) -> Floats:
    low, high = float(rows["wd"].min()), float(rows["wd"].max())
    if high < 1.5 * low:
        low, high = low / 1.25, high * 1.25
    return np.geomspace(low * (1.0 - 1e-9), high * (1.0 + 1e-9), _BINS + 1)


def _layers(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a layer, in the table's order."""
    return rows.drop_duplicates("layer")


def _by_block(layers: pd.DataFrame) -> bool:
    if "block" not in layers.columns or layers["block"].isna().any():
        return False
    return bool(layers["block"].is_unique)


def _group(name: str, rows: pd.DataFrame, edges: Floats, top: float) -> _Group:
    layers = _layers(rows)
    if _by_block(layers):
        layers, label = layers.sort_values("block"), "block"
        depth = layers["block"].to_numpy(np.float64)
    else:
        depth, label = np.arange(len(layers), dtype=np.float64), "layer, in the table's order"
    names = layers["layer"].astype(str).tolist()
    code = pd.Index(names).get_indexer(pd.Index(rows["layer"].astype(str)))
    wd = rows["wd"].to_numpy(np.float64)
    bins = np.clip(np.searchsorted(edges, wd, side="right") - 1, 0, len(edges) - 2)
    width = len(edges) - 1
    counts = np.bincount(code * width + bins, minlength=len(names) * width)
    counts = counts.reshape(len(names), width)
    each = counts.sum(axis=1)
    order = np.lexsort((-wd, code))
    falling = np.split(wd[order], np.cumsum(each)[:-1])
    tops = [part[: max(1, round(top * len(part)))] for part in falling]
    return _Group(
        name=name,
        depth=depth,
        depth_label=label,
        names=names,
        edges=edges,
        share=100.0 * counts / each[:, None],
        threshold=np.array([part[-1] for part in tops]),
        largest=np.array([part[0] for part in tops]),
        tops=tops,
        n=len(wd),
    )


def _draw_ridge(ax: Axes, group: _Group) -> str:
    """Draw the ridges and say how many there are, if these are not all layers."""
    n = len(group.names)
    places = np.unique(np.linspace(0, n - 1, min(n, MOST_RIDGES)).round().astype(np.int64))
    step = n / len(places)
    scale = _OVERLAP * step / float(group.share[places].max())
    for order, place in enumerate(places[::-1]):  # the lower ones in front
        heights, layer = scale * group.share[place], group.names[place]
        bars = ax.stairs(
            place + heights, group.edges, baseline=float(place), fill=True, lw=0.4,
            facecolor="0.82", edgecolor="white", zorder=2.0 + order / n,
        )  # fmt: skip
        record(
            bars, panel=layer, series="share of neurons (%)", x=group.edges[:-1],
            y=group.share[place], x_right=group.edges[1:],
        )  # fmt: skip
        tops = group.tops[place]
        rug = ax.vlines(
            tops, place, place + 0.45 * step, color=ink("top"), lw=0.4, alpha=0.8,
            zorder=3.5, rasterized=len(tops) * len(places) > 2000,
        )  # fmt: skip
        record(rug, panel=layer, series="top neurons", x=tops)
    _set_axes(ax, group)
    ax.spines[:].set_zorder(4.0)  # over the ridges' white edges
    ax.set_ylim(-0.5, n - 1 + max(0.5, scale * float(group.share[places[-1]].max()) + 0.1 * step))
    return f"{len(places)} drawn" if len(places) < n else ""


def _shares(groups: Sequence[_Group]) -> tuple[float, float]:
    shares = np.concatenate([group.share[group.share > 0.0] for group in groups])
    low, high = float(shares.min()), float(shares.max())
    return max(low, high / 1e4) * (1.0 if low < high else 0.5), high


def _draw_heatmap(ax: Axes, group: _Group, norm: LogNorm) -> None:
    n = len(group.names)
    places, rows = np.arange(n), np.arange(n + 1) - 0.5
    shown = np.ma.masked_equal(group.share, 0.0)
    mesh = ax.pcolormesh(group.edges, rows, shown, norm=norm, cmap=_COLORS, rasterized=True)
    record(
        mesh, panel=group.name or "heat map", series="share of neurons (%)",
        x=np.tile(group.edges[:-1], n), y=np.repeat(group.depth, len(group.edges) - 1),
        share=group.share.ravel(),
    )  # fmt: skip
    chunks = np.array_split(places, min(n, _MOST_MARKS))
    at = np.array([chunk.mean() for chunk in chunks])
    threshold = np.array([np.median(group.threshold[chunk]) for chunk in chunks])
    largest = np.array([group.largest[chunk].max() for chunk in chunks])
    red, panel = ink("top"), group.name or "heat map"
    (line,) = ax.plot(threshold, at, color=red, lw=0.9, label="smallest WD of the top")
    record(line, panel=panel, series="threshold", x=threshold, y=at)
    (dots,) = ax.plot(largest, at, "o", color=red, ms=1.6, mew=0, label="largest WD")
    record(dots, panel=panel, series="largest", x=largest, y=at)
    _set_axes(ax, group)
    ax.set_ylim(-0.5, n - 0.5)


def _set_axes(ax: Axes, group: _Group) -> None:
    def depth(value: float, _position: int | None) -> str:
        place = round(value)
        inside = abs(value - place) < 1e-9 and 0 <= place < len(group.depth)
        return f"{group.depth[place]:g}" if inside else ""

    ax.set_xscale("log")
    ax.set(xlabel=WD_LABEL, ylabel=group.depth_label)
    ax.set_xlim(group.edges[0], group.edges[-1])
    ax.xaxis.set_major_locator(FixedLocator(_ticks(ax, group.edges[0], group.edges[-1])))
    ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.xaxis.set_minor_locator(NullLocator())
    last = len(group.depth) - 1
    ticks: Floats = np.asarray(MaxNLocator(6, integer=True).tick_values(0, last))
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks.tolist() if 0 <= t <= last]))
    ax.yaxis.set_major_formatter(FuncFormatter(depth))


def _ticks(ax: Axes, low: float, high: float) -> list[float]:
    """Return round numbers between two WDs, no more than the width of ``ax`` has room for."""
    figure = ax.get_figure(root=True)
    assert figure is not None  # noqa: S101 - an axes that draws belongs to a figure
    most = max(2, int(ax.bbox.width / figure.dpi / _TICK_INCHES))
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [
            float(f"{s}e{d}") for d in decades for s in steps if low <= float(f"{s}e{d}") <= high
        ]
        if len(ticks) <= most:
            break
    ticks = ticks[:: -(-len(ticks) // most)] if ticks else ticks
    return ticks if len(ticks) > 1 else list(MaxNLocator(most).tick_values(low, high)[1:-1])


VALUE_LABELS: dict[str, str] = {
    "sparsity": "zeros of the layer (%)",
    "experts": "experts of the layer",
    "relative_error": "relative error (%)",
}

_PROFILES = {"sparsity": "zeros of the layers", "experts": "experts that each layer gets"}
_ALLOCATION = "an `Allocation`, from `entangle allocate`, has such tables."
_LINES = (PALETTE["output"], PALETTE["top"], *SPARE_COLORS, PALETTE["typical"])
_MARKERS = "o^sDvPX<>"
_ROW_BINS, _PANEL_INCHES = 50, 1.9
_LEAST_SPAN = 2.0  # percentage points


def plot_row_sparsity(
    neurons: pd.DataFrame,
    *,
    overall: float | None = None,
    legend: bool = True,
    ax: Axes | None = None,
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

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure.

    Raises
    ------
    InvalidInput
        If the column is missing, or a sparsity is not in [0, 1].
    """
    values = 100.0 * _sparsities(neurons, "neurons")
    own, ax = ax is None, axes_or_new(ax)
    counts, edges = np.histogram(values, np.linspace(0.0, 100.0, _ROW_BINS + 1))
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    label = f"{len(values):,} rows: {low if low == high else f'{low} to {high}'} %"
    patch = ax.stairs(counts, edges, baseline=0.1, fill=True, color=ink("output"), label=label)
    record(patch, panel="rows", series=label, x=edges[:-1], x_right=edges[1:], y=counts)
    entries: list[Entry] = [(patch, label)]
    if overall is not None:
        entries.append(_draw_overall(ax, overall, panel="rows", vertical=True))
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.set_ylim(bottom=0.7)
    ax.set(xlim=(-1.0, 101.0), xlabel="zeros of the row (%)", ylabel="rows")
    explain_above(ax, entries, legend=legend, own=own)
    return ax


def plot_layer_profile(
    layers: pd.DataFrame,
    *,
    value: str = "sparsity",
    overall: float | None = None,
    legend: bool = True,
    ax: Axes | None = None,
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
    inside = layers[layers["block"].notna()]
    if inside.empty:
        raise InvalidInput(
            f"`layers` must hold at least one layer inside the blocks; got none among "
            f"{len(layers)}."
        )
    own, ax = ax is None, axes_or_new(ax)
    entries: list[Entry] = []
    for number, (name, part) in enumerate(inside.groupby("projection", sort=False)):
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
    if overall is not None and value == "sparsity":
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


def figure_allocation(
    layers: pd.DataFrame, neurons: pd.DataFrame, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw an allocation: sparsities of its rows, its layers, and their experts if it has them.

    Parameters
    ----------
    layers, neurons
        `entangle.allocation.Allocation.layers` and ``neurons``.
    options
        See `entangle.plotting.save.FigureOptions`; ``title`` tells what made the allocation, for
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
    weights = layers["rows"] * layers["in_features"]
    overall = float(layers["zeros"].sum() / weights.sum())
    values = ["sparsity"]
    if "experts" in layers.columns:
        values.append("experts")
    with paper(options) as page:
        across = 1 if page.column == "single" else 1 + len(values)
        axes = page.grid(1 + len(values), across=across, panel_inches=_PANEL_INCHES)
        plot_row_sparsity(neurons, overall=overall, legend=False, ax=axes[0])
        add_title(axes[0], "zeros of the rows")
        for ax, value in zip(axes[1:], values, strict=True):
            plot_layer_profile(layers, value=value, overall=overall, legend=False, ax=ax)
            add_title(ax, _PROFILES[value])
        outside = int(layers["block"].isna().sum())
        caption = (
            f"An allocation of {100 * overall:.4g} % zeros over {plural(len(layers), 'layer')}: "
            "how many rows have which share of zeros (counts on a log scale), and the zeros of "
            "every layer along the model",
            "the last panel shows how many experts the allocation gives to every layer"
            if len(values) > 1 else "",
            f"{plural(outside, 'layer')} outside the blocks left out" if outside else "",
        )  # fmt: skip
        return page.finish(caption)


def _sparsities(table: pd.DataFrame, name: str) -> Floats:
    check_columns(table, ("sparsity",), name=name, writer=_ALLOCATION)
    values = table["sparsity"].to_numpy(np.float64, na_value=np.nan)
    wrong = values[~((values >= 0.0) & (values <= 1.0))]
    if len(wrong):
        raise InvalidInput(f"`{name}` must have sparsities in [0, 1]; got {wrong[0]:g}.")
    return values


def _draw_overall(ax: Axes, overall: float, *, panel: str, vertical: bool) -> tuple[Line2D, str]:
    draw = ax.axvline if vertical else ax.axhline
    label = f"all layers: {100.0 * overall:.4g} %"
    line = draw(100.0 * overall, color=ink("gaussian"), lw=0.8, ls=":", zorder=1.9)
    line.set_label(label)
    place = {"x": 100.0 * overall, "y": np.nan} if vertical else {"x": np.nan, "y": 100.0 * overall}
    record(line, panel=panel, series=label, **place)
    return line, label


def _widen(ax: Axes) -> None:
    """Make the y axis span at least `_LEAST_SPAN`, so that rounding looks like what it is."""
    low, high = ax.get_ylim()
    missing = max(0.0, _LEAST_SPAN - (high - low))
    ax.set_ylim(low - missing / 2, high + missing / 2)
