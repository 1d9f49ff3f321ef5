"""Distances of sorted rows from a fitted Gaussian, on a GPU."""

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.kernels.compiled import launch, usable


def fits(ordered: Float[Tensor, "rows columns"]) -> bool:
    """Tell whether `sorted_statistics` takes these rows."""
    return usable(ordered) and ordered.dtype == torch.float32 and ordered.is_contiguous()


def sorted_statistics(
    ordered: Float[Tensor, "rows columns"], density: Float[Tensor, " edges"]
) -> Float[Tensor, "six=6 rows"]:
    """Return WD, KS, mean, std, skewness and excess kurtosis of ascending rows, float64.

    Parameters
    ----------
    ordered
        Float32, ascending.
    density
        Density of N(0, 1) at its quantiles i / columns, i = 0 … columns, float64.
    """
    rows, columns = ordered.shape
    found = torch.empty(6, rows, dtype=torch.float64, device=ordered.device)
    launch(
        "distance",
        "sorted_statistics",
        grid=(rows,),
        threads=512,
        arguments=[ordered, density, found, rows, columns],
    )
    return found
