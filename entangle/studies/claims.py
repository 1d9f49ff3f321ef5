"""The claims: what each says, the paper's number, and how it is measured on a model.

A claim is one entry of `CLAIMS`. `register` adds one of another room: its function takes a
`Subject` and returns its numbers, made by `number`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr

from entangle.errors import InvalidInput
from entangle.experiments.predictors import PREDICTORS, partial_interval
from entangle.experiments.selection import column
from entangle.results.ablation import AblationResult
from entangle.results.comparison import UNIFORM, at_equal_nonzeros
from entangle.results.scores import NeuronScores
from entangle.stats.intervals import Interval, pairs_interval, share_interval, spearman_interval
from entangle.studies.estimates import less, over_layers, student_mean, welch
from entangle.studies.rules import CONTROL, MAIN, THRESHOLDS, Bar
from entangle.studies.subject import (
    ALIKE,
    FRACTION,
    GRAMMAR,
    OTHER,
    RANKED,
    STRENGTHS,
    Subject,
    losses,
)

CONTROLS = ("random", "bottom", *ALIKE)
"""Selections that the top rows are compared with, apart from the top ones by other columns."""

Floats = NDArray[np.float64]
Number = dict[str, object]


def number(
    name: str, found: Interval | float, *, n: int | None = None, unit: str = "", setting: str = ""
) -> Number:
    """Return one measured number of a claim.

    Parameters
    ----------
    name
        What was measured; the claim's table of bars says by it whether it decides.
    found
        With its interval of 95 %, or alone.
    n, unit
        How many of what the interval is over.
    setting
        In which it was measured, such as ``95 % zeros``; numbers of one name need different ones.

    Raises
    ------
    InvalidInput
        If the interval's lower end lies above its upper one.
    """
    ends = found if isinstance(found, Interval) else Interval(found, np.nan, np.nan)
    if ends.low > ends.high:
        raise InvalidInput(
            f"an interval must end where it is largest; that of {name!r} is [{ends.low}, "
            f"{ends.high}]."
        )
    return {
        "setting": setting, "number": name, "value": ends.value, "low": ends.low,
        "high": ends.high, "n": n, "unit": unit,
    }  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One claim of a paper."""

    id: str
    """A short name."""
    sentence: str
    """What is claimed."""
    paper: str
    """The paper's number, or that it gives none."""
    measure: Callable[[Subject], Sequence[Number]]
    """Measures it; raises an `entangle.errors.EntangleError` where the model cannot be asked."""
    bars: Mapping[str, Bar]
    """What decides, written down before it was measured."""
    needs: Sequence[str] = ("scores",)
    """Experiments of the `Subject` that it reads, with those that they need themselves: what
    ``--dry-run`` counts."""


CLAIMS: dict[str, Claim] = {}
"""By id, in the order of the page."""


def register(claim: Claim) -> Claim:
    """Add a claim to those of a study.

    Raises
    ------
    InvalidInput
        If there is one of this id, the id is no name of a file, or its bars do not decide: none is
        `MAIN`, or one is neither that nor `CONTROL`.
    """
    if claim.id in CLAIMS:
        raise InvalidInput(f"a claim must have an id of its own; {claim.id!r} is there.")
    if not re.fullmatch(r"[\w-]+", claim.id):
        raise InvalidInput(
            f"a claim's id must be of letters, digits, - and _, since files are called by it; got "
            f"{claim.id!r}."
        )
    roles = [bar.role for bar in claim.bars.values()]
    if MAIN not in roles or set(roles) - {MAIN, CONTROL}:
        raise InvalidInput(
            f"the bars of a claim must have the role {MAIN!r}, one at least, or {CONTROL!r}; those "
            f"of {claim.id!r} have {roles}."
        )
    CLAIMS[claim.id] = claim
    return claim


def _claim(
    id_: str, sentence: str, paper: str, *needs: str
) -> Callable[[Callable[[Subject], Sequence[Number]]], Callable[[Subject], Sequence[Number]]]:
    def made(measure: Callable[[Subject], Sequence[Number]]) -> Any:
        register(Claim(id_, sentence, paper, measure, THRESHOLDS[id_], needs or ("scores",)))
        return measure

    return made


@_claim(
    "non-gaussian",
    "In every layer some rows are far from Gaussian, and most are not.",
    "the top 3 % are called Wasserstein neurons (2405.15756); no distance in units of a floor",
)
def _non_gaussian(subject: Subject) -> list[Number]:
    floors = subject.scores.layers.set_index("layer")["null_floor_high"]
    edges, tails = [], []
    every = subject.scores.frame
    wide = every.groupby("layer")["neuron"].transform("size") * FRACTION >= 0.5
    known = every[wide].dropna(subset=["wd"])  # of a router's few rows none is a top 3 %
    for name, part in known.groupby("layer", sort=False):
        rows = part.sort_values("wd", ascending=False)
        floor = float(floors[str(name)])
        edges.append(_over(rows.iloc[max(1, round(FRACTION * len(rows))) - 1], floor))
        tails.append(_over(rows.iloc[0], float(rows["wd"].median())))
    if not edges:
        raise InvalidInput("no row of this model has a WD; its outputs are constant or not finite.")
    n = len(edges)
    least = (min(some, key=_lower_end) for some in (edges, tails))
    over: Any = {"n": subject.calibration.n_seq, "unit": "sequences, jackknife of groups"}
    medians = known.groupby("layer")["wd"].agg(["median", "max"])
    return [
        number("top 3 % / null floor, least layer", next(least), **over),
        number("largest / median row, least layer", next(least), **over),
        number("median WD, median layer (σ)", float(medians["median"].median()), n=n),
        number("largest WD, median layer (σ)", float(medians["max"].median()), n=n),
        number("largest WD (σ)", float(medians["max"].max()), n=n),
        number("layers without a WD", float(every.loc[wide, "layer"].nunique() - n)),
        number("layers of too few rows for 3 %", float(every.loc[~wide, "layer"].nunique())),
    ]


def _lower_end(one: Interval) -> float:
    return -np.inf if np.isnan(one.low) else one.low


def _over(row: "pd.Series[Any]", below: float) -> Interval:
    """Return a row's WD over something, with 1.96 jackknife errors and the method's own error."""
    half = 1.96 * float(row["wd_se"]) + float(row["wd_bound"])
    wd = float(row["wd"])
    return Interval(wd / below, (wd - half) / below, (wd + half) / below)


@_claim(
    "wd-md", "WD and mapping difficulty agree.", "“highly correlated”, no coefficient (2405.15756)"
)
def _wd_md(subject: Subject) -> list[Number]:
    known = subject.frame.dropna(subset=["wd", "md"])
    own = pd.Series(
        {name: part["wd"].corr(part["md"], "spearman") for name, part in known.groupby("layer")},
        dtype="float64",
    ).dropna()
    if own.empty:
        raise InvalidInput("no layer has rows of different WD and MD; measure more tokens.")
    mean, n = student_mean(np.asarray(own, np.float64)), len(own)
    return [
        number("Spearman, mean of layers", mean, n=n, unit="layers"),
        number("Spearman, mean of layers, is high", mean, n=n, unit="layers"),
        number("Spearman, lowest layer", float(own.min()), n=n),
        number("Spearman, highest layer", float(own.max()), n=n),
        number("layers without a coefficient", float(len(subject.layers) - n)),
    ]


@_claim(
    "pruning",
    "Pruning the top 3 % of the rows by WD costs more than pruning any other 3 %.",
    "more than random, mean, variance and weight (2405.15756, fig. 3, Llama-3-8B: no number)",
    "scores",
    "pruning",
)
def _pruning(subject: Subject) -> list[Number]:
    found, n, made = subject.pruning, subject.text.n_windows, []
    for strength in STRENGTHS:
        where: dict[str, Any] = {"setting": _zeros(strength), "n": n, "unit": "windows"}
        top = _arm(found, "top", strength, by="wd")
        others = {one: _arm(found, one, strength) for one in CONTROLS}
        others |= {by: _arm(found, "top", strength, by=by) for by in RANKED}
        made += [number(name, subject.ratio(top, one), **where) for name, one in others.items()]
        made += _against_dense(subject, found, strength, top, where)
    return made


def _against_dense(
    subject: Subject, found: AblationResult, strength: float, top: Floats, where: Mapping[str, Any]
) -> list[Number]:
    dense = losses(found.windows, selection="dense")
    rows = found.frame
    rows = rows[(rows["selection"] == "random") & (rows["strength"] == strength)]
    seeds = rows[rows["measure"] == "perplexity_ratio"]["value"]
    return [
        number("top rows / dense", subject.ratio(top, dense), **where),
        number("random rows / dense, least seed", float(seeds.min()), setting=where["setting"]),
        number("random rows / dense, largest seed", float(seeds.max()), setting=where["setting"]),
    ]


def _zeros(share: float) -> str:
    return f"{share:.0%} zeros".replace("%", " %")


def _arm(found: AblationResult, rule: str, strength: float = 1.0, **more: object) -> Floats:
    return losses(found.windows, selection=rule, strength=strength, **more)


@_claim(
    "experts",
    "Inside experts the gap between top and random rows closes; inside random clusters it does "
    "not.",
    "closes with the number of experts (2405.15756: no number, no random clusters)",
    "scores",
    "inside",
)
def _experts(subject: Subject) -> list[Number]:
    found, made = subject.inside, []
    gap = {
        (k, router): (
            _arm(found, "top", 0.95, experts=k, router=router),
            _arm(found, "random", 0.95, experts=k, router=router),
        )
        for k in subject.size.inside for router in ("kmeans", "random", "")
        if (k == 1) == (router == "")
    }  # fmt: skip
    top, random = gap[1, ""]
    first, last = Interval(np.nan, np.nan, np.nan), subject.size.inside[-1]
    for (k, router), (a, b) in gap.items():
        inside = f"{k} {'random ' if router == 'random' else ''}clusters"
        name = "gap in 1 expert" if k == 1 else f"gap in {inside}"
        first = subject.ratio(a, b)
        made.append(number(name, first, n=len(a), unit="windows"))
    (a, b), (c, d) = gap[last, "kmeans"], gap[last, "random"]
    closes, against = subject.ratio(top + b, random + a), subject.ratio(c + b, d + a)
    return [
        *made,
        number("gap in 1 expert / in clusters", closes, n=len(a), unit="windows"),
        number("gap in random clusters / in clusters", against, n=len(a), unit="windows"),
    ]


@_claim(
    "weighted-wd",
    "Inside clusters the WD of the top rows falls.",
    "for 98 %, by a median of 42 %; MD for 96 %, by 9 % (2405.15756; Pythia-1.4B, one layer)",
    "scores",
    "inside",
)
def _weighted_wd(subject: Subject) -> list[Number]:
    rows = subject.inside.neurons
    rows = rows[rows["experts"] == subject.size.inside[-1]]
    top = subject.chosen("top")[0].frame
    wide = [
        top.merge(rows[rows["router"] == router], on=["layer", "neuron"])
        .drop_duplicates(["layer", "neuron"]).set_index(["layer", "neuron"])
        for router in ("kmeans", "random")
    ]  # fmt: skip
    made = []
    for name in ("wd", "md"):
        falls = [(1 - one[f"weighted_{name}"] / one[name]).dropna() for one in wide]
        gaps = (falls[0] - falls[1]).dropna()
        label = "" if name == "wd" else " of MD"
        values = falls[0].to_numpy(np.float64)
        count = int((values > 0).sum())
        made += [
            number(f"median fall{label}", over_layers(falls[0], subject.seed), n=len(values),
                   unit="rows, layers resampled"),
            number(f"median fall beyond random clusters{label}", over_layers(gaps, subject.seed),
                   n=len(gaps), unit="rows, layers resampled"),
            number(f"share of rows that fall{label}", share_interval(count, max(len(values), 1)),
                   n=len(values), unit="rows"),
        ]  # fmt: skip
    return made


@_claim(
    "expansion",
    "Sparse Expansion beats SparseGPT, Wanda and magnitude at the same sparsity.",
    "lower perplexity at every sparsity shown (2405.15756; of larger models)",
    "comparison",
)
def _expansion(subject: Subject) -> list[Number]:
    found, k, made = subject.comparison, subject.size.expansion, []
    n = subject.text.n_windows
    for sparsity in subject.size.sparsities:
        where = f"{_zeros(sparsity)}, {k} experts"
        ours = losses(found.windows, method="expansion", sparsity=sparsity, experts=k)
        for name in ("sparsegpt", "wanda", "magnitude", "expansion-random"):
            experts = k if name == "expansion-random" else 1
            other = losses(found.windows, method=name, sparsity=sparsity, experts=experts)
            made.append(number(name, subject.ratio(other, ours), n=n, unit="windows",
                               setting=where))  # fmt: skip
        made.append(number("expansion / dense", subject.ratio(ours, losses(
            found.windows, method="dense")), n=n, unit="windows", setting=where))  # fmt: skip
    middle = subject.size.sparsities[len(subject.size.sparsities) // 2]
    plain = losses(found.windows, method="sparsegpt", sparsity=middle)
    for experts in subject.size.sweep:
        ours = losses(found.windows, method="expansion", sparsity=middle, experts=experts)
        where = f"{_zeros(middle)}, {experts} experts"
        made.append(number("sparsegpt, other numbers of experts", subject.ratio(plain, ours), n=n,
                           unit="windows", setting=where))  # fmt: skip
    equal = at_equal_nonzeros(found.frame)
    for row in equal[equal["method"] == "expansion"].itertuples():
        where = f"{_zeros(float(str(row.sparsity)))}, {row.experts} experts"
        made.append(number(f"{row.competitor} of as many non-zeros",
                           _turned(row.ratio).value, setting=where))  # fmt: skip
    return made


@_claim(
    "improvement",
    "WD predicts how much a row gains from experts (relative improvement).",
    "R² > 0.16 of WD, at most 0.001 of the number of modes (2405.15756; Pythia-1.4B)",
    "scores",
    "inside",
)
def _improvement(subject: Subject) -> list[Number]:
    rows = subject.inside.neurons
    rows = rows[(rows["experts"] == subject.size.inside[-1]) & (rows["router"] == "kmeans")]
    drawn = pd.concat([one.frame for one in subject.chosen("random")]).drop_duplicates()
    keys = ["layer", "neuron"]
    table = subject.frame.merge(drawn, on=keys).merge(rows[[*keys, "ri"]], on=keys)
    names = [name for name in PREDICTORS if name not in ("md", "gmm_components")]
    values = pd.DataFrame({name: column(table, name) for name in (*names, "ri")})
    values = values.loc[np.isfinite(values.to_numpy(np.float64)).all(axis=1)]
    layers = table["layer"][values.index]
    groups = values.groupby(layers)
    pooled = groups.rank(pct=True) - 0.5 / groups.transform("count")
    if len(pooled) < 10 or pooled["ri"].nunique() < 2:
        raise InvalidInput(f"a rank correlation needs at least 10 rows; got {len(pooled)}.")
    ranks = {name: pooled[name].to_numpy(np.float64) for name in pooled}
    boot: dict[str, Any] = {"n_boot": 500, "seed": subject.seed, "level": 0.95}
    others = np.column_stack([ranks["variance"], ranks["weight_norm"]])
    partial = partial_interval(ranks["wd"], ranks["ri"], others, **boot)
    plain = {name: spearman_interval(ranks[name], ranks["ri"], **boot) for name in names}
    inside = groups.transform(lambda one: (one - one.mean()) / one.std(ddof=0))
    n = len(values)
    return [
        number("WD, pooled ranks", plain.pop("wd"), n=n, unit="rows"),
        number("WD given variance and weight norm", partial, n=n, unit="rows"),
        number("R² of WD", float(inside["wd"].corr(inside["ri"]) ** 2), n=n),
        *(number(f"{name}, pooled ranks", one, n=n, unit="rows") for name, one in plain.items()),
    ]


@_claim(
    "clamp",
    "Clamping the negative pre-activations of the top 2 % of the rows by WD costs more than of "
    "other rows.",
    "perplexity doubles at 2 % (Llama-3.1-8B, Mistral-7B) or 5 % (Qwen3-8B); as many low-WD rows "
    "as 35, 50 and 20 % for the same (2509.24198)",
    "scores",
    "clamped",
)
def _clamp(subject: Subject) -> list[Number]:
    found = subject.clamped
    top, n = _arm(found, "top"), subject.text.n_windows
    made = [
        number(name, subject.ratio(top, _arm(found, name)), n=n, unit="windows")
        for name in CONTROLS
    ]
    dense = losses(found.windows, selection="dense")
    return [
        *made,
        number("top rows / dense", subject.ratio(top, dense), n=n, unit="windows"),
        number("share of low-WD rows for the same", subject.matched),
        _blocks(subject),
    ]


def _blocks(subject: Subject) -> Number:
    """Return the number of blocks whose pre-activations are known, of how many."""
    known, every = set(subject.gates), {one.block for one in subject.linears}
    found = {one.block for one in subject.linears if one.name in known}
    return number("blocks looked at", float(len(found)), n=len(every), unit="blocks")


@_claim(
    "syntax",
    "Negative pre-activations of high-WD rows carry grammar more than other knowledge.",
    "pairs about grammar suffer more than with as much harm to perplexity (2509.24198)",
    "scores",
    "clamped",
    "syntax",
)
def _syntax(subject: Subject) -> list[Number]:
    pairs = subject.syntax.pairs
    if pairs[["good", "bad"]].isna().to_numpy().any():
        raise InvalidInput("a sentence of the pairs has a probability that is no number.")
    right = {
        rule: pairs[pairs["selection"] == rule]
        .assign(right=lambda rows: (rows["good"] > rows["bad"]).astype(float))
        .groupby(["paradigm", "pair"], sort=True)["right"].mean()
        for rule in ("dense", "top", "bottom", "random")
    }  # fmt: skip
    made, gaps = [], {}
    for name, kind in (("grammar", GRAMMAR), ("other", OTHER)):
        part = {rule: one[one.index.get_level_values("paradigm").str.startswith(kind)]
                for rule, one in right.items()}  # fmt: skip
        if part["top"].empty:
            continue
        n, paradigms = len(part["top"]), part["top"].index.get_level_values("paradigm").to_numpy()
        for label, (a, b) in {
            "matched − top": ("bottom", "top"), "dense − top": ("dense", "top"),
            "random − top": ("random", "top"),
        }.items():  # fmt: skip
            gap = (part[a] - part[b]).to_numpy(np.float64)
            gaps[name, label] = pairs_interval(gap, paradigms, seed=subject.seed)
            made.append(number(f"{name}: {label}", gaps[name, label], n=n, unit="pairs"))
        made.append(number(f"{name}: accuracy, dense", float(part["dense"].mean()), n=n))
    if ("other", "matched − top") in gaps:
        both = less(gaps["grammar", "matched − top"], gaps["other", "matched − top"])
        made.append(number("grammar − other: double dissociation", both))
    made.append(number("share of low-WD rows that is matched", subject.matched))
    closest, top = (_arm(subject.clamped, one) for one in ("matched", "top"))
    made.append(number("perplexity, matched / top", subject.ratio(closest, top),
                       n=subject.text.n_windows, unit="windows"))  # fmt: skip
    return made


@_claim(
    "negative-side",
    "The WD of the top rows comes from negative outputs.",
    "no share given (2509.24198)",
)
def _negative_side(subject: Subject) -> list[Number]:
    scores, gates = subject.scores, subject.gates
    table = scores.frame[scores.frame["layer"].isin(gates)]
    top, *several = (one.frame for one in subject.chosen("top", "random", frame=table))
    drawn = pd.concat(several).drop_duplicates()
    known = table.set_index(["layer", "neuron"])
    shares = [
        pd.Series(
            [negative_share(scores, layer, neuron, known) for layer, neuron in rows],
            index=pd.MultiIndex.from_tuples(rows, names=["layer", "neuron"]), dtype="float64",
        ).dropna()
        for rows in ([(str(r.layer), int(str(r.neuron))) for r in one.itertuples()]
                     for one in (top, drawn))
    ]  # fmt: skip
    a, b = shares
    unit = "rows, layers resampled"
    return [
        number("median of the top rows", over_layers(a, subject.seed), n=len(a), unit=unit),
        number("median of the top rows − of all rows", over_layers(a, subject.seed, b),
               n=len(a) + len(b), unit=unit),
        number("median of random rows", over_layers(b, subject.seed), n=len(b), unit=unit),
        _blocks(subject),
    ]  # fmt: skip


def negative_share(
    scores: NeuronScores, layer: str, neuron: int, known: pd.DataFrame | None = None
) -> float:
    """Return the share of a row's WD that comes from negative outputs.

    WD is ∫ |F(z) − Φ(z)| dz over standardised outputs z; the share is that of the z at which the
    output itself is below 0, from the row's histogram. NaN for a row without WD.

    Parameters
    ----------
    scores
        That hold the row.
    layer, neuron
        Which.
    known
        The frame by layer and neuron, where many are asked for.
    """
    table = scores.frame.set_index(["layer", "neuron"]) if known is None else known
    row: Any = table.loc[(layer, neuron)]
    mean, std = float(row["mean"]), float(row["std"])
    if row["flag"] != "" or not std > 0:
        return float("nan")
    histogram = scores.histogram(layer, neuron)
    counts = histogram["count"].to_numpy(np.float64)
    edges = np.append(histogram["left"].to_numpy(np.float64), histogram["right"].iloc[-1])
    edges = (edges - mean) / std
    below = np.append(0.0, np.cumsum(counts) / counts.sum())
    zero = -mean / std
    grid = np.unique(np.concatenate([np.linspace(-8.0, 8.0, 801), edges, [zero]]))
    gap = np.abs(np.interp(grid, edges, below, left=0.0, right=1.0) - ndtr(grid))
    pieces = 0.5 * (gap[1:] + gap[:-1]) * np.diff(grid)
    return float(pieces[grid[1:] <= zero].sum() / pieces.sum())


@_claim(
    "single-neuron",
    "Pruning one top row costs more than pruning one other row.",
    "no number",
    "scores",
    "damage",
)
def _single_neuron(subject: Subject) -> list[Number]:
    rows = subject.damage
    own = {str(name): one.to_numpy(np.float64) for name, one in rows.groupby("group")["damage"]}
    made = [
        number(f"top − {name}", welch(own["top"], own[group]), n=len(own["top"]), unit="rows")
        for name, group in (("random", "random"), ("top variance", "variance"))
    ]
    means = {name: float(values.mean()) for name, values in own.items()}
    return [
        *made,
        *(number(f"mean rise of the loss, {name} (nats)", mean, n=len(own[name]))
          for name, mean in means.items()),
        *_drawn_from(subject),
    ]  # fmt: skip


def _drawn_from(subject: Subject) -> list[Number]:
    """Return how many experts of the blocks single rows are drawn from; those that have a WD."""
    every = [one.name for own in subject.damaged_layers for one in own if one.is_expert]
    known = subject.frame[subject.frame["flag"] == ""]["layer"].unique()
    told = float(np.isin(every, known).sum())
    return [number("experts drawn from", told, n=len(every), unit="experts")] if every else []


@_claim(
    "allocation",
    "Zeros put where WD is low cost less than zeros spread evenly.",
    "no number; not claimed there",
    "scores",
    "allocated",
)
def _allocation(subject: Subject) -> list[Number]:
    found, made = subject.allocated, []
    rows = found.frame[found.frame["allocation"] != UNIFORM]
    for row in rows[rows["method"] == "sparsegpt"].itertuples():
        turned = _turned(row.uniform_ratio, row.uniform_low, row.uniform_high)
        made.append(number(str(row.allocation), turned, n=subject.text.n_windows,
                           unit="windows", setting=_zeros(float(str(row.sparsity)))))  # fmt: skip
    return made


def _turned(ratio: object, low: object = np.nan, high: object = np.nan) -> Interval:
    """Return the interval of 1 / a ratio; infinite where it is 0, as of an infinite perplexity."""
    with np.errstate(divide="ignore"):
        value, *ends = 1 / np.array([ratio, high, low], np.float64)
    return Interval(float(value), *(float(one) for one in ends))
