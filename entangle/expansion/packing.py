"""Sparse experts as a bitmap and their non-zeros: how a checkpoint stores them."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from entangle.errors import InvalidInput

Packed = tuple[UInt8[Tensor, " bytes"], Float[Tensor, " nonzeros"]]


def pack(weight: Float[Tensor, "*shape"]) -> Packed:
    """Split a sparse tensor into a bitmap (one bit an element, in reading order) and non-zeros.

    The values keep their dtype and bits; a negative zero comes back as a zero.
    """
    kept = (weight != 0).flatten().cpu()
    bitmap = torch.from_numpy(np.packbits(kept.numpy()))
    return bitmap, weight.flatten().cpu()[kept].clone()


def unpack(packed: Packed, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """Put the non-zeros back into a dense tensor of ``shape``.

    Raises
    ------
    InvalidInput
        If the bitmap does not fit the shape or the number of values.
    """
    bitmap, values = packed
    size = int(np.prod(shape))
    if bitmap.numel() != (size + 7) // 8:
        raise InvalidInput(f"a bitmap of {bitmap.numel()} bytes must hold {size} bits.")
    kept = torch.from_numpy(np.unpackbits(bitmap.cpu().numpy(), count=size)).bool()
    if int(kept.sum()) != values.numel():
        raise InvalidInput(f"{values.numel()} values must fill {int(kept.sum())} places.")
    dense = torch.zeros(size, dtype=values.dtype)
    dense[kept] = values.cpu()
    return dense.reshape(shape)
