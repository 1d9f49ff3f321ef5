"""Views that need only scores: a neuron's distribution, and its place in the layer."""

import numpy as np
import pandas as pd

from entangle.errors import InvalidInput
from entangle.explorer.content import Content, picture
from entangle.explorer.table import NeuronTable
from entangle.html_tables import escaped, number
from entangle.plotting import (
    PALETTE,
    figure_wd_distribution,
    paper_style,
    plot_output_distribution,
)
from entangle.plotting.style import PaperFigure
from entangle.scoring.scores import NeuronScores

PANEL_INCHES = (4.4, 2.7)
_FACTS = {
    "md": "MD {}",
    "ks": "KS {}",
    "skewness": "skewness {}",
    "excess_kurtosis": "excess kurtosis {}",
    "mean": "mean {}",
    "std": "std {}",
    "weight_norm": "weight norm {}",
}


def heading(table: NeuronTable, layer: str, neuron: int, floor: float) -> str:
    """Return the name of a neuron with its scores, as HTML."""
    row = table.row(neuron)
    rank, count = table.rank(neuron), len(table.frame)
    wd = f"<b>WD {number(float(row['wd']))}</b> ± {number(float(row['wd_se']), 2)} σ"
    place = "no rank" if rank is None else f"rank {rank:,} of {count:,}"
    flag = f"; <b>{escaped(row['flag'])}</b>" if row.get("flag", "") else ""
    facts = ", ".join(
        text.format(number(float(row[name]), 3)) for name, text in _FACTS.items() if name in row
    )
    return (
        f'<div class="entangle-heading"><b>{escaped(layer)} · neuron {neuron}</b><br>'
        f"{wd} ({place}, Gaussian floor {number(floor, 2)}){flag}<br>{facts}</div>"
    )


def distribution_view(scores: NeuronScores, row: pd.Series) -> Content:
    """Show the outputs of a neuron over the Gaussian of the same mean and deviation."""
    layer, neuron = str(row["layer"]), int(row["neuron"])
    with paper_style(column="single"):
        figure = PaperFigure(figsize=PANEL_INCHES, layout="constrained")
        try:
            plot_output_distribution(
                scores.histogram(layer, neuron),
                mean=float(row["mean"]),
                std=float(row["std"]),
                wd=float(row["wd"]),
                wd_se=float(row["wd_se"]),
                ax=figure.subplots(),
            )
        except InvalidInput as error:
            return Content(html=f"<p>{escaped(error)}</p>")
        return Content((picture(figure),))


def layer_view(scores: NeuronScores, row: pd.Series) -> Content:
    """Show the WD of all neurons of the layer, and where this one is."""
    layer = scores.layer(str(row["layer"]))
    try:
        figure = figure_wd_distribution(layer.frame, layer.layers, column="single")
    except InvalidInput as error:
        return Content(html=f"<p>{escaped(error)}</p>")
    wd = float(row["wd"])
    if np.isfinite(wd):
        with paper_style(column="single"):
            ax = figure.axes[0]
            ax.axvline(wd, ymax=0.7, color=PALETTE["gaussian"], lw=1.0, ls="--")
            ax.annotate(
                f"neuron {row['neuron']}",
                (wd, 0.4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                xytext=(-2, 0),
                rotation=90,
                ha="right",
                va="center",
                fontsize=6.5,
            )
    figure.set_size_inches(*PANEL_INCHES)
    return Content((picture(figure),))
