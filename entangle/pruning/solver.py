"""The plain SparseGPT solver: masks and updates of one block of columns after another."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entangle.pruning.eliminate import eliminate
from entangle.pruning.factor import Factor
from entangle.pruning.masks import dead_first, prune_block, prune_groups, prune_smallest
from entangle.pruning.problem import Problem
from entangle.pruning.quantize import fit_grid

_PANEL = 16


class Solver:
    """The state of one solve: weights final left of the current block, up to date right of it."""

    def __init__(self, problem: Problem, factor: Factor) -> None:
        self.pattern, self.sparsity = problem.pattern, problem.sparsity
        self.factor, self.dead = factor.upper, factor.dead
        self.power = factor.upper.diagonal(dim1=-2, dim2=-1).square()
        self.grid = None if problem.bits is None else fit_grid(problem.weight, problem.bits)
        self.weight = problem.weight.clone(memory_format=torch.contiguous_format)
        self.pruned = torch.zeros_like(self.weight, dtype=torch.bool)
        self.left = problem.budget
        self.zeros_a_group = problem.zeros_a_group

    def run(self, block_size: int) -> None:
        """Visit all columns."""
        group, cols = self.pattern.group, self.weight.shape[-1]
        width = max(block_size // group, 1) * group
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
