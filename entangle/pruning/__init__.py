"""Pruners: pure functions from a weight, a gram and a sparsity to a sparse weight.

All are batched over experts, run on any device and never change their inputs.
"""

from entangle.pruning.magnitude import prune_magnitude
from entangle.pruning.methods import METHODS, prune
from entangle.pruning.randomly import prune_random
from entangle.pruning.result import PruneResult
from entangle.pruning.sparsegpt import prune_sparsegpt
from entangle.pruning.wanda import prune_wanda

__all__ = [
    "METHODS",
    "PruneResult",
    "prune",
    "prune_magnitude",
    "prune_random",
    "prune_sparsegpt",
    "prune_wanda",
]
