from collections.abc import Callable

import pytest
import torch

from entangle.errors import InvalidInput, NumericalError
from entangle.pruning import factor
from entangle.pruning.factor import inverse_factor
from tests.pruning.problems import make


@pytest.mark.parametrize("cols", [1, 5, 257, 300])
def test_is_the_upper_cholesky_factor_of_the_inverse(cols: int) -> None:
    _, gram = make(2, 1, cols)
    before = gram.clone()
    factor, used, _ = inverse_factor(gram, damping=0.01)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = gram + 0.01 * mean[:, None, None] * torch.eye(cols)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped)).mT
    torch.testing.assert_close(factor, torch.linalg.cholesky(torch.linalg.inv(damped), upper=True))
    torch.testing.assert_close(factor, expected)
    assert torch.equal(used, torch.full_like(used, 0.01))
    assert torch.equal(gram, before)


@pytest.mark.parametrize("cols", [150, 600])
def test_number_of_threads_changes_hardly_a_bit(cols: int, threads: Callable[[int], None]) -> None:
    _, gram = make(2, 1, cols, dtype=torch.float32)
    found = []
    for number in (1, 2):
        threads(number)
        found.append(inverse_factor(gram, damping=0.01).upper)
    assert (found[0] != found[1]).float().mean() < 1e-4
    torch.testing.assert_close(*found, rtol=2**-22, atol=1e-12)


def test_by_hand() -> None:
    # H = [[2, 1], [1, 2]], inv(H) = [[2, -1], [-1, 2]] / 3. U_11**2 = 2/3, U_11 U_12 = -1/3, and
    # U_12**2 + U_22**2 = 2/3, so that U_12**2 = 1/6 and U_22**2 = 1/2.
    factor, _, _ = inverse_factor(torch.tensor([[[2.0, 1], [1, 2]]]), damping=0)
    expected = torch.tensor([[[(2 / 3) ** 0.5, -((1 / 6) ** 0.5)], [0, 0.5**0.5]]])
    torch.testing.assert_close(factor, expected)


def test_dead_inputs_get_a_unit_diagonal() -> None:
    # Mean diagonal (0 + 6) / 2 = 3, damped by 0.1 * 3: diagonal 1.3 and 6.3.
    factor, _, _ = inverse_factor(torch.tensor([[[0.0, 0], [0, 6]]]), damping=0.1)
    torch.testing.assert_close(factor, torch.diag(torch.tensor([1.3, 6.3]).rsqrt())[None])


def test_only_the_failing_experts_escalate() -> None:
    # Eigenvalues 1 +- 2 around a mean diagonal of 1: 0.05, 0.5 fail, 5 works.
    good, bad = torch.eye(2), torch.tensor([[1.0, 2], [2, 1]])
    factor, used, _ = inverse_factor(torch.stack([bad, good, bad * 4]), damping=0.05)
    torch.testing.assert_close(used, torch.tensor([5, 0.05, 5]))
    torch.testing.assert_close(factor[1], torch.eye(2) * 1.05**-0.5)
    torch.testing.assert_close(factor[0].mT @ factor[0], torch.linalg.inv(bad + 5 * torch.eye(2)))
    torch.testing.assert_close(factor[2] * 2, factor[0])


def test_escalation_from_zero() -> None:
    singular = torch.ones(1, 2, 2, dtype=torch.float64)
    singular[0, 1, 1] -= 1e-3
    assert inverse_factor(singular, damping=0)[1].item() == pytest.approx(1e-3)


def test_gives_up_with_the_expert_and_the_last_damping() -> None:
    grams = torch.stack([torch.eye(2), torch.tensor([[1.0, 1e7], [1e7, 1]])])
    with pytest.raises(NumericalError, match=r"\b1\b.*\b10000\b"):
        inverse_factor(grams, damping=0.01)


@pytest.mark.parametrize("damping", [-0.01, float("inf"), float("nan")])
def test_bad_damping(damping: float) -> None:
    with pytest.raises(InvalidInput, match=r"`damping`.*\b0\b"):
        inverse_factor(torch.eye(2)[None], damping=damping)


@pytest.mark.parametrize(("corner", "panel", "slab"), [(4, 8, 16), (16, 64, 32), (128, 512, 2048)])
@pytest.mark.parametrize("cols", [1, 5, 50, 129])
def test_is_the_upper_factor_of_the_inverse(
    monkeypatch: pytest.MonkeyPatch, corner: int, panel: int, slab: int, cols: int
) -> None:
    for name, size in (("_CORNER", corner), ("_PANEL", panel), ("_SLAB", slab)):
        monkeypatch.setattr(factor, name, size)
    _, gram = make(3, 1, cols)
    work = gram.triu() + 7 * torch.ones_like(gram).tril(-1)  # what lies below is not read
    work[1].diagonal().neg_()
    failed = factor.factorise_(work)
    assert failed.tolist() == [False, True, False]
    expected = torch.linalg.cholesky(torch.linalg.inv(gram[[0, 2]]), upper=True)
    torch.testing.assert_close(work[[0, 2]], expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_has_no_root(value: float) -> None:
    matrix = make(1, 1, 40)[1][0].double()
    assert factor._invert_root_(matrix.clone())
    matrix[30, 7] = matrix[7, 30] = value
    assert not factor._invert_root_(matrix)
