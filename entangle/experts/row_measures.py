"""What sparse rows do to the outputs of neurons, and what the clusters do to their shape."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.precision import accumulator_dtype
from entangle.recording.stream import TokenStore
from entangle.stats.mapping_difficulty import draw_pairs, mapping_difficulty
from entangle.stats.tiles import multiply
from entangle.stats.wasserstein import Judge, ShapeStatistics, shape_statistics

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
    parts = enumerate(_split(outputs, clusters))
    return _weighted((_wd_or_zero(own, partial(judge, i)) for i, own in parts), clusters)


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


def _wd_or_zero(
    outputs: Tensor, judge: Callable[[ShapeStatistics], ShapeStatistics]
) -> tuple[Tensor, Tensor]:
    """Return the WD of every row, 0 where it cannot be measured, and where that is."""
    if outputs.shape[1] < 2:
        wide = accumulator_dtype(outputs.device)
        nothing = torch.zeros(outputs.shape[0], dtype=wide, device=outputs.device)
        return nothing, torch.ones_like(nothing, dtype=torch.bool)
    shape = judge(shape_statistics(outputs))
    return shape.wd.masked_fill(shape.constant, 0.0), shape.constant


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
