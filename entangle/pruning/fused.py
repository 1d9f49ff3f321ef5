"""The SparseGPT solver on an NVIDIA GPU: one kernel a step instead of one or more a column."""

from jaxtyping import Bool
from torch import Tensor

from entangle.kernels import solver as kernels
from entangle.kernels.compiled import usable
from entangle.pruning.factor import Factor
from entangle.pruning.problem import Problem
from entangle.pruning.solver import Solver


def can_fuse(problem: Problem, block_size: int) -> bool:
    """Tell whether `FusedSolver` can take the place of `Solver`.

    It solves float32 weights in blocks of at most 128 columns, in the patterns ``row`` and
    ``block``, without quantisation.
    """
    weight = problem.weight
    return (
        usable(weight)
        and weight.numel() > 0
        and weight.element_size() == 4
        and problem.bits is None
        and block_size <= kernels.WIDTH
        and problem.pattern.kind in ("row", "block")
        and weight.shape[2] <= kernels.longest_row(weight.device)
    )


class FusedSolver(Solver):
    """Chooses and settles whole blocks of columns by kernels; what it does is in `Solver`."""

    def __init__(self, problem: Problem, factor: Factor) -> None:
        super().__init__(problem, factor)
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
