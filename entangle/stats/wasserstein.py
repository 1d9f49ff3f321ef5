"""Exact distance of a neuron's outputs from a fitted Gaussian.

The Wasserstein distance (WD) of a neuron is the 1-Wasserstein distance between its standardised
outputs over the calibration tokens and N(0, 1) (arXiv 2405.15756, eq. 1). It needs no sample of
the normal distribution: with sorted standardised outputs z_(1) ≤ … ≤ z_(n),

    WD = Σ_i ∫_{(i-1)/n}^{i/n} |z_(i) − Φ⁻¹(u)| du,   ∫ Φ⁻¹ du = −φ(Φ⁻¹(u)),

and only the cells that contain Φ(z_(i)) need splitting.

Outputs in finite precision differ from y = w · x + b by what was rounded: every product and partial
sum in float32, the result in the module's dtype. What that does to a distance of standardised
outputs follows from a bound of the error's root mean square over the tokens alone (`wd_error`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.special import ndtri
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.kernels import exact, weights
from entangle.kernels.dispatch import dispatch, on_cpu
from entangle.memory import by_device
from entangle.precision import accumulator_dtype, row_parts
from entangle.ranks import Ranks
from entangle.seeding import numpy_rng
from entangle.stats.bins import ToAdd, pooled_parts, to_host

_SORT_BYTES = 64 * 2**20
_SORT_BYTES_GPU = 2**30
_FEW, _OCTAVES = 256, 5
_SAMPLE = 512
_CACHE_BYTES = 4 * 2**20
_STRETCH = 2**16
"""Numbers of a row that is longer than `_CACHE_BYTES` looked at together."""


@dataclass(frozen=True, eq=False)
class ShapeStatistics:
    """Shape of each neuron's output distribution; every field has shape (neurons,).

    Rows that are constant or hold a NaN or an infinity have NaN in every field but the flags.
    """

    wd: Float[Tensor, " neurons"]
    """1-Wasserstein distance of the standardised outputs to N(0, 1), in standard deviations."""
    ks: Float[Tensor, " neurons"]
    """Kolmogorov-Smirnov distance of the standardised outputs to N(0, 1), in [0, 1]."""
    mean: Float[Tensor, " neurons"]
    """Mean output, in the neuron's own units."""
    std: Float[Tensor, " neurons"]
    """Population standard deviation of the output, in the neuron's own units."""
    skewness: Float[Tensor, " neurons"]
    """Third standardised moment."""
    excess_kurtosis: Float[Tensor, " neurons"]
    """Fourth standardised moment minus 3."""
    constant: Bool[Tensor, " neurons"]
    """Outputs that do not vary beyond rounding."""
    nan: Bool[Tensor, " neurons"]
    """At least one output is NaN."""
    inf: Bool[Tensor, " neurons"]
    """At least one output is infinite (and none is NaN)."""


def shape_statistics(outputs: Float[Tensor, "neurons tokens"]) -> ShapeStatistics:
    """Measure how far each row's distribution is from a fitted Gaussian, exactly.

    Parameters
    ----------
    outputs
        Outputs of shape (neurons, tokens), any floating dtype, in the neurons' own units. Not
        modified. Work memory is bounded; it does not grow with the number of rows.

    Returns
    -------
    ShapeStatistics
        Distances and moments of shape (neurons,), in float64 (float32 on devices without it).

    Raises
    ------
    InvalidInput
        If there is no token.

    References
    ----------
    arXiv 2405.15756, eq. 1 (the paper's own code compares with one random normal sample instead).
    """
    neurons, tokens = outputs.shape
    if tokens == 0:
        raise InvalidInput("`outputs` must hold at least one token; got shape with 0 tokens.")
    at_once = by_device(outputs.device, cpu=_SORT_BYTES, gpu=_SORT_BYTES_GPU)
    parts = []
    for part in row_parts(neurons, at_once // (4 * tokens)):
        work = outputs[part].detach()
        work = work.float() if work.element_size() == 2 else work
        parts.append(with_flags(*_columns_and_flags(work), outputs.dtype))
    columns = ([getattr(part, f.name) for part in parts] for f in fields(ShapeStatistics))
    return ShapeStatistics(*(torch.cat(column) for column in columns))


def with_flags(
    columns: Sequence[Tensor], nan: Tensor, inf: Tensor, equal: Tensor, dtype: torch.dtype
) -> ShapeStatistics:
    """Add the flags to WD, KS and moments, and NaN where one of them is set.

    Parameters
    ----------
    columns
        WD, KS, mean, std, skewness, excess kurtosis.
    nan, inf, equal
        Rows with a NaN, with an infinity, of equal values.
    dtype
        Of the outputs.
    """
    constant = (is_constant(columns[3], columns[2], dtype) | equal) & ~nan & ~inf
    bad = nan | inf | constant
    found = [column.masked_fill(bad, math.nan) for column in columns]
    return ShapeStatistics(*[*found, constant, nan, inf])


def sorted_columns(rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "six=6 rows"]:
    """Return WD, KS, mean, std, skewness and excess kurtosis of rows, by sorting them."""
    return torch.stack(_columns(sort_rows(rows)))


def _by_buckets(outputs: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Do what `_columns_and_flags` does without sorting all of a row."""
    density = normal_density(outputs.shape[1], outputs.device)
    stride = max(1, outputs.shape[1] // _SAMPLE)
    sample = sort_rows(outputs[:, ::stride][:, :_SAMPLE].nan_to_num(0.0, 0.0, 0.0))
    low, middle, high = (sample[:, i * sample.shape[1] // 4] for i in (1, 2, 3))
    width = (high - low).clamp_min(torch.finfo(torch.float32).tiny * 2**10)
    scale = torch.where(high > low, width, sample.std(1, correction=0).clamp_min(1e-30))
    found, what, _ = exact.row_statistics(outputs, middle, scale, density=density)
    crowded = (what == exact.CROWDED).nonzero()[:, 0]
    if len(crowded):
        found[:, crowded] = sorted_columns(outputs[crowded])
    return list(found), what == exact.NAN, what == exact.INFINITE, what == exact.EQUAL


@dispatch(_by_buckets, where=exact.fits)
def _columns_and_flags(outputs: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return WD, KS and moments, and which rows hold NaN, infinities, equal values."""
    ordered = sort_rows(outputs)
    first, last = ordered[:, 0], ordered[:, -1]
    nan = last.isnan()
    inf = (first.isinf() | last.isinf()) & ~nan
    return _columns(ordered), nan, inf, first == last


def _fused_columns(ordered: Tensor) -> list[Tensor]:
    density = normal_density(ordered.shape[1], ordered.device)
    return list(exact.sorted_statistics(ordered, density))


def _in_stretches(ordered: Tensor) -> list[Tensor]:
    """Return WD, KS, mean, std, skewness, excess kurtosis of sorted rows, a stretch at a time.

    A row of a million numbers would take a hundred megabytes of intermediate results.
    """
    n = ordered.shape[1]
    wide = accumulator_dtype(ordered.device)
    mean = sum(part.sum(1, dtype=wide) for part in ordered.split(_STRETCH, 1)) / n
    found = torch.zeros(5, len(ordered), dtype=wide)
    rows = max(1, _CACHE_BYTES // (8 * _STRETCH))
    for part in ordered.split(_STRETCH, 1):
        for some, centre, total in zip(
            part.split(rows), mean.split(rows), found[0].split(rows), strict=True
        ):
            centred = some.to(wide) - centre[:, None]
            total += torch.linalg.vecdot(centred, centred)
    std = (found[0] / n).sqrt()
    for start in range(0, n, _STRETCH):
        cells = _cells(n, start, min(start + _STRETCH, n))
        for own in (slice(i, i + rows) for i in range(0, len(ordered), rows)):
            z = ordered[own, start : start + _STRETCH].to(wide)
            z = z.sub_(mean[own, None]).div_(std[own, None])
            square = z.square()
            found[1, own] += torch.linalg.vecdot(square, z)
            found[2, own] += torch.linalg.vecdot(square, square)
            exact, ks = _distances_of(z, start, n, cells)
            found[3, own] += exact
            found[4, own] = torch.maximum(found[4, own], ks)
    return [found[3], found[4], mean, std, found[1] / n, found[2] / n - 3]


def _is_long(ordered: Tensor) -> bool:
    return on_cpu(ordered) and 8 * ordered.shape[1] > _CACHE_BYTES


@dispatch(_fused_columns, where=exact.fits_sorted)
@dispatch(_in_stretches, where=_is_long)
def _columns(ordered: Tensor) -> list[Tensor]:
    """Return WD, KS, mean, std, skewness and excess kurtosis of sorted rows."""
    at_once = by_device(ordered.device, cpu=_CACHE_BYTES, gpu=_SORT_BYTES)
    size = at_once // (8 * ordered.shape[1])
    parts = map(_sorted_statistics, (ordered[part] for part in row_parts(len(ordered), size)))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _sorted_statistics(ordered: Tensor) -> tuple[Tensor, ...]:
    """Return the same of few rows, by plain torch."""
    ordered = ordered.to(accumulator_dtype(ordered.device))
    mean = ordered.mean(1)
    centred = ordered - mean[:, None]
    std = (torch.linalg.vecdot(centred, centred) / ordered.shape[1]).sqrt()
    z = centred.div_(std[:, None])
    square = z.square()
    skewness = torch.linalg.vecdot(square, z) / z.shape[1]
    kurtosis = torch.linalg.vecdot(square, square) / z.shape[1] - 3
    n = z.shape[1]
    return (*_distances_of(z, 0, n, _normal_cells(n, 0, n)), mean, std, skewness, kurtosis)


def is_constant(
    std: Float[Tensor, " neurons"], mean: Float[Tensor, " neurons"], dtype: torch.dtype
) -> Bool[Tensor, " neurons"]:
    """Tell which neurons vary by no more than the rounding of ``dtype`` around their mean."""
    return std <= 4 * torch.finfo(dtype).eps * mean.abs()


def _sort_by_numpy(values: Tensor) -> Tensor:
    """Sort on the CPU, where NumPy is faster than torch and lets threads run beside it."""
    ordered = values.clone(memory_format=torch.contiguous_format)
    threads = min(torch.get_num_threads(), ordered.shape[0])
    if threads < 2:
        ordered.numpy().sort(axis=1)
        return ordered
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.sort(axis=1), np.array_split(ordered.numpy(), threads)))
    return ordered


def _numpy_sorts(values: Tensor) -> bool:
    return on_cpu(values) and values.dtype in (torch.float32, torch.float64)


@dispatch(_sort_by_numpy, where=_numpy_sorts)
def sort_rows(values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Sort every row into ascending order, NaNs last."""
    work = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return work.sort(dim=1).values


def _cells(n: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return φ(Φ⁻¹(i/n)) for i = start…stop and the integrals of Φ⁻¹ between, both float64."""
    density = ndtri(np.arange(start, stop + 1) / n)
    np.exp(np.multiply(density, density, out=density) * -0.5, out=density)
    density /= math.sqrt(2 * math.pi)
    return density, density[:-1] - density[1:]


_normal_cells = lru_cache(maxsize=8)(_cells)
"""Of whole rows, which are kept."""


@lru_cache(maxsize=8)
def normal_density(n: int, device: torch.device) -> Float[Tensor, " edges"]:
    """Return φ(Φ⁻¹(i/n)) for i = 0…n, float64."""
    return torch.from_numpy(_normal_cells(n, 0, n)[0]).to(device)


def _distances_of(
    z: Tensor, start: int, n: int, normal: tuple[np.ndarray, np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Return what the numbers from ``start`` on, of ``n``, add to WD, and their KS.

    ``normal`` has the density at the edges of their cells, and the cells.
    """
    density, cells = torch.from_numpy(normal[0]).to(z), torch.from_numpy(normal[1]).to(z)
    index = torch.arange(start + 1, start + z.shape[1] + 1, device=z.device, dtype=z.dtype)
    rank = torch.special.erf(z / math.sqrt(2)).add_(1).mul_(n / 2)  # n Φ(z)
    above = rank.sub_(index)  # n Φ(z_i) − i: in (−1, 0) where the cell contains Φ(z_i)
    ks = torch.maximum(-above.amin(1), above.amax(1) + 1) / n
    exact = (z / n).sub_(cells).abs_()
    row, cell = ((above > -1) & (above < 0)).nonzero(as_tuple=True)
    split = z[row, cell]
    bump = torch.exp(-0.5 * split**2) * (2 / math.sqrt(2 * math.pi))
    slope = (2 * above[row, cell] + 1) / n
    exact[row, cell] = split * slope + bump - density[cell] - density[cell + 1]
    return exact.sum(1), ks


@lru_cache(maxsize=4096)
def null_floor(n_tokens: int, *, seed: int = 0, n_draws: int = 200) -> tuple[float, float]:
    """Return the WD of truly Gaussian outputs: its mean and 97.5th percentile.

    Parameters
    ----------
    n_tokens
        Number of independent tokens.
    seed, n_draws
        Seed of the simulation, and number of simulated Gaussian neurons.

    Returns
    -------
    tuple of float
        Mean and 97.5th percentile, in standard deviations. Simulated for up to 256 tokens and 512,
        1,024, … 8,192; between, floor times √n is interpolated in log n (mean within 2 %); above,
        it is ∝ 1/√n. Tokens of one text are correlated: a real neuron's floor lies higher.
    """
    if n_tokens <= _FEW:
        found = _simulated_floor(n_tokens, seed, n_draws)
    else:
        octave = min(math.log2(n_tokens / _FEW), _OCTAVES)
        below = min(int(octave), _OCTAVES - 1)
        low, high = (_simulated_floor(_FEW << k, seed, n_draws) for k in (below, below + 1))
        found = low + (octave - below) * (high - low)
    mean, largest = found / math.sqrt(n_tokens)
    return float(mean), float(largest)


@lru_cache(maxsize=512)
def _simulated_floor(n_tokens: int, seed: int, n_draws: int) -> np.ndarray:
    """Return mean and 97.5th percentile of the WD of simulated Gaussian neurons, times √n."""
    wd = _gaussian_wd(n_tokens, seed, n_draws)
    return np.array([wd.mean(), np.quantile(wd, 0.975)]) * math.sqrt(n_tokens)


def _gaussian_wd(n_tokens: int, seed: int, n_draws: int) -> np.ndarray:
    """Return the WD of simulated Gaussian neurons."""
    draws = numpy_rng(seed, "null floor").standard_normal((n_draws, n_tokens))
    return shape_statistics(torch.from_numpy(draws)).wd.numpy()


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


def _reach_on_cpu(weight: Tensor, sizes: Tensor) -> Tensor:
    sets = sizes.reshape(-1, weight.shape[1])
    found = torch.stack([weights.magnitudes(weight, one) for one in sets])
    return found.reshape(*sizes.shape[:-1], weight.shape[0])


@dispatch(_reach_on_cpu, where=lambda weight, _sizes: weights.fits(weight))
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
    at_once = by_device(weight.device, cpu=2 * _BLOCK, gpu=16 * _BLOCK) // max(1, weight.shape[1])
    parts = row_parts(weight.shape[0], at_once)
    found = torch.cat([weight[part].abs().float() @ factor for part in parts])
    by_set: Tensor = found.T.reshape(*sizes.shape[:-1], weight.shape[0])
    return to_host([by_set])[0].double()


class FeatureSizes:
    """Root mean square of every input of a layer, over the tokens."""

    def __init__(self, *, split: bool = False) -> None:
        self.n_tokens, self._split = 0, split
        self._squares: Tensor | None = None
        self._parts: list[Tensor] = []

    @classmethod
    def of(cls, blocks: Iterable[Float[Tensor, "_ features"]]) -> "FeatureSizes":
        """Measure all tokens of a record."""
        made = cls()
        for rows in blocks:
            made.add(feature_squares(rows), rows.shape[0])
        return made

    def add(self, squares: Float[Tensor, " features"], n_tokens: int) -> None:
        """Add what `feature_squares` found in some tokens."""
        if self._split:
            self._parts.append(squares)
        if self._squares is None:
            self._squares = torch.zeros_like(squares)
        self._squares += squares
        self.n_tokens += n_tokens

    def keep_in(self, squares: Float[Tensor, " features"]) -> None:
        """Add squares in this memory from now on."""
        self._squares = squares

    def known(self) -> Sequence[int]:
        """As `entangle.stats.sketch.OutputSketch.known`."""
        return [len(self._parts), self.n_tokens]

    def pool(
        self,
        ranks: Ranks,
        found: Sequence[Sequence[int]],
        like: Float[Tensor, " features"],
        *,
        to: int,
    ) -> ToAdd:
        """As `entangle.stats.sketch.OutputSketch.pool`; ``like`` is as what is added."""
        sums = pooled_parts(ranks, self._parts, [own[0] for own in found], like=like, to=to)
        self._parts, self._squares = [], None
        self.n_tokens = sum(own[1] for own in found)
        if ranks.rank != to or not len(sums):
            return []
        self._squares = torch.zeros_like(like)
        return [(self._squares, sums)]

    def rms(self) -> Float[Tensor, " features"]:
        """Return the root mean squares, in input units, on the CPU; there must be a token."""
        assert self._squares is not None  # noqa: S101
        return to_host([root_mean_square(self._squares, max(1, self.n_tokens))])[0]


def root_mean_square(
    squares: Float[Tensor, "*sets features"], n_tokens: int | Int64[Tensor, "*sets one=1"]
) -> Float[Tensor, "*sets features"]:
    """Return the root mean squares of inputs whose squares were summed over so many tokens."""
    return (squares / n_tokens).sqrt().clamp_min(_LEAST)


def _squares_in_blocks(rows: Tensor) -> Tensor:
    wide = accumulator_dtype(rows.device)
    found = torch.zeros(rows.shape[1], dtype=wide)
    for part in rows.split(max(1, _BLOCK // max(1, rows.shape[1]))):
        found += part.float().square().sum(0)
    if not bool(found.isfinite().all()):  # squares may overflow float32
        found = rows.to(wide).square().sum(0)
    return found


@dispatch(_squares_in_blocks, where=on_cpu)
def feature_squares(rows: Float[Tensor, "tokens features"]) -> Float[Tensor, " features"]:
    """Return the sum over tokens of every input's square, in the widest dtype of the device."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
    return norm.to(accumulator_dtype(rows.device)).square()


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
