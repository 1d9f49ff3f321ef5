"""Two runs of scores beside one another: values, changes and their errors, agreement of ranks."""

from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, picked
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.style import NOMINAL, axes_or_new, explain_above, ink
from entangle.plotting.summaries import bell_curve, check_columns

_WRITER = "the command `entangle diff` writes such tables."
_MANY_POINTS = 5_000
_MOVES = (("no", "did not move", "typical"), ("untested", "not tested", "typical"),
          ("down", "moved down", "output"), ("up", "moved up", "top"))  # fmt: skip
_MEASURES = {"spearman": "Spearman's ρ", "kendall": "Kendall's τ"}
_BINS = np.arange(-6.0, 6.01, 0.25)
_FEW_LAYERS, _LAYERS = 12, "layers"


@axes_level
def plot_two_runs(
    frame: pd.DataFrame,
    *,
    names: tuple[str, str] = ("A", "B"),
    by: str = "wd",
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the values of run B against those of run A, a point a neuron.

    Parameters
    ----------
    frame
        `Difference.frame`: layer, neuron, a, b, moved.
    names
        Of the runs.
    by
        What is compared; ``wd`` is in σ.
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
        Missing columns, or no neuron with two finite values.
    """
    check_columns(frame, ("layer", "neuron", "a", "b", "moved"), name="frame", writer=_WRITER)
    kept = frame[np.isfinite(frame["a"]) & np.isfinite(frame["b"])]
    if kept.empty:
        raise InvalidInput(
            f"`frame` must hold a neuron with a value in both runs; got none of {len(frame)}; "
            "score other layers."
        )
    own, ax = ax is None, axes_or_new(ax, options)
    ends = [float(kept[["a", "b"]].min().min()), float(kept[["a", "b"]].max().max())]
    entries: list[tuple[Artist, str]] = []
    if asked_for("no change"):
        color = ink("gaussian", None, "no change")
        (line,) = ax.plot(ends, ends, color=color, lw=0.7, ls="--", label="no change")
        record(line, panel="values", series="no change", x=ends, y=ends)
        entries.append((line, "no change"))
    there = [move for move in _MOVES if (kept["moved"] == move[0]).any()]
    for moved, name, role in picked(there, lambda move: move[1]):
        rows = kept[kept["moved"] == moved]
        x, y = (rows[side].to_numpy(np.float64) for side in "ab")
        points = ax.scatter(
            x, y, s=3.0 if role == "typical" else 6.0, color=ink(role, None, name), linewidths=0,
            alpha=0.35 if len(rows) > _MANY_POINTS else 0.6, label=name,
            rasterized=len(rows) > _MANY_POINTS,
        )  # fmt: skip
        place = {"layer": rows["layer"].to_numpy(str), "neuron": rows["neuron"].to_numpy()}
        record(points, panel="values", series=name, x=x, y=y, **place)
        entries.append((points, f"{name} (n = {len(rows):,})"))
    unit = "WD (σ)" if by == "wd" else by
    ax.set(xlabel=f"{unit}, {names[0]}", ylabel=f"{unit}, {names[1]}")
    explain_above(ax, entries, legend=legend, own=own)
    return ax


@axes_level
def plot_rank_agreement(
    agreement: pd.DataFrame,
    *,
    measure: str = "spearman",
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw how far two runs agree in every layer, with intervals: a line a projection.

    Parameters
    ----------
    agreement
        `Difference.agreement`; its row of all layers is left out.
    measure
        ``spearman``, ``kendall``, or an overlap of top sets such as ``top_3``, which chance would
        make its share (a dotted line).
    legend, ax, options
        As in `plot_two_runs`. Of ``spearman`` the ceiling that noise leaves is drawn dashed.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, no such measure, or no layer that has it.
    """
    check_columns(agreement, ("layer", "block", "projection"), name="agreement", writer=_WRITER)
    known = [name for name in agreement.columns if f"{name}_low" in agreement.columns]
    measure = choice("measure", measure, known)
    rows = agreement[(agreement["layer"] != "") & np.isfinite(agreement[measure])]
    if rows.empty:
        raise InvalidInput(
            f"`agreement` must hold {measure} of at least one layer; got none: a ranking needs 3 "
            "neurons of different scores."
        )
    own, ax = ax is None, axes_or_new(ax, options)
    by_block = bool(rows["block"].notna().all()) and rows["block"].nunique() > 1
    rows = rows.assign(place=rows["block"] if by_block else np.arange(len(rows)))
    groups = list(rows.groupby("projection", sort=False)) if by_block else [(_LAYERS, rows)]
    entries: list[tuple[Artist, str]] = []
    ceilings: list[tuple[Artist, str]] = []
    colored = list(zip(np.resize(NOMINAL, len(groups)), groups, strict=True))
    for color, (name, part) in picked(colored, lambda one: str(one[1][0])):
        x, y, low, high = (
            part[key].to_numpy(np.float64)
            for key in ("place", measure, f"{measure}_low", f"{measure}_high")
        )
        color = ink(str(name), str(color))
        bars = ax.errorbar(
            x, y, (np.maximum(y - low, 0.0), np.maximum(high - y, 0.0)), color=color,
            fmt="o-" if by_block else "o", ms=2.2, lw=0.8, elinewidth=0.7, label=str(name),
        )  # fmt: skip
        record(bars.lines[0], panel=measure, series=str(name), x=x, y=y, low=low, high=high)
        if by_block:
            entries.append((bars.lines[0], str(name)))
        if measure == "spearman" and "ceiling" in part:
            ceilings += _draw_ceiling(ax, x, part["ceiling"].to_numpy(np.float64), str(name), color)
    entries += ceilings[:1]
    if measure.startswith("top_") and asked_for("by chance"):
        chance = float(measure.removeprefix("top_")) / 100
        color = ink("gaussian", None, "by chance")
        line = ax.axhline(chance, color=color, lw=0.7, ls=":", label="by chance")
        record(line, panel=measure, series="by chance", y=chance)
        entries.append((line, "by chance"))
    _label_layers(ax, rows, by_block=by_block)
    share = f"overlap of the top {measure.removeprefix('top_')} %"
    ax.set_ylabel(_MEASURES.get(measure, share))
    ax.set_ylim(top=1.02)
    explain_above(ax, entries, legend=legend and bool(entries), own=own)
    return ax


def _draw_ceiling(
    ax: Axes, x: np.ndarray, ceiling: np.ndarray, name: str, color: str
) -> list[tuple[Artist, str]]:
    """Draw what noise leaves as a line, or as a stroke a layer; return its entry of the legend."""
    if not np.isfinite(ceiling).any():
        return []
    alone = {"ls": "none", "marker": "_", "ms": 9.0} if name == _LAYERS else {"ls": "--"}
    (line,) = ax.plot(x, ceiling, color=color, lw=0.7, **alone)
    record(line, panel="spearman", series=f"{name}, what noise leaves", x=x, y=ceiling)
    return [(line, "what noise leaves")]


def _label_layers(ax: Axes, rows: pd.DataFrame, *, by_block: bool) -> None:
    if by_block:
        ax.set_xlabel("block")
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        return
    ax.set_xlim(-0.5, len(rows) - 0.5)
    if len(rows) <= _FEW_LAYERS:
        labels = [
            projection if pd.isna(block) else f"{block}.{projection}"
            for block, projection in zip(rows["block"], rows["projection"], strict=True)
        ]
        turned = len(rows) > 2
        ax.set_xticks(
            range(len(rows)), labels, parse_math=False, rotation=20 if turned else 0,
            ha="right" if turned else "center",
        )  # fmt: skip
    else:
        ax.set_xlabel("layer")


@axes_level
def plot_change_errors(
    frame: pd.DataFrame,
    *,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw changes in units of their standard errors, beside a standard normal distribution.

    Where nothing moved, and no error is taken off, the two are alike: broader is change, narrower
    are errors that cancel, as those of runs on one text.

    Parameters
    ----------
    frame
        `Difference.frame`: change, change_se.
    legend, ax, options
        As in `plot_two_runs`.

    Raises
    ------
    InvalidInput
        Missing columns, or no change with a standard error above 0.
    """
    check_columns(frame, ("change", "change_se"), name="frame", writer=_WRITER)
    change, error = (frame[key].to_numpy(np.float64) for key in ("change", "change_se"))
    known = np.isfinite(change) & (error > 0.0)
    if not known.any():
        raise InvalidInput(
            f"`frame` must hold a change with a standard error above 0; got none of {len(frame)}: "
            "only WD has standard errors, of two groups of sequences or more."
        )
    units = np.clip(change[known] / error[known], _BINS[0], _BINS[-1])
    own, ax = ax is None, axes_or_new(ax, options)
    heights = np.histogram(units, _BINS)[0] / len(units) / np.diff(_BINS)
    entries: list[tuple[Artist, str]] = []
    if asked_for("neurons"):
        color = ink("typical", None, "neurons")
        bars = ax.stairs(heights, _BINS, fill=True, lw=0, color=color, label="neurons")
        record(bars, panel="errors", series="neurons", x=_BINS[:-1], y=heights, x_right=_BINS[1:])
        entries.append((bars, f"neurons (n = {len(units):,})"))
    if asked_for("if none moved"):
        x = np.linspace(-4.0, 4.0, 201)
        color = ink("gaussian", None, "if none moved")
        (curve,) = ax.plot(x, bell_curve(x), color=color, lw=0.9, label="if none moved")
        record(curve, panel="errors", series="if none moved", x=x, y=bell_curve(x))
        entries.append((curve, "if none moved: N(0, 1)"))
    ax.set(xlabel="change ÷ its standard error (ends: and beyond)", ylabel="density")
    explain_above(ax, entries, legend=legend, own=own)
    return ax


@figure_level
def figure_difference(
    frame: pd.DataFrame,
    agreement: pd.DataFrame,
    *,
    names: tuple[str, str] = ("A", "B"),
    by: str = "wd",
    top: str = "top_3",
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw two runs of scores: values, changes and their errors, agreement and overlap by layer.

    Parameters
    ----------
    frame, agreement
        Tables of a `Difference`.
    names
        Of the runs.
    by
        What is compared.
    top
        Which overlap of top sets is drawn, a column of ``agreement``.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Up to four panels; those of what the tables do not hold (errors, ranks) are left out.

    Raises
    ------
    InvalidInput, UnknownName
        As `plot_two_runs` and `plot_rank_agreement`.
    """
    check_columns(agreement, ("layer", "spearman", top), name="agreement", writer=_WRITER)
    layers = agreement[agreement["layer"] != ""]
    ranked = bool(np.isfinite(layers["spearman"]).any())
    errors = bool((frame["change_se"] > 0.0).any())
    with paper(options) as page:
        axes = iter(page.grid(1 + errors + 2 * ranked, across=2, panel_inches=2.3))
        plot_two_runs(frame, names=names, by=by, ax=next(axes))
        if errors:
            plot_change_errors(frame, ax=next(axes))
        for measure in ("spearman", top) if ranked else ():
            plot_rank_agreement(agreement, measure=measure, ax=next(axes))
        n = int((np.isfinite(frame["a"]) & np.isfinite(frame["b"])).sum())
        moved = int(frame["moved"].isin(["up", "down"]).sum())
        caption = (
            f"{n:,} neurons in two runs, {names[0]} and {names[1]}; "
            f"{moved:,} moved beyond their error",
            "changes in units of their standard error; where nothing moved they are standard "
            "normal, where errors cancel they are narrower"
            if errors
            else None,
            "rank correlation and overlap of the top sets by layer, with bootstrap intervals; "
            "dashed: what noise alone would leave, dotted: chance"
            if ranked
            else None,
        )
        return page.finish(caption, shared=False)
