"""Magnitude pruning: the smallest weights go."""

from jaxtyping import Float
from torch import Tensor

from entangle.pruning.problem import Problem, Rows, prepare
from entangle.pruning.result import PruneResult, mask_only
from entangle.pruning.select import select


def prune_magnitude(
    weight: Float[Tensor, "*experts rows cols"],
    gram: Float[Tensor, "*experts cols cols"] | None = None,
    *,
    sparsity: float | int | Float[Tensor, "..."] | None = None,
    pattern: str = "row",
    rows: Rows = None,
    bits: int | None = None,
) -> PruneResult:
    """Prune the weights of smallest absolute value.

    Parameters
    ----------
    weight, gram, sparsity, pattern, rows, bits
        As in `entangle.pruning.prune`; `gram` serves only to compute the loss.

    Returns
    -------
    PruneResult

    Raises
    ------
    InvalidInput, NumericalError
        As in `entangle.pruning.prune`.
    """
    problem = prepare(weight, gram, sparsity=sparsity, pattern=pattern, rows=rows, bits=bits)
    return solve(problem)


def solve(problem: Problem) -> PruneResult:
    """Prune a checked problem by magnitude (see `prune_magnitude`)."""
    return mask_only(problem, select(problem.weight.abs(), problem))
