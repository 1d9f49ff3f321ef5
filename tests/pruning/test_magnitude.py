import torch

from entangle.pruning import prune_magnitude
from tests.pruning.problems import make


def test_by_hand() -> None:
    weight = torch.tensor([[3.0, -1, 2, -4], [0.1, 0.2, 0.3, 0.4]])
    row = prune_magnitude(weight, sparsity=0.5)
    assert row.weight.tolist() == [[3, 0, 0, -4], [0, 0, torch.tensor(0.3), torch.tensor(0.4)]]
    layer = prune_magnitude(weight, sparsity=0.5, pattern="layer")
    assert layer.weight.tolist() == [[3, -1, 2, -4], [0, 0, 0, 0]]
    assert layer.realised_sparsity.tolist() == [0, 1]


def test_loss_is_the_squared_error_of_the_outputs() -> None:
    weight, _ = make(1, 4, 12)
    inputs = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = prune_magnitude(weight[0], inputs.T @ inputs, sparsity=0.5)
    error = inputs @ weight[0].T - inputs @ result.weight.T
    torch.testing.assert_close(result.loss_per_neuron, error.square().sum(0))


def test_no_gram_no_loss() -> None:
    result = prune_magnitude(torch.ones(2, 4), sparsity=0.5)
    assert result.loss_per_neuron.isnan().all()
    assert result.damping.item() == 0


def test_ties_fall_from_left_to_right() -> None:
    result = prune_magnitude(torch.ones(2, 4), sparsity=0.5)
    assert result.weight.tolist() == [[0, 0, 1, 1]] * 2
    result = prune_magnitude(torch.ones(2, 4), sparsity=0.25, pattern="layer")
    assert result.weight.tolist() == [[0, 0, 1, 1], [1] * 4]


def test_quantised_after_pruning() -> None:
    # Range [-1, 2], 2 bits: values -1, 0, 1, 2. The kept 0.6 becomes 1.
    result = prune_magnitude(torch.tensor([[-1.0, 2, 0.4, 0.6]]), sparsity=0.25, bits=2)
    assert result.weight.tolist() == [[-1, 2, 0, 1]]
