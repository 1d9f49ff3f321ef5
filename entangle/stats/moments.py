"""Moments from the sums of powers that a sketch keeps."""

import torch
from torch import Tensor


def power_sums(x: Tensor, square: Tensor, cube: Tensor) -> tuple[Tensor, ...]:
    """Return the sums over tokens of the first four powers of x; the others are work space."""
    torch.mul(x, x, out=square)
    torch.mul(square, x, out=cube)
    first, second, third = x.sum(0), square.sum(0), cube.sum(0)
    return first, second, third, square.mul_(square).sum(0)


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population standard deviation from the first two raw moments."""
    shift = moments[0]
    return shift, (moments[1] - shift.square()).clamp_min(0).sqrt()


def higher_moments(moments: Tensor, shift: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return skewness and excess kurtosis from four raw moments."""
    _, second, third, fourth = moments
    central3 = third - 3 * shift * second + 2 * shift**3
    central4 = fourth - 4 * shift * third + 6 * shift.square() * second - 3 * shift**4
    return central3 / spread**3, central4 / spread**4 - 3
