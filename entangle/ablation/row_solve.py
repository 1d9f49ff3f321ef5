"""Fit routers on one recorded input, and solve and measure the chosen rows that read it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.ablation.row_measures import (
    ClusterPairs,
    Clusters,
    dense_outputs,
    output_errors,
    pair_tokens,
    rmse,
    sorted_distance,
    weighted_md,
    weighted_wd,
)
from entangle.checks import choice, different, finite, shares, whole, wholes
from entangle.expansion.solve import count_shrunk, shrunk_grams
from entangle.models.layers import Layer
from entangle.precision import full_precision
from entangle.pruning import prune
from entangle.pruning.methods import METHODS
from entangle.recording.stream import TokenStore
from entangle.routing import Router, fit_router
from entangle.routing.router import KINDS, Kind
from entangle.seeding import check_seed
from entangle.stats.gram import ClusterGrams, ClusterGramsResult
from entangle.stats.mapping_difficulty import mapping_difficulty
from entangle.stats.rounding import judge_products
from entangle.stats.tiles import row_parts
from entangle.stats.wasserstein import ShapeStatistics, shape_statistics, sort_rows

_SOLVE_BYTES = 2**30
_COPIES = 6  # of the stacked rows, at most, inside a solver
_BYTES_A_TOKEN = 40  # of every neuron that is measured: outputs, errors, sorted copies, pairs


@dataclass(frozen=True, eq=False)
class RowSettings:
    """How rows are routed and solved; the fields are explained at `fit_rows`."""

    sparsities: tuple[float, ...]
    experts: tuple[int, ...]
    pruner: str
    router: Kind
    damping: float
    restarts: int
    seed: int
    md: bool

    @classmethod
    def checked(
        cls,
        sparsities: float | Iterable[float],
        experts: int | Iterable[int],
        *,
        pruner: str,
        router: Kind,
        damping: float,
        restarts: int,
        seed: int,
        md: bool,
    ) -> "RowSettings":
        """Check what a user gives."""
        return cls(
            tuple(different("sparsities", shares("sparsities", sparsities))),
            tuple(different("experts", wholes("experts", experts, least=1))),
            choice("pruner", pruner, METHODS, kind="pruning method"),
            choice("router", router, KINDS),
            finite("damping", damping, least=0),
            whole("restarts", restarts, least=1),
            check_seed(seed),
            md,
        )


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
    group: RowGroup, inputs: TokenStore, settings: RowSettings
) -> Iterator[tuple[int, RowFit]]:
    """Yield (k, fit) for every number of experts.

    Parameters
    ----------
    group
        The rows to solve.
    inputs
        What their layers received, (tokens, in_features).
    settings
        How.
    """
    device, features = group.weight.device, group.weight.shape[1]
    for k in settings.experts:
        router = fit_router(
            inputs, k, seed=settings.seed, kind="single" if k == 1 else settings.router,
            restarts=settings.restarts, device=device,
        )  # fmt: skip
        grams, labels = ClusterGrams(k, features, device=device), []
        for rows in inputs:
            rows = rows.to(device)
            labels.append(router.route(rows))
            grams.update(rows, labels[-1])
        clusters, found = Clusters.of(torch.cat(labels), k), grams.result()
        weight, realised, damping = _solve(group.weight, found, settings)
        pairs = pair_tokens(clusters, inputs, seed=settings.seed) if settings.md else None
        yield k, RowFit(
            router, clusters, pairs, weight, realised, damping, count_shrunk(found),
            sizes=_sizes(found),
        )  # fmt: skip


def _sizes(grams: ClusterGramsResult) -> Tensor:
    """Return the root mean square of every input in every cluster, (k, in_features)."""
    squares = grams.gram.diagonal(dim1=1, dim2=2)
    return (squares / grams.count.to(squares).clamp_min(1)[:, None]).sqrt()


def _solve(
    weight: Tensor, grams: ClusterGramsResult, settings: RowSettings
) -> tuple[Tensor, Tensor, float]:
    """Solve all rows at all sparsities, stacked, so that every gram is factorised once.

    Returns the weights (sparsities, k, rows, in_features), the share of zeros over the experts
    (sparsities, rows), and the largest damping.
    """
    n_rows, features = weight.shape
    shares = torch.tensor(settings.sparsities, dtype=torch.float64).repeat_interleave(n_rows)
    stacked = weight.repeat(len(settings.sparsities), 1)
    at_once = min(len(stacked), max(1, _SOLVE_BYTES // (_COPIES * 4 * features)))
    solved = torch.empty(len(grams.count), *stacked.shape, dtype=weight.dtype, device=weight.device)
    zeros, damping = torch.zeros(len(stacked), dtype=torch.float64), 0.0
    for clusters, gram in shrunk_grams(grams, rows=at_once):
        for start in range(0, len(stacked), at_once):
            part = slice(start, start + at_once)
            result = prune(
                stacked[part].expand(len(gram), -1, -1), gram, method=settings.pruner,
                sparsity=shares[part], damping=settings.damping, seed=settings.seed,
            )  # fmt: skip
            solved[clusters, part] = result.weight
            zeros[part] += (~result.mask).sum((0, 2)).cpu()
            damping = max(damping, float(result.damping.max()))
    by_sparsity = solved.unflatten(1, (-1, n_rows)).transpose(0, 1)
    realised = zeros / (len(grams.count) * features)
    return by_sparsity, realised.unflatten(0, (-1, n_rows)), damping


def measure_group(
    group: RowGroup,
    inputs: TokenStore,
    fits: Mapping[int, RowFit],
    settings: RowSettings,
    *,
    memory: int,
) -> pd.DataFrame:
    """Measure all rows, one frame row a (row, k, sparsity); columns as in `RoutedRows.neurons`.

    The relative improvement, which compares fits, is left NaN.

    Parameters
    ----------
    group, inputs, settings
        As in `fit_group`.
    fits
        From `fit_group`.
    memory
        Bytes for the outputs of the rows that are worked on.
    """
    everything = Clusters.of(torch.zeros_like(next(iter(fits.values())).clusters.labels), 1)
    pairs = pair_tokens(everything, inputs, seed=settings.seed) if settings.md else None
    names = group.columns()
    at_once = memory // (_BYTES_A_TOKEN * inputs.n_tokens)
    frames = []
    with full_precision():
        for part in row_parts(len(names), at_once):
            dense = _Dense.of(group, inputs, part, pairs, fits)
            for fit in fits.values():
                frames += [
                    pd.concat([names[part].reset_index(drop=True), table], axis=1)
                    for table in _tables(dense, fit, inputs, settings)
                ]
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
        fits: Mapping[int, RowFit],
    ) -> "_Dense":
        weight, bias = group.weight[part].float(), group.bias[part]
        outputs = dense_outputs(weight, bias, inputs)
        fit = next(iter(fits.values()))
        share = torch.tensor(fit.clusters.sizes).to(fit.sizes)[:, None] / inputs.n_tokens
        sizes = (share * fit.sizes.square()).sum(0)[None].sqrt()
        shape = judge_products(weight, bias, sizes)(0, shape_statistics(outputs))
        md = None
        if pairs is not None:
            distance = pairs.distance.to(outputs.device)
            md = mapping_difficulty(outputs, pairs.pairs, distance).md()
        return cls(part, weight, bias, outputs, sort_rows(outputs), shape, md)


def _tables(
    dense: _Dense, fit: RowFit, inputs: TokenStore, settings: RowSettings
) -> Iterator[pd.DataFrame]:
    """Yield a frame a sparsity, one row a dense row."""
    shape = _cluster_columns(dense, fit)
    for weight, realised, sparsity in zip(
        fit.weight, fit.realised, settings.sparsities, strict=True
    ):
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
            **shape,
            "realised_sparsity": _numpy(realised[dense.part]),
            "smallest_cluster": min(fit.clusters.sizes),
            "shrunk": fit.shrunk,
            "damping": fit.damping,
        }
        yield pd.DataFrame(measured)


def _cluster_columns(dense: _Dense, fit: RowFit) -> dict[str, np.ndarray]:
    """Return what depends on the clusters, but not on the sparsity."""
    judge = judge_products(dense.weight, dense.bias, fit.sizes)
    wd, wd_skipped = weighted_wd(dense.outputs, fit.clusters, judge=judge)
    columns = {"wd": dense.shape.wd, "weighted_wd": wd, "wd_skipped": wd_skipped}
    if fit.pairs is not None and dense.md is not None:
        md, md_skipped = weighted_md(dense.outputs, fit.clusters, fit.pairs)
        columns |= {"md": dense.md, "weighted_md": md, "md_skipped": md_skipped}
    return {name: _numpy(values) for name, values in columns.items()}


def _numpy(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().numpy()
    return array
