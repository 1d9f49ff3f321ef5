"""The table of neurons as the explorer shows it: sorted, in pages, as lines of equal width."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.escapes import visible
from entangle.html_tables import number

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
    def of(cls, frame: pd.DataFrame, *, by: str = "wd", ascending: bool = False) -> "NeuronTable":
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
        return cls(frame, columns, "neuron", True, unsorted).sorted_by(by, ascending=ascending)

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
