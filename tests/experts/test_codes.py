"""Weights that the pruners quantise are stored as codes, and come back."""

import pytest
import torch

from entangle.errors import InvalidInput
from entangle.experts.codes import codes_of
from entangle.packed.formats import pack, unpack
from entangle.pruning import prune
from tests.pruning.problems import make


def dense(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Return weights of one huge and one small row, and one of zeros, where there are so many."""
    weight = make(1, rows, cols, dtype=torch.float32)[0][0]
    ends = {torch.float16: (1e4, 1e-6)}.get(dtype, (1e30, 1e-30))
    for row, factor in zip(range(1, rows), (*ends, 0), strict=False):
        weight[row] *= factor
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, None), (4, None), (8, None), (2, 128), (4, 128), (8, 128)]
)
@pytest.mark.parametrize(("rows", "cols"), [(1, 40), (5, 200)])
def test_what_is_pruned_is_packed(
    dtype: torch.dtype, method: str, bits: int, group_size: int | None, rows: int, cols: int
) -> None:
    weight = dense(rows, cols, dtype).expand(2, -1, -1)
    gram = make(2, 1, cols, dtype=torch.float32)[1]
    result = prune(
        weight, gram, method=method, sparsity=0.6, bits=bits, group_size=group_size, loss=False
    )
    codes = codes_of(weight, bits, group_size)
    for form in ("bitmap", "n16"):
        layout, tensors = pack(result.weight, form, codes=codes)
        assert layout.values == ("int4" if bits <= 4 else "int8")
        assert layout.grouped == (group_size is not None)
        for expert in range(2):
            found = unpack(tensors, layout, expert)
            assert torch.equal(found.to(dtype), result.weight[expert])
            if dtype == torch.float32:
                assert torch.equal(found, result.weight[expert])


def test_one_row_by_hand() -> None:
    # Range [-1, 2], 2 bits: 1 apart, zero at index 1; symmetric: -2 … 1 times 2, as 2 must fit.
    weight = torch.tensor([[[-1.0, 2, 0.4]]])
    codes = codes_of(weight, 2)
    assert (codes.bits, codes.scale.item(), codes.zero.item()) == (4, 1, 1)
    assert codes.steps is None
    codes = codes_of(weight, 2, 128)
    assert codes.steps is not None
    assert (codes.scale * codes.steps[..., 0]).item() == pytest.approx(2)
    assert codes.zero.item() == 2


def test_a_weight_that_was_not_quantised_is_refused() -> None:
    weight = dense(3, 200, torch.float32)[None]
    with pytest.raises(InvalidInput, match="grid"):
        pack(weight, codes=codes_of(weight, 4, 128))


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_bits_that_no_format_stores(bits: int) -> None:
    with pytest.raises(InvalidInput, match="bits"):
        codes_of(torch.ones(1, 2, 3), bits)
