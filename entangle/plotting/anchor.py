"""Whether scores tell how many atoms a neuron reads: rank correlations by dictionary."""

from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, picked
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.predictors import PREDICTORS
from entangle.plotting.save import record
from entangle.plotting.style import NOMINAL, axes_or_new, explain_above, ink
from entangle.plotting.summaries import check_columns

_WRITER = "the command `entangle anchor` writes such a table."
_MEASURES = {
    "spearman": "Spearman's ρ with atoms read",
    "partial": "partial ρ, controls held fixed",
}
_SCOPES = ("layer", "mean of layers", "pooled ranks")


@axes_level
def plot_anchor(
    correlations: pd.DataFrame,
    *,
    measure: str = "spearman",
    scope: str | None = None,
    layer: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw the rank correlation of every score with the atoms read, by dictionary.

    Parameters
    ----------
    correlations
        `Anchor.correlations`.
    measure
        ``spearman`` or ``partial``.
    scope, layer
        Which rows: by default the mean of layers, or of one layer those of it.
    legend
        Write a legend.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure: a point with its interval for each score and dictionary.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, no such measure, scope or layer, nothing that is finite.
    """
    measure = choice("measure", measure, _MEASURES)
    rows = _rows(correlations, measure, scope, layer)
    own, ax = ax is None, axes_or_new(ax, options)
    scores = rows["predictor"].drop_duplicates().tolist()
    height = {name: place for place, name in enumerate(reversed(scores))}
    groups = list(rows.groupby("dictionary", sort=False))
    entries: list[tuple[Artist, str]] = []
    ax.axvline(0, color="0.7", lw=0.6, zorder=0.5)
    colored = list(zip(np.resize(NOMINAL, len(groups)), groups, strict=True))
    for place, (color, (name, part)) in picked(
        list(enumerate(colored)), lambda one: str(one[1][1][0])
    ):
        shift = 0.5 * ((len(groups) - 1) / 2 - place) / len(groups)
        y = part["predictor"].map(height).to_numpy(np.float64) + shift
        x, low, high = (part[f"{measure}{end}"].to_numpy() for end in ("", "_low", "_high"))
        mark = ink(str(name), color)
        ax.hlines(y, low, high, color=mark, lw=1.0)
        (dots,) = ax.plot(x, y, "o", color=mark, ms=3.0, label=str(name))
        record(
            dots, panel=measure, series=str(name), x=x, y=y, x_low=low, x_high=high,
            score=part["predictor"].to_numpy(str),
        )  # fmt: skip
        entries.append((dots, str(name)))
    names = [PREDICTORS[one][0].partition(" (")[0] if one in PREDICTORS else one for one in scores]
    ax.set_yticks([height[one] for one in scores], names)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    seen = f"(n = {int(rows['n'].max()):,} rows)"
    ax.set(xlabel=f"{_MEASURES[measure]} {seen}", ylabel="score", ylim=(-0.6, len(scores) - 0.4))
    explain_above(ax, entries, legend=legend, own=own)
    return ax


def _rows(
    correlations: pd.DataFrame, measure: str, scope: str | None, layer: str | None
) -> pd.DataFrame:
    """Return the rows of one scope that can be drawn."""
    columns = ("dictionary", "scope", "layer", "predictor", measure, f"{measure}_low")
    check_columns(correlations, columns, name="correlations", writer=_WRITER)
    own = correlations[correlations["scope"] == "layer"]["layer"].drop_duplicates().tolist()
    if layer is not None:
        layer, scope = choice("layer", layer, own), "layer"
    scope = ("mean of layers" if len(own) > 1 else "layer") if scope is None else scope
    rows: pd.DataFrame = correlations[correlations["scope"] == choice("scope", scope, _SCOPES)]
    if scope == "layer":
        rows = rows[rows["layer"] == (own[0] if layer is None and own else layer)]
    rows = rows[np.isfinite(rows[measure])]
    if rows.empty:
        raise InvalidInput(
            f"`correlations` must hold a finite {measure} of scope {scope!r}; got none of "
            f"{len(correlations)} rows: score more neurons."
        )
    return rows


@figure_level
def figure_anchor(
    correlations: pd.DataFrame,
    *,
    scope: str | None = None,
    layer: str | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw rank correlations of scores with the atoms read, without and with controls.

    Parameters
    ----------
    correlations, scope, layer
        As in `plot_anchor`.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        One panel, or two where partial correlations are there.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_anchor` refuses.
    """
    check_columns(correlations, ("partial",), name="correlations", writer=_WRITER)
    known = [name for name in _MEASURES if np.isfinite(correlations[name]).any()]
    shown = picked(known or ["spearman"], str, panels=True)
    with paper(options, column="double" if len(shown) > 1 else "single") as page:
        axes = page.grid(len(shown), across=len(shown), panel_inches=2.2)
        for ax, measure in zip(axes, shown, strict=True):
            plot_anchor(
                correlations, measure=measure, scope=scope, layer=layer, legend=False, ax=ax
            )
            ax.sharex(axes[0])
        rows = _rows(correlations, shown[0], scope, layer)
        where = str(rows["layer"].iloc[0]) or f"{int(rows['n_layers'].max())} layers"
        caption = (
            "Rank correlation of a neuron's scores with the number of atoms that it reads, by "
            f"dictionary of the inputs; {where}, n = {int(rows['n'].max()):,} neurons",
            "intervals: 95 %; over neurons by bootstrap, of a mean of layers Student's over layers",
        )
        return page.finish(caption, title=where)
