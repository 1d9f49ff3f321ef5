"""What changing chosen neurons costs a model, against controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from entangle.plotting.arms import (
    LOG_MEASURES,
    RANDOM_CLUSTERS,
    Arms,
    Panel,
    read_arms,
    split_panels,
)
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, picked
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.style import (
    COLORBLIND,
    PALETTE,
    add_title,
    axes_or_new,
    called,
    explain_above,
    ink,
    log_locator,
    plain_number,
    wrap,
)
from entangle.plotting.summaries import Floats

MAX_PANELS = 12
LOG_SPAN = 5.0
"""Largest over smallest value above which perplexity, its ratio and KL get a log scale."""

_RULES = ("top", "bottom", "matched", "random", "random-norm", "random-variance", "all", "listed")
_HOLLOW = ("bottom", "matched", "random-norm", "random-variance")
_MOMENTS = ("mean", "md", "excess_kurtosis", "skewness", "abs_mean", "abs_skewness", "ks")
_COLUMNS = ("variance", "weight_norm", *_MOMENTS)
_COLUMN_COLORS = (*(COLORBLIND[i] for i in (0, 2, 4, 1, 9, 5)), "#332288", "#882255")
_COLUMN_MARKERS = "sDPvX<>hp"
_RULE_COLORS = {"random": PALETTE["typical"], "all": PALETTE["gaussian"], "listed": COLORBLIND[5]}
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


_Scale = tuple[bool, float, float]
"""Of the y axis that panels share: whether it is logarithmic, its lower and its upper end."""


def _scale(arms: Arms) -> _Scale:
    dense = [] if arms.dense is None else [arms.dense]
    centers = np.append(arms.rows["value"].to_numpy(np.float64), [d for d in dense if d > 0.0])
    ends = arms.rows[["value", "low", "high"]].to_numpy(np.float64, na_value=np.nan)
    shown: Floats = np.append(ends[np.isfinite(ends)], dense)
    log = arms.measure in LOG_MEASURES and bool(0.0 < LOG_SPAN * centers.min() < centers.max())
    shown = shown[shown > 0.0] if log else shown
    low, high = float(shown.min()), float(shown.max())
    if log:
        pad = (high / low) ** 0.04
        return True, low / pad, high * pad
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return False, low - pad, high + pad


@axes_level
def plot_ablation(
    frame: pd.DataFrame,
    *,
    measure: str = "perplexity_ratio",
    intervention: str | None = None,
    experts: int | None = None,
    strength: float | int | None = None,
    text: str | None = None,
    legend: bool = True,
    notes: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw what one intervention on several selections of neurons costs.

    Parameters
    ----------
    frame
        One row an arm and measure, as `entangle.results.ablation.AblationResult.frame`: ``model``,
        ``layers``, ``selection``, ``by``, ``seed``, ``intervention``, ``strength``, ``experts``,
        ``measure``, ``value`` with its 95 % interval ``low`` and ``high``, and ``n_rows``; it may
        have ``router``, of which ``random`` is drawn apart, dotted. Rows of intervention ``dense``
        are the dense model, a thin line.
    measure
        A key of `entangle.plotting.arms.MEASURE_LABELS`, or ``"accuracy:PARADIGM"``. Agreement
        and accuracy are drawn in %; perplexity, its ratio and KL on a log scale if they span more
        than `LOG_SPAN`.
    intervention, experts
        Which arms; may be left out where the table holds only one.
    strength
        Which arms; None draws all strengths along x. Where there are several numbers of experts at
        one strength, they are along x.
    text
        What was measured on, for the legend, for example ``"WikiText-2, 152 windows"``.
    legend
        Write a legend on top.
    notes
        Say on top, in words, what was measured and how.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure. Colours, places and the y axis are those of all arms of
        the measure, so that panels of one table can be compared. A random selection with several
        seeds shows their median, each of them as a faint dot, and a bar from the lowest to the
        highest end of their intervals. Values that are not finite are left out and counted.

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
    looks, scale = _looks(arms), _scale(arms)
    arms = arms.where(intervention=intervention, experts=experts, strength=strength)
    panel = Panel.of(arms)
    own, ax = ax is None, axes_or_new(ax, options)
    _draw(ax, panel, looks, scale)
    said, title = (arms.notes(text), panel.title) if notes else ([], "")
    entries = list(zip(*ax.get_legend_handles_labels(), strict=True))
    explain_above(ax, entries, said, title=title, legend=legend, own=own)
    return ax


@figure_level
def figure_ablation(
    frame: pd.DataFrame,
    *,
    measure: str = "perplexity_ratio",
    text: str | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw what every intervention costs: panels with one y axis and one legend.

    An intervention has one panel, with its strengths along x. Where numbers of experts vary, it has
    one panel a strength, with the numbers of experts along x.

    Parameters
    ----------
    frame, measure, text
        As in `plot_ablation`.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        At most `MAX_PANELS` panels.

    Raises
    ------
    InvalidInput
        What `plot_ablation` refuses in a table, too many panels, or an option out of range.
    """
    arms = read_arms(frame, measure)
    panels = split_panels(arms, most=MAX_PANELS)
    with paper(options) as page:
        axes = page.grid(len(panels))
        for ax, panel in zip(axes, panels, strict=True):
            strength = panel.arms.levels("strength")[0] if panel.x == "experts" else None
            plot_ablation(
                frame, measure=measure, intervention=panel.intervention, strength=strength,
                legend=False, notes=False, ax=ax,
            )  # fmt: skip
            add_title(ax, panel.title.replace(" %", "\u00a0%").replace("% ", "%\u00a0"))
            ax.set_xlabel(wrap(ax, panel.xlabel, size=7.0))
        if len(panels) > 1:
            page.figure.supylabel(axes[0].get_ylabel())
            one_x = len({panel.xlabel for panel in panels}) == 1
            if one_x:
                page.figure.supxlabel(panels[0].xlabel)
            for number, ax in enumerate(axes):
                ax.set(xlabel="" if one_x else ax.get_xlabel(), ylabel="")
                ax.tick_params(labelleft=number % page.across == 0)
        caption = (f"What changing chosen neurons costs: {arms.label}", *arms.notes(text))
        return page.finish(caption, title=called(str(arms.rows["model"].iloc[0])))


def _looks(arms: Arms) -> dict[str, _Look]:
    """Return how each series is drawn, in the order of the legend."""
    keys, labels = arms.series(), arms.labels()
    order = {rule: place for place, rule in enumerate(_RULES)}
    names = sorted(
        keys, key=lambda name: (order.get(keys[name][0], len(order)), keys[name][1] != "wd")
    )
    names = picked(names, lambda name: (name, keys[name][0]))
    columns = list(dict.fromkeys([*_COLUMNS, *(by for _, by in keys.values())]))
    middle = (len(names) - 1) / 2.0
    looks = {}
    for number, name in enumerate(names):
        rule, by = keys[name]
        color, marker = _color_and_marker(rule, by, columns, name)
        mixed, hollow = name.endswith(RANDOM_CLUSTERS), rule in _HOLLOW
        style = ":" if mixed else "--" if hollow else "-"
        looks[name] = _Look(labels[name], color, marker, hollow or mixed, style, number - middle)
    return looks


def _color_and_marker(rule: str, by: str, columns: Sequence[str], name: str) -> tuple[str, str]:
    if by == "wd":
        return ink("top", None, name), _RULE_MARKERS.get(rule, "^")
    if not by and rule in _RULE_COLORS:
        return ink(rule, _RULE_COLORS[rule], name), _RULE_MARKERS.get(rule, "o")
    place = columns.index(by)
    color = ink(by, _COLUMN_COLORS[place % len(_COLUMN_COLORS)], name)
    return color, _RULE_MARKERS.get(rule, _COLUMN_MARKERS[place % len(_COLUMN_MARKERS)])


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
    dense = panel.arms.dense
    if dense is not None and not (scale[0] and dense <= 0.0) and asked_for("dense"):
        line = ax.axhline(
            dense, color=ink("gaussian", None, "dense"), lw=0.8, ls=":", zorder=1.9, label="dense"
        )
        record(line, panel=panel.title, series="dense", x=np.nan, y=dense)
    _set_x(ax, list(ticks.values()))
    _set_y(ax, *scale)
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
        list(place.values()), joined["y"].reindex(list(place)),  # a gap where nothing was measured
        color=look.color, label=look.label, linestyle=look.style, lw=0.8, marker=look.marker,
        markersize=3.5, markeredgewidth=0.8, zorder=2.2,
        markerfacecolor="white" if look.hollow else look.color,
    )  # fmt: skip
    joined.insert(0, "x", [place[level] for level in joined.index])
    known = joined[np.isfinite(joined[["y_low", "y_high"]].to_numpy()).all(axis=1)]
    ax.vlines(known["x"], known["y_low"], known["y_high"], color=look.color, lw=0.8, zorder=2.1)
    columns = {str(name): joined[name].array for name in joined.columns}
    record(line, panel=panel.title, series=look.label, **columns)


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
    numbers = {"y": "value", "y_low": "low", "y_high": "high"}
    numbers |= {name: name for name in ("seed", "strength", "experts", "n_rows")}
    columns = {name: rows[source].array for name, source in numbers.items()}
    record(dots, panel=panel.title, series=f"{look.label}: each", x=x.array, **columns)


def _set_x(ax: Axes, labels: Sequence[str]) -> None:
    every = -(-len(labels) // _MOST_TICKS)
    ax.set_xticks(range(0, len(labels), every), labels[::every])
    ax.set_xlim(-0.5, len(labels) - 0.5)
    for number in range(1, len(labels), 2) if every == 1 else ():  # points in it are of its tick
        ax.axvspan(number - 0.5, number + 0.5, color="0.95", lw=0, zorder=0.5)


def _set_y(ax: Axes, log: bool, low: float, high: float) -> None:
    ax.set(yscale="log" if log else "linear", ylim=(low, high))
    ax.yaxis.set_minor_locator(NullLocator())
    if log:
        ax.yaxis.set_major_locator(log_locator(high / low))
        ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        ax.ticklabel_format(axis="y", style="plain", useOffset=False)
