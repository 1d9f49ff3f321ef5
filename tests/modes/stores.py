"""Recorded inputs made by hand."""

import torch
from torch import Tensor

from entangle.recording.stream import ByteBudget, TokenStore
from entangle.seeding import torch_rng


def store_of(tokens: Tensor, *, memory: int = 2**20) -> TokenStore:
    """Return a store that holds tokens, in chunks of 7."""
    store = TokenStore(ByteBudget(memory))
    for chunk in tokens.split(7):
        store.append(chunk)
    return store


def normal(*shape: int, name: str = "tokens") -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=torch_rng(0, name))
