"""Distances from a fitted Gaussian, computed from binned outputs."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BinnedDistances:
    """Distances of binned distributions to N(0, 1); every field has shape (rows,)."""

    wd: Float[Tensor, " rows"]
    """1-Wasserstein distance with the mass spread evenly inside each bin."""
    wd_bound: Float[Tensor, " rows"]
    """Largest possible error of ``wd``, wherever the mass lies inside the bins."""
    ks: Float[Tensor, " rows"]
    """Kolmogorov-Smirnov distance at the bin edges (a lower bound of the exact one)."""


def binned_distances(
    counts: Shaped[Tensor, "rows bins"], edges: Float[Tensor, "rows edges"]
) -> BinnedDistances:
    """Integrate |F − Φ| over standardised bins.

    Parameters
    ----------
    counts
        Number of values in each bin, shape (rows, bins).
    edges
        Standardised bin edges, ascending, of shape (rows, bins + 1), in standard deviations.

    Returns
    -------
    BinnedDistances
        The distribution function F is exact at the edges and linear between them. A monotone
        function with the same ends differs from it by at most half of mass times width in each
        bin. Where F crosses Φ inside a bin, Φ is taken as its chord there, which errs by at most
        twice the area between the two. The bound is the sum of both over the bins.
    """
    mass = counts.to(edges.dtype)
    mass = mass / mass.sum(1, keepdim=True)
    cumulative = torch.nn.functional.pad(mass.cumsum(1), (1, 0))
    normal = torch.special.ndtr(edges)
    gap = cumulative - normal
    width = edges.diff(dim=1)
    area = width * (cumulative[:, :-1] + mass / 2) - _normal_area(edges, normal)
    left, right = gap[:, :-1], gap[:, 1:]
    change = (right - left).abs().clamp_min(1e-300)
    crossing = width * (left.square() + right.square()) / (2 * change)
    inside = torch.where(left * right < 0, crossing.maximum(area.abs()), area.abs())
    tails = _normal_tail(edges[:, 0]) + _normal_tail(-edges[:, -1])
    bound = mass * width / 2 + 2 * _chord_area(width, normal)
    return BinnedDistances(_in_order(inside) + tails, _in_order(bound), gap.abs().amax(1))


def _in_order(values: Tensor) -> Tensor:
    """Sum rows from left to right, so that zeros on either side change no bit."""
    return values.cumsum(1)[:, -1]


def _chord_area(width: Tensor, normal: Tensor) -> Tensor:
    """Bound the area between Φ and its chord over each bin, given Φ at the edges.

    It is at most w³ max|Φ''| / 12 by Taylor, and half of rise times width as both are monotone.
    """
    steepest = math.exp(-0.5) / math.sqrt(2 * math.pi)  # max|Φ''|, at ±1
    return (width**3 * (steepest / 12)).minimum(width * normal.diff(dim=1) / 2)


def _normal_area(edges: Tensor, normal: Tensor) -> Tensor:
    """Integrate Φ over each bin: ∫Φ = zΦ + φ."""
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    primitive: Tensor = edges * normal + density
    return primitive.diff(dim=1)


def _normal_tail(z: Tensor) -> Tensor:
    """Integrate Φ from −∞ to z."""
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    integral: Tensor = z * torch.special.ndtr(z) + density
    return integral
