import pytest
import torch
from torch import Tensor

from entangle.pruning import problem as module
from entangle.pruning import prune
from entangle.pruning.problem import quadratic
from tests.pruning.problems import make


@pytest.mark.parametrize("panel", [1, 7, 30, 64])
@pytest.mark.parametrize("multiplier", [module._plain, module._split])
def test_panels_give_the_quadratic_form(
    monkeypatch: pytest.MonkeyPatch, panel: int, multiplier: module.Multiplier
) -> None:
    monkeypatch.setattr(module, "_PANEL", panel)
    dtype = torch.float64 if multiplier is module._plain else torch.float32
    rows, gram = make(2, 5, 30, dtype=dtype)
    expected = (rows @ gram * rows).sum(-1)
    torch.testing.assert_close(quadratic(rows, gram), expected)
    torch.testing.assert_close(module._by_panels(rows, gram, multiplier(rows)), expected)


def test_by_hand() -> None:
    rows, gram = torch.tensor([[[1.0, -2]]]), torch.tensor([[[2.0, 1], [1, 3]]])
    for multiplier in (module._plain, module._split):
        assert module._by_panels(rows, gram, multiplier(rows)).item() == 2 - 4 + 12


def test_two_parts_by_hand() -> None:
    # 11 significant bits: at 1 the step is 2**-10. The nearest to 1 + 0.75 steps is 1 + 1 step.
    values = torch.tensor([1 + 0.75 * 2**-10, -(1 + 0.25 * 2**-10), 0.0, 3.0, 2.0**-126])
    high, low = module._two_parts(values)
    assert high.tolist() == [1 + 2**-10, -1.0, 0.0, 3.0, 2.0**-126]
    assert low.tolist() == [-0.25 * 2**-10, -0.25 * 2**-10, 0.0, 0.0, 0.0]


def test_two_parts_add_up_and_the_first_is_short() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e6
    high, low = module._two_parts(values)
    assert torch.equal(high + low, values)
    assert not (high.view(torch.int32) & 0x1FFF).any()
    assert (low.abs() <= 2.0**-11 * values.abs()).all()


def test_nothing_that_is_not_finite_gets_lost() -> None:
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800000], dtype=torch.int32).view(torch.float32)
    high, low = module._two_parts(odd)
    assert not (high + low).isfinite().any()


class Units:
    """Matrix products as tensor cores do them: the factors lose all but 11 bits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        exact = Tensor.baddbmm_

        def rounded(product: Tensor, left: Tensor, right: Tensor) -> Tensor:
            self.calls += 1
            return exact(product, _cut(left), _cut(right))

        monkeypatch.setattr(Tensor, "baddbmm_", rounded)


def _cut(values: Tensor) -> Tensor:
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def _changes() -> tuple[Tensor, Tensor]:
    """Return changes of bfloat16 weights by SparseGPT, whose errors cancel, and the grams."""
    weight, gram = make(2, 40, 300, dtype=torch.float32)
    weight = weight.bfloat16()
    solved = prune(weight, gram, sparsity=0.5).weight
    return solved.float() - weight.float(), gram


def test_is_exact_on_units_of_11_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, gram = _changes()
    exact = torch.einsum("erc,ecd,erd->er", rows.double(), gram.double(), rows.double())
    whole = exact.sum()
    Units(monkeypatch)
    monkeypatch.setattr(module, "_PANEL", 128)
    split = module._by_panels(rows, gram, module._split(rows)).double()
    plain = module._by_panels(rows, gram, module._plain(rows)).double()
    assert float((split.sum() / whole - 1).abs()) < 1e-6
    assert float((split / exact - 1).abs().max()) < 5e-6
    assert float((plain / exact - 1).abs().max()) > 5e-5  # the units do lose bits


@pytest.mark.parametrize(("low", "products"), [(0.0, 2), (2.0**-12, 3)])
def test_second_parts_of_rows_are_left_out_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, low: float, products: int
) -> None:
    units = Units(monkeypatch)
    rows, gram = torch.ones(1, 2, 8) + low, torch.eye(8)[None]
    module._by_panels(rows, gram, module._split(rows))
    assert units.calls == products


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_is_exact_on_a_gpu(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    rows, gram = _changes()
    exact = torch.einsum("erc,ecd,erd->er", rows.double(), gram.double(), rows.double())
    monkeypatch.setattr(module, "_PART_BYTES", 1)  # one expert after the other
    monkeypatch.setattr(module, "_PANEL", 128)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = quadratic(rows.cuda(), gram.cuda()).cpu().double()
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((found.sum() / exact.sum() - 1).abs()) < 3e-6
    assert float((found / exact - 1).abs().max()) < 2e-5


def test_no_rows_and_no_experts() -> None:
    for experts, rows in ((3, 0), (0, 2)):
        shape = quadratic(
            torch.zeros(experts, rows, 8, device="meta"), torch.zeros(experts, 8, 8, device="meta")
        ).shape
        assert shape == (experts, rows)
