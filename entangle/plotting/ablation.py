"""What changing chosen neurons costs a model, against controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from entangle.plotting.arms import (
    LOG_MEASURES,
    Arms,
    Panel,
    has_random_clusters,
    read_arms,
    split_panels,
)
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
    note_above,
    panel_grid,
    paper_style,
    shared_legend,
    wrap,
)
from entangle.plotting.summaries import Floats
from entangle.plotting.ticks import log_locator, plain_number

MAX_PANELS = 12
LOG_SPAN = 5.0
"""Largest over smallest value above which perplexity, its ratio and KL get a log scale."""

_RULES = ("top", "bottom", "matched", "random", "random-norm", "random-variance", "all", "listed")
_HOLLOW = ("bottom", "matched", "random-norm", "random-variance")
_COLUMNS = (
    "variance", "weight_norm", "mean", "md", "excess_kurtosis", "skewness", "abs_mean",
    "abs_skewness", "ks",
)  # fmt: skip
_HEX: list[str] = sns.color_palette("colorblind").as_hex()
_COLUMN_COLORS, _COLUMN_MARKERS = [_HEX[i] for i in (0, 2, 4, 1, 9, 5, 6, 8)], "sDPvX<>hp"
_RULE_COLORS = {"random": PALETTE["typical"], "all": PALETTE["gaussian"], "listed": _HEX[5]}
_RULE_MARKERS = {"all": "*", "listed": "d", "matched": "8"}
_RULE_MARKERS |= dict.fromkeys(("random", "random-norm", "random-variance"), "o")
_STEP_INCHES, _WIDEST, _MOST_TICKS = 0.08, 0.7, 8


@dataclass(frozen=True)
class _Look:
    """How one series is drawn in all panels."""

    label: str
    color: str
    marker: str
    hollow: bool
    """Whether it is a control of the column with its colour, drawn hollow."""
    style: str
    """Of its line: solid, dashed if hollow, dotted for experts of random clusters."""
    place: float
    """Of its points beside those of other series: whole steps, 0 in the middle."""


@dataclass(frozen=True)
class _Scale:
    """The y axis that panels share."""

    log: bool
    low: float
    high: float

    @classmethod
    def of(cls, arms: Arms) -> "_Scale":
        dense = [] if arms.dense is None else [arms.dense]
        centers = np.append(arms.rows["value"].to_numpy(np.float64), [d for d in dense if d > 0.0])
        ends = arms.rows[["value", "low", "high"]].to_numpy(np.float64, na_value=np.nan)
        shown: Floats = np.append(ends[np.isfinite(ends)], dense)
        log = arms.measure in LOG_MEASURES and 0.0 < LOG_SPAN * centers.min() < centers.max()
        shown = shown[shown > 0.0] if log else shown
        low, high = float(shown.min()), float(shown.max())
        if log:
            pad = (high / low) ** 0.04
            return cls(True, low / pad, high * pad)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
        return cls(False, low - pad, high + pad)


def plot_ablation(
    frame: pd.DataFrame,
    *,
    measure: str = "perplexity_ratio",
    intervention: str | None = None,
    experts: int | None = None,
    strength: float | int | None = None,
    text: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw what one intervention on several selections of neurons costs.

    Parameters
    ----------
    frame
        One row an arm and measure, as `entangle.ablation.AblationResult.frame`: ``model``,
        ``layers``, ``selection``, ``by``, ``seed``, ``intervention``, ``strength``, ``experts``,
        ``measure``, ``value`` with its 95 % interval ``low`` and ``high``, and ``n_rows``; it may
        have ``router``, of which ``random`` is drawn apart, dotted. Rows of intervention ``dense``
        are the dense model, a thin line.
    measure
        A key of `entangle.plotting.arms.MEASURE_LABELS`, or ``"accuracy:PARADIGM"``. Agreement and
        accuracy are drawn in %; perplexity, its ratio and KL on a log scale if they span more than
        `LOG_SPAN`.
    intervention, experts
        Which arms; may be left out where the table holds only one.
    strength
        Which arms; None draws all strengths along x. Where there are several numbers of experts at
        one strength, they are along x.
    text
        What was measured on, for the legend, for example ``"WikiText-2, 152 windows"``.
    legend
        Write a legend on top; otherwise only what it says in words.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure. A random selection with several seeds shows their median,
        each of them as a faint dot, and a bar from the lowest to the highest end of their
        intervals. Values that are not finite are left out, and the legend counts them.

    Raises
    ------
    InvalidInput
        Missing columns, no rows, several models, arms that cannot be told apart, no finite value,
        arms that one panel cannot hold.
    UnknownName
        A measure or intervention that the table does not hold.

    References
    ----------
    arXiv 2405.15756, figures 3 and 5a.
    """
    arms = read_arms(frame, measure)
    arms = arms.where(intervention=intervention, experts=experts, strength=strength)
    panel = Panel.of(arms)
    given, ax = ax is not None, axes_or_new(ax)
    _draw(ax, panel, _looks(arms), _Scale.of(arms))
    notes = [panel.title, *arms.notes(text)]
    if legend:
        key = legend_above(ax, _entries(ax), clauses=notes)
        if not given:
            make_room(key)
    else:
        note_above(ax, notes)
    return ax


def figure_ablation(
    frame: pd.DataFrame,
    *,
    measure: str = "perplexity_ratio",
    text: str | None = None,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw what every intervention costs: panels with one y axis and one legend.

    An intervention has one panel, with its strengths along x. Where numbers of experts vary, it has
    one panel a strength, with the numbers of experts along x.

    Parameters
    ----------
    frame, measure, text
        As in `plot_ablation`.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.signature.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        At most `MAX_PANELS` panels.

    Raises
    ------
    InvalidInput
        What `plot_ablation` refuses in a table, too many panels, or an unknown ``column``.
    """
    arms = read_arms(frame, measure)
    panels = split_panels(arms, most=MAX_PANELS)
    with paper_style(column=column):
        figure, axes = panel_grid(len(panels), column=column)
        looks, scale = _looks(arms), _Scale.of(arms)
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, panel, looks, scale)
        if len(panels) == 1:
            key = legend_above(
                axes[0], _entries(axes[0]), clauses=[panels[0].title, *arms.notes(text)]
            )
        else:
            key = _join(figure, axes, panels, column=column, notes=arms.notes(text))
        make_room(key)
        return sign(figure, digest)


def _join(
    figure: Figure,
    axes: Sequence[Axes],
    panels: Sequence[Panel],
    *,
    column: Column,
    notes: list[str],
) -> Legend:
    """Title the panels, write what they share once, and return their legend."""
    figure.supylabel(axes[0].get_ylabel())
    for ax, panel in zip(axes, panels, strict=True):
        place = ax.get_subplotspec()
        add_title(ax, panel.title.replace(" %", "\u00a0%").replace("% ", "%\u00a0"))
        ax.set(xlabel=wrap(ax, panel.xlabel, size=7.0), ylabel="")
        ax.tick_params(labelleft=place is None or place.is_first_col())
    if len({panel.xlabel for panel in panels}) == 1:
        figure.supxlabel(panels[0].xlabel)
        for ax in axes:
            ax.set_xlabel("")
    title = join_clauses(notes, inches=column_width(column))
    shared_legend(figure, axes, column=column, title=title)
    (key,) = figure.legends
    key.get_title().set_multialignment("center")
    return key


def _entries(ax: Axes) -> list[tuple[Artist, str]]:
    return list(zip(*ax.get_legend_handles_labels(), strict=True))


def _looks(arms: Arms) -> dict[str, _Look]:
    """Return how each series is drawn, in the order of the legend."""
    keys, labels = arms.series(), arms.labels()
    order = {rule: place for place, rule in enumerate(_RULES)}
    names = sorted(
        keys, key=lambda name: (order.get(keys[name][0], len(order)), keys[name][1] != "wd")
    )
    columns = list(dict.fromkeys([*_COLUMNS, *(by for _, by in keys.values())]))
    middle = (len(names) - 1) / 2.0
    return {
        name: _Look(
            label=labels[name],
            color=_color(*keys[name], columns),
            marker=_marker(*keys[name], columns),
            hollow=keys[name][0] in _HOLLOW or has_random_clusters(name),
            style=_style(keys[name][0], name),
            place=number - middle,
        )
        for number, name in enumerate(names)
    }


def _style(rule: str, name: str) -> str:
    if has_random_clusters(name):
        return ":"
    return "--" if rule in _HOLLOW else "-"


def _color(rule: str, by: str, columns: Sequence[str]) -> str:
    if by == "wd":
        return PALETTE["top"]
    if not by and rule in _RULE_COLORS:
        return _RULE_COLORS[rule]
    return _COLUMN_COLORS[columns.index(by) % len(_COLUMN_COLORS)]


def _marker(rule: str, by: str, columns: Sequence[str]) -> str:
    if rule in _RULE_MARKERS:
        return _RULE_MARKERS[rule]
    return "^" if by == "wd" else _COLUMN_MARKERS[columns.index(by) % len(_COLUMN_MARKERS)]


def _draw(ax: Axes, panel: Panel, looks: Mapping[str, _Look], scale: _Scale) -> None:
    ticks = panel.ticks()
    category = ax.bbox.width / ax.figure.dpi / len(ticks)
    step = min(_STEP_INCHES / category, _WIDEST / len(looks))
    for name, look in looks.items():
        rows = panel.arms.rows[panel.arms.rows["series"] == name]
        if len(rows):
            x = {level: number + step * look.place for number, level in enumerate(ticks)}
            _draw_series(ax, panel, rows, look, x)
            _draw_seeds(ax, panel, rows, look, {level: v + 0.5 * step for level, v in x.items()})
    _draw_dense(ax, panel, scale)
    _set_x(ax, list(ticks.values()))
    _set_y(ax, scale)
    ax.set(xlabel=panel.xlabel, ylabel=panel.arms.label)


def _draw_series(
    ax: Axes, panel: Panel, rows: pd.DataFrame, look: _Look, place: Mapping[float, float]
) -> None:
    """Draw the values, medians where there are several seeds, and their bars."""
    names = ["strength", "experts", "n_rows"]
    joined = rows.groupby(panel.x).agg(
        y=("value", "median"), y_low=("low", "min"), y_high=("high", "max"),
        seeds=("seed", "nunique"), **{name: (name, "first") for name in names},
    )  # fmt: skip
    (line,) = ax.plot(
        list(place.values()),
        joined["y"].reindex(list(place)),  # a gap where the selection was not measured
        color=look.color,
        label=look.label,
        linestyle=look.style,
        lw=0.8,
        marker=look.marker,
        markersize=3.5,
        markeredgewidth=0.8,
        markerfacecolor="white" if look.hollow else look.color,
        zorder=2.2,
    )
    joined.insert(0, "x", [place[level] for level in joined.index])
    known = joined[np.isfinite(joined[["y_low", "y_high"]].to_numpy()).all(axis=1)]
    ax.vlines(known["x"], known["y_low"], known["y_high"], color=look.color, lw=0.8, zorder=2.1)
    _record(line, panel, look.label, joined)


def _draw_seeds(
    ax: Axes, panel: Panel, rows: pd.DataFrame, look: _Look, place: Mapping[float, float]
) -> None:
    """Draw every seed as a dot, beside the median, if there are several."""
    if rows["seed"].nunique() < 2:
        return
    x = rows[panel.x].map(place)
    (dots,) = ax.plot(
        x, rows["value"], "o", color=look.color, markersize=2.0, markeredgewidth=0.0, alpha=0.5,
        zorder=2.3,
    )  # fmt: skip
    names = {"value": "y", "low": "y_low", "high": "y_high"}
    columns = ["x", *names.values(), "seed", "strength", "experts", "n_rows"]
    _record(dots, panel, f"{look.label}: each", rows.rename(columns=names).assign(x=x)[columns])


def _draw_dense(ax: Axes, panel: Panel, scale: _Scale) -> None:
    dense = panel.arms.dense
    if dense is None or (scale.log and dense <= 0.0):
        return
    line = ax.axhline(dense, color=PALETTE["gaussian"], lw=0.8, ls=":", zorder=1.9, label="dense")
    record(line, panel=panel.title, series="dense", x=np.nan, y=dense)


def _record(line: Line2D, panel: Panel, series: str, numbers: pd.DataFrame) -> None:
    columns = {str(name): numbers[name].array for name in numbers.columns}
    record(line, panel=panel.title, series=series, **columns)


def _set_x(ax: Axes, labels: Sequence[str]) -> None:
    every = -(-len(labels) // _MOST_TICKS)
    ax.set_xticks(range(0, len(labels), every), labels[::every])
    ax.set_xlim(-0.5, len(labels) - 0.5)


def _set_y(ax: Axes, scale: _Scale) -> None:
    ax.set_yscale("log" if scale.log else "linear")
    ax.set_ylim(scale.low, scale.high)
    ax.yaxis.set_minor_locator(NullLocator())
    if scale.log:
        ax.yaxis.set_major_locator(log_locator(scale.high / scale.low))
        ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        ax.ticklabel_format(axis="y", style="plain", useOffset=False)
