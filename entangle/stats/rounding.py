"""How far outputs that were computed in finite precision lie from the exact ones.

A neuron's outputs ŷ differ from y = w · x + b by what was rounded: every product and partial sum in
float32, the result in the module's dtype. What that does to a distance of standardised outputs
follows from a bound of the error's root mean square over the tokens alone (`wd_error`).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.precision import accumulator_dtype
from entangle.stats.wasserstein import ShapeStatistics

MOST = 2.0
"""Largest distance, in standard deviations, between two standardised distributions."""

Judge = Callable[[int, ShapeStatistics], ShapeStatistics]
"""Called as ``judge(number, shape)`` with what was measured on set ``number`` of the tokens."""

_GROWTH = 4.0
_TYPICAL = 0.25
_BLOCK = 2**18
_LEAST = 1e-22  # below it, float32 loses the square
_NUMBERS = ("wd", "ks", "mean", "std", "skewness", "excess_kurtosis")


@dataclass(frozen=True, eq=False)
class OutputError:
    """Rounding of each neuron's outputs, in the neuron's own units; fields of shape (neurons,)."""

    bound: Float[Tensor, " neurons"]
    """Bound of the root mean square over the tokens."""
    typical: Float[Tensor, " neurons"]
    """About the error of a usual token, which a few tokens of large inputs do not raise much."""


def wd_error(
    error: Float[Tensor, " neurons"], std: Float[Tensor, " neurons"]
) -> Float[Tensor, " neurons"]:
    """Bound by how much rounding can change a WD.

    Parameters
    ----------
    error
        Bound of the root mean square of the outputs' error, in the outputs' units.
    std
        Standard deviation of the outputs as they were computed, in the same units.

    Returns
    -------
    Tensor
        Shape (neurons,), in standard deviations, at most `MOST`; NaN where ``std`` is.

    Notes
    -----
    W1 is a metric, so WD changes by at most the mean of |ẑ − z| over the tokens, and that is at
    most its root mean square. Up to that norm z and ẑ are the centred outputs u and v divided by
    their lengths s and ŝ, and (Dunkl and Williams 1964) in every inner product space
    ‖u/‖u‖ − v/‖v‖‖ ≤ 2 ‖u − v‖ / (‖u‖ + ‖v‖). Centring makes an error no longer: ‖u − v‖ ≤ r, the
    error, and s ≥ ŝ − r; hence 2 r / (2 ŝ − r).
    """
    room = 2 * std - error
    bound = (2 * error / room).where(room > 0, MOST).clamp_max(MOST)
    return bound.nan_to_num(nan=MOST).masked_fill(std.isnan(), math.nan)


def output_error(
    mean: Float[Tensor, " neurons"],
    std: Float[Tensor, " neurons"],
    location: Float[Tensor, " neurons"],
    *,
    reach: Float[Tensor, " neurons"],
    in_features: int,
    dtype: torch.dtype,
    bias: Float[Tensor, " neurons"] | None = None,
) -> OutputError:
    """Bound the rounding of outputs that are sums of products, formed in float32 or wider.

    Parameters
    ----------
    mean, std, location
        Of the outputs as they were computed: mean, standard deviation, and about the median.
    reach
        From `reach`, and |bias| more where the sum may start with it; 0 where outputs are taken to
        be exact up to the rounding to their dtype.
    in_features
        Number of products in a sum.
    dtype
        Of the outputs; they count as rounded to float32 if it is wider.
    bias
        Added to the sum, which is then rounded once more. None without one.

    Notes
    -----
    With the unit roundoff u, rounding a number errs by at most u times the rounded number, and its
    root mean square over the tokens is at most u · √(mean² + std²). The sum of n products errs by
    at most n · u · Σ|w x| in any order; rounding errors of both signs grow like √n (Higham and Mary
    2019), of which four times is taken. Numbers below the smallest normal one are lost whole.
    """
    single, unit, least = (
        _unit(torch.float32),
        max(_unit(dtype), _unit(torch.float32)),
        _lost(dtype),
    )
    growth = min(in_features, _GROWTH * math.sqrt(in_features)) + 2  # 2: factors cast to float32
    magnitude = torch.hypot(mean, std)
    lost = least + in_features * torch.finfo(torch.float32).tiny
    if bias is not None:
        magnitude = magnitude + torch.hypot(mean - bias, std)
        lost += least
    usual = min(in_features, math.sqrt(in_features)) * single * _TYPICAL
    return OutputError(
        bound=growth * single * reach + unit * magnitude + lost,
        typical=usual * reach.nan_to_num(posinf=0.0) + unit * location.abs() + lost,
    )


def _unit(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to the nearest."""
    return float(torch.finfo(dtype).eps) / 2


def _lost(dtype: torch.dtype) -> float:
    """Return the largest absolute error of rounding a number below the smallest normal one."""
    return float(torch.finfo(dtype).eps * torch.finfo(dtype).tiny)


def reach(
    weight: Float[Tensor, "neurons in_features"], sizes: Float[Tensor, "*sets in_features"]
) -> Float[Tensor, "*sets neurons"]:
    """Bound the root mean square over the tokens of Σ_i |w_i x_i|, float64, on the CPU.

    Parameters
    ----------
    weight
        Rows of neurons, any floating dtype.
    sizes
        Root mean square of every input over the tokens, from `FeatureSizes`; several sets of tokens
        may be given at once.

    Notes
    -----
    By Minkowski's inequality it is at most Σ_i |w_i| · rms(x_i).
    """
    factor = sizes.to(weight.device, torch.float32).reshape(-1, weight.shape[1]).T
    rows = max(1, 16 * _BLOCK // max(1, weight.shape[1]))
    found = torch.cat([part.abs().float() @ factor for part in weight.split(rows)])
    by_set: Tensor = found.T.reshape(*sizes.shape[:-1], weight.shape[0])
    return by_set.cpu().double()


class FeatureSizes:
    """Root mean square of every input of a layer, over the tokens."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._squares: Tensor | None = None

    @classmethod
    def of(cls, blocks: Iterable[Float[Tensor, "_ features"]]) -> "FeatureSizes":
        """Measure all tokens of a record."""
        made = cls()
        for rows in blocks:
            made.add(feature_squares(rows), rows.shape[0])
        return made

    def add(self, squares: Float[Tensor, " features"], n_tokens: int) -> None:
        """Add what `feature_squares` found in some tokens."""
        self._squares = squares.clone() if self._squares is None else self._squares + squares
        self.n_tokens += n_tokens

    def rms(self) -> Float[Tensor, " features"]:
        """Return the root mean squares, in input units, on the CPU; there must be a token."""
        assert self._squares is not None  # noqa: S101
        mean: Tensor = self._squares / max(1, self.n_tokens)
        return mean.sqrt().clamp_min(_LEAST).cpu()


def feature_squares(rows: Float[Tensor, "tokens features"]) -> Float[Tensor, " features"]:
    """Return the sum over tokens of every input's square, in the widest dtype of the device."""
    wide = accumulator_dtype(rows.device)
    if rows.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
        return norm.to(wide).square()
    found = torch.zeros(rows.shape[1], dtype=wide)
    for part in rows.split(max(1, _BLOCK // max(1, rows.shape[1]))):
        found += part.float().square().sum(0)
    if not bool(found.isfinite().all()):  # squares may overflow float32
        found = rows.to(wide).square().sum(0)
    return found


def judged(shape: ShapeStatistics, error: Float[Tensor, " neurons"]) -> ShapeStatistics:
    """Flag as constant the neurons whose outputs vary by no more than their rounding.

    Parameters
    ----------
    shape
        As it was measured.
    error
        `OutputError.bound` of the neurons; where it is infinite, nothing is flagged.
    """
    bound = error.to(shape.std)
    still = (shape.std <= bound) & bound.isfinite()
    numbers = {name: getattr(shape, name).masked_fill(still, math.nan) for name in _NUMBERS}
    return replace(shape, **numbers, constant=shape.constant | still)


def judge_products(
    weight: Float[Tensor, "neurons in_features"],
    bias: Float[Tensor, " neurons"],
    sizes: Float[Tensor, "sets in_features"],
) -> Judge:
    """Return a function that judges outputs, computed in float32, on one of several sets of tokens.

    Parameters
    ----------
    weight, bias
        Of the neurons.
    sizes
        Root mean square of every input over each set.
    """
    reached, added = reach(weight, sizes), bias.cpu().double()

    def judge(number: int, shape: ShapeStatistics) -> ShapeStatistics:
        mean, std = shape.mean.cpu().double(), shape.std.cpu().double()
        error = output_error(
            mean, std, mean, reach=reached[number], in_features=weight.shape[1],
            dtype=torch.float32, bias=added,
        )  # fmt: skip
        return judged(shape, error.bound)

    return judge
