"""The inner loop of SparseGPT: settle a few columns whose mask is known."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entangle.pruning.quantize import Grid


def eliminate(
    columns: Float[Tensor, "experts width rows"],
    factor: Float[Tensor, "experts width width"],
    pruned: Bool[Tensor, "experts width rows"],
    *,
    grid: Grid | None = None,
) -> Float[Tensor, "experts width rows"]:
    """Settle neighbouring columns from left to right, each making up for those before it.

    Parameters
    ----------
    columns
        The columns as the columns left of them require them, transposed so that a column is
        contiguous. Overwritten by the final values.
    factor
        The diagonal block of ``U`` that belongs to these columns.
    pruned
        True where the final value is 0.
    grid
        Rounds the kept values; None keeps them as they are.

    Returns
    -------
    Tensor
        The errors ``(w_j - q_j) / U_jj``. The columns right of these are still to be lowered by
        ``errors^T U_right``.

    Notes
    -----
    Summed over all columns, a row's squared errors are its loss under the damped gram.
    """
    errors = torch.empty_like(columns)
    for j in range(columns.shape[1]):
        column, error, later = columns[:, j], errors[:, j], columns[:, j + 1 :]
        final = (column if grid is None else grid.round(column)).masked_fill(pruned[:, j], 0)
        torch.sub(column, final, out=error).div_(factor[:, j, j, None])
        column.copy_(final)
        later.addcmul_(factor[:, j, j + 1 :, None], error[:, None], value=-1)
    return errors
