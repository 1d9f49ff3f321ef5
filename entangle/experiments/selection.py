"""Which neurons an ablation touches.

The neurons that a selection chooses from: a table of scores, checked and put in order.

Drawing a control that resembles a selection in one quantity.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from warnings import warn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.checks import choice, several, share, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.models.layers import Layer, list_layers
from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.runs.provenance import expand_user
from entangle.runs.reading import decoding, regular_file
from entangle.seeding import check_seed, numpy_rng

DERIVED: dict[str, tuple[str, Callable[..., "pd.Series[float]"]]] = {
    "variance": ("std", np.square),
    "abs_mean": ("mean", np.abs),
    "abs_skewness": ("skewness", np.abs),
}
"""Column that is computed from the scores → the column it comes from, and how."""


SCORED = (
    "block", "neuron", "wd", "wd_se", "wd_bound", "ks", "mean", "std", "skewness",
    "excess_kurtosis", "weight_norm", "md", "n_tokens",
)  # fmt: skip
"""Numeric columns that scores have."""


def in_module_order(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores sorted by block, layer and neuron, whatever the order of the rows.

    Raises
    ------
    InvalidInput
        If a column is missing, a neuron comes twice, or there is none.
    """
    missing = [name for name in ("layer", "block", "neuron", "flag") if name not in scores.columns]
    if missing:
        raise InvalidInput(
            f"`scores` must have the column {missing[0]!r}; pass the frame of NeuronScores."
        )
    if scores.empty:
        raise InvalidInput("`scores` must hold at least one neuron; got none.")
    table = scores.sort_values(["block", "layer", "neuron"], ignore_index=True)
    twice = table[table.duplicated(["layer", "neuron"])]
    if len(twice):
        raise InvalidInput(
            f"`scores` must hold a neuron once; got {twice['neuron'].iloc[0]} of layer "
            f"{twice['layer'].iloc[0]!r} again: pass the frame of one run."
        )
    return table


def column(table: pd.DataFrame, by: str) -> "pd.Series[float]":
    """Return a numeric or derived column; `UnknownName` if there is none of this name."""
    numeric = table.select_dtypes("number").columns.tolist()
    derived = [name for name, (source, _) in DERIVED.items() if source in numeric]
    known = [*numeric, *derived]
    by = choice("by", by, known, kind="column", remedy="Choose a numeric column.")
    if by in derived:
        source, function = DERIVED[by]
        return function(table[source])
    return table[by]


def rows_of(table: pd.DataFrame) -> dict[str, NDArray[np.int64]]:
    """Return the rows of every layer, in the order of the table."""
    groups = table.groupby("layer", sort=False)["neuron"]
    return {str(name): neurons.to_numpy(np.int64) for name, neurons in groups}


def union_rows(
    several: Iterable[Mapping[str, NDArray[np.int64]]],
) -> dict[str, NDArray[np.int64]]:
    """Return the rows that are in any of some selections, sorted, by layer name."""
    joined: dict[str, list[NDArray[np.int64]]] = {}
    for rows in several:
        for name, chosen in rows.items():
            joined.setdefault(name, []).append(chosen)
    return {name: np.unique(np.concatenate(parts)) for name, parts in joined.items()}


NEAREST = 5
"""How many of the nearest candidates a row is drawn from, so that seeds differ."""


def draw_nearest(
    targets: NDArray[np.float64], candidates: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw one candidate for every target, none twice, among the `NEAREST` left over.

    Parameters
    ----------
    targets
        Finite values to resemble, of shape (n_targets,).
    candidates
        Finite values to draw from, of shape (n_candidates,), at least ``n_targets`` of them.
    rng
        Decides in which order the targets are served, and which of the nearest each one gets.

    Returns
    -------
    NDArray
        For every target the position of its candidate, of shape (n_targets,).
    """
    left = np.argsort(candidates, kind="stable")
    drawn = np.empty(len(targets), np.int64)
    for target in rng.permutation(len(targets)):
        place = int(np.searchsorted(candidates[left], targets[target]))
        start = max(0, place - NEAREST)
        distances = np.abs(candidates[left[start : place + NEAREST]] - targets[target])
        nearest = np.argsort(distances, kind="stable")[:NEAREST] + start
        chosen = int(rng.choice(nearest))
        drawn[target] = left[chosen]
        left = np.delete(left, chosen)
    return drawn


def draw_alike(
    table: pd.DataFrame, rows: Mapping[str, NDArray[np.int64]], by: str, *, seed: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, float]]:
    """Draw for every row another one of its layer with a similar value.

    Parameters
    ----------
    table
        From `entangle.experiments.selection.in_module_order`.
    rows
        The rows to match.
    by
        Column of the values, compared on a log scale.
    seed
        Of the draw; every layer has its own stream.

    Returns
    -------
    tuple
        The rows drawn, and how close they came (see `Selection.likeness`).

    Raises
    ------
    UnknownName
        If the table does not hold a layer.
    InvalidInput
        If a layer has too few rows that can be drawn, or a row to match has no value.
    """
    known = list(dict.fromkeys(table["layer"]))
    table = table.assign(value=column(table, by))
    table = table[(table["flag"] == "") & (table["value"] > 0)]
    drawn: dict[str, NDArray[np.int64]] = {}
    ratios = []
    for name, wanted in rows.items():
        if name not in known:
            raise unknown_name("layer", name, known, "The scores hold no other layers.")
        part = table[table["layer"] == name]
        inside = part["neuron"].isin(wanted).to_numpy()
        if inside.sum() < len(wanted) or (~inside).sum() < len(wanted):
            raise InvalidInput(
                f"{len(wanted)} rows of layer {name!r} must be matched, but {inside.sum()} of them "
                f"and {(~inside).sum()} others have a {by} and no flag; select fewer."
            )
        logs = np.log(part["value"].to_numpy(np.float64))
        rng = numpy_rng(seed, "selection", "matched", by, name)
        places = np.flatnonzero(~inside)[draw_nearest(logs[inside], logs[~inside], rng)]
        drawn[name] = part["neuron"].to_numpy(np.int64)[places]
        ratios.append(logs[places] - logs[inside])
    ratio = np.concatenate(ratios)
    return drawn, {
        "median_abs_log_ratio": float(np.median(np.abs(ratio))),
        "max_abs_log_ratio": float(np.abs(ratio).max()),
        "median_log_ratio": float(np.median(ratio)),
    }


SELECTION_RULES = ("top", "bottom", "random", "random-norm", "random-variance", "all", "listed")
"""Names of the rules; `select` knows all of them but ``"listed"``."""
SCOPES = ("layer", "model")
"""Where rows are chosen: in every layer by itself, or from all layers together."""
ALIKE = {"random-norm": "weight_norm", "random-variance": "variance"}
"""Rule that draws rows like those of another selection → the column that is matched."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Some neurons of some layers, and the rule that chose them."""

    rule: str
    """One of `SELECTION_RULES`; ``matched`` for those that a search for equal perplexity found."""
    by: str | None
    """Column that was ranked or matched; None where the rule looks at none."""
    seed: int | None
    """Seed of a random rule, None for the others."""
    rows: Mapping[str, NDArray[np.int64]]
    """Full layer name → sorted, read-only row indices; layers without a row are absent."""
    likeness: Mapping[str, float] | None = None
    """How close a matched control came, over all its rows, with q = log(value of the drawn row /
    value of the row it stands for): ``median_abs_log_ratio`` (of \\|q\\|), ``max_abs_log_ratio``,
    and ``median_log_ratio`` (of q; not 0 if the drawn rows lie on one side)."""

    @property
    def match(self) -> Mapping[str, float] | None:
        """The former name of ``likeness``."""
        warn("Selection.match is Selection.likeness now", DeprecationWarning, 2)
        return self.likeness

    @property
    def n_rows(self) -> int:
        """Number of neurons in all layers together."""
        return sum(map(len, self.rows.values()))

    @property
    def name(self) -> str:
        """Short label, such as ``"top wd"`` or ``"random matched in weight norm"``."""
        column = (self.by or "").replace("_", " ")
        if self.rule in ALIKE:
            return f"random matched in {column}"
        if self.rule == "matched":
            return f"bottom {column} matched in perplexity"
        return f"{self.rule} {column}".strip()

    @property
    def frame(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron; `read_selection` reads it from a file."""
        names = [name for name, rows in self.rows.items() for _ in rows]
        neurons = np.concatenate(list(self.rows.values()))
        return pd.DataFrame({"layer": pd.Series(names, dtype="str"), "neuron": neurons})

    def describe(self) -> dict[str, object]:
        """Return what a manifest records, as JSON values: counts, and a SHA-256 of the rows."""
        text = "".join(f"{name}\t{self.rows[name].tolist()}\n" for name in sorted(self.rows))
        return {
            "name": self.name,
            "rule": self.rule,
            "by": self.by,
            "seed": self.seed,
            "n_rows": self.n_rows,
            "layers": {name: len(rows) for name, rows in self.rows.items()},
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "match": None if self.likeness is None else dict(self.likeness),
        }


def select(
    scores: pd.DataFrame,
    rule: str,
    *,
    by: str = "wd",
    fraction: float | int | None = None,
    count: int | None = None,
    scope: str = "layer",
    seed: int = 0,
    like: Selection | None = None,
) -> Selection:
    """Choose neurons by their scores, at random, or at random but like others.

    Parameters
    ----------
    scores
        The ``frame`` of `entangle.results.scores.NeuronScores`, rows in any order.
    rule
        ``"top"``, ``"bottom"``
            the largest or smallest values of ``by``; flagged rows cannot be chosen. Of equal
            values ``top`` takes the earlier neurons and ``bottom`` the later ones, so that the two
            never meet where both fit.
        ``"random"``
            any rows without a flag, which may be among the top ones as well (as in the paper). A
            larger draw with the same seed holds the smaller one.
        ``"random-norm"``, ``"random-variance"``
            for every row of ``like``, in random order, one of the five rows nearest to it in weight
            norm or output variance (on a log scale) in the same layer, of those not taken yet,
            without a flag and not in ``like``.
        ``"all"``
            every row of the scores, flagged ones too.
    by
        Numeric column for ``"top"`` and ``"bottom"``; also one of `DERIVED`.
    fraction, count
        How many, in (0, 1] of all neurons or as a number; exactly one of the two for ``"top"``,
        ``"bottom"`` and ``"random"``, none for the other rules. A fraction is rounded to whole
        neurons (halves to the even number), at least 1.
    scope
        ``"layer"`` chooses in every layer by itself, ``"model"`` from all layers together.
    seed
        For the random rules.
    like
        The selection that a matched rule resembles, row for row in every layer.

    Returns
    -------
    Selection

    Raises
    ------
    UnknownName
        If there is no such rule or column, or ``like`` names a layer that the scores do not hold.
    InvalidInput
        If a setting breaks a rule, or fewer rows can be chosen than are asked for.

    References
    ----------
    arXiv 2405.15756, figure 3 (top rows by WD against random rows and rows by other columns).
    """
    seed = check_seed(seed)
    fraction = None if fraction is None else share("fraction", fraction, zero=False)
    count = None if count is None else whole("count", count, least=1)
    _check_request(rule, fraction, count, scope, like)
    table = in_module_order(scores)
    if rule == "all":
        return _selection(rule, rows_of(table))
    if like is not None:
        rows, likeness = draw_alike(table, like.rows, ALIKE[rule], seed=seed)
        return _selection(rule, rows, by=ALIKE[rule], seed=seed, likeness=likeness)
    pools = [("the model", table)]
    if scope == "layer":
        pools = [(f"layer {name!r}", part) for name, part in table.groupby("layer", sort=False)]
    chosen = []
    for name, pool in pools:
        size = count if fraction is None else max(1, round(fraction * len(pool)))
        chosen.append(_choose(name, pool, rule, by, size=size or 0, seed=seed))
    rows = rows_of(pd.concat(chosen))
    if rule == "random":
        return _selection(rule, rows, seed=seed)
    return _selection(rule, rows, by=by)


def select_listed(rows: Mapping[str, Iterable[int]], scores: pd.DataFrame) -> Selection:
    """Select rows by name and number.

    Parameters
    ----------
    rows
        Full layer name → row indices in any order.
    scores
        The frame of the scores that hold these layers.

    Raises
    ------
    UnknownName
        If the scores do not hold a layer.
    InvalidInput
        If an index is listed twice or is no neuron of its layer, or nothing is listed.
    """
    known = rows_of(in_module_order(scores))
    checked: dict[str, NDArray[np.int64]] = {}
    for name, listed in rows.items():
        if name not in known:
            raise unknown_name("layer", name, known, "The scores hold no other layers.")
        given = several(f"rows[{name!r}]", listed, empty=True)
        indices = np.array([whole(f"rows[{name!r}]", i, least=0) for i in given], np.int64)
        outside = indices[~np.isin(indices, known[name])]
        if len(outside):
            raise InvalidInput(
                f"layer {name!r} has {len(known[name])} neurons in the scores, from "
                f"{known[name].min()} to {known[name].max()}; got {outside[0]}: list others."
            )
        values, counts = np.unique(indices, return_counts=True)
        if (counts > 1).any():
            raise InvalidInput(
                f"a neuron must be listed once; got {values[counts > 1][0]} of layer {name!r} "
                f"{counts.max()} times."
            )
        checked[name] = indices
    return _selection("listed", checked)


def read_selection(path: str | os.PathLike[str], scores: pd.DataFrame) -> Selection:
    """Select the rows listed in a ``.csv`` or ``.parquet`` file with columns layer and neuron.

    Other columns are ignored, so that an excerpt of the scores can be read.

    Raises
    ------
    Unavailable
        If there is no such file, or it may not be read.
    UnknownName, InvalidInput
        If its content cannot be read, it has other columns, or as `select_listed`.
    """
    readers: dict[str, Callable[..., pd.DataFrame]] = {
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
    }
    file = expand_user(path)
    if file.suffix.lower() not in readers:
        raise InvalidInput(f"a list of neurons must end in .csv or .parquet; got {str(path)!r}.")
    with decoding(regular_file(file), remedy="give a table with columns layer and neuron"):
        table = readers[file.suffix.lower()](file)
    missing = [name for name in ("layer", "neuron") if name not in table.columns]
    if missing:
        raise InvalidInput(f"{str(path)!r} must have the column {missing[0]!r}; add it.")
    layers = table["layer"].tolist()
    named = all(isinstance(one, str | int) for one in layers)
    if not pd.api.types.is_integer_dtype(table["neuron"]) or not named:
        raise InvalidInput(
            f"{str(path)!r} must hold a layer name and an integer neuron in every row; mend it."
        )
    rows = {str(name): part.tolist() for name, part in table.groupby("layer")["neuron"]}
    return select_listed(rows, scores)


def check_scores_fit(scores: NeuronScores, model: LanguageModel) -> None:
    """Check that scores are of this model: the same weights, layers and numbers of neurons.

    Raises
    ------
    UnknownName, InvalidInput
        If they are of another one, or their table holds other layers or neurons than the model.
    """
    described = scores.manifest.get("model")
    digest = str(described.get("digest")) if isinstance(described, dict) else "none"
    if model.digest != digest:
        raise InvalidInput(
            f"the model {model.name!r} has digest {model.digest[:12]}…, but the scores were made "
            f"from {digest[:12]}…; score this model, or pass the model that was scored."
        )
    sizes = {layer.name: layer.out_features for layer in list_layers(model.module)}
    for name, rows in rows_of(in_module_order(scores.frame)).items():
        if name not in sizes:
            raise unknown_name("layer", name, sizes, "Score the model anew.")
        if not np.array_equal(rows, np.arange(sizes[name])):
            raise InvalidInput(
                f"layer {name!r} has {sizes[name]} neurons, but the scores hold {len(rows)} from "
                f"{rows.min()} to {rows.max()}; score the model anew."
            )


def silent_layers(scores: NeuronScores) -> set[str]:
    """Return the layers without scores because they saw no token, or, as experts, too few."""
    settings = scores.manifest.get("settings")
    found = settings.get("layers_without_tokens") if isinstance(settings, dict) else None
    few = scores.frame.loc[scores.frame["flag"] == "few_tokens", "layer"]
    return {str(name) for name in [*(found or ()), *few]}


def heard(scores: NeuronScores) -> NeuronScores:
    """Return scores without the experts that saw too few tokens, which the settings then name."""
    silent = silent_layers(scores)
    few = [str(name) for name in scores.layers["layer"] if name in silent]
    if not few or len(few) == len(scores.layers):
        return scores
    frame, layers = (
        one[~one["layer"].isin(few)].reset_index(drop=True) for one in (scores.frame, scores.layers)
    )
    histograms = {name: one for name, one in scores.histograms.items() if name not in few}
    kept = replace(scores, frame=frame, layers=layers, histograms=histograms)
    return kept.with_settings(layers_with_few_tokens=few)


def scores_of(scores: NeuronScores, layers: Sequence[Layer], model: LanguageModel) -> NeuronScores:
    """Return the scores of some layers; refuse those of another model, or that lack a layer."""
    check_scores_fit(scores, model)
    names = [layer.name for layer in layers]
    for name in names:
        if name not in scores.histograms:
            raise unknown_name(
                "scored layer", name, scores.histograms,
                "Score it too, or ablate only the layers that were scored.",
            )  # fmt: skip
    return NeuronScores(
        frame=scores.frame[scores.frame["layer"].isin(names)].reset_index(drop=True),
        layers=scores.layers[scores.layers["layer"].isin(names)].reset_index(drop=True),
        histograms={name: scores.histograms[name] for name in names},
        manifest=scores.manifest,
    )


def _check_request(
    rule: str,
    fraction: float | None,
    count: int | None,
    scope: str,
    like: Selection | None,
) -> None:
    choice("rule", rule, SELECTION_RULES[:-1], remedy="Rows of your own: select_listed.")
    choice("scope", scope, SCOPES)
    if (like is not None) != (rule in ALIKE):
        raise InvalidInput(
            f"`like` must be the selection to match for {' and '.join(ALIKE)} and None for the "
            f"other rules; got {None if like is None else like.name!r} for {rule!r}."
        )
    wanted = 0 if rule == "all" or rule in ALIKE else 1
    if (fraction is not None) + (count is not None) != wanted:
        asked = "exactly one of" if wanted else "neither of"
        raise InvalidInput(
            f"rule {rule!r} takes {asked} `fraction` and `count`; got {fraction} and {count}."
        )


def _choose(
    name: str, pool: pd.DataFrame, rule: str, by: str, *, size: int, seed: int
) -> pd.DataFrame:
    """Choose ``size`` rows of one layer or of all; ``name`` says which."""
    few = int((pool["flag"] == "few_tokens").sum())
    pool = pool[pool["flag"] == ""]
    if rule != "random":
        pool = pool.assign(value=column(pool, by))
        pool = pool[pool["value"].notna()]
    if size > len(pool):
        valued = "" if rule == "random" else f" and with a {by}"
        more = f" ({few} more are of experts that saw few tokens: give more text)" if few else ""
        raise InvalidInput(
            f"a selection of {size} neurons does not fit {name}, which has {len(pool)} without a "
            f"flag{valued}{more}; lower `fraction` or `count`."
        )
    if rule == "random":
        return pool.iloc[numpy_rng(seed, "selection", rule, name).permutation(len(pool))[:size]]
    ranked = pool.sort_values("value", ascending=False, kind="stable")
    return ranked.head(size) if rule == "top" else ranked.tail(size)


def _selection(
    rule: str,
    rows: Mapping[str, NDArray[np.int64]],
    *,
    by: str | None = None,
    seed: int | None = None,
    likeness: Mapping[str, float] | None = None,
) -> Selection:
    """Sort and freeze the rows, and leave out layers without any."""
    kept = {name: np.sort(chosen).astype(np.int64) for name, chosen in rows.items() if len(chosen)}
    if not kept:
        raise InvalidInput(f"a selection must hold at least one neuron; got none by {rule!r}.")
    for chosen in kept.values():
        chosen.flags.writeable = False
    return Selection(rule, by, seed, kept, likeness)
