"""Chosen rows of the layers that read one input: experts of theirs, and what these do to outputs.

Rows are fitted (`fit_group`) by the solver of whole layers, and measured (`measure_group`) by what
the sparse rows do to the outputs of neurons, and the clusters to their shape.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.experts.router import Router
from entangle.experts.solver import (
    ExpertSettings,
    cluster_grams,
    count_shrunk,
    prune_part,
    shrunk_grams,
)
from entangle.models.layers import Layer
from entangle.precision import accumulator_dtype, full_precision, multiply, row_parts
from entangle.recording.stream import TokenStore
from entangle.stats.gram import ClusterGramsResult
from entangle.stats.mapping_difficulty import draw_pairs, mapping_difficulty
from entangle.stats.wasserstein import (
    Judge,
    ShapeStatistics,
    judge_products,
    shape_statistics,
    sort_rows,
)

_SOLVE_BYTES = 2**30
_COPIES = 6  # of the stacked rows, at most, inside a solver
_BYTES_A_TOKEN = 40  # of every neuron that is measured: outputs, errors, sorted copies, pairs
_BLOCK_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Clusters:
    """Tokens parted into clusters."""

    labels: Int64[Tensor, " tokens"]
    """Cluster of every token, (tokens,)."""
    order: Int64[Tensor, " tokens"]
    """Indices of the tokens, cluster by cluster, each in reading order, (tokens,)."""
    sizes: tuple[int, ...]
    """Number of tokens of every cluster."""

    @classmethod
    def of(cls, labels: Int64[Tensor, " tokens"], k: int) -> "Clusters":
        """Sort the tokens of k clusters."""
        sizes = torch.bincount(labels, minlength=k).tolist()
        return cls(labels, labels.argsort(stable=True), tuple(sizes))


@dataclass(frozen=True, eq=False)
class ClusterPairs:
    """Random pairs of tokens, the two of a pair in one cluster."""

    pairs: Int64[Tensor, "two=2 pairs"]
    """Indices of the tokens, (2, pairs), cluster by cluster."""
    distance: Float[Tensor, " pairs"]
    """‖x_a − x_b‖₂ of every pair, in input units, (pairs,)."""
    sizes: tuple[int, ...]
    """Number of pairs of every cluster."""


def pair_tokens(clusters: Clusters, inputs: TokenStore, *, seed: int) -> ClusterPairs:
    """Draw disjoint pairs of tokens in every cluster (`draw_pairs`) and measure their distance.

    Parameters
    ----------
    clusters
        A single cluster gives the pairs that all tokens are scored with.
    inputs
        The layer's inputs, (tokens, in_features).
    seed
        Seed of the draw.
    """
    drawn = [
        own[draw_pairs(own.numel(), seed=seed)]
        for own in clusters.order.cpu().split(list(clusters.sizes))
    ]
    pairs = torch.cat(drawn, dim=1)
    distance = [
        (inputs.take(a).float() - inputs.take(b).float()).norm(dim=1).cpu()
        for a, b in pairs.split(_BLOCK_TOKENS, dim=1)
    ]
    return ClusterPairs(pairs, torch.cat(distance), tuple(part.shape[1] for part in drawn))


def weighted_wd(
    outputs: Float[Tensor, "neurons tokens"],
    clusters: Clusters,
    *,
    judge: Judge = lambda _cluster, shape: shape,
) -> tuple[Float[Tensor, " neurons"], Int64[Tensor, " neurons"]]:
    """Average the WD of a neuron's outputs inside every cluster, weighted by the cluster's tokens.

    ``Σ_c (n_c / n) · WD_c``, every cluster standardised by itself. A cluster with fewer than two
    tokens, or in which the outputs are constant, contributes 0.

    Parameters
    ----------
    outputs
        Dense outputs, (neurons, tokens).
    clusters
        Of the same tokens.
    judge
        Tells by the rounding of the outputs which of them are constant in a cluster, from
        `entangle.stats.wasserstein.judge_products`.

    Returns
    -------
    weighted : Tensor
        Shape (neurons,), in standard deviations.
    skipped : Tensor
        Number of clusters that contribute 0, (neurons,).

    References
    ----------
    arXiv 2405.15756.
    """
    found = []
    for cluster, own in enumerate(_split(outputs, clusters)):
        if own.shape[1] < 2:
            wide = accumulator_dtype(own.device)
            nothing = torch.zeros(own.shape[0], dtype=wide, device=own.device)
            found.append((nothing, torch.ones_like(nothing, dtype=torch.bool)))
            continue
        shape = judge(cluster, shape_statistics(own))
        found.append((shape.wd.masked_fill(shape.constant, 0.0), shape.constant))
    return _weighted(found, clusters)


def weighted_md(
    outputs: Float[Tensor, "neurons tokens"], clusters: Clusters, drawn: ClusterPairs
) -> tuple[Float[Tensor, " neurons"], Int64[Tensor, " neurons"]]:
    """Average the mapping difficulty inside every cluster, weighted by the cluster's tokens.

    Both normalisers are the cluster's own. A cluster without pairs of different inputs, or whose
    outputs are equal in most pairs, contributes 0.

    Parameters
    ----------
    outputs
        Dense outputs, (neurons, tokens).
    clusters
        Of the same tokens.
    drawn
        Pairs inside the clusters, from `pair_tokens`.

    Returns
    -------
    weighted : Tensor
        Shape (neurons,), no unit.
    skipped : Tensor
        Number of clusters that contribute 0, (neurons,).
    """
    sizes = list(drawn.sizes)
    difficulties = []
    parts = zip(drawn.pairs.split(sizes, dim=1), drawn.distance.split(sizes), strict=True)
    for pairs, distance in parts:
        md = mapping_difficulty(outputs, pairs, distance.to(outputs.device)).md()
        difficulties.append((md.nan_to_num(nan=0.0, posinf=math.inf), md.isnan()))
    return _weighted(difficulties, clusters)


def sorted_distance(
    first: Float[Tensor, "neurons tokens"], second: Float[Tensor, "neurons tokens"]
) -> Float[Tensor, " neurons"]:
    """Return W1 between two empirical distributions of equal size, (neurons,).

    Parameters
    ----------
    first, second
        Values in ascending order along the tokens, (neurons, tokens).
    """
    return (first - second).abs_().mean(1, dtype=accumulator_dtype(first.device))


def rmse(errors: Float[Tensor, "neurons tokens"]) -> Float[Tensor, " neurons"]:
    """Return the root of the mean square over the tokens, (neurons,)."""
    wide = accumulator_dtype(errors.device)
    norm: Tensor = torch.linalg.vector_norm(errors, dim=1, dtype=wide)
    return norm / math.sqrt(errors.shape[1])


def dense_outputs(
    weight: Float[Tensor, "neurons in_features"],
    bias: Float[Tensor, " neurons"],
    inputs: TokenStore,
) -> Float[Tensor, "neurons tokens"]:
    """Compute outputs on all recorded tokens in float32, (neurons, tokens)."""
    outputs = torch.empty(weight.shape[0], inputs.n_tokens, device=weight.device)
    for start, rows in inputs.blocks(_BLOCK_TOKENS):
        target = outputs[:, start : start + rows.shape[0]]
        multiply(weight.float(), rows.to(weight.device).float(), out=target)
        target += bias[:, None]
    return outputs


def output_errors(
    change: Float[Tensor, "experts neurons in_features"], inputs: TokenStore, clusters: Clusters
) -> Float[Tensor, "neurons tokens"]:
    """Compute what a change of the experts' weights does to outputs, float32, (neurons, tokens).

    Parameters
    ----------
    change
        Sparse minus dense weights.
    inputs
        The layer's inputs, (tokens, in_features).
    clusters
        Of the same tokens.
    """
    errors = torch.empty(change.shape[1], inputs.n_tokens, device=change.device)
    for start, rows in inputs.blocks(_BLOCK_TOKENS):
        tokens = rows.to(change.device).float()
        own = Clusters.of(clusters.labels[start : start + tokens.shape[0]], change.shape[0])
        for expert, index in enumerate(own.order.split(list(own.sizes))):
            if index.numel():
                found = errors.new_empty(errors.shape[0], index.numel())
                multiply(change[expert], tokens[index], out=found)
                errors[:, start + index] = found
    return errors


def _split(outputs: Tensor, clusters: Clusters) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = outputs[:, clusters.order].split(list(clusters.sizes), dim=1)
    return parts


def _weighted(values: Iterable[tuple[Tensor, Tensor]], clusters: Clusters) -> tuple[Tensor, Tensor]:
    """Sum (value, whether it was skipped) over the clusters."""
    n_tokens = sum(clusters.sizes)
    shares = [size / n_tokens for size in clusters.sizes]
    found = list(zip(shares, values, strict=True))
    total = torch.stack([share * value for share, (value, _) in found]).sum(0)
    return total, torch.stack([skipped for _, (_, skipped) in found]).sum(0)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """The chosen rows of all layers that read one input, one below the other."""

    layers: tuple[Layer, ...]
    index: tuple[Int64[Tensor, " _"], ...]
    """The chosen rows of every layer, in ascending order."""
    weight: Float[Tensor, "rows in_features"]
    """Dense weights, in the layers' dtype."""
    bias: Float[Tensor, " rows"]
    """Float32; 0 where a layer has none."""

    @classmethod
    def of(cls, layers: Sequence[Layer], rows: Mapping[str, Int64[Tensor, " _"]]) -> "RowGroup":
        """Gather the rows of some layers, given by the layer's name."""
        index = tuple(rows[layer.name].to(layer.device) for layer in layers)
        weights = [layer.weight[own] for layer, own in zip(layers, index, strict=True)]
        biases = [
            torch.zeros(own.numel(), device=own.device) if layer.bias is None
            else layer.bias[own].float()
            for layer, own in zip(layers, index, strict=True)
        ]  # fmt: skip
        return cls(tuple(layers), index, torch.cat(weights), torch.cat(biases))

    def columns(self) -> pd.DataFrame:
        """Return layer, block, projection and neuron of every row."""
        parts = [
            pd.DataFrame({
                "layer": layer.name, "block": layer.block, "projection": layer.projection,
                "neuron": own.cpu().numpy(),
            })
            for layer, own in zip(self.layers, self.index, strict=True)
        ]  # fmt: skip
        return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True, eq=False)
class RowFit:
    """A router with k clusters and the rows solved for them."""

    router: Router
    clusters: Clusters
    pairs: ClusterPairs | None
    """None without mapping difficulty."""
    sparsities: tuple[float, ...]
    """Shares of zeros asked for."""
    weight: Float[Tensor, "sparsities k rows in_features"]
    """Sparse weights, in the layers' dtype."""
    realised: Float[Tensor, "sparsities rows"]
    """Share of zeros of every row, over the experts."""
    damping: float
    """Largest multiple of a gram's mean diagonal that was needed; 0 where none is used."""
    shrunk: int
    """Clusters with fewer tokens than inputs."""
    sizes: Float[Tensor, "k in_features"]
    """Root mean square of every input in every cluster."""


def fit_group(
    group: RowGroup,
    inputs: TokenStore,
    k: int,
    sparsities: Sequence[float],
    settings: ExpertSettings,
    *,
    md: bool,
) -> RowFit:
    """Fit a router and solve the rows in its clusters.

    Parameters
    ----------
    group
        The rows to solve.
    inputs
        What their layers received, (tokens, in_features).
    k
        Number of experts.
    sparsities
        Shares of zeros in [0, 1].
    settings
        How.
    md
        Whether to draw pairs of tokens for the mapping difficulty.
    """
    device = group.weight.device
    router, _ = settings.fit(inputs, k, device)
    grams, labels = cluster_grams(inputs, router, device)
    clusters = Clusters.of(labels, k)
    weight, realised, damping = _solve(group.weight, grams, sparsities, settings)
    pairs = pair_tokens(clusters, inputs, seed=settings.seed) if md else None
    return RowFit(
        router, clusters, pairs, tuple(sparsities), weight, realised, damping,
        count_shrunk(grams), sizes=_sizes(grams),
    )  # fmt: skip


def _sizes(grams: ClusterGramsResult) -> Tensor:
    """Return the root mean square of every input in every cluster, (k, in_features)."""
    squares = grams.gram.diagonal(dim1=1, dim2=2)
    return (squares / grams.count.to(squares).clamp_min(1)[:, None]).sqrt()


def _solve(
    weight: Tensor, grams: ClusterGramsResult, sparsities: Sequence[float], settings: ExpertSettings
) -> tuple[Tensor, Tensor, float]:
    """Solve all rows at all sparsities, stacked, so that every gram is factorised once.

    Returns the weights (sparsities, k, rows, in_features), the share of zeros over the experts
    (sparsities, rows), and the largest damping.
    """
    n_rows, features = weight.shape
    shares = torch.tensor(sparsities, dtype=torch.float64).repeat_interleave(n_rows)
    stacked = weight.repeat(len(sparsities), 1)
    at_once = min(len(stacked), max(1, _SOLVE_BYTES // (_COPIES * 4 * features)))
    solved = torch.empty(len(grams.count), *stacked.shape, dtype=weight.dtype, device=weight.device)
    zeros, damping = torch.zeros(len(stacked), dtype=torch.float64), 0.0
    for clusters, gram in shrunk_grams(grams, rows=at_once):
        for rows in (slice(i, i + at_once) for i in range(0, len(stacked), at_once)):
            part = prune_part(stacked[rows], gram, shares[rows], settings, experts=len(gram))
            solved[clusters, rows] = part.weight
            zeros[rows] += part.zeros.cpu()
            damping = max(damping, float(part.damping.max()))
    by_sparsity = solved.unflatten(1, (-1, n_rows)).transpose(0, 1)
    realised = zeros / (len(grams.count) * features)
    return by_sparsity, realised.unflatten(0, (-1, n_rows)), damping


def measure_group(
    group: RowGroup, inputs: TokenStore, fits: Sequence[RowFit], *, seed: int, memory: int
) -> pd.DataFrame:
    """Measure all rows, one frame row a (row, k, sparsity); columns as in `RoutedRows.neurons`.

    The relative improvement, which compares fits, is left NaN.

    Parameters
    ----------
    group, inputs
        As in `fit_group`.
    fits
        From `fit_group`, of at least one number of experts.
    seed
        Seed of the pairs of all tokens.
    memory
        Bytes for the outputs of the rows that are worked on.
    """
    everything = Clusters.of(torch.zeros_like(fits[0].clusters.labels), 1)
    pairs = None if fits[0].pairs is None else pair_tokens(everything, inputs, seed=seed)
    names = group.columns()
    at_once = memory // (_BYTES_A_TOKEN * inputs.n_tokens)
    frames = []
    with full_precision():
        for part in row_parts(len(names), at_once):
            dense = _Dense.of(group, inputs, part, pairs, fits[0])
            own = names[part].reset_index(drop=True)
            for fit in fits:
                tables = list(_tables(dense, fit, inputs))
                frames += [pd.concat([own, table], axis=1) for table in tables]
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True, eq=False)
class _Dense:
    """Dense rows and their outputs on all tokens."""

    part: slice
    weight: Tensor
    bias: Tensor
    outputs: Tensor
    ordered: Tensor
    shape: ShapeStatistics
    md: Tensor | None

    @classmethod
    def of(
        cls,
        group: RowGroup,
        inputs: TokenStore,
        part: slice,
        pairs: ClusterPairs | None,
        fit: RowFit,
    ) -> "_Dense":
        weight, bias = group.weight[part].float(), group.bias[part]
        outputs = dense_outputs(weight, bias, inputs)
        share = torch.tensor(fit.clusters.sizes).to(fit.sizes)[:, None] / inputs.n_tokens
        sizes = (share * fit.sizes.square()).sum(0)[None].sqrt()
        shape = judge_products(weight, bias, sizes)(0, shape_statistics(outputs))
        md = None
        if pairs is not None:
            distance = pairs.distance.to(outputs.device)
            md = mapping_difficulty(outputs, pairs.pairs, distance).md()
        return cls(part, weight, bias, outputs, sort_rows(outputs), shape, md)


def _tables(dense: _Dense, fit: RowFit, inputs: TokenStore) -> Iterator[pd.DataFrame]:
    """Yield a frame a sparsity, one row a dense row."""
    judge = judge_products(dense.weight, dense.bias, fit.sizes)
    wd, wd_skipped = weighted_wd(dense.outputs, fit.clusters, judge=judge)
    shape = {"wd": dense.shape.wd, "weighted_wd": wd, "wd_skipped": wd_skipped}
    if fit.pairs is not None and dense.md is not None:
        md, md_skipped = weighted_md(dense.outputs, fit.clusters, fit.pairs)
        shape |= {"md": dense.md, "weighted_md": md, "md_skipped": md_skipped}
    for weight, realised, sparsity in zip(fit.weight, fit.realised, fit.sparsities, strict=True):
        change = weight[:, dense.part].float() - dense.weight
        errors = output_errors(change, inputs, fit.clusters)
        error = rmse(errors)
        moved = sorted_distance(sort_rows(errors.add_(dense.outputs)), dense.ordered)
        measured = {
            "experts": fit.router.k,
            "sparsity": sparsity,
            "rmse": _numpy(error),
            "ri": np.nan,
            "output_wd": _numpy(moved / dense.shape.std),
            **{name: _numpy(values) for name, values in shape.items()},
            "realised_sparsity": _numpy(realised[dense.part]),
            "smallest_cluster": min(fit.clusters.sizes),
            "shrunk": fit.shrunk,
            "damping": fit.damping,
        }
        yield pd.DataFrame(measured)


def _numpy(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().numpy()
    return array


def with_ri(neurons: pd.DataFrame) -> pd.DataFrame:
    """Fill in the relative improvement; see `entangle.experts.routed_rows.RoutedRows.neurons`."""
    key = ["layer", "neuron", "sparsity"]
    single = neurons.loc[neurons["experts"] == 1].set_index(key)["rmse"]
    before = single.reindex(pd.MultiIndex.from_frame(neurons[key])).to_numpy()
    after = neurons["rmse"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        ri = np.where(neurons["experts"] == 1, 1.0, before / after)
    return neurons.assign(ri=ri)
