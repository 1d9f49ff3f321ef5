"""Bootstrap intervals of correlation coefficients and of means over windows of a text or pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entangle.checks import bootstrap
from entangle.errors import InvalidInput
from entangle.seeding import numpy_rng

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


_AT_ONCE = 2**20  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval."""

    value: float
    """The estimate from all data."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def spearman_interval(
    x: Floats, y: Floats, *, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return Spearman's rank correlation with a percentile bootstrap interval.

    Points are resampled with replacement. A resample is a number of repeats for each point, so
    that its ranks (ties share their mean rank) follow from running sums over values sorted once.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).
    n_boot
        Number of resamples. Those in which ``x`` or ``y`` is constant have no coefficient and are
        passed over.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Raises
    ------
    InvalidInput
        Unequal lengths, fewer than 3 points, a constant ``x`` or ``y``, or a value out of range.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    _check_bootstrap(x, y, n_boot=n_boot, level=level)
    n = len(x)
    groups = [np.unique(values, return_inverse=True)[1] for values in (x, y)]
    rho = weighted_spearman(groups, np.ones(n))
    rng = numpy_rng(seed, "bootstrap")
    draws = [
        weighted_spearman(groups, np.bincount(rng.integers(n, size=n), minlength=n))
        for _ in range(n_boot)
    ]
    return Interval(rho, *percentiles(draws, level, otherwise=rho))


def share_interval(count: int, n: int, *, level: float = 0.95) -> Interval:
    """Return the share of ``count`` things among ``n`` with Wilson's interval.

    Notes
    -----
    Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    from scipy.special import ndtri  # not by those who only read results

    share, z = count / n, float(ndtri(0.5 + 0.5 * level))
    size = 2 * (n + z**2)
    centre = (2 * n * share + z**2) / size
    half = z / size * np.sqrt(4 * n * share * (1 - share) + z**2)
    return Interval(
        share,
        0.0 if count == 0 else float(centre - half),
        1.0 if count == n else float(centre + half),
    )


def median_interval(values: Floats, *, level: float = 0.95) -> Interval:
    """Return the median of values, shape (n,), with the interval between two of them.

    As many values lie below the one as above the other, as few that the probability of the median
    there, by the binomial distribution, is at most ``1 - level``; NaN where n is too small.
    """
    from scipy.special import bdtr

    ordered, n = np.sort(values), len(values)
    below = int(np.searchsorted(bdtr(np.arange(n), n, 0.5), 0.5 * (1 - level))) - 1
    ends = (ordered[below], ordered[n - 1 - below]) if below >= 0 else (np.nan, np.nan)
    return Interval(float(np.median(values)), *map(float, ends))


def percentiles(
    draws: Floats | Sequence[float], level: float, *, otherwise: float = np.nan
) -> tuple[float, float]:
    """Return the ends of the percentile interval of bootstrap draws.

    NaN draws are passed over; if there is no other, both ends are ``otherwise``.
    """
    if np.isnan(draws).all():
        return otherwise, otherwise
    tail = 50.0 * (1.0 - level)
    low, high = np.nanpercentile(draws, [tail, 100.0 - tail])
    return float(low), float(high)


def jackknife(without: Floats) -> Floats:
    """Return standard errors from what is found without each group: √((n−1)/n · Σ(θᵢ − θ̄)²).

    ``without`` has shape (groups, values), groups of about equal size; NaN below two groups.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.
    """
    n = len(without)
    if n < 2:
        return np.full(without.shape[1:], np.nan)
    found: Floats = np.sqrt((n - 1) * without.var(0))
    return found


def resampled_means(
    values: Floats, counts: NDArray[np.generic], *, n_boot: int, rng: np.random.Generator
) -> Floats:
    """Return ``n_boot`` ratios of sums, Σ values / Σ counts, over windows drawn with replacement.

    ``values`` and ``counts`` have shape (windows,). A bounded number of draws is held at a time,
    and one generator gives the same draws however many that is.
    """
    drawn = resamples(len(values), n_boot=n_boot, rng=rng)
    return np.concatenate([values[some].sum(1) / counts[some].sum(1) for some in drawn])


def resamples(n: int, *, n_boot: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield ``n_boot`` draws of ``n`` of ``n`` points with replacement, some rows at a time."""
    at_once = max(1, _AT_ONCE // n)
    for start in range(0, n_boot, at_once):
        yield rng.integers(n, size=(min(at_once, n_boot - start), n))


def perplexity_ratio_interval(
    losses: Floats,
    baseline: Floats,
    counts: NDArray[np.generic],
    n_tokens: int,
    *,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the ratio of two perplexities on the same windows with a paired bootstrap interval.

    Windows are resampled with replacement, the same ones for both: what a window's text makes easy
    or hard cancels.

    Parameters
    ----------
    losses, baseline
        Summed loss of every window in nats, shape (windows,); the ratio is of the first to the
        second.
    counts
        Predicted tokens of every window, shape (windows,).
    n_tokens
        Of all windows.
    n_boot, seed, level
        Number of resamples, what seeds them, and the probability mass of the interval.

    Returns
    -------
    Interval
        Ends are NaN if there is one window only. All is NaN if a loss is NaN or both are infinite.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    n_boot, level = bootstrap(n_boot, level)
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = losses - baseline
        value = float(np.exp(gaps.sum() / n_tokens))
        if len(losses) < 2 or not np.isfinite(gaps).all():
            return Interval(value, np.nan, np.nan)
        rng = numpy_rng(seed, "perplexity ratio")
        low, high = np.exp(
            percentiles(resampled_means(gaps, counts, n_boot=n_boot, rng=rng), level)
        )
    return Interval(value, float(low), float(high))


def _check_bootstrap(x: Floats, y: Floats, *, n_boot: int, level: float) -> None:
    bootstrap(n_boot, level)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 3:
        raise InvalidInput(
            f"a rank correlation must have at least 3 pairs; got {x.shape} and {y.shape} values; "
            "score more neurons."
        )
    if np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        raise InvalidInput(
            "a rank correlation must have two different values on each side; got "
            f"{len(x)} points that all have {x[0] if np.ptp(x) == 0.0 else y[0]:.4g}."
        )


def weighted_spearman(groups: Sequence[NDArray[np.intp]], repeats: NDArray[np.generic]) -> float:
    """Return Spearman's coefficient where point i occurs ``repeats[i]`` times.

    Parameters
    ----------
    groups
        Both rankings: whole numbers from 0 on, shape (points,); ties share their mean rank.
    repeats
        Shape (points,), at least 0.

    Returns
    -------
    float
        NaN if a ranking is constant.
    """
    ranks = []
    for group in groups:
        size = np.bincount(group, weights=repeats)
        mean_rank = np.cumsum(size) - 0.5 * size  # the same for all members; a shift is harmless
        ranks.append(mean_rank[group] - 0.5 * repeats.sum())
    a, b = ranks
    weighted = a * repeats
    norm = np.sqrt((weighted @ a) * ((b * repeats) @ b))
    return float(weighted @ b / norm) if norm > 0.0 else np.nan


def window_mean_interval(
    values: Floats,
    counts: Counts,
    *,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return a mean over counted items with a percentile bootstrap interval over windows.

    The mean is a ratio of two sums, both over windows. Whole windows are resampled with
    replacement, as items of one window (tokens of a text) are not independent.

    Parameters
    ----------
    values
        Sum over the items of each window, shape (windows,).
    counts
        Number of items in each window, at least 1, shape (windows,).
    n_boot
        Number of resamples.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Returns
    -------
    Interval
        Ends are NaN if there is one window only or a value is NaN or infinite.

    Raises
    ------
    InvalidInput
        Unequal lengths, no window, a count below 1, or an option out of range.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    _check_windows(values, counts, n_boot=n_boot, level=level)
    n = len(values)
    with np.errstate(invalid="ignore"):  # infinities of both signs: NaN
        mean = float(values.sum() / counts.sum())
    if n < 2 or not np.isfinite(values).all():
        return Interval(mean, np.nan, np.nan)
    rng = numpy_rng(seed, "window bootstrap")
    draws = resampled_means(values, counts, n_boot=n_boot, rng=rng)
    return Interval(mean, *percentiles(draws, level))


def window_difference_interval(
    a: Floats,
    b: Floats,
    counts: Counts,
    *,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the difference of two means, a − b, with a paired interval over windows.

    The same windows are resampled for both: what a window makes easy or hard for both cancels.

    Parameters
    ----------
    a, b
        Sums over the items of each window, of two models on the same windows, shape (windows,).
    counts, n_boot, seed, level
        As in `window_mean_interval`; so are the result and the errors.
    """
    if a.shape != b.shape:
        raise InvalidInput(
            f"`a` and `b` must have one value for each window; got shapes {a.shape} and {b.shape}."
        )
    with np.errstate(invalid="ignore"):  # infinite in both: their difference is NaN
        gaps = a - b
    return window_mean_interval(gaps, counts, n_boot=n_boot, seed=seed, level=level)


FEW = 10
"""Minimal pairs below which a resample is too narrow to be an interval."""
SPARSE = 5
"""Pairs of a paradigm below which the mean over it and larger ones has no interval."""


def pairs_interval(
    values: Floats,
    paradigms: NDArray[np.generic],
    *,
    macro: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return a mean over minimal pairs with a percentile bootstrap interval over the pairs.

    Pairs are resampled within their paradigms where each has `FEW` and more, and all together where
    one has fewer, so that differences between paradigms widen the interval.

    Parameters
    ----------
    values
        Value of each pair, shape (pairs,): 1 where it is correct, or a difference of such.
    paradigms
        Paradigm of each pair, shape (pairs,).
    macro
        Take the mean of the paradigms' means instead of the mean of all pairs.
    n_boot, seed, level
        Of the resampling.

    Returns
    -------
    Interval
        Ends are NaN if there are fewer than `FEW` pairs, and of ``macro`` if a paradigm has fewer
        than `SPARSE` and another more: the few weigh as much as the many, and an interval of 95 %
        of one pair beside 200 would hold the truth in 45 % of samples, of three in 78 %.

    Raises
    ------
    InvalidInput
        If an option is out of range.

    Notes
    -----
    A resample of n values spreads by (n − 1) / n of their variance: by half of it for two pairs, by
    nothing for one. One of a stratum is a draw of a multinomial distribution over the different
    values in it; of pairs of several paradigms together, a macro mean is a ratio of weighted sums.
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    n_boot, level = bootstrap(n_boot, level)
    names = list(dict.fromkeys(paradigms.tolist()))
    own = [paradigms == name for name in names]
    value = float(np.mean([values[one].mean() for one in own]) if macro else values.mean())
    sizes = [int(one.sum()) for one in own]
    if len(values) < FEW or (macro and min(sizes) < SPARSE and min(sizes) < max(sizes)):
        return Interval(value, np.nan, np.nan)
    share = np.ones(len(values))
    for one, size in zip(own, sizes, strict=True) if macro else ():
        share[one] = 1 / size
    few = min(sizes) < FEW
    rng = numpy_rng(seed, "paired difference")
    total, weight = np.zeros(n_boot), np.zeros(n_boot)
    for one in [np.ones(len(values), bool)] if few else own:
        (different, shares), counts = np.unique(
            np.stack([values[one], share[one]]), axis=1, return_counts=True
        )
        drawn = rng.multinomial(one.sum(), counts / counts.sum(), size=n_boot)
        total += drawn @ (different * shares)
        weight += drawn @ shares
    return Interval(value, *percentiles(total / weight, level))


def _check_windows(values: Floats, counts: Counts, *, n_boot: int, level: float) -> None:
    bootstrap(n_boot, level)
    if values.ndim != 1 or values.shape != counts.shape or len(values) == 0:
        raise InvalidInput(
            "a mean over windows must have one value and one count for each of at least 1 window; "
            f"got shapes {values.shape} and {counts.shape}."
        )
    if not (counts >= 1).all():
        raise InvalidInput(f"`counts` must be at least 1; got {counts.min()}.")
