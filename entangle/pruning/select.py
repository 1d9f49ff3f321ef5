"""The choice of a whole mask at once, for pruners that leave the kept weights alone."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entangle.pruning.masks import BLOCK, prune_block, prune_groups, prune_smallest
from entangle.pruning.problem import Problem


def select(
    saliency: Float[Tensor, "experts rows cols"], problem: Problem
) -> Bool[Tensor, "experts rows cols"]:
    """Mark the least salient weights of `problem` in its pattern; equal ones in reading order.

    Returns
    -------
    Tensor
        True where pruned.
    """
    pattern = problem.pattern
    if pattern.kind == "row":
        return prune_smallest(saliency, problem.budget)
    if pattern.kind == "layer":
        return prune_smallest(saliency.flatten(1), problem.budget).view_as(saliency)
    if pattern.kind == "block":
        blocks = torch.split(saliency, BLOCK, dim=-1)
        return torch.cat([prune_block(block, problem.sparsity) for block in blocks], -1)
    return prune_groups(saliency, problem.zeros_a_group, pattern.group)
