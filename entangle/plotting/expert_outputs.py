"""Which expert a neuron's outputs belong to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from entangle.errors import InvalidInput
from entangle.plotting.axes import Entry, output_limits, wd_text
from entangle.plotting.save import record, sign
from entangle.plotting.sparse_outputs import ALL_TOKENS, X_LABEL, Y_LABEL
from entangle.plotting.style import (
    KIND_PALETTE,
    Column,
    Skyline,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    column_width,
    join_clauses,
    panel_grid,
    paper_style,
    share_axes,
)
from entangle.plotting.summaries import (
    DECOMPOSE,
    TWO_EXPERTS,
    Floats,
    OutputDensity,
    SparseNeuron,
    choose,
    output_density,
    sparse_neuron,
    usual_neurons,
)

MOST_NAMED = 8
"""Largest number of experts that a legend names one by one."""
MOST_TICKS = 16
_VIRIDIS = colormaps["viridis"]


@dataclass(frozen=True)
class _Stack:
    """Densities of one kind of outputs, by expert."""

    kind: str
    item: SparseNeuron
    whole: OutputDensity
    """Of all tokens, in σ of the dense outputs."""
    experts: list[int]
    """In the order of their mean dense output."""
    density: Floats
    """(experts, bins): they add up to the density of all tokens."""
    tokens: list[int]
    """(experts,)"""

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.item.label}, {len(self.experts)} experts"

    @property
    def skyline(self) -> Skyline:
        edges = self.whole.edges
        return 0.5 * (edges[:-1] + edges[1:]), self.density.sum(axis=0)


def plot_experts(
    outputs: pd.DataFrame,
    *,
    neurons: pd.DataFrame,
    kind: str = "dense",
    layer: str | None = None,
    neuron: int | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the outputs of one neuron, stacked by the expert that each token goes to.

    The experts lie on top of each other in the order of their mean dense output, as do their
    colours; the heights add up to the density of all tokens.

    Parameters
    ----------
    outputs, neurons, layer, neuron, experts, sparsity
        As in `entangle.plotting.plot_sparse_output`, with two experts or more.
    kind
        ``"dense"`` or ``"sparse"``.
    legend
        Name the experts, or if they are more than `MOST_NAMED` only the lowest and the highest;
        otherwise only the number of tokens.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, something that the tables do not hold, one expert, a constant neuron.
    """
    rows = choose(
        outputs, name="outputs", layer=layer, neuron=neuron, experts=experts, sparsity=sparsity
    )
    stack = _stack(rows, _neuron(rows, neurons), kind)
    ax = axes_or_new(ax)
    entries = _draw(ax, stack, _limits([stack]))
    add_title(ax, stack.title)
    note = f"n = {stack.whole.n:,} tokens"
    if legend:
        named = entries if len(entries) <= MOST_NAMED else [entries[0], entries[-1]]
        add_legend(ax, named, side="left", skyline=stack.skyline)
    else:
        add_note(ax, [note], side="left", skyline=stack.skyline)
    return ax


def figure_experts(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw one neuron's outputs by expert, dense and sparse, with a bar of the experts' colours.

    Parameters
    ----------
    outputs, neurons, layer, sparsity
        As in `plot_experts`.
    neuron
        None takes the one with the largest WD.
    experts
        Number of experts; None takes the largest.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels with common axes.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_experts` refuses.

    References
    ----------
    arXiv 2405.15756, figure 1 f.
    """
    rows = choose(outputs, name="outputs", layer=layer, sparsity=sparsity)
    wanted = int(rows["experts"].max()) if experts is None else experts
    rows = choose(rows, name="outputs", experts=wanted)
    if neuron is None:
        of_layer = choose(neurons, name="neurons", layer=str(rows["layer"].iloc[0]))
        neuron = usual_neurons(of_layer, rows["neuron"].unique().tolist())[0][0]
    rows = choose(rows, name="outputs", neuron=neuron)
    item = _neuron(rows, neurons)
    stacks = [_stack(rows, item, kind) for kind in KIND_PALETTE]
    across = 1 if column == "single" else 2
    with paper_style(column=column):
        figure, axes = panel_grid(2, column=column, across=across)
        figure.set_figheight(2.3 + 1.2 * (column == "single"))
        for ax, stack in zip(axes, stacks, strict=True):
            _draw(ax, stack, _limits(stacks))
            add_title(ax, stack.kind)
        share_axes(figure, axes, column=column, across=across)
        _add_bar(figure, axes, stacks[0])
        title = join_clauses(_header(stacks[0]), inches=column_width(column), size=7.0)
        figure.suptitle(title, fontsize=7.0, parse_math=False)
        return sign(figure, digest)


def _header(stack: _Stack) -> list[str]:
    item, tokens = stack.item, stack.tokens
    return [
        f"neuron {item.neuron} of {item.layer}, {wd_text(item.wd, None)}",
        f"{100 * item.sparsity:.4g}\u00a0%\u00a0zeros",
        f"{len(tokens)}\u00a0experts of {min(tokens):,} to {max(tokens):,} tokens",
        f"n = {stack.whole.n:,}\u00a0tokens",
    ]


def _neuron(rows: pd.DataFrame, neurons: pd.DataFrame) -> SparseNeuron:
    first = rows.iloc[0]
    if int(first["experts"]) < 2:
        raise InvalidInput(f"a figure by expert {TWO_EXPERTS}")
    return sparse_neuron(
        neurons,
        layer=str(first["layer"]),
        neuron=int(first["neuron"]),
        sparsity=float(first["sparsity"]),
    )


def _stack(rows: pd.DataFrame, item: SparseNeuron, kind: str) -> _Stack:
    """Take the histograms of one kind; ``rows`` are of one neuron and number of experts."""
    whole = choose(rows, name="outputs", kind=kind, cluster=ALL_TOKENS)
    shape = output_density(whole, mean=item.mean, std=item.std, label=item.label)
    counts = _counts(rows, kind)
    strange = counts.columns.difference(pd.Index(whole["left"]))
    if len(strange):
        raise InvalidInput(
            f"`outputs` must have the same bins for every cluster of {item.label}; got one that "
            f"begins at {strange[0]:.4g}; {DECOMPOSE}"
        )
    dense = counts if kind == "dense" else _counts(rows, "dense")
    means = dense.mul(dense.columns.to_numpy(np.float64), axis=1).sum(axis=1) / dense.sum(axis=1)
    order = means.sort_values(kind="stable").index
    counts = counts.reindex(index=order, columns=whole["left"], fill_value=0.0).fillna(0.0)
    return _Stack(
        kind=kind,
        item=item,
        whole=shape,
        experts=[int(number) for number in order],
        density=counts.to_numpy(np.float64) / shape.n / np.diff(shape.edges),
        tokens=[int(n) for n in counts.sum(axis=1)],
    )


def _counts(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return counts, a row an expert that has tokens and a column a bin, by its left edge."""
    kept = rows[rows["kind"].eq(kind) & rows["cluster"].ne(ALL_TOKENS) & rows["count"].gt(0)]
    return kept.pivot(index="cluster", columns="left", values="count").fillna(0.0)


def _limits(stacks: Sequence[_Stack]) -> tuple[float, float]:
    limits = [output_limits(stack.whole, center=0.0, scale=1.0) for stack in stacks]
    return min(low for low, _ in limits), max(high for _, high in limits)


def _colors(n: int) -> list[tuple[float, float, float, float]]:
    return [tuple(_VIRIDIS(place)) for place in np.linspace(0.0, 0.95, n)]


def _draw(ax: Axes, stack: _Stack, xlim: tuple[float, float]) -> list[Entry]:
    edges, entries = stack.whole.edges, list[Entry]()
    tops = np.cumsum(stack.density, axis=0)
    colors = _colors(len(stack.experts))
    for number, (expert, density, n, color) in enumerate(
        zip(stack.experts, stack.density, stack.tokens, colors, strict=True)
    ):
        # Each over the next and down to 0: bands side by side leave a hairline of paper.
        order = 2.0 - number / len(colors)
        bars = ax.stairs(tops[number], edges, fill=True, color=color, lw=0, zorder=order)
        bars.set_label(f"expert {expert}")
        record(
            bars, panel=stack.kind, series=f"expert {expert}", x=edges[:-1], y=density,
            x_right=edges[1:],
        )  # fmt: skip
        entries.append((bars, f"expert {expert} (n = {n:,})"))
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, xlim=xlim)
    return entries


def _add_bar(figure: Figure, axes: Sequence[Axes], stack: _Stack) -> None:
    n = len(stack.experts)
    colors = ListedColormap(_colors(n))
    scale = ScalarMappable(BoundaryNorm(np.arange(n + 1), n), colors)
    bar = figure.colorbar(scale, ax=list(axes), aspect=40, pad=0.02)
    every = -(-n // MOST_TICKS)
    bar.set_ticks(
        [e + 0.5 for e in range(0, n, every)], labels=[str(e) for e in stack.experts[::every]]
    )
    bar.ax.tick_params(size=0, labelsize=6.0 if n > MOST_NAMED else 6.5)
    bar.ax.minorticks_off()
    bar.set_label("expert, by mean output")
