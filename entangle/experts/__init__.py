"""Sparse Expansion: a router and one sparse expert per cluster in place of a linear layer."""

from entangle.experts.checkpoint import load_expanded
from entangle.experts.expand import Expansion, expand
from entangle.experts.linear import ExpandedLinear

__all__ = ["ExpandedLinear", "Expansion", "expand", "load_expanded"]
