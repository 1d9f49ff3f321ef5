"""Round-to-nearest quantisation on a per-row asymmetric min-max grid."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.checks import whole

MAX_BITS = 16


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


def quantize(
    weight: Float[Tensor, "experts rows cols"], bits: int
) -> Float[Tensor, "experts rows cols"]:
    """Round every weight to its row's grid."""
    grid = fit_grid(weight, bits)
    return Grid(grid.scale[..., None], grid.zero[..., None], grid.top).round(weight)
