"""How many weights a neuron can lose at a time."""

import re

import numpy as np

from entangle.allocation.rows import Counts, Rows
from entangle.errors import InvalidInput

ROW = "row"
"""The pattern that lets a neuron lose any number of weights."""


def step_sizes(rows: Rows, pattern: str) -> Counts:
    """Return the weights that a neuron can lose at a time: 1, or ``in_features / m``.

    Raises
    ------
    InvalidInput
        For an unknown pattern, or one that does not divide a layer's inputs.
    """
    layers = zip(rows.names, rows.widths.tolist(), strict=True)
    return np.repeat([step_size(name, width, pattern) for name, width in layers], rows.counts)


def step_size(layer: str, width: int, pattern: str) -> int:
    """Return the step of the neurons of one layer, of ``width`` weights; errors as `step_sizes`."""
    if pattern == ROW:
        return 1
    match = re.fullmatch(r"n:([1-9]\d*)", pattern)
    if match is None:
        raise InvalidInput(
            f"`pattern` must be row, or n:m with a number for m, such as n:4; got {pattern!r}."
        )
    group = int(match[1])
    if width % group:
        raise InvalidInput(
            f"`pattern` {pattern!r} needs a multiple of {group} inputs; layer {layer!r} has "
            f"{width}: use another m, or pattern 'row'."
        )
    return width // group
