"""Work space that is used again instead of being allocated for every batch.

A large block that is freed goes back to the operating system, and the next one of its size is
mapped page by page when it is first written to, which takes longer than the arithmetic.
"""

import math

import torch
from torch import Tensor


class Scratch:
    """Hands out tensors of undefined content; those taken under one name share their memory.

    One object may serve any number of accumulators that are updated one after the other, but not
    two threads.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a contiguous tensor; what was taken under this name before is overwritten."""
        key = name, dtype, device
        size = math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)
