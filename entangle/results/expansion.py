"""What an expansion cost and lost: one row a layer, and sums over the model."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from entangle.results.base import Result
from entangle.runs.provenance import special_tokens_of, write_json
from entangle.runs.sealing import integers, manifest_digest, reals, shares, texts
from entangle.runs.tables import described, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND, RUN = "expansion", "run.json"
"""Of the manifest; and the file that says how the build went."""
_DIGEST = "sha256"
_LAYERS = {
    "layer": texts(), "block": integers(null=True), "projection": texts(), "experts": integers(1),
    "sparsity": shares(), "relative_error": reals(0), "nonzeros": integers(), "bytes": integers(),
    "flops": reals(0), "smallest_cluster": integers(optional=True),
    "largest_cluster": integers(optional=True), "effective_clusters": reals(0, optional=True),
    "damping": reals(0, optional=True), "router": integers(optional=True),
}  # fmt: skip
_SHOWN = (
    "layer", "experts", "sparsity", "relative_error", "smallest_cluster", "largest_cluster",
    "effective_clusters", "damping",
)  # fmt: skip


def costs_to_write(costs: Mapping[str, float]) -> dict[str, float | None]:
    """Return costs as a manifest holds them: None where one is NaN."""
    return {name: None if math.isnan(value) else value for name, value in costs.items()}


@dataclass(frozen=True, eq=False)
class ExpansionReport(Result):
    """The report of an expansion, which is read from its folder without its experts.

    `entangle.load_expanded` loads the model. A folder that `save` wrote holds the report alone.
    """

    KIND, _TITLE, _TABLES = KIND, "Expansion of", {"layers": _LAYERS}

    layers: pd.DataFrame
    """One row a layer, as `entangle.experts.expand.layer_row` says."""
    manifest: Mapping[str, object] = field(repr=False)
    """Model, calibration set, settings, costs, perplexity, versions."""
    run: Mapping[str, object] = field(default_factory=dict, repr=False)
    """Seconds and peak memory of the process that built it; empty where they are not known."""

    @property
    def frame(self) -> pd.DataFrame:
        """The table ``layers``."""
        return self.layers

    @property
    def costs(self) -> Mapping[str, float]:
        """Multiples of the dense model: flops, nonzeros, bytes; NaN where one is not known."""
        found = self.manifest.get("costs")
        items = found.items() if isinstance(found, Mapping) else ()
        return {name: math.nan if value is None else value for name, value in items}

    @property
    def perplexity(self) -> float | None:
        """Perplexity on the evaluation text, which may be NaN or infinite; None without one."""
        found, flag = self.manifest.get("perplexity"), self.manifest.get("perplexity_flag")
        value = {"nan": float("nan"), "infinite": float("inf")}.get(str(flag), found)
        return float(value) if isinstance(value, int | float) else None

    def plot(self, value: str | None = None, **options: Any) -> "Figure":
        """Draw errors and costs (`figure_expansion`), or a value of layers (`plot_layer_profile`).

        ``value`` is ``"sparsity"``, ``"experts"`` or ``"relative_error"``.
        """
        from entangle.plotting import figure_expansion, paper_style, plot_layer_profile

        if value is None:
            costs = pd.DataFrame(self.costs.items(), columns=["cost", "multiple"])
            return figure_expansion(self.layers, costs, **options)
        with paper_style(column="single"):
            figure = plot_layer_profile(self.layers, value=value, **options).get_figure(root=True)
        assert figure is not None  # noqa: S101 - the axes are new
        return figure

    def write(self, folder: Path) -> None:
        """Write the files of `save` into a folder that exists."""
        super().write(folder)
        write_run(folder, self.run)

    @classmethod
    def _completed(
        cls, folder: Path, fields: dict[str, Any], _manifest: Mapping[str, object]
    ) -> dict[str, Any]:
        return fields | {"run": read_run(folder)}

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        costs = ", ".join(f"{number(value)} × {name}" for name, value in self.costs.items())
        lines = [
            f"{len(self.layers):,} layer(s) of {described(self.manifest, 'settings', 'experts')} "
            f"expert(s), router {described(self.manifest, 'settings', 'router')}",
            f"the dense model's cost times: {costs}",
        ]
        if self.perplexity is not None:
            text = special_tokens_of(self.manifest, "evaluation")
            lines.append(f"perplexity {number(self.perplexity)}, special tokens: {text}")
        return lines, self.layers[[name for name in _SHOWN if name in self.layers.columns]]


class PruneReport(ExpansionReport):
    """The report of a pruned model, which is read from its folder without its weights."""

    KIND, _TITLE = "pruning", "Pruning of"

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        """Tell of mixtures whose experts were pruned what they have left."""
        lines, table = super()._told()
        if "experts_before" not in self.layers:
            return lines, table
        method, share = (
            described(self.manifest, "settings", name) for name in ("method", "sparsity")
        )
        reached = float(self.layers["sparsity"].mean())
        lines[0] = f"{len(self.layers):,} mixture(s) pruned by {method}, sparsity {reached:.3g}"
        lines[0] += "" if abs(reached - float(str(share))) < 5e-4 else f" ({share} was asked for)"
        shown = [*table.columns[:1], "experts", "experts_before", "neurons", "neurons_before"]
        return lines, self.layers[[*shown, "sparsity"]]


def write_run(folder: Path, run: Mapping[str, object]) -> None:
    """Write how a build went, with a digest."""
    write_json(folder / RUN, {**run, _DIGEST: manifest_digest(run)})


def read_run(folder: Path) -> dict[str, object]:
    """Return what ``run.json`` of a build says; nothing where it was removed or altered."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or not found.keys() >= {"seconds", "peak_memory_bytes"}:
        return {}
    digest = found.pop(_DIGEST, None)
    return found if digest in (None, manifest_digest(found)) else {}
