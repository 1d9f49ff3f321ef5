import pytest
import torch
from torch import Tensor

from entangle.experts.pca import LARGEST_RESIDUAL, _orthonormal, leading_pairs
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


@pytest.mark.parametrize("width", [1, 8, 120])
@pytest.mark.parametrize("spread", [0, 6, 20])
def test_columns_are_orthonormal_and_outside_the_basis(width: int, spread: int) -> None:
    rng = torch_rng(1, "subspace-tests", width)
    basis = torch.linalg.qr(torch.randn(300, 40, generator=rng, dtype=torch.float64)).Q
    block = torch.randn(300, width, generator=rng, dtype=torch.float64)
    block = block * torch.logspace(0, -spread, width, dtype=torch.float64) + basis[:, :1]
    found = _orthonormal(basis, block)
    both = torch.cat([basis, found], 1)
    identity = torch.eye(40 + width, dtype=torch.float64)
    torch.testing.assert_close(both.mT @ both, identity, rtol=0, atol=1e-12)
    outside = block - both @ (both.mT @ block)
    torch.testing.assert_close(outside, torch.zeros_like(block), rtol=0, atol=1e-12)


def test_well_conditioned_columns_need_no_householder(monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.randn(300, 20, generator=torch_rng(3, "subspace-tests"), dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "qr", None)
    found = _orthonormal(block.new_zeros(300, 0), block)
    identity = torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(found.mT @ found, identity, rtol=0, atol=1e-12)


def test_columns_that_lie_in_the_basis_are_replaced() -> None:
    rng = torch_rng(2, "subspace-tests")
    block = torch.randn(50, 6, generator=rng, dtype=torch.float64)
    block[:, 4:] = 0
    block[:, 3] = block[:, 2]
    found = _orthonormal(block.new_zeros(50, 0), block)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found.mT @ found, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(found @ (found.mT @ block), block)


@pytest.mark.parametrize(("count", "most"), [(9, 59), (32, 128), (40, 160)])
def test_the_basis_takes_at_most_half_of_the_matrix(count: int, most: int) -> None:
    """3 vectors for each one sought and 4 blocks, of 8 columns or a quarter of the number sought.

    9: 27 + 4 · 8 = 59; 32: 96 + 4 · 8 = 128; 40: 120 + 4 · 10 = 160.
    """
    for size, fits in ((2 * most, True), (2 * most - 1, False)):
        matrix = torch.diag(1 / torch.arange(1, size + 1, dtype=torch.float64))
        found = leading_pairs(matrix, count)
        assert (found is not None) == fits
        if found is not None:
            expected = 1 / torch.arange(1, count + 1, dtype=torch.float64)
            torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)


def test_residuals_are_as_small_as_is_said() -> None:
    index = torch.arange(1, 301, dtype=torch.float64)
    matrix = _covariance(300, 1 / index.sqrt())
    found = leading_pairs(matrix, 9)
    assert found is not None
    values, vectors = found
    residual = torch.linalg.vector_norm(matrix @ vectors - vectors * values, dim=0).max()
    assert residual <= LARGEST_RESIDUAL * values[-1] * (1 + 1e-6)
    assert (values.diff() <= 0).all()
