"""Round-to-nearest quantisation: on an asymmetric min-max grid a row, or a symmetric one a group.

The grids are those of the dense weight; zero is a value of each of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from entangle.checks import whole
from entangle.errors import InvalidInput

MAX_BITS = 16
GROUP_SIZE = 128
"""Neighbouring columns that share a symmetric grid."""
GROUP_BITS = (2, 8)
"""Fewest and most bits of a grid a group."""
_STEPS = 255  # the largest step of a group


@dataclass(frozen=True, eq=False)
class Grid:
    """One grid of ``2**bits`` evenly spaced values per row; zero is always one of them."""

    scale: Float[Tensor, "experts rows *one"]
    """Distance of neighbouring values, in units of the weight."""
    zero: Float[Tensor, "experts rows *one"]
    """Index of the value 0, an integer in [0, top]."""
    top: int
    """Largest index, ``2**bits - 1``."""

    def round(self, weight: Float[Tensor, "experts rows *n"]) -> Float[Tensor, "experts rows *n"]:
        """Return the grid value nearest to each weight; the shapes must broadcast."""
        index = (weight / self.scale).round_().add_(self.zero).clamp_(0, self.top)
        return index.sub_(self.zero).mul_(self.scale)


def check_bits(bits: object) -> int | None:
    """Return ``bits`` if it is None or an integer in [1, 16], raise `InvalidInput` otherwise."""
    return None if bits is None else whole("bits", bits, least=1, most=MAX_BITS)


def check_group_size(group_size: object, bits: int | None) -> int | None:
    """Return ``group_size``: None, or 128 beside 2 to 8 bits.

    Raises
    ------
    InvalidInput
        For any other.
    """
    if group_size is None:
        return None
    if whole("group_size", group_size, least=1) != GROUP_SIZE:
        raise InvalidInput(f"`group_size` must be None or {GROUP_SIZE}; got {group_size}.")
    least, most = GROUP_BITS
    if bits is None or not least <= bits <= most:
        raise InvalidInput(f"`group_size` needs `bits` in [{least}, {most}]; got {bits}.")
    return GROUP_SIZE


def fit_grid(weight: Float[Tensor, "experts rows cols"], bits: int) -> Grid:
    """Fit the grid that spans each row's smallest and largest weight, and zero.

    A row of zeros gets the range [-1, 1].

    Source: ``Quantizer.find_params`` (asymmetric, per channel) in github.com/IST-DASLab/sparsegpt.
    """
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    empty = low == high
    low, high = torch.where(empty, -1, low), torch.where(empty, 1, high)
    scale = (high - low) / (2**bits - 1)
    return Grid(scale=scale, zero=(-low / scale).round(), top=2**bits - 1)


class GroupScales(NamedTuple):
    """The symmetric grids of all groups of 128 columns: values are ``scale · step`` apart."""

    scale: Float[Tensor, "experts rows"]
    """A number of float32, whatever its dtype."""
    steps: UInt8[Tensor, "experts rows groups"]
    """In [1, 255]."""


def fit_groups(weight: Float[Tensor, "experts rows cols"], bits: int) -> GroupScales:
    """Fit a symmetric grid to every 128 neighbouring columns of a row, the last ones perhaps fewer.

    Zero has the index ``2**(bits - 1)``, so that one value more lies below it than above. A group
    spans its smallest and largest weight; steps are rounded up, so that none is cut off. A row's
    widest group has the step 255. Rows and groups of zeros have the narrowest grid there is.

    Parameters
    ----------
    weight
        Dense, float32 or float64.
    bits
        In [2, 8].
    """
    zero = 2 ** (bits - 1)
    spans = [part.aminmax(dim=-1) for part in weight.split(GROUP_SIZE, -1)]
    unit = torch.stack([torch.maximum(high / (zero - 1), -low / zero) for low, high in spans], -1)
    scale = (unit.amax(-1) / _STEPS).float().clamp_(min=torch.finfo(torch.float32).tiny)
    steps = (unit / scale[..., None]).ceil_().clamp_(1, _STEPS)
    return GroupScales(scale.to(weight.dtype), steps.to(torch.uint8))


def fit_grids(
    weight: Float[Tensor, "experts rows cols"], bits: int, group_size: int | None = None
) -> list[Grid]:
    """Return the grid of every column: its row's, or with a ``group_size`` its group's."""
    cols = weight.shape[-1]
    if group_size is None:
        return [fit_grid(weight, bits)] * cols
    scale, steps = fit_groups(weight, bits)
    zero = torch.full_like(scale, 2 ** (bits - 1))
    grids = [Grid(scale * step, zero, 2**bits - 1) for step in steps.to(scale.dtype).unbind(-1)]
    return [grids[column // GROUP_SIZE] for column in range(cols)]


def quantize(
    weight: Float[Tensor, "experts rows cols"], bits: int, group_size: int | None = None
) -> Float[Tensor, "experts rows cols"]:
    """Round every weight to its row's or group's grid."""
    grids = fit_grids(weight, bits, group_size)
    width = group_size or weight.shape[-1]
    rounded = [
        Grid(grid.scale[..., None], grid.zero[..., None], grid.top).round(part)
        for part, grid in zip(weight.split(width, -1), grids[::width], strict=True)
    ]
    return torch.cat(rounded, -1)
