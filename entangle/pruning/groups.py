"""As many experts at a time as a GPU's memory holds."""

import logging
from collections.abc import Callable
from dataclasses import fields, replace

import torch

from entangle.pruning.factor import Factor
from entangle.pruning.problem import Problem
from entangle.pruning.result import PruneResult

_LOG = logging.getLogger(__name__)


def in_groups(problem: Problem, solve: Callable[[Problem], PruneResult]) -> PruneResult:
    """Solve all experts together or, where a GPU's memory runs out, fewer and fewer at a time.

    On the CPU, where memory does not run out with an error, they are solved together.
    """
    experts = len(problem.weight)
    if problem.weight.device.type == "cpu" or experts == 1:
        return solve(problem)
    parts: list[PruneResult] = []
    start, size = 0, experts
    while start < experts:
        part = _try(_some_of(problem, start, start + size), solve)
        if part is None:
            size = (size + 1) // 2
            _LOG.warning("GPU memory ran out: pruning %d of %d experts at a time", size, experts)
            torch.cuda.empty_cache()
            continue
        parts.append(part)
        start += size
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(PruneResult)]
    return PruneResult(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _try(problem: Problem, solve: Callable[[Problem], PruneResult]) -> PruneResult | None:
    """Solve a problem; None if memory runs out with more than one expert."""
    try:
        return solve(problem)
    except torch.OutOfMemoryError:
        if len(problem.weight) == 1:
            raise
        return None


def _some_of(problem: Problem, start: int, stop: int) -> Problem:
    """Return the problem of the experts ``[start, stop)``."""
    factor = problem.factor
    return replace(
        problem,
        dense=problem.dense[start:stop],
        weight=problem.weight[start:stop],
        gram=None if problem.gram is None else problem.gram[start:stop],
        budget=problem.budget[start:stop],
        first=problem.first + start,
        factor=None if factor is None else Factor(*(part[start:stop] for part in factor)),
        batched=True,
    )
