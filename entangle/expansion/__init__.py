"""Sparse Expansion: a router and one sparse expert per cluster in place of a linear layer."""

from entangle.expansion.expand import Expansion, expand
from entangle.expansion.linear import ExpandedLinear
from entangle.expansion.loading import load_expanded

__all__ = ["ExpandedLinear", "Expansion", "expand", "load_expanded"]
