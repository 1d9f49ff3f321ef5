"""Layers to prune, shared by the tests."""

from functools import partial

import torch
from torch import Tensor

from entangle.pruning import prune
from entangle.seeding import torch_rng

magnitude, randomly, wanda = (
    partial(prune, method=method) for method in ("magnitude", "random", "wanda")
)


def make(
    experts: int, rows: int, cols: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return Gaussian weights and well-conditioned grams of correlated, unequal inputs."""
    rng = torch_rng(seed, "pruning-tests", experts, rows, cols)
    weight = torch.randn(experts, rows, cols, generator=rng, dtype=torch.float64)
    inputs = torch.randn(experts, 4 * cols, cols, generator=rng, dtype=torch.float64)
    inputs += 0.7 * torch.randn(experts, 4 * cols, 1, generator=rng, dtype=torch.float64)
    inputs *= torch.linspace(0.5, 2, cols, dtype=torch.float64)
    return weight.to(dtype), (inputs.mT @ inputs).to(dtype)
