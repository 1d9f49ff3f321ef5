"""Exact statistics of rows that fit into a GPU's shared memory."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from entangle.kernels.compiled import launch, shared_limit, usable

NAN, INFINITE, EQUAL, CROWDED = 1, 2, 4, 8
"""What is odd about a row; 0 is nothing."""

_BUCKET_BYTES = 2 * 32768
_STATIC_BYTES = 2048


def fits(values: Float[Tensor, "rows columns"]) -> bool:
    """Tell whether `row_statistics` takes these rows."""
    if not (usable(values) and values.dtype == torch.float32 and values.is_contiguous()):
        return False
    needed = _BUCKET_BYTES + _STATIC_BYTES + 4 * values.shape[1]
    return values.numel() > 0 and needed <= shared_limit(values.device)


def row_statistics(
    values: Float[Tensor, "rows columns"],
    location: Float[Tensor, " rows"],
    scale: Float[Tensor, " rows"],
    density: Float[Tensor, " edges"],
) -> tuple[Float[Tensor, "six=6 rows"], UInt8[Tensor, " rows"]]:
    """Return WD, KS, mean, std, skewness and excess kurtosis of rows in any order, float64.

    Parameters
    ----------
    values
        Float32.
    location, scale
        About the median and the core width of each row; they only matter for the speed.
    density
        Density of N(0, 1) at its quantiles i / columns, i = 0 … columns, float64.

    Returns
    -------
    found : Tensor
        Undefined, but for mean and std of equal values, where `what` is not 0.
    what : Tensor
        `NAN`, `INFINITE`, `EQUAL`, or `CROWDED`: too many different values at nearly one place,
        which the kernel does not sort.
    """
    rows, columns = values.shape
    found = torch.empty(6, rows, dtype=torch.float64, device=values.device)
    what = torch.empty(rows, dtype=torch.uint8, device=values.device)
    launch(
        "exact",
        "row_statistics",
        grid=(rows,),
        threads=1024,
        arguments=[values, location, scale.reciprocal(), density, found, what, rows, columns],
        shared_bytes=_BUCKET_BYTES + 4 * columns,
    )
    return found, what


def fits_pairs(values: Float[Tensor, "rows columns"], pairs: int) -> bool:
    """Tell whether `pair_statistics` takes these rows and so many pairs."""
    right = usable(values) and values.dtype == torch.float32 and values.is_contiguous()
    return right and 4 * pairs + _STATIC_BYTES <= shared_limit(values.device)


def pair_statistics(
    values: Float[Tensor, "rows columns"],
    pairs: Int[Tensor, "two=2 pairs"],
    slant: Float[Tensor, " pairs"],
) -> Float[Tensor, "four=4 rows"]:
    """Return the means of ``d * slant``, and the median, mean and maximum of d, float64.

    Parameters
    ----------
    values
        Float32.
    pairs
        Columns; ``d = |values[:, a] - values[:, b]|``.
    slant
        Float64.
    """
    rows, columns = values.shape
    count = pairs.shape[1]
    found = torch.empty(4, rows, dtype=torch.float64, device=values.device)
    launch(
        "exact",
        "pair_statistics",
        grid=(rows,),
        threads=1024,
        arguments=[values, pairs.int().contiguous(), slant, found, rows, columns, count],
        shared_bytes=4 * count,
    )
    return found
