"""What a study and a trace found: verdicts by claim and model; WD, overlaps and damage by step."""

from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, picked
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.style import NOMINAL, axes_or_new, explain_above, ink
from entangle.plotting.summaries import check_columns

_STUDY = "the command `entangle study` writes such tables."
_TRACE = "the command `entangle trace` writes such tables."
_VERDICTS = {
    "holds": ("o", "full", 2), "weaker": ("o", "bottom", 1), "fails": ("o", "none", 0),
    "not measured": ("_", "full", 3),
}  # fmt: skip
"""Marker, filling (so that they are told apart without colours) and colour of each verdict."""
TRACED = {
    "wd": ("WD (σ)", {"wd_largest": "largest", "wd_top": "edge of the top rows",
                      "wd_median": "median"}),
    "md": ("mapping difficulty (ratio)", {"md_median": "median MD"}),
    "overlap": ("share of the last top rows", {"overlap": "top rows in common",
                                               "chance": "by chance"}),
    "damage": ("perplexity (× dense)", {"damage": "top rows pruned",
                                        "damage_random": "random rows pruned"}),
    "ratio": ("perplexity ratio", {"ratio": "top / random rows pruned"}),
}  # fmt: skip
"""What `plot_trace` draws: the label of its axis, and its columns with what they are called."""


@axes_level
def plot_verdicts(
    frame: pd.DataFrame,
    *,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw which claims hold on which models: a row a claim, a column a model.

    Parameters
    ----------
    frame
        `Study.frame`: claim, model, verdict.
    legend
        Write a legend.
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
        Missing columns, or no row.
    """
    check_columns(frame, ("claim", "model", "verdict"), name="frame", writer=_STUDY)
    claims, models = (list(dict.fromkeys(frame[key])) for key in ("claim", "model"))
    own, ax = ax is None, axes_or_new(ax, options)
    entries: list[tuple[Artist, str]] = []
    there = [name for name in _VERDICTS if (frame["verdict"] == name).any()]
    for name in picked(there, lambda one: one):
        rows = frame[frame["verdict"] == name]
        x = rows["model"].map(models.index).to_numpy(np.float64)
        y = rows["claim"].map(claims.index).to_numpy(np.float64)
        marker, filled, hue = _VERDICTS[name]
        color = ink(name, str(NOMINAL[hue]))
        (points,) = ax.plot(
            x, y, marker, fillstyle=filled, ms=6.0, color=color, mew=1.0, label=name,
        )  # fmt: skip
        record(points, panel="verdicts", series=name, x=x, y=y, claim=rows["claim"].to_numpy(str))
        entries.append((points, f"{name} (n = {len(rows)})"))
    turned = len(models) > 2
    ax.set_xticks(range(len(models)), models, parse_math=False, rotation=20 if turned else 0,
                  ha="right" if turned else "center")  # fmt: skip
    ax.set_yticks(range(len(claims)), claims, parse_math=False)
    ax.set_xlim(-0.5, len(models) - 0.5)
    ax.set_ylim(len(claims) - 0.5, -0.5)
    ax.set(xlabel="model", ylabel="claim")
    explain_above(ax, entries, legend=legend, own=own)
    return ax


@axes_level
def plot_trace(
    frame: pd.DataFrame,
    *,
    measure: str = "wd",
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw one measure of a model's revisions against their steps.

    Parameters
    ----------
    frame
        `Trace.frame`.
    measure
        ``wd``, ``md``, ``overlap`` (with the last revision's top rows), ``damage`` (of pruned rows)
        or ``ratio`` (top against random rows, with its interval).
    legend, ax, options
        As in `plot_verdicts`.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, no such measure, or no revision that has it.
    """
    label, lines = TRACED[choice("measure", measure, TRACED)]
    check_columns(frame, ("step", "place", *lines), name="frame", writer=_TRACE)
    if not np.isfinite(frame[list(lines)].to_numpy(np.float64)).any():
        raise InvalidInput(f"`frame` must hold {measure} of a revision; got none of {len(frame)}.")
    own, ax = ax is None, axes_or_new(ax, options)
    by_step = bool(frame["step"].notna().all()) and frame["step"].is_unique
    x = frame["step" if by_step else "place"].to_numpy(np.float64)
    entries: list[tuple[Artist, str]] = []
    colored = [(str(color), *one) for color, one in zip(NOMINAL, lines.items(), strict=False)]
    for usual, column, name in picked(colored, lambda one: one[2]):
        y, color = frame[column].to_numpy(np.float64), ink(name, usual)
        low, high = (
            np.asarray(frame.get(f"{column}_{end}", y), np.float64) for end in ("low", "high")
        )
        ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        (line,) = ax.plot(x, y, "o-", color=color, ms=2.5, lw=0.9, label=name)
        record(line, panel=measure, series=name, x=x, y=y, low=low, high=high)
        entries.append((line, name))
    if by_step and len(x) > 2 and x.max() > 20 * max(x[x > 0].min(), 1.0):
        ax.set_xscale("symlog", linthresh=float(x[x > 0].min()))
    if measure in ("damage", "ratio") and np.nanmax(frame[list(lines)].to_numpy()) > 10:
        ax.set_yscale("log")
    ax.set(xlabel="step" if by_step else "revision", ylabel=label)
    explain_above(ax, entries, legend=legend, own=own)
    return ax


@figure_level
def figure_verdicts(frame: pd.DataFrame, **options: Unpack[FigureOptions]) -> Figure:
    """Draw which claims hold on which models.

    Parameters
    ----------
    frame
        `Study.frame`.
    options
        See `entangle.plotting.options.FigureOptions`.

    Raises
    ------
    InvalidInput
        As `plot_verdicts`.
    """
    check_columns(frame, ("claim", "model", "verdict"), name="frame", writer=_STUDY)
    with paper(options) as page:
        height = 0.8 + 0.22 * frame["claim"].nunique()
        plot_verdicts(frame, ax=page.grid(1, panel_inches=height)[0])
        caption = (
            f"{frame['claim'].nunique()} claims on {frame['model'].nunique()} models",
            "holds: against every control; weaker: against the main comparison alone",
        )
        return page.finish(caption, shared=False)


@figure_level
def figure_trace(frame: pd.DataFrame, **options: Unpack[FigureOptions]) -> Figure:
    """Draw WD, overlaps of top rows and damage of a model's revisions, by step.

    Parameters
    ----------
    frame
        `Trace.frame`.
    options
        See `entangle.plotting.options.FigureOptions`.

    Raises
    ------
    InvalidInput
        As `plot_trace`.
    """
    check_columns(frame, ("step", "place", "revision"), name="frame", writer=_TRACE)
    with paper(options) as page:
        for measure, ax in zip(("wd", "overlap", "damage", "ratio"),
                               page.grid(4, across=2, panel_inches=1.9), strict=True):  # fmt: skip
            plot_trace(frame, measure=measure, ax=ax)
        caption = (
            f"{len(frame)} revisions, {frame['revision'].iloc[0]} to {frame['revision'].iloc[-1]}",
            "WD over layers; overlap with the last revision's top rows; perplexity with top and "
            "random rows pruned, and their ratio with 95 % intervals over windows",
        )
        return page.finish(caption, shared=False)
