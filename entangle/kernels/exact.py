"""Exact statistics of rows that fit into a GPU's shared memory.

Distances of binned distributions from N(0, 1), on a GPU.

Distances of sorted rows from a fitted Gaussian, on a GPU.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int, Int32, UInt8
from torch import Tensor

from entangle.kernels.dispatch import launch, shared_limit, usable

NAN, INFINITE, EQUAL, CROWDED = 1, 2, 4, 8
"""What is odd about a row; 0 is nothing."""

BINS, FOLD = 1536, 8
"""Bins of a histogram, and how many of them are one in the histograms of the groups."""

_BUCKET_BYTES = 2 * 32768
_STATIC_BYTES = 2048
_PAIR_STATIC_BYTES = 10 * 1024
_MOST_GROUPS = 32


@dataclass(frozen=True, eq=False)
class RowHistograms:
    """Histograms of rows over the bins of `entangle.stats.bins.signed_index`.

    Of ``x = (value - location) / scale``, a value that is not finite counting as 0, but for powers.
    """

    counts: Int32[Tensor, "rows bins"]
    group_counts: Int32[Tensor, "groups rows folded"]
    """Of each group of columns, `FOLD` bins joined."""
    powers: Float64[Tensor, "groups two=2 rows"]
    """Sums of x and of its square over each group."""
    ends: Float32[Tensor, "two=2 rows"]
    """Smallest and largest x."""


def fits(values: Float[Tensor, "rows columns"], *, groups: int = 0) -> bool:
    """Tell whether `row_statistics` takes these rows and so many groups of columns."""
    if not (usable(values) and values.dtype == torch.float32 and values.is_contiguous()):
        return False
    if values.data_ptr() % 16:  # rows are read four numbers at a time
        return False
    needed = _shared_bytes(values.shape[1], groups) + _STATIC_BYTES
    return values.numel() > 0 and groups <= _MOST_GROUPS and needed <= shared_limit(values.device)


def row_statistics(
    values: Float[Tensor, "rows columns"],
    location: Float[Tensor, " rows"],
    scale: Float[Tensor, " rows"],
    *,
    density: Float[Tensor, " edges"],
    bounds: Int32[Tensor, " ends"] | None = None,
) -> tuple[Float64[Tensor, "six=6 rows"], UInt8[Tensor, " rows"], RowHistograms | None]:
    """Return WD, KS, mean, std, skewness and excess kurtosis of rows in any order, float64.

    Parameters
    ----------
    values
        Float32.
    location, scale
        About the median and the spread of each row; they place the bins of the histograms, and
        otherwise only matter for the speed.
    density
        Density of N(0, 1) at its quantiles i / columns, i = 0 … columns, float64.
    bounds
        Columns ``bounds[g]`` to ``bounds[g + 1]`` are group g; without it, no histograms are made.

    Returns
    -------
    found : Tensor
        Undefined where `what` is not 0, but for mean and std of what is `EQUAL` or `CROWDED`.
    what : Tensor
        `NAN`, `INFINITE`, `EQUAL`, or `CROWDED`: too many different values at nearly one place,
        which the kernel does not sort.
    histograms : RowHistograms or None
    """
    (rows, columns), device = values.shape, values.device
    found = torch.empty(6, rows, dtype=torch.float64, device=device)
    what = torch.empty(rows, dtype=torch.uint8, device=device)
    groups = 0 if bounds is None else len(bounds) - 1
    histograms = None
    if bounds is None:
        bounds = torch.tensor([0, columns], dtype=torch.int32, device=device)
    else:
        histograms = RowHistograms(
            counts=torch.empty(rows, BINS, dtype=torch.int32, device=device),
            group_counts=torch.empty(groups, rows, BINS // FOLD, dtype=torch.int32, device=device),
            powers=torch.empty(groups, 2, rows, dtype=torch.float64, device=device),
            ends=torch.empty(2, rows, device=device),
        )
    into: list[Tensor | int] = [0, 0, 0, 0]
    if histograms is not None:
        into = [histograms.counts, histograms.group_counts, histograms.powers, histograms.ends]
    cells = density[:-1] - density[1:]
    inputs = [values, location.contiguous(), scale.contiguous(), density, cells, bounds]
    launch(
        "exact",
        "row_statistics",
        grid=(rows,),
        threads=1024,
        arguments=[*inputs, found, what, *into, rows, columns, max(1, groups)],
        shared_bytes=_shared_bytes(columns, groups),
    )
    return found, what, histograms


def _shared_bytes(columns: int, groups: int) -> int:
    histograms = 2 * BINS + groups * 2 * (BINS // FOLD) if groups else 0
    return _BUCKET_BYTES + 4 * (-(-columns // 4) * 4) + histograms


def fits_pairs(values: Float[Tensor, "rows columns"], pairs: int) -> bool:
    """Tell whether `pair_statistics` takes these rows and so many pairs."""
    right = usable(values) and values.dtype == torch.float32 and values.is_contiguous()
    return right and 4 * pairs + _PAIR_STATIC_BYTES <= shared_limit(values.device)


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
    bytes_held = 4 * (columns + count)
    held = bytes_held + _PAIR_STATIC_BYTES <= shared_limit(values.device)
    launch(
        "exact",
        "pair_statistics",
        grid=(rows,),
        threads=1024,
        arguments=[values, pairs.int().contiguous(), slant, found, rows, columns, count, int(held)],
        shared_bytes=bytes_held if held else 4 * count,
    )
    return found


def fused_binned_distances(
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

    As `entangle.stats.bins.binned_distances`, on bins that end at each row's extremes.

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


def fits_sorted(ordered: Float[Tensor, "rows columns"]) -> bool:
    """Tell whether `sorted_statistics` takes these rows."""
    right = usable(ordered) and ordered.dtype == torch.float32 and ordered.is_contiguous()
    return right and ordered.numel() > 0


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
