"""Formats that hold every neuron: a plain CSV table, and vectors in safetensors."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from entangle.allocation.allocation import Allocation
from entangle.allocation.steps import ROW
from entangle.errors import InvalidInput
from entangle.reading import READ_ERRORS
from entangle.sealing import manifest_digest

_COLUMNS = ("layer", "block", "neuron", "in_features", "zeros", "sparsity")
_METADATA, _DIGEST = "entangle rows", "sha256"


def write_csv(allocation: Allocation) -> bytes:
    """Return a table with one line a neuron: layer, block, neuron, in_features, zeros, sparsity.

    Column ``block`` is empty outside the blocks; ``experts`` follows where the allocation has
    them, and ``pattern`` where it is n:m.
    """
    table = allocation.neurons
    per_layer = allocation.layers.set_index("layer")
    for name in ("block", "in_features", "experts"):
        if name in per_layer.columns:
            table[name] = per_layer[name].reindex(table["layer"]).array
    extra = ["experts"] if allocation.experts is not None else []
    if allocation.pattern != ROW:
        table["pattern"] = allocation.pattern
        extra.append("pattern")
    text = table[[*_COLUMNS, *extra]].to_csv(index=False, lineterminator="\n")
    return text.encode()


def read_csv(path: Path) -> dict[str, Any]:
    """Return the fields of an allocation from what `write_csv` wrote, all but its manifest."""
    try:
        table = pd.read_csv(io.BytesIO(path.read_bytes()), dtype={"layer": "str"})
    except READ_ERRORS as error:
        raise _damaged(path, str(error)) from error
    for name in _COLUMNS:
        if name not in table.columns:
            raise _damaged(path, f"it has no column {name!r}")
    for name in ("neuron", "in_features", "zeros"):
        if table[name].dtype.kind not in "iu":
            raise _damaged(path, f"column {name!r} must hold whole numbers")
    for name in ("block", "experts"):
        if name in table.columns and table[name].dtype.kind not in "fiu":
            raise _damaged(path, f"column {name!r} must hold whole numbers")
    fields: dict[str, Any] = {"zeros": {}, "in_features": {}, "blocks": {}, "experts": None}
    if "pattern" in table.columns:
        patterns = table["pattern"].unique().tolist()
        if len(patterns) != 1:
            raise _damaged(path, f"column 'pattern' must be the same throughout; got {patterns}")
        fields["pattern"] = str(patterns[0])
    for key, part in table.groupby("layer", sort=False):
        name, part = str(key), part.sort_values("neuron")
        if part["neuron"].tolist() != list(range(len(part))):
            raise _damaged(path, f"the neurons of {name!r} are not 0 to {len(part) - 1}, once each")
        fields["zeros"][name] = torch.from_numpy(part["zeros"].to_numpy(np.int64).copy())
        fields["in_features"][name] = _single(path, part, "in_features")
        if part["block"].notna().any():
            fields["blocks"][name] = _single(path, part, "block")
        if "experts" in table.columns:
            fields["experts"] = (fields["experts"] or {}) | {name: _single(path, part, "experts")}
    if table["sparsity"].dtype.kind not in "fiu" or _differ(table).any():
        raise _damaged(path, "column 'sparsity' must be 'zeros' / 'in_features'")
    return fields


def _differ(table: pd.DataFrame) -> pd.Series:
    """Tell for each neuron whether its sparsity is not its zeros' share; so is NaN."""
    off = table["sparsity"] * table["in_features"] - table["zeros"]
    return ~(off.abs() <= 1e-6)


def write_rows(allocation: Allocation) -> bytes:
    """Return a safetensors file with one float64 vector of sparsities a layer, named after it.

    What else the allocation holds, save its manifest, is JSON in the metadata.
    """
    described = {
        "layers": list(allocation.zeros),
        "in_features": dict(allocation.in_features),
        "blocks": dict(allocation.blocks),
        "experts": None if allocation.experts is None else dict(allocation.experts),
        "pattern": allocation.pattern,
    }
    shares = dict(allocation.sparsity)
    described[_DIGEST] = _digest(shares, described)
    return to_safetensors(shares, {_METADATA: json.dumps(described)})


def read_rows(path: Path) -> dict[str, Any]:
    """Return the fields of an allocation from what `write_rows` wrote, all but its manifest."""
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[_METADATA])
            shares = {name: file.get_tensor(name) for name in described["layers"]}
            digest = described.pop(_DIGEST, None)  # which earlier versions did not write
            if digest is not None and digest != _digest(shares, described):
                raise ValueError("it was altered")
            del described["layers"]
            widths = described["in_features"]
            zeros = {name: _zeros(share, widths[name]) for name, share in shares.items()}
    except READ_ERRORS as error:
        raise _damaged(path, str(error)) from error
    return {"zeros": zeros, **described}


def _digest(shares: Mapping[str, Tensor], described: Mapping[str, object]) -> str:
    """Return the SHA-256 of what a file says: its description, then every vector's values."""
    found = hashlib.sha256(manifest_digest(described).encode())
    for share in shares.values():
        found.update(share.numpy().astype("<f8").tobytes())
    return found.hexdigest()


def _zeros(share: Tensor, width: int) -> Tensor:
    exact = share.double() * width
    if not bool(((exact - exact.round()).abs() < 1e-6).all()):
        raise ValueError(f"sparsities are no multiples of 1/{width}")
    return exact.round().long()


def _single(path: Path, part: pd.DataFrame, column: str) -> int:
    values = part[column].unique()
    if len(values) != 1 or values[0] != int(values[0]):
        name = part["layer"].iloc[0]
        raise _damaged(path, f"column {column!r} must be one whole number throughout {name!r}")
    return int(values[0])


def _damaged(path: Path, why: str) -> InvalidInput:
    return InvalidInput(f"{str(path)!r} cannot be read as an allocation ({why}); export it anew.")
