"""Scores of neurons, turned into zeros per neuron under an exact budget."""

from entangle.allocation.allocate import allocate
from entangle.allocation.allocation import Allocation, load_allocation
from entangle.allocation.experts import expert_budget
from entangle.allocation.export import FORMATS, export, import_allocation
from entangle.allocation.request import InfeasibleBudget
from entangle.allocation.rules import RULES
from entangle.allocation.search import search

__all__ = [
    "FORMATS",
    "RULES",
    "Allocation",
    "InfeasibleBudget",
    "allocate",
    "expert_budget",
    "export",
    "import_allocation",
    "load_allocation",
    "search",
]
