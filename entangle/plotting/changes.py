"""What clustering does to every neuron's WD and mapping difficulty."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.axes import OTHERS, Entry, bin_count
from entangle.plotting.choices import DECOMPOSE, TWO_EXPERTS, choose
from entangle.plotting.save import record
from entangle.plotting.signature import sign
from entangle.plotting.style import (
    PALETTE,
    Column,
    add_title,
    axes_or_new,
    column_width,
    join_clauses,
    legend_above,
    make_room,
    panel_grid,
    paper_style,
)
from entangle.plotting.summaries import Floats, check_columns, check_top

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
    entries = _draw(ax, groups, measure)
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
        Of the run, for the small print; see `entangle.plotting.signature.sign`.

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
            entries = _draw(ax, groups, measure)
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


def _draw(ax: Axes, groups: Sequence[_Group], measure: str) -> list[Entry]:
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
