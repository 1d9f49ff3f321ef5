"""Pruners: pure functions from a weight, a gram and a sparsity to a sparse weight.

All are batched over experts, run on any device and never change their inputs.
"""

from entangle.pruning.methods import METHODS, prune, prune_magnitude, prune_random, prune_wanda
from entangle.pruning.problem import PruneResult
from entangle.pruning.solver import prune_sparsegpt

__all__ = [
    "METHODS",
    "PruneResult",
    "prune",
    "prune_magnitude",
    "prune_random",
    "prune_sparsegpt",
    "prune_wanda",
]
