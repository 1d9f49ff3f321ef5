"""Formats that hold one number a layer: AlphaPruning's array and EvoPress' levels."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from entangle.allocation.allocation import Allocation
from entangle.errors import InvalidInput

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
