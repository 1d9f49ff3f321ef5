"""How many directions a cluster's inputs take, and how well its expert does."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from entangle.errors import InvalidInput
from entangle.plotting.axes import Entry, bootstrap_text
from entangle.plotting.predictors import lower_front, power_law
from entangle.plotting.save import record, sign
from entangle.plotting.style import (
    PALETTE,
    Column,
    axes_or_new,
    legend_above,
    log_locator,
    make_room,
    note_above,
    panel_grid,
    paper_style,
    plain_number,
)
from entangle.plotting.summaries import DECOMPOSE, Floats, check_columns, choose
from entangle.stats.intervals import spearman_interval

X_LABEL = "components for 90 % of the inputs' variance"
Y_LABEL = "reconstruction error (share of the variance)"
LOG_SPAN = 5.0
"""Largest over smallest number of components above which both axes are logarithmic."""
_COLUMNS = ("layer", "experts", "cluster", "tokens", "components_90", "error")
_VIRIDIS, _MARKERS = colormaps["viridis"], "os^DvP*X"


def plot_components(
    components: pd.DataFrame,
    *,
    layer: str | None = None,
    seed: int = 0,
    n_boot: int = 1000,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the error of every expert against the dimension of its inputs, with the lower front.

    Parameters
    ----------
    components
        ``components`` of a decomposition, a row a cluster: ``layer``, ``experts``, ``cluster``,
        ``tokens``, ``components_90`` (principal components that hold 90 % of the variance of the
        cluster's inputs) and ``error`` (squared error of the expert's outputs over the dense
        outputs' sum of squares about their mean).
    layer
        Which; may be left out where the table holds only one.
    seed, n_boot
        Of the bootstrap interval of Spearman's coefficient, over clusters.
    legend
        Write a legend on top; otherwise only what it says in words.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure, its axes logarithmic where the numbers of components span
        more than `LOG_SPAN`. Clusters whose numbers are not finite are left out and counted.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, a layer that the table does not hold, no cluster with finite numbers.

    Notes
    -----
    The front is made of the clusters that no other one beats: none has an error as low with as
    many components. Its line is the power law ``error = a * components ** b`` that least squares
    fit to the logarithms of the front's points; it is left out where these lie at one place. Two
    clusters at least, and both numbers positive, make a front.

    References
    ----------
    arXiv 2405.15756, figure 8.
    """
    rows = choose(components, name="components", layer=layer)
    rows, lost = _finite(rows)
    given, ax = ax is not None, axes_or_new(ax)
    entries = _draw(ax, rows)
    clauses = [
        f"{rows['layer'].iloc[0]}, n = {len(rows):,} clusters",
        *_rank(rows, n_boot=n_boot, seed=seed),
        *([f"{lost:,} clusters left out: not finite"] if lost else []),
    ]
    if not legend:
        note_above(ax, clauses)
        return ax
    key = legend_above(ax, entries, clauses=clauses)
    if not given:
        make_room(key)
    return ax


def figure_components(
    components: pd.DataFrame,
    *,
    layer: str | None = None,
    seed: int = 0,
    n_boot: int = 1000,
    column: Column = "single",
    digest: str | None = None,
) -> Figure:
    """Draw the error of every expert against the dimension of its inputs.

    Parameters
    ----------
    components, layer, seed, n_boot
        As in `plot_components`.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        One panel.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_components` refuses.

    References
    ----------
    arXiv 2405.15756, figure 8.
    """
    with paper_style(column=column):
        figure, (ax,) = panel_grid(1, column=column)
        plot_components(components, layer=layer, seed=seed, n_boot=n_boot, ax=ax)
        key = ax.get_legend()
        assert key is not None  # noqa: S101 - it was asked for
        make_room(key)
        return sign(figure, digest)


def _finite(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    check_columns(rows, _COLUMNS, name="components", writer=DECOMPOSE)
    numbers = rows[["components_90", "error"]].to_numpy(np.float64, na_value=np.nan)
    kept = np.isfinite(numbers).all(axis=1)
    if not kept.any():
        raise InvalidInput(
            "`components` must hold at least one cluster with finite numbers; got "
            f"{len(rows)} without; {DECOMPOSE}"
        )
    return rows[kept], int((~kept).sum())


def _rank(rows: pd.DataFrame, *, n_boot: int, seed: int) -> list[str]:
    x, y = rows[["components_90", "error"]].to_numpy(np.float64).T
    if len(x) < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return []
    rho = spearman_interval(x, y, n_boot=n_boot, seed=seed)
    text = f"Spearman ρ = {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]".replace("-", "−")
    return [text, bootstrap_text(n_boot=n_boot, seed=seed)]


def _draw(ax: Axes, rows: pd.DataFrame) -> list[Entry]:
    entries: list[Entry] = []
    numbers = sorted(map(int, rows["experts"].unique()))
    for place, k in enumerate(numbers):
        part = rows[rows["experts"] == k]
        x, y = part[["components_90", "error"]].to_numpy(np.float64).T
        name = "1 cluster" if k == 1 else f"{k} clusters"
        dots = ax.scatter(
            x, y, s=12.0, color=_VIRIDIS(0.85 * place / max(1, len(numbers) - 1)),
            marker=_MARKERS[place % len(_MARKERS)], linewidths=0.3, edgecolors="white", label=name,
        )  # fmt: skip
        record(
            dots, panel="components", series=name, x=x, y=y, experts=k,
            cluster=part["cluster"].to_numpy(), tokens=part["tokens"].to_numpy(),
        )  # fmt: skip
        entries.append((dots, name))
    x, y = rows[["components_90", "error"]].to_numpy(np.float64).T
    entries += _draw_front(ax, x, y)
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)
    if min(x.min(), y.min()) > 0.0 and LOG_SPAN * x.min() < x.max():
        _set_log(ax)
    else:
        ax.set_ylim(bottom=0.0)
    return entries


def _set_log(ax: Axes) -> None:
    """Make both axes logarithmic, on which a power law is a straight line."""
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(log_locator(high / low))
        axis.set_major_formatter(FuncFormatter(plain_number))
        axis.set_minor_locator(NullLocator())


def _draw_front(ax: Axes, x: Floats, y: Floats) -> list[Entry]:
    positive = (x > 0.0) & (y > 0.0)
    x, y = x[positive], y[positive]
    front = lower_front(x, y) if len(x) else np.empty(0, dtype=np.intp)
    if len(np.unique(x[front])) < 2:
        return []
    scale, exponent = power_law(x[front], y[front])
    place = np.geomspace(x[front].min(), x[front].max(), 100)
    name = f"front: error ∝ components^{exponent:.2f}".replace("-", "−")
    (line,) = ax.plot(
        place, scale * place**exponent, color=PALETTE["gaussian"], lw=1.0, label=name, zorder=1.9
    )
    record(line, panel="components", series="fitted front", x=place, y=scale * place**exponent)
    rings = ax.scatter(
        x[front], y[front], s=26.0, facecolors="none", edgecolors=PALETTE["gaussian"],
        linewidths=0.5,
    )  # fmt: skip
    record(rings, panel="components", series="front", x=x[front], y=y[front])
    return [(line, f"{name}\nfitted to the ringed {len(front)}")]
