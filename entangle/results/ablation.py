"""The result of an ablation: a tidy table, the raw numbers behind it, and what they say.

Names of many layers in one short text.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entangle.checks import choice
from entangle.results.base import Result, settings_of
from entangle.results.contrasts import ARM, RATIOS, SETTING, Compared
from entangle.results.scores import NeuronScores
from entangle.runs.provenance import special_tokens_of
from entangle.runs.sealing import Schema, integers, reals, shares, texts
from entangle.runs.tables import described
from entangle.stats.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_FIRST_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_RANGES = re.compile(r"\{([\d,-]+)\}")
_SEPARATOR = "; "


def layer_set(names: Iterable[str]) -> str:
    """Return the names of layers with the blocks of like ones joined.

    ``model.layers.{0-29}.mlp.up_proj`` are 30 layers, ``h.{0,2-4}.mlp.c_fc`` four; different ones
    are parted by ``"; "``. `layer_names` undoes it.
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        found = _FIRST_NUMBER.search(name)
        if found is None or str(int(found[0])) != found[0]:
            groups.setdefault(name, [])
            continue
        template = f"{name[: found.start()]}{{}}{name[found.end() :]}"
        groups.setdefault(template, []).append(int(found[0]))
    return _SEPARATOR.join(
        template.replace("{}", _joined(sorted(set(blocks)))) for template, blocks in groups.items()
    )


def layer_names(text: str) -> list[str]:
    """Return the full names of the layers that `layer_set` joined, like ones by block."""
    names: list[str] = []
    for part in text.split(_SEPARATOR) if text else ():
        found = _RANGES.search(part)
        if found is None:
            names.append(part)
            continue
        for ends in found[1].split(","):
            low, _, high = ends.partition("-")
            blocks = range(int(low), int(high or low) + 1)
            names += [f"{part[: found.start()]}{b}{part[found.end() :]}" for b in blocks]
    return names


def _joined(blocks: Sequence[int]) -> str:
    """Return a number as it is, several as ``{0-2,5}``."""
    if len(blocks) == 1:
        return str(blocks[0])
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    said = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{{{','.join(said)}}}"


KIND = "ablation"
_SEED, _LAYER = integers(null=True), {"layer": texts(), "neuron": integers()}
_ARM = {
    "selection": texts(), "by": texts(), "seed": _SEED, "intervention": texts(),
    "strength": reals(null=False), "experts": integers(1), "router": texts(optional=True),
}  # fmt: skip
_SCHEMAS: Mapping[str, Schema] = {
    "ablation": {
        "model": texts(), "layers": texts(), "layer_set": texts(optional=True), **_ARM,
        "measure": texts(), "value": reals(), "low": reals(), "high": reals(),
        "n_rows": integers(), "realised_sparsity": shares(), "realised_low": shares(),
        "realised_high": shares(),
    },
    "windows": {
        "window": integers(), **_ARM, "loss": reals(0), "kl": reals(optional=True),
        "agreement": reals(0, optional=True),
    },
    "pairs": {
        "pair": integers(), **_ARM, "paradigm": texts(optional=True), "good": reals(high=0),
        "bad": reals(high=0),
    },
    "selections": {**_LAYER, "selection": texts(), "by": texts(), "seed": _SEED},
    "neurons": {
        **_LAYER, "block": integers(null=True), "projection": texts(), "experts": integers(1),
        "router": texts(optional=True), "sparsity": shares(), "rmse": reals(0), "ri": reals(),
        "output_wd": reals(0), "wd": reals(0), "weighted_wd": reals(0), "wd_skipped": integers(),
        "md": reals(0, optional=True), "weighted_md": reals(0, optional=True),
        "md_skipped": integers(optional=True), "realised_sparsity": shares(),
        "smallest_cluster": integers(), "shrunk": integers(), "damping": reals(0),
        "pruner": texts(optional=True),
    },
    "matched": {
        "intervention": texts(), "strength": reals(), "by": texts(), "fraction": shares(),
        "loss": reals(), "target": reals(), "low": reals(), "high": reals(),
    },
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class AblationResult(Result):
    """What happened to a model when some of its neurons were changed."""

    KIND, _TITLE, _SHOWN, _TABLES = KIND, "Ablation of", 20, _SCHEMAS

    frame: pd.DataFrame
    """One row an arm and measure: model, layers (how many), layer_set (which;
    `entangle.results.ablation.layer_names` lists them), selection, by, seed, intervention,
    strength, experts, router (``kmeans`` or ``random``, empty with 1 expert), measure, value, low,
    high (95 %), n_rows, realised_sparsity (mean over the pruned rows), realised_low, realised_high
    (of the row with the fewest and the most zeros). The dense model comes first."""
    windows: pd.DataFrame = field(repr=False)
    """One row an arm and window: loss (nats), and kl and agreement where asked for."""
    pairs: pd.DataFrame = field(repr=False)
    """One row an arm and minimal pair: good, bad (log-probabilities in nats), paradigm."""
    selections: pd.DataFrame = field(repr=False)
    """One row a selected neuron: selection, by, seed, layer, neuron."""
    neurons: pd.DataFrame = field(repr=False)
    """One row a neuron, number of experts and sparsity, as in
    `entangle.experts.routed_rows.RoutedRows.neurons`; empty without experts."""
    matched: pd.DataFrame = field(repr=False)
    """One row a step of the search for the share of low-WD neurons that costs as much perplexity
    as the top ones, as in `entangle.experiments.arms.search_matched`; empty if that was not asked
    for. The step that comes closest is an arm of ``frame`` too, with selection ``matched``."""
    scores: NeuronScores = field(repr=False)
    """Scores that the selections were made from."""
    manifest: Mapping[str, object] = field(repr=False)
    """Model, texts, settings, versions, seconds and peak memory."""

    def summary(self, measure: str = "perplexity", *, seed: int = 0) -> pd.DataFrame:
        """Return one row an arm of one measure, seeds joined.

        Parameters
        ----------
        measure
            A value of column ``measure``.
        seed
            Of the resampling behind ``top_gap``.

        Returns
        -------
        pandas.DataFrame
            The arm, ``seeds``, ``value`` (median over seeds), ``low`` and ``high`` (the interval of
            the only seed, else the lowest and highest end over seeds), ``smallest`` and ``largest``
            value over seeds, ``n_rows``, ``realised_sparsity``, and ``top_gap`` with its interval
            ``top_gap_low`` to ``top_gap_high``: the first top selection (or the allocation) of the
            same setting against this arm, as in `contrasts`; NaN where there is none.
        """
        measure = choice("measure", measure, self.frame["measure"].unique().tolist())
        part = self.frame[self.frame["measure"] == measure]
        joined = part.groupby([*SETTING, "selection", "by"], sort=False, dropna=False)
        table = joined.agg(
            seeds=("value", "size"),
            value=("value", "median"),
            low=("low", "min"),
            high=("high", "max"),
            smallest=("value", "min"),
            largest=("value", "max"),
            n_rows=("n_rows", "first"),
            realised_sparsity=("realised_sparsity", "mean"),
        ).reset_index()
        return table.merge(
            self._top_gaps(measure, seed), on=[*SETTING, "selection", "by"], how="left"
        )

    def contrasts(
        self, measure: str = "perplexity", *, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Compare every top selection with every other one of the same setting.

        An allocation is compared with the same zeros spread evenly, in the same way.

        Parameters
        ----------
        measure
            ``perplexity``, ``kl``, ``top1_agreement``, ``accuracy`` or ``accuracy:PARADIGM``.
        level, seed
            Of the intervals.

        Returns
        -------
        pandas.DataFrame
            One row a comparison: intervention, strength, experts, router, by (of the top selection,
            or the allocation's rule), ``against`` (the other's selection), ``against_by``,
            ``ratio`` of the perplexities, or ``difference`` (top minus other) of another measure,
            with ``low`` and ``high``, and ``seeds``. Intervals are paired bootstraps over windows,
            or over pairs (`entangle.stats.intervals.pairs_interval`). Values of several seeds are
            averaged for each window or pair (losses for the perplexity, which compares with the
            geometric mean).

        Raises
        ------
        UnknownName, InvalidInput
            If there is no such measure, or the ablation did not take it.
        """
        compared = self._compared(measure)
        value = "ratio" if measure in RATIOS else "difference"
        columns = [*SETTING, "by", "against", "against_by", value, "low", "high", "seeds"]
        rows = []
        for setting, part in compared.table.groupby(SETTING, sort=False, dropna=False):
            arms = dict(iter(part.groupby(["selection", "by"], sort=False)))
            for (rule, by), top in arms.items():
                for (other, other_by), control in arms.items():
                    if rule not in ("top", "allocation") or (other, other_by) == (rule, by):
                        continue
                    found = compared.interval(top, control, level=level, seed=seed)
                    seeds = control["seed"].nunique(dropna=False)
                    ends = found.value, found.low, found.high
                    rows.append((*setting, by, other, other_by, *ends, seeds))
        return pd.DataFrame(rows, columns=columns)

    def compare(
        self,
        a: str | Mapping[str, object],
        b: str | Mapping[str, object],
        *,
        measure: str = "perplexity",
        level: float = 0.95,
        n_boot: int = 1000,
        seed: int = 0,
    ) -> Interval:
        """Compare any two arms by what was measured on the same windows or pairs.

        Parameters
        ----------
        a, b
            An arm: the name of its selection (``"top"``, ``"dense"``), or as many columns of
            ``frame`` as tell it from the others, such as ``{"selection": "top", "strength":
            0.95}``. Several seeds are averaged, unless ``seed`` names one.
        measure
            As in `contrasts`; ``accuracy`` is over all pairs, ``accuracy:macro`` the mean over
            paradigms.
        level, n_boot, seed
            Of the paired percentile bootstrap.

        Returns
        -------
        Interval
            a / b for the perplexity, a − b for the others (nats a token for ``kl``, shares for
            ``top1_agreement`` and accuracies).

        Raises
        ------
        UnknownName, InvalidInput
            If there is no such measure or column, no arm or several are meant, or an option is out
            of range.
        """
        compared = self._compared(measure)
        return compared.interval(
            compared.arm(a), compared.arm(b), n_boot=n_boot, level=level, seed=seed
        )

    def plot(self, measure: str = "perplexity_ratio", **options: Any) -> "Figure":
        """Draw a measure against strength, one line a selection; see `figure_ablation`."""
        from entangle.plotting import figure_ablation  # matplotlib is slow to import

        arms = self.frame[self.frame["selection"] != "dense"]
        panels = len(arms[["intervention", "experts"]].drop_duplicates())
        options = {"column": "single" if panels == 1 else "double", **options}
        return figure_ablation(self.frame, measure=measure, **options)

    def write(self, folder: Path) -> None:
        """Write the files of `save`, the scores in a folder of their own, into one that exists."""
        self.scores.save(folder / "scores")
        super().write(folder)

    def _compared(self, measure: str) -> Compared:
        said = self.manifest.get("evaluation")
        text = said.get("text") if isinstance(said, Mapping) else None
        return Compared.of(measure, self.windows, self.pairs, text)

    def _top_gaps(self, measure: str, seed: int) -> pd.DataFrame:
        """Return the first top selection against each other one, as `summary` shows it."""
        ends = ["top_gap", "top_gap_low", "top_gap_high"]
        key = [*SETTING, "selection", "by"]
        if not Compared.can(measure, self.windows, self.pairs):
            empty = self.frame.iloc[:0].reindex(columns=[*key, *ends])
            return empty.astype(dict.fromkeys(ends, "float64"))
        table = self.contrasts(measure, seed=seed)
        names = {"against": "selection", "against_by": "by", "low": ends[1], "high": ends[2]}
        table = table.drop(columns="by").rename(
            columns=names | {"ratio": ends[0], "difference": ends[0]}
        )
        return table.drop_duplicates(key)[[*key, *ends]]

    def _summed(self) -> pd.DataFrame:
        shown = self._shown_measure()
        return self._told()[1].rename(columns={"value": shown})

    def _shown_measure(self) -> str:
        measures = [str(name) for name in self.frame["measure"].unique()]
        return "perplexity" if "perplexity" in measures else measures[0]

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        measures = [str(name) for name in self.frame["measure"].unique()]
        shown = self._shown_measure()
        changed = self.selections["layer"].nunique()
        text = described(self.manifest, "evaluation", "text", "source", default="minimal pairs")
        lines = [
            f"{len(self.frame.drop_duplicates(ARM)) - 1:,} arms and the dense model, neurons of "
            f"{changed:,} layer(s), measured on {text}, "
            f"special tokens: {special_tokens_of(self.manifest, 'evaluation', 'text')}",
            f"{shown}; measured: {', '.join(measures)}",
        ]
        return lines, self.summary(shown)

    @classmethod
    def _completed(
        cls, folder: Path, fields: dict[str, Any], manifest: Mapping[str, object]
    ) -> dict[str, Any]:
        """Load the scores, and add the columns that tables of earlier versions lack."""
        router = settings_of(manifest).get("router")
        tables = {name: _with_router(table, router) for name, table in fields.items()}
        if "layer_set" not in tables["frame"]:
            tables["frame"] = _with_layer_set(tables["frame"], tables["selections"])
        return tables | {"scores": NeuronScores.load(folder / "scores")}

    def _fault(self) -> str | None:
        model, scored = (one.get("model") for one in (self.manifest, self.scores.manifest))
        known = [one if isinstance(one, Mapping) else {} for one in (model, scored)]
        names, digests = ([one.get(key) for one in known] for key in ("name", "digest"))
        others = self.frame.loc[self.frame["model"] != names[0], "model"]
        if isinstance(names[0], str) and len(others):
            return f"its table is of the model {others.iloc[0]!r}, its manifest of {names[0]!r}"
        if None not in digests and digests[0] != digests[1]:
            return (
                f"its scores are of another model ({names[1]!r}) than its manifest ({names[0]!r})"
            )
        if self.frame.duplicated([*ARM, "measure"]).any():
            return "an arm has a measure twice"
        strange = set(self.selections["layer"]) - set(self.scores.layers["layer"])
        if strange:
            return f"layer {min(strange)!r} of its selections is not among its scores"
        return None


def load_ablation(path: str | os.PathLike[str]) -> AblationResult:
    """Load an ablation that `AblationResult.save` wrote; errors as `Result.load`."""
    return AblationResult.load(path)


def _with_layer_set(frame: pd.DataFrame, selections: pd.DataFrame) -> pd.DataFrame:
    chosen, arm = selections.fillna({"seed": -1}), ["selection", "by", "seed"]
    sets = {
        tuple(key): layer_set(dict.fromkeys(part["layer"])) for key, part in chosen.groupby(arm)
    }
    keys = frame.fillna({"seed": -1})[arm].to_numpy().tolist()
    return _after(frame, "layers", "layer_set", [sets.get(tuple(key), "") for key in keys])


def _with_router(table: pd.DataFrame, router: object) -> pd.DataFrame:
    if "experts" not in table or "router" in table:
        return table
    names = np.where(table["experts"] > 1, str(router or "kmeans"), "")
    return _after(table, "experts", "router", names.tolist())


def _after(table: pd.DataFrame, column: str, name: str, values: Sequence[str]) -> pd.DataFrame:
    """Return a table with a column of strings after another one."""
    place = table.columns.tolist().index(column) + 1
    copied = table.copy()
    copied.insert(place, name, pd.Series(values, table.index, dtype="str"))
    return copied
