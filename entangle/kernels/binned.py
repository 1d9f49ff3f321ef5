"""Distances of binned distributions from N(0, 1), on a GPU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entangle.kernels.compiled import launch


def binned_distances(
    counts: Int[Tensor, "groups rows bins"],
    weights: Int[Tensor, "sets groups"],
    *,
    shift: Float[Tensor, "sets rows"],
    spread: Float[Tensor, "sets rows"],
    low: Float[Tensor, " rows"],
    high: Float[Tensor, " rows"],
    edges: Float[Tensor, " edges"],
) -> Float[Tensor, "three=3 sets rows"]:
    """Return WD, its bound and KS of several sets of groups, float64.

    As `entangle.stats.histogram.binned_distances`, on bins that end at each row's extremes.

    Parameters
    ----------
    counts
        Histograms of the groups, int32.
    weights
        What each group counts in each set, int32.
    shift, spread
        Mean and standard deviation of each set, in the units of the edges.
    low, high
        Smallest and largest value of each row; the outermost bins reach that far.
    edges
        Ascending, float64.
    """
    groups, rows, bins = counts.shape
    sets = weights.shape[0]
    found = torch.empty(3, sets, rows, dtype=torch.float64, device=counts.device)
    launch(
        "binned",
        "binned_distances",
        grid=(-(-rows * sets // 8),),
        threads=256,
        arguments=[
            counts, weights, shift, spread, low, high, edges, found, rows, sets, groups, bins,
        ],
        shared_bytes=8 * 4 * bins,
    )  # fmt: skip
    return found
