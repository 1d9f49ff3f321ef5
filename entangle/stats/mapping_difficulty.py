"""Mapping difficulty: how far apart a neuron must map inputs that lie close together.

Over random disjoint pairs of tokens (a, b), with N_x and N_y normalisers,

    MD = mean over pairs of (|y_a − y_b| / N_y) / (‖x_a − x_b‖₂ / N_x)

(arXiv 2405.15756, eq. 2; the published code takes the maximum over the pairs as N_x and the
median as N_y). Pairs with identical inputs are left out and counted.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.kernels import exact
from entangle.precision import accumulator_dtype
from entangle.seeding import torch_rng

MAX_PAIRS = 50_000

OutputNorm = Literal["median", "mean", "max"]
InputNorm = Literal["max", "mean"]


@dataclass(frozen=True, eq=False)
class MappingDifficulty:
    """Pair statistics of one layer; fields of shape (neurons,) unless said."""

    slope: Float[Tensor, " neurons"]
    """Mean over pairs of |y_a − y_b| / ‖x_a − x_b‖, in output units per input unit."""
    dy_median: Float[Tensor, " neurons"]
    """Median over pairs of |y_a − y_b|, in output units."""
    dy_mean: Float[Tensor, " neurons"]
    """Mean over pairs of |y_a − y_b|, in output units."""
    dy_max: Float[Tensor, " neurons"]
    """Maximum over pairs of |y_a − y_b|, in output units."""
    dx_max: float
    """Maximum over pairs of ‖x_a − x_b‖, in input units."""
    dx_mean: float
    """Mean over pairs of ‖x_a − x_b‖, in input units."""
    n_pairs: int
    """Pairs counted."""
    n_identical: int
    """Pairs left out because their inputs are identical."""

    def md(
        self,
        *,
        output_norm: OutputNorm = "median",
        input_norm: InputNorm = "max",
        noise: Float[Tensor, " neurons"] | None = None,
    ) -> Float[Tensor, " neurons"]:
        """Return the mapping difficulty (no unit) under a choice of normalisers.

        The input normaliser is common to all neurons of a layer and leaves their order alone.
        NaN where the output normaliser is 0, for example if most pairs have equal outputs, or no
        more than twice the ``noise``: the rounding of a usual output, in output units, (neurons,),
        from `entangle.stats.rounding`.
        """
        if output_norm not in ("median", "mean", "max") or input_norm not in ("max", "mean"):
            raise InvalidInput(
                "`output_norm` must be median, mean or max and `input_norm` max or mean; "
                f"got {output_norm!r} and {input_norm!r}."
            )
        dy = {"median": self.dy_median, "mean": self.dy_mean, "max": self.dy_max}[output_norm]
        dx = {"max": self.dx_max, "mean": self.dx_mean}[input_norm]
        nothing = dy == 0 if noise is None else dy <= 2 * noise.to(dy)
        return (self.slope * dx / dy).masked_fill(nothing, math.nan)


def draw_pairs(
    n_tokens: int, *, seed: int, max_pairs: int = MAX_PAIRS
) -> Int[Tensor, "two=2 pairs"]:
    """Draw disjoint pairs of token indices without replacement.

    Parameters
    ----------
    n_tokens
        Number of tokens to draw from.
    seed
        Seed of the draw.
    max_pairs
        Upper limit; at most ``n_tokens // 2`` pairs exist.

    Returns
    -------
    Tensor of shape (2, pairs)
        Token indices, int64; no index occurs twice.
    """
    pairs = min(max_pairs, n_tokens // 2)
    narrow = torch.int32 if n_tokens < 2**31 else torch.int64  # the same draws in half the memory
    generator = torch_rng(seed, "mapping difficulty")
    order = torch.randperm(n_tokens, generator=generator, dtype=narrow)
    return order[: 2 * pairs].to(torch.int64, copy=True).view(2, pairs)  # keeps no order alive


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Pairs of tokens with distinct inputs, for all layers that have these inputs."""

    tokens: Int[Tensor, "two=2 pairs"]
    """Token indices, where the outputs are."""
    slant: Float[Tensor, " pairs"]
    """1 / ‖x_a − x_b‖₂, per input unit."""
    dx_max: float
    """Maximum of ‖x_a − x_b‖₂, in input units; NaN without a pair."""
    dx_mean: float
    """Mean of ‖x_a − x_b‖₂, in input units; NaN without a pair."""
    n_identical: int
    """Pairs left out because their inputs are identical."""

    @classmethod
    def of(
        cls,
        pairs: Int[Tensor, "two=2 drawn"],
        input_distance: Float[Tensor, " drawn"],
        *,
        device: torch.device,
    ) -> "TokenPairs":
        """Leave out the pairs at distance 0, and move the rest to where the outputs are."""
        drawn, distinct = pairs.shape[1], input_distance > 0
        dx = input_distance.to(accumulator_dtype(device))
        n_distinct, most, mean = _summary(dx, distinct)
        if n_distinct < drawn:
            pairs, dx = pairs[:, distinct.to(pairs.device)], dx[distinct]
            _, most, mean = _summary(dx, distinct[distinct])
        slant = (1 / dx).to(device)
        return cls(pairs.to(device), slant, most, mean, drawn - int(n_distinct))

    def difficulty(self, outputs: Float[Tensor, "neurons tokens"]) -> MappingDifficulty:
        """Compute the pair statistics of neurons; see `mapping_difficulty`."""
        if self.slant.numel() == 0:
            nothing = self.slant.new_full((outputs.shape[0],), math.nan)
            return no_pairs(nothing, self.n_identical)
        slope, median, mean, most = _pair_statistics(outputs, self.tokens, self.slant)
        return MappingDifficulty(
            slope=slope,
            dy_median=median,
            dy_mean=mean,
            dy_max=most,
            dx_max=self.dx_max,
            dx_mean=self.dx_mean,
            n_pairs=self.slant.numel(),
            n_identical=self.n_identical,
        )


def _summary(dx: Tensor, distinct: Tensor) -> list[float]:
    """Return how many pairs are distinct, and the maximum and the mean of all; with one wait."""
    if not dx.numel():
        return [0.0, math.nan, math.nan]
    found: list[float] = torch.stack([distinct.sum().to(dx), dx.max(), dx.mean()]).tolist()
    return found


def mapping_difficulty(
    outputs: Float[Tensor, "neurons tokens"],
    pairs: Int[Tensor, "two=2 pairs"],
    input_distance: Float[Tensor, " pairs"],
) -> MappingDifficulty:
    """Compute the pair statistics of neurons from all their outputs.

    Parameters
    ----------
    outputs
        Outputs of shape (neurons, tokens).
    pairs
        Token indices of shape (2, pairs), from `draw_pairs`.
    input_distance
        ‖x_a − x_b‖₂ of every pair, shape (pairs,), in input units.

    Returns
    -------
    MappingDifficulty
        With NaN in every statistic where no pair has distinct inputs.
    """
    return TokenPairs.of(pairs, input_distance, device=outputs.device).difficulty(outputs)


def _pair_statistics(outputs: Tensor, pairs: Tensor, slant: Tensor) -> tuple[Tensor, ...]:
    """Return slope, and median, mean and maximum of |y_a − y_b|, of every neuron."""
    if exact.fits_pairs(outputs, pairs.shape[1]):
        return tuple(exact.pair_statistics(outputs, pairs, slant))
    wide = slant.dtype
    dy = (outputs[:, pairs[0]].float() - outputs[:, pairs[1]].float()).abs_()
    slope = dy.to(wide).mul_(slant).mean(1)
    return slope, _median(dy).to(wide), dy.mean(1, dtype=wide), dy.amax(1).to(wide)


def no_pairs(nothing: Float[Tensor, " neurons"], n_identical: int) -> MappingDifficulty:
    """Return what no pair tells of neurons; ``nothing`` is NaN."""
    return MappingDifficulty(
        slope=nothing,
        dy_median=nothing,
        dy_mean=nothing,
        dy_max=nothing,
        dx_max=math.nan,
        dx_mean=math.nan,
        n_pairs=0,
        n_identical=n_identical,
    )


def _median(values: Tensor) -> Tensor:
    """Return the median of every row; the mean of the middle two where there are two."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.median(values.numpy(), axis=1))
    return values.quantile(0.5, dim=1)
