"""What changing chosen neurons costs a model, against controls.

The arms of an ablation as a figure needs them: which, in what units, and what to call them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from entangle.checks import choice, plain_value
from entangle.errors import InvalidInput
from entangle.plotting.save import FigureOptions, paper, record
from entangle.plotting.style import (
    COLORBLIND,
    KNOWN_TEXTS,
    PALETTE,
    add_title,
    axes_or_new,
    called,
    explain_above,
    ink,
    log_locator,
    plain_number,
    wrap,
)
from entangle.plotting.summaries import Floats, check_columns, not_held

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
_RANDOM_CLUSTERS = ", random clusters"
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


MAX_PANELS = 12
LOG_SPAN = 5.0
"""Largest over smallest value above which perplexity, its ratio and KL get a log scale."""

_RULES = ("top", "bottom", "matched", "random", "random-norm", "random-variance", "all", "listed")
_HOLLOW = ("bottom", "matched", "random-norm", "random-variance")
_MOMENTS = ("mean", "md", "excess_kurtosis", "skewness", "abs_mean", "abs_skewness", "ks")
_COLUMNS = ("variance", "weight_norm", *_MOMENTS)
_COLUMN_COLORS = (*(COLORBLIND[i] for i in (0, 2, 4, 1, 9, 5)), "#332288", "#882255")
_COLUMN_MARKERS = "sDPvX<>hp"
_RULE_COLORS = {"random": PALETTE["typical"], "all": PALETTE["gaussian"], "listed": COLORBLIND[5]}
_RULE_MARKERS = {"all": "*", "listed": "d", "matched": "8"}
_RULE_MARKERS |= dict.fromkeys(("random", "random-norm", "random-variance"), "o")
_STEP_INCHES, _WIDEST, _MOST_TICKS = 0.08, 0.7, 8


@dataclass(frozen=True)
class _Look:
    """How one series is drawn in all panels."""

    label: str
    color: str
    marker: str
    hollow: bool
    """Whether it is a control of the column with its colour, drawn hollow."""
    style: str
    """Of its line: solid, dashed if hollow, dotted for experts of random clusters."""
    place: float
    """Of its points beside those of other series: whole steps, 0 in the middle."""


_Scale = tuple[bool, float, float]
"""Of the y axis that panels share: whether it is logarithmic, its lower and its upper end."""


def _scale(arms: Arms) -> _Scale:
    dense = [] if arms.dense is None else [arms.dense]
    centers = np.append(arms.rows["value"].to_numpy(np.float64), [d for d in dense if d > 0.0])
    ends = arms.rows[["value", "low", "high"]].to_numpy(np.float64, na_value=np.nan)
    shown: Floats = np.append(ends[np.isfinite(ends)], dense)
    log = arms.measure in LOG_MEASURES and bool(0.0 < LOG_SPAN * centers.min() < centers.max())
    shown = shown[shown > 0.0] if log else shown
    low, high = float(shown.min()), float(shown.max())
    if log:
        pad = (high / low) ** 0.04
        return True, low / pad, high * pad
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return False, low - pad, high + pad


def plot_ablation(
    frame: pd.DataFrame,
    *,
    measure: str = "perplexity_ratio",
    intervention: str | None = None,
    experts: int | None = None,
    strength: float | int | None = None,
    text: str | None = None,
    legend: bool = True,
    notes: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw what one intervention on several selections of neurons costs.

    Parameters
    ----------
    frame
        One row an arm and measure, as `entangle.results.ablation.AblationResult.frame`: ``model``,
        ``layers``, ``selection``, ``by``, ``seed``, ``intervention``, ``strength``, ``experts``,
        ``measure``, ``value`` with its 95 % interval ``low`` and ``high``, and ``n_rows``; it may
        have ``router``, of which ``random`` is drawn apart, dotted. Rows of intervention ``dense``
        are the dense model, a thin line.
    measure
        A key of `entangle.plotting.ablation.MEASURE_LABELS`, or ``"accuracy:PARADIGM"``. Agreement
        and accuracy are drawn in %; perplexity, its ratio and KL on a log scale if they span more
        than `LOG_SPAN`.
    intervention, experts
        Which arms; may be left out where the table holds only one.
    strength
        Which arms; None draws all strengths along x. Where there are several numbers of experts at
        one strength, they are along x.
    text
        What was measured on, for the legend, for example ``"WikiText-2, 152 windows"``.
    legend
        Write a legend on top.
    notes
        Say on top, in words, what was measured and how.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax``, or that of the new figure. Colours, places and the y axis are those of all arms of
        the measure, so that panels of one table can be compared. A random selection with several
        seeds shows their median, each of them as a faint dot, and a bar from the lowest to the
        highest end of their intervals. Values that are not finite are left out and counted.

    Raises
    ------
    InvalidInput
        Missing columns, no rows, several models, arms that cannot be told apart, no finite value,
        arms that one panel cannot hold.
    UnknownName
        A measure or intervention that the table does not hold.

    References
    ----------
    arXiv 2405.15756, figures 3 and 5a.
    """
    arms = read_arms(frame, measure)
    looks, scale = _looks(arms), _scale(arms)
    arms = arms.where(intervention=intervention, experts=experts, strength=strength)
    panel = Panel.of(arms)
    own, ax = ax is None, axes_or_new(ax)
    _draw(ax, panel, looks, scale)
    said = [panel.title, *arms.notes(text)] if notes else []
    entries = list(zip(*ax.get_legend_handles_labels(), strict=True))
    explain_above(ax, entries, said, legend=legend, own=own)
    return ax


def figure_ablation(
    frame: pd.DataFrame,
    *,
    measure: str = "perplexity_ratio",
    text: str | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw what every intervention costs: panels with one y axis and one legend.

    An intervention has one panel, with its strengths along x. Where numbers of experts vary, it has
    one panel a strength, with the numbers of experts along x.

    Parameters
    ----------
    frame, measure, text
        As in `plot_ablation`.
    options
        See `entangle.plotting.save.FigureOptions`.

    Returns
    -------
    matplotlib.figure.Figure
        At most `MAX_PANELS` panels.

    Raises
    ------
    InvalidInput
        What `plot_ablation` refuses in a table, too many panels, or an option out of range.
    """
    arms = read_arms(frame, measure)
    panels = split_panels(arms, most=MAX_PANELS)
    with paper(options) as page:
        axes = page.grid(len(panels))
        for ax, panel in zip(axes, panels, strict=True):
            strength = panel.arms.levels("strength")[0] if panel.x == "experts" else None
            plot_ablation(
                frame, measure=measure, intervention=panel.intervention, strength=strength,
                legend=False, notes=False, ax=ax,
            )  # fmt: skip
            add_title(ax, panel.title.replace(" %", "\u00a0%").replace("% ", "%\u00a0"))
            ax.set_xlabel(wrap(ax, panel.xlabel, size=7.0))
        if len(panels) > 1:
            page.figure.supylabel(axes[0].get_ylabel())
            one_x = len({panel.xlabel for panel in panels}) == 1
            if one_x:
                page.figure.supxlabel(panels[0].xlabel)
            for number, ax in enumerate(axes):
                ax.set(xlabel="" if one_x else ax.get_xlabel(), ylabel="")
                ax.tick_params(labelleft=number % page.across == 0)
        caption = (f"What changing chosen neurons costs: {arms.label}", *arms.notes(text))
        return page.finish(caption, title=called(str(arms.rows["model"].iloc[0])))


def _looks(arms: Arms) -> dict[str, _Look]:
    """Return how each series is drawn, in the order of the legend."""
    keys, labels = arms.series(), arms.labels()
    order = {rule: place for place, rule in enumerate(_RULES)}
    names = sorted(
        keys, key=lambda name: (order.get(keys[name][0], len(order)), keys[name][1] != "wd")
    )
    columns = list(dict.fromkeys([*_COLUMNS, *(by for _, by in keys.values())]))
    middle = (len(names) - 1) / 2.0
    looks = {}
    for number, name in enumerate(names):
        rule, by = keys[name]
        color, marker = _color_and_marker(rule, by, columns)
        mixed, hollow = name.endswith(_RANDOM_CLUSTERS), rule in _HOLLOW
        style = ":" if mixed else "--" if hollow else "-"
        looks[name] = _Look(labels[name], color, marker, hollow or mixed, style, number - middle)
    return looks


def _color_and_marker(rule: str, by: str, columns: Sequence[str]) -> tuple[str, str]:
    if by == "wd":
        return ink("top"), _RULE_MARKERS.get(rule, "^")
    if not by and rule in _RULE_COLORS:
        return ink(rule, _RULE_COLORS[rule]), _RULE_MARKERS.get(rule, "o")
    place = columns.index(by)
    color = ink(by, _COLUMN_COLORS[place % len(_COLUMN_COLORS)])
    return color, _RULE_MARKERS.get(rule, _COLUMN_MARKERS[place % len(_COLUMN_MARKERS)])


def _draw(ax: Axes, panel: Panel, looks: Mapping[str, _Look], scale: _Scale) -> None:
    ticks = panel.ticks()
    category = ax.bbox.width / ax.figure.dpi / len(ticks)
    step = min(_STEP_INCHES / category, _WIDEST / len(looks))
    for name, look in looks.items():
        rows = panel.arms.rows[panel.arms.rows["series"] == name]
        if len(rows):
            x = {level: number + step * look.place for number, level in enumerate(ticks)}
            _draw_series(ax, panel, rows, look, x)
            _draw_seeds(ax, panel, rows, look, {level: v + 0.5 * step for level, v in x.items()})
    dense = panel.arms.dense
    if dense is not None and not (scale[0] and dense <= 0.0):
        line = ax.axhline(dense, color=ink("gaussian"), lw=0.8, ls=":", zorder=1.9, label="dense")
        record(line, panel=panel.title, series="dense", x=np.nan, y=dense)
    _set_x(ax, list(ticks.values()))
    _set_y(ax, *scale)
    ax.set(xlabel=panel.xlabel, ylabel=panel.arms.label)


def _draw_series(
    ax: Axes, panel: Panel, rows: pd.DataFrame, look: _Look, place: Mapping[float, float]
) -> None:
    """Draw the values, medians where there are several seeds, and their bars."""
    names = ["strength", "experts", "n_rows"]
    joined = rows.groupby(panel.x).agg(
        y=("value", "median"), y_low=("low", "min"), y_high=("high", "max"),
        seeds=("seed", "nunique"), **{name: (name, "first") for name in names},
    )  # fmt: skip
    (line,) = ax.plot(
        list(place.values()), joined["y"].reindex(list(place)),  # a gap where nothing was measured
        color=look.color, label=look.label, linestyle=look.style, lw=0.8, marker=look.marker,
        markersize=3.5, markeredgewidth=0.8, zorder=2.2,
        markerfacecolor="white" if look.hollow else look.color,
    )  # fmt: skip
    joined.insert(0, "x", [place[level] for level in joined.index])
    known = joined[np.isfinite(joined[["y_low", "y_high"]].to_numpy()).all(axis=1)]
    ax.vlines(known["x"], known["y_low"], known["y_high"], color=look.color, lw=0.8, zorder=2.1)
    columns = {str(name): joined[name].array for name in joined.columns}
    record(line, panel=panel.title, series=look.label, **columns)


def _draw_seeds(
    ax: Axes, panel: Panel, rows: pd.DataFrame, look: _Look, place: Mapping[float, float]
) -> None:
    """Draw every seed as a dot, beside the median, if there are several."""
    if rows["seed"].nunique() < 2:
        return
    x = rows[panel.x].map(place)
    (dots,) = ax.plot(
        x, rows["value"], "o", color=look.color, markersize=2.0, markeredgewidth=0.0, alpha=0.5,
        zorder=2.3,
    )  # fmt: skip
    numbers = {"y": "value", "y_low": "low", "y_high": "high"}
    numbers |= {name: name for name in ("seed", "strength", "experts", "n_rows")}
    columns = {name: rows[source].array for name, source in numbers.items()}
    record(dots, panel=panel.title, series=f"{look.label}: each", x=x.array, **columns)


def _set_x(ax: Axes, labels: Sequence[str]) -> None:
    every = -(-len(labels) // _MOST_TICKS)
    ax.set_xticks(range(0, len(labels), every), labels[::every])
    ax.set_xlim(-0.5, len(labels) - 0.5)
    for number in range(1, len(labels), 2) if every == 1 else ():  # points in it are of its tick
        ax.axvspan(number - 0.5, number + 0.5, color="0.95", lw=0, zorder=0.5)


def _set_y(ax: Axes, log: bool, low: float, high: float) -> None:
    ax.set(yscale="log" if log else "linear", ylim=(low, high))
    ax.yaxis.set_minor_locator(NullLocator())
    if log:
        ax.yaxis.set_major_locator(log_locator(high / low))
        ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        ax.ticklabel_format(axis="y", style="plain", useOffset=False)
