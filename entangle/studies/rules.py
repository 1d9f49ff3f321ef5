"""When a claim holds, is weaker, or fails: one table, written down before anything was measured.

Every number that can decide has an interval of 95 % and a *bar*, which its lower end must lie
above. A number is the ``main`` comparison of its claim or a ``control``:

- **holds**: the interval of every main comparison and of every control lies above its bar;
- **weaker**: those of the main comparisons do, and a control does not, or was not measured;
- **fails**: a main comparison does not;
- **not measured**: no main comparison has an interval; the reason is kept.

A claim that is asked in several settings (90, 95 and 99 % of zeros) gets the worst of their
verdicts.

Many numbers are looked at, so some pass by chance. Each has a one-sided p-value, read off its own
interval (Altman and Bland, How to obtain the P value from a confidence interval, BMJ 343:d2304,
2011), and Holm's adjustment over all that can decide about one model. The verdict of the numbers
that pass by both, interval and adjusted p-value, stands beside the first one, and is never better.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from entangle.results.study import VERDICTS
from entangle.runs.tables import with_ends

HOLDS, WEAKER, FAILS, NOT_MEASURED = VERDICTS
YES, NO, UNKNOWN = "yes", "no", ""
"""Whether a number passes its bar."""
MAIN, CONTROL, SHOWN = "main", "control", "shown"
"""What a number does: decides whether a claim holds at all, whether it holds against controls, or
stands beside them."""
LEVEL = 0.95
ONE_SIDED = (1 - LEVEL) / 2
"""Adjusted p-values up to this pass, as the lower end of an interval of 95 % does."""


@dataclass(frozen=True)
class Bar:
    """One number that decides."""

    role: str
    """`MAIN` or `CONTROL`."""
    bar: float
    """What the lower end of its interval must lie above."""
    ratio: bool = False
    """Whether it is a ratio, so that its logarithm is what is roughly normal."""


def _ratios(main: str, *controls: str, bar: float = 1.0) -> dict[str, Bar]:
    """Return bars of ratios: above 1 against ``main``, and against every control."""
    return {main: Bar(MAIN, bar, True)} | {one: Bar(CONTROL, bar, True) for one in controls}


THRESHOLDS: Mapping[str, Mapping[str, Bar]] = {
    # In the layer where it is least so: the row at the edge of the top 3 % by WD, less 1.96
    # standard errors, over the null floor's upper quantile; and the largest WD over the median.
    "non-gaussian": {
        "top 3 % / null floor, least layer": Bar(MAIN, 1.0),
        "largest / median row, least layer": Bar(CONTROL, 2.0),
    },
    # "Highly correlated" without a coefficient: read as a mean over layers above 0.5.
    "wd-md": {
        "Spearman, mean of layers": Bar(MAIN, 0.0),
        "Spearman, mean of layers, is high": Bar(CONTROL, 0.5),
    },
    # Perplexity with the top rows by WD pruned / with other rows pruned, as many, as sparse.
    "pruning": _ratios(
        "random",
        "bottom",
        "random-norm",
        "random-variance",
        "variance",
        "excess_kurtosis",
        "abs_mean",
        "weight_norm",
    ),
    # gap = perplexity with top rows pruned / with random rows pruned.
    "experts": {
        "gap in 1 expert": Bar(MAIN, 1.0, True),
        "gap in 1 expert / in clusters": Bar(MAIN, 1.0, True),
        "gap in random clusters / in clusters": Bar(CONTROL, 1.0, True),
    },
    # Fall: 1 − weighted WD inside clusters / WD, of the top rows.
    "weighted-wd": {
        "median fall": Bar(MAIN, 0.0),
        "median fall beyond random clusters": Bar(CONTROL, 0.0),
    },
    # Perplexity of the other method / of the expansion, at the same sparsity.
    "expansion": _ratios("sparsegpt", "wanda", "magnitude", "expansion-random"),
    # Among random rows: rank correlation of WD with relative improvement.
    "improvement": {
        "WD, pooled ranks": Bar(MAIN, 0.0),
        "WD given variance and weight norm": Bar(CONTROL, 0.0),
    },
    # Perplexity with negative pre-activations of the top rows clamped / of other rows, as many.
    "clamp": _ratios("random", "bottom", "random-norm", "random-variance"),
    # Accuracy with low-WD rows clamped until perplexity is the same, minus with top rows clamped;
    # and that on pairs about grammar minus that on pairs about something else.
    "syntax": {
        "grammar: matched − top": Bar(MAIN, 0.0),
        "grammar − other: double dissociation": Bar(CONTROL, 0.0),
    },
    # Share of WD that comes from negative outputs.
    "negative-side": {
        "median of the top rows": Bar(MAIN, 0.5),
        "median of the top rows − of all rows": Bar(CONTROL, 0.0),
    },
    # Mean rise of the loss when one row is pruned, minus that of other rows.
    "single-neuron": {"top − random": Bar(MAIN, 0.0), "top − top variance": Bar(CONTROL, 0.0)},
    # Perplexity with even zeros / with zeros by WD, as many in total.
    "allocation": _ratios("layers by mean WD", "top 3 % protected"),
}
"""By the id of a claim: what decides about it. Other numbers of a claim are only shown. What other
rooms register (`entangle.studies.claims.register`) brings a table of its own."""


def p_value(value: float, low: float, high: float, bar: Bar) -> float:
    """Return the one-sided p-value of lying above a bar, from an interval of 95 %.

    NaN without an interval, or where it has no width.
    """
    ends = np.array([value, low, high, bar.bar], dtype=np.float64)
    if bar.ratio:
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.log(ends)
    width = ends[2] - ends[1]
    if not np.isfinite(ends).all() or width <= 0:
        return float("nan")
    return float(norm.sf((ends[0] - ends[3]) / (width / (2 * norm.ppf(1 - ONE_SIDED)))))


def holm(p: "pd.Series[float]") -> "pd.Series[float]":
    """Return p-values adjusted by Holm's method over those that are no NaN.

    Notes
    -----
    Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    known = p.dropna().sort_values(kind="stable")
    steps = np.arange(len(known), 0, -1)
    raised = np.maximum.accumulate(known.to_numpy() * steps).clip(0.0, 1.0)
    return pd.Series(raised, index=known.index, dtype="float64").reindex(p.index)


def decided(rows: pd.DataFrame, table: Mapping[str, Mapping[str, Bar]]) -> pd.DataFrame:
    """Return measured numbers with role, bar, p-value and whether they pass.

    Parameters
    ----------
    rows
        Numbers of one model: ``claim``, ``number``, ``value``, ``low``, ``high``.
    table
        Such as `THRESHOLDS`; numbers that it does not name are only shown.

    Returns
    -------
    pandas.DataFrame
        The rows with ``role``, ``bar`` (NaN where only shown), ``p``, ``p_holm`` (over all that can
        decide), ``passes`` and ``passes_holm`` (``yes``, ``no``, empty without an interval; the
        second is empty too where an interval that passes has no width, and so no p-value).
    """
    named = zip(rows["claim"].tolist(), rows["number"].tolist(), strict=True)
    bars = [table.get(claim, {}).get(number) for claim, number in named]
    ends = rows[["value", "low", "high"]].to_numpy(np.float64)
    pairs = zip(bars, ends.tolist(), strict=True)
    values = [np.nan if bar is None else p_value(a, b, c, bar) for bar, (a, b, c) in pairs]
    p = pd.Series(values, index=rows.index, dtype="float64")
    level = pd.Series([np.nan if b is None else b.bar for b in bars], rows.index, dtype="float64")
    known, adjusted = level.notna() & np.isfinite(ends[:, 1]), holm(p)
    above = rows["low"] > level
    return rows.assign(
        role=[SHOWN if bar is None else bar.role for bar in bars], bar=level, p=p, p_holm=adjusted,
        passes=_said(above, known),
        passes_holm=_said(above & (adjusted <= ONE_SIDED), known & (adjusted.notna() | ~above)),
    )  # fmt: skip


def _said(values: "pd.Series[bool]", known: "pd.Series[bool]") -> "pd.Series[str]":
    return values.map({True: YES, False: NO}).where(known, other=UNKNOWN)


def verdict(rows: pd.DataFrame, bars: Mapping[str, Bar], passes: str = "passes") -> str:
    """Return one of `VERDICTS` from the numbers of one model and claim, from `decided`.

    Parameters
    ----------
    rows
        ``setting``, ``number`` and the column ``passes``.
    bars
        Of the claim.
    passes
        ``passes`` or ``passes_holm``.
    """
    given = [_of_setting(part, bars, passes) for _, part in rows.groupby("setting", sort=False)]
    measured = [one for one in given if one != NOT_MEASURED]
    return max(measured, key=VERDICTS.index, default=NOT_MEASURED)


def _of_setting(rows: pd.DataFrame, bars: Mapping[str, Bar], passes: str) -> str:
    found = dict(zip(rows["number"], rows[passes], strict=True))
    said = {
        role: [found.get(name, UNKNOWN) for name, bar in bars.items() if bar.role == role]
        for role in (MAIN, CONTROL)
    }
    if not said[MAIN] or UNKNOWN in said[MAIN]:
        return NOT_MEASURED
    if NO in said[MAIN]:
        return FAILS
    return HOLDS if set(said[CONTROL]) <= {YES} else WEAKER


def judged(rows: pd.DataFrame, bars: Mapping[str, Bar], why: str = "") -> dict[str, object]:
    """Return what decided about a model and claim: verdicts, the number that lies lowest, and why.

    Parameters
    ----------
    rows
        The claim's numbers, from `decided`.
    bars
        Of the claim.
    why
        Why nothing was measured, where it is known.
    """
    said = verdict(rows, bars), verdict(rows, bars, "passes_holm")
    known = rows[(rows["role"] == MAIN) & (rows["passes"] != UNKNOWN)]
    gaps = [_gap(float(str(r.low)), bars[str(r.number)]) for r in known.itertuples()]
    head = known.iloc[int(np.argmin(gaps))] if gaps else None
    lacking = [name for name in bars if name not in set(rows["number"])]
    open_to = rows[(rows["role"] != SHOWN) & (rows["passes"] == UNKNOWN)]
    lacking += [at(row) for row in open_to.to_dict("records")]
    if said[0] != NOT_MEASURED:
        why = f"not measured: {', '.join(lacking)}" if lacking else ""
    elif not why:
        why = "no interval: measure more windows, sequences, layers, rows or pairs"
    lost = rows[(rows["role"] == CONTROL) & (rows["passes"] == NO)]
    ends = {name: float(head[name]) if head is not None else np.nan
            for name in ("value", "low", "high")}  # fmt: skip
    return {
        "verdict": said[0], "verdict_holm": said[1],
        "setting": "" if head is None else head["setting"],
        "number": "" if head is None else head["number"], **ends,
        "lost": "; ".join(_lost(row) for row in lost.to_dict("records")), "why": why,
    }  # fmt: skip


def at(row: Mapping[Any, Any]) -> str:
    """Return a number's name with its setting."""
    return f"{row['number']} at {row['setting']}" if row["setting"] else str(row["number"])


def _lost(row: Mapping[Any, Any]) -> str:
    return f"{at(row)}: {with_ends(row['value'], row['low'], row['high'])}"


def _gap(low: float, bar: Bar) -> float:
    return float(np.log(max(low, 1e-300) / bar.bar)) if bar.ratio else low - bar.bar
