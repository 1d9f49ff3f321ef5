"""The grids of a dense weight as packed experts store them."""

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.packed.formats import Codes
from entangle.pruning.grid import check_bits, check_group_size, fit_grid, fit_groups


def codes_of(
    weight: Float[Tensor, "experts rows cols"], bits: int, group_size: int | None = None
) -> Codes:
    """Return the grid that `entangle.pruning.prune` rounds the weights of experts to.

    Parameters
    ----------
    weight
        The dense weight of every expert; a layer's own is expanded to all of them.
    bits
        In [1, 8]. Up to 4 are stored as 4, more as 8.
    group_size
        As in `entangle.pruning.prune`.

    Raises
    ------
    InvalidInput
        If no packed format stores so many bits, or the group size breaks a rule.
    """
    if (check_bits(bits) or 0) > 8:
        raise InvalidInput(f"packed codes have at most 8 `bits`; got {bits}.")
    group_size = check_group_size(group_size, bits)
    stored, wide = (
        4 if bits <= 4 else 8,
        weight.to(torch.promote_types(weight.dtype, torch.float32)),
    )
    if group_size is None:
        grid = fit_grid(wide, bits)
        return Codes(stored, grid.scale, grid.zero)
    scale, steps = fit_groups(wide, bits)
    return Codes(stored, scale, torch.full_like(scale, 2 ** (bits - 1)), steps)
