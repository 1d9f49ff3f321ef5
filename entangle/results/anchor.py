"""The result of an outside anchor: what dictionaries of a layer's inputs say about its neurons."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from entangle.results.base import Result, strange_layer
from entangle.runs.provenance import special_tokens_of
from entangle.runs.sealing import Schema, integers, reals, texts
from entangle.runs.tables import described

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "anchor"
_TEXT, _WHOLE, _ANY, _UNIT = texts(), integers(), reals(), reals(-1.001, 1.001)
_ENDS = {f"{name}{end}": _UNIT for name in ("spearman", "partial") for end in ("", "_low", "_high")}

SCHEMAS: Mapping[str, Schema] = {
    "anchor": {
        "layer": _TEXT, "block": integers(null=True), "projection": _TEXT, "neuron": _WHOLE,
        "dictionary": _TEXT, "participation": reals(0), "entropy": reals(-1e-6), "wd": reals(0),
        "md": reals(0), "mean": _ANY, "std": reals(0), "skewness": _ANY, "excess_kurtosis": _ANY,
        "ks": reals(0), "weight_norm": reals(0), "flag": _TEXT,
    },
    "dictionaries": {
        "layer": _TEXT, "dictionary": _TEXT, "atoms": integers(1), "used": _WHOLE,
        "active": reals(0), "unexplained": reals(0), "tokens_fitted": _WHOLE,
        "tokens_measured": _WHOLE,
    },
    "reads": {
        "layer": _TEXT, "neuron": _WHOLE, "wd": reals(0), "rank": _WHOLE, "atom": _WHOLE,
        "share": reals(0), "position": _WHOLE, "token": _TEXT, "before": _TEXT, "after": _TEXT,
    },
    "correlations": {
        "dictionary": _TEXT, "scope": _TEXT, "layer": _TEXT, "predictor": _TEXT, "n": _WHOLE,
        "n_layers": _WHOLE, **_ENDS,
    },
}  # fmt: skip
"""What every column may hold, by the table's name."""

COLUMNS: Mapping[str, Mapping[str, str]] = {
    table: {name: column.dtype for name, column in schema.items()}
    for table, schema in SCHEMAS.items()
}
"""Type of every column, by the table's name."""


def typed(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of the table ``name``, in order and with their types."""
    types = COLUMNS[name]
    return rows.reindex(columns=list(types)).astype(types).reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class Anchor(Result):
    """How many atoms of a dictionary every neuron reads, and whether scores tell."""

    KIND, _TITLE, _TABLES = KIND, "Outside anchor of", SCHEMAS

    frame: pd.DataFrame
    """One row a (neuron, dictionary): ``participation`` (how many atoms it reads: (Σ q)² / Σ q² of
    q_a = E[c_a²] (w · d_a)²), ``entropy`` of the same shares in nats, and the neuron's scores as in
    `entangle.results.scores.NeuronScores`."""
    dictionaries: pd.DataFrame = field(repr=False)
    """One row a (layer, dictionary): ``atoms``, ``used`` (that any measured input has), ``active``
    (atoms of an input, on average), ``unexplained`` (share of the inputs' variance that the
    dictionary misses, on tokens that it was not fitted to), ``tokens_fitted`` (until it was full),
    ``tokens_measured``."""
    reads: pd.DataFrame = field(repr=False)
    """What the neurons of largest WD and a typical one read most, where atoms are tokens: ``share``
    of the neuron's energy, and the atom's ``token`` with the text around it; ``position`` is the
    token's index in the calibration set."""
    correlations: pd.DataFrame = field(repr=False)
    """Rank correlation of scores with ``participation``, with bootstrap intervals over neurons (of
    ``mean of layers``: Student's over layers), and ``partial``, with the settings'
    ``controls`` held fixed; rows as of `entangle.experiments.predictors.predictor_table`."""
    manifest: Mapping[str, object] = field(repr=False)
    """Model, calibration set, settings, versions, seconds and peak memory."""

    def summary(self) -> pd.DataFrame:
        """Return the correlations over all layers (of one layer: there), and what is missed."""
        rows = self.correlations
        scope = "mean of layers" if self.dictionaries["layer"].nunique() > 1 else "layer"
        missed = self.dictionaries.groupby("dictionary", sort=False)["unexplained"].mean()
        table = rows[rows["scope"] == scope].drop(columns=["scope", "layer", "n_layers"])
        return table.assign(unexplained=table["dictionary"].map(missed)).reset_index(drop=True)

    def plot(self, **options: Any) -> "Figure":
        """Draw the correlations; see `figure_anchor`."""
        from entangle.plotting import figure_anchor

        return figure_anchor(self.correlations, **options)

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        lines = [
            f"{self.dictionaries['layer'].nunique():,} layer(s), dictionaries: "
            f"{', '.join(self.dictionaries['dictionary'].drop_duplicates())}; "
            f"{described(self.manifest, 'calibration', 'n_tokens')} tokens of "
            f"{described(self.manifest, 'calibration', 'source')}, "
            f"special tokens: {special_tokens_of(self.manifest, 'calibration')}",
            "does a score tell how many atoms a neuron reads?",
        ]
        return lines, self.summary()

    def _fault(self) -> str | None:
        return strange_layer(self.frame["layer"].unique().tolist(), self.manifest)


def load_anchor(path: str | os.PathLike[str]) -> Anchor:
    """Load an anchor that `Anchor.save` wrote; errors as `Result.load`."""
    return Anchor.load(path)
