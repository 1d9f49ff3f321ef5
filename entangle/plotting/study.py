"""What a study and a trace found: verdicts and numbers by claim and model; revisions by step."""

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, picked
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.style import (
    NOMINAL,
    add_title,
    axes_or_new,
    explain_above,
    ink,
    log_locator,
    plain_number,
)
from entangle.plotting.summaries import check_columns

_STUDY = "the command `entangle study` writes such tables."
_TRACE = "the command `entangle trace` writes such tables."
_VERDICTS = {
    "holds": ("o", "full", 2), "weaker": ("o", "bottom", 1), "fails": ("o", "none", 0),
    "not measured": ("_", "full", 3),
}  # fmt: skip
"""Marker, filling (so that they are told apart without colours) and colour of each verdict."""
_ROLES = {"main": ("o", "full", 0.12, 0), "control": ("D", "none", -0.12, 1)}
"""Marker, filling, place beside the model's line, and colour of a number by its role."""
_WIDE = 8.0
"""Ratio of largest to least number shown from which an axis of ratios is logarithmic."""
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
def plot_evidence(
    numbers: pd.DataFrame,
    *,
    claim: str,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the numbers that decide one claim, with 95 % intervals, a row a model.

    Of the claim's main comparisons and of its controls the least one each, as it is their lower
    ends that must lie above their bars (dotted): what is nearest to its bar or farthest below it.

    Parameters
    ----------
    numbers
        `Study.numbers`.
    claim
        One of its claims.
    legend, ax, options
        As in `plot_verdicts`.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, no such claim, or a claim of which no number was measured.
    """
    check_columns(numbers, ("claim", "model", "number", "role", "value", "low", "high", "bar"),
                  name="numbers", writer=_STUDY)  # fmt: skip
    choice("claim", claim, dict.fromkeys(numbers["claim"]))
    rows = numbers[(numbers["claim"] == claim) & numbers["role"].isin(list(_ROLES))]
    rows = rows[np.isfinite(rows["low"].astype(float))]
    if rows.empty:
        raise InvalidInput(f"`numbers` must hold a number that decides {claim}; got none.")
    own, ax = ax is None, axes_or_new(ax, options)
    models = list(dict.fromkeys(numbers["model"]))
    entries: list[tuple[Artist, str]] = []
    ends, positive = list[float](), True
    for role in picked([one for one in _ROLES if (rows["role"] == one).any()], _called):
        least = _least(rows[rows["role"] == role])
        marker, filled, aside, hue = _ROLES[role]
        color = ink(_called(role), str(NOMINAL[hue]))
        y = least["model"].map(models.index).to_numpy(np.float64) - aside
        x, low, high = (least[key].to_numpy(np.float64) for key in ("value", "low", "high"))
        ax.hlines(y, low, high, color=color, lw=1.0)
        (points,) = ax.plot(
            x, y, marker, fillstyle=filled, ms=4.0, mew=1.0, color=color, label=_called(role)
        )
        bars = least["bar"].to_numpy(np.float64)
        ax.vlines(bars, y - 0.2, y + 0.2, color=color, ls=":", lw=1.0)
        ends += [*low, *high, *bars]
        positive = positive and bool((bars > 0).all() and (low > 0).all())
        names = {key: least[key].to_numpy(str) for key in ("model", "number")}
        record(
            points, panel=claim, series=_called(role), x=x, y=y, low=low, high=high, bar=bars,
            **names,
        )  # fmt: skip
        entries.append((points, _called(role)))
    if ends and positive and max(ends) > _WIDE * min(ends):
        ax.set_xscale("log")
        left, right = ax.get_xlim()
        ax.xaxis.set_major_locator(log_locator(right / left))
        ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(models)), models, parse_math=False)
    ax.set_ylim(len(models) - 0.5, -0.5)
    ratios = all((rows["bar"] >= 1) | (rows["role"] != "main"))
    ax.set(xlabel="ratio" if ratios else "share, coefficient or difference", ylabel="model")
    explain_above(ax, entries, legend=legend, own=own)
    return ax


def _called(role: str) -> str:
    return {"main": "main comparison", "control": "hardest control"}[role]


def _least(rows: pd.DataFrame) -> pd.DataFrame:
    """Return for each model the row whose lower end is least beside its bar."""
    beside = np.where(rows["bar"] > 0, rows["low"] / rows["bar"].clip(lower=1e-300), rows["low"])
    ranked = rows.assign(_beside=beside).sort_values("_beside", kind="stable")
    return ranked.groupby("model", sort=False).head(1).drop(columns="_beside")


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
def figure_evidence(
    numbers: pd.DataFrame, *, claims: Sequence[str] | None = None, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw the numbers that decide each claim, with 95 % intervals, a panel a claim.

    Parameters
    ----------
    numbers
        `Study.numbers`.
    claims
        Which, in this order; None draws all of which a deciding number was measured.
    options
        See `entangle.plotting.options.FigureOptions`.

    Raises
    ------
    InvalidInput, UnknownName
        As `plot_evidence`.
    """
    check_columns(numbers, ("claim", "model", "role", "low"), name="numbers", writer=_STUDY)
    decided = numbers[
        numbers["role"].isin(list(_ROLES)) & np.isfinite(numbers["low"].astype(float))
    ]
    chosen = list(dict.fromkeys(decided["claim"])) if claims is None else list(claims)
    if not chosen:
        raise InvalidInput("`numbers` must hold a number that decides a claim; got none.")
    with paper(options) as page:
        height = 0.75 + 0.17 * numbers["model"].nunique()
        grid = page.grid(len(chosen), panel_inches=height)
        for i, (claim, ax) in enumerate(zip(chosen, grid, strict=True)):
            plot_evidence(numbers, claim=claim, legend=False, ax=ax)
            add_title(ax, claim)
            if i % page.across:
                ax.set_yticklabels([])
                ax.set_ylabel("")
        caption = (
            f"{len(chosen)} claims on {numbers['model'].nunique()} models",
            "of each claim's main comparisons and of its controls the one nearest to its bar "
            "(dotted), with 95 % intervals; a claim holds where both intervals lie above",
        )
        return page.finish(caption)


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
