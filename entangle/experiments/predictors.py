"""How well scores of neurons predict what becomes of them: a table of correlations.

Rank correlation of two quantities beyond what others explain of both.

Pearson's correlation with a bootstrap interval.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from entangle.checks import bootstrap, named, several
from entangle.errors import InvalidInput
from entangle.experiments.selection import column
from entangle.seeding import check_seed, numpy_rng
from entangle.stats.intervals import Interval, percentiles, resamples, spearman_interval

Floats = NDArray[np.float64]


_NO_RANKS_LEFT = 1e-8  # share of the spread of ranks below which residuals are rounding


def partial_spearman(
    x: Floats,
    y: Floats,
    given: Floats,
    *,
    n_boot: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the partial rank correlation of ``x`` and ``y`` with a bootstrap interval.

    All columns are replaced by their ranks (ties share their mean rank), the ranks of ``given`` are
    regressed out of those of ``x`` and ``y`` by least squares with an intercept, and the residuals
    are correlated. Points are resampled with replacement and ranked anew.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).
    given
        What is held fixed, shape (points, columns); columns may depend on one another.
    n_boot
        Number of resamples. Those in which ``given`` determines the ranks of ``x`` or ``y`` have no
        coefficient and are passed over.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Raises
    ------
    InvalidInput
        Shapes that do not fit, fewer than 3 points more than columns, a value that is not finite,
        an ``x`` or ``y`` whose ranks ``given`` determines, or an option out of range.

    Notes
    -----
    Kendall and Stuart, The Advanced Theory of Statistics, volume 2, chapter 27 (partial
    correlation); percentile interval as in `entangle.stats.intervals.spearman_interval`.
    """
    _check(x, y, given, n_boot=n_boot, level=level)
    found = partial_interval(x, y, given, n_boot=n_boot, seed=seed, level=level)
    if np.isnan(found.value):
        raise InvalidInput(
            "a partial correlation must have `x` and `y` that `given` does not determine; got one "
            f"that it does, over {len(x)} points: leave a column of `given` out."
        )
    return found


def partial_interval(
    x: Floats, y: Floats, given: Floats, *, n_boot: int, seed: int, level: float
) -> Interval:
    """As `partial_spearman`, unchecked; all is NaN where ``given`` determines ``x`` or ``y``."""
    table = np.column_stack([x, y, given])
    value = _coefficient(table)
    if np.isnan(value):
        return Interval(value, np.nan, np.nan)
    rng, n = numpy_rng(seed, "partial bootstrap"), len(x)
    draws = [_coefficient(table[rng.integers(n, size=n)]) for _ in range(n_boot)]
    return Interval(value, *percentiles(draws, level, otherwise=value))


def _coefficient(table: Floats) -> float:
    """Correlate the ranks of the first two columns given the others; NaN if they are determined."""
    ranks = rankdata(table, axis=0) - 0.5 * (len(table) + 1)
    pair, given = ranks[:, :2], ranks[:, 2:]
    left = pair - given @ np.linalg.lstsq(given, pair, rcond=None)[0]
    before, after = np.linalg.norm(pair, axis=0), np.linalg.norm(left, axis=0)
    if (after <= _NO_RANKS_LEFT * before).any():
        return np.nan
    return float(left[:, 0] @ left[:, 1] / after.prod())


def _check(x: Floats, y: Floats, given: Floats, *, n_boot: int, level: float) -> None:
    n_boot, level = bootstrap(n_boot, level)
    if x.ndim != 1 or x.shape != y.shape or given.ndim != 2 or len(given) != len(x):
        raise InvalidInput(
            "`x`, `y` and `given` must have shapes (points,), (points,) and (points, columns); "
            f"got {x.shape}, {y.shape} and {given.shape}."
        )
    if len(x) < given.shape[1] + 3:
        raise InvalidInput(
            f"a partial correlation given {given.shape[1]} columns must have at least "
            f"{given.shape[1] + 3} points; got {len(x)}: score more neurons."
        )
    if not all(np.isfinite(values).all() for values in (x, y, given)):
        raise InvalidInput("values to correlate must be finite; got NaN or infinity: drop them.")


_NO_VARIANCE_LEFT = 1e-12  # share of the variance below which that of a resample is rounding


def pearson_interval(
    x: Floats, y: Floats, *, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return Pearson's correlation with a percentile bootstrap interval.

    Points are resampled with replacement.

    Parameters
    ----------
    x, y
        Paired finite values, shape (points,).
    n_boot
        Number of resamples. Those in which ``x`` or ``y`` is constant are passed over.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Returns
    -------
    Interval
        NaN where there are fewer than 3 points, or ``x`` or ``y`` is constant.

    Raises
    ------
    InvalidInput
        Unequal lengths, or an option out of range.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    if x.ndim != 1 or x.shape != y.shape:
        raise InvalidInput(
            f"`x` and `y` must have one value for each point; got shapes {x.shape} and {y.shape}."
        )
    n_boot, level = bootstrap(n_boot, level)
    n = len(x)
    if n < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return Interval(np.nan, np.nan, np.nan)
    a, b = ((values - values.mean()) / values.std() for values in (x, y))
    drawn = resamples(n, n_boot=n_boot, rng=numpy_rng(seed, "bootstrap"))
    draws = [_coefficients(a[chosen], b[chosen]) for chosen in drawn]
    value = float(np.clip(a @ b / n, -1.0, 1.0))
    return Interval(value, *percentiles(np.concatenate(draws), level, otherwise=value))


def _coefficients(a: Floats, b: Floats) -> Floats:
    """Correlate the rows of two matrices; NaN where one is constant."""
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (a, b))
    squares = np.square(a).mean(axis=1), np.square(b).mean(axis=1)
    norm = np.sqrt(squares[0] * squares[1])
    norm[(squares[0] <= _NO_VARIANCE_LEFT) | (squares[1] <= _NO_VARIANCE_LEFT)] = np.nan
    found: Floats = (a * b).mean(axis=1) / norm
    return found


PREDICTORS = (
    "wd", "md", "abs_skewness", "excess_kurtosis", "ks", "abs_mean", "variance", "weight_norm",
    "gmm_components",
)  # fmt: skip
"""Columns that may predict a target; some are derived (see
`entangle.experiments.selection.DERIVED`)."""

SCOPES = ("layer", "mean of layers", "pooled ranks")
"""What a row of `predictor_table` is about."""

_NONE = Interval(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class _Question:
    """What is correlated, and how sure the answer must be."""

    target: str
    given: tuple[str, ...]
    boot: dict[str, Any]
    """Options of the bootstrap: n_boot, seed, level."""

    def row(self, scope: str, layer: str, name: str) -> dict[str, object]:
        return {"scope": scope, "layer": layer, "predictor": name, "target": self.target}


def predictor_table(
    frame: pd.DataFrame,
    target: str,
    *,
    predictors: str | Iterable[str] | None = None,
    given: str | Iterable[str] = (),
    n_boot: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Correlate scores of neurons with a target, in every layer and over all layers.

    Parameters
    ----------
    frame
        One row a neuron with columns layer and neuron, the predictors and the target, such as the
        ``frame`` of `entangle.results.scores.NeuronScores` with a column more. Rows with a ``flag``
        are left out, and so are those where a predictor or the target is not finite, from the
        coefficients that need it.
    target
        What is predicted, such as the relative improvement (``ri``), ``damage`` or ``md``.
    predictors
        Numeric or derived columns; by default those of `PREDICTORS` that the frame has, without the
        target.
    given
        Columns that the partial correlations hold fixed, such as variance and weight_norm; without
        any there are none.
    n_boot, seed, level
        Of the bootstrap intervals, as in `entangle.stats.intervals.spearman_interval`. Predictors
        with values for the same neurons of a layer see the same resamples.

    Returns
    -------
    pandas.DataFrame
        One row a (scope, layer, predictor) with columns ``scope`` (one of `SCOPES`), ``layer``
        ("" over all layers), ``predictor``, ``target``, ``n`` (neurons), ``n_layers``,
        ``spearman``, ``spearman_low``, ``spearman_high``, ``pearson``, ``pearson_low``,
        ``pearson_high``, ``r2`` (Pearson's coefficient squared) and, if something is ``given``,
        ``partial``, ``partial_low``, ``partial_high``:

        ``layer``
            The neurons of one layer, with bootstrap intervals over neurons. NaN where there are
            fewer than 3 neurons or no two different values, or where ``given`` determines a side.
        ``mean of layers``
            Means of the layers' coefficients, with Student's t interval over layers, cut at ±1.
            NaN ends with one layer.
        ``pooled ranks``
            All neurons, each value replaced by its rank (less ½) inside its layer divided by the
            number of neurons there, with bootstrap intervals over neurons; pearson and r2 are of
            values standardised inside each layer, without layers in which a side is constant.

        Partial coefficients are NaN for predictors that are given.

    Raises
    ------
    UnknownName
        If a column does not exist.
    InvalidInput
        If a neuron comes twice, there is no predictor, or an option is out of range.

    References
    ----------
    arXiv 2405.15756 (R² of WD, and of the number of mixture components, with RI).
    """
    n_boot, level = bootstrap(n_boot, level)
    target, given = (
        named("target", target),
        [named("given", one) for one in several("given", given, empty=True)],
    )
    boot = {"n_boot": n_boot, "seed": check_seed(seed), "level": level}
    question = _Question(target, tuple(dict.fromkeys(given)), boot)
    if predictors is not None:
        asked = several("predictors", predictors, empty=True)
        predictors = [named("predictors", one) for one in asked]
    table = _neurons(frame)
    names = _predictors(table, question, predictors)
    wanted = dict.fromkeys((*names, *question.given, target))
    values = pd.DataFrame({name: column(table, name).astype(np.float64) for name in wanted})
    values = values.mask(np.isinf(values))
    layers = table["layer"]
    single = [
        question.row("layer", str(layer), name) | _correlate(part, part, name, question)
        for layer, part in values.groupby(layers, sort=False)
        for name in names
    ]
    found = pd.DataFrame(single)
    means = [_mean_of_layers(found[found["predictor"] == name], name, question) for name in names]
    pooled = [_pooled(values, layers, name, question) for name in names]
    return pd.DataFrame([*single, *means, *pooled])


def _neurons(frame: pd.DataFrame) -> pd.DataFrame:
    for name in ("layer", "neuron"):
        if name not in frame.columns:
            raise InvalidInput(f"`frame` must have the column {name!r}; merge it with the scores.")
    twice = frame[frame.duplicated(["layer", "neuron"])]
    if len(twice):
        raise InvalidInput(
            f"`frame` must hold a neuron once; got {twice['neuron'].iloc[0]} of layer "
            f"{twice['layer'].iloc[0]!r} again: choose one sparsity and number of experts."
        )
    kept = frame[frame["flag"] == ""] if "flag" in frame.columns else frame
    if kept.empty:
        raise InvalidInput(
            f"`frame` must hold at least one neuron without a flag; got {len(frame)} with one."
        )
    return kept.reset_index(drop=True)


def _predictors(table: pd.DataFrame, question: _Question, asked: Sequence[str] | None) -> list[str]:
    column(table, question.target)
    names = list(dict.fromkeys(asked or ()))
    if asked is None:
        names = [name for name in PREDICTORS if name != question.target and _has(table, name)]
    if not names or question.target in (*names, *question.given):
        raise InvalidInput(
            "`predictors` must name at least one column, and neither they nor `given` the target "
            f"{question.target!r}; got {names} and {list(question.given)}."
        )
    return names


def _has(table: pd.DataFrame, name: str) -> bool:
    try:
        column(table, name)
    except LookupError:
        return False
    return True


def _correlate(
    ranked: pd.DataFrame, linear: pd.DataFrame, name: str, question: _Question, n_layers: int = 1
) -> dict[str, object]:
    """Return all coefficients of one predictor: rank ones from one frame, r2 from another."""
    x, y = ranked[[name, question.target]].dropna().to_numpy().T
    columns: dict[str, object] = {"n": len(x), "n_layers": n_layers}
    varied = len(x) >= 3 and np.ptp(x) > 0.0 and np.ptp(y) > 0.0
    spearman = spearman_interval(x, y, **question.boot) if varied else _NONE
    columns |= _ends("spearman", spearman)
    x, y = linear[[name, question.target]].dropna().to_numpy().T
    pearson = pearson_interval(x, y, **question.boot)
    columns |= _ends("pearson", pearson)
    columns["r2"] = pearson.value**2
    if question.given:
        columns |= _ends("partial", _partial(ranked, name, question))
    return columns


def _ends(name: str, interval: Interval) -> dict[str, object]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _partial(ranked: pd.DataFrame, name: str, question: _Question) -> Interval:
    given = question.given
    if name in given:
        return _NONE
    x, y, *others = ranked[[name, question.target, *given]].dropna().to_numpy().T
    if len(x) < len(given) + 3:
        return _NONE
    return partial_interval(x, y, np.column_stack(others), **question.boot)


def _mean_of_layers(found: pd.DataFrame, name: str, question: _Question) -> dict[str, object]:
    """Average the rows of one predictor over layers."""
    used = found[found["spearman"].notna()]
    row, level = question.row("mean of layers", "", name), question.boot["level"]
    row |= {"n": int(used["n"].sum()), "n_layers": len(used)}
    row |= _ends("spearman", _mean(used["spearman"].to_numpy(), level))
    row |= _ends("pearson", _mean(found["pearson"].dropna().to_numpy(), level))
    row["r2"] = float(used["r2"].mean())
    if question.given:
        partial = found["partial"].dropna().to_numpy()
        row |= _ends("partial", _mean(partial, level))
    return row


def _mean(coefficients: Floats, level: float) -> Interval:
    """Mean with Student's t interval, cut at ±1."""
    n = len(coefficients)
    if n == 0:
        return _NONE
    mean = float(coefficients.mean())
    if n == 1:
        return Interval(mean, np.nan, np.nan)
    half = float(student.ppf(0.5 + level / 2, n - 1) * coefficients.std(ddof=1) / np.sqrt(n))
    return Interval(mean, max(mean - half, -1.0), min(mean + half, 1.0))


def _pooled(
    values: pd.DataFrame, layers: "pd.Series[str]", name: str, question: _Question
) -> dict[str, object]:
    """Correlate ranks, and standardised values, inside layers over all neurons."""
    used = [name, question.target, *(g for g in question.given if g != name)]
    pairs = values[used][values[[name, question.target]].notna().all(axis=1)]
    groups = pairs.groupby(layers[pairs.index])
    ranks = groups.rank(pct=True) - 0.5 / groups.transform("count")
    spread = groups.transform("std", ddof=0)
    linear = (pairs - groups.transform("mean")) / spread.where(spread > 0.0)
    row = question.row("pooled ranks", "", name)
    return row | _correlate(ranks, linear, name, question, n_layers=groups.ngroups)
