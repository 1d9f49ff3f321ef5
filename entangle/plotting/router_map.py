"""Where a layer's tokens lie, and which cluster the router puts them into."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from entangle.errors import InvalidInput
from entangle.plotting.save import record, sign
from entangle.plotting.style import (
    Column,
    add_title,
    axes_or_new,
    column_width,
    join_clauses,
    panel_grid,
    paper_style,
    share_axes,
)
from entangle.plotting.summaries import DECOMPOSE, TWO_EXPERTS, Floats, check_columns, choose

MAX_PANELS = 12
X_LABEL, Y_LABEL = "first component (input units)", "second component (input units)"
_COLUMNS = ("layer", "experts", "position", "x", "y", "cluster")
_COLORS: list[str] = sns.color_palette("colorblind").as_hex()
_MARKERS = "os^DvP"
_LABEL_INCHES, _TICK_INCHES = 0.14, 0.45


def plot_router_map(
    router_map: pd.DataFrame,
    *,
    layer: str | None = None,
    experts: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw tokens in the first two principal components, by cluster.

    Every cluster has a colour and marker, and its number at the mean of its tokens, the largest
    clusters first; a number that would cover another one is left out, and the title counts them.

    Parameters
    ----------
    router_map
        ``router_map`` of a decomposition: ``layer``, ``experts``, ``position``, ``x``, ``y``,
        ``cluster``.
    layer, experts
        Which; may be left out where the table holds only one.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, something that the table does not hold, no token with finite places.
    """
    rows, lost = _finite(choose(router_map, name="router_map", layer=layer, experts=experts))
    ax = axes_or_new(ax)
    numbered = _draw(ax, rows)
    _title(ax, rows, numbered, lost)
    return ax


def figure_router_map(
    router_map: pd.DataFrame,
    *,
    layer: str | None = None,
    experts: int | None = None,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw a layer's tokens by cluster, one panel a number of experts.

    Parameters
    ----------
    router_map, layer
        As in `plot_router_map`.
    experts
        Number of experts; None takes all above 1.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.save.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with common axes.

    Raises
    ------
    InvalidInput, UnknownName
        What `plot_router_map` refuses, or too many panels.
    """
    rows, lost = _finite(choose(router_map, name="router_map", layer=layer))
    numbers = sorted({int(k) for k in rows["experts"] if k > 1}) if experts is None else [experts]
    if not numbers:
        raise InvalidInput(f"a map of the router {TWO_EXPERTS}")
    if len(numbers) > MAX_PANELS:
        raise InvalidInput(
            f"`router_map` must hold at most {MAX_PANELS} numbers of experts above 1; got "
            f"{len(numbers)}; choose one with `experts`."
        )
    with paper_style(column=column):
        across = 2 if column == "single" else min(len(numbers), 4)
        across = min(across, len(numbers))
        figure, axes = panel_grid(len(numbers), column=column, across=across)
        figure.set_figheight(
            0.5 + -(-len(numbers) // across) * 0.85 * figure.get_figwidth() / across
        )
        inches = figure.get_figwidth() / across
        parts = [choose(rows, name="router_map", experts=k) for k in numbers]
        for ax in axes:
            ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)
            ax.update_datalim(rows[["x", "y"]].to_numpy(np.float64))
            ax.autoscale_view()
            ax.xaxis.set_major_locator(MaxNLocator(max(2, int(inches / _TICK_INCHES))))
        share_axes(figure, axes, column=column, across=across)
        title = join_clauses(
            [str(rows["layer"].iloc[0]), "numbers: clusters, at the mean of their tokens"],
            inches=column_width(column),
        )
        figure.suptitle(title, fontsize=7.0, parse_math=False)
        figure.draw_without_rendering()  # the size of the panels decides which numbers fit
        for ax, part in zip(axes, parts, strict=True):
            labels = ax.get_xlabel(), ax.get_ylabel(), ax.get_xlim(), ax.get_ylim()
            numbered = _draw(ax, part)
            ax.set(xlabel=labels[0], ylabel=labels[1], xlim=labels[2], ylim=labels[3])
            _title(ax, part, numbered, lost)
        return sign(figure, digest)


def _finite(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    check_columns(rows, _COLUMNS, name="router_map", writer=DECOMPOSE)
    kept = np.isfinite(rows[["x", "y"]].to_numpy(np.float64, na_value=np.nan)).all(axis=1)
    if not kept.any():
        raise InvalidInput(
            "`router_map` must hold at least one token with finite x and y; got "
            f"{len(rows)} without; {DECOMPOSE}"
        )
    return rows[kept], int((~kept).sum())


def _title(ax: Axes, rows: pd.DataFrame, numbered: int, lost: int) -> None:
    k, clusters = int(rows["experts"].iloc[0]), rows["cluster"].nunique()
    said = [f"{k} experts, n\u00a0=\u00a0{len(rows):,}\u00a0tokens"]
    said += [f"{numbered} of {clusters} numbered"] if numbered < clusters else []
    said += [f"{lost:,} left out: not finite"] if lost else []
    add_title(ax, "\n".join(said))


def _draw(ax: Axes, rows: pd.DataFrame) -> int:
    """Draw the tokens and return how many clusters are numbered."""
    ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)
    for cluster, part in rows.groupby("cluster"):
        number = int(str(cluster))
        x, y = part["x"].to_numpy(np.float64), part["y"].to_numpy(np.float64)
        dots = ax.scatter(
            x, y, s=3.0, color=_COLORS[number % len(_COLORS)], alpha=0.5, linewidths=0,
            marker=_MARKERS[number // len(_COLORS) % len(_MARKERS)], rasterized=len(rows) > 1000,
        )  # fmt: skip
        panel = f"{int(rows['experts'].iloc[0])} experts"
        record(
            dots, panel=panel, series=f"cluster {number}", x=x, y=y,
            position=part["position"].to_numpy(),
        )  # fmt: skip
    return len(_number(ax, rows))


def _number(ax: Axes, rows: pd.DataFrame) -> list[Text]:
    by_size = rows.groupby("cluster")[["x", "y"]].agg(["mean", "size"])
    centers = by_size.sort_values(("x", "size"), ascending=False, kind="stable")
    figure = ax.get_figure(root=True)
    assert figure is not None  # noqa: S101 - an axes that draws belongs to a figure
    placed: list[Floats] = []
    texts = []
    for cluster, row in centers.iterrows():
        x, y = float(row["x", "mean"]), float(row["y", "mean"])
        place = ax.transData.transform((x, y)) / figure.dpi
        if any(np.hypot(*(place - other)) < _LABEL_INCHES for other in placed):
            continue
        placed.append(place)
        text = ax.text(x, y, str(cluster), ha="center", va="center", fontsize=6.0, zorder=3)
        text.set_path_effects([patheffects.withStroke(linewidth=1.8, foreground="white")])
        texts.append(text)
    return texts
