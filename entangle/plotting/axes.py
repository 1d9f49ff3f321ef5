"""Axes-level plots: each draws one panel from frames and returns its axes.

``ax=None`` makes a new figure (reach it as ``ax.figure``); no function touches pyplot's current
figure, changes matplotlib's settings or writes into the frames it is given.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import StepPatch
from scipy import stats

from entangle.errors import InvalidInput
from entangle.plotting.save import record
from entangle.plotting.style import (
    PALETTE,
    Role,
    Side,
    Skyline,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    text_handle,
)
from entangle.plotting.summaries import Floats, OutputDensity, TopSplit, output_density, split_top
from entangle.stats.intervals import spearman_interval

Entry = tuple[Artist, str]

WD_LABEL = "Wasserstein distance to N(0, 1) (σ)"
MD_LABEL = "mapping difficulty (ratio)"
OTHERS = "other neurons"
SE_TEXT = "±: standard error"
_MANY_POINTS = 5_000


def plot_wd_distribution(
    scores: pd.DataFrame,
    *,
    floor: tuple[float, float] | None = None,
    top: float = 0.03,
    bins: int | Floats | None = None,
    legend: bool = True,
    ax: Axes | None = None,
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
    ax = axes_or_new(ax)
    entries, skyline = _draw_wd_bars(ax, split, edges)
    _draw_rug(ax, split)
    if floor is not None:
        entries.append(_draw_floor(ax, floor, panel=split.layer))
    right = 1.02 * float(edges[-1])
    ax.set(xlabel=WD_LABEL, ylabel="neurons per bin", xlim=(0.0, right))
    add_title(ax, split.layer)
    notes = [f"n = {len(wd):,}", f"{split.is_top.sum():,} with WD ≥ {split.threshold:.3f} σ"]
    notes += [f"floor {floor[0]:.4f} σ"] if floor else []
    _explain(ax, entries, notes, split.dropped, legend=legend, side="right", skyline=skyline)
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
    for mask, color, name, bound in (
        (~split.is_top, PALETTE["typical"], OTHERS, ""),
        (split.is_top, PALETTE["top"], split.top_name, f", WD ≥ {split.threshold:.3f} σ"),
    ):
        counts = np.histogram(wd[mask], edges)[0]
        bars = ax.stairs(base + counts, edges, baseline=base, fill=True, lw=0, color=color)
        bars.set_label(name)
        record(bars, panel=split.layer, series=name, x=edges[:-1], y=counts, x_right=edges[1:])
        entries.append((bars, f"{name} (n = {mask.sum():,}{bound})"))
        base = base + counts
    return entries, (np.concatenate([edges[:-1], edges[1:]]), np.tile(base, 2))


def _draw_rug(ax: Axes, split: TopSplit) -> None:
    wd = split.values("wd")[split.is_top]
    height = np.full(len(wd), 0.02)
    place = ax.get_xaxis_transform()
    (rug,) = ax.plot(wd, height, "|", transform=place, color=PALETTE["top"], ms=4.0, mew=0.6)
    neurons = split.neurons()[split.is_top]
    record(rug, panel=split.layer, series=f"{split.top_name}, each", x=wd, neuron=neurons)


def _draw_floor(ax: Axes, floor: tuple[float, float], *, panel: str) -> Entry:
    mean, high = floor
    band = ax.axvspan(mean, high, color=PALETTE["floor"], alpha=0.3, lw=0)
    record(band, panel=panel, series="Gaussian floor, mean to 97.5 %", x=mean, x_right=high)
    line = ax.axvline(mean, color=PALETTE["floor"], label="Gaussian floor (mean to 97.5 %)")
    record(line, panel=panel, series="Gaussian floor, mean", x=mean)
    return line, f"Gaussian floor {mean:.4f} σ (97.5 %: {high:.4f} σ)"


def _explain(
    ax: Axes,
    entries: Sequence[Entry],
    notes: Sequence[str],
    dropped: str,
    *,
    legend: bool,
    side: Side,
    skyline: Skyline,
) -> None:
    """Write the legend, or the notes in its place, and what could not be drawn."""
    if legend:
        extra: list[Entry] = [(text_handle(), dropped)] if dropped else []
        add_legend(ax, [*entries, *extra], side=side, skyline=skyline)
    else:
        add_note(ax, [*notes, dropped] if dropped else notes, side=side, skyline=skyline)


def plot_output_distribution(
    histogram: pd.DataFrame,
    *,
    mean: float,
    std: float,
    wd: float | None = None,
    wd_se: float | None = None,
    label: str = "",
    standardized: bool = True,
    role: Role = "output",
    xlim: tuple[float, float] | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the density of one neuron's outputs under the Gaussian of the same mean and std.

    Parameters
    ----------
    histogram
        ``left``, ``right`` and ``count`` in the neuron's own units: bins that join, ascending.
        Outer bins may be endless; what they hold is counted, not drawn.
    mean, std
        Of the neuron's outputs, in its own units.
    wd, wd_se
        Wasserstein distance and its standard error in σ, for the title.
    label
        Name of the neuron, for the title, errors and the table of what is drawn.
    standardized
        Draw ``(output - mean) / std`` instead of the neuron's own units.
    role
        What the neuron stands for (``"output"``, ``"top"`` or ``"typical"``): chooses the colour.
    xlim
        Limits of the x axis in the units drawn; chosen by `output_limits` if None.
    legend
        Write a legend; otherwise only the numbers, for panels that share one legend.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure.

    Raises
    ------
    InvalidInput
        Missing columns, bins that do not join, no counts, a constant or infinite neuron.
    """
    shape = output_density(histogram, mean=mean, std=std, standardized=standardized, label=label)
    center, scale = (0.0, 1.0) if standardized else (mean, std)
    low, high = xlim or output_limits(shape, center=center, scale=scale)
    ax = axes_or_new(ax)
    bars = _draw_density(ax, shape, role=role, panel=label)
    x = np.linspace(low, high, 401)
    bell = stats.norm.pdf(x, center, scale)
    (line,) = ax.plot(x, bell, color=PALETTE["gaussian"], label="fitted Gaussian")
    record(line, panel=label, series="fitted Gaussian", x=x, y=bell)
    unit = ("standardised output (σ)", "σ") if standardized else ("output (model units)", "unit")
    ax.set(xlabel=unit[0], ylabel=f"density (per {unit[1]})", xlim=(low, high))
    add_title(ax, "\n".join(filter(None, (label, wd_text(wd, wd_se)))))
    tokens = f"n = {shape.n:,} tokens"
    entries: list[Entry] = [
        (bars, f"{bars.get_label()} ({tokens})"),
        (line, f"fitted Gaussian (mean {mean:.3g}, std {std:.3g})".replace("-", "−")),
    ]
    if "±" in wd_text(wd, wd_se):
        entries.append((text_handle(), SE_TEXT))
    beyond = 1.0 - shape.share_between(low, high)
    outside = f"{100 * beyond:.2g} % off axis" if beyond > 1e-9 else ""
    side: Side = "right" if shape.quantile(0.5) <= 0.5 * (low + high) else "left"
    inside = np.clip(0.5 * (shape.edges[:-1] + shape.edges[1:]), low, high)
    points = np.append(x, inside)
    skyline = points, np.maximum(shape.at(points), stats.norm.pdf(points, center, scale))
    _explain(ax, entries, [tokens], outside, legend=legend, side=side, skyline=skyline)
    return ax


def _draw_density(ax: Axes, shape: OutputDensity, *, role: Role, panel: str) -> StepPatch:
    name = "output" if role == "output" else f"{role} neuron"
    bars = ax.stairs(shape.density, shape.edges, fill=True, lw=0, alpha=0.7, color=PALETTE[role])
    bars.set_label(name)
    left, right = shape.edges[:-1], shape.edges[1:]
    record(bars, panel=panel, series=name, x=left, y=shape.density, x_right=right)
    return bars


def output_limits(shape: OutputDensity, *, center: float, scale: float) -> tuple[float, float]:
    """Return the x limits: 4 σ to both sides, or what holds 99.8 % of the tokens if wider."""
    low, high = center - 4.0 * scale, center + 4.0 * scale
    return min(low, shape.quantile(0.001)), max(high, shape.quantile(0.999))


def wd_text(wd: float | None, se: float | None) -> str:
    """Return ``"WD = 0.412 ± 0.010 σ"``: two digits of the error, three decimals at least."""
    if wd is None or not np.isfinite(wd):
        return ""
    if se is None or not np.isfinite(se):
        return f"WD = {wd:.3f}\u00a0σ"
    decimals = 3 if se <= 0.0 else int(np.clip(1 - np.floor(np.log10(se)), 3, 6))
    return f"WD = {wd:.{decimals}f} ± {se:.{decimals}f}\u00a0σ"


def plot_wd_against_md(
    scores: pd.DataFrame,
    *,
    top: float = 0.03,
    seed: int = 0,
    n_boot: int = 1000,
    legend: bool = True,
    ax: Axes | None = None,
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
    ax = axes_or_new(ax)
    entries = _draw_points(ax, split, md, wd)
    ax.set(xlabel=MD_LABEL, ylabel=WD_LABEL)
    add_title(ax, split.layer)
    rho = f"ρ = {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-", "−")
    entries.append((text_handle(), f"Spearman {rho}\n{bootstrap_text(n_boot=n_boot, seed=seed)}"))
    notes = [rho, f"n = {len(wd):,}"]
    # Panels that share a legend may get wider x limits later: keep their notes above all points.
    skyline = (md if legend else np.full_like(md, md.min()), wd)
    _explain(ax, entries, notes, split.dropped, legend=legend, side="left", skyline=skyline)
    return ax


def bootstrap_text(*, n_boot: int, seed: int) -> str:
    """Say how the interval of a rank correlation came about."""
    return f"95 % bootstrap, {n_boot:,} resamples, seed {seed}"


def _draw_points(ax: Axes, split: TopSplit, x: Floats, y: Floats) -> list[Entry]:
    entries: list[Entry] = []
    neurons = split.neurons()
    for mask, role, name, size in (
        (~split.is_top, "typical", OTHERS, 4.0),
        (split.is_top, "top", split.top_name, 9.0),
    ):
        points = ax.scatter(
            x[mask],
            y[mask],
            s=size,
            color=PALETTE[role],
            alpha=0.6,
            linewidths=0,
            label=name,
            rasterized=len(x) > _MANY_POINTS,
        )
        record(points, panel=split.layer, series=name, x=x[mask], y=y[mask], neuron=neurons[mask])
        entries.append((points, f"{name} (n = {mask.sum():,})"))
    return entries
