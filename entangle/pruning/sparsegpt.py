"""SparseGPT: optimal-brain-surgeon pruning, one column after another, for all rows at once."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.precision import full_precision
from entangle.pruning.eliminate import eliminate
from entangle.pruning.factor import inverse_factor
from entangle.pruning.masks import BLOCK, dead_first, prune_block, prune_groups, prune_smallest
from entangle.pruning.problem import Problem, prepare
from entangle.pruning.quantize import fit_grid
from entangle.pruning.result import PruneResult, finish

_PANEL = 16


def prune_sparsegpt(
    weight: Float[Tensor, "*experts rows cols"],
    gram: Float[Tensor, "*experts cols cols"],
    *,
    sparsity: float | int | Float[Tensor, "..."] | None = None,
    pattern: str = "row",
    rows: Bool[Tensor, " rows"] | Int[Tensor, " chosen"] | None = None,
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
        reached. Blocks are cut to whole groups.

    Weights of dead inputs are pruned first, the smallest before the larger, and the others of them
    stay as they are. Equal saliencies fall from left to right (``layer``: block by block, in
    reading order). A row without zeros comes back bit-identical unless it is quantised.

    Parameters
    ----------
    weight, gram, sparsity, pattern, rows, bits
        As in `entangle.pruning.prune`. The gram is not normalised; its scale does not matter.
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
    if block_size < 1:
        raise InvalidInput(f"`block_size` must be at least 1; got {block_size}.")
    factor, used = inverse_factor(problem.need_gram(), damping=damping)
    solver = _Solver(problem, factor)
    with full_precision():
        solver.run(block_size)
    return finish(problem, solver.weight, solver.pruned, used)


class _Solver:
    """The state of one solve: weights final left of the current block, up to date right of it."""

    def __init__(self, problem: Problem, factor: Float[Tensor, "experts cols cols"]) -> None:
        self.pattern, self.sparsity = problem.pattern, problem.sparsity
        self.factor = factor
        self.power = factor.diagonal(dim1=-2, dim2=-1).square()
        self.dead = problem.need_gram().diagonal(dim1=-2, dim2=-1) == 0
        self.grid = None if problem.bits is None else fit_grid(problem.weight, problem.bits)
        self.weight = problem.weight.clone(memory_format=torch.contiguous_format)
        self.pruned = torch.zeros_like(self.weight, dtype=torch.bool)
        self.left = problem.budget

    def run(self, block_size: int) -> None:
        """Visit all columns."""
        group, cols = self.pattern.group, self.weight.shape[-1]
        width = max(block_size // group, 1) * group
        for start in range(0, cols, width):
            stop = min(start + width, cols)
            if self.pattern.kind != "n:m":
                self.pruned[..., start:stop] = self._choose(start, stop)
            self._visit(start, stop)

    def _visit(self, start: int, stop: int) -> None:
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
                self.pruned[..., first:last] = prune_groups(saliency, self.pattern)
            pruned = self.pruned[..., first:last].mT.contiguous()
            corner = self.factor[:, first:last, first:last]
            errors[:, first - start : last - start] = eliminate(
                panel, corner, pruned, grid=self.grid
            )
        self.weight[..., start:stop] = columns.mT
        right = self.weight[..., stop:]
        right.baddbmm_(errors.mT, self.factor[:, start:stop, stop:], alpha=-1)

    def _saliency(
        self, weight: Float[Tensor, "experts rows width"], start: int, stop: int
    ) -> Float[Tensor, "experts rows width"]:
        """Return what pruning each weight alone would cost, given all columns left of it."""
        saliency = weight.square() / self.power[:, None, start:stop]
        return dead_first(saliency, weight, self.dead[:, start:stop])

    def _choose(self, start: int, stop: int) -> Bool[Tensor, "experts rows width"]:
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
