"""Products and parts of rows whose last bits do not depend on how many rows are worked on at once.

A library multiplies matrices of another shape by other instructions, and sums the single row of a
tensor by all threads. On the CPU products are therefore made of tiles of one size, and no row is
left alone.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from entangle.kernels.dispatch import dispatch, on_cpu

ROWS = 64
"""Rows of a tile."""

_TOKENS = 1024
_STEP = 16  # tokens of the last tile, padded, are a multiple of it


def row_parts(n_rows: int, at_once: int) -> Iterator[slice]:
    """Yield slices of about ``at_once`` rows, of whole tiles where these are fewer.

    Every part has two rows or more, but where there is only one.
    """
    size = max(2, at_once // ROWS * ROWS or at_once)
    starts = [*range(0, max(1, n_rows - 1), size), n_rows]
    return map(slice, starts[:-1], starts[1:])


def _in_tiles(rows: Tensor, tokens: Tensor, *, out: Tensor) -> None:
    filled = pad(rows, (0, 0, 0, -rows.shape[0] % ROWS))
    work = rows.new_empty(ROWS, _TOKENS)
    for start in range(0, tokens.shape[0], _TOKENS):
        some = tokens[start : start + _TOKENS]
        count = some.shape[0]
        some = pad(some, (0, 0, 0, -count % _STEP))
        product = work if some.shape[0] == _TOKENS else rows.new_empty(ROWS, some.shape[0])
        for first in range(0, rows.shape[0], ROWS):
            place = out[first : first + ROWS, start : start + count]
            torch.mm(filled[first : first + ROWS], some.T, out=product)
            place.copy_(product[: place.shape[0], :count])


@dispatch(_in_tiles, where=on_cpu)
def multiply(
    rows: Float[Tensor, "rows features"],
    tokens: Float[Tensor, "tokens features"],
    *,
    out: Float[Tensor, "rows tokens"],
) -> None:
    """Write ``rows @ tokens.T`` to ``out``, on the CPU in tiles of one size.

    Parameters
    ----------
    rows
        Weights, float32.
    tokens
        Inputs, float32, on the same device.
    out
        What is written.
    """
    torch.matmul(rows, tokens.T, out=out)
