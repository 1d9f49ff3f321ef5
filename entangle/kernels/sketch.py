"""Statistics of a layer's outputs in one pass over them, on a GPU."""

from functools import cache

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from entangle.kernels.compiled import launch, shared_limit, usable

_NEURONS, _THREADS = 64, 1024
_STATIC_BYTES = 17 * 1024
_NAMES = {torch.float32: "float", torch.float16: "half16", torch.bfloat16: "bfloat16"}
_MOST_TOKENS = 60_000  # in 16 bits
_FEWEST_TOKENS = 512


def fits(outputs: Float[Tensor, "tokens neurons"], n_bins: int) -> bool:
    """Tell whether the kernels can count these outputs in this many bins a neuron."""
    return (
        usable(outputs)
        and outputs.dtype in _NAMES
        and outputs.stride(1) == 1
        and _shared_bytes(n_bins) + _STATIC_BYTES <= shared_limit(outputs.device)
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
    """
    tokens, neurons = outputs.shape
    tiles, parts = _grid(tokens, neurons, outputs.device)
    launch(
        "sketch",
        "add_outputs",
        number=_NAMES[outputs.dtype],
        grid=(tiles, parts),
        threads=_THREADS,
        arguments=[
            outputs, location, scale, counts, powers, group_powers, low, high, nan, inf,
            *_work(8, parts, neurons, tiles, outputs.device),
            tokens, neurons, outputs.stride(0), counts.shape[1] // 2,
        ],
        shared_bytes=_shared_bytes(counts.shape[1]),
    )  # fmt: skip


def add_pairs(
    first: Float[Tensor, "pairs neurons"],
    second: Float[Tensor, "pairs neurons"],
    distance: Float[Tensor, " pairs"],
    scale: Float[Tensor, " neurons"],
    *,
    counts: Int[Tensor, "neurons bins"],
    sums: Float[Tensor, "two=2 neurons"],
    highest: Float[Tensor, " neurons"],
) -> None:
    """Add ``d = |first - second|`` to the state of a pair sketch, which is changed in place.

    Parameters
    ----------
    first, second
        Outputs at both tokens of each pair, with equal strides.
    distance
        Distance of the inputs, float32; pairs at distance 0 are left out.
    scale
        Unit of the bins.
    counts
        Histogram over the bins of `entangle.stats.bins.magnitude_index`.
    sums
        Sums of d / distance and of d, float64.
    highest
        Largest d.
    """
    pairs, neurons = first.shape
    tiles, parts = _grid(pairs, neurons, first.device)
    launch(
        "sketch",
        "add_pairs",
        number=_NAMES[first.dtype],
        grid=(tiles, parts),
        threads=_THREADS,
        arguments=[
            first, second, distance, scale, counts, sums, highest,
            *_work(3, parts, neurons, tiles, first.device),
            pairs, neurons, first.stride(0), counts.shape[1] // 2,
        ],
        shared_bytes=_shared_bytes(counts.shape[1]),
    )  # fmt: skip


def row_distances(
    first: Float[Tensor, "pairs features"], second: Float[Tensor, "pairs features"]
) -> Float[Tensor, " pairs"]:
    """Return the Euclidean distances of rows, float32; both matrices have equal strides."""
    pairs, features = first.shape
    found = torch.empty(pairs, dtype=torch.float32, device=first.device)
    launch(
        "sketch",
        "distances",
        number=_NAMES[first.dtype],
        grid=(-(-pairs // 8),),
        threads=256,
        arguments=[first, second, found, pairs, features, first.stride(0)],
    )
    return found


def _shared_bytes(n_bins: int) -> int:
    return 4 * _NEURONS * (n_bins // 2 + 1)


def _grid(tokens: int, neurons: int, device: torch.device) -> tuple[int, int]:
    """Return the numbers of tiles of neurons and of parts of the tokens."""
    tiles = -(-neurons // _NEURONS)
    wanted = min(4 * _processors(device) // tiles, tokens // _FEWEST_TOKENS)
    return tiles, max(1, wanted, -(-tokens // _MOST_TOKENS))


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _work(
    sums: int, parts: int, neurons: int, tiles: int, device: torch.device
) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
    """Return work space for partial sums, and a ticket of each tile, which is zero."""
    partial = torch.empty(sums, parts, neurons, dtype=torch.float64, device=device)
    return partial, _tickets(tiles, device)


@cache
def _tickets(tiles: int, device: torch.device) -> Shaped[Tensor, " tiles"]:
    """Return zeros, which every kernel leaves as it found them."""
    return torch.zeros(tiles, dtype=torch.int32, device=device)
