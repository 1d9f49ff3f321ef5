"""The arms of an ablation as a figure needs them: which, in what units, and what to call them."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from entangle.checks import choice, plain_value
from entangle.errors import InvalidInput
from entangle.plotting.options import choosing, picked
from entangle.plotting.style import (
    KNOWN_TEXTS,
    called,
)
from entangle.plotting.summaries import check_columns, not_held

MEASURE_LABELS: dict[str, str] = {
    "perplexity": "perplexity per token",
    "perplexity_ratio": "perplexity (× dense)",
    "kl": "KL from dense (nats per token)",
    "top1_agreement": "top-1 agreement with dense (%)",
    "accuracy": "accuracy on minimal pairs (%)",
    "accuracy_difference": "accuracy − dense (% points)",
}
"""Measures that can be drawn; those of one paradigm, ``"accuracy:PARADIGM"``, can be too."""

LOG_MEASURES = ("perplexity", "perplexity_ratio", "kl")
"""Measures that may be drawn on a log scale; all others are shares, drawn in %."""

_PARADIGM = "accuracy:"
_PRUNED = {
    "prune": "SparseGPT",
    "prune-wanda": "Wanda",
    "prune-magnitude": "Magnitude pruning",
    "prune-random": "Random pruning",
}
_TITLES = {
    **_PRUNED,
    "zero": "Outputs set to 0",
    "mean": "Outputs set to their mean",
    "clamp-negative": "Negative outputs set to 0",
    "clamp-positive": "Positive outputs set to 0",
    "flip-negative": "Negative outputs change sign",
}
_INTERVALS = {
    "perplexity_ratio": "95 % paired bootstrap over windows",
    "accuracy": "95 % Wilson",
    "accuracy_difference": "95 % paired bootstrap over pairs",
}
RANDOM_CLUSTERS = ", random clusters"
_COLUMN_NAMES = {"wd": "WD", "md": "MD", "ks": "KS", "abs_mean": "|mean|"}
_COLUMN_NAMES |= {"abs_skewness": "|skewness|"}
_ARM = ("intervention", "strength", "experts", "selection", "by", "seed")
_NEEDED = ("model", "layers", *_ARM, "measure", "value", "low", "high", "n_rows")
_WRITER = "the command `entangle ablate` writes such tables."
SEEDS = "random: median of the seeds, a dot each, a bar over all intervals"


@dataclass(frozen=True)
class Arms:
    """The arms of one measure."""

    measure: str
    """What was measured."""
    rows: pd.DataFrame
    """Arms with a finite value: ``value``, ``low`` and ``high`` in the units of the axis, and their
    ``series``."""
    lost: pd.DataFrame
    """Arms without one."""
    dense: float | None
    """The dense model's value, in the units of the axis; None where the table has none."""
    perplexity: float | None
    """The dense model's perplexity, likewise."""

    @property
    def label(self) -> str:
        """The measure with its unit."""
        paradigm = self.measure.removeprefix(_PARADIGM)
        return MEASURE_LABELS.get(self.measure, f"accuracy on {paradigm} (%)")

    def where(self, **wanted: str | float | int | None) -> "Arms":
        """Return the arms with these values in these columns; None takes all."""
        kept = self
        for column, given in wanted.items():
            if given is not None:
                value, table = plain_value(given), pd.concat([kept.rows, kept.lost])
                known = sorted(table[column].unique().tolist())
                if value not in known:
                    raise not_held(column, value, known, "frame")
                rows, lost = (table[table[column] == value] for table in (kept.rows, kept.lost))
                kept = replace(kept, rows=rows, lost=lost)
        return kept.checked()

    def checked(self) -> "Arms":
        """Return these; raise `InvalidInput` if there are none."""
        if len(self.rows):
            return self
        raise InvalidInput(
            f"`frame` must hold at least 1 arm with a finite {self.measure}; got {len(self.lost)} "
            f"arms, none finite; {_WRITER}"
        )

    def levels(self, column: str) -> list[float]:
        """Return the values of a numeric column, sorted."""
        return sorted(map(float, self.rows[column].unique()))

    def series(self) -> dict[str, tuple[str, str]]:
        """Return the rule and column of every series by its name, in the table's order."""
        keys = self.rows[["series", "selection", "by"]].drop_duplicates("series")
        return {series: (rule, by) for series, rule, by in keys.to_numpy().tolist()}

    def labels(self) -> dict[str, str]:
        """Return what a legend calls each series: name, seeds, and n if it is not the usual one."""
        labels = {}
        for series, rows in self.rows.groupby("series", sort=False):
            seeds = rows["seed"].nunique()
            said = [f"{seeds} seeds"] if seeds > 1 else []
            low, high = int(rows["n_rows"].min()), int(rows["n_rows"].max())
            if not low == high == self._usual_n:
                said.append(f"n = {low:,}" + (f"–{high:,}" if high > low else ""))
            labels[str(series)] = f"{series} ({', '.join(said)})" if said else str(series)
        return labels

    def notes(self, text: str | None) -> list[str]:
        """Return what a legend says in words: model, text, neurons, bars, what is left out."""
        seeded = self.rows.groupby("series")["seed"].nunique().gt(1).any()
        lost = self.lost.groupby("series", sort=False).size()
        listed = ", ".join(f"{count} of {series}" for series, count in lost.items())
        asked = self.measure.startswith("perplexity") and self.perplexity is not None
        bare = int((~np.isfinite(self.rows[["low", "high"]].to_numpy())).any(axis=1).sum())
        clauses = (
            f"model {called(str(self.rows['model'].iloc[0]))}",
            f"evaluated on {called(text, KNOWN_TEXTS)}" if text else "",
            self._neurons(),
            f"dense perplexity {self.perplexity:.4g}" if asked else "",
            f"bars: {_INTERVALS.get(self._kind, '95 % bootstrap over windows')}",
            SEEDS if seeded else "",
            self._undecided(),
            f"left out, not finite: {listed}" if listed else "",
            f"{bare} without a finite interval" if bare else "",
        )
        return [clause for clause in clauses if clause]

    @property
    def _kind(self) -> str:
        return "accuracy" if self.measure.startswith(_PARADIGM) else self.measure

    @property
    def _usual_n(self) -> int:
        return int(self.rows["n_rows"].mode().iloc[0])

    def _neurons(self) -> str:
        layers = {str(name) for name in self.rows["layers"]}
        where = layers.pop() if len(layers) == 1 else ""
        where = "1 layer" if where == "1 layers" else where
        neurons = "neuron" if self._usual_n == 1 else "neurons"
        return f"n = {self._usual_n:,} {neurons}" + (f" in {where}" if where else "")

    def _undecided(self) -> str:
        """Say how many intervals of accuracies hold the dense model's, from which none differs."""
        if self.dense is None or self._kind != "accuracy":
            return ""
        held = self.rows["low"].le(self.dense) & self.rows["high"].ge(self.dense)
        return f"{held.sum()} of {len(held)} intervals hold the dense model's value"


@dataclass(frozen=True)
class Panel:
    """The arms of one panel."""

    arms: Arms
    """Of one intervention, and of one strength or number of experts."""
    x: str
    """What varies: ``"strength"`` or ``"experts"``."""

    @classmethod
    def of(cls, arms: Arms) -> "Panel":
        """Find out what varies; raise `InvalidInput` if that is too much for one panel."""
        interventions = arms.rows["intervention"].unique().tolist()
        if len(interventions) > 1:
            raise InvalidInput(
                f"`intervention` must be one of {', '.join(interventions)}, which the table "
                "holds; got None; figure_ablation draws all of them."
            )
        experts, strengths = arms.levels("experts"), arms.levels("strength")
        if len(experts) > 1 < len(strengths):
            known = [", ".join(f"{level:g}" for level in levels) for levels in (experts, strengths)]
            raise InvalidInput(
                f"`experts` must be one of {known[0]}, or `strength` one of {known[1]}; got "
                "neither; figure_ablation draws all of them."
            )
        return cls(arms, "experts" if len(experts) > 1 else "strength")

    @property
    def intervention(self) -> str:
        """What was done."""
        return str(self.arms.rows["intervention"].iloc[0])

    @property
    def title(self) -> str:
        """The intervention, and what the x axis leaves open: strength or number of experts."""
        title, level = _TITLES.get(self.intervention, self.intervention), self.arms.levels
        if self.x == "experts":
            return f"{title}, {100.0 * level('strength')[0]:.6g} % zeros"
        return title + (f", {level('experts')[0]:g} experts" if level("experts") != [1.0] else "")

    @property
    def xlabel(self) -> str:
        """The x axis with its unit."""
        if self.x == "experts":
            return "number of experts"
        pruned = self.intervention in _PRUNED
        return "zeros in each selected row (%)" if pruned else "share of the edit (%)"

    def ticks(self) -> dict[float, str]:
        """Return the values along x and how they are written."""
        unit = 1.0 if self.x == "experts" else 100.0
        return {level: f"{unit * level:.6g}" for level in self.arms.levels(self.x)}


def read_arms(frame: pd.DataFrame, measure: str) -> Arms:
    """Take the arms of one measure from the table of an ablation.

    Raises
    ------
    InvalidInput
        Missing columns, several models, arms that cannot be told apart, no arm with a finite value.
    UnknownName
        A measure that the table does not hold.
    """
    check_columns(frame, _NEEDED, name="frame", writer=_WRITER)
    known = [m for m in frame["measure"].unique() if m in MEASURE_LABELS or m.startswith(_PARADIGM)]
    measure = choice("measure", measure, known, remedy="Choose one that the table holds.")
    unit = 1.0 if measure in LOG_MEASURES else 100.0
    is_dense = frame["intervention"] == "dense"
    arms = frame[frame["measure"].eq(measure) & ~is_dense]
    arms = arms.assign(
        by=arms["by"].fillna(""),
        **{name: unit * arms[name].astype("float64") for name in ("value", "low", "high")},
    )
    arms = arms.assign(router=arms["router"].fillna("") if "router" in arms else "")
    keys = arms[["selection", "by", "router"]].to_numpy().tolist()
    arms = arms.assign(series=[series_name(*key) for key in keys])
    arms = _picked_arms(arms)
    _check_distinct(frame["model"], arms)
    dense = frame[is_dense].drop_duplicates("measure").set_index("measure")["value"]
    finite = np.isfinite(arms["value"].to_numpy())
    return Arms(
        measure=measure,
        rows=arms[finite],
        lost=arms[~finite],
        dense=unit * float(dense[measure]) if measure in dense.index else None,
        perplexity=float(dense["perplexity"]) if "perplexity" in dense.index else None,
    ).checked()


def _picked_arms(arms: pd.DataFrame) -> pd.DataFrame:
    """Return the arms of the interventions and series that are wanted."""
    if not choosing():
        return arms
    arms = arms[arms["intervention"].isin(_interventions(arms))]
    series = arms.drop_duplicates("series").set_index("series")["selection"]
    kept = picked(series.index, lambda one: (str(one), str(series[one])), least=1)
    chosen: pd.DataFrame = arms[arms["series"].isin(kept)]
    return chosen


def _interventions(arms: pd.DataFrame) -> list[str]:
    names = map(str, arms["intervention"].unique())
    return picked(names, lambda name: (name, _TITLES.get(name, name)), panels=True)


def split_panels(arms: Arms, *, most: int) -> list[Panel]:
    """Split arms into panels: by intervention, and by strength where numbers of experts vary.

    Raises `InvalidInput` if these are more than ``most``.
    """
    panels = []
    for name in _interventions(arms.rows):
        part = arms.where(intervention=str(name))
        routed = len(part.levels("experts")) > 1
        strengths = part.levels("strength") if routed else [None]
        panels += [Panel.of(part.where(strength=strength)) for strength in strengths]
    if len(panels) > most:
        raise InvalidInput(
            f"`frame` must give at most {most} panels, one an intervention (and strength, where "
            f"numbers of experts vary); got {len(panels)}; choose some of its rows."
        )
    return panels


def series_name(rule: str, by: str, router: str = "") -> str:
    """Return what a selection is called, for example ``"top WD"``; and its random clusters."""
    column = _COLUMN_NAMES.get(by, by.replace("_", " "))
    clusters = RANDOM_CLUSTERS if router == "random" else ""
    if rule in ("random-norm", "random-variance"):
        return f"random, matched {column}{clusters}"
    if rule == "matched":
        return f"bottom {column}, matched perplexity"
    return f"{rule} {column}".strip() + clusters


def _check_distinct(models: pd.Series, arms: pd.DataFrame) -> None:
    names = models.unique()
    if len(names) > 1:
        raise InvalidInput(
            f"`frame` must hold one model; got {len(names)}; pick one with "
            "frame[frame.model == name]."
        )
    twice = arms[arms.duplicated([*_ARM, "router"])]
    if len(twice):
        name = twice["series"].iloc[0]
        raise InvalidInput(
            f"`frame` must hold one row an arm and measure; got several of {name!r}; tell "
            "selections apart in the column `by`, and draws in `seed`."
        )
