"""WD along the depth of a model: every layer's distribution, and where its top neurons lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from entangle.errors import InvalidInput
from entangle.plotting.axes import WD_LABEL
from entangle.plotting.save import record, sign
from entangle.plotting.style import (
    PALETTE,
    Column,
    PaperFigure,
    add_title,
    axes_or_new,
    column_width,
    header_legend,
    paper_style,
    plain_number,
    settle_ticks,
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


def plot_wd_ridge(scores: pd.DataFrame, *, top: float = 0.03, ax: Axes | None = None) -> Axes:
    """Draw the WD distributions of layers above one another, the top neurons as red strokes.

    Parameters
    ----------
    scores
        One row a neuron: ``layer``, ``neuron``, ``wd`` and, where known, ``block``.
    top
        Share in (0, 1] of each layer's neurons, by WD, to mark.
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
    group = _one_group(scores, top)
    ax = axes_or_new(ax)
    said = _draw_ridge(ax, group)
    add_title(ax, ", ".join(filter(None, (f"n = {group.n:,} neurons", said))))
    return ax


def plot_wd_heatmap(scores: pd.DataFrame, *, top: float = 0.03, ax: Axes | None = None) -> Axes:
    """Draw the WD distributions of layers as rows of a heat map.

    Parameters
    ----------
    scores, top, ax
        As in `plot_wd_ridge`; any number of layers.

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
    group = _one_group(scores, top)
    ax = axes_or_new(ax)
    _draw_heatmap(ax, group, _norm([group]))
    add_title(ax, f"n = {group.n:,} neurons")
    return ax


def figure_wd_by_layer(
    scores: pd.DataFrame,
    *,
    top: float = 0.03,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw WD along the model's depth, ridge and heat map beside one another.

    Parameters
    ----------
    scores
        One row a neuron: ``layer``, ``neuron``, ``wd`` and, where known, ``block`` and
        ``projection``. Any number of layers.
    top
        Share in (0, 1] of each layer's neurons, by WD, to mark.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        A row of panels a projection; one row for all layers where there are more than `MOST_GROUPS`
        projections, or one projection comes twice in a block.

    Raises
    ------
    InvalidInput
        Missing columns, no finite WD, ``top`` out of range.
    """
    groups, dropped = _groups(scores, top)
    norm = _norm(groups)
    with paper_style(column=column):
        height = 0.5 + len(groups) * (1.9 if len(groups) < 4 else 1.5)
        figure: Figure = PaperFigure(figsize=(column_width(column), height), layout="constrained")
        axes = figure.subplots(len(groups), 2, squeeze=False, sharex=True)
        settle_ticks(list(axes.flat))
        for (ridge, heat), group in zip(axes, groups, strict=True):
            said = _draw_ridge(ridge, group)
            _draw_heatmap(heat, group, norm)
            heat.set_ylim(ridge.get_ylim())
            heat.set_ylabel("")
            heat.tick_params(labelleft=False)
            add_title(ridge, ", ".join(filter(None, (group.name, said))))
            add_title(heat, f"{len(group.names):,} layer{'s' * (len(group.names) > 1)}")
        for ax in axes.flat:
            ax.set_xlabel("")
        bar = figure.colorbar(ScalarMappable(norm, _COLORS), ax=list(axes.flat), aspect=40)
        bar.set_label("neurons of the layer (%)")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        figure.supxlabel(WD_LABEL, fontsize=7.0)
        clauses = [f"n = {sum(group.n for group in groups):,} neurons", *dropped]
        (strokes,) = axes[0, 0].plot([], "|", color=PALETTE["top"], ms=5.0)
        strokes.set_label(f"top {100 * top:.3g} % by WD")
        header_legend(figure, list(axes[0]), column=column, clauses=clauses)
        return sign(figure, digest)


def _one_group(scores: pd.DataFrame, top: float) -> _Group:
    rows, _ = _finite(scores, top)
    return _group("", rows, _edges(rows), top)


def _groups(scores: pd.DataFrame, top: float) -> tuple[list[_Group], list[str]]:
    """Return the layers by projection, and what is left out."""
    rows, dropped = _finite(scores, top)
    edges = _edges(rows)
    parts = [("all layers", rows)]
    if "projection" in rows.columns and rows["projection"].nunique() <= MOST_GROUPS:
        by = [(str(name), part) for name, part in rows.groupby("projection", sort=False)]
        if by and all(_by_block(_layers(part)) for _, part in by):
            parts = by
    return [_group(name, part, edges, top) for name, part in parts], dropped


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
    bins = np.clip(np.searchsorted(edges, wd, side="right") - 1, 0, _BINS - 1)
    counts = np.bincount(code * _BINS + bins, minlength=len(names) * _BINS)
    counts = counts.reshape(len(names), _BINS)
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
            tops, place, place + 0.45 * step, color=PALETTE["top"], lw=0.4, alpha=0.8,
            zorder=3.5, rasterized=len(tops) * len(places) > 2000,
        )  # fmt: skip
        record(rug, panel=layer, series="top neurons", x=tops)
    _set_axes(ax, group)
    ax.spines[:].set_zorder(4.0)  # over the ridges' white edges
    ax.set_ylim(-0.5, n - 1 + max(0.5, scale * float(group.share[places[-1]].max()) + 0.1 * step))
    return f"{len(places)} drawn" if len(places) < n else ""


def _norm(groups: Sequence[_Group]) -> LogNorm:
    shares = np.concatenate([group.share[group.share > 0.0] for group in groups])
    low, high = float(shares.min()), float(shares.max())
    return LogNorm(max(low, high / 1e4) * (1.0 if low < high else 0.5), high)


def _draw_heatmap(ax: Axes, group: _Group, norm: LogNorm) -> QuadMesh:
    n = len(group.names)
    places, rows = np.arange(n), np.arange(n + 1) - 0.5
    shown = np.ma.masked_equal(group.share, 0.0)
    mesh = ax.pcolormesh(group.edges, rows, shown, norm=norm, cmap=_COLORS, rasterized=True)
    record(
        mesh, panel=group.name or "heat map", series="share of neurons (%)",
        x=np.tile(group.edges[:-1], n), y=np.repeat(group.depth, _BINS), share=group.share.ravel(),
    )  # fmt: skip
    chunks = np.array_split(places, min(n, _MOST_MARKS))
    at = np.array([chunk.mean() for chunk in chunks])
    threshold = np.array([np.median(group.threshold[chunk]) for chunk in chunks])
    largest = np.array([group.largest[chunk].max() for chunk in chunks])
    red, panel = PALETTE["top"], group.name or "heat map"
    (line,) = ax.plot(threshold, at, color=red, lw=0.9, label="smallest WD of the top")
    record(line, panel=panel, series="threshold", x=threshold, y=at)
    (dots,) = ax.plot(largest, at, "o", color=red, ms=1.6, mew=0, label="largest WD")
    record(dots, panel=panel, series="largest", x=largest, y=at)
    _set_axes(ax, group)
    ax.set_ylim(-0.5, n - 0.5)
    return mesh


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
