"""A neuron's outputs when weights become zero: by experts and sparsity."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.checks import wholes
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, picked
from entangle.plotting.outputs import Entry, output_limits, wd_text
from entangle.plotting.page import axes_level, figure_level, paper, share_axes
from entangle.plotting.save import record
from entangle.plotting.style import (
    KIND_PALETTE,
    Role,
    Skyline,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    ink,
)
from entangle.plotting.summaries import (
    ALL_TOKENS,
    DECOMPOSE,
    OutputDensity,
    SparseNeuron,
    bell_curve,
    check_columns,
    choose,
    close_neurons,
    output_density,
    sparse_neuron,
    usual_neurons,
)

MAX_EXPERTS = 8
X_LABEL, Y_LABEL = "standardised output (σ of dense)", "density (per σ)"

MOST_ACROSS: Mapping[str, int] = {"single": 2, "double": 5}
"""Panels of one neuron in a row."""
Shapes = Mapping[str, OutputDensity]
"""By kind: ``"dense"`` and ``"sparse"``, in standard deviations of the dense outputs."""
Panel = tuple[SparseNeuron, int, str]
"""A neuron at one sparsity, its number of experts, and the panel's title."""


@axes_level
def plot_sparse_output(
    outputs: pd.DataFrame,
    *,
    neurons: pd.DataFrame,
    layer: str | None = None,
    neuron: int | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    role: Role = "output",
    xlim: tuple[float, float] | None = None,
    legend: bool = True,
    notes: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the sparse outputs of one neuron over its dense ones.

    Parameters
    ----------
    outputs
        ``outputs`` of a decomposition: histograms with ``layer``, ``neuron``, ``experts``,
        ``sparsity``, ``kind``, ``cluster`` (-1: all tokens), ``left``, ``right`` and ``count``.
    neurons
        ``neurons`` of the decomposition: ``mean``, ``std`` and ``wd`` of the dense outputs,
        ``output_wd`` (W1 between sparse and dense, in dense standard deviations) and ``ri``.
    layer, neuron, experts, sparsity
        Which; may be left out where ``outputs`` holds only one.
    role
        What the neuron stands for, for the title.
    xlim
        Limits of the x axis in σ; chosen from the outputs if None.
    legend
        Write a legend.
    notes
        Write the number of tokens.
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
    InvalidInput, UnknownName
        Missing columns, something that the tables do not hold, a constant neuron.
    """
    rows = choose(
        outputs, name="outputs", layer=layer, neuron=neuron, experts=experts, sparsity=sparsity
    )
    first = rows.iloc[0]
    chosen = sparse_neuron(
        neurons,
        layer=str(first["layer"]),
        neuron=int(first["neuron"]),
        sparsity=float(first["sparsity"]),
        role=role,
    )
    k = int(first["experts"])
    shapes = _shapes(rows, chosen, k)
    ax = axes_or_new(ax, options)
    entries, skyline = _draw(ax, shapes, chosen, k, xlim=xlim or _limits([shapes]))
    add_title(ax, "\n".join((f"{chosen.label}, {experts_text(k)}", _measures(chosen, k))))
    note = f"n = {shapes['dense'].n:,} tokens"
    if legend:
        if entries and notes:
            (bars, name), *others = entries
            entries = [(bars, f"{name} ({note})"), *others]
        add_legend(ax, entries, side="left", skyline=skyline)
    elif notes:
        add_note(ax, [note], side="left", skyline=skyline)
    return ax


@figure_level
def figure_sparse_outputs(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    chosen: int | Iterable[int] | None = None,
    experts: int | Iterable[int] | None = None,
    sparsity: float | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw dense and sparse outputs: a row of panels a neuron, a panel a number of experts.

    Parameters
    ----------
    outputs, neurons, layer, sparsity
        As in `plot_sparse_output`.
    chosen
        Numbers of neurons; None takes the one with the largest WD and one near the layer's median.
    experts
        Numbers of experts; None takes the smallest and the largest.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with common axes; each states W1 between the sparse and dense outputs, and RI.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_sparse_output` refuses, or nothing to draw.

    References
    ----------
    arXiv 2405.15756, figure 1 a-e.
    """
    rows = choose(outputs, name="outputs", layer=layer, sparsity=sparsity)
    items = close_neurons(rows, neurons, chosen)
    common = set.intersection(*(set(item.experts) for item in items))
    numbers = (
        sorted({min(common), max(common)})
        if experts is None
        else wholes("experts", experts, least=1)
    )
    return _figure(rows, neurons, items, numbers, options)


@figure_level
def figure_recovery(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    experts: int | Iterable[int] | None = None,
    sparsity: float | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw how more experts recover one neuron's outputs, one panel a number of experts.

    Parameters
    ----------
    outputs, neurons, layer, sparsity, options
        As in `figure_sparse_outputs`.
    neuron
        None takes the one with the largest WD.
    experts
        Numbers of experts, in the order of the panels; None takes all.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with common axes; each states W1 between the sparse and dense outputs, and RI.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_sparse_output` refuses, or nothing to draw.

    References
    ----------
    arXiv 2405.15756, figure 6.
    """
    rows = choose(outputs, name="outputs", layer=layer, sparsity=sparsity)
    items = close_neurons(rows, neurons, None if neuron is None else [neuron])[:1]
    numbers = items[0].experts if experts is None else wholes("experts", experts, least=1)
    return _figure(rows, neurons, items, numbers, options)


def experts_text(k: int) -> str:
    """Return ``"1 expert"`` or ``"16 experts"``, not to be broken."""
    return "1\u00a0expert" if k == 1 else f"{k}\u00a0experts"


def _figure(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    items: Sequence[SparseNeuron],
    experts: Sequence[int],
    options: FigureOptions,
) -> Figure:
    if not 1 <= len(experts) <= MAX_EXPERTS:
        raise InvalidInput(
            f"`experts` must list 1 to {MAX_EXPERTS} numbers of experts; got {len(experts)}."
        )
    several = len(items) > 1
    panels = [
        (item, k, f"{item.label}, {experts_text(k)}" if several else experts_text(k))
        for item in items
        for k in experts
    ]
    zeros = f"{100 * items[0].sparsity:.4g}\u00a0%\u00a0zeros"
    across = len(experts) if several else None
    return draw_panels(outputs, neurons, panels, options, said=zeros, across=across)


def draw_panels(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    panels: Sequence[Panel],
    options: FigureOptions,
    *,
    said: str,
    across: int | None = None,
) -> Figure:
    """Draw panels of one layer with common axes; ``said`` is what holds for all of them.

    RI is stated where any of them has several experts.
    """
    panels = picked(panels, _panel_names, panels=True)
    improved = any(k > 1 for _, k, _ in panels)
    shapes = [_shapes(outputs, item, k) for item, k, _ in panels]
    xlim = _limits(shapes)
    first, tokens = panels[0][0], shapes[0]["dense"].n
    wd = {item.label: f"{item.label}: {wd_text(item.wd, None)}" for item, *_ in panels}
    with paper(options) as page:
        if across is None or len(panels) % across:
            down = -(-len(panels) // MOST_ACROSS[page.column])
            across = -(-len(panels) // down)
        axes = page.grid(len(panels), longest_title=30, across=across)
        for ax, (item, k, title) in zip(axes, panels, strict=True):
            plot_sparse_output(
                outputs, neurons=neurons, layer=item.layer, neuron=item.neuron, experts=k,
                sparsity=item.sparsity, role=item.role, xlim=xlim, legend=False, notes=False,
                ax=ax,
            )  # fmt: skip
            add_title(ax, f"{title}\n{_measures(item, k, improved=improved)}")
        share_axes(page.figure, axes, across=across)
        caption = (
            f"Outputs of {', '.join(wd)} of {first.layer}, {said}, n = {tokens:,}\u00a0tokens",
            "W₁: Wasserstein distance of the sparse from the dense outputs",
            "RI: relative improvement over one expert" if improved else "",
            "distance of the dense outputs from a Gaussian: " + ", ".join(wd.values()),
        )
        alone = f"; {next(iter(wd.values()))}" if len(wd) == 1 else ""
        return page.finish(caption, title=f"{first.layer}, {said}{alone}")


def _panel_names(panel: Panel) -> tuple[str, ...]:
    item, k, title = panel
    return title, item.role, item.label, f"neuron {item.neuron}", experts_text(k)


def _measures(item: SparseNeuron, k: int, *, improved: bool = True) -> str:
    row = item.rows[item.rows.index == k]
    wd, ri = row[["output_wd", "ri"]].to_numpy(np.float64, na_value=np.nan)[0]
    said = [f"W₁\u00a0to\u00a0dense {wd:.3f}\u00a0σ"] if np.isfinite(wd) else []
    return ", ".join([*said, f"RI\u00a0{ri:.2f}"] if improved and np.isfinite(ri) else said)


def _shapes(outputs: pd.DataFrame, item: SparseNeuron, k: int) -> dict[str, OutputDensity]:
    """Return the densities of all tokens by kind."""
    found = {}
    for kind in KIND_PALETTE:
        rows = choose(
            outputs, name="outputs", layer=item.layer, neuron=item.neuron, experts=k,
            sparsity=item.sparsity, kind=kind, cluster=ALL_TOKENS,
        )  # fmt: skip
        found[kind] = output_density(rows, mean=item.mean, std=item.std, label=item.label)
    return found


def _limits(shapes: Sequence[Shapes]) -> tuple[float, float]:
    limits = [output_limits(s, center=0.0, scale=1.0) for by in shapes for s in by.values()]
    return min(low for low, _ in limits), max(high for _, high in limits)


def _draw(
    ax: Axes, shapes: Shapes, item: SparseNeuron, k: int, *, xlim: tuple[float, float]
) -> tuple[list[Entry], Skyline]:
    entries: list[Entry] = []
    panel = f"{item.label}, {experts_text(k)}"
    for kind, shape in picked(shapes.items(), lambda shape: shape[0]):
        filled = kind == "dense"
        bars = ax.stairs(
            shape.density, shape.edges, fill=filled, color=ink(kind, KIND_PALETTE[kind]),
            label=kind, lw=0.0 if filled else 1.0, alpha=0.5 if filled else 1.0,
        )  # fmt: skip
        left, right = shape.edges[:-1], shape.edges[1:]
        record(bars, panel=panel, series=kind, x=left, y=shape.density, x_right=right)
        entries.append((bars, kind))
    x = np.linspace(*xlim, 401)
    bell = bell_curve(x)
    if asked_for("Gaussian"):
        color = ink("gaussian", None, "Gaussian")
        (line,) = ax.plot(x, bell, color=color, lw=0.7, ls="--", label="Gaussian")
        record(line, panel=panel, series="Gaussian", x=x, y=bell)
        entries.append((line, "Gaussian"))
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, xlim=xlim)
    heights = [bell, *(shape.at(x) for shape in shapes.values())]
    return entries, (x, np.max(heights, axis=0))


MAX_SPARSITIES = 10


@figure_level
def figure_sparsities(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    experts: int = 1,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw what sparsity makes of one neuron's outputs, one panel a sparsity.

    Parameters
    ----------
    outputs, neurons
        As in `entangle.plotting.figure_recovery`: tables of several decompositions of one layer on
        one text, at several sparsities, joined by `pandas.concat`.
    layer
        Which; may be left out where the tables hold only one.
    neuron
        None takes the one with the largest WD.
    experts
        Number of experts.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with common axes, from the lowest sparsity to the highest; each states W1 between the
        sparse and dense outputs, and RI where there are several experts.

    Raises
    ------
    InvalidInput, UnknownName
        What `entangle.plotting.plot_sparse_output` refuses, or too many sparsities.

    References
    ----------
    arXiv 2405.15756, figure A9.
    """
    rows = choose(outputs, name="outputs", layer=layer, experts=experts)
    check_columns(rows, ("layer", "neuron", "sparsity"), name="outputs", writer=DECOMPOSE)
    sparsities = sorted(map(float, rows["sparsity"].unique()))
    if len(sparsities) > MAX_SPARSITIES:
        raise InvalidInput(
            f"`outputs` must hold 1 to {MAX_SPARSITIES} sparsities for one figure; got "
            f"{len(sparsities)}; choose some of them."
        )
    name = str(rows["layer"].iloc[0])
    known = [int(number) for number in rows["neuron"].unique()]
    of_layer = choose(neurons, name="neurons", layer=name, sparsity=sparsities[0])
    usual = dict(usual_neurons(of_layer, known))
    number = next(iter(usual)) if neuron is None else neuron
    role = usual.get(number, "output")
    panels: list[Panel] = [
        (
            sparse_neuron(neurons, layer=name, neuron=number, sparsity=sparsity, role=role),
            experts,
            f"{100 * sparsity:.4g}\u00a0% zeros",
        )
        for sparsity in sparsities
    ]
    return draw_panels(outputs, neurons, panels, options, said=experts_text(experts))
