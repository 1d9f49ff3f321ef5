"""SparseGPT: optimal-brain-surgeon pruning, one column after another, for all rows at once.

The masks and updates of one block of columns after another, plainly or, on an NVIDIA GPU, by one
kernel a step instead of one or more a column; as many experts at a time as a GPU's memory holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entangle.kernels import solver as kernels
from entangle.kernels.dispatch import dispatch
from entangle.memory import in_fitting_parts
from entangle.precision import full_precision
from entangle.pruning.factor import Factor, inverse_factor
from entangle.pruning.grid import Grid, fit_grids
from entangle.pruning.masks import BLOCK, dead_first, prune_block, prune_groups, prune_smallest
from entangle.pruning.problem import Problem, PruneResult, finish


def eliminate(
    columns: Float[Tensor, "experts width rows"],
    factor: Float[Tensor, "experts width width"],
    pruned: Bool[Tensor, "experts width rows"],
    *,
    grids: Sequence[Grid] | None = None,
) -> Float[Tensor, "experts width rows"]:
    """Settle neighbouring columns from left to right, each making up for those before it.

    Parameters
    ----------
    columns
        The columns as the columns left of them require them, transposed so that a column is
        contiguous. Overwritten by the final values.
    factor
        The diagonal block of ``U`` that belongs to these columns.
    pruned
        True where the final value is 0.
    grids
        Of each column: rounds the kept values; None keeps them as they are.

    Returns
    -------
    Tensor
        The errors ``(w_j - q_j) / U_jj``. The columns right of these are still to be lowered by
        ``errors^T U_right``.

    Notes
    -----
    Summed over all columns, a row's squared errors are its loss under the damped gram.
    """
    errors = torch.empty_like(columns)
    for j in range(columns.shape[1]):
        column, error, later = columns[:, j], errors[:, j], columns[:, j + 1 :]
        final = (column if grids is None else grids[j].round(column)).masked_fill(pruned[:, j], 0)
        torch.sub(column, final, out=error).div_(factor[:, j, j, None])
        column.copy_(final)
        later.addcmul_(factor[:, j, j + 1 :, None], error[:, None], value=-1)
    return errors


_PANEL = 16


class Solver:
    """The state of one solve: weights final left of the current block, up to date right of it."""

    def __init__(self, problem: Problem, factor: Factor, block_size: int) -> None:
        self.block_size = block_size
        self.pattern, self.sparsity = problem.pattern, problem.sparsity
        self.factor, self.dead = factor.upper, factor.dead
        self.power = factor.upper.diagonal(dim1=-2, dim2=-1).square()
        self.grids: list[Grid] | None = None
        if problem.bits is not None:
            self.grids = fit_grids(problem.weight, problem.bits, problem.group_size)
        self.weight = problem.weight.clone(memory_format=torch.contiguous_format)
        self.pruned = torch.zeros_like(self.weight, dtype=torch.bool)
        self.left = problem.budget
        self.zeros_a_group = problem.zeros_a_group

    def run(self) -> None:
        """Visit all columns."""
        group, cols = self.pattern.group, self.weight.shape[-1]
        width = max(self.block_size // group, 1) * group
        for start in range(0, cols, width):
            stop = min(start + width, cols)
            if self.pattern.kind != "n:m":
                self.pruned[..., start:stop] = self.choose(start, stop)
            self.visit(start, stop)

    def visit(self, start: int, stop: int) -> None:
        """Settle one block, a panel at a time, and update all columns right of it."""
        columns = self.weight[..., start:stop].mT.contiguous()
        errors = torch.empty_like(columns)
        step = self.pattern.group if self.pattern.kind == "n:m" else _PANEL
        for first in range(start, stop, step):
            last = min(first + step, stop)
            panel = columns[:, first - start : last - start]
            above = self.factor[:, start:first, first:last]
            panel.baddbmm_(above.mT, errors[:, : first - start], alpha=-1)
            if self.pattern.kind == "n:m":
                saliency = self._saliency(panel.mT, first, last)
                self.pruned[..., first:last] = prune_groups(saliency, self.zeros_a_group, step)
            pruned = self.pruned[..., first:last].mT.contiguous()
            corner = self.factor[:, first:last, first:last]
            grids = None if self.grids is None else self.grids[first:last]
            errors[:, first - start : last - start] = eliminate(panel, corner, pruned, grids=grids)
        self.weight[..., start:stop] = columns.mT
        right = self.weight[..., stop:]
        right.baddbmm_(errors.mT, self.factor[:, start:stop, stop:], alpha=-1)

    def _saliency(
        self, weight: Float[Tensor, "experts rows width"], start: int, stop: int
    ) -> Float[Tensor, "experts rows width"]:
        """Return what pruning each weight alone would cost, given all columns left of it."""
        saliency = weight.square() / self.power[:, None, start:stop]
        return dead_first(saliency, weight, self.dead[:, start:stop])

    def choose(self, start: int, stop: int) -> Bool[Tensor, "experts rows width"]:
        """Mark the weights of a block to prune, and take them off the budget."""
        if self.pattern.kind == "block":
            saliency = self._saliency(self.weight[..., start:stop], start, stop)
            return prune_block(saliency, self.sparsity)
        saliency = self._saliency(self.weight[..., start:], start, self.weight.shape[-1])
        if self.pattern.kind == "row":
            pruned = prune_smallest(saliency, self.left, stop - start)
            self.left = self.left - pruned.sum(-1)
            return pruned
        here, later = saliency[..., : stop - start], saliency[..., stop - start :]
        line = torch.cat([here.flatten(1), later.flatten(1)], -1)
        flat = prune_smallest(line, self.left, here[0].numel())
        self.left = self.left - flat.sum(-1)
        return flat.view(here.shape)


class FusedSolver(Solver):
    """Chooses and settles whole blocks of columns by kernels; what it does is in `Solver`."""

    def __init__(self, problem: Problem, factor: Factor, block_size: int) -> None:
        super().__init__(problem, factor, block_size)
        self.factor, self.power = self.factor.contiguous(), self.power.contiguous()
        self.left = self.left.clone()

    def choose(self, start: int, stop: int) -> Bool[Tensor, "experts rows width"]:
        """Mark the weights of a block to prune, and take them off the budget."""
        inputs = self.weight, self.power, self.dead
        pruned = self.pruned[..., start:stop]
        if self.pattern.kind == "row":
            kernels.choose_rows(*inputs, self.left, self.pruned, start, stop)
            return pruned
        weights = pruned[0].numel()
        rank = int(weights * self.sparsity)
        if self.sparsity == 0 or rank == weights:
            return pruned.fill_(self.sparsity != 0)
        kernels.choose_block(*inputs, rank + 1, self.pruned, start, stop)
        return pruned

    def visit(self, start: int, stop: int) -> None:
        """Settle one block and update all columns right of it."""
        errors = kernels.eliminate(self.weight, self.factor, self.pruned, start, stop)
        right = self.weight[..., stop:]
        right.baddbmm_(errors, self.factor[:, start:stop, stop:], alpha=-1)


def can_fuse(problem: Problem, _factor: Factor | None, block_size: int) -> bool:
    """Tell whether `FusedSolver` can take the place of `Solver`.

    It solves float32 weights in blocks of at most 128 columns, in the patterns ``row`` and
    ``block``, without quantisation.
    """
    known = problem.bits is None and problem.pattern.kind in ("row", "block")
    return known and kernels.fits(problem.weight, block_size)


_solver = dispatch(FusedSolver, where=can_fuse)(Solver)


def in_groups(problem: Problem, solve: Callable[[Problem], PruneResult]) -> PruneResult:
    """Solve all experts together or, where a GPU's memory runs out, fewer and fewer at a time."""
    experts = len(problem.weight)
    if experts == 1:
        return solve(problem)
    parts = in_fitting_parts(
        experts, experts, lambda some: solve(_some_of(problem, some)), told="pruning"
    )
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(PruneResult)]
    return PruneResult(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _some_of(problem: Problem, experts: range) -> Problem:
    """Return the problem of some neighbouring experts."""
    factor, own = problem.factor, slice(experts.start, experts.stop)
    return replace(
        problem,
        dense=problem.dense[own],
        weight=problem.weight[own],
        gram=None if problem.gram is None else problem.gram[own],
        budget=problem.budget[own],
        first=problem.first + experts.start,
        factor=None if factor is None else Factor(*(part[own] for part in factor)),
        batched=True,
    )


def solve_sparsegpt(
    problem: Problem, *, damping: float | int, block_size: int = BLOCK
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
    reading order). A row without zeros comes back bit-identical unless it is quantised. The gram's
    scale does not matter as long as the solver's dtype holds it (in float32, elements below 1e-38
    lose digits).

    Parameters
    ----------
    problem
        From `entangle.pruning.problem.prepare`.
    damping
        Multiple of the gram's mean diagonal (over all inputs, dead ones included) added to the
        diagonal; grows by factors of 10 for an expert whose gram is not positive definite.
    block_size
        Columns per block.

    Raises
    ------
    InvalidInput, NumericalError
        As in `entangle.pruning.prune`.

    References
    ----------
    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    ICML 2023, algorithm 1; code at github.com/IST-DASLab/sparsegpt.
    """
    factor = problem.factor or inverse_factor(
        problem.need_gram(), damping=damping, first=problem.first
    )
    solver = _solver(problem, factor, block_size)
    with full_precision():
        solver.run()
    solved, pruned = solver.weight, solver.pruned
    used = factor.damping
    del solver, factor
    solved = solved.to(problem.dense.dtype)
    return finish(problem, solved, pruned, used)
