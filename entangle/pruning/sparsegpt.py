"""SparseGPT: optimal-brain-surgeon pruning, one column after another, for all rows at once."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from entangle.checks import whole
from entangle.precision import full_precision
from entangle.pruning.factor import inverse_factor
from entangle.pruning.fused import FusedSolver, can_fuse
from entangle.pruning.groups import in_groups
from entangle.pruning.masks import BLOCK
from entangle.pruning.problem import Problem, Rows, prepare
from entangle.pruning.result import PruneResult, finish
from entangle.pruning.solver import Solver


def prune_sparsegpt(
    weight: Float[Tensor, "*experts rows cols"],
    gram: Float[Tensor, "*experts cols cols"],
    *,
    sparsity: float | int | Float[Tensor, "..."] | None = None,
    pattern: str = "row",
    rows: Rows = None,
    bits: int | None = None,
    damping: float | int = 0.01,
    block_size: int = BLOCK,
) -> PruneResult:
    """Prune by saliency ``w_j**2 / U_jj**2`` and let the columns to the right make up for it.

    With ``U`` the upper factor of the damped gram's inverse (`inverse_factor`), the columns are
    visited from left to right. Setting ``w_j`` to ``q`` costs ``err**2`` with
    ``err = (w_j - q) / U_jj``, and ``err * U_j,j+1:`` is taken from the later columns. Masks are
    chosen a block of columns at a time:

    ``row``, ``layer``
        The zeros still to be placed in the row (layer) are given to the least salient of *all*
        columns not yet visited, and those that fall into this block are pruned. The total is exact,
        and with an identity gram this is magnitude pruning.
    ``block``
        `entangle.pruning.masks.prune_block` on every block (published rule, total not exact).
    ``n:m``
        The ``n`` most salient of every group of ``m`` columns stay, chosen when the group is
        reached. Blocks are cut to whole groups. With the letter n, every row has its own ``n``.

    Weights of dead inputs are pruned first, the smallest before the larger, and the others of them
    stay as they are. Equal saliencies fall from left to right (``layer``: block by block, in
    reading order). A row without zeros comes back bit-identical unless it is quantised.

    Parameters
    ----------
    weight, gram, sparsity, pattern, rows, bits
        As in `entangle.pruning.prune`. The gram is not normalised: its scale does not matter as
        long as the solver's dtype holds it (in float32, elements below 1e-38 lose digits).
    damping
        Multiple of the gram's mean diagonal (over all inputs, dead ones included) added to the
        diagonal; grows by factors of 10 for an expert whose gram is not positive definite.
    block_size
        Columns per block.

    Returns
    -------
    PruneResult

    Raises
    ------
    InvalidInput
        As in `entangle.pruning.prune`.
    NumericalError
        As in `entangle.pruning.prune`, and if a gram cannot be factorised.

    References
    ----------
    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    ICML 2023, algorithm 1; code at github.com/IST-DASLab/sparsegpt.
    """
    problem = prepare(weight, gram, sparsity=sparsity, pattern=pattern, rows=rows, bits=bits)
    return solve(problem, damping=damping, block_size=block_size)


def solve(problem: Problem, *, damping: float | int, block_size: int = BLOCK) -> PruneResult:
    """Prune a checked problem by SparseGPT (see `prune_sparsegpt`)."""
    block_size = whole("block_size", block_size, least=1)
    return in_groups(problem, partial(_solve, damping=damping, block_size=block_size))


def _solve(problem: Problem, *, damping: float | int, block_size: int) -> PruneResult:
    factor = problem.factor or inverse_factor(
        problem.need_gram(), damping=damping, first=problem.first
    )
    solver = (FusedSolver if can_fuse(problem, block_size) else Solver)(problem, factor)
    with full_precision():
        solver.run(block_size)
    solved, pruned = solver.weight, solver.pruned
    used = factor.damping
    del solver, factor
    solved = solved.to(problem.dense.dtype)
    return finish(problem, solved, pruned, used)
