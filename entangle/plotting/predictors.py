"""What predicts the relative improvement of a neuron: scatters with fitted lines.

Straight lines through points, with bootstrap intervals: small functions, no drawing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.axes import OTHERS, Entry, bootstrap_text
from entangle.plotting.save import record, sign
from entangle.plotting.style import (
    PALETTE,
    Column,
    add_legend,
    add_title,
    axes_or_new,
    header_legend,
    panel_grid,
    paper_style,
    text_handle,
    wrap,
)
from entangle.plotting.summaries import (
    DECOMPOSE,
    TWO_EXPERTS,
    Floats,
    check_columns,
    check_top,
    choose,
)
from entangle.seeding import numpy_rng
from entangle.stats.intervals import Interval, percentiles, spearman_interval


@dataclass(frozen=True)
class LineFit:
    """A least-squares line, and how sure it is."""

    x: Floats
    """(places,) where the line is drawn, ascending."""
    y: Floats
    """(places,) its height."""
    low: Floats
    """(places,) lower end of the bootstrap interval of the height."""
    high: Floats
    """(places,) upper end."""
    slope: float
    """Of the line."""
    r2: Interval
    """Pearson's coefficient squared."""
    spearman: Interval
    """Spearman's rank correlation."""
    n: int
    """Points."""


def fit_line(
    x: Floats, y: Floats, *, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> LineFit:
    """Fit a line by least squares, with percentile bootstrap intervals over points.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).
    n_boot, seed, level
        Of the bootstrap, as in `entangle.stats.intervals.spearman_interval`.

    Raises
    ------
    InvalidInput
        Fewer than 3 points, a constant ``x`` or ``y``, or an option out of range.
    """
    spearman = spearman_interval(x, y, n_boot=n_boot, seed=seed, level=level)
    places = np.linspace(x.min(), x.max(), 50)
    rng, n = numpy_rng(seed, "line bootstrap"), len(x)
    z, t = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    slopes, middles, squares = np.empty((3, n_boot))
    for draw in range(n_boot):
        chosen = rng.integers(n, size=n)
        slopes[draw], middles[draw], squares[draw] = _line(z[chosen], t[chosen])
    slope, middle, r2 = _line(z, t)
    grid = (places - x.mean()) / x.std()
    heights = middles[:, None] + slopes[:, None] * grid
    tail = 50.0 * (1.0 - level)
    low, high = np.nanpercentile(heights, [tail, 100.0 - tail], axis=0)
    return LineFit(
        x=places,
        y=y.mean() + y.std() * (middle + slope * grid),
        low=y.mean() + y.std() * low,
        high=y.mean() + y.std() * high,
        slope=slope * y.std() / x.std(),
        r2=Interval(r2, *percentiles(squares, level, otherwise=r2)),
        spearman=spearman,
        n=n,
    )


def _line(x: Floats, y: Floats) -> tuple[float, float, float]:
    """Return slope, intercept and R²; NaN where ``x`` or ``y`` is constant."""
    dx, dy = x - x.mean(), y - y.mean()
    xx, yy, xy = dx @ dx, dy @ dy, dx @ dy
    if xx <= 0.0 or yy <= 0.0:
        return np.nan, np.nan, np.nan
    slope = xy / xx
    return float(slope), float(y.mean() - slope * x.mean()), float(xy * xy / (xx * yy))


def lower_front(x: Floats, y: Floats) -> NDArray[np.intp]:
    """Return which points no other one beats: none has a ``y`` as low at an ``x`` as high.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).

    Returns
    -------
    numpy.ndarray
        Indices of the points of the front by ascending ``x``; of equal points the first.
    """
    order = np.lexsort((np.arange(len(x)), y, -x))  # from the right, the lowest first
    best = np.minimum.accumulate(y[order])
    first = np.append(True, y[order][1:] < best[:-1])
    front: NDArray[np.intp] = order[first][::-1]
    return front


def power_law(x: Floats, y: Floats) -> tuple[float, float]:
    """Return scale and exponent of ``y = scale * x ** exponent``, least squares of logarithms.

    Raises
    ------
    InvalidInput
        Fewer than 2 different ``x``, or a value that is not positive.
    """
    if len(np.unique(x)) < 2 or not (x > 0.0).all() or not (y > 0.0).all():
        raise InvalidInput(
            "a power law must have positive values at 2 different places or more; got "
            f"{len(np.unique(x))} places and a smallest value of {min(x.min(), y.min()):.4g}."
        )
    exponent, log_scale = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_scale)), float(exponent)


RI_LABEL = "relative improvement, RI (ratio)"
_Column = Callable[[pd.DataFrame], pd.Series]

PREDICTORS: dict[str, tuple[str, str, _Column]] = {
    "wd": ("WD (σ)", "wd", lambda f: f["wd"]),
    "md": ("MD (ratio)", "md", lambda f: f["md"]),
    "abs_skewness": ("|skewness|", "skewness", lambda f: f["skewness"].abs()),
    "excess_kurtosis": ("excess kurtosis", "excess_kurtosis", lambda f: f["excess_kurtosis"]),
    "ks": ("KS distance", "ks", lambda f: f["ks"]),
    "abs_mean": ("|mean output| (model\u00a0units)", "mean", lambda f: f["mean"].abs()),
    "variance": ("output variance (model\u00a0units²)", "std", lambda f: f["std"] ** 2),
    "weight_norm": ("weight norm (model\u00a0units)", "weight_norm", lambda f: f["weight_norm"]),
    "gmm_components": ("components of a mixture", "gmm_components", lambda f: f["gmm_components"]),
}
"""Predictors by name: axis label, the column it is made from, and how. The column
``gmm_components`` comes from `entangle.experiments.outliers.gmm_components`."""


def plot_predictor(
    neurons: pd.DataFrame,
    *,
    predictor: str = "wd",
    layer: str | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    top: float = 0.03,
    seed: int = 0,
    n_boot: int = 200,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the relative improvement of every neuron against one predictor, with a fitted line.

    Parameters
    ----------
    neurons
        ``neurons`` of a decomposition: ``layer``, ``neuron``, ``experts``, ``sparsity``, ``wd``,
        ``ri`` and the predictor's column.
    predictor
        A key of `PREDICTORS`.
    layer, experts, sparsity
        Which; may be left out where the table holds only one.
    top
        Share in (0, 1] of the neurons, by WD, to draw in another colour.
    seed, n_boot
        Of the bootstrap over neurons.
    legend
        Write a legend; otherwise only the coefficients, above the panel.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure: the points, the least-squares line with the pointwise
        95 % bootstrap interval of its height, R² and Spearman's ρ with theirs.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, something that the table does not hold, fewer than 3 neurons with finite
        values, a predictor or RI that is the same for all.

    References
    ----------
    arXiv 2405.15756, figure 7.
    """
    rows = choose(neurons, name="neurons", layer=layer, experts=experts, sparsity=sparsity)
    check_top(top)
    points, lost = _points(rows, predictor)
    fit = fit_line(points["x"].to_numpy(), points["y"].to_numpy(), n_boot=n_boot, seed=seed)
    ax = axes_or_new(ax)
    entries = _draw(ax, points, fit, predictor, top)
    if legend:
        finite = f"{lost:,} left out: not finite" if lost else ""
        boot = bootstrap_text(n_boot=n_boot, seed=seed)
        note = "\n".join(filter(None, (*_coefficients(fit), boot, finite)))
        x, y = points["x"].to_numpy(), points["y"].to_numpy()
        add_legend(ax, [*entries, (text_handle(), note)], side="left", skyline=(x, y))
    else:
        left_out = [f"{lost:,}\u00a0not\u00a0finite"] if lost else []
        add_title(ax, "\n".join((*_coefficients(fit), f"n = {fit.n:,}", *left_out)))
    return ax


def figure_predictors(
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    top: float = 0.03,
    seed: int = 0,
    n_boot: int = 200,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw RI against every predictor that the table holds, one panel each.

    Parameters
    ----------
    neurons, layer, sparsity, top, seed, n_boot
        As in `plot_predictor`.
    experts
        Number of experts; None takes the largest.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with a common y axis. Predictors without 3 finite, different values are left out.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_predictor` refuses for WD.

    References
    ----------
    arXiv 2405.15756, figure 7.
    """
    rows = choose(neurons, name="neurons", layer=layer, sparsity=sparsity)
    check_columns(rows, ("experts", "wd", "ri"), name="neurons", writer=DECOMPOSE)
    k = int(rows["experts"].max()) if experts is None else experts
    rows = choose(rows, name="neurons", experts=k)
    if k == 1:
        raise InvalidInput(f"relative improvement over one expert {TWO_EXPERTS}")
    names = [name for name in PREDICTORS if name == "wd" or _usable(rows, name)]
    across = 2 if column == "single" else min(4, len(names))
    with paper_style(column=column):
        figure, axes = panel_grid(len(names), column=column, across=across)
        figure.set_figheight(-(-len(names) // across) * (1.6 if column == "single" else 1.7))
        for number, (ax, name) in enumerate(zip(axes, names, strict=True)):
            plot_predictor(
                rows, predictor=name, top=top, seed=seed, n_boot=n_boot, legend=False, ax=ax
            )
            ax.set(xlabel=wrap(ax, ax.get_xlabel(), size=7.0), ylabel="")
            ax.sharey(axes[0])
            ax.tick_params(labelleft=number % across == 0)
        figure.supylabel(RI_LABEL, fontsize=7.0)
        first = rows.iloc[0]
        clauses = [
            f"{first['layer']}, {k} experts, {100 * first['sparsity']:.4g}\u00a0%\u00a0zeros",
            f"lines: least squares; band and brackets: {bootstrap_text(n_boot=n_boot, seed=seed)}",
        ]
        header_legend(figure, axes, column=column, clauses=clauses)
        return sign(figure, digest)


def _usable(rows: pd.DataFrame, predictor: str) -> bool:
    _, source, _ = PREDICTORS[predictor]
    if source not in rows.columns:
        return False
    x, y = _finite(rows, predictor)[["x", "y"]].to_numpy().T
    return len(x) >= 3 and bool(np.ptp(x) > 0.0) and bool(np.ptp(y) > 0.0)


def _points(rows: pd.DataFrame, predictor: str) -> tuple[pd.DataFrame, int]:
    """Return ``neuron``, ``wd``, ``x`` and ``y`` of what can be drawn, and how many cannot."""
    predictor = choice("predictor", predictor, PREDICTORS)
    needed = ("neuron", "wd", "ri", PREDICTORS[predictor][1])
    check_columns(rows, tuple(dict.fromkeys(needed)), name="neurons", writer=DECOMPOSE)
    points = _finite(rows, predictor)
    if len(points) < 3:
        raise InvalidInput(
            f"`neurons` must hold at least 3 neurons with finite RI and {predictor}; got "
            f"{len(points)} of {len(rows)}; {DECOMPOSE}"
        )
    return points, len(rows) - len(points)


def _finite(rows: pd.DataFrame, predictor: str) -> pd.DataFrame:
    values = {"wd": rows["wd"], "x": PREDICTORS[predictor][2](rows), "y": rows["ri"]}
    table: pd.DataFrame = pd.DataFrame(values).astype(np.float64)
    kept = np.isfinite(table[["x", "y"]].to_numpy()).all(axis=1)
    chosen: pd.DataFrame = table.assign(neuron=rows["neuron"])[kept]
    return chosen


def _coefficients(fit: LineFit) -> list[str]:
    ends = (("R²", fit.r2, ".2f"), ("ρ", fit.spearman, ".2f"))
    return [
        f"{name}\u00a0{i.value:{spec}} [{i.low:{spec}},\u00a0{i.high:{spec}}]".replace("-", "−")
        for name, i, spec in ends
    ]


def _draw(ax: Axes, points: pd.DataFrame, fit: LineFit, name: str, top: float) -> list[Entry]:
    wd = points["wd"].fillna(-np.inf).to_numpy()
    is_top = np.zeros(len(wd), dtype=np.bool_)
    is_top[np.argsort(-wd, kind="stable")[: max(1, round(top * len(wd)))]] = True
    entries: list[Entry] = []
    top_name = f"top {100 * top:.3g} % by WD"
    for mask, role, series, size in (
        (~is_top, "typical", OTHERS, 3.0),
        (is_top, "top", top_name, 6.0),
    ):
        part = points[mask]
        dots = ax.scatter(
            part["x"], part["y"], s=size, color=PALETTE[role], alpha=0.6, linewidths=0,
            label=series, rasterized=len(points) > 1000,
        )  # fmt: skip
        record(
            dots, panel=name, series=series, x=part["x"].to_numpy(), y=part["y"].to_numpy(),
            neuron=part["neuron"].to_numpy(),
        )  # fmt: skip
        entries.append((dots, f"{series} (n = {mask.sum():,})"))
    entries.append(_draw_line(ax, fit, name))
    ax.set(xlabel=PREDICTORS[name][0], ylabel=RI_LABEL)
    return entries


def _draw_line(ax: Axes, fit: LineFit, name: str) -> Entry:
    color: str = PALETTE["gaussian"]
    ax.fill_between(fit.x, fit.low, fit.high, color=color, alpha=0.2, lw=0, zorder=2.1)
    (line,) = ax.plot(fit.x, fit.y, color=color, lw=1.0, zorder=2.2, label="fitted line, 95 %")
    drawn: dict[str, Floats] = {"x": fit.x, "y": fit.y, "y_low": fit.low, "y_high": fit.high}
    record(line, panel=name, series="fitted line", **drawn)
    return line, "fitted line, 95 %"
