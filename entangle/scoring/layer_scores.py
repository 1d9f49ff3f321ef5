"""What scoring one layer yields, whichever method measured it.

From measured layers to tables: one row a neuron, one row a layer.

The outputs that a sketch counts: the module's own, finer ones where their dtype is too coarse.

A bfloat16 number near 128 is a whole number: outputs with a bias of that size and a spread of 1 are
hardly more than their rounding. Such neurons' outputs are computed again from the layer's inputs,
in float32.

Several layers under way at the same time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from scipy.stats import rankdata
from torch import Tensor

from entangle.kernels import weights
from entangle.kernels.dispatch import dispatch
from entangle.memory import by_device, gpus_among
from entangle.models.layers import Layer
from entangle.precision import accumulator_dtype, row_parts
from entangle.ranks import Ranks
from entangle.recording.hooks import SeenTensor
from entangle.results.scores import LayerHistograms
from entangle.stats.bins import ToAdd, to_host
from entangle.stats.mapping_difficulty import MappingDifficulty, OutputNorm
from entangle.stats.sketch import SketchResult
from entangle.stats.wasserstein import (
    FeatureSizes,
    OutputError,
    ShapeStatistics,
    feature_squares,
    judged,
    null_floor,
    output_error,
    reach,
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
        row=_layer_row(measured),
        histograms=LayerHistograms.from_sketch(measured.sketch),
        norms=norms,
    )


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
    layer, shape = measured.layer, measured.shape
    md = np.full(layer.out_features, np.nan)
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


def _layer_row(measured: MeasuredLayer) -> dict[str, object]:
    layer, pairs, n_tokens = measured.layer, measured.pairs, measured.sketch.n_tokens
    floor, floor_high = null_floor(n_tokens)
    row: dict[str, object] = {
        "layer": layer.name,
        "block": layer.block,
        "projection": layer.projection,
        "n_neurons": layer.out_features,
        "n_tokens": n_tokens,
        "method": measured.method,
        "null_floor": floor,
        "null_floor_high": floor_high,
        "split_half": rank_correlation(*measured.sketch.wd_halves.numpy()),
        "n_pairs": 0 if pairs is None else pairs.n_pairs,
        "n_identical_pairs": 0 if pairs is None else pairs.n_identical,
    }
    found = {}
    if pairs is not None:
        noise = measured.rounding.typical
        found = {norm: pairs.md(output_norm=norm, noise=noise).numpy() for norm in _NORMS}
    for norm in _NORMS[1:]:
        agreement = rank_correlation(found["median"], found[norm]) if found else float("nan")
        row[f"md_rank_agreement_{norm}"] = agreement
    return row


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


FINE = 0.0125
"""Largest error of a WD by rounding, in σ, of which the module's own outputs are counted."""

_AGREE = 2.0


class SharedSquares:
    """The squares of the last input, which neighbouring layers share."""

    def __init__(self) -> None:
        self._last: SeenTensor | None = None
        self._found = torch.empty(0)

    def of(self, inputs: Float[Tensor, "*tokens in_features"]) -> Float[Tensor, " in_features"]:
        """Return the sum over tokens of every input's square."""
        if self._last is None or not self._last.same_as(inputs):
            self._found = feature_squares(inputs.flatten(0, -2))
            self._last = SeenTensor.of(inputs)
        return self._found

    def forget(self) -> None:
        """Let go of the last input, before its memory is used for another."""
        self._last = None


class FinerOutputs:
    """What is counted of one layer's outputs, and how far it is rounded.

    Parameters
    ----------
    layer
        Whose outputs come.
    squares
        Shared by the layers of a model.

    Notes
    -----
    The first tokens that come decide which neurons are computed again: those whose 16-bit outputs'
    rounding may change WD by more than `FINE`, if the module's outputs are the sums of products of
    its weight up to rounding. Where they are not, its own outputs stay what is measured.
    """

    def __init__(self, layer: Layer, squares: SharedSquares, *, split: bool = False) -> None:
        self._layer, self._squares, self._split = layer, squares, split
        self._sizes = FeatureSizes(split=split)
        self._dtype = torch.float32
        self._again: Int64[Tensor, " coarse"] | None = None
        self._kept: tuple[Tensor, Tensor | None] | None = None

    @property
    def again(self) -> Bool[Tensor, " neurons"] | None:
        """Which neurons are computed again; None before the first tokens, or where none may be."""
        if self._again is None:
            return None
        found = torch.zeros(self._layer.out_features, dtype=torch.bool, device=self._again.device)
        found[self._again] = True
        return found

    def decided(self, again: Bool[Tensor, " neurons"] | None) -> "FinerOutputs":
        """Return one that has seen nothing, and computes these neurons again."""
        made = FinerOutputs(self._layer, self._squares, split=self._split)
        if again is not None:
            made._again = again.nonzero()[:, 0]
        return made

    def known(self) -> Sequence[Any]:
        """As `entangle.stats.sketch.OutputSketch.known`."""
        name = str(self._dtype).removeprefix("torch.") if self._sizes.n_tokens else None
        return [name, self._sizes.known()]

    def pool(self, ranks: Ranks, found: Sequence[Sequence[Any]], *, to: int) -> ToAdd:
        """As `entangle.stats.sketch.OutputSketch.pool`."""
        known = next((name for name, _ in found if name is not None), "float32")
        self._dtype = getattr(torch, known)
        device = self._layer.device
        like = torch.zeros(self._layer.in_features, dtype=accumulator_dtype(device), device=device)
        return self._sizes.pool(ranks, [sizes for _, sizes in found], like, to=to)

    def of(
        self,
        inputs: Float[Tensor, "*tokens in_features"],
        outputs: Float[Tensor, "*tokens out_features"],
    ) -> Float[Tensor, "rows out_features"]:
        """Return the rows to count, in the module's dtype or float32."""
        rows = outputs.flatten(0, -2)
        if rows.shape[0] == 0:
            return rows
        self._sizes.add(self._squares.of(inputs), rows.shape[0])
        self._dtype = rows.dtype
        if rows.element_size() > 2 or not self._has_products(inputs, rows):
            return rows
        if self._again is None:
            self._again = self._coarse(inputs, rows)
        if not len(self._again):
            return rows
        finer = rows.float()
        finer[:, self._again] = self._product(inputs, self._again)
        return finer

    def keep(self) -> None:
        """Take from the weight what `error` needs of it; no tokens come after this."""
        self._kept = self._of_weight()

    def error(self, shape: ShapeStatistics, location: Float[Tensor, " neurons"]) -> OutputError:
        """Return how far what was counted is rounded.

        Parameters
        ----------
        shape
            Of what was counted, on the CPU.
        location
            About the median of what was counted.
        """
        kept = self._of_weight() if self._kept is None else self._kept
        own = self._error(shape.mean, shape.std, location, self._dtype, kept)
        if self._again is None or not len(self._again):
            return own
        finer = self._error(shape.mean, shape.std, location, torch.float32, kept, own=False)
        again = torch.zeros(len(location), dtype=torch.bool)
        again[self._again.cpu()] = True
        return OutputError(
            bound=finer.bound.where(again, own.bound),
            typical=finer.typical.where(again, own.typical),
        )

    def _error(
        self,
        mean: Tensor,
        std: Tensor,
        location: Tensor,
        dtype: torch.dtype,
        of_weight: tuple[Tensor, Tensor | None],
        *,
        own: bool = True,
    ) -> OutputError:
        """Return the error of the module's ``own`` outputs, or of `_product`."""
        reached, bias = of_weight
        return output_error(
            mean, std, location,
            reach=reached if bias is None or not own else reached + bias.abs(),
            in_features=len(self._sizes.rms()),
            dtype=dtype,
            bias=bias,
        )  # fmt: skip

    def _of_weight(self) -> tuple[Tensor, Tensor | None]:
        """Return how far the weight's sums reach (0 where it gives none), and the bias, float64."""
        weight, bias, sizes = self._layer.weight, self._layer.bias, self._sizes.rms()
        rows = self._layer.out_features
        known = weight.is_floating_point() and weight.shape == (rows, len(sizes))
        reached = reach(weight, sizes) if known else torch.zeros(rows, dtype=torch.float64)
        return reached, None if bias is None else bias.cpu().double()

    def _has_products(self, inputs: Tensor, rows: Tensor) -> bool:
        weight = self._layer.weight
        return weight.is_floating_point() and weight.shape == (rows.shape[1], inputs.shape[-1])

    def _coarse(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return the neurons to compute again, by the first rows of outputs."""
        mean, std = _mean_and_std(rows)
        own = self._error(mean, std, mean, rows.dtype, self._of_weight()).bound
        again = (wd_error(own, std) > FINE).nonzero()[:, 0].to(rows.device)
        limit = own.to(rows.device)[again].float()
        difference = (self._product(inputs, again) - rows[:, again].float()).div_(limit)
        distance = torch.linalg.vector_norm(difference, dim=0) / rows.shape[0] ** 0.5
        return again[distance <= _AGREE]

    def _product(self, inputs: Tensor, neurons: Tensor) -> Tensor:
        """Compute the outputs of some neurons in float32, (rows, neurons)."""
        weight, bias = self._layer.weight[neurons].float(), self._layer.bias
        product = inputs.flatten(0, -2).float() @ weight.T
        return product if bias is None else product.add_(bias[neurons].float())


def _mean_and_std(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every column, float64, on the CPU."""
    values = rows.float()
    mean = values.mean(0)
    std = (values - mean).square_().mean(0).sqrt_().cpu().double()
    mean = mean.cpu().double()
    large = (~std.isfinite()).nonzero()[:, 0]  # squares may overflow float32
    if len(large):
        wide = rows[:, large.to(rows.device)].cpu().double()
        std[large], mean[large] = torch.std_mean(wide, 0, correction=0)
    return mean, std


ON_GPU = 3
"""Layers under way at the same time on a GPU, so that it need not wait for Python."""

Found = TypeVar("Found")


def how_many(layers: Sequence[Layer]) -> int:
    """Return how many layers to have under way: several if all are on GPUs, else one."""
    on_gpus = len(gpus_among(layer.device for layer in layers))
    return ON_GPU if layers and on_gpus == len(layers) else 1


def mapped(
    work: Callable[[Layer], Found], layers: Sequence[Layer], *, at_once: int
) -> Iterator[Found]:
    """Yield the result of every layer in order; on GPUs each on the caller's current stream."""
    if at_once == 1:
        yield from map(work, layers)
        return
    devices = set(gpus_among(layer.device for layer in layers))
    streams = {device: torch.cuda.current_stream(device) for device in devices}

    def on_stream(layer: Layer) -> Found:
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
