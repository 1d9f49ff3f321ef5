"""WD and mapping difficulty of the neurons of a layer: panels, and figures of several of them.

Axes-level ``plot_*`` functions draw one panel from frames and return its axes: ``ax=None`` makes a
new figure (reach it as ``ax.figure``); none touches pyplot's current figure, changes matplotlib's
settings or writes into the frames it is given. Figure-level ``figure_*`` functions call them, draw
in `paper_style` and take `FigureOptions`; `drawn` gives the numbers in a figure, `save_figure`
writes both.
"""

from collections.abc import Sequence
from typing import TypeVar, Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, picked
from entangle.plotting.outputs import (
    Entry,
    check_panels,
    explain,
    layer_label,
    layer_names,
    plural,
)
from entangle.plotting.page import axes_level, figure_level, paper, share_axes
from entangle.plotting.save import record
from entangle.plotting.style import Skyline, add_title, axes_or_new, ink, text_handle
from entangle.plotting.summaries import Floats, TopSplit, check_columns, check_top, split_top
from entangle.stats.intervals import spearman_interval

Extra = TypeVar("Extra")

WD_LABEL = "Wasserstein distance to N(0, 1) (σ)"
MD_LABEL = "mapping difficulty (ratio)"
OTHERS = "other neurons"
FLOOR = "Gaussian floor"
_MANY_POINTS = 5_000


@axes_level
def plot_wd_distribution(
    scores: pd.DataFrame,
    *,
    floor: tuple[float, float] | None = None,
    top: float = 0.03,
    bins: int | Floats | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the distribution of WD over the neurons of one layer.

    Parameters
    ----------
    scores
        One row a neuron of one layer, with ``layer``, ``neuron``, ``wd`` and, for the reasons of
        missing scores, ``flag``.
    floor
        Mean WD of truly Gaussian outputs at this number of tokens and its upper quantile
        (``null_floor`` and ``null_floor_high``), in σ: a line and a band.
    top
        Share in (0, 1] of the neurons to mark as the top.
    bins
        Number of bins or their edges in σ; chosen from the number of neurons if None.
    legend
        Write a legend; otherwise only the numbers, for panels that share one legend.
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
        Missing columns, several layers, fewer than two finite WDs, ``top``, ``floor`` or ``bins``
        out of range.
    """
    split = split_top(scores, top=top)
    _check_floor(floor)
    wd = split.values("wd")
    edges = wd_edges(wd, bins)
    ax = axes_or_new(ax, options)
    entries, skyline = _draw_wd_bars(ax, split, edges)
    if asked_for(split.top_name, "top"):
        _draw_rug(ax, split)
    if floor is not None and asked_for(FLOOR, "floor"):
        entries.append(_draw_floor(ax, floor, panel=split.layer))
    right = 1.02 * float(edges[-1])
    ax.set(xlabel=WD_LABEL, ylabel="neurons per bin", xlim=(0.0, right))
    add_title(ax, split.layer)
    notes = [f"n = {len(wd):,}", f"{split.is_top.sum():,} with WD ≥ {split.threshold:.3f} σ"]
    notes += [f"floor {floor[0]:.4f} σ"] if floor else []
    explain(ax, entries, notes, split.dropped, legend=legend, side="right", skyline=skyline)
    return ax


def _check_floor(floor: tuple[float, float] | None) -> None:
    if floor is not None and not 0.0 <= floor[0] <= floor[1] < np.inf:
        raise InvalidInput(
            f"`floor` must be (mean, upper quantile) with 0 ≤ mean ≤ upper quantile; got {floor}."
        )


def wd_edges(wd: Floats, bins: int | Floats | None = None) -> Floats:
    """Return the edges of the bins for finite WDs, in σ; see `plot_wd_distribution`."""
    bins = bin_count(len(wd)) if bins is None else bins
    edges = np.histogram_bin_edges(wd, bins).astype(np.float64)
    if wd.min() < edges[0] or wd.max() > edges[-1]:
        raise InvalidInput(
            f"`bins` must cover every WD, {wd.min():.4g} to {wd.max():.4g}; got edges from "
            f"{edges[0]:.4g} to {edges[-1]:.4g}."
        )
    return edges


def bin_count(n: int) -> int:
    """Return how many bins show the WD distribution of ``n`` neurons."""
    return int(np.clip(1.5 * np.sqrt(n), 10, 80))


def _draw_wd_bars(ax: Axes, split: TopSplit, edges: Floats) -> tuple[list[Entry], Skyline]:
    entries: list[Entry] = []
    wd, base = split.values("wd"), np.zeros(len(edges) - 1)
    for mask, role, name, bound in _groups(split, ("", f", WD ≥ {split.threshold:.3f} σ")):
        color = ink(role, None, name)
        counts = np.histogram(wd[mask], edges)[0]
        bars = ax.stairs(base + counts, edges, baseline=base, fill=True, lw=0, color=color)
        bars.set_label(name)
        record(bars, panel=split.layer, series=name, x=edges[:-1], y=counts, x_right=edges[1:])
        entries.append((bars, f"{name} (n = {mask.sum():,}{bound})"))
        base = base + counts
    return entries, (np.concatenate([edges[:-1], edges[1:]]), np.tile(base, 2))


def _groups(
    split: TopSplit, extra: tuple[Extra, Extra]
) -> list[tuple[NDArray[np.bool_], str, str, Extra]]:
    """Return mask, meaning and name of the others and of the top, with something of each."""
    groups = [
        (~split.is_top, "typical", OTHERS, extra[0]),
        (split.is_top, "top", split.top_name, extra[1]),
    ]
    return picked(groups, lambda group: (group[2], group[1]))


def _draw_rug(ax: Axes, split: TopSplit) -> None:
    wd = split.values("wd")[split.is_top]
    height, color = np.full(len(wd), 0.02), ink("top", None, split.top_name)
    place = ax.get_xaxis_transform()
    (rug,) = ax.plot(wd, height, "|", transform=place, color=color, ms=4.0, mew=0.6)
    neurons = split.neurons()[split.is_top]
    record(rug, panel=split.layer, series=f"{split.top_name}, each", x=wd, neuron=neurons)


def _draw_floor(ax: Axes, floor: tuple[float, float], *, panel: str) -> Entry:
    mean, high = floor
    color = ink("floor", None, FLOOR)
    band = ax.axvspan(mean, high, color=color, alpha=0.3, lw=0)
    record(band, panel=panel, series="Gaussian floor, mean to 97.5 %", x=mean, x_right=high)
    line = ax.axvline(mean, color=color, label=f"{FLOOR} (mean to 97.5 %)")
    record(line, panel=panel, series="Gaussian floor, mean", x=mean)
    return line, f"{FLOOR} ({mean:.4f} σ; 97.5 %: {high:.4f} σ)"


@axes_level
def plot_wd_against_md(
    scores: pd.DataFrame,
    *,
    top: float = 0.03,
    seed: int = 0,
    n_boot: int = 1000,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw WD against mapping difficulty, with Spearman's coefficient and its interval.

    Parameters
    ----------
    scores
        One row a neuron of one layer, with ``layer``, ``neuron``, ``wd``, ``md`` and, for the
        reasons of missing scores, ``flag``.
    top
        Share in (0, 1] of the neurons, by WD, to mark as the top.
    seed, n_boot
        Seed and number of the bootstrap's resamples of neurons; the interval holds 95 %.
    legend
        Write a legend; otherwise only the numbers, for panels that share one legend.
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
        Missing columns, several layers, fewer than three neurons with finite WD and MD, WD or MD
        the same for all, ``top`` or ``n_boot`` out of range.
    """
    split = split_top(scores, top=top, values=("wd", "md"))
    md, wd = split.values("md"), split.values("wd")
    found = spearman_interval(md, wd, n_boot=n_boot, seed=seed)
    ax = axes_or_new(ax, options)
    entries = _draw_points(ax, split, md, wd)
    ax.set(xlabel=MD_LABEL, ylabel=WD_LABEL)
    add_title(ax, split.layer)
    rho = f"ρ = {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-", "−")
    entries.append((text_handle(), f"Spearman {rho}\n{bootstrap_text(n_boot=n_boot, seed=seed)}"))
    notes = [rho, f"n = {len(wd):,}"]
    # Panels that share a legend may get wider x limits later: keep their notes above all points.
    skyline = (md if legend else np.full_like(md, md.min()), wd)
    explain(ax, entries, notes, split.dropped, legend=legend, side="left", skyline=skyline)
    return ax


def bootstrap_text(*, n_boot: int, seed: int) -> str:
    """Say how the interval of a rank correlation came about."""
    return f"95 % bootstrap, {n_boot:,} resamples, seed {seed}"


def _draw_points(ax: Axes, split: TopSplit, x: Floats, y: Floats) -> list[Entry]:
    entries: list[Entry] = []
    neurons = split.neurons()
    for mask, role, name, size in _groups(split, (4.0, 9.0)):
        points = ax.scatter(
            x[mask], y[mask], s=size, color=ink(role, None, name), alpha=0.6, linewidths=0,
            label=name, rasterized=len(x) > _MANY_POINTS,
        )  # fmt: skip
        record(points, panel=split.layer, series=name, x=x[mask], y=y[mask], neuron=neurons[mask])
        entries.append((points, f"{name} (n = {mask.sum():,})"))
    return entries


_MOST_UNEQUAL = 4.0


@figure_level
def figure_wd_distribution(
    scores: pd.DataFrame,
    layers: pd.DataFrame,
    *,
    top: float = 0.03,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw the WD distribution of every layer in ``scores``, one panel a layer.

    Parameters
    ----------
    scores
        One row a neuron: ``layer``, ``neuron``, ``wd`` and, where known, ``block``, ``projection``
        and ``flag``. Filter it to choose layers.
    layers
        One row a layer: ``layer``, ``null_floor``, ``null_floor_high`` (σ).
    top
        Share in (0, 1] of each layer's neurons to mark as the top.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with common bins and axes. A single layer gets the full legend.

    Raises
    ------
    InvalidInput
        Missing columns or layers, too many layers, a layer without two finite WDs, ``top`` out of
        range.
    """
    check_top(top)
    check_columns(layers, ("layer", "null_floor", "null_floor_high"), name="layers")
    panels = _by_layer(scores, needed=("layer", "neuron", "wd"))
    floors = [_floor_of(layers, str(rows["layer"].iloc[0])) for rows in panels]
    wd = np.concatenate([split_top(rows, top=top).values("wd") for rows in panels])
    edges = wd_edges(wd, bin_count(len(wd) // len(panels)))
    alone = len(panels) == 1
    with paper(options) as page:
        axes = page.grid(len(panels))
        for ax, rows, floor in zip(axes, panels, floors, strict=True):
            plot_wd_distribution(rows, floor=floor, top=top, bins=edges, legend=alone, ax=ax)
            add_title(ax, layer_label(rows.iloc[0]))
        share_axes(page.figure, axes, across=page.across)
        caption = (
            f"Distribution of the Wasserstein distance (WD) to a Gaussian over {len(wd):,} neurons "
            f"in {plural(len(panels), 'layer')}; the top {100 * top:.3g} % by WD of each layer in "
            "colour and as strokes",
            "the Gaussian floor is what truly Gaussian outputs would score at this number of "
            "tokens: their mean (line), up to the 97.5 % quantile (band)",
        )
        return page.finish(caption, shared=not alone)


@figure_level
def figure_wd_against_md(
    scores: pd.DataFrame,
    *,
    top: float = 0.03,
    seed: int = 0,
    n_boot: int = 1000,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw WD against mapping difficulty for every layer in ``scores``, one panel a layer.

    Parameters
    ----------
    scores
        One row a neuron: ``layer``, ``neuron``, ``wd``, ``md`` and, where known, ``block``,
        ``projection`` and ``flag``. Filter it to choose layers.
    top
        Share in (0, 1] of each layer's neurons, by WD, to mark as the top.
    seed, n_boot
        Of the bootstrap interval of Spearman's coefficient.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with common axes; with x axes of their own where MD differs widely between layers. A
        single layer gets the full legend.

    Raises
    ------
    InvalidInput
        Too many layers, or what `plot_wd_against_md` refuses.
    """
    check_top(top)
    panels = _by_layer(scores, needed=("layer", "neuron", "wd", "md"))
    alone = len(panels) == 1
    with paper(options) as page:
        axes = page.grid(len(panels))
        for ax, rows in zip(axes, panels, strict=True):
            plot_wd_against_md(rows, top=top, seed=seed, n_boot=n_boot, legend=alone, ax=ax)
            add_title(ax, layer_label(rows.iloc[0]))
        share_axes(page.figure, axes, across=page.across, most_unequal=_MOST_UNEQUAL)
        caption = (
            "Wasserstein distance (WD) to a Gaussian against mapping difficulty, a point a neuron",
            "ρ: Spearman's rank correlation, in brackets: "
            + bootstrap_text(n_boot=n_boot, seed=seed),
        )
        return page.finish(caption, shared=not alone)


def _by_layer(scores: pd.DataFrame, *, needed: Sequence[str]) -> list[pd.DataFrame]:
    check_columns(scores, needed, name="scores")
    panels = [rows for _, rows in scores.groupby("layer", sort=False, observed=True)]
    panels = picked(panels, lambda rows: layer_names(rows.iloc[0]), panels=True)
    check_panels(len(panels), name="scores", kind="layer")
    return panels


def _floor_of(layers: pd.DataFrame, name: str) -> tuple[float, float]:
    rows = layers.loc[layers["layer"] == name, ["null_floor", "null_floor_high"]]
    if len(rows) != 1:
        raise InvalidInput(
            f"`layers` must have one row for every layer in `scores`; got {len(rows)} for "
            f"{name!r}; use both tables of one run of `entangle score`."
        )
    mean, high = rows.to_numpy(dtype=np.float64)[0]
    return float(mean), float(high)
