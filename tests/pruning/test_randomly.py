from dataclasses import replace

import torch

from entangle.pruning import prune_random
from entangle.pruning.methods import solve_random
from entangle.pruning.problem import prepare


def test_seed_decides() -> None:
    weight = torch.ones(2, 8, 64)
    first = prune_random(weight, sparsity=0.5, seed=1)
    assert torch.equal(first.mask, prune_random(weight, sparsity=0.5, seed=1).mask)
    assert not torch.equal(first.mask, prune_random(weight, sparsity=0.5, seed=2).mask)
    assert not torch.equal(first.mask[0], first.mask[1])


def test_no_global_state() -> None:
    before = torch.random.get_rng_state()
    prune_random(torch.ones(2, 8), sparsity=0.5, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_uniform_over_the_columns() -> None:
    kept = prune_random(torch.ones(4000, 10), sparsity=0.3, seed=0).mask.double().mean(0)
    # Standard error sqrt(0.7 * 0.3 / 4000) = 0.007.
    assert ((kept - 0.7).abs() < 0.03).all()


def test_zeros_are_nested_and_independent_of_the_other_rows() -> None:
    weight = torch.ones(1, 6, 32)
    less = prune_random(weight, sparsity=0.3, seed=0)
    more = prune_random(weight, sparsity=0.6, seed=0)
    assert not (more.mask & ~less.mask).any()
    some = prune_random(weight, sparsity=0.3, seed=0, rows=torch.tensor([4, 1]))
    assert torch.equal(some.mask[:, [1, 4]], less.mask[:, [1, 4]])
    assert some.mask[:, [0, 2, 3, 5]].all()


def test_experts_solved_later_draw_as_among_all() -> None:
    weight = torch.ones(5, 6, 32)
    together = prune_random(weight, sparsity=0.5, seed=0)
    rest = prepare(weight[2:], None, sparsity=0.5, pattern="row", rows=None, bits=None)
    assert torch.equal(solve_random(replace(rest, first=2), seed=0).mask, together.mask[2:])
