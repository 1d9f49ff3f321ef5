"""The result of an ablation: a tidy table, the raw numbers behind it, and what they say."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.errors import InvalidInput, unknown_name
from entangle.evaluation import Perplexity, perplexity_ratio
from entangle.html_tables import described, html_result
from entangle.provenance import expanded, output_folder, read_manifest, read_table, write_json
from entangle.scoring.scores import NeuronScores, load_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from entangle.plotting.style import Column

KIND = "ablation"
ARM = ["intervention", "strength", "experts", "selection", "by", "seed"]
"""Columns that name an arm."""
SETTING = ["intervention", "strength", "experts"]
"""Columns that arms to be compared have in common."""
_TABLES = ("ablation", "windows", "pairs", "selections", "neurons", "matched")


@dataclass(frozen=True, eq=False)
class AblationResult:
    """What happened to a model when some of its neurons were changed."""

    frame: pd.DataFrame
    """One row an arm and measure: model, layers, selection, by, seed, intervention, strength,
    experts, measure, value, low, high (95 %), n_rows, realised_sparsity (mean over the pruned
    rows), realised_low, realised_high (its extremes). The dense model comes first."""
    windows: pd.DataFrame = field(repr=False)
    """One row an arm and window: loss (nats), and kl and agreement where asked for."""
    pairs: pd.DataFrame = field(repr=False)
    """One row an arm and minimal pair: good, bad (log-probabilities in nats)."""
    selections: pd.DataFrame = field(repr=False)
    """One row a selected neuron: selection, by, seed, layer, neuron."""
    neurons: pd.DataFrame = field(repr=False)
    """One row a neuron, number of experts and sparsity, as in
    `entangle.ablation.routed_rows.RoutedRows.neurons`; empty without experts."""
    matched: pd.DataFrame = field(repr=False)
    """One row a step of the search for the share of low-WD neurons that costs as much perplexity
    as the top ones; empty if that was not asked for."""
    scores: NeuronScores = field(repr=False)
    """Scores that the selections were made from."""
    manifest: Mapping[str, object] = field(repr=False)
    """Model, texts, settings, versions, seconds and peak memory."""

    def summary(self, measure: str = "perplexity") -> pd.DataFrame:
        """Return one row an arm of one measure, seeds joined.

        Parameters
        ----------
        measure
            A value of column ``measure``.

        Returns
        -------
        pandas.DataFrame
            The arm, ``seeds``, ``value`` (median over seeds), ``low`` and ``high`` (the interval of
            the only seed, else the lowest and highest end over seeds), ``smallest`` and ``largest``
            value over seeds, ``n_rows``, ``realised_sparsity``.
        """
        known = self.frame["measure"].unique()
        if measure not in known:
            raise unknown_name("measure", measure, known)
        part = self.frame[self.frame["measure"] == measure]
        joined = part.groupby([*SETTING, "selection", "by"], sort=False, dropna=False)
        return joined.agg(
            seeds=("value", "size"),
            value=("value", "median"),
            low=("low", "min"),
            high=("high", "max"),
            smallest=("value", "min"),
            largest=("value", "max"),
            n_rows=("n_rows", "first"),
            realised_sparsity=("realised_sparsity", "mean"),
        ).reset_index()

    def contrasts(self, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Compare every top selection with every other one of the same intervention and strength.

        An allocation is compared with the same zeros spread evenly, in the same way.

        Returns
        -------
        pandas.DataFrame
            One row a comparison: intervention, strength, experts, by (of the top selection, or the
            allocation's rule), ``against`` (the other's selection), ``against_by``, ``ratio`` of
            the perplexities with ``low`` and ``high`` (paired bootstrap over windows; losses of
            several seeds are averaged, which compares with the geometric mean of their
            perplexities), and ``seeds``.

        Raises
        ------
        InvalidInput
            If no perplexity was measured.
        """
        if "loss" not in self.windows:
            raise InvalidInput(
                "this ablation measured no perplexity, which contrasts compare; measure it too."
            )
        columns = [*SETTING, "by", "against", "against_by", "ratio", "low", "high", "seeds"]
        rows = []
        for setting, part in self.windows.groupby(SETTING, sort=False, dropna=False):
            losses = {
                key: one.pivot(index="window", columns="seed", values="loss")
                for key, one in part.fillna({"seed": -1}).groupby(["selection", "by"], sort=False)
            }
            for (rule, by), top in losses.items():
                for (other, other_by), control in losses.items():
                    if rule not in ("top", "allocation") or (other, other_by) == (rule, by):
                        continue
                    ratio = perplexity_ratio(
                        self._perplexity(top), self._perplexity(control), level=level, seed=seed
                    )
                    rows.append(
                        (*setting, by, other, other_by, ratio.value, ratio.low, ratio.high,
                         control.shape[1])
                    )  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def plot(self, measure: str = "perplexity_ratio") -> "Figure":
        """Draw a measure against strength, one line a selection; see `figure_ablation`."""
        from entangle.plotting import figure_ablation  # matplotlib is slow to import

        arms = self.frame[self.frame["selection"] != "dense"]
        panels = len(arms[["intervention", "experts"]].drop_duplicates())
        column: Column = "single" if panels == 1 else "double"
        return figure_ablation(self.frame, measure=measure, column=column)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write tables, scores and manifest to a folder, complete or not at all."""
        with output_folder(path, force=force) as folder:
            for name in _TABLES:
                table = self.frame if name == KIND else getattr(self, name)
                table.to_parquet(folder / f"{name}.parquet", index=False)
            self.scores.save(folder / "scores")
            write_json(folder / "manifest.json", self.manifest)
        return Path(path)

    def _perplexity(self, losses: pd.DataFrame) -> Perplexity:
        text = self.manifest["evaluation"]
        described = text["text"] if isinstance(text, dict) else None
        if not isinstance(described, dict):
            raise InvalidInput("this ablation measured no perplexity.")
        mean = np.ascontiguousarray(losses.mean(axis=1).to_numpy(np.float64))
        return Perplexity(mean, described, int(described["n_tokens"]), None, None)

    def _repr_html_(self) -> str:
        measures = [str(name) for name in self.frame["measure"].unique()]
        shown = "perplexity" if "perplexity" in measures else measures[0]
        changed = self.selections["layer"].nunique()
        text = described(self.manifest, "evaluation", "text", "source", default="minimal pairs")
        lines = [
            f"{len(self.frame.drop_duplicates(ARM)) - 1:,} arms and the dense model, neurons of "
            f"{changed:,} layer(s), measured on {text}",
            f"{shown}; measured: {', '.join(measures)}",
        ]
        title = f"Ablation of {described(self.manifest, 'model', 'name')}"
        return html_result(title, lines, self.summary(shown), rows=20)


def load_ablation(path: str | os.PathLike[str]) -> AblationResult:
    """Load a result that `AblationResult.save` wrote.

    Raises
    ------
    InvalidInput
        If the folder is missing, of another kind or schema, incomplete or corrupt.
    """
    manifest = read_manifest(path, KIND)
    folder = expanded(path)
    frame, *others = (read_table(folder / f"{name}.parquet") for name in _TABLES)
    tables = dict(zip(_TABLES[1:], others, strict=True))
    return AblationResult(
        frame=frame, **tables, scores=load_scores(folder / "scores"), manifest=manifest
    )
