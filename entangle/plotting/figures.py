"""Figure-level plots: several panels that share axes, colours and one legend.

Every function draws in `paper_style` and returns a figure that pyplot does not know; `drawn` gives
the numbers in it, `save_figure` writes both.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from entangle.checks import several
from entangle.errors import InvalidInput
from entangle.plotting.axes import (
    SE_TEXT,
    bin_count,
    bootstrap_text,
    output_limits,
    plot_output_distribution,
    plot_wd_against_md,
    plot_wd_distribution,
    wd_edges,
    wd_text,
)
from entangle.plotting.save import sign
from entangle.plotting.style import (
    Column,
    Role,
    add_title,
    column_width,
    join_clauses,
    panel_grid,
    paper_style,
    share_axes,
    shared_legend,
)
from entangle.plotting.summaries import (
    TopSplit,
    check_columns,
    check_top,
    output_density,
    split_top,
)

MAX_PANELS = 40
_MOST_UNEQUAL = 4.0

_ROLES: tuple[Role, Role] = ("top", "typical")

HistogramOf = Callable[[str, int], pd.DataFrame]
"""From a layer's full name and a neuron's number to that neuron's histogram."""


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
        )


def layer_label(row: pd.Series) -> str:
    """Return a short title for the layer of a row: block and projection, else its full name."""
    block, projection = row.get("block"), row.get("projection")
    if pd.isna(block) or pd.isna(projection):
        return str(row["layer"])
    return f"block {block} · {projection}"


def figure_wd_distribution(
    scores: pd.DataFrame,
    layers: pd.DataFrame,
    *,
    top: float = 0.03,
    column: Column = "double",
    digest: str | None = None,
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
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

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
    with paper_style(column=column):
        figure, axes = panel_grid(len(panels), column=column)
        for ax, rows, floor in zip(axes, panels, floors, strict=True):
            plot_wd_distribution(rows, floor=floor, top=top, bins=edges, legend=alone, ax=ax)
            add_title(ax, layer_label(rows.iloc[0]))
        share_axes(figure, axes, column=column)
        shared_legend(figure, axes, column=column)
        return sign(figure, digest)


def figure_output_distributions(
    items: NeuronOutput | Iterable[NeuronOutput],
    *,
    standardized: bool = True,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw the outputs of chosen neurons with the fitted Gaussian, one panel a neuron.

    Parameters
    ----------
    items
        The neurons, in the order of the panels.
    standardized
        Draw every neuron in its standard deviations, on one common x axis; otherwise each in its
        own units.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

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
    return _draw_outputs(wanted, standardized=standardized, column=column, digest=digest)


def figure_top_and_typical(
    scores: pd.DataFrame,
    histogram_of: HistogramOf,
    *,
    column: Column = "single",
    digest: str | None = None,
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
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

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
    kept = f"{layer_label(rows[0])}: largest and median WD of {len(split.frame):,} neurons"
    clauses = [kept, split.dropped] if split.dropped else [kept]
    title = join_clauses(clauses, inches=column_width(column), size=6.5)
    return _draw_outputs(items, column=column, title=title, digest=digest)


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


def figure_wd_against_md(
    scores: pd.DataFrame,
    *,
    top: float = 0.03,
    seed: int = 0,
    n_boot: int = 1000,
    column: Column = "double",
    digest: str | None = None,
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
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

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
    with paper_style(column=column):
        figure, axes = panel_grid(len(panels), column=column)
        for ax, rows in zip(axes, panels, strict=True):
            plot_wd_against_md(rows, top=top, seed=seed, n_boot=n_boot, legend=alone, ax=ax)
            add_title(ax, layer_label(rows.iloc[0]))
        share_axes(figure, axes, column=column, most_unequal=_MOST_UNEQUAL)
        text = f"ρ: Spearman, {bootstrap_text(n_boot=n_boot, seed=seed)}"
        shared_legend(figure, axes, column=column, extra=text)
        return sign(figure, digest)


def _draw_outputs(
    items: Sequence[NeuronOutput],
    *,
    standardized: bool = True,
    column: Column,
    title: str = "",
    digest: str | None,
) -> Figure:
    _check_panels(len(items), name="items", kind="neuron")
    xlim = _common_limits(items) if standardized else None
    longest = max(len(item.label) for item in items)
    alone = len(items) == 1
    with paper_style(column=column):
        figure, axes = panel_grid(len(items), column=column, longest_title=longest)
        for ax, item in zip(axes, items, strict=True):
            plot_output_distribution(
                item.histogram,
                mean=item.mean,
                std=item.std,
                wd=item.wd,
                wd_se=item.wd_se,
                label=item.label,
                standardized=standardized,
                role=item.role,
                xlim=xlim,
                legend=alone,
                ax=ax,
            )
        if standardized:
            share_axes(figure, axes, column=column)
        known = any("±" in wd_text(item.wd, item.wd_se) for item in items)
        extra = SE_TEXT if known else ""
        shared_legend(figure, axes, column=column, title=title, extra=extra)
        return sign(figure, digest)


def _by_layer(scores: pd.DataFrame, *, needed: Sequence[str]) -> list[pd.DataFrame]:
    check_columns(scores, needed, name="scores")
    _check_panels(scores["layer"].nunique(), name="scores", kind="layer")
    return [rows for _, rows in scores.groupby("layer", sort=False, observed=True)]


def _check_panels(n: int, *, name: str, kind: str) -> None:
    if not 1 <= n <= MAX_PANELS:
        raise InvalidInput(
            f"`{name}` must hold 1 to {MAX_PANELS} {kind}s for one figure; got {n:,}; "
            f"choose some of them."
        )


def _floor_of(layers: pd.DataFrame, name: str) -> tuple[float, float]:
    rows = layers.loc[layers["layer"] == name, ["null_floor", "null_floor_high"]]
    if len(rows) != 1:
        raise InvalidInput(
            f"`layers` must have one row for every layer in `scores`; got {len(rows)} for "
            f"{name!r}; "
            "use both tables of one run of `entangle score`."
        )
    mean, high = rows.to_numpy(dtype=np.float64)[0]
    return float(mean), float(high)


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
