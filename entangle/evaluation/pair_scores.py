"""What the log-probabilities of minimal pairs amount to: accuracies with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from entangle.checks import bootstrap
from entangle.errors import InvalidInput
from entangle.evaluation.pairs import MinimalPairs
from entangle.seeding import numpy_rng
from entangle.stats.intervals import Interval, percentiles

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PairScores:
    """Log-probabilities that one model gives to the sentences of minimal pairs."""

    good: Floats
    """Summed log-probability of each acceptable sentence in nats, shape (n_pairs,)."""
    bad: Floats
    """Summed log-probability of each unacceptable sentence in nats, shape (n_pairs,)."""
    pairs: MinimalPairs
    """The pairs."""
    settings: Mapping[str, object]
    """How sentences were scored; JSON-serialisable."""

    def __post_init__(self) -> None:
        for name in ("good", "bad"):
            values = np.array(getattr(self, name), dtype=np.float64)
            if values.shape != (self.pairs.n_pairs,):
                raise InvalidInput(
                    f"`{name}` must have one value for each of {self.pairs.n_pairs} pairs; got "
                    f"shape {values.shape}."
                )
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the good sentence is the more probable one, shape (n_pairs,).

        False where both are equal and where one is NaN.
        """
        right: NDArray[np.bool_] = self.good > self.bad
        return right

    @property
    def accuracy(self) -> float:
        """Share of all pairs that are correct."""
        return float(self.correct.mean())

    @property
    def margins(self) -> Floats:
        """Log-probability of the good minus that of the bad sentence in nats, shape (n_pairs,)."""
        with np.errstate(invalid="ignore"):  # both impossible: NaN
            return self.good - self.bad

    @property
    def n_ties(self) -> int:
        """Pairs whose sentences are equally probable; they count as wrong."""
        return int(np.count_nonzero(self.good == self.bad))

    @property
    def flag(self) -> str:
        """``"nan"`` where a log-probability is NaN, else empty."""
        return "nan" if np.isnan([self.good, self.bad]).any() else ""

    def describe(self) -> dict[str, object]:
        """Return the pairs' description and how they were scored, JSON-serialisable."""
        return {"pairs": self.pairs.describe(), "scoring": dict(self.settings)}

    def table(self, *, level: float = 0.95, seed: int = 0, n_boot: int = 1000) -> pd.DataFrame:
        """Return one row a paradigm, then ``overall`` (all pairs) and ``macro``.

        Parameters
        ----------
        level
            Probability mass of the intervals, in (0, 1).
        seed, n_boot
            Of the bootstrap of ``macro``.

        Returns
        -------
        pandas.DataFrame
            Columns ``paradigm``, ``n_pairs``, ``n_ties``, ``accuracy``, ``low``, ``high``,
            ``mean_margin`` (nats). ``macro`` is the mean over paradigms. Intervals are Wilson's;
            that of ``macro`` is a percentile bootstrap over the pairs within each paradigm.

        Raises
        ------
        InvalidInput
            If an option is out of range.

        Notes
        -----
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
        """
        _check(n_boot, level)
        columns = {"n_ties": self.good == self.bad, "right": self.correct, "margin": self.margins}
        frame = pd.DataFrame({"paradigm": self.pairs.paradigms, **columns})
        groups = frame.groupby("paradigm", sort=False)
        rows = [_row(str(name), part, level) for name, part in groups]
        macro = {
            "paradigm": "macro",
            "n_pairs": len(frame),
            "n_ties": self.n_ties,
            **self._macro(n_boot=n_boot, seed=seed, level=level),
            "mean_margin": float(np.mean([row["mean_margin"] for row in rows])),
        }
        return pd.DataFrame([*rows, _row("overall", frame, level), macro])

    def _macro(self, *, n_boot: int, seed: int, level: float) -> dict[str, float]:
        strata = _strata(self.pairs, self.correct.astype(np.int64))
        rng = numpy_rng(seed, "macro accuracy")
        draws = [rng.binomial(len(p), p.mean(), size=n_boot) / len(p) for p in strata]
        low, high = percentiles(np.mean(draws, axis=0), level)
        return {"accuracy": float(np.mean([p.mean() for p in strata])), "low": low, "high": high}


def accuracy_difference(
    a: PairScores, b: PairScores, *, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the difference of two models' accuracies, a − b, with a paired bootstrap interval.

    Pairs are resampled with replacement within each paradigm, the same ones for both models.

    Parameters
    ----------
    a, b
        Scores of the same pairs; the accuracy is that over all pairs.
    n_boot
        Number of resamples.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Raises
    ------
    InvalidInput
        If the pairs differ or an option is out of range.

    Notes
    -----
    Only a pair's difference (−1, 0 or 1) matters, so that a resample of a paradigm is one draw of
    a multinomial distribution. Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13 (percentile interval).
    """
    _check(n_boot, level)
    if a.pairs.digest != b.pairs.digest:
        raise InvalidInput(
            "accuracies must be of the same pairs to be compared; got digests "
            f"{a.pairs.digest} and {b.pairs.digest}."
        )
    gaps = a.correct.astype(np.int64) - b.correct
    rng = numpy_rng(seed, "accuracy difference")
    total = np.zeros(n_boot)
    for part in _strata(a.pairs, gaps):
        shares = [np.mean(part == value) for value in (-1, 0, 1)]
        drawn = rng.multinomial(len(part), shares, size=n_boot)
        total += drawn[:, 2] - drawn[:, 0]
    low, high = percentiles(total / len(gaps), level)
    return Interval(float(gaps.mean()), low, high)


def _row(name: str, part: pd.DataFrame, level: float) -> dict[str, object]:
    right = int(part["right"].sum())
    interval = stats.binomtest(right, len(part)).proportion_ci(level, method="wilson")
    return {
        "paradigm": name,
        "n_pairs": len(part),
        "n_ties": int(part["n_ties"].sum()),
        "accuracy": right / len(part),
        "low": float(interval.low),
        "high": float(interval.high),
        "mean_margin": float(part["margin"].to_numpy().mean()),
    }


def _strata(pairs: MinimalPairs, values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the values of each paradigm's pairs."""
    paradigms = np.array(pairs.paradigms)
    return [values[paradigms == name] for name in pairs.counts]


def _check(n_boot: int, level: float) -> None:
    n_boot, level = bootstrap(n_boot, level)
