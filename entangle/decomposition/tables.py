"""The tables of a decomposition: their columns, in order, with their types."""

from collections.abc import Mapping, Sequence

import pandas as pd

from entangle.schema import Schema, integers, reals, shares, texts

_TEXT, _WHOLE, _ANY = texts(), integers(), reals()
_AT, _PLACE = {"layer": _TEXT, "neuron": _WHOLE}, integers(-1)
_FLAGS = ("", "constant", "nan", "inf", "coarse")

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
