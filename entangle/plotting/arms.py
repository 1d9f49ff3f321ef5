"""The arms of an ablation as a figure needs them: which, in what units, and what to call them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from entangle.checks import choice, plain_value, shown
from entangle.errors import InvalidInput, unknown_name
from entangle.plotting.summaries import check_columns

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
_MATCHED = ("random-norm", "random-variance")
_RANDOM_CLUSTERS = ", random clusters"
_COLUMN_NAMES = {"wd": "WD", "md": "MD", "ks": "KS", "abs_mean": "|mean|"}
_COLUMN_NAMES |= {"abs_skewness": "|skewness|"}
_ARM = ("intervention", "strength", "experts", "selection", "by", "seed")
_NEEDED = ("model", "layers", *_ARM, "measure", "value", "low", "high", "n_rows")
_WRITER = "the command `entangle ablate` writes such tables."


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
                value = plain_value(given)
                _check_known(kept, column, value)
                rows, lost = (table[table[column] == value] for table in (kept.rows, kept.lost))
                kept = replace(kept, rows=rows, lost=lost)
        return _checked(kept)

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
            said += [] if (rows["n_rows"] == self._usual_n).all() else [_count(rows)]
            labels[str(series)] = f"{series} ({', '.join(said)})" if said else str(series)
        return labels

    def notes(self, text: str | None) -> list[str]:
        """Return what a legend says in words: model, text, neurons, bars, what is left out."""
        seeded = self.rows.groupby("series")["seed"].nunique().gt(1).any()
        lost = self.lost.groupby("series", sort=False).size()
        listed = ", ".join(f"{count} of {series}" for series, count in lost.items())
        bare = int((~np.isfinite(self.rows[["low", "high"]].to_numpy())).any(axis=1).sum())
        clauses = (
            f"model {self.rows['model'].iloc[0]}",
            f"evaluated on {text}" if text else "",
            self._neurons(),
            self._dense_perplexity(),
            f"bars: {self._interval()}",
            "seeds: dots, their median, bar over all intervals" if seeded else "",
            f"left out, not finite: {listed}" if listed else "",
            f"{bare} without a finite interval" if bare else "",
        )
        return [clause for clause in clauses if clause]

    @property
    def _usual_n(self) -> int:
        return int(self.rows["n_rows"].mode().iloc[0])

    def _neurons(self) -> str:
        layers = {str(name) for name in self.rows["layers"]}
        where = layers.pop() if len(layers) == 1 else ""
        where = "1 layer" if where == "1 layers" else where
        neurons = "neuron" if self._usual_n == 1 else "neurons"
        return f"n = {self._usual_n:,} {neurons}" + (f" in {where}" if where else "")

    def _dense_perplexity(self) -> str:
        asked = self.measure.startswith("perplexity") and self.perplexity is not None
        return f"dense perplexity {self.perplexity:.4g}" if asked else ""

    def _interval(self) -> str:
        measure = "accuracy" if self.measure.startswith(_PARADIGM) else self.measure
        return _INTERVALS.get(measure, "95 % bootstrap over windows")


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
            raise InvalidInput(
                f"`experts` must be one of {_listed(experts)}, or `strength` one of "
                f"{_listed(strengths)}; got neither; figure_ablation draws all of them."
            )
        return cls(arms, "experts" if len(experts) > 1 else "strength")

    @property
    def intervention(self) -> str:
        """What was done."""
        return str(self.arms.rows["intervention"].iloc[0])

    @property
    def title(self) -> str:
        """The intervention, and what the x axis leaves open: strength or number of experts."""
        title = _TITLES.get(self.intervention, self.intervention)
        if self.x == "experts":
            return f"{title}, {100.0 * self.arms.levels('strength')[0]:.6g} % zeros"
        (experts,) = self.arms.levels("experts")
        return title + (f", {experts:g} experts" if experts > 1 else "")

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
    _check_distinct(frame["model"], arms)
    dense = frame[is_dense].drop_duplicates("measure").set_index("measure")["value"]
    finite = np.isfinite(arms["value"].to_numpy())
    return _checked(
        Arms(
            measure=measure,
            rows=arms[finite],
            lost=arms[~finite],
            dense=unit * float(dense[measure]) if measure in dense.index else None,
            perplexity=float(dense["perplexity"]) if "perplexity" in dense.index else None,
        )
    )


def split_panels(arms: Arms, *, most: int) -> list[Panel]:
    """Split arms into panels: by intervention, and by strength where numbers of experts vary.

    Raises `InvalidInput` if these are more than ``most``.
    """
    panels = []
    for name in arms.rows["intervention"].unique():
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
    clusters = _RANDOM_CLUSTERS if router == "random" else ""
    if rule in _MATCHED:
        return f"random, matched {column}{clusters}"
    if rule == "matched":
        return f"bottom {column}, matched perplexity"
    return f"{rule} {column}".strip() + clusters


def has_random_clusters(series: str) -> bool:
    """Tell whether a series is the control whose experts serve random clusters."""
    return series.endswith(_RANDOM_CLUSTERS)


def _checked(arms: Arms) -> Arms:
    if arms.rows.empty:
        raise InvalidInput(
            f"`frame` must hold at least 1 arm with a finite {arms.measure}; got {len(arms.lost)} "
            f"arms, none finite; {_WRITER}"
        )
    return arms


def _check_known(arms: Arms, column: str, value: object) -> None:
    known = pd.concat([arms.rows[column], arms.lost[column]]).unique().tolist()
    if value in known:
        return
    if isinstance(value, str):
        raise unknown_name(column, value, known, "Choose one that the table holds.")
    raise InvalidInput(
        f"`{column}` must be one of {_listed(sorted(known))}, which the table holds; got "
        f"{shown(value)}."
    )


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


def _count(rows: pd.DataFrame) -> str:
    low, high = int(rows["n_rows"].min()), int(rows["n_rows"].max())
    return f"n = {low:,}" + (f"–{high:,}" if high > low else "")


def _listed(values: Sequence[float | int]) -> str:
    return ", ".join(f"{value:g}" for value in values)
