"""Lloyd iterations of several k-means restarts at the same time, on a GPU."""

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Float32, Float64, Int32
from torch import Tensor
from torch.nn import functional

from entangle.kernels.dispatch import launch, shared_limit, usable

RUNNING, STALLED = 1, 2
"""States of a restart; 0 is finished."""

_THREADS, _MOST_CLUSTERS = 256, 256
_BLOCKS, _MARKING_BLOCKS = 512, 1024
_MOST_COUNTS = 8192
_WITH_BFLOAT16 = 8  # compute capability
_PART = 4096
_MOST_PRODUCTS = 2**26


@dataclass(frozen=True, eq=False)
class Restarts:
    """The state of the restarts; every iteration changes it in place."""

    centroids: Float32[Tensor, "restarts k dims"]
    inertias: Float64[Tensor, " restarts"]
    """Inertia about the means of the last partition."""
    iterations: Int32[Tensor, " restarts"]
    active: Int32[Tensor, " restarts"]
    """`RUNNING`; `STALLED` at an iteration that leaves a cluster empty; or 0."""

    @classmethod
    def of(cls, centroids: Float32[Tensor, "restarts k dims"]) -> "Restarts":
        """Begin at these centroids, all running."""
        count, device = centroids.shape[0], centroids.device
        return cls(
            centroids.contiguous(),
            torch.full((count,), torch.inf, dtype=torch.float64, device=device),
            torch.zeros(count, dtype=torch.int32, device=device),
            torch.ones(count, dtype=torch.int32, device=device),
        )


def fits(
    points: Float[Tensor, "tokens dims"],
    centroids: Float[Tensor, "restarts k dims"],
    *_others: object,
    **_settings: object,
) -> bool:
    """Tell whether `iterate` can work on these points: few dimensions and few clusters."""
    k = centroids.shape[1]
    return (
        usable(points)
        and points.dtype == torch.float32
        and points.is_contiguous()
        and k <= _MOST_CLUSTERS
        and 4 * points.shape[1] <= _THREADS
        and _shared_bytes(points.shape[1], k) + 4096 <= shared_limit(points.device)
    )


def iterate(
    points: Float32[Tensor, "tokens dims"],
    restarts: Restarts,
    limits: Float64[Tensor, "three=3"],
    *,
    times: int,
    most: int,
) -> None:
    """Run some iterations of every restart that is running.

    Parameters
    ----------
    points
        At most 64 dimensions.
    restarts
        Changed in place.
    limits
        Sum of the points' squared norms, the squared move of all centroids of a restart at which
        it is finished, and the share of its inertia that an iteration must save for it to go on.
    times
        Iterations to run.
    most
        Iterations of a restart in all.
    """
    count, k, dims = restarts.centroids.shape
    tokens = points.shape[0]
    parts = max(1, min(_BLOCKS // count, -(-tokens // _THREADS)))
    sums = points.new_empty(parts, count, k, dims)
    counts = torch.empty(parts, count, k, dtype=torch.int32, device=points.device)
    first: list[Tensor | int]
    first = [points, restarts.centroids, restarts.active, sums, counts, tokens, dims, k]
    then = [sums, counts, limits, restarts.centroids, restarts.inertias, restarts.iterations]
    for _ in range(times):
        launch(
            "lloyd",
            "assign",
            grid=(parts, count),
            threads=_THREADS,
            arguments=[*first, _groups(dims)],
            shared_bytes=_shared_bytes(dims, k),
        )
        launch(
            "lloyd",
            "move",
            grid=(count,),
            threads=_THREADS,
            arguments=[*then, restarts.active, parts, count, k, dims, most],
        )


def fits_halves(
    points: Float[Tensor, "tokens dims"],
    centroids: Float[Tensor, "restarts k dims"],
    *_others: object,
) -> bool:
    """Tell whether `iterate_halves` can work on these points: not too many centroids."""
    restarts, k = centroids.shape[:2]
    right = usable(points) and points.dtype == torch.float32 and k <= _MOST_CLUSTERS
    if not right or torch.cuda.get_device_capability(points.device)[0] < _WITH_BFLOAT16:
        return False
    return restarts * k <= _MOST_COUNTS


def halves(points: Float32[Tensor, "tokens dims"]) -> BFloat16[Tensor, "padded_tokens padded_dims"]:
    """Round points to bfloat16, and add zeros to whole parts of 4096 tokens and 8 dimensions."""
    tokens, dims = points.shape
    shape = -(-tokens // _PART) * _PART, -(-dims // 8) * 8
    padded = torch.zeros(shape, dtype=torch.bfloat16, device=points.device)
    padded[:tokens, :dims] = points
    return padded


def iterate_halves(
    points: BFloat16[Tensor, "padded_tokens padded_dims"],
    restarts: Restarts,
    limits: Float64[Tensor, "three=3"],
    *,
    tokens: int,
    times: int,
    most: int,
) -> None:
    """Run some iterations of every restart that is running, on points of any width.

    The nearest centroid is that of the centroids rounded to bfloat16; sums are kept in float32.

    Parameters
    ----------
    points
        From `halves`.
    restarts, limits, times, most
        As of `iterate`.
    tokens
        How many of the points there are; the others are padding.
    """
    count, k, dims = restarts.centroids.shape
    centroids = functional.pad(restarts.centroids, (0, points.shape[1] - dims))
    at_once = max(1, _MOST_PRODUCTS // (_PART * count * k)) * _PART
    # Marks are only written of points that are there; padding is multiplied by what is left here.
    marks = points.new_zeros(min(at_once, points.shape[0]), count * k)
    state = [centroids, restarts.inertias, restarts.iterations, restarts.active]
    for _ in range(times):
        flat = centroids.flatten(0, 1).bfloat16()
        norms = flat.float().square().sum(1)
        counts = torch.zeros(count, k, dtype=torch.int32, device=points.device)
        sums = torch.zeros_like(centroids)
        for start in range(0, points.shape[0], at_once):
            block = points[start : start + at_once]
            here = min(tokens - start, block.shape[0])
            sums += _marked_sums(block, here, flat, norms, marks, counts).view_as(sums)
        launch(
            "lloyd",
            "move",
            grid=(count,),
            threads=_THREADS,
            arguments=[sums, counts, limits, *state, 1, count, k, points.shape[1], most],
        )
    restarts.centroids.copy_(centroids[:, :, :dims])


def _marked_sums(
    block: Tensor, tokens: int, centroids: Tensor, norms: Tensor, marks: Tensor, counts: Tensor
) -> Float32[Tensor, "centroids dims"]:
    """Add up the points nearest to each centroid, and their numbers into ``counts``."""
    restarts, k = counts.shape
    pairs = tokens * restarts
    products = torch.mm(block, centroids.mT, out_dtype=torch.float32)
    launch(
        "lloyd",
        "mark_nearest",
        grid=(max(1, min(_MARKING_BLOCKS, -(-pairs // _THREADS))),),
        threads=_THREADS,
        arguments=[products, norms, marks, counts, pairs, restarts, k],
        shared_bytes=8 * restarts * k,
    )
    parts = block.view(-1, _PART, block.shape[1])
    members = marks[: block.shape[0]].view(parts.shape[0], _PART, -1)
    return torch.bmm(members.mT, parts, out_dtype=torch.float32).sum(0)


def can_mark(scores: Float[Tensor, "tokens restarts k"]) -> bool:
    """Tell whether `mark_members` takes these scores."""
    right = usable(scores) and scores.dtype == torch.float32 and scores.is_contiguous()
    return right and scores[0].numel() <= _MOST_COUNTS and scores.numel() < 2**31


def mark_members(scores: Float32[Tensor, "tokens restarts k"]) -> Int32[Tensor, "restarts k"]:
    """Overwrite scores by 1 at the lowest of each k and 0 elsewhere; return the sums of the ones.

    The first of equal scores counts.
    """
    tokens, restarts, k = scores.shape
    counts = torch.zeros(restarts, k, dtype=torch.int32, device=scores.device)
    pairs = tokens * restarts
    launch(
        "lloyd",
        "mark_members",
        grid=(max(1, min(_MARKING_BLOCKS, -(-pairs // _THREADS))),),
        threads=_THREADS,
        arguments=[scores, counts, pairs, restarts, k],
        shared_bytes=4 * restarts * k,
    )
    return counts


def _groups(dims: int) -> int:
    return min(8, _THREADS // dims)


def _shared_bytes(dims: int, k: int) -> int:
    wide = -(-k // 16) * 16
    return 4 * (dims * wide + _THREADS * (dims | 1) + _groups(dims) * k * dims)
