import pytest
import torch

from entangle.pruning import quadratic as module
from entangle.pruning.quadratic import quadratic
from tests.pruning.problems import make


@pytest.mark.parametrize("panel", [1, 7, 30, 64])
def test_panels_give_the_quadratic_form(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(module, "_PANEL", panel)
    rows, gram = make(2, 5, 30)
    expected = (rows @ gram * rows).sum(-1)
    torch.testing.assert_close(quadratic(rows, gram), expected)
    torch.testing.assert_close(module._by_panels(rows, gram), expected)


def test_by_hand() -> None:
    gram = torch.tensor([[[2.0, 1], [1, 3]]])
    assert module._by_panels(torch.tensor([[[1.0, -2]]]), gram).item() == 2 - 4 + 12
