"""What predicts how well experts do: scatters with fitted lines, of neurons and of clusters.

Straight lines, fronts and power laws through points: small functions, no drawing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.options import FigureOptions, PlotOptions, asked_for, choosing, picked
from entangle.plotting.outputs import Entry
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.scores import OTHERS, bootstrap_text
from entangle.plotting.style import (
    add_legend,
    add_title,
    axes_or_new,
    explain_above,
    ink,
    log_locator,
    plain_number,
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
    finite_rows,
    top_mask,
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


FITTED = "fitted line"
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


@axes_level
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
    **options: Unpack[PlotOptions],
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
    options
        See `entangle.plotting.options.PlotOptions`.

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
    ax = axes_or_new(ax, options)
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


@figure_level
def figure_predictors(
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    experts: int | None = None,
    sparsity: float | None = None,
    top: float = 0.03,
    seed: int = 0,
    n_boot: int = 200,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw RI against every predictor that the table holds, one panel each.

    Parameters
    ----------
    neurons, layer, sparsity, top, seed, n_boot
        As in `plot_predictor`.
    experts
        Number of experts; None takes the largest.
    options
        See `entangle.plotting.options.FigureOptions`.

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
    names = picked(names, lambda name: (name, PREDICTORS[name][0]), panels=True)
    with paper(options) as page:
        across = 2 if page.column == "single" else min(4, len(names))
        axes = page.grid(len(names), across=across, panel_inches=1.65)
        for number, (ax, name) in enumerate(zip(axes, names, strict=True)):
            plot_predictor(
                rows, predictor=name, top=top, seed=seed, n_boot=n_boot, legend=False, ax=ax
            )
            ax.set(xlabel=wrap(ax, ax.get_xlabel(), size=7.0), ylabel="")
            ax.sharey(axes[0])
            ax.tick_params(labelleft=number % across == 0)
        page.figure.supylabel(RI_LABEL)
        layer, zeros = str(rows["layer"].iloc[0]), 100 * rows["sparsity"].iloc[0]
        caption = (
            f"What predicts the relative improvement (RI) of the neurons of {layer} by {k} experts "
            f"at {zeros:.4g}\u00a0% zeros, a point a neuron",
            f"lines: least squares; band and brackets: {bootstrap_text(n_boot=n_boot, seed=seed)}",
        )
        return page.finish(caption, title=f"{layer}, {k} experts, {zeros:.4g}\u00a0% zeros")


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
    is_top = top_mask(wd, top)
    entries: list[Entry] = []
    top_name = f"top {100 * top:.3g} % by WD"
    groups = [(~is_top, "typical", OTHERS, 3.0), (is_top, "top", top_name, 6.0)]
    for mask, role, series, size in picked(groups, lambda group: (group[2], group[1])):
        part = points[mask]
        dots = ax.scatter(
            part["x"], part["y"], s=size, color=ink(role, None, series), alpha=0.6,
            linewidths=0, label=series, rasterized=len(points) > 1000,
        )  # fmt: skip
        record(
            dots, panel=name, series=series, x=part["x"].to_numpy(), y=part["y"].to_numpy(),
            neuron=part["neuron"].to_numpy(),
        )  # fmt: skip
        entries.append((dots, f"{series} (n = {mask.sum():,})"))
    if asked_for(FITTED):
        entries.append(_draw_line(ax, fit, name))
    ax.set(xlabel=PREDICTORS[name][0], ylabel=RI_LABEL)
    return entries


def _draw_line(ax: Axes, fit: LineFit, name: str) -> Entry:
    color = ink("gaussian", None, FITTED)
    ax.fill_between(fit.x, fit.low, fit.high, color=color, alpha=0.2, lw=0, zorder=2.1)
    (line,) = ax.plot(fit.x, fit.y, color=color, lw=1.0, zorder=2.2, label=f"{FITTED}, 95 %")
    drawn: dict[str, Floats] = {"x": fit.x, "y": fit.y, "y_low": fit.low, "y_high": fit.high}
    record(line, panel=name, series=FITTED, **drawn)
    return line, f"{FITTED}, 95 %"


_DIMENSION = "components for 90 % of the inputs' variance"
_ERROR = "reconstruction error (share of the variance)"
LOG_SPAN = 5.0
"""Largest over smallest number of components above which both axes are logarithmic."""
_NEEDED = ("layer", "experts", "cluster", "tokens", "components_90", "error")
_VIRIDIS, _SIGNS = colormaps["viridis"], "os^DvP*X"


@axes_level
def plot_components(
    components: pd.DataFrame,
    *,
    layer: str | None = None,
    seed: int = 0,
    n_boot: int = 1000,
    legend: bool = True,
    notes: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
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
        Write a legend on top.
    notes
        Say on top, in words, what is shown.
    ax
        Where to draw; None makes a new figure.
    options
        See `entangle.plotting.options.PlotOptions`.

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
    rows, lost = _fitted(rows)
    own, ax = ax is None, axes_or_new(ax, options)
    entries = _draw_clusters(ax, rows)
    said = _component_notes(rows, lost, n_boot=n_boot, seed=seed) if notes else []
    explain_above(ax, entries, said, legend=legend, own=own)
    return ax


@figure_level
def figure_components(
    components: pd.DataFrame,
    *,
    layer: str | None = None,
    seed: int = 0,
    n_boot: int = 1000,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw the error of every expert against the dimension of its inputs.

    Parameters
    ----------
    components, layer, seed, n_boot
        As in `plot_components`.
    options
        See `entangle.plotting.options.FigureOptions`.

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
    rows, lost = _fitted(choose(components, name="components", layer=layer))
    with paper(options, column="single") as page:
        (ax,) = page.grid(1)
        plot_components(rows, legend=False, notes=False, ax=ax)
        caption = (
            "Reconstruction error of every expert against the dimension of its cluster's inputs",
            *_component_notes(rows, lost, n_boot=n_boot, seed=seed),
            "rings: the front, clusters that no other one beats; line: a power law fitted to it",
        )
        return page.finish(caption, title=str(rows["layer"].iloc[0]))


def _component_notes(rows: pd.DataFrame, lost: int, *, n_boot: int, seed: int) -> list[str]:
    return [
        f"{rows['layer'].iloc[0]}, n = {len(rows):,} clusters",
        *_rank(rows, n_boot=n_boot, seed=seed),
        *([f"{lost:,} clusters left out: not finite"] if lost else []),
    ]


def _fitted(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    check_columns(rows, _NEEDED, name="components", writer=DECOMPOSE)
    if choosing():
        rows = rows[
            rows["experts"].isin(picked(rows["experts"].unique().tolist(), _clusters, least=1))
        ]
    columns, what = ("components_90", "error"), "cluster with finite numbers"
    return finite_rows(rows, columns, name="components", what=what)


def _clusters(k: int) -> str:
    return "1 cluster" if k == 1 else f"{k} clusters"


def _rank(rows: pd.DataFrame, *, n_boot: int, seed: int) -> list[str]:
    x, y = rows[["components_90", "error"]].to_numpy(np.float64).T
    if len(x) < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return []
    rho = spearman_interval(x, y, n_boot=n_boot, seed=seed)
    text = f"Spearman ρ = {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]".replace("-", "−")
    return [text, bootstrap_text(n_boot=n_boot, seed=seed)]


def _draw_clusters(ax: Axes, rows: pd.DataFrame) -> list[Entry]:
    entries: list[Entry] = []
    numbers = sorted(map(int, rows["experts"].unique()))
    usual = [to_hex(_VIRIDIS(0.85 * i / max(1, len(numbers) - 1))) for i in range(len(numbers))]
    for place, k in picked(enumerate(numbers), lambda number: _clusters(number[1])):
        part = rows[rows["experts"] == k]
        x, y = part[["components_90", "error"]].to_numpy(np.float64).T
        name = _clusters(k)
        dots = ax.scatter(
            x, y, s=12.0, color=ink(name, usual[place]),
            marker=_SIGNS[place % len(_SIGNS)], linewidths=0.3, edgecolors="white", label=name,
        )  # fmt: skip
        record(
            dots, panel="components", series=name, x=x, y=y, experts=k,
            cluster=part["cluster"].to_numpy(), tokens=part["tokens"].to_numpy(),
        )  # fmt: skip
        entries.append((dots, name))
    x, y = rows[["components_90", "error"]].to_numpy(np.float64).T
    entries += _draw_front(ax, x, y) if asked_for("front") else []
    ax.set(xlabel=_DIMENSION, ylabel=_ERROR)
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
    color = ink("gaussian", None, "front")
    name = f"front: error ∝ components^{exponent:.2f}".replace("-", "−")
    (line,) = ax.plot(place, scale * place**exponent, color=color, lw=1.0, label=name, zorder=1.9)
    record(line, panel="components", series="fitted front", x=place, y=scale * place**exponent)
    rings = ax.scatter(
        x[front], y[front], s=26.0, facecolors="none", edgecolors=color, linewidths=0.5,
    )  # fmt: skip
    record(rings, panel="components", series="front", x=x[front], y=y[front])
    return [(line, f"{name}\nfitted to the ringed {len(front)}")]
