"""`diff`: compare two runs of scores neuron by neuron.

Which layers are one and the same, how far the rankings agree, and what moved beyond its error.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.checks import bootstrap, choice, several, share
from entangle.errors import InvalidInput
from entangle.results.base import settings_of
from entangle.results.difference import DIFFERS, KIND, UNTESTED, WHOLE, Difference
from entangle.results.scores import NeuronScores, load_scores
from entangle.runs.differing import causes, what_differs
from entangle.runs.progress import ProgressBar
from entangle.runs.provenance import RunClock, make_manifest
from entangle.runs.tables import described
from entangle.seeding import check_seed
from entangle.stats.agreement import rank_agreement
from entangle.stats.intervals import Interval, jackknife

TOPS = (0.01, 0.03, 0.1)
"""Shares of the neurons that are compared as top sets."""

_LOG = logging.getLogger(__name__)


def diff(
    a: NeuronScores | str | os.PathLike[str],
    b: NeuronScores | str | os.PathLike[str],
    *,
    by: str = "wd",
    fdr: float = 0.05,
    tops: float | Iterable[float] = TOPS,
    n_boot: int = 500,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Difference:
    """Compare two runs of scores: of two models, checkpoints, texts, dtypes or seeds.

    Neurons are matched by layer and index: layers by their full names or, where the runs have no
    name in common, by block and projection. Layers that only one run has, or that have other
    numbers of neurons, are left out and named in `Difference.notes`.

    Parameters
    ----------
    a, b
        Scores, or the folders of saved ones.
    by
        Numeric column of the scores. Only ``wd`` has standard errors: of other columns nothing is
        tested, ranks are compared.
    fdr
        Share in (0, 1) of false ones that is allowed among the neurons that are said to have moved.
    tops
        Shares in (0, 1] of the neurons whose sets are compared.
    n_boot, level, seed
        Of the bootstrap intervals of rank agreement, over neurons.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If there is no such column, an option is out of range, a folder holds no scores, or no
        layer is in both.

    Notes
    -----
    Standard errors are jackknives over as many groups of sequences as ``n_groups`` in the settings
    says. Where both runs read the same tokens in the same groups, what the tokens do to both
    cancels: a change is tested by its own jackknife, of the differences of both WDs without each
    group, with Student's t (``paired``). Else the errors of both add up as of independent texts,
    with Welch's t (``unpaired``): too cautious on the same tokens by two methods, or in results of
    versions that kept no WD without a group. Before, what the method, rounding and the difference
    of the null floors can do is taken off; where neither run tells a neuron from a Gaussian it did
    not move. p-values of all neurons are adjusted by Benjamini and Hochberg, 1995. Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11 (jackknife).
    """
    clock = RunClock()
    fdr, seed = share("fdr", fdr, zero=False, one=False), check_seed(seed)
    n_boot, level = bootstrap(n_boot, level)
    tops = [share("tops", one, zero=False) for one in several("tops", tops, float, int)]
    first, second = (one if isinstance(one, NeuronScores) else load_scores(one) for one in (a, b))
    by = _column(first, second, by)
    matched, notes = match_layers(first.layers, second.layers)
    matched["errors"] = [
        _errors(first, second, one["layer"], one["layer_b"]) if by == "wd" else UNTESTED
        for one in matched.to_dict("records")
    ]
    frame = _frame(first, second, matched, by)
    _judge(frame, fdr)
    options = {"n_boot": n_boot, "level": level, "seed": seed}
    with ProgressBar("rank agreement", enabled=progress) as bar:
        agreement = _agreement(frame, matched, bar, tops=tops, noisy=by == "wd", **options)
    differs = what_differs(first.manifest, second.manifest)
    notes = [*_notes(first, second, frame, matched, by), *notes]
    for note in notes:
        _LOG.warning("%s", note)
    names = dict.fromkeys(described(one.manifest, "model", "name") for one in (first, second))
    manifest = make_manifest(
        KIND,
        model={"name": " and ".join(names)},
        a={"source": _source(a), **first.manifest},
        b={"source": _source(b), **second.manifest},
        settings={
            "by": by, "fdr": fdr, "tops": tops, "n_boot": n_boot, "level": level, "seed": seed,
            "causes": causes(differs), "matched": str(matched["how"].iloc[0]),
        },
        notes=notes,
        **clock.read(),
    )  # fmt: skip
    table = pd.DataFrame([asdict(one) for one in differs], columns=list(DIFFERS)).astype("str")
    return Difference(frame, agreement, table, manifest)


def _source(given: object) -> str | None:
    return None if isinstance(given, NeuronScores) else str(given)


def _column(a: NeuronScores, b: NeuronScores, by: str) -> str:
    numeric = [set(one.frame.select_dtypes("number").columns) for one in (a, b)]
    known = [name for name in a.frame.columns if name in numeric[0] & numeric[1]]
    both = [name for name in known if name not in ("block", "neuron", "n_tokens")]
    return choice("by", by, both, kind="column", remedy="Choose a numeric column of both runs.")


def match_layers(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Match the layers of two runs.

    Parameters
    ----------
    a, b
        `NeuronScores.layers` of both.

    Returns
    -------
    tuple
        One row a pair: layer, layer_b, how (``name`` or ``block and projection``), block,
        projection, n_neurons, and of both runs null_floor, null_floor_high and split_half with the
        endings ``_a`` and ``_b``; and sentences on what was left out.

    Raises
    ------
    InvalidInput
        If no layer is in both with the same number of neurons.
    """
    kept = ["layer", "block", "projection", "n_neurons", "null_floor", "null_floor_high",
            "split_half"]  # fmt: skip
    a, b, how, keys = a[kept], b[kept], "name", ["layer"]
    if not set(a["layer"]) & set(b["layer"]):
        how, keys = "block and projection", ["block", "projection"]
        a, b = (one[~one.duplicated(keys, keep=False)] for one in (a, b))
    pairs = a.merge(b, on=keys, suffixes=("_a", "_b"), sort=False)
    for name in ("layer", "block", "projection"):
        if name not in pairs:
            pairs[name] = pairs[f"{name}_a"]
    pairs["layer_b"], pairs["how"] = pairs.get("layer_b", pairs["layer"]), how
    if pairs.empty:
        raise InvalidInput(
            "the two runs must have a layer in common, by full name or by block and projection; "
            f"got {a['layer'].iloc[0]!r} … and {b['layer'].iloc[0]!r} …; score the same layers."
        )
    unlike = pairs["n_neurons_a"] != pairs["n_neurons_b"]
    same = pairs[~unlike].rename(columns={"n_neurons_a": "n_neurons"}).reset_index(drop=True)
    if same.empty:
        one = pairs.iloc[0]
        raise InvalidInput(
            f"the layers of both runs must have the same numbers of neurons; got {one['layer']!r} "
            f"with {one['n_neurons_a']} and {one['n_neurons_b']}: their neurons have nothing but "
            "the index in common; compare models of one shape."
        )
    left = [
        ("layer(s) of A only", a.loc[~a["layer"].isin(pairs["layer"]), "layer"]),
        ("layer(s) of B only", b.loc[~b["layer"].isin(pairs["layer_b"]), "layer"]),
        ("layer(s) with other numbers of neurons", pairs.loc[unlike, "layer"]),
    ]
    notes = [
        f"{len(names):,} {what} left out: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}."
        for what, names in left
        if len(names)
    ]
    if how != "name":
        notes.insert(
            0, "The runs have no layer name in common: layers are matched by block and projection."
        )
    return same, notes


def _rows(scores: NeuronScores, names: Sequence[str]) -> pd.DataFrame:
    """Return the rows of some layers, in this order."""
    place = {name: number for number, name in enumerate(names)}
    rows = scores.frame[scores.frame["layer"].isin(names)]
    return rows.iloc[rows["layer"].map(place).argsort(kind="stable")].reset_index(drop=True)


def _frame(a: NeuronScores, b: NeuronScores, matched: pd.DataFrame, by: str) -> pd.DataFrame:
    """Return the table of neurons, without the verdicts."""
    rows = [_rows(a, matched["layer"].tolist()), _rows(b, matched["layer_b"].tolist())]
    frame = rows[0][["layer", "block", "projection", "neuron"]].copy()
    frame.insert(3, "layer_b", rows[1]["layer"])
    for side, one in zip("ab", rows, strict=True):
        frame[side] = one[by].astype("float64")
    for side, one in zip("ab", rows, strict=True):
        frame[f"{side}_se"] = one["wd_se"] if by == "wd" else np.nan
    frame["change"] = frame["b"] - frame["a"]
    freedom = _changes_errors(frame, a, b, matched)
    floors = matched.loc[matched.index.repeat(matched["n_neurons"])].reset_index(drop=True)
    frame["margin"] = np.nan
    if by == "wd":
        apart = (floors["null_floor_a"] - floors["null_floor_b"]).abs().fillna(0.0)
        frame["margin"] = rows[0]["wd_bound"] + rows[1]["wd_bound"] + apart
    frame["t"], frame["p"] = _tested(frame, freedom)
    gaussian = (frame["a"] <= floors["null_floor_high_a"]) & (
        frame["b"] <= floors["null_floor_high_b"]
    )
    frame.loc[gaussian & frame["p"].notna() & (by == "wd"), "p"] = 1.0
    for side in "ab":
        ranks = frame.groupby("layer", sort=False)[side].rank(ascending=False, method="min")
        frame[f"rank_{side}"] = ranks.astype("Int64")
    flags = [one["flag"].where(one["flag"] == "", one["flag"] + f" in {side}")
             for side, one in zip("AB", rows, strict=True)]  # fmt: skip
    frame["flag"] = (flags[0] + ", " + flags[1]).str.strip(", ")
    return frame


def _same_tokens(a: NeuronScores, b: NeuronScores) -> bool:
    digests = [described(one.manifest, "calibration", "digest") for one in (a, b)]
    return digests[0] == digests[1] != "?"


def _without(scores: NeuronScores, layer: str) -> NDArray[np.float64] | None:
    """Return WD without each group of sequences, (groups, neurons), of groups that have tokens."""
    found = scores.histograms[layer].wd_without
    return None if found is None else found.astype(np.float64)


def _errors(a: NeuronScores, b: NeuronScores, layer: str, layer_b: str) -> str:
    """Return whether a layer's errors are ``paired``: of the same tokens, in the same groups."""
    first, second = _without(a, layer), _without(b, layer_b)
    if not _same_tokens(a, b) or first is None or second is None:
        return "unpaired"
    alike = first.shape == second.shape and np.array_equal(_filled(first), _filled(second))
    return "paired" if alike and _filled(first).sum() > 1 else "unpaired"


def _filled(without: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which groups have tokens."""
    return np.logical_not(np.isnan(without).all(1))


def _changes_errors(
    frame: pd.DataFrame, a: NeuronScores, b: NeuronScores, matched: pd.DataFrame
) -> NDArray[np.float64]:
    """Add the standard errors of the changes; return their degrees of freedom."""
    counts = [_groups(one) for one in (a, b)]
    each = frame[["a_se", "b_se"]].to_numpy(np.float64).T
    error = np.hypot(*each)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = sum(one**4 / (count - 1) for one, count in zip(each, counts, strict=True))
        freedom = np.where(error > 0.0, error**4 / parts, min(counts) - 1)
    ends = matched["n_neurons"].cumsum().tolist()
    for start, end, one in zip([0, *ends], ends, matched.to_dict("records"), strict=False):
        first, second = _without(a, one["layer"]), _without(b, one["layer_b"])
        if one["errors"] != "paired" or first is None or second is None:
            continue
        here = slice(start, end)
        filled = _filled(first)
        error[here] = np.where(np.isnan(error[here]), np.nan, jackknife((second - first)[filled]))
        freedom[here] = np.where(np.isnan(error[here]), np.nan, filled.sum() - 1)
    frame["change_se"] = error
    return freedom


def _groups(scores: NeuronScores) -> float:
    found = settings_of(scores.manifest).get("n_groups")
    return float(found) if isinstance(found, int) and found > 1 else np.nan


def _tested(
    frame: pd.DataFrame, freedom: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return t beyond the margin and its two-sided p; NaN without standard errors."""
    from scipy.special import stdtr  # not by those who only read results

    change, margin, error = (
        frame[name].to_numpy(np.float64) for name in ("change", "margin", "change_se")
    )
    beyond = np.sign(change) * np.maximum(np.abs(change) - margin, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(beyond == 0.0, 0.0 * error, beyond / error)
    t = np.where(np.isnan(freedom), np.nan, t)
    return t, np.where(np.isnan(t), np.nan, 2.0 * stdtr(freedom, -np.abs(t)))


def _judge(frame: pd.DataFrame, fdr: float) -> None:
    """Add the adjusted p-values and who moved."""
    from scipy.stats import false_discovery_control

    known = frame["p"].notna().to_numpy()
    adjusted = np.full(len(frame), np.nan)
    if known.any():
        adjusted[known] = false_discovery_control(frame["p"].to_numpy(np.float64)[known])
    way = np.where(frame["change"] > 0, "up", "down")
    moved = np.where(adjusted <= fdr, way, np.where(known, "no", UNTESTED))
    place = list(frame.columns).index("p") + 1
    frame.insert(place, "p_adjusted", adjusted)
    frame.insert(place + 1, "moved", pd.Series(moved, dtype="str"))


def _agreement(
    frame: pd.DataFrame,
    matched: pd.DataFrame,
    bar: ProgressBar,
    *,
    tops: Sequence[float],
    noisy: bool,
    **options: Any,
) -> pd.DataFrame:
    """Return the table of agreement; ``options`` are of the bootstrap."""
    parts = {str(name): rows for name, rows in frame.groupby("layer", sort=False)}
    rows = []
    bar.start(len(matched) + (len(matched) > 1), "layers")
    for one in matched.to_dict("records"):
        row = _agreeing(parts[one["layer"]], tops, **options)
        ceiling = _ceiling(one["split_half_a"], one["split_half_b"]) if noisy else np.nan
        place = {name: one[name] for name in ("layer", "block", "projection")}
        rows.append({**place, **row, "ceiling": ceiling, "errors": one["errors"]})
        bar.advance()
    if len(rows) > 1:
        nowhere = {"layer": WHOLE, "block": pd.NA, "projection": WHOLE}
        kinds = set(matched["errors"])
        found = {"ceiling": np.nan, "errors": kinds.pop() if len(kinds) == 1 else "mixed"}
        rows.append({**nowhere, **_agreeing(frame, tops, **options), **found})
        bar.advance()
    return pd.DataFrame(rows).astype({"block": "Int64", "layer": "str", "projection": "str"})


def _agreeing(frame: pd.DataFrame, tops: Sequence[float], **options: Any) -> dict[str, object]:
    both = frame[np.isfinite(frame["a"]) & np.isfinite(frame["b"])]
    a, b = (both[side].to_numpy(np.float64) for side in "ab")
    found = rank_agreement(a, b, tops=tops, **options)
    counts = frame["moved"].value_counts()
    named = {"spearman": found.spearman, "kendall": found.kendall}
    named |= {f"top_{100 * top:g}": one for top, one in found.overlaps.items()}
    return {
        "neurons": len(frame), "compared": len(both),
        "tested": len(frame) - int(counts.get(UNTESTED, 0)),
        "up": int(counts.get("up", 0)), "down": int(counts.get("down", 0)),
        "median_change": float(np.median(b - a)) if len(both) else np.nan,
        **{key: value for name, one in named.items() for key, value in _spread(name, one)},
    }  # fmt: skip


def _spread(name: str, found: Interval) -> list[tuple[str, float]]:
    return [(name, found.value), (f"{name}_low", found.low), (f"{name}_high", found.high)]


def _ceiling(a: float, b: float) -> float:
    """Return √(r_A r_B) of the reliabilities by Spearman and Brown, from the halves' correlations.

    Spearman, The Proof and Measurement of Association between Two Things, 1904.
    """
    if not min(a, b) > 0.0:
        return np.nan
    return float(np.sqrt(2 * a / (1 + a) * 2 * b / (1 + b)))


def _notes(
    a: NeuronScores, b: NeuronScores, frame: pd.DataFrame, matched: pd.DataFrame, by: str
) -> list[str]:
    """Return what a reader has to know before the numbers."""
    found = causes(what_differs(a.manifest, b.manifest))
    notes, equal = [], frame["a"].equals(frame["b"])
    if not found:
        notes.append(
            "Both runs are of the same model, text and settings"
            + (", and their scores are equal." if equal else ", and yet their scores differ.")
        )
    if len(found) > 1:
        notes.append(
            f"The runs differ in {len(found)} things at once ({', '.join(found)}): a change may "
            "come from any of them."
        )
    if "model" in found:
        notes.append(
            "The models have other weights: neuron i of A is neuron i of B only if one was made "
            "from the other."
        )
    unpaired = int((matched["errors"] == "unpaired").sum())
    if unpaired and _same_tokens(a, b) and not equal:
        notes.append(
            f"Both runs read the same tokens, but the errors of {unpaired:,} of {len(matched):,} "
            "layers are unpaired, so that the test of what moved is too cautious there: they were "
            "scored by two methods, or by a version that kept no WD without a group of sequences. "
            "Score both anew by one method."
        )
    if by != "wd":
        notes.append(f"{by} has no standard errors: nothing is said of which neurons moved.")
    return notes
