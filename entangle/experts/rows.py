"""Fit routers on one recorded input, and solve and measure the chosen rows that read it.

Pruned rows of every layer, solved once for all the arms that use them.

Routed experts for some rows of a dense layer, and their installation for a while.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from entangle.allocation.allocation import ROW, Allocation
from entangle.errors import InvalidInput, NumericalError, unknown_name
from entangle.experts.linear import SharedRouting
from entangle.experts.router import Router
from entangle.experts.row_measures import (
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
from entangle.experts.solver import (
    ExpertSettings,
    cluster_grams,
    count_shrunk,
    prune_part,
    solve_clusters,
)
from entangle.models.layers import Layer
from entangle.precision import full_precision
from entangle.recording.stream import TokenStore
from entangle.stats.gram import ClusterGramsResult, GramResult
from entangle.stats.mapping_difficulty import mapping_difficulty
from entangle.stats.tiles import row_parts
from entangle.stats.wasserstein import ShapeStatistics, judge_products, shape_statistics, sort_rows

_SOLVE_BYTES = 2**30
_COPIES = 6  # of the stacked rows, at most, inside a solver
_BYTES_A_TOKEN = 40  # of every neuron that is measured: outputs, errors, sorted copies, pairs


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
    for clusters, rows, part in solve_clusters(
        stacked, grams, shares, settings, beside=at_once, at_once=at_once, numbered=False
    ):
        solved[clusters, rows] = part.weight
        zeros[rows] += part.zeros.cpu()
        damping = max(damping, float(part.damping.max()))
    by_sparsity = solved.unflatten(1, (-1, n_rows)).transpose(0, 1)
    realised = zeros / (len(grams.count) * features)
    return by_sparsity, realised.unflatten(0, (-1, n_rows)), damping


def measure_group(
    group: RowGroup,
    inputs: TokenStore,
    fits: Sequence[RowFit],
    *,
    seed: int,
    memory: int,
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
            frames += [
                pd.concat([names[part].reset_index(drop=True), table], axis=1)
                for fit in fits
                for table in _tables(dense, fit, inputs)
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
    shape = _cluster_columns(dense, fit)
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


Rows = Mapping[str, NDArray[np.int64]]
Level = float | Allocation
"""How sparse rows are: a share of zeros in [0, 1] for all, or each as an allocation says."""


@dataclass(frozen=True, eq=False)
class SolvedRows:
    """Sparse weights of some rows of a layer at several levels."""

    rows: Int64[Tensor, " rows"]
    """Indices in ascending order."""
    weight: Mapping[Level, Float[Tensor, "rows in_features"]]
    """By level, in the layer's dtype, on the CPU."""
    realised: Mapping[Level, Float[Tensor, " rows"]]
    """Share of zeros of every row, by level."""

    def take(
        self, wanted: NDArray[np.int64], level: Level
    ) -> tuple[Float[Tensor, "chosen in_features"], Float[Tensor, " chosen"]]:
        """Return the weights and realised sparsities of some of the rows."""
        place = torch.searchsorted(self.rows, torch.tensor(wanted))
        return self.weight[level][place], self.realised[level][place]


def solve_rows(
    layers: Sequence[Layer],
    rows: Rows,
    grams: Mapping[str, GramResult],
    *,
    sparsities: Sequence[Level],
    pruner: str = "sparsegpt",
    damping: float = 0.01,
    seed: int = 0,
) -> dict[str, SolvedRows]:
    """Prune rows of dense layers to an exact number of zeros each.

    Rows do not depend on one another, so all rows and sparsities of the layers that read one input
    are solved together, with one factorisation of its gram.

    Parameters
    ----------
    layers
        Layers of the dense model.
    rows
        Indices in ascending order by layer name; layers without any are left out.
    grams
        ``XᵀX`` of each layer's inputs, by layer name.
    sparsities
        Shares of zeros in [0, 1], or allocations that hold all of the layers, all of one pattern.
    pruner, damping, seed
        As in `entangle.pruning.prune` (``pruner`` is its ``method``). The zeros of ``"random"``
        also depend on which rows and sparsities are solved together.

    Raises
    ------
    InvalidInput
        If the allocations' patterns differ.
    NumericalError
        If a gram cannot be factorised; the message names the layers.
    """
    settings = ExpertSettings(
        pruner=pruner, pattern=_pattern(sparsities), damping=damping, seed=seed
    )
    solved: dict[str, SolvedRows] = {}
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        if len(rows.get(layer.name, ())):
            groups.setdefault(id(grams[layer.name]), []).append(layer)
    for members in groups.values():
        chosen = [torch.tensor(rows[layer.name]) for layer in members]
        dense = torch.cat(
            [layer.weight[i.to(layer.device)] for layer, i in zip(members, chosen, strict=True)]
        )
        shares = torch.cat([_shares(level, members, chosen) for level in sparsities])
        try:
            found = prune_part(
                dense.repeat(len(sparsities), 1),
                grams[members[0].name].gram[None].to(dense.device),
                shares.to(dense.device),
                settings,
            )
        except NumericalError as error:
            names = ", ".join(layer.name for layer in members)
            raise NumericalError(f"{names}: {error}") from error
        weight = found.weight[0].cpu().unflatten(0, (len(sparsities), -1))
        zeros = found.realised[0].cpu().unflatten(0, (len(sparsities), -1))
        start = 0
        for layer, index in zip(members, chosen, strict=True):
            own = slice(start, start + len(index))
            solved[layer.name] = SolvedRows(
                index,
                {level: weight[i, own] for i, level in enumerate(sparsities)},
                {level: zeros[i, own] for i, level in enumerate(sparsities)},
            )
            start = own.stop
    return solved


def _pattern(levels: Sequence[Level]) -> str:
    """Return the pattern of all levels; that of a share of zeros is ``row``."""
    patterns = {one.pattern if isinstance(one, Allocation) else ROW for one in levels} or {ROW}
    if len(patterns) > 1:
        raise InvalidInput(
            f"`sparsities` must have one pattern; got {' and '.join(sorted(patterns))}: solve them "
            "one after the other."
        )
    return patterns.pop()


def _shares(
    level: Level, layers: Sequence[Layer], rows: Sequence[Int64[Tensor, " _"]]
) -> Float[Tensor, " all_rows"]:
    """Return the share of zeros of every chosen row of some layers, float64."""
    if not isinstance(level, Allocation):
        return torch.full((sum(map(len, rows)),), float(level), dtype=torch.float64)
    pairs = zip(layers, rows, strict=True)
    return torch.cat([level.sparsity[layer.name][index] for layer, index in pairs])


class RowExperts(nn.Module):
    """A dense layer whose chosen neurons are computed by the expert of each token's cluster.

    All other neurons, and all neurons where every expert equals the dense rows, are the dense
    layer's, bit for bit. A token costs the dense layer and the chosen rows of one expert.

    Parameters
    ----------
    layer
        The dense layer; its module is called as it is, and its bias is that of the experts.
    rows
        Indices of the chosen neurons, all different, shape (rows,).
    weight
        Their weights in every expert, (experts, rows, in_features).
    routing
        Which expert a token goes to; shared by the layers that read the same input. Not needed for
        a single expert.

    Raises
    ------
    InvalidInput
        If the indices or shapes do not fit the layer or the routing.
    """

    def __init__(
        self,
        layer: Layer,
        rows: Int64[Tensor, " rows"],
        weight: Float[Tensor, "experts rows in_features"],
        routing: SharedRouting | None = None,
    ) -> None:
        super().__init__()
        _check(layer, rows, weight, routing)
        dense = layer.weight
        rows, weight = rows.to(dense.device), weight.to(dense.device)
        bias = None if layer.bias is None else layer.bias[rows]
        self.dense = layer.module
        self.rows: Int64[Tensor, " rows"]
        self.register_buffer("rows", rows, persistent=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.routing = routing
        self._unchanged = bool((weight == dense[rows]).all())

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the dense layer's output, the chosen columns overwritten by the experts'."""
        outputs: Tensor = self.dense(x)
        if self._unchanged:
            return outputs
        chosen = self._chosen(x).to(outputs.dtype)
        shape = (*x.shape[:-1], self.rows.numel())
        return outputs.index_copy(-1, self.rows, chosen.reshape(shape))

    def _chosen(self, x: Tensor) -> Tensor:
        """Return the outputs of the chosen rows, (tokens, rows), in the order of the tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        if self.routing is None or self.weight.shape[0] == 1:
            return nn.functional.linear(tokens, self.weight[0], self.bias)
        clusters = self.routing(x)
        counts = torch.bincount(clusters, minlength=self.weight.shape[0]).tolist()
        outputs = tokens.new_empty(tokens.shape[0], self.weight.shape[1])
        for expert, index in enumerate(clusters.argsort(stable=True).split(counts)):
            if index.numel():
                chosen = nn.functional.linear(tokens[index], self.weight[expert], self.bias)
                outputs[index] = chosen.to(outputs.dtype)
        return outputs

    def extra_repr(self) -> str:
        """Describe the shape for ``print(model)``."""
        experts, rows, in_features = self.weight.shape
        return f"rows={rows}, in_features={in_features}, experts={experts}"


def _check(layer: Layer, rows: Tensor, weight: Tensor, routing: SharedRouting | None) -> None:
    index = rows.tolist()
    if len(set(index)) < len(index) or not all(0 <= row < layer.out_features for row in index):
        raise InvalidInput(
            f"`rows` must be different indices in [0, {layer.out_features}) of layer "
            f"{layer.name!r}; got {index[:8]}."
        )
    experts = weight.shape[0] if routing is None else routing.router.k
    if experts < 1 or tuple(weight.shape) != (experts, len(index), layer.in_features):
        raise InvalidInput(
            f"`weight` must have shape (experts, rows, in_features) = ({experts}, {len(index)}, "
            f"{layer.in_features}) for layer {layer.name!r}; got {tuple(weight.shape)}."
        )
    if routing is None and experts > 1:
        raise InvalidInput(f"`routing` must tell which of {experts} experts to take; got None.")
    if routing is not None and routing.router.features != layer.in_features:
        raise InvalidInput(
            f"`routing` must be fitted on tokens of {layer.in_features} features; "
            f"got {routing.router.features}."
        )


@contextmanager
def installed(
    module: nn.Module, replacements: Mapping[str, nn.Module]
) -> Iterator[Mapping[str, nn.Module]]:
    """Put modules in the place of others inside the ``with`` block.

    Parameters
    ----------
    module
        The model, changed in place; however the block ends, the very objects that were there
        before are put back.
    replacements
        New modules by full dotted name.

    Yields
    ------
    Mapping
        The modules that were replaced, by name.

    Raises
    ------
    UnknownName
        If the model has no module of a name; nothing is replaced then.
    """
    present = dict(module.named_modules(remove_duplicate=False))
    for name in replacements:
        if not name or name not in present:
            raise unknown_name("module", name, present)
    originals = {name: present[name] for name in replacements}
    try:
        for name, replacement in replacements.items():
            module.set_submodule(name, replacement)
        yield originals
    finally:
        for name, original in originals.items():
            module.set_submodule(name, original)
