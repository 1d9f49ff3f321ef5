"""WD along the depth of a model: ridges and heat maps of layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, choosing, picked
from entangle.plotting.outputs import layer_names, plural
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.scores import WD_LABEL
from entangle.plotting.style import (
    add_title,
    axes_or_new,
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
_COLORS, _GREY = "Greys", "0.82"


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


@axes_level
def plot_wd_ridge(
    scores: pd.DataFrame,
    *,
    top: float = 0.03,
    bins: Floats | None = None,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
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
    options
        See `entangle.plotting.options.PlotOptions`.

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
    ax = axes_or_new(ax, options)
    said = _draw_ridge(ax, group)
    add_title(ax, ", ".join(filter(None, (f"n = {group.n:,} neurons", said))))
    return ax


@axes_level
def plot_wd_heatmap(
    scores: pd.DataFrame,
    *,
    top: float = 0.03,
    bins: Floats | None = None,
    shares: tuple[float, float] | None = None,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the WD distributions of layers as rows of a heat map.

    Parameters
    ----------
    scores, top, bins, ax
        As in `plot_wd_ridge`; any number of layers.
    shares
        Shares of a layer's neurons, in %, at the ends of the colours; chosen from the table if
        None.
    options
        See `entangle.plotting.options.PlotOptions`.

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
    ax = axes_or_new(ax, options)
    _draw_heatmap(ax, group, LogNorm(*(shares or _shares([group]))))
    add_title(ax, f"n = {group.n:,} neurons")
    return ax


@figure_level
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
        See `entangle.plotting.options.FigureOptions`.

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
        by = picked(by, lambda part: part[0], panels=True)
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
    rows = _picked_layers(scores[kept])
    return rows, [f"{lost:,} without WD left out{whole}"] if lost else []


def _picked_layers(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the projections and layers that are wanted."""
    if not choosing():
        return rows
    if "projection" in rows.columns:
        found = picked(rows["projection"].unique(), str, panels=True)
        rows = rows[rows["projection"].isin(found)]
    layers = _layers(rows)
    kept = picked(range(len(layers)), lambda i: layer_names(layers.iloc[i]), least=1)
    chosen: pd.DataFrame = rows[rows["layer"].isin(layers["layer"].iloc[kept])]
    return chosen


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
    by_block = _by_block(layers)
    layers = layers.sort_values("block") if by_block else layers
    depth = layers["block"] if by_block else pd.Series(range(len(layers)))
    label = "block" if by_block else "layer, in the table's order"
    place = picked(range(len(layers)), lambda i: layer_names(layers.iloc[i]))
    depths: Floats = np.asarray(depth, dtype=np.float64)[place]
    layers = layers.iloc[place]
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
        depth=depths,
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
            facecolor=ink("layer", _GREY, layer), edgecolor="white", zorder=2.0 + order / n,
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
