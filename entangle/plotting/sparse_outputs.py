"""A neuron's outputs before and after its weights are made sparse, by number of experts.

A neuron's outputs as more and more of its weights become zero.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from entangle.checks import wholes
from entangle.errors import InvalidInput
from entangle.plotting.axes import Entry, output_limits, wd_text
from entangle.plotting.save import record, sign
from entangle.plotting.style import (
    KIND_PALETTE,
    PALETTE,
    Column,
    Role,
    Skyline,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    header_legend,
    panel_grid,
    paper_style,
    share_axes,
)
from entangle.plotting.summaries import (
    DECOMPOSE,
    OutputDensity,
    SparseNeuron,
    check_columns,
    choose,
    output_density,
    sparse_neuron,
    usual_neurons,
)

MAX_EXPERTS = 8
ALL_TOKENS = -1
"""What stands for all clusters together in the column ``cluster``."""
X_LABEL, Y_LABEL = "standardised output (σ of dense)", "density (per σ)"

MOST_ACROSS: Mapping[str, int] = {"single": 2, "double": 5}
"""Panels of one neuron in a row."""
Shapes = Mapping[str, OutputDensity]
"""By kind: ``"dense"`` and ``"sparse"``, in standard deviations of the dense outputs."""
Panel = tuple[SparseNeuron, int, str]
"""A neuron at one sparsity, its number of experts, and the panel's title."""


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
    ax: Axes | None = None,
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
        Write a legend; otherwise only the number of tokens.
    ax
        Where to draw; None makes a new figure.

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
    ax = axes_or_new(ax)
    entries, skyline = _draw(ax, shapes, chosen, k, xlim=xlim or _limits([shapes]))
    add_title(ax, "\n".join((f"{chosen.label}, {experts_text(k)}", _measures(chosen, k))))
    note = f"n = {shapes['dense'].n:,} tokens"
    if legend:
        (dense, name), *others = entries
        add_legend(ax, [(dense, f"{name} ({note})"), *others], side="left", skyline=skyline)
    else:
        add_note(ax, [note], side="left", skyline=skyline)
    return ax


def figure_sparse_outputs(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    chosen: int | Iterable[int] | None = None,
    experts: int | Iterable[int] | None = None,
    sparsity: float | None = None,
    column: Column = "double",
    digest: str | None = None,
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
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

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
    items = _items(rows, neurons, chosen)
    common = set.intersection(*(set(item.experts) for item in items))
    numbers = (
        sorted({min(common), max(common)})
        if experts is None
        else wholes("experts", experts, least=1)
    )
    return _figure(rows, items, numbers, column=column, digest=digest)


def figure_recovery(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    experts: int | Iterable[int] | None = None,
    sparsity: float | None = None,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw how more experts recover one neuron's outputs, one panel a number of experts.

    Parameters
    ----------
    outputs, neurons, layer, sparsity, column, digest
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
    items = _items(rows, neurons, None if neuron is None else [neuron])[:1]
    numbers = items[0].experts if experts is None else wholes("experts", experts, least=1)
    return _figure(rows, items, numbers, column=column, digest=digest)


def dense_output(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
) -> tuple[pd.DataFrame, SparseNeuron]:
    """Return the histogram of one neuron's dense outputs, and its mean, standard deviation and WD.

    Parameters
    ----------
    outputs, neurons, layer
        As in `plot_sparse_output`, of any sparsity.
    neuron
        None takes the one with the largest WD.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, or something that the tables do not hold.
    """
    rows = choose(outputs, name="outputs", layer=layer)
    check_columns(rows, ("sparsity", "experts"), name="outputs", writer=DECOMPOSE)
    rows = choose(rows, name="outputs", sparsity=float(rows["sparsity"].iloc[0]))
    item = _items(rows, neurons, None if neuron is None else [neuron])[0]
    return choose(
        rows, name="outputs", neuron=item.neuron, experts=int(rows["experts"].min()), kind="dense",
        cluster=ALL_TOKENS,
    ), item  # fmt: skip


def experts_text(k: int) -> str:
    """Return ``"1 expert"`` or ``"16 experts"``, not to be broken."""
    return "1\u00a0expert" if k == 1 else f"{k}\u00a0experts"


def _items(
    outputs: pd.DataFrame, neurons: pd.DataFrame, chosen: int | Iterable[int] | None
) -> list[SparseNeuron]:
    """Return the neurons to draw, from rows of one layer and sparsity."""
    layer, sparsity = str(outputs["layer"].iloc[0]), float(outputs["sparsity"].iloc[0])
    rows = choose(neurons, name="neurons", layer=layer, sparsity=sparsity)
    known = [int(number) for number in outputs["neuron"].unique()]
    if chosen is None:
        wanted: list[tuple[int, Role]] = usual_neurons(rows, known)
    else:
        usual = dict(usual_neurons(rows, known))
        wanted = [
            (number, usual.get(number, "output")) for number in wholes("chosen", chosen, least=0)
        ]
    return [
        sparse_neuron(neurons, layer=layer, neuron=number, sparsity=sparsity, role=role)
        for number, role in wanted
    ]


def _figure(
    outputs: pd.DataFrame,
    items: Sequence[SparseNeuron],
    experts: Sequence[int],
    *,
    column: Column,
    digest: str | None,
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
    across = len(experts) if several else min(len(experts), MOST_ACROSS[column])
    zeros = f"{100 * items[0].sparsity:.4g}\u00a0%\u00a0zeros"
    return draw_panels(outputs, panels, said=zeros, across=across, column=column, digest=digest)


def draw_panels(
    outputs: pd.DataFrame,
    panels: Sequence[Panel],
    *,
    said: str,
    across: int,
    column: Column,
    digest: str | None,
) -> Figure:
    """Draw panels of one layer with common axes; ``said`` is what holds for all of them.

    RI is stated where any of them has several experts.
    """
    improved = any(k > 1 for _, k, _ in panels)
    shapes = [_shapes(outputs, item, k) for item, k, _ in panels]
    xlim = _limits(shapes)
    first, tokens = panels[0][0], shapes[0]["dense"].n
    wd = {item.label: f"{wd_text(item.wd, None)} from N(0,\u00a01)" for item, *_ in panels}
    clauses = [
        f"{first.layer}, {said}, n = {tokens:,}\u00a0tokens",
        ", ".join(f"{name}: {text}" for name, text in wd.items()),
        "in the panels: WD of the sparse from the dense outputs",
    ]
    with paper_style(column=column):
        figure, axes = panel_grid(len(panels), column=column, longest_title=30, across=across)
        for ax, (item, k, title), shape in zip(axes, panels, shapes, strict=True):
            _draw(ax, shape, item, k, xlim=xlim)
            add_title(ax, f"{title}\n{_measures(item, k, improved=improved)}")
        share_axes(figure, axes, column=column, across=across)
        header_legend(figure, axes, column=column, clauses=clauses)
        return sign(figure, digest)


def _measures(item: SparseNeuron, k: int, *, improved: bool = True) -> str:
    row = item.rows[item.rows.index == k]
    wd, ri = row[["output_wd", "ri"]].to_numpy(np.float64, na_value=np.nan)[0]
    said = [f"WD\u00a0{wd:.3f}\u00a0σ"] if np.isfinite(wd) else []
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
    for kind, shape in shapes.items():
        filled = kind == "dense"
        bars = ax.stairs(
            shape.density, shape.edges, fill=filled, color=KIND_PALETTE[kind], label=kind,
            lw=0.0 if filled else 1.0, alpha=0.5 if filled else 1.0,
        )  # fmt: skip
        left, right = shape.edges[:-1], shape.edges[1:]
        record(bars, panel=panel, series=kind, x=left, y=shape.density, x_right=right)
        entries.append((bars, kind))
    x = np.linspace(*xlim, 401)
    bell = stats.norm.pdf(x)
    (line,) = ax.plot(x, bell, color=PALETTE["gaussian"], lw=0.7, ls="--", label="Gaussian")
    record(line, panel=panel, series="Gaussian", x=x, y=bell)
    entries.append((line, "Gaussian"))
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, xlim=xlim)
    heights = [bell, *(shape.at(x) for shape in shapes.values())]
    return entries, (x, np.max(heights, axis=0))


MAX_SPARSITIES = 10


def figure_sparsities(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    experts: int = 1,
    column: Column = "double",
    digest: str | None = None,
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
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

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
    wanted = next(iter(usual)) if neuron is None else neuron
    role = usual.get(wanted, "output")
    panels: list[Panel] = [
        (
            sparse_neuron(neurons, layer=name, neuron=wanted, sparsity=sparsity, role=role),
            experts,
            f"{100 * sparsity:.4g}\u00a0% zeros",
        )
        for sparsity in sparsities
    ]
    down = -(-len(panels) // MOST_ACROSS[column])
    across = -(-len(panels) // down)
    return draw_panels(
        outputs, panels, said=experts_text(experts), across=across, column=column, digest=digest
    )
