"""From a rule to whole zeros: layers first where a rule asks for it, then their neurons."""

from dataclasses import replace

import numpy as np

from entangle.allocation.budget import Wish, check_reachable, fill, round_zeros, whole_bounds
from entangle.allocation.registry import MODEL, RULES
from entangle.allocation.request import Request
from entangle.allocation.rows import Counts, Reals, Rows
from entangle.allocation.steps import step_sizes


def meet_budget(request: Request) -> tuple[Counts, int]:
    """Ask the rule and meet the budget.

    Returns
    -------
    zeros : ndarray
        Zeros of each neuron.
    remainder : int
        Zeros that the pattern's steps leave over; 0 with pattern ``row``.

    Raises
    ------
    InfeasibleBudget
        If the clips do not allow it.
    """
    rows, settings = request.rows, request.settings
    budget = round(settings.sparsity * rows.n_weights)
    steps = step_sizes(rows, settings.pattern)
    rule = RULES[settings.rule]
    layered: Wish | None = None
    if rule.of_layers:
        wish = _spread(rule.wish(request), rows)
    elif settings.across == MODEL:
        wish = rule.wish(request)
    else:
        layered = RULES[str(settings.across)].wish(_as_layer_rule(request))
        totals = _fill_layers(layered, rows, layered.low, layered.high, budget)
        layered = replace(layered, sparsity=totals / rows.layer_weights)
        wish = rule.wish(replace(request, target=layered.sparsity))
    low, high = whole_bounds(wish, rows.weights // steps)
    least, most = (low * steps).astype(np.float64), (high * steps).astype(np.float64)
    check_reachable(int(least.sum()), int(most.sum()), budget, rows.n_weights, _described(request))
    starts, totals = np.zeros(1, dtype=np.int64), np.array([float(budget)])
    if layered is not None:
        share = rows.layer_weights
        starts = rows.starts
        totals = _fill_layers(
            layered, rows, rows.total(least) / share, rows.total(most) / share, budget
        )
    zeros = fill(wish, rows.weights, least, most, starts=starts, totals=totals)
    return round_zeros(zeros, low, high, steps=steps, budget=budget)


def _as_layer_rule(request: Request) -> Request:
    """Ask a rule of layers, with its own default strength, on behalf of a rule of neurons."""
    across = str(request.settings.across)
    settings = replace(request.settings, rule=across, strength=RULES[across].strength)
    return replace(request, settings=settings)


def _spread(wish: Wish, rows: Rows) -> Wish:
    """Turn a wish for layers into one for their neurons."""
    return Wish(*(rows.spread(getattr(wish, f)) for f in ("sparsity", "gain", "low", "high")))


def _fill_layers(wish: Wish, rows: Rows, low: Reals, high: Reals, budget: int) -> Reals:
    """Return zeros of each layer, not whole, that add up to the budget within shares of zeros."""
    weights = rows.layer_weights
    start, total = np.zeros(1, dtype=np.int64), np.array([float(budget)])
    return fill(wish, weights, low * weights, high * weights, starts=start, totals=total)


def _described(request: Request) -> str:
    settings = request.settings
    parts = [
        f"rule {settings.rule!r}, neurons between {settings.lowest:g} and {settings.highest:g}"
    ]
    if settings.rule == "protect":
        parts.append(f"{settings.protect:g} of them at {settings.protect_sparsity:g}")
    if settings.pattern != "row":
        parts.append(f"pattern {settings.pattern}")
    return ", ".join(parts)
