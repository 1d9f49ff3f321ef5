"""Lloyd iterations of several k-means restarts at the same time, on a GPU."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int32
from torch import Tensor

from entangle.kernels.compiled import launch, shared_limit, usable

RUNNING, STALLED = 1, 2
"""States of a restart; 0 is finished."""

_THREADS, _MOST_CLUSTERS = 256, 256
_BLOCKS = 512


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


def _groups(dims: int) -> int:
    return min(8, _THREADS // dims)


def _shared_bytes(dims: int, k: int) -> int:
    wide = -(-k // 16) * 16
    return 4 * (dims * wide + _THREADS * (dims | 1) + _groups(dims) * k * dims)
