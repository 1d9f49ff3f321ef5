"""Turn one dense layer into pruned experts, one a cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.models.layers import Layer
from entangle.precision import full_precision
from entangle.pruning import METHODS
from entangle.pruning.factor import Factor
from entangle.pruning.methods import solve
from entangle.pruning.problem import prepare
from entangle.pruning.quadratic import quadratic
from entangle.stats.gram import ClusterGramsResult

Sparsity = float | Float[Tensor, " out_features"] | None

_WORK_BYTES = 2 * 2**30
_GPU_SHARE = 4
_COPIES = 6  # of the gram and of the rows, at most, inside a solver
_CHANGE_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class SolverSettings:
    """How experts are pruned; the fields are the arguments of `entangle.pruning.prune`."""

    pruner: str = "sparsegpt"
    pattern: str = "row"
    bits: int | None = None
    damping: float = 0.01
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer and what they lost."""

    weight: Float[Tensor, "experts out_features in_features"]
    """Sparse weights with their zeros, in the layer's dtype."""
    squared_error: Float[Tensor, " experts"]
    """Sum over the cluster's tokens and all neurons of the squared output error, float64."""
    energy: float
    """Sum over all tokens and neurons of the squared dense output (without bias)."""
    damping: Float[Tensor, " experts"]
    """Multiple of the gram's mean diagonal that was needed; 0 where none is used."""
    tokens: Int64[Tensor, " experts"]
    """Calibration tokens of every cluster."""
    realised_sparsity: float
    """Share of zeros over all experts."""
    shrunk: int
    """Clusters with fewer tokens than inputs, whose gram was shrunk toward the layer's."""


def check_solvable(layer: Layer, sparsity: Sparsity, settings: SolverSettings) -> None:
    """Raise what `solve_experts` would about its settings, before anything is recorded.

    Raises
    ------
    UnknownName
        For a pruner that does not exist.
    InvalidInput
        If the sparsity, the pattern or the weight breaks a rule; the message names the layer.
    """
    choice("pruner", settings.pruner, METHODS, kind="pruning method")
    try:
        prepare(
            layer.weight, None, sparsity=sparsity, pattern=settings.pattern, rows=None,
            bits=settings.bits,
        )  # fmt: skip
    except InvalidInput as error:
        raise InvalidInput(f"{layer.name}: {error}") from error


def solve_experts(
    layer: Layer, grams: ClusterGramsResult, sparsity: Sparsity, settings: SolverSettings
) -> Experts:
    """Prune a layer's own dense weight once for every cluster.

    Parameters
    ----------
    layer
        Its weight is the starting point of every expert; it is not changed.
    grams
        ``XᵀX`` and token count of every cluster, over the layer's inputs.
    sparsity
        For all rows, or one value a row; None with an n:m pattern of numbers, such as ``2:4``.
    settings
        Pruner, pattern and the like.

    Notes
    -----
    Clusters are solved with `shrunk_grams`; errors are computed with their own grams.
    """
    parts = []
    beside = 0 if layer.device.type == "cpu" else layer.out_features
    for part, gram in shrunk_grams(grams, rows=beside):
        pruned = prune_part(layer, gram, sparsity, settings, experts=len(gram), first=part.start)
        lost = squared_errors(layer, pruned.weight, grams.gram[part])
        parts.append(SolvedPart(pruned, lost))
    energy = dense_energy(layer, grams.gram.sum(0))
    return join_parts(parts, energy=energy, tokens=grams.count, shrunk=count_shrunk(grams))


@dataclass(frozen=True, eq=False)
class PrunedPart:
    """The experts of some neighbouring clusters; fields as in `Experts`."""

    weight: Float[Tensor, "part out_features in_features"]
    damping: Float[Tensor, " part"]
    zeros: int


@dataclass(frozen=True, eq=False)
class SolvedPart:
    """The experts of some neighbouring clusters, and what they lost (see `Experts`)."""

    pruned: PrunedPart
    squared_error: Float[Tensor, " part"]


def prune_part(
    layer: Layer,
    gram: Float[Tensor, "part in_features in_features"] | None,
    sparsity: Sparsity,
    settings: SolverSettings,
    *,
    experts: int,
    first: int = 0,
    factor: Factor | None = None,
) -> PrunedPart:
    """Prune a layer's dense weight once for every gram.

    Parameters
    ----------
    layer, sparsity, settings
        As in `solve_experts`.
    gram
        Of some neighbouring clusters, as `shrunk_grams` gives them; None if the factor is enough.
    experts
        Number of these clusters.
    first
        Number of the first cluster.
    factor
        Of the grams' inverses, if it is known: layers with one input have the same.
    """
    problem = prepare(
        layer.weight.expand(experts, -1, -1), gram, sparsity=sparsity,
        pattern=settings.pattern, rows=None, bits=settings.bits, loss=False,
    )  # fmt: skip
    result = solve(
        replace(problem, first=first, factor=factor),
        method=settings.pruner, damping=settings.damping, seed=settings.seed,
    )  # fmt: skip
    zeros = int((result.realised_sparsity.double() * layer.in_features).round().sum())
    return PrunedPart(result.weight, result.damping.flatten(), zeros)


def squared_errors(
    layer: Layer,
    sparse: Float[Tensor, "part out_features in_features"],
    gram: Float[Tensor, "part in_features in_features"],
) -> Float[Tensor, " part"]:
    """Return the squared output error of experts, summed over tokens and neurons, in float64.

    Parameters
    ----------
    layer
        The dense layer.
    sparse
        Its experts.
    gram
        ``XᵀX`` of each expert's own tokens.
    """
    dense = layer.weight.float()
    at_once = len(sparse)
    if sparse.device.type != "cpu":
        at_once = max(1, _CHANGE_BYTES // (4 * dense.numel()))
    parts = zip(sparse.split(at_once), gram.split(at_once), strict=True)
    return torch.cat([_quadratic(some.float() - dense, own) for some, own in parts])


def dense_energy(layer: Layer, gram: Float[Tensor, "in_features in_features"]) -> float:
    """Return the squared dense output (without bias), summed over tokens and neurons."""
    return float(_quadratic(layer.weight.float()[None], gram[None]).sum())


def join_parts(
    parts: Sequence[SolvedPart],
    *,
    energy: float,
    tokens: Int64[Tensor, " experts"],
    shrunk: int,
    weight: Float[Tensor, "experts out_features in_features"] | None = None,
) -> Experts:
    """Put the experts of all clusters, in order, together; the other fields are given.

    ``weight`` is given where the parts' weights lie in one tensor already.
    """
    if weight is None:
        weight = torch.cat([part.pruned.weight for part in parts])
    return Experts(
        weight=weight,
        squared_error=torch.cat([part.squared_error for part in parts]),
        energy=energy,
        damping=torch.cat([part.pruned.damping for part in parts]),
        tokens=tokens,
        realised_sparsity=sum(part.pruned.zeros for part in parts) / weight.numel(),
        shrunk=shrunk,
    )


def shrunk_grams(
    grams: ClusterGramsResult, *, rows: int = 0
) -> Iterator[tuple[slice, Float[Tensor, "part features features"]]]:
    """Yield the grams to solve experts with, as many clusters at a time as the work memory holds.

    A cluster with fewer tokens n_c than inputs d has a singular gram. It is shrunk toward the
    layer's: ``G_c + (d − n_c) · G / n``, as if d − n_c average tokens of the layer had been seen.

    Parameters
    ----------
    grams
        ``XᵀX`` and token count of every cluster.
    rows
        Weight rows that are solved with every gram, where they count beside it in memory.

    Yields
    ------
    tuple
        The clusters, and their grams.
    """
    k, features = grams.gram.shape[:2]
    work = _work_bytes(grams.gram.device)
    per_batch = max(1, work // (_COPIES * 4 * features * (features + rows)))
    parts = [slice(start, start + per_batch) for start in range(0, k, per_batch)]
    if not count_shrunk(grams):
        yield from ((part, grams.gram[part]) for part in parts)
        return
    average = grams.gram.sum(0) / max(1, int(grams.count.sum()))
    for part in parts:
        own = grams.gram[part]
        missing = (features - grams.count[part]).clamp_min(0).to(own)
        yield part, own + missing[:, None, None] * average


def _work_bytes(device: torch.device) -> int:
    """Return the work memory: fixed on the CPU, a share of what is free on a GPU."""
    if device.type != "cuda":
        return _WORK_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(_WORK_BYTES, (torch.cuda.mem_get_info(device)[0] + unused) // _GPU_SHARE)


def count_shrunk(grams: ClusterGramsResult) -> int:
    """Count the clusters whose gram `shrunk_grams` shrinks."""
    return int((grams.count < grams.gram.shape[1]).sum())


def _quadratic(rows: Tensor, gram: Tensor) -> Tensor:
    """Return the sum over rows of ``row · gram · rowᵀ``, shape (experts,), float64."""
    with full_precision():
        if rows.device.type != "cpu":
            return quadratic(rows, gram.to(rows.dtype)).sum(1, dtype=torch.float64)
        return (rows @ gram.to(rows.dtype) * rows).sum((1, 2), dtype=torch.float64)
