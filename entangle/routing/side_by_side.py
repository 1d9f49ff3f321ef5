"""k-means on a GPU: all restarts are seeded and iterated together, and it is seldom waited for.

What it does is in `entangle.routing.kmeans`, where the plain version works on one restart's seeds,
and waits for every iteration.
"""

from collections.abc import Callable
from math import log

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from entangle.kernels import lloyd
from entangle.precision import full_precision
from entangle.seeding import numpy_rng

_CHECK_EVERY = 8
_SAME = 8 * torch.finfo(torch.float32).eps
_SCORES = 2**26

Step = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the centroids of some restarts to their next ones and the inertias; a plain iteration."""


def seeds(
    points: Float32[Tensor, "tokens dims"], k: int, *, restarts: int, seed: int
) -> Float32[Tensor, "restarts k dims"] | None:
    """Draw the k-means++ seeds of all restarts; None if fewer than k points differ."""
    trials = 2 + int(log(k))
    draws = [numpy_rng(seed, "routing", "kmeans", r).random((k, trials)) for r in range(restarts)]
    uniform = torch.stack([torch.from_numpy(draw) for draw in draws])
    first = (uniform[:, 0, 0] * points.shape[0]).long().to(points.device)
    uniform = uniform.to(points.device)
    norms = points.square().sum(1)
    chosen = [points[first]]
    closest = _squared_distances(points, norms, chosen[0][:, None])[:, 0]
    lowest = torch.full((), torch.inf, dtype=torch.float64, device=points.device)
    every = torch.arange(restarts, device=points.device)
    for step in range(1, k):
        total = closest.sum(1, dtype=torch.float64)
        lowest = torch.minimum(lowest, total.min())
        share = (2.0**40 / total).float()[:, None]
        cumulative = (closest * share).to(torch.int64).cumsum(1)
        targets = (uniform[:, step] * cumulative[:, -1:].double()).to(torch.int64)
        drawn = torch.searchsorted(cumulative, targets, right=True)
        drawn = points[drawn.clamp_max(points.shape[0] - 1)]
        reduced = torch.minimum(_squared_distances(points, norms, drawn), closest[:, None])
        best = reduced.sum(2, dtype=torch.float64).argmin(1)
        chosen.append(drawn[every, best])
        closest = reduced[every, best]
    return None if float(lowest) == 0.0 else torch.stack(chosen, 1)


def iterate(
    points: Float32[Tensor, "tokens dims"],
    centroids: Float32[Tensor, "restarts k dims"],
    step: Step,
    *,
    squares: Float64[Tensor, ""],
    enough: float,
    most: int,
) -> tuple[Tensor, Float64[Tensor, " restarts"], Int64[Tensor, " restarts"]]:
    """Iterate all restarts until each stands still; iterations with empty clusters go to `step`.

    Parameters
    ----------
    points, centroids
        What `entangle.kernels.lloyd.fits`.
    step
        One plain iteration, which fills empty clusters.
    squares
        Sum of the points' squared norms.
    enough
        A restart ends when the summed squared move of its centroids is not above this.
    most
        Iterations of a restart at most.

    Returns
    -------
    tuple
        Centroids, inertias and iterations of the restarts.
    """
    count, device = centroids.shape[0], points.device
    found = lloyd.Restarts(
        centroids.contiguous(),
        torch.zeros(count, dtype=torch.float64, device=device),
        torch.zeros(count, dtype=torch.int32, device=device),
        torch.ones(count, dtype=torch.int32, device=device),
    )
    limits = torch.stack([squares, squares.new_tensor(enough)])
    while True:
        lloyd.iterate(points, found, limits, times=_CHECK_EVERY, most=most)
        state = found.active.tolist()
        for restart, now in enumerate(state):
            if now == lloyd.STALLED:
                _take_step(found, slice(restart, restart + 1), step, most=most)
        if not any(state):
            return found.centroids, found.inertias, found.iterations.long()


def _take_step(found: lloyd.Restarts, own: slice, step: Step, *, most: int) -> None:
    """Do the iteration at which a restart stalled. It is not its last: an empty cluster moves."""
    found.centroids[own], found.inertias[own] = step(found.centroids[own])
    found.iterations[own] += 1
    found.active[own] = (found.iterations[own] < most).to(torch.int32)


def _squared_distances(points: Tensor, norms: Tensor, centres: Tensor) -> Tensor:
    """Return the squared distances, (restarts, centres, points); 0 where only rounding is left."""
    flat = centres.flatten(0, 1)
    bound = norms + flat.square().sum(1, keepdim=True)
    with full_precision():
        distances = torch.addmm(bound, flat, points.mT, alpha=-2.0)
    return distances.where(distances > _SAME * bound, 0.0).view(*centres.shape[:2], -1)
