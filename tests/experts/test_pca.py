import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from entangle.experts.pca import fit_pca


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
