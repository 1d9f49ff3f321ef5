"""A layer's clusters: where their tokens lie, and what becomes of WD and MD inside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, choosing, picked
from entangle.plotting.outputs import Entry
from entangle.plotting.page import axes_level, figure_level, paper, share_axes
from entangle.plotting.save import record
from entangle.plotting.scores import OTHERS, bin_count
from entangle.plotting.style import NOMINAL, add_title, axes_or_new, explain_above, ink, shade
from entangle.plotting.summaries import (
    DECOMPOSE,
    TWO_EXPERTS,
    Floats,
    check_columns,
    check_top,
    choose,
    finite_rows,
    top_mask,
)
from entangle.stats.intervals import median_interval, share_interval

MAX_PANELS = 12
_FIRST, _SECOND = "first component (input units)", "second component (input units)"
_MAPPED = ("layer", "experts", "position", "x", "y", "cluster")
_MARKERS = "os^DvP"
_MOST_HUES = 6
_LABEL_INCHES, _TICK_INCHES = 0.14, 0.45


@axes_level
def plot_router_map(
    router_map: pd.DataFrame,
    *,
    layer: str | None = None,
    experts: int | None = None,
    colors: Mapping[int, str] | None = None,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw tokens in the first two principal components, by cluster.

    Every cluster has a colour and marker, and its number at the mean of its tokens, the largest
    clusters first; a number that would cover another one is left out, and the title counts them.

    Parameters
    ----------
    router_map
        ``router_map`` of a decomposition: ``layer``, ``experts``, ``position``, ``x``, ``y``,
        ``cluster``.
    layer, experts
        Which; may be left out where the table holds only one.
    colors
        Colour by cluster; in turn if None.
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
    InvalidInput, UnknownName
        Missing columns, something that the table does not hold, no token with finite places.
    """
    rows, lost = _on_map(choose(router_map, name="router_map", layer=layer, experts=experts))
    rows = _picked_clusters(rows)
    ax = axes_or_new(ax, options)
    ax.set(xlabel=_FIRST, ylabel=_SECOND)
    _draw_tokens(ax, rows, colors or {})
    numbered = _number(ax, rows)
    add_title(ax, _map_title(rows, rows["cluster"].nunique() - numbered, lost))
    return ax


@figure_level
def figure_router_map(
    router_map: pd.DataFrame,
    *,
    layer: str | None = None,
    experts: int | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw a layer's tokens by cluster, one panel a number of experts.

    Parameters
    ----------
    router_map, layer
        As in `plot_router_map`.
    experts
        Number of experts; None takes all above 1.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with common axes.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_router_map` refuses, or too many panels.
    """
    rows, lost = _on_map(choose(router_map, name="router_map", layer=layer))
    numbers = sorted({int(k) for k in rows["experts"] if k > 1}) if experts is None else [experts]
    numbers = picked(numbers, lambda k: f"{k} experts", panels=True)
    if not numbers:
        raise InvalidInput(f"a map of the router {TWO_EXPERTS}")
    if len(numbers) > MAX_PANELS:
        raise InvalidInput(
            f"`router_map` must hold at most {MAX_PANELS} numbers of experts above 1; got "
            f"{len(numbers)}; choose one with `experts`."
        )
    parts = [choose(rows, name="router_map", experts=k) for k in numbers]
    colors = _hues(parts)
    parts = [_picked_clusters(part) for part in parts]
    rows = pd.concat(parts)
    with paper(options) as page:
        across = min(len(numbers), 2 if page.column == "single" else 4)
        axes = page.grid(
            len(numbers), across=across, panel_inches=0.1 + 0.85 * page.inches / across
        )
        for ax, part in zip(axes, parts, strict=True):
            ax.set(xlabel=_FIRST, ylabel=_SECOND)
            ax.update_datalim(rows[["x", "y"]].to_numpy(np.float64))
            ax.autoscale_view()
            most = max(2, int(page.inches / across / _TICK_INCHES))
            ax.xaxis.set_major_locator(MaxNLocator(most))
            add_title(ax, _map_title(part, 0, lost))
        share_axes(page.figure, axes, across=across)
        page.figure.draw_without_rendering()  # the size of the panels decides which numbers fit
        for ax, part, own in zip(axes, parts, colors, strict=True):
            labels = ax.get_xlabel(), ax.get_ylabel(), ax.get_xlim(), ax.get_ylim()
            ax.set_autoscale_on(False)
            plot_router_map(part, colors=own, ax=ax)
            ax.set(xlabel=labels[0], ylabel=labels[1], xlim=labels[2], ylim=labels[3])
        caption = (
            f"Tokens of {rows['layer'].iloc[0]} in the first two principal components of its "
            "inputs, by the cluster that the router puts them into; numbers: clusters, at the mean "
            "of their tokens",
            "one hue through all panels: shades of one hue are clusters that hold most of their "
            "tokens in common" if len(parts) > 1 else "",
        )  # fmt: skip
        return page.finish(caption, title=str(rows["layer"].iloc[0]), shared=False)


def _hues(parts: Sequence[pd.DataFrame]) -> list[dict[int, str]]:
    """Return a colour for every cluster of every panel, one hue for tokens of one kind.

    The kinds are the clusters of the finest panel with at most `_MOST_HUES` of them, or else of the
    coarsest: a cluster has the hue of the kind that most of its tokens are of.
    """
    sizes = [part["cluster"].nunique() for part in parts]
    few = [size for size in sizes if size <= _MOST_HUES]
    kinds = parts[sizes.index(max(few) if few else min(sizes))].set_index("position")["cluster"]
    kinds = kinds[~kinds.index.duplicated()]
    colors = []
    for part in parts:
        kind = part["position"].map(kinds).fillna(part["cluster"]).astype(np.int64)
        crossed = pd.crosstab(part["cluster"], kind)
        own = crossed.idxmax(axis=1)
        place, many = own.groupby(own).cumcount(), own.groupby(own).transform("size")
        colors.append(
            {
                int(cluster): shade(NOMINAL[int(hue) % len(NOMINAL)], 1.0 - 0.65 * share)
                for cluster, hue, share in zip(own.index, own, place / many, strict=True)
            }
        )
    return colors


def _on_map(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    check_columns(rows, _MAPPED, name="router_map", writer=DECOMPOSE)
    return finite_rows(rows, ("x", "y"), name="router_map", what="token with finite x and y")


def _picked_clusters(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the tokens of the clusters that are wanted, a cluster after the other."""
    if not choosing():
        return rows
    found = picked(sorted(rows["cluster"].unique()), lambda one: f"cluster {one}", least=1)
    place = {cluster: number for number, cluster in enumerate(found)}
    kept: pd.DataFrame = rows[rows["cluster"].isin(found)]
    return kept.iloc[kept["cluster"].map(place).argsort(kind="stable")]


def _map_title(rows: pd.DataFrame, hidden: int, lost: int) -> str:
    k, clusters = int(rows["experts"].iloc[0]), rows["cluster"].nunique()
    said = [f"{k} experts, n\u00a0=\u00a0{len(rows):,}\u00a0tokens"]
    said += [f"{clusters - hidden} of {clusters} numbered"] if hidden else []
    said += [f"{lost:,} left out: not finite"] if lost else []
    return "\n".join(said)


def _draw_tokens(ax: Axes, rows: pd.DataFrame, colors: Mapping[int, str]) -> None:
    panel = f"{int(rows['experts'].iloc[0])} experts"
    for cluster, part in rows.groupby("cluster", sort=not choosing()):
        number = int(str(cluster))
        name = f"cluster {number}"
        usual = colors.get(number, NOMINAL[number % len(NOMINAL)])
        x, y = part["x"].to_numpy(np.float64), part["y"].to_numpy(np.float64)
        dots = ax.scatter(
            x, y, s=3.0, color=ink(name, usual), alpha=0.6, linewidths=0,
            marker=_MARKERS[number // len(NOMINAL) % len(_MARKERS)], rasterized=len(rows) > 1000,
        )  # fmt: skip
        record(dots, panel=panel, series=name, x=x, y=y, position=part["position"].to_numpy())


def _number(ax: Axes, rows: pd.DataFrame) -> int:
    """Write numbers on the clusters, the largest first, where none is near; return how many."""
    by_size = rows.groupby("cluster")[["x", "y"]].agg(["mean", "size"])
    centers = by_size.sort_values(("x", "size"), ascending=False, kind="stable")
    figure = ax.get_figure(root=True)
    assert figure is not None  # noqa: S101 - an axes that draws belongs to a figure
    placed: list[Floats] = []
    for cluster, row in centers.iterrows():
        x, y = float(row["x", "mean"]), float(row["y", "mean"])
        place = ax.transData.transform((x, y)) / figure.dpi
        if any(np.hypot(*(place - other)) < _LABEL_INCHES for other in placed):
            continue
        placed.append(place)
        text = ax.text(x, y, str(cluster), ha="center", va="center", fontsize=6.0, zorder=3)
        text.set_path_effects([patheffects.withStroke(linewidth=1.8, foreground="white")])
    return len(placed)


CHANGES = {"wd": "weighted WD", "md": "weighted MD"}
_SHOWN = 0.005, 0.985
"""Quantiles of each group at the ends of the x axis; WD rises far where clusters are small."""


@dataclass(frozen=True)
class _Group:
    """The changes of some neurons, in %."""

    name: str
    role: str
    change: Floats

    @property
    def color(self) -> str:
        """As asked for, or that of its meaning."""
        return ink(self.role, None, self.name)

    @property
    def n(self) -> int:
        """Number of neurons."""
        return len(self.change)

    @property
    def label(self) -> str:
        """Name the group and its size."""
        return f"{self.name} (n = {len(self.change):,})"

    @property
    def median(self) -> str:
        """The median, with its sign."""
        return f"{float(np.median(self.change)):+.3g}\u00a0%".replace("-", "−")

    def said(self) -> str:
        """Say how many fall, and the median, with 95 % intervals over neurons."""
        n, falls = len(self.change), int((self.change < 0.0).sum())
        if n == 0:
            return self.label
        share = share_interval(falls, n)
        ends = f"[{100 * share.low:.3g},\u00a0{100 * share.high:.3g}]"
        text = f"falls for {100 * falls / n:.3g}\u00a0% {ends}"
        found = median_interval(self.change)
        known = np.isfinite(found.low)  # 6 neurons or more
        interval = f" [{found.low:+.3g},\u00a0{found.high:+.3g}]" if known else ""
        median = f"median {found.value:+.3g}\u00a0%{interval}"
        return f"{self.label}: {text}, {median}".replace("-", "−")


@axes_level
def plot_change(
    neurons: pd.DataFrame,
    *,
    measure: str = "wd",
    layer: str | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    top: float = 0.03,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw how much clustering changes WD or MD of the neurons of one layer.

    The change of a neuron is its weighted WD (or MD) inside the clusters over the same measure of
    all tokens, less 1, in %.

    Parameters
    ----------
    neurons
        ``neurons`` of a decomposition: ``layer``, ``neuron``, ``experts``, ``sparsity``, ``wd`` and
        the measure with its ``weighted_`` column.
    measure
        ``"wd"`` or ``"md"``.
    layer, experts, sparsity
        Which; may be left out where the table holds only one.
    top
        Share in (0, 1] of the neurons, by WD, to draw apart.
    legend
        Write a legend on top, and in words which share falls and by how much in the median, with
        95 % intervals (Wilson, and order statistics); otherwise only n.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure: densities of each group's neurons along the change.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, something that the table does not hold, no finite change.

    Notes
    -----
    WD of few tokens is larger than that of many, so clusters with few tokens hide part of a fall.

    References
    ----------
    arXiv 2405.15756, figure 5 b, c.
    """
    rows = choose(neurons, name="neurons", layer=layer, experts=experts, sparsity=sparsity)
    groups, dropped = _groups(rows, measure, top)
    own, ax = ax is None, axes_or_new(ax, options)
    entries = _draw_change(ax, groups, measure)
    if not legend:
        add_title(ax, ", ".join(f"{g.name}: n = {len(g.change):,}" for g in groups))
        return ax
    said = [_setting(rows), *(group.said() for group in groups), *dropped, *_beyond(groups)]
    explain_above(ax, entries, said, legend=True, own=own)
    return ax


@figure_level
def figure_disentanglement(
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    top: float = 0.03,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw how much clustering changes WD and MD of the neurons of one layer.

    Parameters
    ----------
    neurons, layer, sparsity, top
        As in `plot_change`.
    experts
        Number of experts; None takes the largest.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        A panel of WD and one of MD, without it where the table has none.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_change` refuses.

    References
    ----------
    arXiv 2405.15756, figure 5 b, c.
    """
    rows = choose(neurons, name="neurons", layer=layer, sparsity=sparsity)
    check_columns(rows, ("experts",), name="neurons", writer=DECOMPOSE)
    k = int(rows["experts"].max()) if experts is None else experts
    rows = choose(rows, name="neurons", experts=k)
    if k == 1:
        raise InvalidInput(f"the change inside clusters {TWO_EXPERTS}")
    measures = [name for name in CHANGES if name == "wd" or f"weighted_{name}" in rows.columns]
    measures = picked(measures, lambda name: (name, CHANGES[name]), panels=True)
    with paper(options) as page:
        across = 1 if page.column == "single" else len(measures)
        axes = page.grid(len(measures), across=across, panel_inches=1.6)
        said: list[str] = []
        for ax, measure in zip(axes, measures, strict=True):
            plot_change(rows, measure=measure, top=top, legend=False, ax=ax)
            groups, dropped = _groups(rows, measure, top)
            names = ("others", "top")
            medians = [f"{g.median} ({n})" for g, n in zip(groups, names, strict=True) if g.n]
            add_title(ax, f"median {', '.join(medians[::-1])}")
            parts = (*(group.said() for group in groups), *dropped, *_beyond(groups))
            said.append(f"{CHANGES[measure]}: {'; '.join(parts)}")
        caption = (
            _setting(rows),
            "change of every neuron's measure inside the clusters against that of all tokens; "
            "dotted: medians; in brackets: 95 % intervals over neurons",
            *said,
        )
        return page.finish(caption, title=str(rows["layer"].iloc[0]))


def _setting(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    text = f"{first['layer']}: {int(first['experts'])} clusters against one"
    if "smallest_cluster" in rows.columns:
        text += f", the smallest of {int(first['smallest_cluster']):,}\u00a0tokens"
    return text


def _groups(
    rows: pd.DataFrame, measure: str, top: float
) -> tuple[tuple[_Group, _Group], list[str]]:
    """Return the top neurons by WD and the others, and what is left out."""
    measure = choice("measure", measure, CHANGES)
    check_top(top)
    before, after = measure, f"weighted_{measure}"
    check_columns(rows, ("neuron", "wd", before, after), name="neurons", writer=DECOMPOSE)
    wd, old, new = (
        rows[name].to_numpy(np.float64, na_value=np.nan) for name in ("wd", before, after)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        change = 100.0 * (new / old - 1.0)
    kept = np.isfinite(change) & np.isfinite(wd)
    if not kept.any():
        raise InvalidInput(
            f"`neurons` must hold at least one neuron with finite {before} and {after}; got "
            f"{len(rows)} without; {DECOMPOSE}"
        )
    change, wd = change[kept], wd[kept]
    is_top = top_mask(wd, top)
    groups = (
        _Group(OTHERS, "typical", change[~is_top]),
        _Group(f"top {100 * top:.3g} % by WD", "top", change[is_top]),
    )
    lost = int((~kept).sum())
    return groups, [f"{lost:,} without a finite change left out"] if lost else []


def _draw_change(ax: Axes, groups: Sequence[_Group], measure: str) -> list[Entry]:
    low, high = _limits(groups)
    entries: list[Entry] = []
    for group in picked(groups, lambda group: (group.name, group.role)):
        n, is_top = max(1, len(group.change)), group is groups[-1]
        edges = np.linspace(low, high, bin_count(len(group.change)) + 1)
        counts = np.histogram(np.clip(group.change, low, high), edges)[0]
        density = 100.0 * counts / n / (edges[1] - edges[0])
        bars = ax.stairs(
            density, edges, fill=not is_top, color=group.color, label=group.name,
            lw=1.1 if is_top else 0.0, alpha=1.0 if is_top else 0.6,
        )  # fmt: skip
        record(
            bars, panel=measure, series=group.name, x=edges[:-1], y=density, x_right=edges[1:],
            count=counts,
        )  # fmt: skip
        entries.append((bars, group.label))
        if len(group.change):
            middle = float(np.median(group.change))
            line = ax.axvline(middle, color=group.color, lw=0.8, ls=":")
            record(line, panel=measure, series=f"{group.name}, median", x=middle)
    if asked_for("no change"):
        zero = ax.axvline(0.0, color=ink("gaussian", None, "no change"), lw=0.6)
        record(zero, panel=measure, series="no change", x=0.0)
    ax.set(xlabel=f"change of {CHANGES[measure]} (%)", ylabel="share (% of the group per %)")
    pad = 0.02 * (high - low)
    ax.set_xlim(min(low, 0.0) - pad, max(high, 0.0) + pad)
    return entries


def _limits(groups: Sequence[_Group]) -> tuple[float, float]:
    """Return the ends of the bins; changes beyond them are counted in the outermost bins."""
    known = [group.change for group in groups if len(group.change)]
    ends = [np.quantile(change, _SHOWN, method="nearest") for change in known]
    low, high = min(float(a) for a, _ in ends), max(float(b) for _, b in ends)
    return (low - 1.0, high + 1.0) if low == high else (low, high)


def _beyond(groups: Sequence[_Group]) -> list[str]:
    low, high = _limits(groups)
    n = sum(int(((g.change < low) | (g.change > high)).sum()) for g in groups)
    return [f"{n:,} beyond the axis are in its end bins"] if n else []
