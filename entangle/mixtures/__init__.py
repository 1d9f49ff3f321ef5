"""Pruning the experts of a mixture, and the neurons in them, without training.

``gather(model, text)`` looks at a text once; ``prune_mixtures(seen, "reap", sparsity=0.5)`` says
what goes; ``with pruned.applied():`` the model is without it, and
``write_mixtures(pruned, folder)`` makes an ordinary model of it.
"""

from entangle.mixtures.methods import MIXTURE_METHODS, MixtureMethod, prune_mixtures
from entangle.mixtures.pruned import Change, PrunedMixtures
from entangle.mixtures.statistics import Mixture, Statistics, gather
from entangle.mixtures.written import WrittenMixtures, write_mixtures

__all__ = [
    "MIXTURE_METHODS",
    "Change",
    "Mixture",
    "MixtureMethod",
    "PrunedMixtures",
    "Statistics",
    "WrittenMixtures",
    "gather",
    "prune_mixtures",
    "write_mixtures",
]
