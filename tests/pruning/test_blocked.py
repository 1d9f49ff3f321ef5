import pytest
import torch

from entangle.pruning import factor
from tests.pruning.problems import make


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
