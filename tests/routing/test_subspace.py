import pytest
import torch
from torch import Tensor

from entangle.routing.subspace import leading_pairs
from entangle.seeding import torch_rng


def _covariance(size: int, spread: Tensor, tokens: int = 2000) -> Tensor:
    rng = torch_rng(0, "subspace-tests", size)
    x = torch.randn(tokens, size, generator=rng, dtype=torch.float64) * spread
    return x.mT @ x / tokens


@pytest.mark.parametrize("kind", ["falling", "wide", "few"])
def test_matches_the_full_decomposition(kind: str) -> None:
    index = torch.arange(1, 301, dtype=torch.float64)
    spread = {
        "falling": 1 / index.sqrt(),
        "wide": 10 ** (4 - 8 * index / 300),
        "few": 0.01 + 0 * index,
    }
    spread["few"][:12] = torch.linspace(5, 1, 12, dtype=torch.float64)
    matrix = _covariance(300, spread[kind])
    found = leading_pairs(matrix, 9)
    assert found is not None
    values, vectors = found
    exact, basis = torch.linalg.eigh(matrix)
    torch.testing.assert_close(values, exact.flip(0)[:9], rtol=1e-6, atol=0)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(9, dtype=torch.float64))
    lost = basis.flip(1)[:, :9].mT @ vectors
    assert torch.linalg.matrix_norm(lost, 2) > 0.9999
    again = leading_pairs(matrix, 9)
    assert again is not None
    assert torch.equal(again[1], vectors)


def test_leaves_small_matrices_and_small_ranks_to_others() -> None:
    matrix = _covariance(300, torch.ones(300, dtype=torch.float64))
    assert leading_pairs(matrix, 100) is None
    assert leading_pairs(torch.zeros_like(matrix), 5) is None
    assert leading_pairs(_covariance(300, torch.ones(300, dtype=torch.float64), 4), 9) is None
