"""Scores of all rows of a group of layers, and the neurons that are looked at closely.

How many directions a cluster's inputs take, and how well its expert serves them.

Histograms of outputs, dense and sparse, of all tokens and of every cluster, on common bins.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from entangle.errors import InvalidInput, MemoryLimit, NumericalError
from entangle.experts.rows import Clusters, RowGroup, dense_outputs, output_errors
from entangle.models.layers import Layer
from entangle.precision import accumulator_dtype, row_parts
from entangle.recording.stream import TokenStore
from entangle.seeding import numpy_rng
from entangle.stats import bins
from entangle.stats.edges import N_BINS, SAVED_FOLD, signed_edges
from entangle.stats.gram import Gram
from entangle.stats.wasserstein import (
    FeatureSizes,
    ShapeStatistics,
    judge_products,
    shape_statistics,
    sort_rows,
)

TOP = 3
"""Neurons of largest WD that are chosen of a layer, beside the typical one."""

_BYTES_OF_A_SCORE = 24  # of every neuron that is scored
_BYTES_CHOSEN = 48  # of every chosen neuron: dense, sparse, bins, differences
_SHARED = ("mean", "std", "skewness", "excess_kurtosis", "ks")


def score_rows(group: RowGroup, inputs: TokenStore, *, memory: int) -> pd.DataFrame:
    """Measure the shape of every row's outputs.

    Parameters
    ----------
    group
        All rows of some layers that read one input.
    inputs
        That input, (tokens, in_features).
    memory
        Bytes for outputs.

    Returns
    -------
    pandas.DataFrame
        One row a neuron: layer, neuron, wd, mean, std, skewness, excess_kurtosis, ks, weight_norm,
        flag, as in `entangle.results.scores.NeuronScores`.

    Raises
    ------
    NumericalError
        If an output is NaN or infinite.
    """
    n_rows = group.weight.shape[0]
    sizes = FeatureSizes.of(inputs).rms()[None]
    at_once = memory // (_BYTES_OF_A_SCORE * inputs.n_tokens)
    parts = []
    for part in row_parts(n_rows, at_once):
        weight = group.weight[part].float()
        bias = group.bias[part]
        judge = judge_products(weight, bias, sizes)
        shape = judge(0, shape_statistics(dense_outputs(weight, bias, inputs)))
        _check_finite(shape)
        columns = {name: getattr(shape, name).cpu().numpy() for name in ("wd", *_SHARED)}
        columns["weight_norm"] = weight.norm(dim=1).cpu().double().numpy()
        columns["flag"] = np.where(shape.constant.cpu().numpy(), "constant", "")
        parts.append(pd.DataFrame(columns))
    names = group.columns()[["layer", "neuron"]]
    return pd.concat([names, pd.concat(parts, ignore_index=True)], axis=1)


def _check_finite(shape: ShapeStatistics) -> None:
    bad = int((shape.nan | shape.inf).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {len(shape.nan)} neurons have NaN or infinite outputs; run the model in "
            "float32 or check its weights."
        )


def choose(scored: pd.DataFrame) -> list[int]:
    """Return the neurons of one layer with the largest WD, then the median one.

    Of an even number, that is the lower of the two in the middle.

    Raises
    ------
    InvalidInput
        If no neuron's outputs vary.
    """
    known = scored[scored["wd"].notna()]
    if known.empty:
        raise InvalidInput(
            f"layer {scored['layer'].iloc[0]!r} has no neuron whose outputs vary; name neurons or "
            "choose another layer."
        )
    ordered = known.sort_values("wd", ascending=False, kind="stable")["neuron"].tolist()
    return list(dict.fromkeys([*ordered[:TOP], ordered[len(ordered) // 2]]))


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some neurons of one layer and what they put out."""

    layer: Layer
    neurons: tuple[int, ...]
    place: Int64[Tensor, " neurons"]
    """Their rows in the group."""
    outputs: Float[Tensor, "neurons tokens"]
    """Dense outputs on all tokens, float32."""

    @classmethod
    def of(
        cls, group: RowGroup, number: int, neurons: Sequence[int], inputs: TokenStore, memory: int
    ) -> "Chosen":
        """Compute the outputs of neurons of the group's layer ``number``.

        Raises
        ------
        MemoryLimit
            If the outputs of so many neurons do not fit into ``memory`` (bytes).
        """
        layer = group.layers[number]
        needed = _BYTES_CHOSEN * len(neurons) * inputs.n_tokens
        if needed > memory:
            raise MemoryLimit(
                f"{len(neurons)} neurons of {layer.name!r} on {inputs.n_tokens} tokens take "
                f"{needed / 2**20:.0f} MiB, more than {memory / 2**20:.0f} MiB; name fewer neurons "
                "(neurons) or raise --memory (memory)."
            )
        first = sum(one.out_features for one in group.layers[:number])
        place = first + torch.tensor(neurons, device=group.weight.device)
        outputs = dense_outputs(group.weight[place].float(), group.bias[place], inputs)
        return cls(layer, tuple(neurons), place, outputs)


SHARE = 0.9
"""Share of the variance that the components hold."""

_BLOCK_TOKENS = 8192
SLICES, SLICED_TOKENS = 64, 2048
_BYTES_OF_A_COMPONENT = 32  # of every neuron: outputs, errors, a sorted copy in float64


def components_needed(
    inputs: TokenStore, clusters: Clusters, device: torch.device, *, share: float = SHARE
) -> list[int]:
    """Count the leading principal components that hold ``share`` of the variance.

    Returns
    -------
    list of int
        One number a cluster; 0 where its tokens do not differ.
    """
    labels, counts = clusters.labels.cpu(), []
    for cluster, size in enumerate(clusters.sizes):
        spectrum = _spectrum(inputs, labels == cluster, size, device)
        cumulative = np.cumsum(spectrum)
        if size < 2 or cumulative[-1] <= 0:
            counts.append(0)
        else:
            counts.append(1 + int(np.searchsorted(cumulative, share * cumulative[-1])))
    return counts


def sliced_distances(inputs: TokenStore, clusters: Clusters, *, seed: int) -> list[float]:
    """Return how far every cluster's inputs lie from the inputs of all other clusters.

    Returns
    -------
    list of float
        Sliced Wasserstein distance (W1, `SLICES` random directions, the same for all clusters)
        between at most `SLICED_TOKENS` tokens of a cluster and as many of the others, in units of
        the inputs; NaN where there are none.

    References
    ----------
    Bonneel et al., Sliced and Radon Wasserstein Barycenters of Measures, 2015; computed by POT,
    `ot.sliced_wasserstein_distance`.
    """
    with warnings.catch_warnings():  # of its source, where it was not compiled before
        warnings.simplefilter("ignore")
        import ot  # takes seconds

    labels, found = clusters.labels.cpu().numpy(), []
    rng = numpy_rng(seed, "sliced distances")
    slices = rng.standard_normal((inputs.span(0, 1).shape[1], SLICES))
    slices /= np.linalg.norm(slices, axis=0)
    for cluster in range(len(clusters.sizes)):
        parts = [np.flatnonzero(labels == cluster), np.flatnonzero(labels != cluster)]
        if not all(map(len, parts)):
            found.append(np.nan)
            continue
        own, others = (
            inputs.take(torch.from_numpy(np.sort(rng.permutation(part)[:SLICED_TOKENS])))
            .float().cpu().double().numpy()
            for part in parts
        )  # fmt: skip
        distance = ot.sliced_wasserstein_distance(own, others, p=1, projections=slices)
        found.append(float(distance))
    return found


def _spectrum(
    inputs: TokenStore, member: Tensor, size: int, device: torch.device
) -> Float64[np.ndarray, " values"]:
    """Return the eigenvalues of the scatter matrix of some tokens, the largest first.

    Of fewer tokens than features the matrix of their products has the same ones.
    """
    blocks = (
        rows[own.to(rows.device)].to(device, torch.float32)
        for start, rows in inputs.blocks(_BLOCK_TOKENS)
        if (own := member[start : start + rows.shape[0]]).any()
    )
    wide = accumulator_dtype(device)
    features = inputs.span(0, 1).shape[1]
    if size < features:
        tokens = torch.cat([torch.empty(0, features, device=device), *blocks]).to(wide)
        tokens = tokens - tokens.mean(0)
        scatter = tokens @ tokens.mT
    else:
        first = inputs.span(0, 1)[0].to(device, torch.float32)
        gram = Gram(features, device=device)
        for block in blocks:
            gram.update(block - first)
        found = gram.result()
        scatter = found.gram - found.count * torch.outer(found.mean, found.mean)
    values: np.ndarray = torch.linalg.eigvalsh(scatter).flip(0).clamp_min(0).cpu().double().numpy()
    return values


def relative_errors(
    weight: Float[Tensor, "neurons in_features"],
    bias: Float[Tensor, " neurons"],
    sparse: Float[Tensor, "experts neurons in_features"],
    inputs: TokenStore,
    clusters: Clusters,
    *,
    memory: int,
) -> Float64[np.ndarray, " experts"]:
    """Return ‖sparse − dense‖² / ‖dense − mean‖² of every expert on its own tokens.

    Parameters
    ----------
    weight, bias
        Of a layer's dense neurons.
    sparse
        Weights of its experts.
    inputs, clusters
        Calibration tokens and the expert of each.
    memory
        Bytes for outputs.

    Returns
    -------
    ndarray of shape (experts,)
        Summed over all neurons; NaN where the dense outputs do not vary.
    """
    at_once = memory // (_BYTES_OF_A_COMPONENT * inputs.n_tokens)
    lost_by_neuron, spread_by_neuron = [], []
    for part in row_parts(weight.shape[0], at_once):
        dense = weight[part].float()
        change = sparse[:, part].float() - dense
        errors = output_errors(change, inputs, clusters)
        lost_by_neuron.append(_by_cluster(errors, clusters, centred=False))
        outputs = dense_outputs(dense, bias[part], inputs)
        spread_by_neuron.append(_by_cluster(outputs, clusters, centred=True))
    lost = np.concatenate(lost_by_neuron, axis=1).sum(1)
    spread = np.concatenate(spread_by_neuron, axis=1).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, lost / spread, np.nan)


def _by_cluster(values: Tensor, clusters: Clusters, *, centred: bool) -> np.ndarray:
    """Sum the squares of (neurons, tokens) over a cluster's tokens, (clusters, neurons)."""
    wide = accumulator_dtype(values.device)
    sums = []
    for own in values[:, clusters.order].split(list(clusters.sizes), dim=1):
        own = own.to(wide)
        if centred and own.shape[1]:
            own = own - own.mean(1, keepdim=True)
        sums.append(own.square().sum(1).cpu().double().numpy())
    return np.stack(sums)


ALL = -1
"""Cluster of the histogram of all tokens."""


class CommonBins:
    """Bins of some neurons, fine around the median of the dense outputs and wider in the tails.

    The bins are those of `entangle.scoring`: 16 a unit over the first unit on either side of the
    median, half as fine up to the third unit, and so on; the unit is the interquartile range.

    Parameters
    ----------
    dense
        Dense outputs, (neurons, tokens).
    """

    def __init__(self, dense: Float[Tensor, "neurons tokens"]) -> None:
        ordered = sort_rows(dense)
        n = ordered.shape[1]
        self._location = ordered[:, n // 2].clone()
        core = ordered[:, (3 * n) // 4] - ordered[:, n // 4]
        wide = accumulator_dtype(dense.device)
        spread = dense.to(wide).std(1, correction=0).float()
        unit = torch.where(core > 0, core, spread)
        self._unit = torch.where(unit > 0, unit, 1.0)

    def count(
        self, outputs: Float[Tensor, "neurons tokens"], clusters: Clusters
    ) -> Int64[np.ndarray, "neurons clusters bins"]:
        """Count outputs of the same neurons, by neuron and cluster."""
        k, labels = len(clusters.sizes), clusters.labels.to(outputs.device)
        relative = (outputs - self._location[:, None]) / self._unit[:, None]
        found = []
        for row in relative:
            cells = labels * N_BINS + bins.signed_index(row)
            counts = torch.bincount(cells, minlength=k * N_BINS).unflatten(0, (k, -1))
            found.append(bins.fold_counts(counts, SAVED_FOLD))
        return torch.stack(found).cpu().numpy()

    def edges(self, neuron: int) -> Float[np.ndarray, " edges"]:
        """Return the edges of the bins of a neuron (its place among them), in output units."""
        unit, location = float(self._unit[neuron]), float(self._location[neuron])
        return location + unit * signed_edges(SAVED_FOLD)


def histogram_rows(
    common: CommonBins,
    neurons: Sequence[int],
    outputs: Float[Tensor, "neurons tokens"],
    clusters: Clusters,
) -> Iterator[pd.DataFrame]:
    """Yield the histogram of every neuron and cluster that holds tokens, all tokens first.

    Each has columns neuron, cluster, left, right, count, from its first to its last used bin.
    """
    for place, counts in enumerate(common.count(outputs, clusters)):
        edges = common.edges(place)
        whole = np.concatenate([counts.sum(0, keepdims=True), counts])
        for cluster, own in enumerate(whole, start=ALL):
            used = np.flatnonzero(own)
            if len(used):
                span = slice(used[0], used[-1] + 1)
                columns = {"left": edges[:-1][span], "right": edges[1:][span], "count": own[span]}
                yield pd.DataFrame({"neuron": neurons[place], "cluster": cluster, **columns})


def output_histogram(outputs: Float32[np.ndarray, " tokens"]) -> pd.DataFrame:
    """Return the histogram of one neuron's outputs: left, right, count."""
    dense = torch.from_numpy(outputs)[None]
    alone = Clusters.of(torch.zeros(len(outputs), dtype=torch.int64), 1)
    whole = next(histogram_rows(CommonBins(dense), [0], dense, alone))
    return whole[["left", "right", "count"]]
