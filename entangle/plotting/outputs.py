"""The outputs of single neurons over the Gaussians that fit them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.ticker import FuncFormatter, NullLocator

from entangle.checks import several
from entangle.errors import InvalidInput
from entangle.plotting.options import Column, FigureOptions, PlotOptions, asked_for, picked
from entangle.plotting.page import axes_level, figure_level, paper, share_axes
from entangle.plotting.save import record
from entangle.plotting.style import (
    Role,
    Side,
    Skyline,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    ink,
    log_locator,
    plain_number,
    text_handle,
)
from entangle.plotting.summaries import (
    Floats,
    OutputDensity,
    TopSplit,
    bell_curve,
    check_columns,
    output_density,
    split_top,
)

Entry = tuple[Artist, str]
FITTED = "fitted Gaussian"
SE_TEXT = "±: standard error"
MAX_PANELS = 40
HEAVY_TAIL = 6.0
"""Standardised outputs beyond which `figure_output_distributions` has a log scale."""
_ROLES: tuple[Role, Role] = ("top", "typical")

HistogramOf = Callable[[str, int], pd.DataFrame]
"""From a layer's full name and a neuron's number to that neuron's histogram."""


@axes_level
def plot_output_distribution(
    histogram: pd.DataFrame,
    *,
    mean: float,
    std: float,
    wd: float | None = None,
    wd_se: float | None = None,
    label: str = "",
    standardized: bool = True,
    log: bool = False,
    role: Role = "output",
    xlim: tuple[float, float] | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
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
    log
        Draw the density on a log scale, on which heavy tails are seen.
    role
        What the neuron stands for (``"output"``, ``"top"`` or ``"typical"``): chooses the colour.
    xlim
        Limits of the x axis in the units drawn; chosen by `output_limits` if None.
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
        Missing columns, bins that do not join, no counts, a constant or infinite neuron.
    """
    shape = output_density(histogram, mean=mean, std=std, standardized=standardized, label=label)
    center, scale = (0.0, 1.0) if standardized else (mean, std)
    low, high = xlim or output_limits(shape, center=center, scale=scale)
    ax = axes_or_new(ax, options)
    tokens, x = f"n = {shape.n:,} tokens", np.linspace(low, high, 401)
    entries: list[Entry] = []
    if asked_for(_name(role), role):
        bars = _draw_density(ax, shape, role=role, panel=label, log=log)
        entries.append((bars, f"{bars.get_label()} ({tokens})"))
    if asked_for(FITTED, "gaussian"):
        entries.append(_draw_bell(ax, x, mean, std, standardized=standardized, panel=label))
    unit = ("standardised output (σ)", "σ") if standardized else ("output (model units)", "unit")
    ax.set(xlabel=unit[0], ylabel=f"density (per {unit[1]})", xlim=(low, high))
    add_title(ax, "\n".join(filter(None, (label, wd_text(wd, wd_se)))))
    if "±" in wd_text(wd, wd_se):
        entries.append((text_handle(), SE_TEXT))
    beyond = 1.0 - shape.share_between(low, high)
    outside = f"{100 * beyond:.2g} % off axis" if beyond > 1e-9 else ""
    side: Side = "right" if shape.quantile(0.5) <= 0.5 * (low + high) else "left"
    inside = np.clip(0.5 * (shape.edges[:-1] + shape.edges[1:]), low, high)
    points = np.append(x, inside)
    skyline = points, np.maximum(shape.at(points), bell_curve(points, center, scale))
    explain(ax, entries, [tokens], outside, legend=legend, side=side, skyline=skyline)
    if log:
        _set_log(ax, shape)
    return ax


def _draw_bell(
    ax: Axes, x: Floats, mean: float, std: float, *, standardized: bool, panel: str
) -> Entry:
    bell = bell_curve(x) if standardized else bell_curve(x, mean, std)
    (line,) = ax.plot(x, bell, color=ink("gaussian", None, FITTED), label=FITTED)
    record(line, panel=panel, series=FITTED, x=x, y=bell)
    return line, f"{FITTED} (mean {mean:.3g}, std {std:.3g})".replace("-", "−")


def _set_log(ax: Axes, shape: OutputDensity) -> None:
    """Make the y axis logarithmic, from what one token needs to some room for notes."""
    low, high = _lowest(shape), 8.0 * float(shape.density.max())
    ax.set(yscale="log", ylim=(low, high))
    ax.yaxis.set_major_locator(log_locator(high / low))
    ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.yaxis.set_minor_locator(NullLocator())


def _lowest(shape: OutputDensity) -> float:
    return 0.5 * float(shape.density[shape.density > 0.0].min())


def _draw_density(
    ax: Axes, shape: OutputDensity, *, role: Role, panel: str, log: bool
) -> StepPatch:
    name = _name(role)
    bars = ax.stairs(
        shape.density, shape.edges, baseline=_lowest(shape) if log else 0.0, fill=True, lw=0,
        alpha=0.7, color=ink(role, None, name),
    )  # fmt: skip
    bars.set_label(name)
    left, right = shape.edges[:-1], shape.edges[1:]
    record(bars, panel=panel, series=name, x=left, y=shape.density, x_right=right)
    return bars


def _name(role: Role) -> str:
    return "output" if role == "output" else f"{role} neuron"


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


def explain(
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


@dataclass(frozen=True)
class NeuronOutput:
    """What `figure_output_distributions` draws of one neuron."""

    histogram: pd.DataFrame
    """``left``, ``right`` and ``count``, in the neuron's own units."""
    mean: float
    """Of the outputs, in the neuron's own units."""
    std: float
    """Of the outputs, in the neuron's own units."""
    wd: float | None = None
    """Wasserstein distance in σ."""
    wd_se: float | None = None
    """Standard error of ``wd`` in σ."""
    label: str = ""
    """Title of the panel."""
    role: Role = "output"
    """What the neuron stands for; chooses the colour."""
    layer: str = ""
    """Short name of its layer, for the figure's title where ``label`` does not say it."""
    full_layer: str = ""
    """Full name of its layer, by which options may call it."""

    @classmethod
    def of(
        cls, row: pd.Series, histogram: pd.DataFrame, *, label: str = "", role: Role = "output"
    ) -> "NeuronOutput":
        """Take the numbers from the neuron's row of ``scores``; named by layer if no ``label``."""
        check_columns(row.to_frame().T, ("layer", "neuron", "mean", "std", "wd"), name="scores")
        return cls(
            histogram=histogram,
            mean=float(row["mean"]),
            std=float(row["std"]),
            wd=float(row["wd"]),
            wd_se=float(row.get("wd_se", np.nan)),
            label=label or f"{layer_label(row)}, neuron\u00a0{row['neuron']}",
            role=role,
            layer=layer_label(row),
            full_layer=str(row["layer"]),
        )


def layer_label(row: pd.Series) -> str:
    """Return a short title for the layer of a row: block and projection, else its full name."""
    block, projection = row.get("block"), row.get("projection")
    if pd.isna(block) or pd.isna(projection):
        return str(row["layer"])
    return f"block {block} · {projection}"


def layer_names(row: pd.Series) -> tuple[str, str]:
    """Return by what names the layer of a row goes: the full one, and that of its panel."""
    return str(row["layer"]), layer_label(row)


@figure_level
def figure_output_distributions(
    items: NeuronOutput | Iterable[NeuronOutput],
    *,
    standardized: bool = True,
    log: bool | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw the outputs of chosen neurons with the fitted Gaussian, one panel a neuron.

    Parameters
    ----------
    items
        The neurons, in the order of the panels.
    standardized
        Draw every neuron in its standard deviations, on one common x axis; otherwise each in its
        own units.
    log
        Draw densities on a log scale; None does where standardised outputs reach beyond
        `HEAVY_TAIL` σ, which would leave a linear axis empty.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        The panels. A single neuron gets the full legend.

    Raises
    ------
    InvalidInput
        No or too many neurons, or one that `plot_output_distribution` refuses.
    """
    wanted = several("items", items, NeuronOutput, empty=True)
    return _draw_outputs(wanted, options, standardized=standardized, log=log)


@figure_level
def figure_top_and_typical(
    scores: pd.DataFrame, histogram_of: HistogramOf, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw the outputs of the neuron with the largest WD beside those of a typical one.

    The typical neuron is the one whose WD is closest to the layer's median. Both panels have the
    same standardised x axis and the same y axis (dense part of figure 1 of Sawmya et al.,
    arXiv 2405.15756).

    Parameters
    ----------
    scores
        One row a neuron of one layer: ``layer``, ``neuron``, ``wd``, ``mean``, ``std`` and, where
        known, ``wd_se``, ``block``, ``projection`` and ``flag``.
    histogram_of
        Gives the histogram (``left``, ``right``, ``count``) of a layer's neuron.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels.

    Raises
    ------
    InvalidInput
        Missing columns, several layers, fewer than two neurons with finite WD, mean and std.
    """
    split = split_top(scores, top=1.0, values=("wd", "mean", "std"))
    rows = _top_and_typical(split)
    items = [
        NeuronOutput.of(
            row,
            histogram_of(split.layer, int(row["neuron"])),
            label=f"{role} neuron {row['neuron']}",
            role=role,
        )
        for row, role in zip(rows, _ROLES, strict=True)
    ]
    said = f"the largest WD, and the median WD, of {len(split.frame):,} neurons in {split.layer}"
    return _draw_outputs(items, options, log=False, usual="single", said=(said, split.dropped))


def top_and_typical(scores: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return the rows of one layer's neuron with the largest WD and of that nearest the median.

    Neurons without finite WD, mean and std take no part; raises as `split_top` does.
    """
    return _top_and_typical(split_top(scores, top=1.0, values=("wd", "mean", "std")))


def _top_and_typical(split: TopSplit) -> tuple[pd.Series, pd.Series]:
    wd = split.values("wd")
    top = int(np.argmax(wd))
    distance = np.abs(wd - np.median(wd))
    distance[top] = np.inf
    return split.frame.iloc[top], split.frame.iloc[int(np.argmin(distance))]


def _draw_outputs(
    items: Sequence[NeuronOutput],
    options: FigureOptions,
    *,
    standardized: bool = True,
    log: bool | None,
    usual: Column = "double",
    said: Sequence[str] = (),
) -> Figure:
    items = picked(items, _item_names, panels=True)
    check_panels(len(items), name="items", kind="neuron")
    xlim = _common_limits(items) if standardized else None
    wide = xlim is not None and xlim[1] - xlim[0] > 2.0 * HEAVY_TAIL
    alone, layers = len(items) == 1, {item.layer for item in items}
    layer = layers.pop() if len(layers) == 1 else ""
    with paper(options, column=usual) as page:
        axes = page.grid(len(items), longest_title=max(len(item.label) for item in items))
        for ax, item in zip(axes, items, strict=True):
            plot_output_distribution(
                item.histogram, mean=item.mean, std=item.std, wd=item.wd, wd_se=item.wd_se,
                label=item.label, standardized=standardized, role=item.role, xlim=xlim,
                log=wide if log is None else log,
                legend=alone, ax=ax,
            )  # fmt: skip
        if standardized:
            share_axes(page.figure, axes, across=page.across)
        known = any("±" in wd_text(item.wd, item.wd_se) for item in items)
        caption = (
            "Outputs of single neurons (bars) and the Gaussian of the same mean and standard "
            "deviation (line)",
            *said,
            "WD: Wasserstein distance between the two, ± standard error" if known else "",
        )
        named = all(layer in item.label for item in items)
        return page.finish(caption, shared=not alone, title="" if named else layer)


def _item_names(item: NeuronOutput) -> tuple[str, ...]:
    return item.label, item.layer, item.full_layer, item.role


def plural(n: int, word: str) -> str:
    """Return ``"1 layer"`` or ``"1,000 layers"``."""
    return f"{n:,} {word}{'s' * (n != 1)}"


def check_panels(n: int, *, name: str, kind: str) -> None:
    """Raise `InvalidInput` unless ``n`` panels are a figure."""
    if not 1 <= n <= MAX_PANELS:
        raise InvalidInput(
            f"`{name}` must hold 1 to {MAX_PANELS} {kind}s for one figure; got {n:,}; "
            f"choose some of them."
        )


def _common_limits(items: Sequence[NeuronOutput]) -> tuple[float, float]:
    limits = [
        output_limits(
            output_density(item.histogram, mean=item.mean, std=item.std, label=item.label),
            center=0.0,
            scale=1.0,
        )
        for item in items
    ]
    return min(low for low, _ in limits), max(high for _, high in limits)
