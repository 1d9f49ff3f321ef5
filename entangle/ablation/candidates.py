"""The neurons that a selection chooses from: a table of scores, checked and put in order."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.checks import choice
from entangle.errors import InvalidInput

Rows = dict[str, NDArray[np.int64]]
"""Full layer name → row indices."""

DERIVED: dict[str, tuple[str, Callable[..., "pd.Series[float]"]]] = {
    "variance": ("std", np.square),
    "abs_mean": ("mean", np.abs),
    "abs_skewness": ("skewness", np.abs),
}
"""Column that is computed from the scores → the column it comes from, and how."""


SCORED = (
    "block", "neuron", "wd", "wd_se", "wd_bound", "ks", "mean", "std", "skewness",
    "excess_kurtosis", "weight_norm", "md", "n_tokens",
)  # fmt: skip
"""Numeric columns that scores have."""


def neuron_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores sorted by block, layer and neuron, whatever the order of the rows.

    Raises
    ------
    InvalidInput
        If a column is missing, a neuron comes twice, or there is none.
    """
    missing = [name for name in ("layer", "block", "neuron", "flag") if name not in scores.columns]
    if missing:
        raise InvalidInput(
            f"`scores` must have the column {missing[0]!r}; pass the frame of NeuronScores."
        )
    if scores.empty:
        raise InvalidInput("`scores` must hold at least one neuron; got none.")
    table = scores.sort_values(["block", "layer", "neuron"], ignore_index=True)
    twice = table[table.duplicated(["layer", "neuron"])]
    if len(twice):
        raise InvalidInput(
            f"`scores` must hold a neuron once; got {twice['neuron'].iloc[0]} of layer "
            f"{twice['layer'].iloc[0]!r} again: pass the frame of one run."
        )
    return table


def column(table: pd.DataFrame, by: str) -> "pd.Series[float]":
    """Return a numeric or derived column; `UnknownName` if there is none of this name."""
    numeric = table.select_dtypes("number").columns.tolist()
    derived = [name for name, (source, _) in DERIVED.items() if source in numeric]
    known = [*numeric, *derived]
    by = choice("by", by, known, kind="column", remedy="Choose a numeric column.")
    if by in derived:
        source, function = DERIVED[by]
        return function(table[source])
    return table[by]


def rows_of(table: pd.DataFrame) -> Rows:
    """Return the rows of every layer, in the order of the table."""
    groups = table.groupby("layer", sort=False)["neuron"]
    return {str(name): neurons.to_numpy(np.int64) for name, neurons in groups}
