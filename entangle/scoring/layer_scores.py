"""What scoring one layer yields, whichever method measured it.

From measured layers to tables: one row a neuron, one row a layer.

Several layers under way at the same time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from entangle.kernels import weights
from entangle.kernels.dispatch import dispatch, on_gpu
from entangle.memory import by_device, gpus_among
from entangle.models.layers import Layer
from entangle.precision import row_parts
from entangle.results.scores import LayerHistograms
from entangle.stats.bins import to_host
from entangle.stats.mapping_difficulty import MappingDifficulty, OutputNorm
from entangle.stats.sketch import SketchResult
from entangle.stats.wasserstein import (
    OutputError,
    ShapeStatistics,
    judged,
    null_floor,
    wd_error,
)


@dataclass(frozen=True, eq=False)
class MeasuredLayer:
    """Statistics of one layer, before they become rows of tables."""

    layer: Layer
    """The layer measured."""
    shape: ShapeStatistics
    """Distances and moments of every neuron."""
    sketch: SketchResult
    """Standard errors, halves and histograms."""
    pairs: MappingDifficulty | None
    """Pair statistics, None if they were not asked for."""
    wd_bound: Float[Tensor, " neurons"]
    """Largest possible error of WD through the method, in standard deviations, without the
    rounding of the outputs; 0 if exact."""
    method: str
    """``exact`` or ``sketch``."""
    rounding: OutputError
    """Rounding of the outputs that were measured."""

    def judged(self) -> "MeasuredLayer":
        """Hold the statistics against the rounding of the outputs.

        Neurons whose outputs vary by no more than it are constant, and have no WD, standard error
        or mapping difficulty; the bound of the others' WD grows by what it can do to them.
        """
        shape = judged(self.shape, self.rounding.bound)
        bad = shape.constant | shape.nan | shape.inf
        bound = self.wd_bound + wd_error(self.rounding.bound, shape.std)
        pairs = self.pairs
        if pairs is not None:
            pairs = replace(pairs, slope=pairs.slope.masked_fill(bad, math.nan))
        sketch = replace(
            self.sketch,
            shape=shape,
            wd_se=self.sketch.wd_se.masked_fill(bad, math.nan),
            wd_halves=self.sketch.wd_halves.masked_fill(bad, math.nan),
            wd_without=self.sketch.wd_without.masked_fill(bad, math.nan),
        )
        return replace(self, shape=shape, sketch=sketch, pairs=pairs, wd_bound=bound)


Vector = npt.NDArray[np.float64]
COARSE = 0.05
"""Largest possible error of a WD, in σ, above which histogram or outputs count as too coarse."""

MIN_TOKENS = 512
"""Tokens that an expert must see for scores of its neurons, unless another number is asked for."""

_CACHED = 2**19
"""Weights to look at together on a CPU."""

_FLAGS = ("", "nan", "inf", "constant", "coarse")
_SCORES = ("wd", "wd_se", "wd_bound", "ks", "skewness", "excess_kurtosis", "md")
_NUMBERS = (
    "wd", "wd_se", "wd_bound", "ks", "mean", "std", "skewness", "excess_kurtosis", "weight_norm",
    "md",
)  # fmt: skip
_MEASURED = tuple(name for name in _NUMBERS if name != "weight_norm")
_NORMS: tuple[OutputNorm, ...] = ("median", "mean", "max")


@dataclass(frozen=True, eq=False)
class LayerSummary:
    """What one layer adds to the tables."""

    layer: Layer
    """The layer measured."""
    n_tokens: int
    """Tokens it was measured on."""
    numbers: dict[str, npt.NDArray[np.generic]]
    """Columns of the scores that are numbers, (neurons,), and the index of the flag."""
    row: dict[str, object]
    """Its row of the table of layers."""
    histograms: LayerHistograms
    """Output distributions, in the form that is saved."""
    norms: torch.Tensor | None = None
    """Euclidean norm of every weight row, (neurons,), float64, on the CPU, where it was measured
    while the weight was there."""


def summarise(measured: MeasuredLayer, norms: torch.Tensor | None = None) -> LayerSummary:
    """Summarise a layer; what lies on a GPU is left behind."""
    measured = measured.judged()
    return LayerSummary(
        layer=measured.layer,
        n_tokens=measured.sketch.n_tokens,
        numbers=_numbers(measured),
        row=_row(measured),
        histograms=LayerHistograms.from_sketch(measured.sketch),
        norms=norms,
    )


def _row(measured: MeasuredLayer) -> dict[str, object]:
    half = rank_correlation(*measured.sketch.wd_halves.numpy())
    row = _layer_row(measured.layer, measured.sketch.n_tokens, measured.method, half)
    if measured.pairs is None:
        return row
    return row | _agreement(measured.pairs, measured.rounding.typical)


def summarise_together(
    measured: MeasuredLayer,
    layers: Sequence[Layer],
    n_tokens: Sequence[int],
    pairs: Sequence[MappingDifficulty | None],
    used: Sequence[slice],
    norms: torch.Tensor | None = None,
) -> list[LayerSummary]:
    """Summarise layers of one shape that were measured as one, one's neurons after the other's.

    Parameters
    ----------
    measured
        All their neurons; of the first layer, and without pairs.
    layers, n_tokens, pairs
        Of each layer.
    used
        Columns of the sketch's counts that hold outputs of each layer.
    norms
        As in `LayerSummary`, of all neurons.
    """
    measured, found = measured.judged(), list[LayerSummary]()
    numbers, width = _numbers(measured), layers[0].out_features
    histograms = LayerHistograms.of_layers(measured.sketch, used)
    halves = measured.sketch.wd_halves.unflatten(1, (-1, width))
    split = half_correlations(halves.to(layers[0].device))
    for place, (layer, n, difficulty) in enumerate(zip(layers, n_tokens, pairs, strict=True)):
        own = slice(place * width, (place + 1) * width)
        columns = {name: array[own] for name, array in numbers.items()}
        row = _layer_row(layer, n, measured.method, split[place])
        if difficulty is not None:
            shape, noise = _part(measured.shape, own), measured.rounding.typical[own]
            bad = shape.constant | shape.nan | shape.inf
            difficulty = replace(difficulty, slope=difficulty.slope.masked_fill(bad, math.nan))
            columns["md"] = np.where(columns["flag"] == 0, difficulty.md(noise=noise), np.nan)
            row |= _agreement(difficulty, noise)
        own_norms = None if norms is None else norms[own]
        found.append(LayerSummary(layer, n, columns, row, histograms[place], own_norms))
    return found


Part = TypeVar("Part", SketchResult, ShapeStatistics, OutputError)


def _part(whole: Part, neurons: slice) -> Part:
    """Return some of the neurons of statistics, whose last axis but that of histograms they are."""
    found: dict[str, object] = {}
    for name in (f.name for f in fields(whole)):
        value = getattr(whole, name)
        if isinstance(value, torch.Tensor):
            found[name] = value[neurons] if name == "counts" else value[..., neurons]
        elif isinstance(value, ShapeStatistics):
            found[name] = _part(value, neurons)
    return replace(whole, **found)  # type: ignore[arg-type]


def neuron_table(layers: Sequence[LayerSummary], model: str) -> pd.DataFrame:
    """Return the table of scores, one row a neuron; ``model`` is the model's name."""
    sizes = [one.layer.out_features for one in layers]
    number = np.repeat(np.arange(len(layers)), sizes)
    columns = {name: np.concatenate([one.numbers[name] for one in layers]) for name in _MEASURED}
    norms = to_host([weight_norms(one.layer) if one.norms is None else one.norms for one in layers])
    columns["weight_norm"] = torch.cat(norms).numpy()
    block = pd.array([one.layer.block for one in layers], dtype="Int64")
    return pd.DataFrame(
        {
            "model": _strings([model], np.zeros_like(number)),
            "layer": _strings([one.layer.name for one in layers], number),
            "block": block.take(number),
            "projection": _strings([one.layer.projection for one in layers], number),
            "neuron": np.concatenate([np.arange(size) for size in sizes]),
            **{name: columns[name] for name in _NUMBERS},
            "n_tokens": np.repeat([one.n_tokens for one in layers], sizes),
            "flag": _strings(_FLAGS, np.concatenate([one.numbers["flag"] for one in layers])),
        }
    )


def without_few(
    frame: pd.DataFrame, layers: pd.DataFrame, *, n_tokens: int, least: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Take the scores of neurons of experts that saw too few tokens, and flag them ``few_tokens``.

    Parameters
    ----------
    frame, layers
        From `neuron_table` and `layer_table`.
    n_tokens
        Tokens of the text; a layer that saw fewer is (part of) an expert.
    least
        Tokens that an expert must have seen.
    """
    few = (frame["n_tokens"] < min(least, n_tokens)) & ~frame["flag"].isin(["nan", "inf"])
    if not few.any():
        return frame, layers
    frame, layers = frame.copy(), layers.copy()
    frame.loc[few, list(_SCORES)] = np.nan
    frame.loc[few, "flag"] = "few_tokens"
    layers.loc[layers["n_tokens"] < min(least, n_tokens), "split_half"] = np.nan
    return frame, layers


def weight_norms(layer: Layer) -> torch.Tensor:
    """Return the Euclidean norm of every weight row, (neurons,), float64."""
    return _row_norms(layer.weight)


def _norms_on_cpu(weight: Tensor) -> Tensor:
    return weights.squares(weight).sqrt()


@dispatch(_norms_on_cpu, where=weights.fits)
def _row_norms(weight: Tensor) -> Tensor:
    at_once = by_device(weight.device, cpu=_CACHED // weight.shape[1], gpu=weight.shape[0])
    parts = row_parts(weight.shape[0], at_once)
    return torch.cat([weight[part].float().norm(dim=1) for part in parts]).double()


def layer_table(layers: Sequence[LayerSummary]) -> pd.DataFrame:
    """Return the table of layers, one row a layer."""
    table = pd.DataFrame([one.row for one in layers])
    return table.astype({"block": "Int64", "layer": "str", "projection": "str", "method": "str"})


def _numbers(measured: MeasuredLayer) -> dict[str, npt.NDArray[np.generic]]:
    """Return the columns of one layer's neurons that are numbers, and the index of the flag."""
    shape = measured.shape
    md = np.full(len(shape.wd), np.nan)
    flags = np.select([shape.nan.numpy(), shape.inf.numpy(), shape.constant.numpy()], [1, 2, 3], 0)
    coarse = (flags == 0) & (measured.wd_bound.numpy() > COARSE)
    flags[coarse] = 4
    hidden = np.where(coarse, np.nan, 1.0)
    rounded = wd_error(measured.rounding.bound, shape.std).numpy() > COARSE
    unknown = np.where(rounded, np.nan, 1.0)  # a coarse histogram has exact moments all the same
    if measured.pairs is not None:
        difficulty = measured.pairs.md(noise=measured.rounding.typical)
        md = np.where(flags == 0, difficulty.numpy(), np.nan)
    return {
        "wd": shape.wd.numpy() * hidden,
        "wd_se": measured.sketch.wd_se.numpy() * hidden,
        "wd_bound": measured.wd_bound.numpy(),
        "ks": shape.ks.numpy() * hidden,
        "mean": shape.mean.numpy(),
        "std": shape.std.numpy(),
        "skewness": shape.skewness.numpy() * unknown,
        "excess_kurtosis": shape.excess_kurtosis.numpy() * unknown,
        "md": md,
        "flag": flags,
    }


def _strings(values: Sequence[str], index: npt.NDArray[np.int64]) -> pd.Series:
    """Return ``values[index]`` as a column of strings."""
    return pd.Series(pd.array(list(values), dtype="str").take(index))


def _layer_row(layer: Layer, n_tokens: int, method: str, split_half: float) -> dict[str, object]:
    """Return what the table of layers says of a layer without pairs."""
    floor, floor_high = null_floor(n_tokens)
    row: dict[str, object] = {
        "layer": layer.name,
        "block": layer.block,
        "projection": layer.projection,
        "n_neurons": layer.out_features,
        "n_tokens": n_tokens,
        "method": method,
        "null_floor": floor,
        "null_floor_high": floor_high,
        "split_half": split_half,
        "n_pairs": 0,
        "n_identical_pairs": 0,
    }
    return row | {f"md_rank_agreement_{norm}": float("nan") for norm in _NORMS[1:]}


def _agreement(pairs: MappingDifficulty, noise: Tensor) -> dict[str, object]:
    """Return what it says of the pairs."""
    found = {norm: pairs.md(output_norm=norm, noise=noise).numpy() for norm in _NORMS}
    return {"n_pairs": pairs.n_pairs, "n_identical_pairs": pairs.n_identical} | {
        f"md_rank_agreement_{norm}": rank_correlation(found["median"], found[norm])
        for norm in _NORMS[1:]
    }


def _correlations_on_gpu(halves: Tensor) -> list[float]:
    order = halves.argsort(-1)
    ordered = halves.gather(-1, order)
    numbers = torch.arange(halves.shape[-1], dtype=halves.dtype, device=halves.device)
    ranks = torch.empty_like(halves).scatter_(-1, order, numbers.expand_as(halves))
    centred = ranks - (halves.shape[-1] - 1) / 2
    found = (centred[0] * centred[1]).sum(-1) / centred[0].square().sum(-1)
    tied = (ordered[..., 1:] == ordered[..., :-1]).any(-1) | ~halves.isfinite().all(-1)
    values, again = found.tolist(), (tied.any(0) | (halves.shape[-1] < 3)).tolist()
    return [
        rank_correlation(*halves[:, i].cpu().numpy()) if again[i] else values[i]
        for i in range(len(values))
    ]


@dispatch(_correlations_on_gpu, where=on_gpu)
def half_correlations(halves: Float[Tensor, "halves=2 layers neurons"]) -> list[float]:
    """Return Spearman's coefficient of the two halves' WD over the neurons of every layer."""
    return [rank_correlation(*halves[:, i].numpy()) for i in range(halves.shape[1])]


def rank_correlation(first: Vector, second: Vector) -> float:
    """Return Spearman's coefficient over the finite pairs; NaN below three or without variation."""
    good = np.isfinite(first) & np.isfinite(second)
    first, second = first[good], second[good]
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    ranks = np.column_stack([_ranks(first), _ranks(second)])
    return float(np.asarray(np.corrcoef(ranks, rowvar=False))[1, 0])


def _ranks(values: Vector) -> Vector:
    """Return the ranks from 1, ties sharing their mean (11,008 values: 0.6 ms, SciPy 1.2 ms)."""
    order = np.argsort(values)
    ordered = values[order]
    if (ordered[1:] == ordered[:-1]).any():
        return np.asarray(rankdata(values))
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    return ranks


ON_GPU = 3
"""Layers under way at the same time on a GPU, so that it need not wait for Python."""

Found = TypeVar("Found")


def how_many(layers: Sequence[Layer]) -> int:
    """Return how many layers to have under way: several if all are on GPUs, else one."""
    on_gpus = len(gpus_among(layer.device for layer in layers))
    return ON_GPU if layers and on_gpus == len(layers) else 1


@runtime_checkable
class Placed(Protocol):
    """What lies on a device, such as a layer."""

    @property
    def device(self) -> torch.device:
        """The device."""


Thing = TypeVar("Thing", bound=Placed)


def mapped(
    work: Callable[[Thing], Found], layers: Sequence[Thing], *, at_once: int
) -> Iterator[Found]:
    """Yield the result of every layer in order; on GPUs each on the caller's current stream."""
    if at_once == 1:
        yield from map(work, layers)
        return
    devices = set(gpus_among(layer.device for layer in layers))
    streams = {device: torch.cuda.current_stream(device) for device in devices}

    def on_stream(layer: Thing) -> Found:
        stream = streams.get(layer.device)
        with torch.no_grad(), torch.cuda.stream(stream):
            if stream is not None:
                stream.query()  # gives a thread the CUDA context that cuBLAS asks for
            return work(layer)

    with ThreadPoolExecutor(at_once) as pool:
        tasks = [pool.submit(on_stream, layer) for layer in layers]
        try:
            yield from (task.result() for task in tasks)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
