"""New weights for rows of layers, which end, bit for bit, with a ``with`` block."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from entangle.models.layers import Layer
from entangle.recording.hooks import InputEdit, edit_with_inputs

Change = tuple[Layer, Tensor, Tensor]
"""A layer, indices of its rows, int64 of shape (rows,), and the weights that take their place, of
shape (rows, in_features)."""


@contextmanager
def changed_rows(changes: Sequence[Change]) -> Iterator[None]:
    """Put new weights into rows of layers inside the ``with`` block.

    Parameters
    ----------
    changes
        Rows and weights on any device, the weights in any dtype. Where two changes name one row,
        the later one holds.

    Raises
    ------
    InvalidInput
        At the end of the block, if a layer whose outputs were to be replaced has not run.

    Notes
    -----
    A layer's own weight is written to, and what was there is written back however the block ends.
    Where a weight is computed (a parametrisation, an adapter, a packed format) or is the memory of
    another module's parameter, nothing is written: the rows' outputs are computed from the new
    weights and put in the place of the old ones, so that this layer alone changes.
    """
    edits: list[InputEdit] = []
    with torch.no_grad(), ExitStack() as stack:
        for layer, rows, weight in changes:
            rows = rows.to(layer.device)
            if not layer.writable:
                bias = None if layer.bias is None else layer.bias[rows]
                edits.append((layer, partial(_replaced, rows, weight.to(layer.device), bias)))
                continue
            dense = layer.weight
            stack.callback(_write, dense, rows, dense[rows])
            _write(dense, rows, weight.to(dense))
        stack.enter_context(edit_with_inputs(edits))
        yield


def _replaced(
    rows: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor, output: Tensor
) -> Tensor:
    """Return a layer's output with that of some rows computed from other weights."""
    chosen = nn.functional.linear(
        inputs.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
    )
    return output.index_copy(-1, rows, chosen.to(output.dtype))


def _write(weight: Tensor, rows: Tensor, values: Tensor) -> None:
    weight[rows] = values
