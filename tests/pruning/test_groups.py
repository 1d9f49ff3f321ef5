"""Experts in groups; a GPU whose memory runs out is played by tensors on the meta device."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from entangle.pruning.factor import Factor
from entangle.pruning.problem import Problem, PruneResult, prepare
from entangle.pruning.solver import _some_of, in_groups


class Solver:
    """Solves at most so many experts at a time, and notes the groups."""

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, list[tuple[int, int]]()

    def __call__(self, problem: Problem) -> PruneResult:
        count = len(problem.weight)
        self.seen.append((problem.first, count))
        if count > self.most:
            raise torch.OutOfMemoryError("no room")
        which = torch.arange(problem.first, problem.first + count).float()
        if problem.factor is not None:
            assert problem.factor.damping.tolist() == which.tolist()
            assert len(problem.factor.upper) == count
        weight = which[:, None, None].expand(-1, 2, 3)
        return PruneResult(weight, weight > 0, weight[..., 0], which, weight[..., 0])


def _problem(experts: int, device: str) -> Problem:
    weight: Tensor = torch.ones(experts, 2, 3)
    problem = prepare(weight, None, sparsity=0.5, pattern="row", rows=None, bits=None)
    moved = {name: getattr(problem, name).to(device) for name in ("dense", "weight", "budget")}
    return Problem(
        **moved, gram=None, pattern=problem.pattern, sparsity=0.5, rows=None, bits=None,
        batched=True,
    )  # fmt: skip


@pytest.mark.parametrize("experts", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_smaller_groups_until_they_fit(
    experts: int, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    solver = Solver(most)
    with caplog.at_level(logging.WARNING):
        result = in_groups(_problem(experts, "meta"), solver)
    assert result.damping.tolist() == list(range(experts))
    assert result.weight.shape == (experts, 2, 3)
    assert max(count for _, count in solver.seen[-1:]) <= most
    assert ("GPU memory ran out" in caplog.text) == (experts > most)


def test_a_known_factor_goes_with_its_experts() -> None:
    factor = Factor(torch.zeros(5, 3, 3), torch.arange(5.0), torch.zeros(5, 3, dtype=torch.bool))
    result = in_groups(replace(_problem(5, "meta"), factor=factor), Solver(2))
    assert result.damping.tolist() == list(range(5))


def test_one_expert_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        in_groups(_problem(4, "meta"), Solver(0))


def test_all_at_once_on_the_cpu() -> None:
    solver = Solver(100)
    in_groups(_problem(5, "cpu"), solver)
    assert solver.seen == [(0, 5)]


def test_every_part_has_the_budgets_of_its_own_experts() -> None:
    sparsity = torch.tensor([[0.0, 1 / 3], [1 / 3, 2 / 3], [2 / 3, 1.0]])
    problem = prepare(
        torch.ones(3, 2, 3), None, sparsity=sparsity, pattern="row", rows=None, bits=None
    )
    seen = list[list[list[int]]]()

    def solve(part: Problem) -> PruneResult:
        if len(part.weight) > 1:
            raise torch.OutOfMemoryError("no room")
        seen.append(part.budget.tolist())
        assert len(part.dense) == len(part.budget) == 1
        weight = part.dense
        return PruneResult(weight, weight > 0, weight[..., 0], torch.zeros(1), weight[..., 0])

    parts = [_some_of(problem, range(i, i + 1)) for i in range(3)]
    for part in parts:
        solve(part)
    assert seen == [[[0, 1]], [[1, 2]], [[2, 3]]]
    assert [part.first for part in parts] == [0, 1, 2]
