"""What a study found: claims by models, every number behind a verdict, and the models.

And what a series of revisions showed: one row a revision and layer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from entangle.results.base import Result, settings_of
from entangle.runs.sealing import Schema, integers, reals, shares, texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "study"
VERDICTS = ("holds", "weaker", "fails", "not measured")
"""From best to worst; what is not measured says nothing."""
_VERDICT = texts(*VERDICTS)
_ENDS = {"value": reals(), "low": reals(), "high": reals()}
_FRAME: Schema = {
    "claim": texts(), "model": texts(), "sentence": texts(), "paper": texts(), "verdict": _VERDICT,
    "verdict_holm": _VERDICT, "setting": texts(), "number": texts(), **_ENDS, "lost": texts(),
    "why": texts(),
}  # fmt: skip
NUMBERS: Schema = {
    "claim": texts(), "model": texts(), "setting": texts(), "number": texts(), **_ENDS,
    "n": integers(0, null=True), "unit": texts(), "role": texts("main", "control", "shown"),
    "bar": reals(), "p": shares(), "p_holm": shares(), "passes": texts("yes", "no", ""),
    "passes_holm": texts("yes", "no", ""),
}  # fmt: skip
"""What the table ``numbers`` holds."""
_MODELS: Schema = {
    "model": texts(), "name": texts(), "source": texts(), "stored": texts(), "digest": texts(),
    "class": texts(), "dtype": texts(), "n_parameters": integers(0), "special_tokens": texts(),
    "calibration": texts(), "calibration_tokens": integers(0), "evaluation": texts(),
    "windows": integers(0), "tests": integers(0), "seconds": reals(0),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Study(Result):
    """Claims measured on models, each with its verdict.

    Its folder holds, beside the tables, every claim's numbers as ``claims/CLAIM.csv`` and
    ``.parquet``, and the page ``index.html``; the results that they were taken from lie beside it,
    in a folder of its name and ``-runs``.
    """

    KIND, _TITLE, _SHOWN = KIND, "Study of", 60
    _TABLES = {KIND: _FRAME, "numbers": NUMBERS, "models": _MODELS}  # noqa: RUF012

    frame: pd.DataFrame
    """One row a claim and model: claim, model, sentence, paper (its number), verdict, verdict_holm
    (with p-values adjusted for all that decides about this model), of the main comparisons the one
    that lies lowest against its bar (setting, number, value, low, high: 95 %), lost (the controls
    that it does not pass), why (where nothing was measured, or a part was not)."""
    numbers: pd.DataFrame = field(repr=False)
    """One row a measured number: claim, model, setting, number, value, low, high (95 %), n and unit
    (what the interval is over), role (`entangle.studies.rules`), bar, p (one-sided), p_holm, passes
    and passes_holm (``yes``, ``no``, or empty where nothing is decided)."""
    models: pd.DataFrame
    """One row a model: name, source, how its weights are stored, digest, texts, special tokens,
    number of tests, seconds."""
    manifest: Mapping[str, object] = field(repr=False)
    """Models, texts, settings, versions, seconds and peak memory."""

    def verdicts(self, *, adjusted: bool = False) -> pd.DataFrame:
        """Return the verdicts, a row a claim and a column a model."""
        column = "verdict_holm" if adjusted else "verdict"
        table = self.frame.pivot_table(
            index="claim", columns="model", values=column, aggfunc="first", sort=False
        )
        return table.reindex(columns=self.models["model"].tolist()).reset_index()

    @property
    def differing(self) -> str:
        """Settings in which studies that were joined differ, as a sentence; empty without any."""
        studies: Any = self.manifest.get("studies") or ()
        names = dict.fromkeys(name for one in studies for name in one["settings"] or {})
        said = []
        for name in names:
            values = [json.dumps((one["settings"] or {}).get(name)) for one in studies]
            if len(set(values)) > 1:
                shown = ("given" if one.startswith("{") else one for one in dict.fromkeys(values))
                said.append(f"{name} ({', '.join(shown)})")
        return f"The studies joined here differ in {', '.join(said)}." if said else ""

    def plot(self, **options: Any) -> "Figure":
        """Draw the verdicts with their deciding numbers; see `figure_verdicts`."""
        from entangle.plotting import figure_verdicts

        return figure_verdicts(self.frame, **options)

    def write(self, folder: Path) -> None:
        """Write the files of `save`, and one table a claim."""
        super().write(folder)
        (folder / "claims").mkdir(exist_ok=True)
        for claim, rows in self.numbers.groupby("claim", sort=False):
            rows.to_csv(folder / "claims" / f"{claim}.csv", index=False)
            rows.to_parquet(folder / "claims" / f"{claim}.parquet", index=False)

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        tests = ", ".join(f"{row.tests} of {row.model}" for row in self.models.itertuples())
        lines = [
            f"{self.frame['claim'].nunique()} claims on {len(self.models)} model(s); numbers that "
            f"decide, each a test: {tests}",
            *([self.differing] if self.differing else []),
        ]
        return lines, self.frame.drop(columns=["sentence", "paper"])

    def _fault(self) -> str | None:
        if self.frame.duplicated(["claim", "model"]).any():
            return "a claim of a model is there twice"
        strange = set(self.frame["model"]) - set(self.models["model"])
        return f"model {min(strange)!r} is not described" if strange else None


TRACE = "trace"
_AT: Schema = {"revision": texts(), "place": integers(0), "step": reals(0)}
_TRACE: Schema = {
    **_AT, "perplexity": reals(0), "wd_median": reals(0), "wd_top": reals(0),
    "wd_largest": reals(0), "md_median": reals(0), "wd_md": reals(-1, 1), "overlap": shares(),
    "chance": shares(), "ratio": reals(0), "ratio_low": reals(0), "ratio_high": reals(0),
    "damage": reals(0), "damage_random": reals(0),
}  # fmt: skip
_TRACE_LAYERS: Schema = {
    **_AT, "layer": texts(), "block": integers(null=True), "projection": texts(),
    "null_floor": reals(0), "wd_median": reals(0), "wd_top": reals(0), "wd_largest": reals(0),
    "md_median": reals(0), "wd_md": reals(-1, 1), "overlap": shares(),
    "chance": reals(0, 1, optional=True),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trace(Result):
    """What a series of a model's revisions showed, on one text."""

    KIND, _TITLE, _SHOWN = TRACE, "Trace of", 40
    _TABLES = {TRACE: _TRACE, "layers": _TRACE_LAYERS}  # noqa: RUF012

    frame: pd.DataFrame
    """One row a revision: revision, place (in the order given), step (the number in its name, NaN
    without one), perplexity (dense), wd_median, wd_top (at the edge of the top rows), wd_largest
    (σ), md_median, wd_md (their rank correlation), overlap (share of the last revision's top rows
    that are top rows here, mean of layers; ``chance`` for random sets), ratio with ratio_low and
    ratio_high (perplexity with top rows pruned / with random rows pruned, 95 % over windows),
    damage and damage_random (perplexity with top, and random, rows pruned / dense)."""
    layers: pd.DataFrame = field(repr=False)
    """One row a revision and layer."""
    manifest: Mapping[str, object] = field(repr=False)
    """The last revision, texts, settings, versions, seconds and peak memory."""

    def plot(self, **options: Any) -> "Figure":
        """Draw WD, MD, overlaps and damage by step; see `figure_trace`."""
        from entangle.plotting import figure_trace

        return figure_trace(self.frame, **options)

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        said = settings_of(self.manifest)
        revisions: Sequence[str] = self.frame["revision"].tolist()
        lines = [
            f"{len(revisions)} revisions, {revisions[0]} to {revisions[-1]}; top "
            f"{said.get('fraction', 0):.0%} of the rows pruned to {said.get('strength', 0):.0%}"
        ]
        return lines, self.frame.drop(columns=["place"])
