"""How many weights a neuron can lose at a time."""

import re

import numpy as np

from entangle.allocation.rows import Counts, Rows
from entangle.errors import InvalidInput


def step_sizes(rows: Rows, pattern: str) -> Counts:
    """Return the weights that a neuron can lose at a time: 1, or ``in_features / m``.

    Raises
    ------
    InvalidInput
        For an unknown pattern, or one that does not divide a layer's inputs.
    """
    if pattern == "row":
        return np.ones_like(rows.weights)
    match = re.fullmatch(r"n:([1-9]\d*)", pattern)
    if match is None:
        raise InvalidInput(
            f"`pattern` must be row, or n:m with a number for m, such as n:4; got {pattern!r}."
        )
    group = int(match[1])
    for name, width in zip(rows.names, rows.widths.tolist(), strict=True):
        if width % group:
            raise InvalidInput(
                f"`pattern` {pattern!r} needs a multiple of {group} inputs; layer {name!r} has "
                f"{width}: use another m, or pattern 'row'."
            )
    return rows.weights // group
