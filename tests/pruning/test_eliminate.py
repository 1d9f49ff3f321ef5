import torch

from entangle.pruning.factor import inverse_factor
from entangle.pruning.problem import fit_grid
from entangle.pruning.solver import eliminate
from tests.pruning.problems import make, wanda


def test_errors_add_up_to_the_damped_loss() -> None:
    weight, gram = make(2, 5, 24)
    factor, used, _ = inverse_factor(gram, damping=0.1)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = gram + (used * mean)[:, None, None] * torch.eye(24)
    columns = weight.mT.contiguous()
    pruned = torch.rand(2, 24, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    errors = eliminate(columns, factor, pruned, grid=fit_grid(weight, 3))
    change = weight - columns.mT
    loss = (change @ damped * change).sum(-1)
    torch.testing.assert_close(errors.square().sum(1), loss)
    assert not columns[pruned].any()


def test_update_lowers_the_loss_of_wandas_mask() -> None:
    weight, gram = make(2, 16, 48)
    masked = wanda(weight, gram, sparsity=0.6)
    factor, _, _ = inverse_factor(gram, damping=0.01)
    columns = weight.mT.contiguous()
    eliminate(columns, factor, ~masked.mask.mT)
    change = weight - columns.mT
    loss = (change @ gram * change).sum(-1)
    # Not in every row: each column is settled before those right of it are known.
    assert (loss < masked.loss_per_neuron).double().mean() > 0.9
    assert (loss.sum(-1) < 0.9 * masked.loss_per_neuron.sum(-1)).all()


def test_pruning_the_first_column_alone_is_least_squares() -> None:
    weight, gram = make(1, 3, 6)
    factor, _, _ = inverse_factor(gram, damping=0)
    columns = weight.mT.contiguous()
    pruned = torch.zeros_like(columns, dtype=torch.bool)
    pruned[:, 0] = True
    eliminate(columns, factor, pruned)
    # The best others solve H_oo x = H_o: w^T.
    best = torch.linalg.solve(gram[0, 1:, 1:], gram[0, 1:] @ weight[0].T)
    torch.testing.assert_close(columns[0, 1:], best)
