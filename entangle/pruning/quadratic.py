"""Quadratic forms of rows: what a change of a weight does to the squared error of the output."""

import torch
from jaxtyping import Float
from torch import Tensor

_PANEL = 1024


def quadratic(
    rows: Float[Tensor, "experts rows cols"], gram: Float[Tensor, "experts cols cols"]
) -> Float[Tensor, "experts rows"]:
    """Return ``r G r^T`` of every row, for symmetric ``G`` of the rows' dtype.

    On a GPU the products are those of the upper triangle only, a panel of columns at a time.
    """
    if rows.device.type == "cpu":
        return torch.einsum("erc,erc->er", rows @ gram, rows)
    return _by_panels(rows, gram)


def _by_panels(
    rows: Float[Tensor, "experts rows cols"], gram: Float[Tensor, "experts cols cols"]
) -> Float[Tensor, "experts rows"]:
    total = rows.new_zeros(rows.shape[:2])
    for start in range(0, rows.shape[2], _PANEL):
        stop = min(start + _PANEL, rows.shape[2])
        panel = gram[:, :stop, start:stop].clone()
        panel[:, :start] *= 2
        product = rows[..., :stop] @ panel
        total += product.mul_(rows[..., start:stop]).sum(-1)
    return total
