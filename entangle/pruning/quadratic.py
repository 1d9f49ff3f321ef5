"""Quadratic forms of rows: what a change of a weight does to the squared error of the output.

A GPU's float32 products are slow. Its TensorFloat-32 units multiply numbers of 11 significant bits,
and cut off what they add instead of rounding it. Rows and grams are therefore split in two such
numbers, and at most 1,024 products of them are summed before the sum is added in float32. Of
SparseGPT's changes of bfloat16 weights (2048 and 4096 inputs, 50 % and 80 % zeros, sums that cancel
to 1/300 to 1/1400), with such units imitated in float64, the largest relative errors beside float64
are:

==========================================  ===========  ==================
sum                                         of a row     of all rows
==========================================  ===========  ==================
float32, one product after another          1.6e-6       1.4e-7
only the first parts of both                4.7e-4       3.2e-5
all but the second part of the rows         4.0e-5       3.0e-6
both parts of both, all products together   8.9e-5       8.0e-5
both parts of both, 1,024 products at most  2.3e-6       5.0e-7
==========================================  ===========  ==================
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.precision import tensor_cores

_PANEL = 1024
_PART_BYTES = 2**28
_WITH_TF32 = 8  # compute capability

AddProduct = Callable[[Tensor, slice, Tensor], None]
"""Adds to a (experts, rows, panel) the product of some columns of the rows with a gram's part."""
Multiplier = Callable[[Tensor], AddProduct]
"""Prepares the products with some rows."""


def quadratic(
    rows: Float[Tensor, "experts rows cols"], gram: Float[Tensor, "experts cols cols"]
) -> Float[Tensor, "experts rows"]:
    """Return ``r G r^T`` of every row, for symmetric ``G`` of the rows' dtype.

    On a GPU the products are those of the upper triangle only, a panel of columns at a time. Those
    of float32 are exact to float32 if an NVIDIA GPU does them, whatever the precision that is set.
    """
    if rows.device.type == "cpu":
        return torch.einsum("erc,erc->er", rows @ gram, rows)
    multiplier: Multiplier = _split if _has_tf32(rows) else _plain
    bytes_each = rows.shape[1:].numel() * rows.element_size()
    at_once = max(1, _PART_BYTES // max(1, bytes_each))
    parts = zip(rows.split(at_once), gram.split(at_once), strict=True)
    return torch.cat([_by_panels(some, own, multiplier(some)) for some, own in parts])


def _has_tf32(rows: Tensor) -> bool:
    if not rows.is_cuda or rows.dtype != torch.float32:
        return False
    return torch.cuda.get_device_capability(rows.device)[0] >= _WITH_TF32


def _by_panels(
    rows: Float[Tensor, "experts rows cols"],
    gram: Float[Tensor, "experts cols cols"],
    add_product: AddProduct,
) -> Float[Tensor, "experts rows"]:
    total = rows.new_zeros(rows.shape[:2])
    for start in range(0, rows.shape[2], _PANEL):
        panel = slice(start, min(start + _PANEL, rows.shape[2]))
        product = torch.zeros_like(rows[..., panel], memory_format=torch.contiguous_format)
        for left in range(0, start, _PANEL):
            above = slice(left, left + _PANEL)
            add_product(product, above, gram[:, above, panel])
        product.mul_(2)
        add_product(product, panel, gram[:, panel, panel])
        total += product.mul_(rows[..., panel]).sum(-1)
    return total


def _plain(rows: Float[Tensor, "experts rows cols"]) -> AddProduct:
    """Multiply in the precision that is set."""

    def add_product(product: Tensor, columns: slice, gram: Tensor) -> None:
        product.baddbmm_(rows[..., columns], gram)

    return add_product


def _split(rows: Float[Tensor, "experts rows cols"]) -> AddProduct:
    """Multiply as float32 does, by TensorFloat-32."""
    high, low = _two_parts(rows)
    exact = not bool(low.any())

    def add_product(product: Tensor, columns: slice, gram: Tensor) -> None:
        gram_high, gram_low = _two_parts(gram)
        with tensor_cores():
            product.baddbmm_(high[..., columns], gram_low)
            if not exact:
                product.baddbmm_(low[..., columns], gram_high)
            product.baddbmm_(high[..., columns], gram_high)

    return add_product


def _two_parts(values: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor]:
    """Round float32 numbers to 11 significant bits, and return what that leaves over, too."""
    bits = values.view(torch.int32).add(0x1000).bitwise_and_(~0x1FFF)
    high = bits.view(torch.float32)
    return high, values - high
