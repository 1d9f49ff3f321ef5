"""Routers of one's own: a function gives a direction for every cluster, or a centroid.

Both are linear scores, which a router stores as it stores k-means: in a basis of the directions,
with one coordinate more that makes up for what distances to centroids and scores differ by.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.errors import EntangleError, InvalidInput

MAX_TOKENS = 2**16
"""Tokens that a function is given at most, drawn from a longer stream."""
OwnRouter = Callable[[Tensor, int, int], Any]
"""From tokens (tokens, features), float32, the number of clusters and a seed: centroids
(clusters, features), a token going to the nearest, or a pair of directions (clusters, features)
and offsets (clusters,), a token going to the largest ``direction · token + offset``."""


def scores_of(
    name: str, function: OwnRouter, tokens: Float[Tensor, "tokens features"], k: int, seed: int
) -> tuple[Float[Tensor, "k features"], Float[Tensor, " k"]]:
    """Return directions and offsets that a function gives, float64.

    Raises
    ------
    InvalidInput
        If it raises, or returns other shapes or what is not finite, or changes the tokens.
    """
    before = tokens.clone()
    try:
        found: Any = function(tokens, k, seed)
    except EntangleError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"the router {name!r} failed: {type(error).__name__}: {error}"
        ) from error
    if not torch.equal(tokens, before):
        raise InvalidInput(f"the router {name!r} changed the tokens that it was given.")
    parts = found if isinstance(found, tuple) else (found,)
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in parts]
    wanted = [(k, tokens.shape[1]), (k,)][: len(parts)]
    if not parts or shapes != wanted:
        raise InvalidInput(
            f"the router {name!r} must return centroids of shape {(k, tokens.shape[1])}, or a "
            f"pair of directions of that shape and offsets ({k},); got {shapes}."
        )
    first = parts[0].detach().to(tokens.device, torch.float64)
    offsets = -0.5 * first.square().sum(1)
    if len(parts) == 2:
        offsets = parts[1].detach().to(first)
    if not bool(first.isfinite().all() and offsets.isfinite().all()):
        raise InvalidInput(f"the router {name!r} returned NaN or infinity.")
    return first, offsets


def as_centroids(
    directions: Float[Tensor, "k features"], offsets: Float[Tensor, " k"]
) -> tuple[Float[Tensor, "dims features"], Float[Tensor, "k dims"]]:
    """Return components and centroids whose nearest one has the largest score, float32.

    The last component is 0, so that its coordinate counts in the centroids' lengths alone.
    """
    basis = torch.linalg.qr(directions.T).Q.T
    places = directions @ basis.T
    lack = offsets + 0.5 * places.square().sum(1)
    last = (2 * (lack.max() - lack)).clamp_min(0).sqrt()
    components = torch.cat([basis, torch.zeros_like(basis[:1])])
    return components.float(), torch.cat([places, last[:, None]], 1).float()
