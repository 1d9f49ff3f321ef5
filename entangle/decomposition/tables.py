"""The tables of a decomposition: their columns, in order, with their types."""

from collections.abc import Mapping, Sequence

import pandas as pd

_STR, _INT, _FLOAT = "str", "int64", "float64"
_NEURON = {"layer": _STR, "neuron": _INT}

COLUMNS: Mapping[str, Mapping[str, str]] = {
    "neurons": {
        "layer": _STR, "block": "Int64", "projection": _STR, "neuron": _INT, "experts": _INT,
        "sparsity": _FLOAT, "rmse": _FLOAT, "ri": _FLOAT, "output_wd": _FLOAT, "wd": _FLOAT,
        "weighted_wd": _FLOAT, "wd_skipped": _INT, "md": _FLOAT, "weighted_md": _FLOAT,
        "md_skipped": _INT, "realised_sparsity": _FLOAT, "smallest_cluster": _INT, "shrunk": _INT,
        "damping": _FLOAT, "mean": _FLOAT, "std": _FLOAT, "skewness": _FLOAT,
        "excess_kurtosis": _FLOAT, "ks": _FLOAT, "weight_norm": _FLOAT, "flag": _STR,
    },
    "outputs": {
        **_NEURON, "experts": _INT, "sparsity": _FLOAT, "kind": _STR, "cluster": _INT,
        "left": _FLOAT, "right": _FLOAT, "count": _INT,
    },
    "pairs": {
        **_NEURON, "input_distance": _FLOAT, "output_distance": _FLOAT, "input_normalised": _FLOAT,
        "output_normalised": _FLOAT, "token_a": _INT, "token_b": _INT,
    },
    "separated": {
        **_NEURON, "rank": _INT, "position_a": _INT, "position_b": _INT, "token_a": _STR,
        "token_b": _STR, "context_a": _STR, "context_b": _STR, "start_a": _INT, "end_a": _INT,
        "start_b": _INT, "end_b": _INT, "output_a": _FLOAT, "output_b": _FLOAT,
        "input_distance": _FLOAT, "cosine": _FLOAT, "output_distance": _FLOAT,
    },
    "router_map": {
        "layer": _STR, "experts": _INT, "position": _INT, "x": _FLOAT, "y": _FLOAT, "cluster": _INT,
    },
    "components": {
        "layer": _STR, "experts": _INT, "sparsity": _FLOAT, "cluster": _INT, "tokens": _INT,
        "components_90": _INT, "error": _FLOAT,
    },
    "modes": {
        **_NEURON, "mode": _INT, "center": _FLOAT, "left": _FLOAT, "right": _FLOAT, "tokens": _INT,
        "share": _FLOAT, "top_tokens": _STR,
    },
    "contexts": {
        **_NEURON, "mode": _INT, "rank": _INT, "position": _INT, "output": _FLOAT, "token": _STR,
        "before": _STR, "after": _STR,
    },
}  # fmt: skip
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
