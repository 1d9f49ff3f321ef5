"""Random pruning: the honest floor."""

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.pruning.problem import Problem, Rows, prepare
from entangle.pruning.result import PruneResult, mask_only
from entangle.pruning.select import select
from entangle.seeding import torch_rng


def prune_random(
    weight: Float[Tensor, "*experts rows cols"],
    gram: Float[Tensor, "*experts cols cols"] | None = None,
    *,
    seed: int,
    sparsity: float | int | Float[Tensor, "..."] | None = None,
    pattern: str = "row",
    rows: Rows = None,
    bits: int | None = None,
) -> PruneResult:
    """Prune weights at random.

    Every weight draws one uniform number, and the smallest are pruned: with one seed, the zeros at
    a lower sparsity are among those at a higher one, and a row's zeros do not depend on `rows`.

    Parameters
    ----------
    weight, gram, sparsity, pattern, rows, bits
        As in `entangle.pruning.prune`; `gram` serves only to compute the loss.
    seed
        Names the random stream; the same on every device.

    Returns
    -------
    PruneResult

    Raises
    ------
    InvalidInput, NumericalError
        As in `entangle.pruning.prune`.
    """
    problem = prepare(weight, gram, sparsity=sparsity, pattern=pattern, rows=rows, bits=bits)
    return solve(problem, seed=seed)


def solve(problem: Problem, *, seed: int) -> PruneResult:
    """Prune a checked problem at random (see `prune_random`)."""
    rng, shape = torch_rng(seed, "pruning", "random"), problem.dense.shape
    for _ in range(problem.first):
        torch.rand(shape[1:], generator=rng)
    draws = torch.rand(shape, generator=rng)
    chosen = draws if problem.rows is None else draws[:, problem.rows.cpu()]
    return mask_only(problem, select(chosen.to(problem.dense.device), problem))
