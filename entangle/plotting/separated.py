"""Pairs of tokens that look alike to a layer and that one neuron sets apart."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.checks import whole
from entangle.plotting.axes import Entry, output_limits
from entangle.plotting.modes import (
    X_LABEL,
    ContextLine,
    HeadLine,
    Line,
    beside_table,
    neuron_title,
    signed,
    write_lines,
)
from entangle.plotting.save import record, sign
from entangle.plotting.sparse_outputs import Y_LABEL
from entangle.plotting.style import PALETTE, Column, add_title, axes_or_new, paper_style
from entangle.plotting.summaries import (
    DECOMPOSE,
    OutputDensity,
    check_columns,
    choose,
    output_density,
)

MOST_PAIRS = 12
_SIDES = ("a", "b")
_COLUMNS = (
    "layer", "neuron", "rank", "output_a", "output_b", "token_a", "token_b", "context_a",
    "context_b", "start_a", "end_a", "start_b", "end_b", "input_distance", "cosine",
    "output_distance",
)  # fmt: skip
_COLORS: list[str] = [sns.color_palette("colorblind").as_hex()[i] for i in (3, 0, 2, 4, 1, 5)]


def plot_separated_pairs(
    separated: pd.DataFrame,
    *,
    histogram: pd.DataFrame,
    mean: float,
    std: float,
    layer: str | None = None,
    neuron: int | None = None,
    most: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Draw one neuron's outputs, and above them the pairs that it separates most.

    Parameters
    ----------
    separated
        ``separated`` of a decomposition, a row a pair: ``layer``, ``neuron``, ``rank``,
        ``output_a`` and ``output_b`` (model units), and for `figure_separated_pairs` tokens and
        contexts.
    histogram, mean, std
        Of the neuron's outputs, in model units, as in `entangle.plotting.plot_output_distribution`.
    layer, neuron
        Which; may be left out where ``separated`` holds only one.
    most
        Pairs to mark, the first by ``rank``, at most `MOST_PAIRS`.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure: a line a pair, full dot a, hollow dot b, with its number.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, something that the table does not hold, a constant neuron.
    """
    rows = _pairs(separated, layer, neuron, most)
    name = f"neuron {rows['neuron'].iloc[0]}"
    shape = output_density(histogram, mean=mean, std=std, label=name)
    ax = axes_or_new(ax)
    _draw(ax, rows, shape, mean, std)
    add_title(ax, f"{name}, n = {shape.n:,} tokens")
    return ax


def figure_separated_pairs(
    separated: pd.DataFrame,
    histogram: pd.DataFrame,
    *,
    mean: float,
    std: float,
    wd: float | None = None,
    layer: str | None = None,
    neuron: int | None = None,
    most: int = 5,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw the token pairs that one neuron separates most, with their contexts.

    Parameters
    ----------
    separated, histogram, mean, std, layer, neuron, most
        As in `plot_separated_pairs`.
    wd
        The neuron's WD in σ, for the title.
    column
        Width: ``"single"`` puts the texts below the distribution, ``"double"`` beside it.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        The distribution with the pairs marked, and the pairs' texts with the outputs in σ.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_separated_pairs` refuses.
    """
    rows = _pairs(separated, layer, neuron, most)
    first = rows.iloc[0]
    shape = output_density(histogram, mean=mean, std=std, label=f"neuron {first['neuron']}")
    lines = _lines(rows, mean, std)
    with paper_style(column=column):
        figure, panel, table = beside_table(len(lines), column=column)
        _draw(panel, rows, shape, mean, std)
        write_lines(table, lines)
        figure.draw_without_rendering()  # the panel's width decides how the title is broken
        title = neuron_title(int(first["neuron"]), str(first["layer"]), wd, shape.n)
        add_title(panel, title)
        return sign(figure, digest)


def _pairs(
    separated: pd.DataFrame, layer: str | None, neuron: int | None, most: int
) -> pd.DataFrame:
    check_columns(separated, _COLUMNS, name="separated", writer=DECOMPOSE)
    rows = choose(separated, name="separated", layer=layer, neuron=neuron)
    return rows.sort_values("rank", kind="stable").head(
        min(whole("most", most, least=1), MOST_PAIRS)
    )


def _draw(
    ax: Axes, rows: pd.DataFrame, shape: OutputDensity, mean: float, std: float
) -> list[Entry]:
    left, right = shape.edges[:-1], shape.edges[1:]
    bars = ax.stairs(
        shape.density, shape.edges, fill=True, lw=0, alpha=0.7, color=PALETTE["typical"]
    )
    record(bars, panel="pairs", series="output", x=left, y=shape.density, x_right=right)
    entries: list[Entry] = [(bars, "output")]
    low, high = output_limits(shape, center=0.0, scale=1.0)
    room = 0.06 * (len(rows) + 1)
    top = float(shape.density.max()) / (1.0 - room) * 1.05
    ends = (rows[["output_a", "output_b"]].to_numpy(np.float64) - mean) / std
    low, high = min(low, 1.05 * ends.min()), max(high, 1.05 * ends.max())
    for place, ((_, row), (a, b)) in enumerate(zip(rows.iterrows(), ends, strict=True)):
        color, y = _COLORS[place % len(_COLORS)], top * (1.0 - 0.06 * (place + 0.7))
        (line,) = ax.plot(
            [a, b], [y, y], "-o", color=color, lw=0.9, ms=3.0, markevery=[0], zorder=3
        )
        ax.plot([b], [y], "o", color=color, ms=3.0, mfc="white", mew=0.8, zorder=3)
        record(
            line, panel="pairs", series=f"pair {row['rank']}", x=[a, b], y=y,
            cosine=float(row["cosine"]), input_distance=float(row["input_distance"]),
        )  # fmt: skip
        ax.annotate(
            str(row["rank"]), (max(a, b), y), xytext=(4.0, 0.0), textcoords="offset points",
            ha="left", va="center", fontsize=6.0, color=color, annotation_clip=True,
        )  # fmt: skip
        entries.append((line, f"pair {row['rank']}"))
    pad = 0.06 * (high - low)
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL, xlim=(low, high + pad), ylim=(0.0, top))
    return entries


def _lines(rows: pd.DataFrame, mean: float, std: float) -> list[Line]:
    lines: list[Line] = []
    for place, (_, row) in enumerate(rows.iterrows()):
        color = _COLORS[place % len(_COLORS)]
        numbers = (
            f"outputs {row['output_distance']:.2f} σ apart; "
            f"inputs: cosine {row['cosine']:.3f}, distance {row['input_distance']:.3g}"
        ).replace("-", "−")
        lines.append(HeadLine(f"pair {row['rank']}: {numbers}", color=color))
        lines += [_context(row, side, color, mean, std) for side in _SIDES]
    return lines


def _context(row: pd.Series, side: str, color: str, mean: float, std: float) -> ContextLine:
    text, output = str(row[f"context_{side}"]), float(row[f"output_{side}"])
    start, end = int(row[f"start_{side}"]), int(row[f"end_{side}"])
    mark = "●" if side == "a" else "○"
    return ContextLine(
        before=text[:start],
        token=text[start:end],
        after=text[end:],
        note=f"{mark}{signed((output - mean) / std):>6}",
        color=color,
        series=f"pair {row['rank']}, {side}",
        output=output,
    )
