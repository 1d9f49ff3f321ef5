"""Pruners: pure functions from a weight, a gram and a sparsity to a sparse weight.

All are batched over experts, run on any device and never change their inputs.
"""

import warnings
from functools import partial

from entangle.pruning.methods import METHODS, PRUNERS, prune
from entangle.pruning.problem import PruneResult

__all__ = ["METHODS", "PRUNERS", "PruneResult", "prune"]


def __getattr__(name: str) -> object:
    """Find ``prune_wanda`` and its like, the names of the version before, with a note."""
    method = name.removeprefix("prune_")
    if method == name or method not in METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    now = f"entangle.pruning.prune(…, method={method!r})"
    warnings.warn(f"entangle.pruning.{name} is now {now}", DeprecationWarning, stacklevel=2)
    return partial(prune, method=method)
