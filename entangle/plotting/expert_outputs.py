"""A neuron's outputs, stacked by the expert that each token goes to."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entangle.plotting.options import FigureOptions, PlotOptions, picked
from entangle.plotting.outputs import Entry, output_limits, wd_text
from entangle.plotting.page import axes_level, figure_level, paper, share_axes
from entangle.plotting.save import record
from entangle.plotting.sparse_outputs import X_LABEL, Y_LABEL
from entangle.plotting.style import (
    KIND_PALETTE,
    NOMINAL,
    add_legend,
    add_note,
    add_title,
    axes_or_new,
    ink,
)
from entangle.plotting.summaries import (
    MOST_NAMED,
    Stack,
    choose,
    routed_neuron,
    stack_of,
    usual_neurons,
)

_OTHERS = "0.78"
_HUMP, _LEAST_MASS = 0.06, 0.01


@axes_level
def plot_experts(
    outputs: pd.DataFrame,
    *,
    neurons: pd.DataFrame,
    kind: str = "dense",
    layer: str | None = None,
    neuron: int | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    xlim: tuple[float, float] | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the outputs of one neuron, stacked by the expert that each token goes to.

    The experts lie on top of each other in the order of their mean dense output; the heights add up
    to the density of all tokens. Experts have colours without an order; if they are more than
    `MOST_NAMED`, those whose mean outputs lie farthest from the neuron's, and the others are grey.
    Where some of the tokens form a low hump apart from the others, an inset enlarges it.

    Parameters
    ----------
    outputs, neurons, layer, neuron, experts, sparsity
        As in `entangle.plotting.plot_sparse_output`, with two experts or more.
    kind
        ``"dense"`` or ``"sparse"``.
    xlim
        Limits of the x axis in σ; chosen from the outputs if None.
    legend
        Name the experts that have colours; otherwise only the number of tokens.
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
        Missing columns, something that the tables do not hold, one expert, a constant neuron.
    """
    rows = choose(
        outputs, name="outputs", layer=layer, neuron=neuron, experts=experts, sparsity=sparsity
    )
    stack = _picked_experts(stack_of(rows, routed_neuron(rows, neurons), kind))
    ax = axes_or_new(ax, options)
    entries = _draw_stack(ax, stack, xlim or _stack_limits([stack]))
    _zoom(ax, stack)
    add_title(ax, stack.title)
    note = f"n = {stack.whole.n:,} tokens"
    if legend:
        add_legend(ax, entries, side="left", skyline=stack.skyline)
    else:
        add_note(ax, [note], side="left", skyline=stack.skyline)
    return ax


@figure_level
def figure_experts(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw one neuron's outputs by expert, dense and sparse.

    Parameters
    ----------
    outputs, neurons, layer, sparsity
        As in `plot_experts`.
    neuron
        None takes the one with the largest WD.
    experts
        Number of experts; None takes the largest.
    options
        See `entangle.plotting.options.FigureOptions`.

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
    k = int(rows["experts"].max()) if experts is None else experts
    rows = choose(rows, name="outputs", experts=k)
    if neuron is None:
        of_layer = choose(neurons, name="neurons", layer=str(rows["layer"].iloc[0]))
        neuron = usual_neurons(of_layer, rows["neuron"].unique().tolist())[0][0]
    rows = choose(rows, name="outputs", neuron=neuron)
    item = routed_neuron(rows, neurons)
    kinds = picked(KIND_PALETTE, str, panels=True)
    stacks = [_picked_experts(stack_of(rows, item, kind)) for kind in kinds]
    with paper(options) as page:
        across = 1 if page.column == "single" else len(stacks)
        axes = page.grid(len(stacks), across=across, panel_inches=1.8)
        for ax, stack in zip(axes, stacks, strict=True):
            plot_experts(
                rows, neurons=neurons, kind=stack.kind, xlim=_stack_limits(stacks), legend=False,
                ax=ax,
            )  # fmt: skip
            add_title(ax, stack.kind)
        share_axes(page.figure, axes, across=across)
        tokens = stacks[0].tokens
        said = f"neuron {item.neuron} of {item.layer}, {wd_text(item.wd, None)}"
        caption = (
            f"Outputs of {said}, at {100 * item.sparsity:.4g}\u00a0%\u00a0zeros, stacked by the "
            f"expert that each of n = {stacks[0].whole.n:,}\u00a0tokens goes to: "
            f"{len(tokens)}\u00a0experts of {min(tokens):,} to {max(tokens):,} tokens",
            f"colours: the {MOST_NAMED} experts whose mean outputs lie farthest from the neuron's"
            if len(tokens) > MOST_NAMED else "",
            "insets: the low hump, enlarged",
        )  # fmt: skip
        return page.finish(caption, title=said)


def _stack_limits(stacks: Sequence[Stack]) -> tuple[float, float]:
    limits = [output_limits(stack.whole, center=0.0, scale=1.0) for stack in stacks]
    return min(low for low, _ in limits), max(high for _, high in limits)


def _picked_experts(stack: Stack) -> Stack:
    """Return the wanted experts, stacked in the wanted order."""
    kept = picked(range(len(stack.experts)), lambda i: f"expert {stack.experts[i]}", least=1)
    return replace(
        stack,
        experts=[stack.experts[i] for i in kept],
        density=stack.density[kept],
        tokens=[stack.tokens[i] for i in kept],
        means=stack.means[kept],
    )


def _draw_stack(
    ax: Axes, stack: Stack, xlim: tuple[float, float], *, recorded: bool = True
) -> list[Entry]:
    edges, entries = stack.whole.edges, list[Entry]()
    tops, named = np.cumsum(stack.density, axis=0), stack.named
    others = len(stack.experts) - len(named)
    for number, (expert, n) in enumerate(zip(stack.experts, stack.tokens, strict=True)):
        name, own = f"expert {expert}", number in named
        usual = NOMINAL[named.index(number)] if own else _OTHERS
        # Each over the next and down to 0: bands side by side leave a hairline of paper.
        bars = ax.stairs(
            tops[number], edges, fill=True, color=ink(name, usual), lw=0,
            zorder=2.0 - number / len(stack.experts),
        )  # fmt: skip
        if not recorded:
            continue
        record(
            bars, panel=stack.kind, series=name, x=edges[:-1], y=stack.density[number],
            x_right=edges[1:],
        )  # fmt: skip
        bars.set_label(name if own else "_")
        if own:
            entries.append((bars, f"{name} (n = {n:,})"))
        elif others:
            bars.set_label(f"{others} others")
            entries.append((bars, f"{others} others"))
            others = 0
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, xlim=xlim)
    return entries


def _zoom(ax: Axes, stack: Stack) -> None:
    """Enlarge the low hump beside the peak, where there is one and room above it."""
    x, y = stack.skyline
    (low, high), peak = ax.get_xlim(), int(np.argmax(y))
    below = np.flatnonzero(y < _HUMP * y[peak])
    before, after = below[below < peak], below[below > peak]
    sides = []
    if len(before):
        sides.append((low, float(x[before[-1]]), 0.04))
    if len(after):
        sides.append((float(x[after[0]]), high, 0.96))
    mass = [stack.whole.share_between(left, right) for left, right, _ in sides]
    if not mass or max(mass) < _LEAST_MASS:
        return
    left, right, corner = sides[int(np.argmax(mass))]
    labels = 0.3 / (ax.bbox.width / ax.figure.dpi)  # room for those of the inset's y axis
    width = (right - left) / (high - low) - labels
    if width < 0.18:
        return
    inset = ax.inset_axes((labels if corner < 0.5 else corner - width, 0.38, width, 0.42))
    _draw_stack(inset, stack, (left, right), recorded=False)
    inside = (x >= left) & (x <= right)
    inset.set(xlabel="", ylabel="", ylim=(0.0, 1.15 * float(y[inside].max())))
    inset.tick_params(labelsize=6.0, size=2.0)
    inset.xaxis.set_major_locator(MaxNLocator(3))
    inset.yaxis.set_major_locator(MaxNLocator(3))
    ax.indicate_inset_zoom(inset, edgecolor="0.4", lw=0.5)
