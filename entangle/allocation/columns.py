"""Columns of the scores, put into the order of the neurons and combined into one number each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from entangle.allocation.rows import Reals, Rows
from entangle.checks import choice
from entangle.errors import InvalidInput, unknown_name

COMBINATIONS = ("zscore", "rank")
"""How several columns become one: mean of z-scores, or mean of ranks."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The scores of exactly the neurons of some layers, in their order."""

    rows: Rows
    frame: pd.DataFrame
    """One row a neuron, in the order of ``rows``."""

    def combined(self, by: Sequence[str], *, combine: str, across_layers: bool) -> Reals:
        """Return one score a neuron from one or several columns.

        Parameters
        ----------
        by
            Numeric columns. One alone is returned as it is.
        combine
            ``zscore``: mean of ``(x − mean) / std`` (population; 0 where all values are equal).
            ``rank``: mean of the average ranks, each scaled to (0, 1).
        across_layers
            Standardise or rank over all neurons; otherwise within each layer.

        Raises
        ------
        UnknownName
            For a column that does not exist or is not numeric.
        InvalidInput
            For another combination, or a column without a single finite value.

        Notes
        -----
        A neuron without a value (flagged constant, nan, inf or coarse) gets the mean of the others
        of its layer, or of all layers where its layer has none.
        """
        combine = choice("combine", combine, COMBINATIONS)
        if not by:
            raise InvalidInput("`by` must name at least one column; got none.")
        values = [self.values(name) for name in by]
        if len(values) == 1:
            return values[0]
        transform = self.zscores if combine == "zscore" else self.ranks
        parts = [transform(one, across_layers=across_layers) for one in values]
        mean: Reals = np.mean(parts, axis=0, dtype=np.float64)
        return mean

    def values(self, name: str) -> Reals:
        """Return a column, with the mean of its layer where a neuron has no finite value."""
        known = self.frame.select_dtypes("number").columns.drop(
            ["neuron", "block"], errors="ignore"
        )
        if name not in known:
            raise unknown_name("column", name, known, "Choose a numeric column of the scores.")
        column = self.frame[name].to_numpy(np.float64, copy=True)
        found = np.isfinite(column)
        if found.all():
            return column
        if not found.any():
            raise InvalidInput(
                f"column {name!r} has no finite value in any of the {len(column):,} neurons; "
                "choose another column or score anew."
            )
        column[~found] = 0.0
        count = self.rows.total(found.astype(np.float64))
        means = np.full(len(count), column.sum() / found.sum())
        np.divide(self.rows.total(column), count, out=means, where=count > 0)
        return np.where(found, column, self.rows.spread(means))

    def missing(self, name: str) -> int:
        """Return the number of neurons without a finite value in a column."""
        return int((~np.isfinite(self.frame[name].to_numpy(np.float64))).sum())

    def zscores(self, values: Reals, *, across_layers: bool) -> Reals:
        """Standardise values over all neurons or within each layer; 0 where all are equal."""
        if across_layers:
            center, scale = np.full_like(values, values.mean()), np.full_like(values, values.std())
        else:
            center = self.rows.spread(self.rows.mean(values))
            scale = self.rows.spread(np.sqrt(self.rows.mean((values - center) ** 2)))
        level = scale <= 1e-12 * np.abs(center)
        return np.where(level, 0.0, (values - center) / np.where(level, 1.0, scale))

    def ranks(self, values: Reals, *, across_layers: bool) -> Reals:
        """Return the average rank of each value, scaled to (0, 1), over all or in each layer."""
        group = np.zeros_like(self.rows.layer) if across_layers else self.rows.layer
        ranks = pd.Series(values).groupby(group).rank().to_numpy(np.float64)
        return (ranks - 0.5) / np.bincount(group)[group]


def gather(scores: pd.DataFrame, rows: Rows) -> Columns:
    """Put the scores into the order of ``rows``; scores of other layers are left out.

    Raises
    ------
    InvalidInput
        If a column is missing, or a layer's neurons are not all there exactly once.
    """
    for name in ("layer", "neuron"):
        if name not in scores.columns:
            raise InvalidInput(f"the scores must have a column {name!r}; it is missing.")
    index = {name: i for i, name in enumerate(rows.names)}
    layer = scores["layer"].map(index)
    kept = scores[layer.notna()]
    position = layer[layer.notna()].to_numpy(np.int64)
    neuron = kept["neuron"].to_numpy(np.int64)
    order = np.lexsort((neuron, position))
    counts = np.bincount(position, minlength=len(rows.names))
    whole = np.array_equal(counts, rows.counts)
    expected = np.arange(len(order)) - np.repeat(rows.starts, rows.counts) if whole else None
    if expected is None or not np.array_equal(neuron[order], expected):
        _refuse_incomplete(rows, position, neuron)
    return Columns(rows, kept.iloc[order].reset_index(drop=True))


def _refuse_incomplete(rows: Rows, position: np.ndarray, neuron: np.ndarray) -> None:
    for i, name in enumerate(rows.names):
        found = neuron[position == i]
        count = int(rows.counts[i])
        if not np.array_equal(np.sort(found), np.arange(count)):
            listed = f"{len(found)} row(s)" if len(found) else "none"
            raise InvalidInput(
                f"the scores must hold each of the {count} neurons of layer {name!r} once; got "
                f"{listed}: score the whole layer of this model."
            )
