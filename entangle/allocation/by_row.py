"""Formats that hold every neuron: a plain CSV table, and vectors in safetensors.

Formats that hold one number a layer: AlphaPruning's array and EvoPress' levels.
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from entangle.allocation.allocation import ROW, Allocation
from entangle.errors import InvalidInput
from entangle.runs.reading import READ_ERRORS
from entangle.runs.sealing import manifest_digest

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


EVOPRESS_LEVELS = 8
"""Levels on each side of the mean in EvoPress' data base, its own default."""


def write_alphapruning(allocation: Allocation, order: Sequence[tuple[str, int]]) -> bytes:
    """Return a ``.npy`` array of float64: the sparsity of every layer of ``order``.

    Parameters
    ----------
    allocation
        What to write.
    order
        Name and number of weights of all linears of the blocks, in module order, as AlphaPruning
        lists them; those that the allocation does not hold get 0.
    """
    shares = _layer_shares(allocation)
    values = np.array([shares.get(name, 0.0) for name, _ in order], dtype=np.float64)
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def alphapruning_usage(allocation: Allocation, order: Sequence[tuple[str, int]]) -> str:
    """Say with which settings AlphaPruning turns the array into these very sparsities.

    It maps the array linearly onto [1 − ε, 1 + ε] and scales to the mean S over all weights. With
    ε = (max − min) / (max + min), that is the array times a constant.
    """
    shares = _layer_shares(allocation)
    values = [shares.get(name, 0.0) for name, _ in order]
    mean = allocation.n_zeros / sum(weights for _, weights in order)
    low, high = min(values), max(values)
    if low == high:
        return (
            "all layers are equally sparse, where AlphaPruning divides by 0: prune uniformly there "
            f"(--sparsity_ratio {mean!r} without _ww)."
        )
    epsilon = (high - low) / (high + low)
    return (
        "AlphaPruning reproduces these sparsities with --mapping_type layer_wise --epsilon "
        f"{epsilon!r} --sparsity_ratio {mean!r}, and the file, without its ending, as --ww_metric."
    )


def read_alphapruning(path: Path, order: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Return the sparsity of every layer of ``order`` from what `write_alphapruning` wrote."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInput(
            f"{str(path)!r} cannot be read as an array ({error}); export it anew."
        ) from error
    if values.shape != (len(order),) or values.dtype.kind != "f":
        raise InvalidInput(
            f"{str(path)!r} must hold {len(order)} floats, one a layer; got {values.shape} of "
            f"{values.dtype}."
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise InvalidInput(
            f"{str(path)!r} must hold sparsities in [0, 1]; got values from {values.min():g} to "
            f"{values.max():g}, which are scores: map them first."
        )
    return {name: float(value) for (name, _), value in zip(order, values, strict=True)}


def write_evopress(allocation: Allocation) -> bytes:
    """Return one line a layer, ``module: level``.

    Level l of a layer of n weights is sparsity S + l · d / n, where S is the overall sparsity and d
    the step of `evopress_step`. Levels add up to 0, so that the budget holds as it is, unless a
    layer that is nearly dense or empty has no level on the side where it is needed.
    """
    levels = _levels(allocation)
    return "\n".join(f"{name}: {level}" for name, level in levels.items()).encode()


def evopress_step(allocation: Allocation) -> int:
    """Return the smallest step, in weights, at which no layer is beyond `EVOPRESS_LEVELS`."""
    farthest = max(abs(move) for move in _moves(allocation).values())
    return max(1, math.ceil(farthest / EVOPRESS_LEVELS))


def evopress_usage(allocation: Allocation) -> str:
    """Say which data base of EvoPress the levels belong to, and what rounding to them costs."""
    step = evopress_step(allocation)
    levels, moves = _levels(allocation), _moves(allocation)
    worst = max(
        abs(levels[name] * step - move) / weights
        for (name, move), weights in zip(moves.items(), _weights(allocation).values(), strict=True)
    )
    moved = step * sum(levels.values())
    return (
        f"the levels are those of EvoPress' prune.py with --sparsity {allocation.overall!r} "
        f"--weights_diff {step} --num_levels {EVOPRESS_LEVELS}; rounding to them moves the "
        f"sparsity of a layer by at most {worst:.2g}, and the number of all zeros by {moved}."
    )


def read_evopress(
    path: Path, weights: Mapping[str, int], *, sparsity: float, step: int
) -> dict[str, float]:
    """Return the sparsity of every layer from lines ``module: level``.

    Parameters
    ----------
    path
        The file.
    weights
        Number of weights of the layers, by name.
    sparsity, step
        Of level 0, and the weights between two levels.
    """
    found: dict[str, float] = {}
    for number, line in enumerate(_lines(path), start=1):
        name, separator, level = (part.strip() for part in line.partition(":"))
        if not separator or not level.removeprefix("-").isdecimal():
            raise InvalidInput(
                f"line {number} of {str(path)!r} must read `module: level`; got {line[:60]!r}."
            )
        if name not in weights:
            raise InvalidInput(
                f"line {number} of {str(path)!r} names layer {name!r}, which is not among the "
                f"{len(weights)} given."
            )
        share = sparsity + int(level) * step / weights[name]
        if not -1e-9 <= share <= 1.0 + 1e-9:
            raise InvalidInput(
                f"level {level} of {name!r} in {str(path)!r} is sparsity {share:g}, which must be "
                "in [0, 1]; give the sparsity and step of its data base."
            )
        found[name] = min(1.0, max(0.0, share))
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{str(path)!r} is no text ({error}); export it anew.") from error
    return [line for line in text.splitlines() if line.strip()]


def _layer_shares(allocation: Allocation) -> dict[str, float]:
    weights = _weights(allocation)
    return {name: int(zeros.sum()) / weights[name] for name, zeros in allocation.zeros.items()}


def _weights(allocation: Allocation) -> dict[str, int]:
    return {
        name: zeros.numel() * allocation.in_features[name]
        for name, zeros in allocation.zeros.items()
    }


def _moves(allocation: Allocation) -> dict[str, float]:
    """Return by how many zeros every layer differs from the overall sparsity; the sum is 0."""
    weights = _weights(allocation)
    return {
        name: int(zeros.sum()) - allocation.overall * weights[name]
        for name, zeros in allocation.zeros.items()
    }


def _levels(allocation: Allocation) -> dict[str, int]:
    """Round every layer to a level so that the levels add up to 0, the nearest ones first."""
    step, share = evopress_step(allocation), allocation.overall
    exact = {name: move / step for name, move in _moves(allocation).items()}
    levels, room = {}, {}
    for name, weights in _weights(allocation).items():
        lowest, highest = -int(share * weights / step), int((1.0 - share) * weights / step)
        levels[name] = max(lowest, math.floor(exact[name]))
        room[name] = min(highest, math.ceil(exact[name])) - levels[name]
    nearest = sorted(levels, key=lambda name: levels[name] - exact[name])
    for name in nearest:
        if sum(levels.values()) < 0 and room[name] > 0:
            levels[name] += 1
    return levels
