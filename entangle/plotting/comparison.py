"""Perplexity of pruned and expanded models against what they cost; what one expansion costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Unpack

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.plotting.allocation import plot_layer_profile
from entangle.plotting.options import (
    FigureOptions,
    PlotOptions,
    asked_for,
    choosing,
    picked,
    worded,
)
from entangle.plotting.outputs import plural
from entangle.plotting.page import axes_level, figure_level, paper
from entangle.plotting.save import record
from entangle.plotting.style import (
    KNOWN_TEXTS,
    METHOD_PALETTE,
    SPARE_COLORS,
    add_title,
    axes_or_new,
    called,
    explain_above,
    ink,
    log_locator,
    plain_number,
    printable,
    shade,
    wrap,
)
from entangle.plotting.summaries import Floats, check_columns

COST_LABELS: dict[str, str] = {
    "sparsity": "zeros in the pruned layers (%)",
    "flops": "active FLOPs per token (× dense)",
    "nonzeros": "stored non-zeros (× dense)",
    "bytes": "stored bytes (× dense)",
    "density": "multiply-adds of the layers in scope, measured (× dense)",
    "token_bytes": "bytes of weights read per token (× dense)",
}
COST_NAMES = {"flops": "FLOPs per token", "nonzeros": "stored non-zeros", "bytes": "stored bytes"}
PERPLEXITY_LABEL = "perplexity (× dense)"
CEILING = 100.0
"""Multiple of the dense perplexity above which models are off the axis, if others are below."""

_NAMES = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "expansion-random": "random clusters"}
_NAMES |= {
    name: name.upper() for name in ("teal", "wina", "cats", "chess", "chess+", "griffin", "cett")
} | {"rsparse": "R-Sparse", "larosa": "LaRoSA", "coreinfer": "CoreInfer"}
_CONTROLS = ("expansion-random",)
_MARKERS = "o^sDvP"
_STYLES = ("-", "-.", ":")
_INTERVAL = "bars: 95 % paired bootstrap over windows"
_DENSE_COST = 1.0
_ROUNDING = 1e-9
_WRITER = "the command `entangle compare` writes such tables."
_EXPAND = "the command `entangle expand` writes such tables."
_NEEDED = ("method", "sparsity", "experts", "perplexity", "ratio", "ratio_low", "ratio_high")
_EXPANDED = {
    "error of the layers": "the squared output error of every layer on the calibration text, in "
    "per cent of its squared output",
    "cost of the model": "what the model costs for a token (FLOPs) and on the disk, as multiples "
    "of the dense one's",
}
"""What the panels of an expansion show, by their titles."""
_EQUAL = {"sparsity": "Equal FLOPs per token", "nonzeros": "Equal memory"}
_ACTIVE = {"flops": "FLOPs per token", "nonzeros": "Memory"}
_LOG_SPAN, _PANEL_INCHES, _MOST = 3.0, 2.3, 10.0


@dataclass(frozen=True)
class _Models:
    """The rows of a comparison that can be drawn."""

    frame: pd.DataFrame
    """All that can be drawn, in their order."""
    pruned: pd.DataFrame
    """All but the dense model."""
    dense: float | None
    """Perplexity of the dense model; None where there is no row of it."""
    dropped: int
    """Rows left out because a number is missing or infinite."""
    most: float = CEILING
    """Multiple of the dense perplexity that the y axis ends at, if others are below."""

    @classmethod
    def of(cls, comparison: pd.DataFrame, costs: Sequence[str]) -> "_Models":
        check_columns(comparison, (*_NEEDED, *costs), name="comparison", writer=_WRITER)
        numbers = comparison[["perplexity", "ratio", *costs]].to_numpy(np.float64, na_value=np.nan)
        positive = comparison["ratio"].gt(0).fillna(False).to_numpy(np.bool_)
        kept = np.isfinite(numbers).all(axis=1) & positive
        frame = comparison[kept].reset_index(drop=True)
        is_dense = frame["method"] == "dense"
        if len(frame) < 2 or is_dense.all():
            raise InvalidInput(
                "`comparison` must hold at least 2 models with a finite perplexity, not all dense; "
                f"got {len(frame)} among {len(comparison)}; {_WRITER}"
            )
        if choosing():
            curves = picked(_curves(frame[~is_dense]), _curve_names, least=1)
            shown = pd.concat([curve.rows for curve in curves]).index
            frame = frame[is_dense | frame.index.isin(shown)]
            is_dense = frame["method"] == "dense"
        values = frame.loc[is_dense, "perplexity"]
        dense = None if values.empty else float(values.iloc[0])
        return cls(frame, frame[~is_dense], dense, int((~kept).sum()))

    @property
    def ceiling(self) -> float:
        """Upper limit of the y axis, infinite where nothing needs to be off it."""
        ratio = self.pruned["ratio"]
        return self.most if ratio.gt(self.most).any() and ratio.le(self.most).any() else np.inf

    def notes(self, text: str | None) -> list[str]:
        """Return what the legend says in words: text, dense model, intervals, what is not seen."""
        above = int(self.pruned["ratio"].gt(self.ceiling).sum())
        clauses = (
            f"evaluated on {called(text, KNOWN_TEXTS)}" if text else None,
            None if self.dense is None else f"dense perplexity {self.dense:.4g}",
            _INTERVAL,
            self._experts(),
            f"{above} above {self.most:g} × dense, off the axis" if above else None,
            f"{self.dropped} left out: no finite perplexity" if self.dropped else None,
        )
        return [clause for clause in clauses if clause]

    def _experts(self) -> str:
        """Say what k is, and how many more FLOPs routed models take than plain ones."""
        routed = self.pruned[self.pruned["experts"] > 1]
        if routed.empty:
            return ""
        text = "k experts a layer"
        if "flops" in routed.columns:
            pruned = self.pruned[~masked(self.pruned)] if "nonzeros" in routed else self.pruned
            plain = pruned[pruned["experts"] == 1].groupby("sparsity")["flops"].min()
            extra = float((routed["flops"] / routed["sparsity"].map(plain) - 1.0).max())
            text += f" (router: up to {100.0 * extra:.2g} % more FLOPs)" if extra > 0.0 else ""
        return text


@dataclass(frozen=True)
class _Curve:
    """One method at one number of experts."""

    rows: pd.DataFrame
    label: str
    color: str
    marker: str
    plain: bool
    """Whether it has one expert, so that sparsity 0 is the dense model."""
    control: bool
    """Whether it is a control, drawn dashed and hollow."""
    style: str = "-"
    """Line style, which tells allocations apart."""


def masked(comparison: pd.DataFrame) -> "pd.Series[bool]":
    """Tell which models compute less than they store without routing: activations are masked."""
    less = comparison["flops"] < comparison["nonzeros"] - _ROUNDING
    return (comparison["experts"] == 1) & less


@axes_level
def plot_perplexity(
    comparison: pd.DataFrame,
    *,
    x: str = "sparsity",
    text: str | None = None,
    legend: bool = True,
    notes: bool = True,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw perplexity as a multiple of the dense model's against sparsity or against a cost.

    Parameters
    ----------
    comparison
        One row a model, as the ``frame`` of `entangle.results.comparison.Comparison`: ``method``,
        ``sparsity`` (share of zeros), ``experts``, ``perplexity``, ``ratio`` to dense with its 95 %
        interval ``ratio_low`` and ``ratio_high``, and the column ``x``. The row of method ``dense``
        is the baseline.
    x
        ``"sparsity"``, drawn in %, or a cost as a multiple of the dense model's: ``"flops"`` (for
        a token), ``"nonzeros"`` or ``"bytes"`` (both stored), on a log scale if it spans much.
    text
        What the perplexities were measured on, for the legend, for example
        ``"WikiText-2, n = 152 windows"``.
    ax
        Where to draw; None makes a new figure.
    legend
        Write a legend on top; otherwise only what it says in words.
    options
        See `entangle.plotting.options.PlotOptions`.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure. Models above `CEILING` are off the axis if others are
        below; models without a finite perplexity are left out; the legend counts both.

    Raises
    ------
    InvalidInput
        Missing columns, fewer than two models with a finite perplexity, an unknown ``x``.
    """
    x = choice("x", x, COST_LABELS, kind="x axis")
    models = _Models.of(comparison, [x])
    own, ax = ax is None, axes_or_new(ax, options)
    lines = _draw(ax, models, x)
    said = models.notes(text) if notes else []
    entries = [(line, str(line.get_label())) for line in lines]
    explain_above(ax, entries, said, legend=legend, own=own)
    return ax


@figure_level
def figure_comparison(
    comparison: pd.DataFrame, *, text: str | None = None, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw the perplexity of every model at equal FLOPs per token and at equal memory.

    Left, against sparsity: at one sparsity all models take the same active FLOPs per token, but for
    the router's, which the legend states. Where some mask activations, whose FLOPs are measured,
    against the active FLOPs. Right, against the non-zeros that are stored.

    Parameters
    ----------
    comparison, text
        As in `plot_perplexity`, with the columns ``flops`` and ``nonzeros``.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels with one y axis.

    Raises
    ------
    InvalidInput
        What `plot_perplexity` refuses, or an unknown ``column``.
    """
    models = _Models.of(comparison, ("flops", "nonzeros"))
    with paper(options) as page:
        named = _ACTIVE if masked(models.frame).any() else _EQUAL
        panels = picked(named, lambda x: (named[x], x), panels=True)
        axes = page.grid(len(panels), panel_inches=_PANEL_INCHES)
        for ax, x in zip(axes, panels, strict=True):
            plot_perplexity(models.frame, x=x, legend=False, notes=False, ax=ax)
            ax.set_xlabel(wrap(ax, ax.get_xlabel(), size=7.0))
            add_title(ax, named[x])
        for right in axes[1:]:
            right.sharey(axes[0])
            right.set_ylabel("")
            right.tick_params(labelleft=False)
        caption = (
            "Perplexity of pruned and expanded models as a multiple of the dense model's",
            *models.notes(text),
        )
        return page.finish(caption)


@figure_level
def figure_density(
    comparison: pd.DataFrame, *, text: str | None = None, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw the perplexity of every method against the density that was measured in scope.

    One line a method, with a band of the paired bootstrap; the dense model is a star. Models above
    10 times the dense perplexity are off the axis if others are below.

    Parameters
    ----------
    comparison, text
        As in `plot_perplexity`, with the column ``density``.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        One panel.

    Raises
    ------
    InvalidInput
        What `plot_perplexity` refuses.
    """
    models = replace(_Models.of(comparison, ["density"]), most=_MOST)
    with paper(options) as page:
        (ax,) = page.grid(1, panel_inches=2 * _PANEL_INCHES)
        _draw(ax, models, "density")
        notes = [note for note in models.notes(text) if note != _INTERVAL]
        caption = (
            "Perplexity as a multiple of the dense model's, against the multiply-adds a token of "
            "the layers in scope as measured",
            "bands: 95 % paired bootstrap over windows", *notes,
        )  # fmt: skip
        return page.finish(caption)


@axes_level
def plot_costs(
    costs: pd.DataFrame,
    *,
    ax: Axes | None = None,
    **options: Unpack[PlotOptions],
) -> Axes:
    """Draw what a model costs as multiples of the dense one, a bar a cost.

    Parameters
    ----------
    costs
        One row a cost, from the top down: ``cost`` (``flops``, ``nonzeros``, ``bytes``) and
        ``multiple``, 1 being the dense model's.
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
    InvalidInput
        Missing columns, or no row.
    """
    check_columns(costs, ("cost", "multiple"), name="costs", writer=_EXPAND)
    ax = axes_or_new(ax, options)
    rows = [(printable(str(name)), float(one)) for name, one in costs[["cost", "multiple"]].values]
    rows = picked(rows, _cost_names, least=1)
    multiples, ticks = [multiple for _, multiple in rows], list[str]()
    for place, (name, multiple) in enumerate(rows):
        said = COST_NAMES.get(name, name)
        ticks.append(worded(said))
        color = ink("expansion", METHOD_PALETTE["expansion"], said, name)
        (bar,) = ax.barh(place, multiple, height=0.6, color=color)
        record(bar, panel="costs", series=name, x=multiple, y=place)
        ax.annotate(
            f"{multiple:.3g}", (multiple, place), xytext=(3.0, 0.0), textcoords="offset points",
            va="center", fontsize=mpl.rcParams["xtick.labelsize"],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    if asked_for("dense"):
        color = ink("gaussian", None, "dense")
        line = ax.axvline(_DENSE_COST, color=color, lw=0.8, ls=":", label="dense")
        record(line, panel="costs", series="dense", x=_DENSE_COST, y=np.nan)
    ax.set_yticks(range(len(ticks)), ticks, parse_math=False)
    ax.set_ylim(len(ticks) - 0.5, -0.5)
    ax.set_xlim(0.0, 1.2 * float(np.nanmax([*multiples, _DENSE_COST])))
    ax.set(xlabel="cost of the model (× dense)", ylabel="cost")
    return ax


def _cost_names(row: tuple[str, float]) -> tuple[str, str]:
    return COST_NAMES.get(row[0], row[0]), row[0]


@figure_level
def figure_expansion(
    layers: pd.DataFrame, costs: pd.DataFrame, **options: Unpack[FigureOptions]
) -> Figure:
    """Draw what an expansion loses in every layer, and what the whole model costs.

    Parameters
    ----------
    layers
        One row a layer, as `entangle.results.expansion.ExpansionReport.layers`: ``layer``,
        ``block``, ``projection``, ``experts``, ``sparsity`` and ``relative_error``.
    costs
        As in `plot_costs`.
    options
        See `entangle.plotting.options.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels.

    Raises
    ------
    InvalidInput
        What `plot_layer_profile` and `plot_costs` refuse, or an option out of range.
    """
    check_columns(layers, ("experts", "sparsity"), name="layers", writer=_EXPAND)
    with paper(options) as page:
        titles = picked(_EXPANDED, str, panels=True)
        across = 1 if page.column == "single" else len(titles)
        for ax, title in zip(page.grid(len(titles), across=across), titles, strict=True):
            if title.startswith("error"):
                plot_layer_profile(layers, value="relative_error", legend=False, ax=ax)
            else:
                plot_costs(costs, ax=ax).set_ylabel("")
            add_title(ax, title)
        experts, zeros = layers["experts"], 100.0 * layers["sparsity"]
        outside = int(layers["block"].isna().sum())
        caption = (
            f"An expansion of {plural(len(layers), 'layer')} into {_range(experts)} experts with "
            f"{_range(zeros)} % zeros: " + ", and ".join(_EXPANDED[title] for title in titles),
            f"{plural(outside, 'layer')} outside the blocks left out" if outside else "",
        )
        return page.finish(caption)


def _range(values: "pd.Series[float]") -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _draw(ax: Axes, models: _Models, x: str) -> list[Line2D]:
    lines = [_draw_curve(ax, one, x) for one in picked(_curves(models.pruned), _curve_names)]
    if asked_for("dense"):
        lines.append(_draw_dense(ax, x))
    _set_y(ax, models)
    _set_x(ax, _x_values(models.pruned, x), x)
    ax.set(xlabel=COST_LABELS[x], ylabel=PERPLEXITY_LABEL)
    return lines


def _curves(pruned: pd.DataFrame) -> Iterator[_Curve]:
    counts = sorted({1, *pruned["experts"].astype(int)})
    spare, rounds = iter(SPARE_COLORS * len(pruned)), count()
    for method, rows in pruned.groupby("method", sort=False, observed=True):
        name, color, turn = str(method), METHOD_PALETTE.get(str(method)), 0
        if color is None:
            color, turn = next(spare), next(rounds) // len(SPARE_COLORS)
        color = ink(name, color, _NAMES.get(name, name))
        numbers = sorted(set(rows["experts"].astype(int)))
        for share, k in zip(np.linspace(1.0, 0.5, len(numbers))[::-1], numbers, strict=True):
            for style, (allocation, own) in enumerate(_allocations(rows[rows["experts"] == k])):
                yield _Curve(
                    rows=own,
                    label=_NAMES.get(name, name) + (f", k = {k}" if k > 1 else "") + allocation,
                    color=shade(color, float(share)),
                    marker=_MARKERS[(counts.index(k) + turn) % len(_MARKERS)],
                    plain=k == 1,
                    control=name in _CONTROLS,
                    style=_STYLES[style % len(_STYLES)],
                )


def _curve_names(curve: _Curve) -> tuple[str, str]:
    return curve.label, str(curve.rows["method"].iloc[0])


def _allocations(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield (ending of the label, rows) of every allocation, the uniform one first."""
    if "allocation" not in rows.columns:
        yield "", rows
        return
    even = rows["allocation"] == "uniform"
    if even.any():
        yield "", rows[even]
    for name, own in rows[~even].groupby("allocation", sort=False, observed=True):
        yield f", {name}", own


def _x_values(rows: pd.DataFrame, x: str) -> Floats:
    values: Floats = rows[x].to_numpy(np.float64)
    return 100.0 * values if x == "sparsity" else values


def _draw_curve(ax: Axes, curve: _Curve, x: str) -> Line2D:
    rows = curve.rows.sort_values(x, kind="stable")
    place = _x_values(rows, x)
    ratio, low, high = (
        rows[name].to_numpy(np.float64, na_value=np.nan)
        for name in ("ratio", "ratio_low", "ratio_high")
    )
    (line,) = ax.plot(
        place,
        ratio,
        color=curve.color,
        label=curve.label,
        marker=curve.marker,
        markersize=3.5,
        markeredgewidth=0.8,
        markerfacecolor="white" if curve.control else curve.color,
        linestyle="--" if curve.control else curve.style,
        zorder=2.2 if curve.control else 2.1,
    )
    known = np.isfinite(low) & np.isfinite(high)
    if x == "density":
        ax.fill_between(place, low, high, color=curve.color, alpha=0.18, lw=0, zorder=1.8)
    else:
        ax.vlines(place[known], low[known], high[known], color=curve.color, lw=0.8, zorder=2.3)
    record(
        line, panel=x, series=curve.label, x=place, y=ratio, y_low=low, y_high=high,
        **{name: rows[name].to_numpy() for name in ("perplexity", "sparsity", "experts")},
    )  # fmt: skip
    if curve.plain and x != "sparsity":
        ends = [place[-1], _DENSE_COST], [ratio[-1], 1.0]
        (link,) = ax.plot(*ends, ":", color=curve.color, lw=0.8, zorder=2.0)
        record(link, panel=x, series=f"{curve.label}, to dense", x=ends[0], y=ends[1])
    return line


def _draw_dense(ax: Axes, x: str) -> Line2D:
    color = ink("gaussian", None, "dense")
    line = ax.axhline(1.0, color=color, lw=0.8, ls=":", zorder=1.9)
    if x != "sparsity":
        (line,) = ax.plot(_DENSE_COST, 1.0, "*:", color=color, lw=0.8, markersize=5.5, zorder=2.4)
    line.set_label("dense")
    record(line, panel=x, series="dense", x=np.nan if x == "sparsity" else _DENSE_COST, y=1.0)
    return line


def _set_y(ax: Axes, models: _Models) -> None:
    columns = models.pruned[["ratio", "ratio_low", "ratio_high"]]
    values = columns.to_numpy(np.float64, na_value=np.nan)
    values = values[np.isfinite(values) & (values > 0.0)]
    bottom = float(values.min(initial=1.0)) / 1.15
    top = min(float(values.max(initial=1.0)) * 1.15, models.ceiling)
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    ax.yaxis.set_major_locator(log_locator(top / bottom))
    ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.yaxis.set_minor_locator(NullLocator())


def _set_x(ax: Axes, values: Floats, x: str) -> None:
    if x == "sparsity":
        shown = np.unique(values)
        if len(shown) <= 8:
            ax.set_xticks(shown)
        return
    if x == "density":
        return
    if max(values.max(), 1.0) / min(values.min(), 1.0) > _LOG_SPAN:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
        ax.xaxis.set_minor_locator(NullLocator())
