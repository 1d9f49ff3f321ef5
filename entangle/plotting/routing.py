"""What a mixture's own router does to WD: experts' neurons on their own tokens and on others."""

from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, picked
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.style import NOMINAL, axes_or_new, explain_above, ink, plain_number
from entangle.plotting.summaries import check_columns

_WRITER = "`entangle score --proj experts --routing` writes such tables."
_MANY_POINTS = 5_000
_APART = 0.08  # of the distance of blocks, so that bars of projections do not hide each other


@axes_level
def plot_wd_inside(
    scores: pd.DataFrame,
    *,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw WD on an expert's own tokens against WD on as many of the whole text, a point a neuron.

    Parameters
    ----------
    scores
        One row a neuron: ``projection``, ``wd_inside``, ``wd_outside``.
    legend
        Write a legend.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure. Below the dashed line the router disentangles.

    Raises
    ------
    InvalidInput
        Missing columns, or no neuron with both WDs.
    """
    needed = ("projection", "wd_inside", "wd_outside")
    check_columns(scores, needed, name="scores", writer=_WRITER)
    known = scores[(scores["wd_inside"] > 0) & (scores["wd_outside"] > 0)]
    if known.empty:
        raise InvalidInput(
            f"`scores` must hold a neuron with WD on both kinds of tokens; got none of "
            f"{len(scores)}; {_WRITER}"
        )
    own, ax = ax is None, axes_or_new(ax, options)
    ends = known[["wd_inside", "wd_outside"]]
    span = [float(ends.min().min()), float(ends.max().max())]
    entries: list[tuple[Artist, str]] = []
    groups = list(known.groupby("projection", sort=False))
    colored = list(zip(np.resize(NOMINAL, len(groups)), groups, strict=True))
    for color, (name, part) in picked(colored, lambda one: str(one[1][0])):
        x, y = (part[key].to_numpy(np.float64) for key in ("wd_outside", "wd_inside"))
        points = ax.scatter(
            x, y, s=3.0, color=ink(str(name), str(color)), linewidths=0, label=str(name),
            alpha=0.35 if len(known) > _MANY_POINTS else 0.6,
            rasterized=len(known) > _MANY_POINTS,
        )  # fmt: skip
        record(points, panel="inside", series=str(name), x=x, y=y)
        entries.append((points, f"{name} (n = {len(part):,})"))
    if asked_for("no change"):
        color = ink("gaussian", None, "no change")
        (line,) = ax.plot(span, span, color=color, lw=0.7, ls="--", label="no change")
        record(line, panel="inside", series="no change", x=span, y=span)
        entries.append((line, "no change"))
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(plain_number))
        axis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="WD, as many tokens of the text (σ)", ylabel="WD, the expert's tokens (σ)")
    explain_above(ax, entries, legend=legend, own=own)
    return ax


@axes_level
def plot_routing_drop(
    routing: pd.DataFrame,
    *,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the relative WD drop by block, with intervals: a line a projection.

    Parameters
    ----------
    routing
        From `entangle.results.scores.NeuronScores.routing`: block, projection, drop, low, high,
        control.
    legend, ax, options
        As in `plot_wd_inside`. The control, two draws from the whole text, is drawn dotted.

    Raises
    ------
    InvalidInput
        Missing columns, or no row.
    """
    needed = ("block", "projection", "drop", "low", "high", "control")
    check_columns(routing, needed, name="routing", writer=_WRITER)
    own, ax = ax is None, axes_or_new(ax, options)
    entries: list[tuple[Artist, str]] = []
    groups = list(routing.groupby("projection", sort=False))
    colored = list(zip(np.resize(NOMINAL, len(groups)), groups, strict=True))
    steps = np.diff(np.unique(routing["block"].to_numpy(np.float64)))
    apart = _APART * (float(steps.min()) if len(steps) else 1.0)
    for place, (color, (name, part)) in picked(
        list(enumerate(colored)), lambda one: str(one[1][1][0])
    ):
        shift = apart * (place - (len(groups) - 1) / 2)
        x, y, low, high, control = (
            part[key].to_numpy(np.float64) for key in ("block", "drop", "low", "high", "control")
        )
        color = ink(str(name), str(color))
        bars = ax.errorbar(
            x + shift, y, (np.maximum(y - low, 0.0), np.maximum(high - y, 0.0)), color=color,
            fmt="o-", ms=2.2, lw=0.8, elinewidth=0.7, label=str(name),
        )  # fmt: skip
        record(bars.lines[0], panel="drop", series=str(name), x=x, y=y, low=low, high=high)
        (dots,) = ax.plot(x, control, color=color, lw=0.7, ls=":")
        record(dots, panel="drop", series=f"{name}, random routing", x=x, y=control)
        entries.append((bars.lines[0], str(name)))
    entries.append((Line2D([], [], color="0.3", lw=0.7, ls=":"), "random routing"))
    if asked_for("no change"):
        color = ink("gaussian", None, "no change")
        line = ax.axhline(1.0, color=color, lw=0.7, ls="--", label="no change")
        record(line, panel="drop", series="no change", y=1.0)
        entries.append((line, "no change"))
    ax.set(xlabel="block", ylabel="WD outside ÷ inside")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    explain_above(ax, entries, legend=legend, own=own)
    return ax


@figure_level
def figure_routing(
    scores: pd.DataFrame, routing: pd.DataFrame, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw WD inside against outside, and the relative drop by block with its control.

    Parameters
    ----------
    scores, routing
        As in `plot_wd_inside` and `plot_routing_drop`.
    options
        See `entangle.plotting.options.FigureOptions`.

    Raises
    ------
    InvalidInput
        As those.
    """
    with paper(options) as page:
        axes = page.grid(2, across=1 if page.column == "single" else 2, panel_inches=2.3)
        plot_wd_inside(scores, ax=axes[0])
        plot_routing_drop(routing, ax=axes[1])
        n = int((scores["wd_inside"] > 0).sum())
        projections = int(routing["experts"].sum())
        caption = (
            f"WD of {n:,} neurons of {projections:,} projections of experts on the tokens "
            "that the model's router sends them, and on as many of the whole text",
            "bars: 95 %, experts resampled; dotted: two draws from the whole text (random routing)",
        )
        return page.finish(caption, shared=False)
