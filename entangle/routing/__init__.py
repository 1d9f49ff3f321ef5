"""Routers: which expert a token goes to."""

from entangle.routing.fit import fit_router
from entangle.routing.router import Router, RouterStatistics

__all__ = ["Router", "RouterStatistics", "fit_router"]
