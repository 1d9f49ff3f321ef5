"""Wanda: the smallest products of a weight and the norm of its input go."""

from jaxtyping import Float
from torch import Tensor

from entangle.pruning.masks import dead_first
from entangle.pruning.problem import Problem, Rows, prepare
from entangle.pruning.result import PruneResult, mask_only
from entangle.pruning.select import select


def prune_wanda(
    weight: Float[Tensor, "*experts rows cols"],
    gram: Float[Tensor, "*experts cols cols"],
    *,
    sparsity: float | int | Float[Tensor, "..."] | None = None,
    pattern: str = "row",
    rows: Rows = None,
    bits: int | None = None,
) -> PruneResult:
    """Prune the weights of smallest ``|w_j| * ||X_j||``; the others stay as they are.

    Only the gram's diagonal, ``||X_j||**2``, decides; all of it enters the loss. Weights of dead
    inputs (zero diagonal) go first, the smallest before the larger.

    Parameters
    ----------
    weight, gram, sparsity, pattern, rows, bits
        As in `entangle.pruning.prune`.

    Returns
    -------
    PruneResult

    Raises
    ------
    InvalidInput, NumericalError
        As in `entangle.pruning.prune`.

    References
    ----------
    Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
    ICLR 2024, equation 1.
    """
    problem = prepare(weight, gram, sparsity=sparsity, pattern=pattern, rows=rows, bits=bits)
    return solve(problem)


def solve(problem: Problem) -> PruneResult:
    """Prune a checked problem by Wanda's rule (see `prune_wanda`)."""
    power = problem.need_gram().diagonal(dim1=-2, dim2=-1)
    saliency = problem.weight.abs() * power.sqrt()[:, None, :]
    ranked = dead_first(saliency, problem.weight, power == 0)
    return mask_only(problem, select(ranked, problem))
