"""Lloyd iterations of several k-means restarts at the same time, on a GPU."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int32
from torch import Tensor

from entangle.kernels.compiled import launch, shared_limit, usable

RUNNING, STALLED = 1, 2
"""States of a restart; 0 is finished."""

_THREADS, _MOST_CLUSTERS = 256, 256
_BLOCKS, _MARKING_BLOCKS = 512, 1024
_MOST_COUNTS = 8192


@dataclass(frozen=True, eq=False)
class Restarts:
    """The state of the restarts; every iteration changes it in place."""

    centroids: Float32[Tensor, "restarts k dims"]
    inertias: Float64[Tensor, " restarts"]
    """Inertia about the means of the last partition."""
    iterations: Int32[Tensor, " restarts"]
    active: Int32[Tensor, " restarts"]
    """`RUNNING`; `STALLED` at an iteration that leaves a cluster empty; or 0."""


def fits(points: Float[Tensor, "tokens dims"], k: int) -> bool:
    """Tell whether `iterate` can work on these points: few dimensions and few clusters."""
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
    limits: Float64[Tensor, "two=2"],
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
        Sum of the points' squared norms, and the squared move of all centroids of a restart at
        which it is finished.
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
    first: list[Tensor | int] = [
        points,
        restarts.centroids,
        restarts.active,
        sums,
        counts,
        tokens,
        dims,
        k,
    ]
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
