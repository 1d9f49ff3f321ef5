"""Layers made up by hand, and their bits."""

import torch
from torch import Tensor, nn

from entangle.models.layers import Layer, list_layers


def bits(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter as integers, so that NaN and -0 compare as bits."""
    return {name: p.detach().clone().view(torch.int32) for name, p in module.named_parameters()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def toy(weight: list[list[float]], bias: list[float], dtype: torch.dtype = torch.float32) -> Layer:
    linear = nn.Linear(len(weight[0]), len(weight), dtype=dtype).requires_grad_(requires_grad=False)
    linear.weight.copy_(torch.tensor(weight))
    linear.bias.copy_(torch.tensor(bias))
    return list_layers(nn.Sequential(linear))[0]


def identity(dtype: torch.dtype = torch.float32) -> Layer:
    return toy(torch.eye(3).tolist(), [0.0] * 3, dtype)
