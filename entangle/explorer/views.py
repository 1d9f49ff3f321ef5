"""Views that need only scores: a neuron's distribution, and its place in the layer.

The table of neurons as the explorer shows it: sorted, in pages, as lines of equal width.

The view of a neuron's modes: what the tokens of each have in common.

The view of a neuron's experts: how they recover its outputs, and what each of them holds.

The layers of a result as two menus: blocks, and what each block holds.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from entangle.checks import choice
from entangle.errors import EntangleError, InvalidInput, visible
from entangle.explorer.evidence import Content, ExpertFinder, ModeFinder, Modes, picture
from entangle.plotting import (
    PALETTE,
    figure_experts,
    figure_recovery,
    figure_wd_distribution,
    paper_style,
    plot_modes,
    plot_output_distribution,
)
from entangle.plotting.style import PaperFigure
from entangle.results.scores import NeuronScores
from entangle.runs.tables import escaped, html_table, number

PAGE = 100
"""Neurons on a page."""
_GAP = "\u00a0"  # an ordinary space would be joined with the next one
_NAMES = {"wd_se": "± se", "skewness": "skew", "excess_kurtosis": "kurt", "weight_norm": "norm"}
_LEFT_OUT = {"model", "layer", "block", "projection", "wd_bound", "n_tokens"}


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    """In the frame of scores."""
    title: str
    """As it is shown."""
    width: int
    """In characters, the gap to its left included."""
    decimals: int | None
    """Of all its values, so that they align; None writes each with four significant digits."""

    def text(self, value: object) -> str:
        """Return a value of this column as it is shown."""
        if not isinstance(value, float):
            return visible(str(value))
        if self.decimals is None or not np.isfinite(value):
            return number(value)
        return f"{value:.{self.decimals}f}".replace("-", "−")

    def line(self, value: object) -> str:
        """Return a value, cut or padded to the width."""
        text = self.text(value)
        cut = text if len(text) < self.width else text[: self.width - 2] + "…"
        return cut.rjust(self.width, _GAP)


@dataclass(frozen=True, eq=False)
class NeuronTable:
    """The neurons of one layer in some order."""

    frame: pd.DataFrame
    """One row a neuron of one layer, in the order of the layer."""
    columns: tuple[Column, ...]
    """What is shown, from the left."""
    by: str
    """Column that the neurons are sorted by."""
    ascending: bool
    """Whether the smallest value comes first."""
    order: NDArray[np.intp]
    """Position in ``frame`` of the neurons as they are sorted; missing values come last."""

    @classmethod
    def of(cls, frame: pd.DataFrame, *, by: str = "wd") -> "NeuronTable":
        """Make the table of a layer's rows of scores, sorted.

        Raises
        ------
        InvalidInput, UnknownName
            If there is no neuron, or no numeric column ``by``.
        """
        if frame.empty:
            raise InvalidInput("the scores must hold at least one neuron of the layer; got none.")
        frame = frame.reset_index(drop=True)
        columns = tuple(_column(frame, name) for name in _shown(frame))
        unsorted = np.arange(len(frame))
        return cls(frame, columns, "neuron", True, unsorted).sorted_by(by, ascending=False)

    def sorted_by(self, by: str, *, ascending: bool) -> "NeuronTable":
        """Return the table in another order; equal values keep the order of the layer."""
        names = [column.name for column in self.columns if _is_numeric(self.frame, column.name)]
        remedy = "Choose a numeric column of the scores."
        by = choice("by", by, names, kind="column", remedy=remedy)
        values = self.frame[by].to_numpy(np.float64, na_value=np.nan)
        order = np.argsort(values if ascending else -values, kind="stable")  # NaN comes last
        return replace(self, by=by, ascending=ascending, order=order)

    def toggled(self, by: str) -> "NeuronTable":
        """Return the table sorted by a column: the largest first, and the other way round again."""
        return self.sorted_by(by, ascending=by == self.by and not self.ascending)

    @property
    def n_pages(self) -> int:
        """How many pages there are, at least one."""
        return -(-len(self.order) // PAGE)

    def neurons(self, page: int) -> list[int]:
        """Return the neurons on a page, counted from 0."""
        rows = self.order[page * PAGE : (page + 1) * PAGE]
        return [int(neuron) for neuron in self.frame["neuron"].to_numpy()[rows]]

    def lines(self, page: int) -> list[str]:
        """Return one line a neuron of a page, its values below the columns' titles."""
        rows = self.frame.iloc[self.order[page * PAGE : (page + 1) * PAGE]]
        cells = [
            [column.line(value) for value in rows[column.name].tolist()] for column in self.columns
        ]
        return ["".join(parts) for parts in zip(*cells, strict=True)]

    def place(self, neuron: int) -> tuple[int, int]:
        """Return the page that a neuron is on, and its row there."""
        found = np.flatnonzero(self.frame["neuron"].to_numpy()[self.order] == neuron)
        if len(found) == 0:
            raise InvalidInput(f"the scores of this layer hold no neuron {neuron}.")
        page, row = divmod(int(found[0]), PAGE)
        return page, row

    def row(self, neuron: int) -> pd.Series:
        """Return a neuron's row of the scores."""
        page, row = self.place(neuron)
        return self.frame.iloc[int(self.order[page * PAGE + row])]

    def rank(self, neuron: int) -> int | None:
        """Return how many neurons have a larger WD, plus one; None without a WD."""
        wd = float(self.row(neuron)["wd"])
        return None if np.isnan(wd) else int((self.frame["wd"] > wd).sum()) + 1


def _shown(frame: pd.DataFrame) -> list[str]:
    """Return the columns to show: the neuron, numbers, and the flag if a neuron has one."""
    names = [name for name in frame.columns if name not in _LEFT_OUT | {"neuron", "flag"}]
    numeric = [str(name) for name in names if _is_numeric(frame, name)]
    flagged = "flag" in frame.columns and bool((frame["flag"].fillna("") != "").any())
    return ["neuron", *numeric, *(["flag"] if flagged else [])]


def _is_numeric(frame: pd.DataFrame, name: str) -> bool:
    kind = frame[name].dtype
    return pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind)


def _column(frame: pd.DataFrame, name: str) -> Column:
    title = _NAMES.get(name, visible(name))
    if not _is_numeric(frame, name):
        return Column(name, title, 11, None)
    values = frame[name].to_numpy(np.float64, na_value=np.nan)
    column = Column(name, title, 0, _decimals(values))
    finite = values[np.isfinite(values)]
    ends = [finite.min(), finite.max()] if len(finite) else []
    texts = [column.text(int(end) if name == "neuron" else float(end)) for end in ends]
    longest = max(len(text) for text in [title + " ▼", *texts])
    return replace(column, width=longest + 2)


def _decimals(values: NDArray[np.float64]) -> int | None:
    """Return how many decimals, up to four, suit a column's larger values; None if none do."""
    size = np.abs(values[np.isfinite(values)])
    large = float(np.quantile(size, 0.99)) if len(size) else 0.0
    if large == 0.0:
        return 1
    decimals = 3 - int(np.floor(np.log10(large)))
    return int(np.clip(decimals, 0, 4)) if -4 <= decimals <= 6 else None


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


_MODES_NEED = (
    "<p>Modes need a decomposition that holds them, or the model and a text: "
    "<code>entangle.explore(scores, text, model=model)</code>.</p>"
)


def modes_view(finder: ModeFinder, layer: str, neuron: int, *, asked: bool) -> Content:
    """Show the modes of a neuron; offer the pass over the text that the first one takes."""
    try:
        found = finder.known(layer, neuron)
        if found is None and asked and finder.subject is not None:
            found = finder.find(layer, neuron)
    except EntangleError as error:
        return Content(html=f"<p>{escaped(error)}</p>")
    if found is not None:
        unit = Unit(found.mean, found.std)
        modes = (_mode(one, found.contexts, unit) for _, one in found.modes.iterrows())
        sent = f"<p><small>{found.sent}</small></p>" if found.sent else ""
        return Content(_picture(found), sent + "".join(modes))
    if finder.subject is None:
        return Content(html=_MODES_NEED)
    return Content(offer=f"Find modes: run the model over {finder.subject.size}, up to this layer")


def _picture(found: Modes) -> tuple[bytes, ...]:
    with paper_style(column="single"):
        figure = PaperFigure(figsize=PANEL_INCHES, layout="constrained")
        try:
            ax = plot_modes(
                found.modes,
                histogram=found.histogram,
                mean=found.mean,
                std=found.std,
                ax=figure.subplots(),
            )
        except InvalidInput:  # a constant neuron has one mode and no distribution to draw
            return ()
        _legend_outside(figure, ax)
        return (picture(figure),)


def _legend_outside(figure: Figure, ax: Axes) -> None:
    """Move the legend above the panel, where it covers no mode's number."""
    inside = ax.get_legend()
    assert inside is not None  # noqa: S101 - drawn by `plot_modes`
    labels = [text.get_text() for text in inside.get_texts()]
    handles = [handle for handle in inside.legend_handles if handle is not None]
    inside.remove()
    ax.set_title("")
    figure.legend(handles, labels, loc="outside upper left", ncols=3)


@dataclass(frozen=True)
class Unit:
    """How outputs are written: in σ from the mean where there is a σ."""

    mean: float
    """Of the outputs."""
    std: float
    """Of the outputs."""

    def text(self, output: float) -> str:
        """Return an output with its sign."""
        if 0.0 < self.std < np.inf:
            return f"{(output - self.mean) / self.std:+.2f}".replace("-", "−")
        return number(output, 3)

    @property
    def name(self) -> str:
        """What stands behind an output."""
        return " σ" if 0.0 < self.std < np.inf else ""


def _mode(row: pd.Series, contexts: pd.DataFrame, unit: Unit) -> str:
    examples = contexts[contexts["mode"] == row["mode"]]
    lines = "".join(_context(one, unit) for _, one in examples.iterrows())
    tokens = " ".join(
        f'<span class="entangle-token">{piece(token)}<small> {count:,}</small></span>'
        for token, count, _share in json.loads(row["top_tokens"])
    )
    title = (
        f"<b>Mode {int(row['mode'])}</b> around {unit.text(float(row['center']))}{unit.name}: "
        f"{100 * row['share']:.3g} % of the tokens ({int(row['tokens']):,})"
    )
    return (
        f'<div class="entangle-mode"><p>{title}<br>{tokens}</p>'
        f'<table class="entangle-contexts">{lines}</table></div>'
    )


def _context(one: pd.Series, unit: Unit) -> str:
    texts = (str(one[name]) for name in ("before", "token", "after"))
    return context_row(unit.text(float(one["output"])), *texts)


def context_row(output: str, before: str, token: str, after: str) -> str:
    """Return a row of a table of contexts: an output, and the text around a marked token."""
    before, token, after = map(piece, (before, token, after))
    return (
        f'<tr><td class="entangle-output">{output}</td><td class="entangle-before">{before}</td>'
        f'<td class="entangle-after"><mark>{token}</mark>{after}</td></tr>'
    )


def piece(text: str) -> str:
    """Return a piece of text whose direction cannot disturb its neighbours."""
    return f"<bdi>{escaped(text)}</bdi>"


ALSO = 8
"""Neurons of largest WD whose outputs are kept as well when a layer is decomposed."""
_EXPERTS_NEED = (
    "<p>Experts need a decomposition, or the model and a text: "
    "<code>entangle.explore(scores, decomposition=decomposition)</code> or "
    "<code>entangle.explore(scores, text, model=model)</code>.</p>"
)
_COLUMNS = {
    "experts": "experts",
    "ri": "RI",
    "output_wd": "WD from dense",
    "wd": "WD",
    "weighted_wd": "WD in clusters",
    "md": "MD",
    "weighted_md": "MD in clusters",
    "smallest_cluster": "smallest cluster",
}
_LEGEND = (
    "RI: how many times smaller the error is than with one expert. WD in σ, MD as such: of all "
    "tokens, and the mean inside the clusters. Smallest cluster in tokens."
)


def experts_view(
    finder: ExpertFinder, table: NeuronTable, layer: str, neuron: int, *, asked: bool
) -> Content:
    """Show what is known of a neuron's experts; offer to fit them."""
    rows, outputs = finder.known(layer, neuron)
    if asked and outputs.empty and finder.subject is not None:
        top = table.sorted_by("wd", ascending=False).neurons(0)[:ALSO]
        try:
            finder.find(layer, list(dict.fromkeys([neuron, *top])))
        except EntangleError as error:
            return Content(html=f"<p>{escaped(error)}</p>")
        rows, outputs = finder.known(layer, neuron)
    offer = "" if finder.subject is None or not outputs.empty else _offer(finder)
    if rows.empty:
        return Content(html="" if finder.subject else _EXPERTS_NEED, offer=offer)
    shown = rows[[name for name in _COLUMNS if name in rows.columns]].rename(columns=_COLUMNS)
    zeros = f"{100 * float(rows['sparsity'].iloc[0]):g} % of the weights are zero."
    html = f"{html_table(shown, rows=20)}<p><small>{zeros} {_LEGEND}</small></p>"
    if outputs.empty:
        return Content(html=html, offer=offer)
    try:
        return Content(_pictures(rows, outputs), html)
    except InvalidInput as error:
        return Content(html=f"<p>{escaped(error)}</p>{html}")


def _pictures(rows: pd.DataFrame, outputs: pd.DataFrame) -> tuple[bytes, bytes]:
    recovery = figure_recovery(outputs, rows, column="single")
    return picture(recovery), picture(figure_experts(outputs, rows, column="single"))


def _offer(finder: ExpertFinder) -> str:
    numbers = ", ".join(map(str, finder.experts))
    return f"Fit {numbers} experts with {100 * finder.sparsity:g} % zeros to this layer"


OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class LayerMenu:
    """Names of layers by block and by what they are called inside it."""

    blocks: Mapping[str, Mapping[str, str]]
    """By the block's label: from a layer's label to its full name."""

    @classmethod
    def of(cls, layers: pd.DataFrame) -> "LayerMenu":
        """Make the menus of a table with the columns ``layer``, ``block`` and ``projection``."""
        blocks: dict[str, list[str]] = {}
        for name, block in zip(layers["layer"], layers["block"], strict=True):
            blocks.setdefault(OUTSIDE if pd.isna(block) else str(int(block)), []).append(str(name))
        return cls({block: _labelled(names) for block, names in blocks.items()})

    def label(self, name: str) -> tuple[str, str]:
        """Return the labels of a layer in the two menus, by its full name."""
        return next(
            (block, label)
            for block, layers in self.blocks.items()
            for label, full in layers.items()
            if full == name
        )


def _labelled(names: Sequence[str]) -> dict[str, str]:
    """Give every name the shortest ending, cut at dots, that no other name has."""
    endings = {name: _endings(name) for name in names}
    counts = Counter(ending for name in names for ending in endings[name])
    labels = {
        name: next((one for one in endings[name] if counts[one] == 1), name) for name in names
    }
    return {visible(label): name for name, label in labels.items()}


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
