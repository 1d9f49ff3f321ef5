"""Two runs of scores compared: what differs, how far the rankings agree, which neurons moved."""

import base64
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entangle.errors import InvalidInput, visible
from entangle.results.base import Result, settings_of
from entangle.runs.sealing import integers, reals, shares, texts
from entangle.runs.tables import described, html_result, html_table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "difference"
WHOLE = ""
"""As a layer in the table of agreement: all neurons together."""
UNTESTED = "untested"

_AT = {"layer": texts(), "block": integers(null=True), "projection": texts()}
_FRAME = {
    **_AT, "layer_b": texts(), "neuron": integers(), "a": reals(), "b": reals(), "a_se": reals(0),
    "b_se": reals(0), "change": reals(), "change_se": reals(0), "margin": reals(0), "t": reals(),
    "p": shares(), "p_adjusted": shares(), "moved": texts("up", "down", "no", UNTESTED),
    "rank_a": integers(1, null=True), "rank_b": integers(1, null=True), "flag": texts(),
}  # fmt: skip
_ENDS = {f"{name}{end}": reals(-1, 1) for name in ("spearman", "kendall") for end in
         ("", "_low", "_high")}  # fmt: skip
_AGREEMENT = {
    **_AT, "neurons": integers(), "compared": integers(), "tested": integers(), "up": integers(),
    "down": integers(), "median_change": reals(), **_ENDS, "ceiling": shares(),
    "errors": texts("paired", "unpaired", "mixed", UNTESTED, optional=True),
}  # fmt: skip
DIFFERS = {"cause": texts(), "entry": texts(), "a": texts(), "b": texts()}
"""What the table ``differs`` holds."""
_NAMED_BY = {
    "model": "model.name", "dtype": "model.dtype", "text": "calibration.source",
    "tokens": "calibration.n_tokens", "seed": "settings.seed", "method": "settings.method",
    "special tokens": "calibration.settings.special_tokens.policy",
}  # fmt: skip
"""The entry that names two runs that differ in one thing."""


@dataclass(frozen=True, eq=False)
class Difference(Result):
    """What changed between two runs of scores, A and B, neuron by neuron."""

    KIND, _TITLE = KIND, "Difference of"
    _TABLES = {KIND: _FRAME, "agreement": _AGREEMENT, "differs": DIFFERS}  # noqa: RUF012

    frame: pd.DataFrame
    """One row a neuron of both runs: layer, block, projection, layer_b (its name in B), neuron, a
    and b (the values compared), a_se and b_se (standard errors), change (b − a), change_se,
    margin (what the method, rounding and unlike null floors can do to the change), t (what of the
    change is beyond the margin, in standard errors), p (two-sided), p_adjusted (over all neurons),
    moved (``up``, ``down``, ``no`` or ``untested``), rank_a and rank_b (in the layer, the largest
    first), flag (why there is no value, and in which run). Values have the unit of the column that
    is compared: σ for ``wd``."""
    agreement: pd.DataFrame
    """One row a layer, and at last, if there are several, one of all together (layer ``""``):
    neurons, compared (with a value in both), tested, up, down (that moved), median_change,
    spearman, kendall and, of every share of top neurons, ``top_1`` and so on (overlap of the two
    top sets), each with ``_low`` and ``_high``; ceiling: the Spearman coefficient that noise alone
    would leave, from the split halves of both runs (NaN where unknown); errors: how changes were
    tested, ``paired`` (of the same tokens: by the errors of the change itself), ``unpaired`` (as of
    independent texts), ``mixed`` (of all layers) or ``untested``. Earlier versions have none."""
    differs: pd.DataFrame
    """One row an entry of the manifests that differs: cause, entry, a, b
    (`entangle.runs.differing.what_differs`)."""
    manifest: Mapping[str, object] = field(repr=False)
    """The manifests of both runs, settings, notes, versions, seconds and peak memory."""

    @property
    def by(self) -> str:
        """Column that was compared."""
        return str(settings_of(self.manifest).get("by"))

    @property
    def notes(self) -> list[str]:
        """What a reader has to know before the numbers, in sentences."""
        found = self.manifest.get("notes")
        return [str(one) for one in found] if isinstance(found, list) else []

    @property
    def causes(self) -> list[str]:
        """What the two runs differ in, in a word each; see `entangle.runs.differing.causes`."""
        found = settings_of(self.manifest).get("causes")
        return [str(one) for one in found] if isinstance(found, list) else []

    @property
    def labels(self) -> tuple[str, str]:
        """What A and B are called: by the one thing that they differ in, where it has a name."""
        entry = _NAMED_BY.get(self.causes[0]) if len(self.causes) == 1 else None
        rows = self.differs[self.differs["entry"] == entry]
        if rows.empty:
            return "A", "B"
        word = {"seed": "seed ", "tokens": "tokens: "}.get(self.causes[0], "")
        return f"A: {word}{rows['a'].iloc[0]}", f"B: {word}{rows['b'].iloc[0]}"

    def moved(self, k: int | None = None) -> pd.DataFrame:
        """Return the neurons that moved beyond their error, the surest first; at most ``k``."""
        rows = self.frame[self.frame["moved"].isin(["up", "down"])]
        order = rows["t"].abs().sort_values(ascending=False, kind="stable").index
        return rows.loc[order if k is None else order[:k]]

    def shown_differs(self) -> pd.DataFrame:
        """Return `differs` with digests cut to their first 12 digits."""
        sums = self.differs["entry"].str.endswith(("digest", "sha256"))
        cut = {side: self.differs[side].str.slice(0, 12).where(sums, self.differs[side])
               for side in "ab"}  # fmt: skip
        return self.differs.assign(**cut)

    def summary(self) -> pd.DataFrame:
        """Return the table of agreement with all layers together first."""
        rows = self.agreement.assign(layer=self.agreement["layer"].replace(WHOLE, "all"))
        return rows.iloc[np.argsort(rows["layer"] != "all", kind="stable")].reset_index(drop=True)

    def plot(self, **options: Any) -> "Figure":
        """Draw values, agreement, overlaps and errors; see `figure_difference`."""
        from entangle.plotting import figure_difference

        options = {"names": self.labels, "by": self.by, **options}
        return figure_difference(self.frame, self.agreement, **options)

    def html(self, *, moved: int = 50) -> str:
        """Return the result as a page of its own, which needs no other file.

        Parameters
        ----------
        moved
            Most neurons that are listed among those that moved.
        """
        from jinja2 import Environment
        from markupsafe import Markup

        safe = Environment(autoescape=True, finalize=_seen)
        template = safe.from_string(
            files("entangle.results").joinpath("difference.html").read_text("utf-8")
        )
        lines, _ = self._told()
        found = self.moved()
        columns = ["layer", "neuron", "a", "b", "change", "change_se", "t", "p_adjusted", "rank_a",
                   "rank_b"]  # fmt: skip
        summary = with_intervals(self.summary().drop(columns=["block", "projection"]))
        return template.render(
            title=f"{self._TITLE} {described(self.manifest, 'model', 'name')}",
            lines=lines,
            notes=self.notes,
            labels=self.labels,
            by=self.by,
            fdr=settings_of(self.manifest).get("fdr"),
            differs=Markup(html_table(self.shown_differs(), rows=len(self.differs))),  # noqa: S704
            agreement=Markup(html_table(summary, rows=len(summary))),  # noqa: S704
            n_moved=len(found),
            moved=Markup(html_table(found[columns], rows=moved)),  # noqa: S704
            picture=self._picture(),
            described=described(self.manifest, "packages", "entangle", default=""),
        )

    def save_html(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write `html` to a file.

        Raises
        ------
        InvalidInput, Unavailable
            If the file exists without ``force``, or cannot be written.
        """
        from entangle.runs.provenance import expand_user, output_file

        place = expand_user(path)
        if place.exists() and not force:
            raise InvalidInput(f"{str(path)!r} exists; name another file or pass force=True.")
        content = self.html()
        with output_file(place) as temporary:
            temporary.write_text(content, "utf-8")
        return place

    def _picture(self) -> str:
        """Return the figure as the base64 of a PNG, empty where there is nothing to draw."""
        try:
            figure = self.plot()
        except InvalidInput:
            return ""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    def _repr_html_(self) -> str:
        lines, table = self._told()
        title = f"{self._TITLE} {described(self.manifest, 'model', 'name')}"
        return html_result(title, [*lines, *self.notes], table, rows=self._SHOWN)

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        causes = ", ".join(self.causes) or "nothing that changes scores"
        counts = self.frame["moved"].value_counts()
        up, down, untested = (int(counts.get(key, 0)) for key in ("up", "down", UNTESTED))
        last = self.agreement.iloc[-1]
        told = "" if (errors := last.get("errors", UNTESTED)) == UNTESTED else f" ({errors})"
        lines = [
            f"What differs: {causes}",
            f"{len(self.frame):,} neurons of both, {self.by}: Spearman ρ "
            f"{_interval(last, 'spearman')}, Kendall τ {_interval(last, 'kendall')}",
            f"moved beyond their error{told}: {up:,} up, {down:,} down of "
            f"{len(self.frame) - untested:,} tested",
        ]
        return lines, self.summary().drop(columns=["block", "projection"])


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Write every interval of a table of agreement behind its value, in one column."""
    shown = table.drop(columns=[name for name in table if str(name).endswith(("_low", "_high"))])
    for name in shown:
        if f"{name}_low" in table:
            columns = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
            shown[name] = [
                "–" if value != value else f"{value:.2f} [{low:.2f}, {high:.2f}]"
                for value, low, high in columns
            ]
    return shown


def _seen(value: Any) -> Any:
    """Spell out what cannot be seen in a plain text; HTML that was made here stays."""
    return visible(value) if type(value) is str else value


def _interval(row: pd.Series, name: str) -> str:
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{number(value, 3)} [{number(low, 3)}, {number(high, 3)}]"


def load_difference(path: str | os.PathLike[str]) -> Difference:
    """Load a difference that `Difference.save` wrote; errors as `Result.load`."""
    return Difference.load(path)
