"""Methods that choose a whole mask at once."""

from dataclasses import replace

import pytest
import torch

from entangle import pruning
from entangle.errors import InvalidInput
from entangle.pruning import prune
from entangle.pruning.methods import solve
from entangle.pruning.problem import prepare
from tests.pruning.problems import magnitude, make, randomly, wanda


def test_magnitude_by_hand() -> None:
    weight = torch.tensor([[3.0, -1, 2, -4], [0.1, 0.2, 0.3, 0.4]])
    row = magnitude(weight, sparsity=0.5)
    assert row.weight.tolist() == [[3, 0, 0, -4], [0, 0, torch.tensor(0.3), torch.tensor(0.4)]]
    layer = magnitude(weight, sparsity=0.5, pattern="layer")
    assert layer.weight.tolist() == [[3, -1, 2, -4], [0, 0, 0, 0]]
    assert layer.realised_sparsity.tolist() == [0, 1]


def test_loss_is_the_squared_error_of_the_outputs() -> None:
    weight, _ = make(1, 4, 12)
    inputs = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = magnitude(weight[0], inputs.T @ inputs, sparsity=0.5)
    error = inputs @ weight[0].T - inputs @ result.weight.T
    torch.testing.assert_close(result.loss_per_neuron, error.square().sum(0))


def test_no_gram_no_loss() -> None:
    result = magnitude(torch.ones(2, 4), sparsity=0.5)
    assert result.loss_per_neuron.isnan().all()
    assert result.damping.item() == 0


def test_ties_fall_from_left_to_right() -> None:
    result = magnitude(torch.ones(2, 4), sparsity=0.5)
    assert result.weight.tolist() == [[0, 0, 1, 1]] * 2
    result = magnitude(torch.ones(2, 4), sparsity=0.25, pattern="layer")
    assert result.weight.tolist() == [[0, 0, 1, 1], [1] * 4]


def test_quantised_after_pruning() -> None:
    # Range [-1, 2], 2 bits: values -1, 0, 1, 2. The kept 0.6 becomes 1.
    result = magnitude(torch.tensor([[-1.0, 2, 0.4, 0.6]]), sparsity=0.25, bits=2)
    assert result.weight.tolist() == [[-1, 2, 0, 1]]


def test_seed_decides() -> None:
    weight = torch.ones(2, 8, 64)
    first = randomly(weight, sparsity=0.5, seed=1)
    assert torch.equal(first.mask, randomly(weight, sparsity=0.5, seed=1).mask)
    assert not torch.equal(first.mask, randomly(weight, sparsity=0.5, seed=2).mask)
    assert not torch.equal(first.mask[0], first.mask[1])


def test_no_global_state() -> None:
    before = torch.random.get_rng_state()
    randomly(torch.ones(2, 8), sparsity=0.5, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_uniform_over_the_columns() -> None:
    kept = randomly(torch.ones(4000, 10), sparsity=0.3, seed=0).mask.double().mean(0)
    # Standard error sqrt(0.7 * 0.3 / 4000) = 0.007.
    assert ((kept - 0.7).abs() < 0.03).all()


def test_zeros_are_nested_and_independent_of_the_other_rows() -> None:
    weight = torch.ones(1, 6, 32)
    less = randomly(weight, sparsity=0.3, seed=0)
    more = randomly(weight, sparsity=0.6, seed=0)
    assert not (more.mask & ~less.mask).any()
    some = randomly(weight, sparsity=0.3, seed=0, rows=torch.tensor([4, 1]))
    assert torch.equal(some.mask[:, [1, 4]], less.mask[:, [1, 4]])
    assert some.mask[:, [0, 2, 3, 5]].all()


def test_experts_solved_later_draw_as_among_all() -> None:
    weight = torch.ones(5, 6, 32)
    together = randomly(weight, sparsity=0.5, seed=0)
    rest = prepare(weight[2:], None, sparsity=0.5, pattern="row", rows=None, bits=None)
    assert torch.equal(
        solve(replace(rest, first=2), method="random", damping=0, seed=0).mask, together.mask[2:]
    )


def test_wanda_by_hand() -> None:
    # Input norms sqrt(9) = 3, sqrt(1) = 1, sqrt(4) = 2. Saliencies of row 0: 3, 2, 8; of row 1: 6,
    # 7, 4. One zero each. Losses: pruned weight squared times its input's power: 4 * 1 and 4 * 4.
    weight = torch.tensor([[1.0, -2, 4], [2, 7, -2]])
    gram = torch.tensor([[9.0, 0, 1], [0, 1, 1], [1, 1, 4]])
    result = wanda(weight, gram, sparsity=1 / 3)
    assert result.weight.tolist() == [[1, 0, 4], [2, 7, 0]]
    assert result.loss_per_neuron.tolist() == [4, 16]
    assert result.damping.item() == 0


def test_wanda_reads_only_the_diagonal() -> None:
    weight, gram = make(2, 5, 20)
    diagonal = torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    full = wanda(weight, gram, sparsity=0.4)
    assert torch.equal(full.mask, wanda(weight, diagonal, sparsity=0.4).mask)


@pytest.mark.parametrize("pattern", ["row", "layer", "block", "3:4"])
def test_wanda_of_equal_inputs_is_magnitude(pattern: str) -> None:
    weight, gram = make(1, 5, 140)
    gram.diagonal(dim1=-2, dim2=-1).fill_(1e5)
    sparsity = 0.25
    found = wanda(weight, gram, sparsity=sparsity, pattern=pattern)
    expected = magnitude(weight, sparsity=sparsity, pattern=pattern)
    assert torch.equal(found.mask, expected.mask)


def test_order_of_columns() -> None:
    weight, gram = make(1, 5, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    base = wanda(weight, gram, sparsity=0.4)
    moved = wanda(weight[..., order], gram[:, order][..., order], sparsity=0.4)
    assert torch.equal(moved.mask, base.mask[..., order])


def test_wanda_prunes_dead_inputs_first() -> None:
    gram = torch.diag(torch.tensor([0.0, 1, 0, 1]))
    result = wanda(torch.tensor([[3.0, 0.1, 2, 1]]), gram, sparsity=0.25)
    assert result.mask.tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_needs_a_gram(method: str) -> None:
    with pytest.raises(InvalidInput, match=r"`gram`.*\bNone\b"):
        prune(torch.ones(2, 2), None, method=method, sparsity=0.5)


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "sparsegpt"])
def test_the_names_of_the_version_before_are_found(method: str) -> None:
    weight, gram = make(1, 3, 8)
    with pytest.warns(DeprecationWarning, match=method):
        before = getattr(pruning, f"prune_{method}")
    expected = prune(weight, gram, method=method, sparsity=0.5, seed=3)
    assert torch.equal(before(weight, gram, sparsity=0.5, seed=3).weight, expected.weight)
    with pytest.raises(AttributeError):
        pruning.prune_nothing  # noqa: B018
