"""Scores of neurons: a table with its provenance, saved and loaded.

The output distribution of every neuron of a layer, as it is saved and drawn again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save as to_safetensors

from entangle.checks import choice, names, whole
from entangle.errors import InvalidInput
from entangle.results.base import Named, Result, settings_of, strange_layer
from entangle.runs.provenance import special_tokens_of
from entangle.runs.reading import decoding
from entangle.runs.sealing import integers, reals, shares, texts
from entangle.runs.tables import described, number
from entangle.seeding import numpy_rng
from entangle.stats.edges import N_BINS, SAVED_FOLD, signed_edges
from entangle.stats.intervals import percentiles, resampled_means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from entangle.results.difference import Difference
    from entangle.stats.sketch import SketchResult


N_SAVED = N_BINS // SAVED_FOLD


@dataclass(frozen=True, eq=False)
class LayerHistograms:
    """Counts over bins that are fine near each neuron's median and wider towards the tails."""

    counts: np.ndarray
    """int32, shape (neurons, bins): tokens in each bin; outer bins that are empty for all neurons
    of the layer are left out."""
    first_bin: int
    """Index of the first column among the bins of `edges`."""
    location: np.ndarray
    """float64, shape (neurons,): centre of the bins, in the neuron's own units."""
    scale: np.ndarray
    """float64, shape (neurons,): unit of the bins, in the neuron's own units."""
    low: np.ndarray
    """float64, shape (neurons,): smallest output, in the neuron's own units."""
    high: np.ndarray
    """float64, shape (neurons,): largest output, in the neuron's own units."""
    wd_without: np.ndarray | None = None
    """float32, shape (groups, neurons): WD without each group of sequences, NaN where it is not
    known; None in results of earlier versions."""

    @classmethod
    def from_sketch(cls, sketch: "SketchResult") -> "LayerHistograms":
        """Leave out the bins of a sketch that are empty for all neurons, at both ends."""
        counts = sketch.counts.numpy()
        used = np.flatnonzero(counts.max(0))
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        return cls(
            counts=counts[:, first : last + 1].copy(),
            first_bin=sketch.first_bin + first,
            location=sketch.location.numpy(),
            scale=sketch.scale.numpy(),
            low=sketch.low.numpy(),
            high=sketch.high.numpy(),
            wd_without=sketch.wd_without.numpy().astype(np.float32),
        )

    @classmethod
    def of_layers(cls, sketch: "SketchResult", used: Sequence[slice]) -> "list[LayerHistograms]":
        """Split what is known of layers of one shape, one's neurons after the other's.

        ``used`` are the columns of the sketch's ``counts`` that hold outputs of each layer.
        """
        counts = sketch.counts.clone() if sketch.counts.is_pinned() else sketch.counts
        without = sketch.wd_without.numpy().astype(np.float32)
        width, found = len(counts) // len(used), list[LayerHistograms]()
        for i, columns in enumerate(used):
            own = slice(i * width, (i + 1) * width)
            one = cls(
                counts=counts[own, columns].numpy(),
                first_bin=sketch.first_bin + columns.start,
                location=sketch.location[own].numpy(),
                scale=sketch.scale[own].numpy(),
                low=sketch.low[own].numpy(),
                high=sketch.high[own].numpy(),
                wd_without=without[:, own],
            )
            found.append(one)
        return found

    def fault(self, n_neurons: int) -> str | None:
        """Return what is no histogram of so many neurons, None if all is well."""
        bins_there = self.counts.shape[1] if self.counts.ndim == 2 else 0
        if self.counts.shape != (n_neurons, bins_there) or self.counts.dtype != np.int32:
            got = f"{self.counts.dtype} of shape {self.counts.shape}"
            return f"must be int32 for {n_neurons} neurons; got {got}"
        if not isinstance(self.first_bin, int) or not 0 <= self.first_bin <= N_SAVED - bins_there:
            return f"begin at a bin in [0, {N_SAVED - bins_there}]; got {self.first_bin!r}"
        if self.counts.size and self.counts.min() < 0:
            return "hold negative counts"
        for name in ("location", "scale", "low", "high"):
            values = getattr(self, name)
            if values.shape != (n_neurons,) or values.dtype != np.float64:
                return (
                    f"need a float64 {name!r} a neuron; got {values.dtype} of shape {values.shape}"
                )
        without = self.wd_without
        if without is not None and (
            without.dtype != np.float32 or without.ndim != 2 or without.shape[1] != n_neurons
        ):
            got = f"{without.dtype} of shape {without.shape}"
            return f"need float32 'wd_without' of {n_neurons} neurons; got {got}"
        return None

    def neuron(self, index: int) -> pd.DataFrame:
        """Return the histogram of one neuron as a frame.

        Parameters
        ----------
        index
            Index of the neuron.

        Returns
        -------
        pandas.DataFrame
            Columns ``left``, ``right`` (bin edges in the neuron's own units, between its smallest
            and largest output) and ``count`` (tokens); empty bins at the ends are left out, and an
            end bin of which less than half lies inside the outputs' range is joined to the next. A
            constant neuron has one bin around its value.
        """
        index = whole("neuron", index, least=0, most=len(self.counts) - 1)
        low, high = self.low[index], self.high[index]
        used = np.flatnonzero(self.counts[index])
        if len(used) == 0:
            return pd.DataFrame({"left": [low], "right": [high], "count": [0]})
        counts = self.counts[index, used[0] : used[-1] + 1]
        first = self.first_bin + used[0]
        edges = signed_edges(SAVED_FOLD)[first : first + len(counts) + 1]
        edges = self.location[index] + self.scale[index] * edges
        if low < high:
            widths = np.diff(edges)
            if first == 0:  # the outermost bins are open
                edges[0] = min(edges[0], low)
            if first + len(counts) == N_SAVED:
                edges[-1] = max(edges[-1], high)
            edges, counts = _trimmed(edges.clip(low, high), counts, widths)
        return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": counts})


def _trimmed(
    edges: np.ndarray, counts: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Join an end bin that was clipped below half its width to the bin beside it.

    A single token in what is left of its bin would otherwise be drawn as a spike.
    """
    wide = np.flatnonzero(np.diff(edges) >= widths / 2)
    if len(wide) == 0:
        return edges[[0, -1]], counts.sum(keepdims=True)
    first, last = wide[0], wide[-1]
    kept = np.concatenate([edges[:1], edges[first + 1 : last + 1], edges[-1:]])
    joined = counts[first : last + 1].copy()
    joined[0] += counts[:first].sum()
    joined[-1] += counts[last + 1 :].sum()
    return kept, joined


KIND = "scores"
_NUMERIC = "Choose a numeric column of the scores."
_ARRAYS = ("counts", "location", "scale", "low", "high")
_OPTIONAL = "wd_without"
_FLAGS = ("", "constant", "nan", "inf", "coarse", "few_tokens")
_SCORES = {
    "model": texts(), "layer": texts(), "block": integers(null=True), "projection": texts(),
    "neuron": integers(), "wd": reals(0), "wd_se": reals(0), "wd_bound": reals(0), "ks": shares(),
    "mean": reals(), "std": reals(0), "skewness": reals(), "excess_kurtosis": reals(),
    "weight_norm": reals(0), "md": reals(0), "n_tokens": integers(), "flag": texts(*_FLAGS),
    **{name: reals(0, optional=True) for name in ("wd_inside", "wd_outside", "wd_control")},
}  # fmt: skip
_LAYERS = {
    "layer": texts(), "block": integers(null=True), "projection": texts(), "n_neurons": integers(),
    "n_tokens": integers(), "method": texts("exact", "sketch"), "null_floor": reals(0),
    "null_floor_high": reals(0), "split_half": reals(-1, 1), "n_pairs": integers(),
    "n_identical_pairs": integers(), "md_rank_agreement_mean": reals(-1, 1),
    "md_rank_agreement_max": reals(-1, 1),
}  # fmt: skip
MOST_LAYERS, BLOCK = 12, 1
"""Figures with a panel a layer show so many layers, of more than these one block (the second, as in
arXiv 2405.15756)."""


@dataclass(frozen=True, eq=False)
class NeuronScores(Result):
    """Scores of the neurons of some layers of one model.

    Its folder holds ``scores.parquet`` and ``layers.parquet`` (the tables), ``scores.safetensors``
    (one vector of WD a layer, float64), ``histograms.safetensors`` and ``manifest.json``.
    """

    KIND, _TITLE = KIND, "Scores of"
    _TABLES = {"scores": _SCORES, "layers": _LAYERS}  # noqa: RUF012
    _FILES = ("scores.safetensors", "histograms.safetensors")

    frame: pd.DataFrame
    """One row a neuron: model, layer, block, projection, neuron, wd, wd_se, wd_bound, ks, mean,
    std, skewness, excess_kurtosis, weight_norm, md, n_tokens, flag ("", constant, nan,
    inf, few_tokens where an expert saw too few, or coarse where a sketch's histogram or the
    rounding of the outputs cannot resolve the WD).
    ``wd_bound`` is the largest error of WD through both. Where routing was measured also
    wd_inside, wd_outside and wd_control (`entangle.scoring.routing.routing_distances`)."""
    layers: pd.DataFrame
    """One row a layer: layer, block, projection, n_neurons, n_tokens, method, null_floor,
    null_floor_high, split_half, n_pairs, n_identical_pairs and the rank agreement of MD with its
    versions normalised by the mean and the maximum of the output distances."""
    histograms: Mapping[str, LayerHistograms] = field(repr=False)
    """Output distributions, by layer name."""
    manifest: Mapping[str, object] = field(repr=False)
    """Model, calibration set, settings, versions, seconds and peak memory."""

    @property
    def special_tokens(self) -> str:
        """The special tokens around the text in words: ``<s> …``, ``none``, ``unknown`` of ids."""
        return special_tokens_of(self.manifest, "calibration")

    def with_settings(self, **settings: object) -> "NeuronScores":
        """Return the same scores with more settings in the manifest."""
        together = {**settings_of(self.manifest), **settings}
        return replace(self, manifest={**self.manifest, "settings": together})

    def top(self, k: int = 20, *, by: str = "wd") -> pd.DataFrame:
        """Return the ``k`` rows with the largest value of column ``by``, flagged rows left out."""
        numeric = self.frame.select_dtypes("number").columns.tolist()
        by = choice("by", by, numeric, kind="column", remedy=_NUMERIC)
        k = whole("k", k, least=1)
        valid = self.frame[self.frame[by].notna()]
        return valid.sort_values(by, ascending=False, kind="stable").head(k)

    def summary(self) -> pd.DataFrame:
        """Return one row a layer.

        Returns
        -------
        pandas.DataFrame
            ``layer``, ``n_neurons``, ``n_tokens``, ``wd_median`` and ``wd_largest`` (σ),
            ``largest`` (the neuron with the largest WD), ``null_floor`` with its upper quantile
            ``null_floor_high`` (σ, what truly Gaussian outputs would score), ``split_half`` (rank
            agreement of WD between two halves of the text), ``md_median``, ``unscored`` (neurons
            without WD).
        """
        by = self.frame.groupby("layer", sort=False)
        scored = self.frame[self.frame["wd"].notna()]
        best = scored.loc[scored.groupby("layer", sort=False)["wd"].idxmax()].set_index("layer")
        columns = ["layer", "n_neurons", "n_tokens", "null_floor", "null_floor_high", "split_half"]
        table = self.layers[columns].set_index("layer")
        table.insert(2, "wd_median", by["wd"].median())
        table.insert(3, "wd_largest", best["wd"])
        table.insert(4, "largest", best["neuron"].astype("Int64"))
        table["md_median"] = by["md"].median()
        table["unscored"] = by["wd"].apply(lambda wd: int(wd.isna().sum()))
        return table.reset_index()

    def routing(self, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Return what the model's own routers do to WD, one row a block and projection.

        Returns
        -------
        pandas.DataFrame
            ``block``, ``projection``, ``experts`` (that saw enough tokens), ``neurons``,
            ``wd_inside`` and ``wd_outside`` (medians, σ), ``drop``: WD on as many tokens of the
            whole text over WD on the expert's own, the geometric mean over an expert's neurons,
            then over experts, so above 1 where routing disentangles; ``low``, ``high``: 95 %,
            experts being resampled; ``control``, ``control_low``, ``control_high``: likewise of two
            draws from the whole text.

        Raises
        ------
        InvalidInput
            If routing was not measured, or no expert saw enough tokens.
        """
        known = self.frame[self.frame.get("wd_inside", pd.Series(np.nan, self.frame.index)) > 0]
        if known.empty:
            raise InvalidInput(
                "these scores hold no WD of experts on other tokens than their own; `entangle "
                "score --proj experts --routing` measures it (on experts of enough tokens)."
            )
        logs = np.log(known[["wd_inside", "wd_outside", "wd_control"]])
        known = known.assign(
            drop=logs["wd_outside"] - logs["wd_inside"],
            control=logs["wd_outside"] - logs["wd_control"],
        )
        rows = []
        for (block, projection), part in known.groupby(["block", "projection"], sort=False):
            row = {"block": block, "projection": projection, "experts": part["layer"].nunique(),
                   "neurons": len(part), "wd_inside": part["wd_inside"].median(),
                   "wd_outside": part["wd_outside"].median()}  # fmt: skip
            for name, prefix in (("drop", ""), ("control", "control_")):
                means = part.groupby("layer", sort=False)[name].mean().to_numpy(np.float64)
                rng = numpy_rng(seed, "routing intervals", f"{block} {projection} {name}")
                drawn = resampled_means(means, np.ones(len(means)), n_boot=n_boot, rng=rng)
                low, high = percentiles(drawn, 0.95)
                row |= {name: np.exp(means.mean()), f"{prefix}low": np.exp(low),
                        f"{prefix}high": np.exp(high)}  # fmt: skip
            rows.append(row)
        return pd.DataFrame(rows)

    def _summed(self) -> pd.DataFrame:
        return self.summary()

    def layer(self, name: "str | Named") -> "NeuronScores":
        """Return the scores of one layer, by its full dotted name."""
        name = self._known(name)
        return NeuronScores(
            frame=self.frame[self.frame["layer"] == name].reset_index(drop=True),
            layers=self.layers[self.layers["layer"] == name].reset_index(drop=True),
            histograms={name: self.histograms[name]},
            manifest=self.manifest,
        )

    def histogram(self, layer: "str | Named", neuron: int) -> pd.DataFrame:
        """Return the output histogram of one neuron: columns left, right, count."""
        return self.histograms[self._known(layer)].neuron(neuron)

    def plot(self, **options: Any) -> "Figure":
        """Draw the distributions of WD by layer (`entangle.plotting.figure_wd_distribution`).

        Of more than 12 layers those of block 1.
        """
        from entangle.plotting import figure_wd_distribution

        few = few_layers(self.frame, options.get("subset"))
        return figure_wd_distribution(few, self.layers, **options)

    def compare_with(self, other: "NeuronScores", **options: Any) -> "Difference":
        """Compare with another run, this one being A; ``options`` are those of `entangle.diff`."""
        from entangle.results.diff import diff

        return diff(self, other, **options)

    def report(self, out: str | os.PathLike[str], **options: Any) -> Any:
        """Write a page about these neurons: one HTML file (`entangle.report.write_report`).

        Parameters
        ----------
        out
            The file.
        options
            As that function takes them: ``runs``, ``neurons``, ``model`` and ``calibration``,
            ``force``.

        Returns
        -------
        entangle.report.Report
            Where it is.
        """
        return import_module("entangle.report").write_report(self, out, **options)

    def write(self, folder: Path) -> None:
        """Write the files of `save` into a folder that exists."""
        vectors = {
            str(name): np.ascontiguousarray(part["wd"].to_numpy(np.float64))
            for name, part in self.frame.groupby("layer", sort=False)
        }
        content = to_safetensors(vectors, {"column": "wd"})
        (folder / "scores.safetensors").write_bytes(content)
        arrays = {
            f"{name}:{key}": np.ascontiguousarray(getattr(histograms, key))
            for name, histograms in self.histograms.items()
            for key in (*_ARRAYS, *((_OPTIONAL,) if histograms.wd_without is not None else ()))
        }
        first = {name: h.first_bin for name, h in self.histograms.items()}
        content = to_safetensors(arrays, {"first_bin": json.dumps(first)})
        (folder / "histograms.safetensors").write_bytes(content)
        super().write(folder)

    def _known(self, layer: "str | Named") -> str:
        name = getattr(layer, "name", layer)
        remedy = "These scores hold no other layers."
        return choice("layer", name, self.histograms, remedy=remedy)

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        flags = self.frame["flag"].value_counts()
        flagged = [f"{count:,} {name}" for name, count in flags.items() if name]
        text = described(self.manifest, "calibration", "source")
        lines = [
            f"{len(self.frame):,} neurons in {len(self.layers):,} layer(s), "
            f"{described(self.manifest, 'calibration', 'n_tokens')} tokens of {text}, "
            f"special tokens: {self.special_tokens}",
            f"WD: median {number(float(self.frame['wd'].median()))} σ, "
            f"largest {number(float(self.frame['wd'].max()))} σ",
            *([f"no score: {', '.join(flagged)}"] if flagged else []),
        ]
        order = self.frame.sort_values("wd", ascending=False, kind="stable", na_position="last")
        columns = ["layer", "neuron", "wd", "wd_se", "ks", "skewness", "excess_kurtosis", "md"]
        if flagged:
            columns.append("flag")
        return lines, order[columns]

    @classmethod
    def _completed(
        cls, folder: Path, fields: dict[str, Any], _manifest: Mapping[str, object]
    ) -> dict[str, Any]:
        return fields | {"histograms": _read_histograms(folder / cls._FILES[1])}

    def _fault(self) -> str | None:
        frame, layers, manifest = self.frame, self.layers, self.manifest
        names = layers["layer"].tolist()
        listed = frame["layer"].drop_duplicates().tolist()
        if listed != names or set(self.histograms) != set(names):
            return "its files do not hold the same layers"
        strange, model = strange_layer(names, manifest), manifest.get("model")
        if strange is not None:
            return strange
        name = model.get("name") if isinstance(model, Mapping) else None
        others = frame.loc[frame["model"] != name, "model"] if isinstance(name, str) else frame[:0]
        if len(others):
            return f"its scores are of the model {others.iloc[0]!r}, its manifest of {name!r}"
        sizes = layers["n_neurons"].tolist()
        if frame["neuron"].tolist() != [neuron for size in sizes for neuron in range(size)]:
            return "its neurons are not all there, once and in order"
        for column in ("block", "projection", "n_tokens"):
            once = frame.drop_duplicates("layer")[column].reset_index(drop=True)
            same = (once == layers[column]) | (once.isna() & layers[column].isna())
            if not same.all() or frame.groupby("layer")[column].nunique(dropna=False).max() > 1:
                return f"its tables differ in {column!r}"
        for name, size in zip(names, sizes, strict=True):
            fault = self.histograms[name].fault(size)
            if fault is not None:
                return f"the histograms of {name!r} {fault}"
        return None


def few_layers(frame: pd.DataFrame, wanted: object = None) -> pd.DataFrame:
    """Return the layers that are ``wanted`` by name, if any; else few.

    These are all of them, or else those of block 1, or else the first.
    """
    if wanted is not None:
        from entangle.plotting.outputs import layer_names

        layers, asked = frame.drop_duplicates("layer"), {*names("subset", wanted)}
        named = [str(row["layer"]) for _, row in layers.iterrows() if asked & {*layer_names(row)}]
        if named:
            return frame[frame["layer"].isin(named)]
    if frame["layer"].nunique() <= MOST_LAYERS:
        return frame
    rows: pd.DataFrame = frame[(frame["block"] == BLOCK).fillna(value=False)]
    return rows if 1 <= rows["layer"].nunique() <= MOST_LAYERS else first_layer(frame)


def first_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a frame's first layer."""
    rows: pd.DataFrame = frame[frame["layer"] == frame["layer"].iloc[0]]
    return rows


def load_scores(path: str | os.PathLike[str]) -> NeuronScores:
    """Load scores that `NeuronScores.save` wrote; errors as `Result.load`."""
    return NeuronScores.load(path)


def _read_histograms(path: Path) -> dict[str, LayerHistograms]:
    with decoding(path, remedy="make the result anew"), safe_open(path, framework="np") as file:
        first, there = json.loads((file.metadata() or {})["first_bin"]), set(file.keys())
        return {
            name: LayerHistograms(
                first_bin=first_bin,
                **{
                    key: file.get_tensor(f"{name}:{key}")
                    for key in (*_ARRAYS, _OPTIONAL)
                    if key != _OPTIONAL or f"{name}:{key}" in there
                },
            )
            for name, first_bin in first.items()
        }
