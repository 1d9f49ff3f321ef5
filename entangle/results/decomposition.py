"""The result of a decomposition: its tables, saved and loaded.

The tables of a decomposition: their columns, in order, with their types.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from entangle.results.base import Result, strange_layer
from entangle.runs.provenance import special_tokens_of
from entangle.runs.sealing import Schema, integers, reals, shares, texts
from entangle.runs.tables import described

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXT, _WHOLE, _ANY = texts(), integers(), reals()
_AT, _PLACE = {"layer": _TEXT, "neuron": _WHOLE}, integers(-1)
_FLAGS = ("", "constant", "nan", "inf", "coarse", "few_tokens")

SCHEMAS: Mapping[str, Schema] = {
    "neurons": {
        "layer": _TEXT, "block": integers(null=True), "projection": _TEXT, "neuron": _WHOLE,
        "experts": integers(1), "sparsity": shares(), "rmse": reals(0), "ri": _ANY,
        "output_wd": reals(0), "wd": reals(0), "weighted_wd": reals(0), "wd_skipped": _WHOLE,
        "md": reals(0), "weighted_md": reals(0), "md_skipped": _WHOLE,
        "realised_sparsity": shares(), "smallest_cluster": _WHOLE, "shrunk": _WHOLE,
        "damping": reals(0), "mean": _ANY, "std": reals(0), "skewness": _ANY,
        "excess_kurtosis": _ANY, "ks": shares(), "weight_norm": reals(0), "flag": texts(*_FLAGS),
    },
    "outputs": {
        **_AT, "experts": integers(1), "sparsity": shares(), "kind": _TEXT, "cluster": _PLACE,
        "left": _ANY, "right": _ANY, "count": _WHOLE,
    },
    "pairs": {
        **_AT, "input_distance": reals(0), "output_distance": reals(0),
        "input_normalised": reals(0), "output_normalised": reals(0), "token_a": _WHOLE,
        "token_b": _WHOLE,
    },
    "separated": {
        **_AT, "rank": _WHOLE, "position_a": _WHOLE, "position_b": _WHOLE, "token_a": _TEXT,
        "token_b": _TEXT, "context_a": _TEXT, "context_b": _TEXT, "start_a": _WHOLE,
        "end_a": _WHOLE, "start_b": _WHOLE, "end_b": _WHOLE, "output_a": _ANY, "output_b": _ANY,
        "input_distance": reals(0), "cosine": reals(-1.001, 1.001), "output_distance": reals(0),
    },
    "router_map": {
        "layer": _TEXT, "experts": integers(1), "position": _WHOLE, "x": _ANY, "y": _ANY,
        "cluster": _WHOLE,
    },
    "components": {
        "layer": _TEXT, "experts": integers(1), "sparsity": shares(), "cluster": _WHOLE,
        "tokens": _WHOLE, "components_90": _WHOLE, "error": reals(0),
        "sliced_wd": reals(0, optional=True), "ri": reals(0, optional=True),
    },
    "modes": {
        **_AT, "mode": _WHOLE, "center": _ANY, "left": _ANY, "right": _ANY, "tokens": _WHOLE,
        "share": shares(), "top_tokens": _TEXT,
    },
    "contexts": {
        **_AT, "mode": _WHOLE, "rank": _WHOLE, "position": _WHOLE, "output": _ANY,
        "token": _TEXT, "before": _TEXT, "after": _TEXT,
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


def joined(name: str, parts: Sequence[pd.DataFrame], layers: Sequence[str]) -> pd.DataFrame:
    """Put the parts of a table together, layers in the order given; of a layer as they come."""
    filled = [part for part in parts if len(part)]
    if not filled:
        return typed(name, pd.DataFrame())
    whole = pd.concat(filled, ignore_index=True)
    place = {layer: i for i, layer in enumerate(layers)}
    return typed(name, whole.iloc[whole["layer"].map(place).argsort(kind="stable")])


KIND = "decomposition"


@dataclass(frozen=True, eq=False)
class Decomposition(Result):
    """What experts make of one or several layers; every figure is drawn from these tables alone.

    A ``position`` is the index of a token in the calibration set, sequence by sequence. The
    *chosen* neurons are those asked for, or the 3 of largest WD and the typical one of a layer.
    """

    KIND, _TITLE, _TABLES = KIND, "Decomposition of", SCHEMAS

    neurons: pd.DataFrame
    """One row a (neuron, experts), of all neurons: the columns of
    `entangle.experts.routed_rows.RoutedRows.neurons`, and ``mean``, ``std``, ``skewness``,
    ``excess_kurtosis``, ``ks``, ``weight_norm`` and ``flag`` as in
    `entangle.results.scores.NeuronScores` (outputs in their own units)."""
    outputs: pd.DataFrame = field(repr=False)
    """Histograms of the chosen neurons' outputs: layer, neuron, experts, sparsity, ``kind``
    (``dense`` or ``sparse``), ``cluster`` (−1: all tokens), ``left``, ``right`` (in output units),
    ``count`` (tokens). Bins of different width; a neuron has the same edges in all its histograms.
    Bins outside a histogram's first and last token are left out."""
    pairs: pd.DataFrame = field(repr=False)
    """Random pairs of tokens with different inputs, the same for all chosen neurons of a layer:
    ``input_distance`` (‖x_a − x_b‖₂), ``output_distance`` (|y_a − y_b|), both as such and divided
    by the normalisers of mapping difficulty (maximum and median over the pairs that it is measured
    on), ``token_a``, ``token_b`` (positions)."""
    separated: pd.DataFrame = field(repr=False)
    """Pairs of tokens whose inputs are near one another and whose outputs are farthest apart, no
    token twice for a neuron: ``rank`` from 0, positions, tokens, contexts (the token is
    ``context_a[start_a:end_a]``), outputs (``output_a`` is the lower), ``input_distance``,
    ``cosine`` of the inputs, ``output_distance`` in standard deviations of the dense outputs."""
    router_map: pd.DataFrame = field(repr=False)
    """At most 5,000 tokens of a layer on their first two principal components: ``position``, ``x``,
    ``y`` (in input units), and the ``cluster`` by number of experts."""
    components: pd.DataFrame = field(repr=False)
    """One row a cluster: ``tokens``, ``components_90`` (principal components of its inputs that
    hold 90 % of their variance), ``error``: ‖sparse − dense‖² / ‖dense − mean‖², summed over its
    tokens and all neurons of the layer, the mean being that of the cluster; NaN without tokens;
    ``sliced_wd``: sliced Wasserstein distance of its inputs from those of all other clusters, in
    input units; ``ri``: its own relative improvement, the RMSE over its tokens and all neurons of
    one expert for all tokens divided by that of its own expert; NaN unless 1 is among the numbers
    of experts."""
    modes: pd.DataFrame = field(repr=False)
    """Modes of the chosen neurons, as `entangle.modes.NeuronModes.modes`."""
    contexts: pd.DataFrame = field(repr=False)
    """Examples of each mode, as `entangle.modes.NeuronModes.contexts`."""
    manifest: Mapping[str, object] = field(repr=False)
    """Model, calibration set, settings, versions, seconds and peak memory."""

    @property
    def frame(self) -> pd.DataFrame:
        """The table ``neurons``."""
        return self.neurons

    def summary(self) -> pd.DataFrame:
        """Return one row a chosen neuron.

        Returns
        -------
        pandas.DataFrame
            ``layer``, ``neuron``, ``wd``, ``modes`` (their number), ``ri_K`` for every number of
            experts K, and ``weighted_wd_change``: by what share the largest number of experts
            changes the WD (negative where it disentangles).
        """
        modes = self.modes.groupby(["layer", "neuron"], sort=False).size().rename("modes")
        rows = modes.reset_index().merge(self.neurons, on=["layer", "neuron"])
        key = ["layer", "neuron", "wd", "modes"]
        most: pd.DataFrame = rows.loc[rows["experts"] == rows["experts"].max(), key].reset_index(
            drop=True
        )
        for k in rows["experts"].drop_duplicates().tolist():
            most[f"ri_{k}"] = rows.loc[rows["experts"] == k, "ri"].to_numpy()
        weighted = rows.loc[rows["experts"] == rows["experts"].max(), "weighted_wd"].to_numpy()
        most["weighted_wd_change"] = weighted / most["wd"] - 1
        return most

    def plot(self, layer: str | None = None, **options: Any) -> "Figure":
        """Draw outputs of a layer, by default the first; see `figure_sparse_outputs`."""
        from entangle.plotting import figure_sparse_outputs

        name = str(self.neurons["layer"].iloc[0]) if layer is None else layer
        return figure_sparse_outputs(self.outputs, self.neurons, layer=name, **options)

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        numbers = ", ".join(map(str, self.neurons["experts"].drop_duplicates().tolist()))
        lines = [
            f"{self.neurons['layer'].nunique():,} layer(s), {numbers} experts, "
            f"{described(self.manifest, 'settings', 'sparsity')} of the weights zero, "
            f"{described(self.manifest, 'calibration', 'n_tokens')} tokens of "
            f"{described(self.manifest, 'calibration', 'source')}, "
            f"special tokens: {special_tokens_of(self.manifest, 'calibration')}",
            "the neurons looked at closely:",
        ]
        return lines, self.summary()

    def _fault(self) -> str | None:
        """Return what does not fit: each neuron is there once for every number of experts."""
        strange = strange_layer(self.neurons["layer"].unique().tolist(), self.manifest)
        if strange is not None:
            return strange
        for (layer, experts), part in self.neurons.groupby(["layer", "experts"], sort=False):
            if part["neuron"].tolist() != list(range(len(part))):
                return (
                    f"the neurons of {layer!r} with {experts} experts are not 0 to "
                    f"{len(part) - 1}, once and in order"
                )
        return None


def load_decomposition(path: str | os.PathLike[str]) -> Decomposition:
    """Load a decomposition that `Decomposition.save` wrote; errors as `Result.load`."""
    return Decomposition.load(path)
