import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from entangle.experts.pca import LARGEST_RESIDUAL, _orthonormal, fit_pca, leading_pairs
from entangle.seeding import torch_rng


def correlated(count: int, features: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(features, features, generator=rng)
    return torch.randn(count, features, generator=rng) @ mixing + 3.0


@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("rows", [1024, 5])
def test_equals_scikit_learn_also_far_from_the_origin(
    far: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entangle.experts.pca._ROWS", rows)
    tokens = correlated(400, 12) + far
    oracle = PCA(5, svd_solver="full").fit(tokens.double().numpy())
    pca = fit_pca(tokens.split(150), 5)
    np.testing.assert_allclose(pca.mean, oracle.mean_, rtol=1e-6)
    np.testing.assert_allclose(pca.explained, oracle.explained_variance_ratio_, rtol=1e-4)
    overlap = (pca.components.double().numpy() * oracle.components_).sum(1)
    np.testing.assert_allclose(np.abs(overlap), 1.0, atol=1e-5)
    assert pca.tokens == 400


def test_by_hand() -> None:
    tokens = torch.tensor([[1.0, 1.0], [3.0, 5.0], [5.0, 9.0]])
    pca = fit_pca([tokens], 2)
    assert pca.mean.tolist() == [3.0, 5.0]
    np.testing.assert_allclose(pca.components[0], np.array([1.0, 2.0]) / np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(pca.explained, [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(
        pca.project(tokens)[:, 0], np.sqrt(20) * np.array([-1, 0, 1]), atol=1e-5
    )


def test_rows_are_orthonormal_and_signed() -> None:
    pca = fit_pca([correlated(100, 9)], 9)
    torch.testing.assert_close(pca.components @ pca.components.mT, torch.eye(9))
    peaks = pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True))
    assert bool((peaks > 0).all())
    assert float(pca.explained.sum()) == pytest.approx(1.0)
    assert bool((pca.explained.diff() <= 0).all())


@pytest.mark.parametrize("count", [1, 5])
def test_constant_tokens_explain_nothing(count: int) -> None:
    pca = fit_pca([torch.full((count, 4), 2.5)], 2)
    assert pca.explained.tolist() == [0.0, 0.0]
    assert pca.project(torch.full((3, 4), 2.5)).tolist() == torch.zeros(3, 2).tolist()


def test_the_components_are_the_sum_of_their_pieces() -> None:
    pca = fit_pca([correlated(60, 40)], 7)
    assert torch.equal(pca._pieces.double().sum(0), pca.components.double())


@pytest.mark.gpu
def test_bfloat16_tokens_are_projected_as_their_float32_values() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tokens = correlated(500, 600).bfloat16().cuda()
    pca = fit_pca([tokens], 18)
    expected = (tokens.double() - pca.mean.double()) @ pca.components.double().mT
    torch.testing.assert_close(pca.project(tokens).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("features", "wanted"), [(1, 1), (31, 1), (32, 1), (62, 1), (63, 1), (64, 2), (95, 2), (96, 3)]
)
def test_one_component_for_32_features_by_default(features: int, wanted: int) -> None:
    assert fit_pca([correlated(20, features)]).components.shape == (wanted, features)


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
