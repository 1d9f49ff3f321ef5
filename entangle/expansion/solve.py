"""Turn one dense layer into pruned experts, one a cluster."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.errors import InvalidInput, unknown_name
from entangle.models.layers import Layer
from entangle.precision import full_precision
from entangle.pruning import METHODS, prune
from entangle.pruning.problem import prepare
from entangle.pruning.quadratic import quadratic
from entangle.stats.gram import ClusterGramsResult

Sparsity = float | Float[Tensor, " out_features"] | None

_WORK_BYTES = 2 * 2**30
_GPU_SHARE = 4
_COPIES = 6  # of the gram and of the rows, at most, inside a solver


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
    if settings.pruner not in METHODS:
        raise unknown_name("pruning method", str(settings.pruner), METHODS)
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
    weight = layer.weight
    solved, errors, dampings, zeros = [], [], [], 0
    beside = 0 if weight.device.type == "cpu" else layer.out_features
    for part, gram in shrunk_grams(grams, rows=beside):
        result = prune(
            weight.expand(gram.shape[0], -1, -1),
            gram,
            method=settings.pruner,
            sparsity=sparsity,
            pattern=settings.pattern,
            bits=settings.bits,
            damping=settings.damping,
            seed=settings.seed,
            loss=False,
        )
        solved.append(result.weight)
        errors.append(_quadratic(result.weight.float() - weight.float(), grams.gram[part]))
        dampings.append(result.damping.flatten())
        zeros += int((~result.mask).sum())
    experts = torch.cat(solved)
    return Experts(
        weight=experts,
        squared_error=torch.cat(errors),
        energy=float(_quadratic(weight.float()[None], grams.gram.sum(0)[None]).sum()),
        damping=torch.cat(dampings),
        tokens=grams.count,
        realised_sparsity=zeros / experts.numel(),
        shrunk=count_shrunk(grams),
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
    average = grams.gram.sum(0) / max(1, int(grams.count.sum()))
    for start in range(0, k, per_batch):
        part = slice(start, start + per_batch)
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
