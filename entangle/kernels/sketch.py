"""Statistics of a layer's outputs in one pass over them, on a GPU."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from entangle.kernels.dispatch import launch, shared_limit, usable


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """Blocks of the rows of a matrix, some of which may be empty."""

    ends: Sequence[tuple[int, int]]
    """First row of every block, and the row behind its last."""
    device: torch.device
    """Where the matrix is."""

    @property
    def longest(self) -> int:
        """Rows of the longest of them."""
        return max(end - start for start, end in self.ends)

    @cached_property
    def bounds(self) -> Int[Tensor, "two=2 blocks"]:
        """The ends on the device, int32."""
        found = torch.tensor(self.ends, dtype=torch.int32).T.contiguous()
        return (
            found.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else found
        )

    def without(self, numbers: Collection[int]) -> "RowBlocks":
        """Return them with some emptied."""
        if not numbers:
            return self
        ends = [(0, 0) if i in numbers else own for i, own in enumerate(self.ends)]
        return RowBlocks(ends, self.device)


Starts = tuple[int, int]
"""Rows (a, b) of two matrices of as many rows: pair i joins row (a + i) % rows of the first with
row (b + i) % rows of the second."""

_NEURONS, _WARPS = 64, 32
_STATIC_BYTES = 1024
_NAMES = {torch.float32: "float", torch.float16: "half16", torch.bfloat16: "bfloat16"}
_MOST_TOKENS = 60_000  # in 16 bits
_START_TOKENS = 512  # that take about as long as a thread block's start and end


def fits(outputs: Float[Tensor, "tokens neurons"], n_bins: int, *, bytes_a_count: int = 2) -> bool:
    """Tell whether the kernels can count these outputs in this many bins a neuron."""
    return (
        usable(outputs)
        and outputs.dtype in _NAMES
        and outputs.stride(1) == 1
        and _NEURONS * n_bins * bytes_a_count + _STATIC_BYTES <= shared_limit(outputs.device)
    )


def add_outputs(
    outputs: Float[Tensor, "tokens neurons"],
    location: Float[Tensor, " neurons"],
    scale: Float[Tensor, " neurons"],
    *,
    counts: Int[Tensor, "neurons bins"],
    powers: Float[Tensor, "four=4 neurons"],
    group_powers: Float[Tensor, "two=2 neurons"],
    low: Float[Tensor, " neurons"],
    high: Float[Tensor, " neurons"],
    nan: Bool[Tensor, " neurons"],
    inf: Bool[Tensor, " neurons"],
    blocks: RowBlocks | None = None,
) -> None:
    """Add outputs to the state of a sketch, which is changed in place.

    Parameters
    ----------
    outputs
        A row's numbers are neighbours in memory.
    location, scale
        ``x = (y - location) / scale`` is counted and summed; a value that is not finite counts
        as 0.
    counts
        Histogram over the bins of `entangle.stats.bins.signed_index`.
    powers, group_powers
        Sums of the first four (two) powers of x, float64.
    low, high
        Smallest and largest x.
    nan, inf
        Whether a value was NaN, or infinite.
    blocks
        Blocks of rows, those of several layers, which have equally many neurons: the state is of
        all of them, the neurons of one layer after those of the layer before it.
    """
    (tokens, neurons), n_bins = outputs.shape, counts.shape[1]
    layers = 1 if blocks is None else blocks.bounds.shape[1]
    longest = tokens if blocks is None else blocks.longest
    assert powers.stride(0) == group_powers.stride(0)  # noqa: S101
    tiles, parts = _grid(longest, neurons, outputs.device, layers)
    launch(
        "sketch",
        "add_outputs",
        number=_NAMES[outputs.dtype],
        grid=(tiles, parts, layers),
        threads=32 * _WARPS,
        arguments=[
            outputs, location, scale, counts, powers, group_powers, low, high, nan, inf,
            *_work(4, parts, layers * neurons, layers * tiles, outputs.device),
            0 if blocks is None else blocks.bounds,
            tokens, neurons, outputs.stride(0), n_bins // 2, powers.stride(0),
        ],
        shared_bytes=_shared_bytes(n_bins // 2, sums=4),
    )  # fmt: skip


def add_squares(
    inputs: Float[Tensor, "rows features"],
    blocks: RowBlocks,
    found: Float[Tensor, "layers features"],
) -> None:
    """Add the sum of squares of every column over each block of rows to ``found``, float64."""
    (layers, features), rows = found.shape, inputs
    launch(
        "sketch",
        "add_squares",
        number=_NAMES[rows.dtype],
        grid=(-(-features // 32), layers),
        threads=256,
        arguments=[rows, blocks.bounds, found, features, rows.stride(0)],
    )


def add_pairs(
    first: Float[Tensor, "rows neurons"],
    second: Float[Tensor, "rows neurons"],
    distance: Float[Tensor, " pairs"],
    scale: Float[Tensor, " neurons"],
    *,
    starts: Starts,
    counts: Int[Tensor, "neurons bins"],
    sums: Float[Tensor, "two=2 neurons"],
    highest: Float[Tensor, " neurons"],
) -> None:
    """Add ``d = |y_a - y_b|`` of pairs to the state of a pair sketch, which is changed in place.

    Parameters
    ----------
    first, second
        Outputs at the pairs' tokens, with equal strides.
    distance
        Distance of the inputs of every pair, float32; pairs at distance 0 are left out.
    scale
        Unit of the bins.
    starts
        Which rows make pair 0.
    counts
        Histogram over the bins of `entangle.stats.bins.magnitude_index`.
    sums
        Sums of d / distance and of d, float64.
    highest
        Largest d; NaN where one is.
    """
    (rows, neurons), pairs = first.shape, distance.shape[0]
    tiles, parts = _grid(pairs, neurons, first.device)
    launch(
        "pairs",
        "add_pairs",
        number=_NAMES[first.dtype],
        grid=(tiles, parts),
        threads=32 * _WARPS,
        arguments=[
            first, second, distance, scale, counts, sums, highest,
            *_work(2, parts, neurons, tiles, first.device),
            pairs, rows, *starts, neurons, first.stride(0), counts.shape[1],
        ],
        shared_bytes=_shared_bytes(counts.shape[1], sums=2),
    )  # fmt: skip


def fits_rows(first: Tensor, second: Tensor, **_settings: object) -> bool:
    """Tell whether `row_distances` takes these rows."""
    return fits(first, 1) and first.stride() == second.stride()


def row_distances(
    first: Float[Tensor, "rows features"],
    second: Float[Tensor, "rows features"],
    *,
    starts: Starts = (0, 0),
    n_pairs: int | None = None,
) -> Float[Tensor, " pairs"]:
    """Return the Euclidean distances of pairs of rows, float32; both matrices have equal strides.

    Without ``n_pairs``, of as many pairs as there are rows.
    """
    rows, features = first.shape
    pairs = rows if n_pairs is None else n_pairs
    found = torch.empty(pairs, dtype=torch.float32, device=first.device)
    if pairs:
        launch(
            "pairs",
            "distances",
            number=_NAMES[first.dtype],
            grid=(-(-pairs // 8),),
            threads=256,
            arguments=[first, second, found, pairs, rows, *starts, features, first.stride(0)],
        )
    return found


def close_group(
    counts: Int[Tensor, "neurons bins"],
    *,
    closed: Int[Tensor, "neurons joined"],
    group: Int[Tensor, "neurons joined"],
    low: Float[Tensor, " neurons"],
    high: Float[Tensor, " neurons"],
) -> None:
    """Credit what ``counts`` has, bins joined, above ``closed`` to a group, and close it too.

    Parameters
    ----------
    counts
        Histogram over the bins of `entangle.stats.bins.signed_index`.
    closed, group
        Histograms over joined bins, changed in place.
    low, high
        Smallest and largest x counted.
    """
    neurons, joined = closed.shape
    launch(
        "sketch",
        "close_group",
        grid=(-(-neurons // 8),),
        threads=256,
        arguments=[counts, closed, group, low, high, neurons, joined, counts.shape[1] // joined],
    )


def pair_statistics(
    counts: Int[Tensor, "neurons bins"],
    sums: Float[Tensor, "two=2 neurons"],
    highest: Float[Tensor, " neurons"],
    scale: Float[Tensor, " neurons"],
    *,
    n_pairs: int,
) -> Float[Tensor, "four=4 neurons"]:
    """Return mean slope, and median, mean and largest d, of what `add_pairs` added; float64.

    The median is interpolated inside its bin, and NaN in the first and in the open last one.
    """
    neurons, n_bins = counts.shape
    found = torch.empty(4, neurons, dtype=torch.float64, device=counts.device)
    launch(
        "pairs",
        "pair_statistics",
        grid=(-(-neurons // 8),),
        threads=256,
        arguments=[counts, sums, highest, scale, found, n_pairs, neurons, n_bins],
    )
    return found


def _shared_bytes(rows: int, *, sums: int) -> int:
    """Return what a thread block needs for rows of counts and, afterwards, for sums."""
    return max(4 * _NEURONS * rows, 8 * _NEURONS * _WARPS * sums)


@lru_cache(maxsize=1024)
def _grid(tokens: int, neurons: int, device: torch.device, layers: int = 1) -> tuple[int, int]:
    """Return the numbers of tiles of neurons of each layer and of parts of the tokens."""
    tiles, processors = -(-neurons // _NEURONS), _processors(device)
    fewest = max(1, -(-tokens // _MOST_TOKENS))
    most = max(fewest, 4 * processors // (tiles * layers))

    def duration(parts: int) -> float:
        return -(-tiles * layers * parts // processors) * (tokens / parts + _START_TOKENS)

    return tiles, min(range(fewest, most + 1), key=duration)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _work(
    sums: int, parts: int, neurons: int, tiles: int, device: torch.device
) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
    """Return work space for partial sums, and a ticket of each tile, which is zero."""
    partial = torch.empty(sums, parts, neurons, dtype=torch.float64, device=device)
    return partial, _tickets(tiles, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=64)
def _tickets(tiles: int, device: torch.device, stream: int) -> Shaped[Tensor, " tiles"]:  # noqa: ARG001
    """Return zeros, which every kernel of one stream leaves as it found them."""
    return torch.zeros(tiles, dtype=torch.int32, device=device)
