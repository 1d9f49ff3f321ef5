"""The modes of a distribution: peaks of a smooth density, parted at its valleys.

A smooth density of many values on a grid that widens towards the tails.

Tokens as readable text: what pieces stand for, with nothing invisible or broken.

The modes of neurons, and the tokens and contexts that fall into each.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32, Float64, Int64
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entangle.checks import different, shown, whole, wholes
from entangle.errors import InvalidInput
from entangle.models.blocks import evaluates
from entangle.models.layers import Layer, LayerSpec, find_layers
from entangle.models.loading import AnyModel, as_language_model
from entangle.precision import full_precision
from entangle.recording.recorder import Recorded, Recorder, of_one_group, told
from entangle.runs.progress import ProgressBar
from entangle.seeding import check_seed, numpy_rng
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet, SeenTokens, Tokens
from entangle.texts.given import Source
from entangle.texts.words import TokenText

BANDWIDTH = 0.9
"""Silverman's factor: the bandwidth at the centre is 0.9 · scale · n^(−1/5)."""
LINEAR = 2.0
"""The bandwidth grows beyond so many scales from the median."""

_NORMAL_IQR = 1.3489795003921634
_NORMAL_TENTH = 0.25132269371  # 2 Φ⁻¹(0.55)
_NARROWEST = 4
_ROUGHNESS = 1 / (2 * math.sqrt(math.pi))  # ∫K² of the Gaussian kernel
_CELLS = 16  # a bandwidth
_MARGIN = 5  # bandwidths beyond the outermost values
_MOST_CELLS = 2**18


@dataclass(frozen=True, eq=False)
class Density:
    """A kernel density estimate at the points of a grid."""

    x: Float64[np.ndarray, " cells"]
    """Grid points in ascending order, in the values' units."""
    height: Float64[np.ndarray, " cells"]
    """Density, per unit of the values."""
    noise: Float64[np.ndarray, " cells"]
    """Standard deviation of the square root of the density, were the values independent."""


def kernel_density(ordered: Float64[np.ndarray, " values"]) -> Density:
    """Estimate the density of values that are not all equal.

    The values are mapped by ``u = asinh((y − median) / (2 · scale))``, counted in cells of a
    sixteenth of a bandwidth, smoothed by a Gaussian, and mapped back. In the values' units the
    bandwidth is therefore ``0.9 · scale · n^(−1/5)`` (Silverman's rule) at the median and grows in
    proportion to the distance from it in the tails, where values lie thin.

    ``scale`` is the least of the standard deviation, the interquartile range / 1.349 and the length
    of the shortest interval with a tenth of the values / 0.2513, all of which are σ of a Gaussian;
    the last one, which sees the width of a single group among several, counts as a quarter of the
    second at least. It is the standard deviation where half of the values are equal.

    Parameters
    ----------
    ordered
        Finite values in ascending order, at least two of them different.

    References
    ----------
    B. W. Silverman, Density Estimation for Statistics and Data Analysis, 1986, eq. 3.31. The
    variance of the root of the density, ``∫K² / (4 n h)``, follows from that of the density,
    ``f ∫K² / (n h)``.
    """
    n = len(ordered)
    median = np.quantile(ordered, 0.5)
    unit = LINEAR * bandwidth_scale(ordered)
    u = np.arcsinh((ordered - median) / unit)
    width = BANDWIDTH / LINEAR * n**-0.2
    cell = max(width / _CELLS, (u[-1] - u[0]) / _MOST_CELLS)
    start = u[0] - _MARGIN * width
    cells = math.ceil((u[-1] + _MARGIN * width - start) / cell)
    counts = np.bincount(((u - start) / cell).astype(np.int64), minlength=cells).astype(np.float64)
    smooth = gaussian_filter1d(counts, width / cell, mode="constant")
    grid = start + (np.arange(len(counts)) + 0.5) * cell
    stretch = unit * np.cosh(grid)  # of the values' axis
    return Density(
        x=median + unit * np.sinh(grid),
        height=smooth / (n * cell * stretch),
        noise=np.sqrt(_ROUGHNESS / (4 * n * width * stretch)),
    )


def bandwidth_scale(ordered: Float64[np.ndarray, " values"]) -> float:
    """Return the scale that sets the bandwidth, in the values' units; see `kernel_density`."""
    n, deviation = len(ordered), float(ordered.std())
    low, high = np.quantile(ordered, [0.25, 0.75])
    core = float(high - low) / _NORMAL_IQR
    if core <= 0:
        return deviation
    tenth = max(n // 10, 1)
    group = float((ordered[tenth:] - ordered[:-tenth]).min()) / _NORMAL_TENTH
    return min(deviation, core, max(group, core / _NARROWEST))


Floats = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]

PROMINENCE = 4.0
"""Standard errors by which a valley lies below both its peaks, on the root of the density."""
DEPTH = 0.1
"""Share of the lower peak by which a valley lies below it."""
LEAST_SHARE = 0.005
"""Share of the values that a mode holds."""


def find_modes(outputs: Float[np.ndarray, " values"], *, max_modes: int = 4) -> pd.DataFrame:
    """Part values into the modes of their distribution.

    The density is estimated by `entangle.modes.modes.kernel_density`. Its local maxima are joined
    across a valley, the least prominent one first, until every valley left (1) lies at least 4
    standard errors below both peaks beside it, measured on the root of the density, whose noise
    does not depend on its height, (2) lies at least 10 % below the lower of them, (3) parts modes
    with at least 0.5 % of the values each, and (4) there are at most ``max_modes`` modes.

    Parameters
    ----------
    outputs
        Finite values, such as a neuron's outputs on all tokens, in any order.
    max_modes
        Largest number of modes.

    Returns
    -------
    pandas.DataFrame
        One row a mode, in ascending order, at least one: ``mode`` (from 0), ``center`` (where the
        density peaks), ``left`` and ``right`` (the deepest points of the valleys beside it; ∓∞ at
        the ends; a value on a border belongs to the mode on its right), ``tokens`` (values inside)
        and ``share`` (of all values). Values that are equal, or differ by rounding only, are one
        mode.

    Raises
    ------
    InvalidInput
        If there is no value, or one is not finite, or ``max_modes`` is below 1.

    Notes
    -----
    The standard error takes the values for independent. Of 1,000 independent values a mode is found
    from about 2 % on, of 10,000 or more from 0.5 % on.
    """
    return pd.DataFrame(_found_modes(outputs, whole("max_modes", max_modes, least=1)))


def _found_modes(outputs: Float[np.ndarray, " values"], max_modes: int = 4) -> Columns:
    """Return the columns of `find_modes`."""
    ordered = np.sort(outputs).astype(np.float64)
    if ordered.size == 0:
        raise InvalidInput("`outputs` must hold at least one value; got none.")
    bad = int(np.count_nonzero(~np.isfinite(ordered)))
    if bad:
        raise InvalidInput(
            f"`outputs` must be finite to have modes; {bad} of {len(ordered)} are NaN or infinite."
        )
    rounding = 4 * np.finfo(outputs.dtype).eps * abs(ordered.mean())
    if ordered[0] == ordered[-1] or ordered.std() <= rounding:
        return _table(ordered, ordered[[len(ordered) // 2]], np.empty(0))
    density = kernel_density(ordered)
    split = _Split.of(density)
    split.join_shallow()
    split.join_small(ordered, max_modes)
    return _table(ordered, density.x[split.peaks], density.x[split.valleys])


def mode_of(outputs: Float[np.ndarray, " values"], modes: pd.DataFrame) -> NDArray[np.int64]:
    """Return the mode that every value lies in, by a table of `find_modes`."""
    return _member(outputs, modes["left"].to_numpy(np.float64))


def _member(outputs: Float[np.ndarray, " values"], left: Floats) -> NDArray[np.int64]:
    if len(left) == 1:
        return np.zeros(len(outputs), dtype=np.int64)
    return np.searchsorted(left[1:], outputs.astype(np.float64), side="right")


def _table(ordered: Floats, centers: Floats, borders: Floats) -> Columns:
    ends = np.concatenate([[0], np.searchsorted(ordered, borders, side="left"), [len(ordered)]])
    tokens = np.diff(ends)
    return {
        "mode": np.arange(len(centers)),
        "center": centers,
        "left": np.concatenate([[-np.inf], borders]),
        "right": np.concatenate([borders, [np.inf]]),
        "tokens": tokens,
        "share": tokens / len(ordered),
    }


@dataclass(eq=False)
class _Split:
    """Peaks of a density and the valleys between neighbours, which are joined step by step."""

    density: Density
    peaks: list[int]
    """Grid indices, ascending."""
    valleys: list[int]
    """Grid indices, one fewer."""
    prominence: list[float]
    """Of every valley below the peaks beside it, in standard errors; the smaller of the two."""

    @classmethod
    def of(cls, density: Density) -> "_Split":
        height = density.height
        peaks: list[int] = find_peaks(height)[0].tolist() or [int(height.argmax())]
        valleys = [_lowest(height, a, b) for a, b in pairwise(peaks)]
        split = cls(density, peaks, valleys, [])
        split.prominence = [split._prominence(i) for i in range(len(valleys))]
        return split

    def join_shallow(self) -> None:
        """Join the least prominent valley's modes until all valleys are prominent."""
        while self.valleys:
            least = int(np.argmin(self.prominence))
            if self.prominence[least] >= PROMINENCE:
                return
            self._join(least)

    def join_small(self, ordered: Floats, max_modes: int) -> None:
        """Join modes that are too small, then valleys too flat, then modes that are too many."""
        while self.valleys:
            height, n = self.density.height, len(self.valleys)
            borders = np.searchsorted(ordered, self.density.x[self.valleys])
            tokens = np.diff(np.concatenate([[0], borders, [len(ordered)]]))
            flatness = [
                height[v] / min(height[self.peaks[i : i + 2]]) for i, v in enumerate(self.valleys)
            ]
            smallest = int(tokens.argmin())
            if tokens[smallest] < LEAST_SHARE * len(ordered):
                beside = [i for i in (smallest - 1, smallest) if 0 <= i < n]
                self._join(max(beside, key=lambda i: float(height[self.valleys[i]])))
            elif max(flatness) > 1 - DEPTH:
                self._join(int(np.argmax(flatness)))
            elif n >= max_modes:
                self._join(int(np.argmin(self.prominence)))
            else:
                return

    def _join(self, valley: int) -> None:
        """Remove a valley and the lower of its peaks."""
        height = self.density.height
        lower = valley + int(height[self.peaks[valley]] >= height[self.peaks[valley + 1]])
        del self.peaks[lower], self.valleys[valley], self.prominence[valley]
        for i in (valley - 1, valley):
            if 0 <= i < len(self.valleys):
                self.prominence[i] = self._prominence(i)

    def _prominence(self, valley: int) -> float:
        """Compare a valley with both its peaks, at the resolution of the peak."""
        beside = self.peaks[valley : valley + 2]
        depth = np.sqrt(self.density.height[beside]) - np.sqrt(
            self.density.height[self.valleys[valley]]
        )
        return float((depth / (math.sqrt(2) * self.density.noise[beside])).min())


def _lowest(height: Floats, first: int, last: int) -> int:
    """Return the middle of the lowest points between two peaks."""
    between = height[first : last + 1]
    lowest = np.flatnonzero(between == between.min())
    return first + int(lowest[len(lowest) // 2])


Neurons = int | Iterable[int] | np.ndarray
"""Indices of neurons of one layer, or one index."""

Outputs = Float32[np.ndarray, " tokens"]
Positions = Int64[np.ndarray, " tokens"]

TOP_TOKENS = 10
"""Most frequent tokens that are kept of a mode."""

_MODE_TYPES = {
    "layer": "str", "neuron": "int64", "mode": "int64", "center": "float64", "left": "float64",
    "right": "float64", "tokens": "int64", "share": "float64", "top_tokens": "str",
}  # fmt: skip
_CONTEXT_TYPES = {
    "layer": "str", "neuron": "int64", "mode": "int64", "rank": "int64", "position": "int64",
    "output": "float64", "token": "str", "before": "str", "after": "str",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class NeuronModes:
    """Modes of some neurons of one layer, and what lies in them."""

    modes: pd.DataFrame
    """One row a mode: ``layer``, ``neuron``, the columns of `entangle.modes.find_modes`, and
    ``top_tokens``: JSON, a list of [token, count, share of the mode], the most frequent first."""
    contexts: pd.DataFrame
    """One row an example: ``layer``, ``neuron``, ``mode``, ``rank`` (0 is nearest to the mode's
    center), ``position`` (index of the token in the calibration set, sequence by sequence),
    ``output`` (in its own units), ``token``, and the text ``before`` and ``after`` it."""
    outputs: Mapping[int, Outputs] = field(repr=False)
    """Outputs on all tokens, of an expert on those that it sees, float32 of shape (tokens,), by
    neuron."""
    at: Positions | None = None
    """Which tokens an expert sees, (tokens,); None for all of them."""


@evaluates
def neuron_modes(
    model: AnyModel,
    calibration: Source,
    layer: LayerSpec,
    neurons: Neurons,
    *,
    per_mode: int = 8,
    window: int = 12,
    seed: int = 0,
    progress: bool | None = None,
) -> NeuronModes:
    """Find the modes of some neurons of a layer, with frequent tokens and example contexts.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Tokens of a module are written as their ids.
    calibration
        Text that the model runs on, once, up to the layer: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings.
    layer
        Full dotted name of a layer, the `Layer` itself, or anything else that names it alone.
    neurons
        Indices of neurons, each once.
    per_mode
        Contexts drawn of every mode, fewer where it holds fewer tokens.
    window
        Tokens of context on either side, within the sequence.
    seed
        Of the draws. A neuron's contexts do not depend on the other neurons.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If the layer or a neuron does not exist, the text does not fit the model, the layer does not
        run exactly once on every token, or an output is not finite.
    """
    language_model = as_language_model(model)
    chosen = one_layer(language_model.module, layer)
    index = check_neurons(chosen, neurons)
    calibration = as_calibration(calibration, language_model)
    per_mode, window, seed = _counts(per_mode, window, seed)
    outputs, at = layer_outputs(language_model.module, calibration, chosen, index, progress)
    by_neuron = dict(zip(index, outputs, strict=True))
    modes, contexts = describe_modes(
        by_neuron, calibration if at is None else SeenTokens(calibration, torch.from_numpy(at)),
        language_model.tokenizer, chosen.name, per_mode=per_mode, window=window, seed=seed,
    )  # fmt: skip
    if at is not None:
        contexts["position"] = at[contexts["position"]]
    return NeuronModes(modes, contexts, by_neuron, at)


def describe_modes(
    outputs: Mapping[int, Outputs],
    calibration: Tokens,
    tokenizer: PreTrainedTokenizerBase | TokenText | None,
    layer: str,
    *,
    per_mode: int = 8,
    window: int = 12,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Describe modes from recorded outputs: the tables ``modes`` and ``contexts`` of `NeuronModes`.

    Parameters
    ----------
    outputs
        Outputs on all tokens of ``calibration``, in its order, by neuron; of an expert on those
        that it sees (`entangle.texts.calibration_set.SeenTokens`), which ``position`` counts.
    calibration, layer, per_mode, window, seed
        As in `neuron_modes`.
    tokenizer
        Writes tokens as text, or a `TokenText` that does; None writes their ids.

    Raises
    ------
    InvalidInput
        If a neuron has not one finite output for every token.
    """
    per_mode, window, seed = _counts(per_mode, window, seed)
    text = tokenizer if isinstance(tokenizer, TokenText) else TokenText(tokenizer)
    ids = calibration.flat().numpy()
    modes, tops, contexts = list[Columns](), list[str](), []
    for neuron, values in outputs.items():
        _check_outputs(values, neuron, layer, ids.size)
        found = _found_modes(values)
        member = _member(values, found["left"])
        tops += [_top_tokens(ids[member == mode], text) for mode in found["mode"]]
        modes.append(found | {"neuron": np.full(len(found["mode"]), neuron)})
        for mode, center in enumerate(found["center"].tolist()):
            rng = numpy_rng(seed, "modes", layer, neuron, mode)
            inside = np.flatnonzero(member == mode)
            drawn = rng.choice(inside, size=min(per_mode, len(inside)), replace=False)
            drawn = drawn[np.lexsort((drawn, np.abs(values[drawn] - center)))]
            contexts += [
                (layer, neuron, mode, rank, position, float(values[position]),
                 *_context(text, calibration, position, window))
                for rank, position in enumerate(drawn.tolist())
            ]  # fmt: skip
    columns = {
        name: np.concatenate([one[name] for one in modes]) for name in (modes[0] if modes else ())
    }
    table = pd.DataFrame(columns | {"layer": [layer] * len(tops), "top_tokens": tops})
    return (
        table.reindex(columns=list(_MODE_TYPES)).astype(_MODE_TYPES),
        pd.DataFrame(contexts, columns=list(_CONTEXT_TYPES)).astype(_CONTEXT_TYPES),
    )


def _check_outputs(values: np.ndarray, neuron: int, layer: str, n_tokens: int) -> None:
    if values.shape != (n_tokens,):
        raise InvalidInput(
            f"neuron {neuron} of layer {layer!r} must have one output for each of the "
            f"{n_tokens} tokens; got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise InvalidInput(
            f"neuron {neuron} of layer {layer!r} has outputs that are NaN or infinite, so it "
            "has no modes; leave it out or run the model in float32."
        )


def check_neurons(layer: Layer, neurons: Neurons) -> list[int]:
    """Return indices of different neurons of a layer, or raise `InvalidInput`."""
    index = wholes("neurons", neurons, least=0)
    for neuron in index:
        if neuron >= layer.out_features:
            raise InvalidInput(
                f"`neurons` of layer {layer.name!r} must lie in 0..{layer.out_features - 1}; "
                f"got {neuron}."
            )
    return different("neurons", index)


def one_layer(module: nn.Module, name: LayerSpec) -> Layer:
    """Return the one layer that a specification means, or raise `InvalidInput`."""
    found = find_layers(module, name)
    if len(found) > 1:
        names = ", ".join(layer.name for layer in found[:3])
        raise InvalidInput(
            f"`layer` must name one layer; {shown(name)} names {len(found)} ({names}, …): give one "
            "full name."
        )
    return found[0]


def _counts(per_mode: int, window: int, seed: int) -> tuple[int, int, int]:
    """Check the settings of contexts."""
    counts = whole("per_mode", per_mode, least=0), whole("window", window, least=0)
    return *counts, check_seed(seed)


def layer_outputs(
    module: nn.Module,
    calibration: CalibrationSet,
    layer: Layer,
    neurons: Sequence[int],
    progress: bool | None,
    *,
    may_be_silent: bool = False,
) -> tuple[Float32[np.ndarray, "neurons tokens"], Positions | None]:
    """Run the model once; compute the neurons' outputs in float32 from the layer's inputs.

    Where the layer does not multiply by its weight, they are its own. Of an expert they are those
    on the tokens that it sees; which these are comes second, None where it is all of them. That an
    expert sees none is an error, unless it ``may_be_silent``.
    """
    chosen = list(neurons)
    weight = layer.weight[chosen].float()
    bias = None if layer.bias is None else layer.bias[chosen].float()
    parts, places = list[Tensor](), list[Tensor]()

    def keep(seen: Recorded) -> None:
        with full_precision():
            computed = nn.functional.linear(seen.inputs.float(), weight, bias)
        parts.append((computed if seen.affine else seen.outputs[:, chosen].float()).cpu())
        if seen.at is not None:
            places.append(seen.at.cpu())

    with ProgressBar("modes", enabled=progress) as bar:
        bar.start(calibration.n_seq, "sequences")
        recorder = Recorder([layer], keep, once=True)
        whole_text = not (may_be_silent and layer.is_expert)
        recorder.run(module, told(of_one_group(calibration), bar.advance), whole=whole_text)
    if not parts:
        return np.empty((len(chosen), 0), np.float32), np.empty(0, np.int64)
    outputs = torch.cat(parts)
    found = np.ascontiguousarray(outputs.numpy().T)
    if places:
        return found, torch.cat(places).numpy()
    if outputs.shape[0] != calibration.n_tokens:
        raise InvalidInput(
            f"layer {layer.name!r} ran on {outputs.shape[0]} tokens where the text has "
            f"{calibration.n_tokens}, so its outputs have no place in it; choose another layer."
        )
    return found, None


def _context(
    text: TokenText, calibration: Tokens, position: int, window: int
) -> tuple[str, str, str]:
    sequence, place = calibration.place(position)
    ids = calibration.rows.sequence(sequence).tolist()
    before, token, after = text.context(ids, place, window)
    return token, before, after


def _top_tokens(token_ids: np.ndarray, text: TokenText) -> str:
    """Return the most frequent tokens as JSON; of equal counts the lower id first."""
    counted = np.bincount(token_ids)  # a tenth of the time of np.unique
    tokens = np.flatnonzero(counted)
    counts = counted[tokens]
    best = np.argsort(-counts, kind="stable")[:TOP_TOKENS]
    rows = [
        [text.token(int(tokens[i])), int(counts[i]), float(counts[i] / len(token_ids))]
        for i in best
    ]
    return json.dumps(rows, ensure_ascii=False)
