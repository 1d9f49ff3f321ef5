"""What clustering does to every neuron's WD and mapping difficulty.

Pairs of tokens: how far apart a neuron's inputs are, and its outputs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import stats

from entangle.checks import choice, wholes
from entangle.errors import InvalidInput
from entangle.plotting.axes import OTHERS, Entry, bin_count
from entangle.plotting.save import record, sign
from entangle.plotting.style import (
    PALETTE,
    Column,
    Role,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    column_width,
    header_legend,
    join_clauses,
    legend_above,
    make_room,
    panel_grid,
    paper_style,
    share_axes,
)
from entangle.plotting.summaries import (
    DECOMPOSE,
    TWO_EXPERTS,
    Floats,
    check_columns,
    check_top,
    choose,
    usual_neurons,
)

CHANGES = {"wd": "weighted WD", "md": "weighted MD"}
_SHOWN = 0.005, 0.985
"""Quantiles of each group at the ends of the x axis; WD rises far where clusters are small."""


@dataclass(frozen=True)
class _Group:
    """The changes of some neurons, in %."""

    name: str
    color: str
    change: Floats

    def label(self) -> str:
        """Say how many fall, and the median, with 95 % intervals over neurons."""
        n, falls = len(self.change), int((self.change < 0.0).sum())
        if n == 0:
            return f"{self.name} (n = 0)"
        share = stats.binomtest(falls, n).proportion_ci(method="wilson")
        ends = f"[{100 * share.low:.3g},\u00a0{100 * share.high:.3g}]"
        text = f"falls for {100 * falls / n:.3g}\u00a0% {ends}"
        middle = float(np.median(self.change))
        found = stats.quantile_test(self.change, q=middle, p=0.5).confidence_interval()
        known = np.isfinite(found.low) and np.isfinite(found.high)  # 6 neurons or more
        interval = f" [{found.low:+.3g},\u00a0{found.high:+.3g}]" if known else ""
        median = f"median {middle:+.3g}\u00a0%{interval}"
        return f"{self.name} (n = {n:,}): {text}, {median}".replace("-", "−")


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
        Say on top which share falls and by how much in the median, with 95 % intervals (Wilson,
        and order statistics); otherwise only n.
    ax
        Where to draw; None makes a new figure.

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
    given, ax = ax is not None, axes_or_new(ax)
    entries = _draw_change(ax, groups, measure)
    if not legend:
        add_title(ax, ", ".join(f"{g.name}: n = {len(g.change):,}" for g in groups))
        return ax
    key = legend_above(ax, entries, clauses=[_setting(rows), *dropped, *_beyond(groups)])
    if not given:
        make_room(key)
    return ax


def figure_disentanglement(
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    top: float = 0.03,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw how much clustering changes WD and MD of the neurons of one layer.

    Parameters
    ----------
    neurons, layer, sparsity, top
        As in `plot_change`.
    experts
        Number of experts; None takes the largest.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

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
    across = 1 if column == "single" else len(measures)
    with paper_style(column=column):
        figure, axes = panel_grid(len(measures), column=column, across=across)
        figure.set_figheight(0.4 + 1.5 * -(-len(measures) // across))
        keys = []
        for ax, measure in zip(axes, measures, strict=True):
            groups, dropped = _groups(rows, measure, top)
            entries = _draw_change(ax, groups, measure)
            keys.append(legend_above(ax, entries, clauses=[*dropped, *_beyond(groups)]))
        for key in keys[: -(-len(measures) // across)]:
            make_room(key)
        title = join_clauses(
            [_setting(rows), "in brackets: 95 % intervals over neurons"],
            inches=column_width(column),
        )
        figure.suptitle(title, fontsize=7.0, parse_math=False)
        return sign(figure, digest)


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
    is_top = np.zeros(len(wd), dtype=np.bool_)
    is_top[np.argsort(-wd, kind="stable")[: max(1, round(top * len(wd)))]] = True
    groups = (
        _Group(OTHERS, PALETTE["typical"], change[~is_top]),
        _Group(f"top {100 * top:.3g} % by WD", PALETTE["top"], change[is_top]),
    )
    lost = int((~kept).sum())
    return groups, [f"{lost:,} without a finite change left out"] if lost else []


def _draw_change(ax: Axes, groups: Sequence[_Group], measure: str) -> list[Entry]:
    low, high = _limits(groups)
    entries: list[Entry] = []
    for group in groups:
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
        entries.append((bars, group.label()))
        if len(group.change):
            middle = float(np.median(group.change))
            line = ax.axvline(middle, color=group.color, lw=0.8, ls=":")
            record(line, panel=measure, series=f"{group.name}, median", x=middle)
    zero = ax.axvline(0.0, color=PALETTE["gaussian"], lw=0.6)
    record(zero, panel=measure, series="no change", x=0.0)
    ax.set(xlabel=f"change of {CHANGES[measure]} (%)", ylabel="% of the group per % change")
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
    entries = _draw_distances(ax, rows, role, panel=title)
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
        Of the run, for the small print; see `entangle.plotting.save.sign`.

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


def _draw_distances(ax: Axes, rows: pd.DataFrame, role: Role, *, panel: str) -> list[Entry]:
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
