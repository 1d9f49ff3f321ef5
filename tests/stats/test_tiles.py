import pytest
import torch

from entangle.precision import multiply, row_parts
from entangle.seeding import torch_rng


@pytest.mark.parametrize("n_rows", [0, 1, 2, 3, 65, 129, 200])
@pytest.mark.parametrize("at_once", [0, 1, 2, 63, 64, 100, 1000])
def test_parts_cover_all_rows_and_leave_none_alone(n_rows: int, at_once: int) -> None:
    parts = [range(n_rows)[part] for part in row_parts(n_rows, at_once)]
    assert [row for part in parts for row in part] == list(range(n_rows))
    assert min(map(len, parts)) >= min(2, n_rows)
    assert max(map(len, parts)) <= max(2, at_once) + 1
    assert at_once < 64 or all(part.start % 64 == 0 for part in parts)


@pytest.mark.parametrize(("n_rows", "tokens"), [(1, 1), (7, 1025), (64, 16), (70, 2048)])
def test_products_are_the_same_for_any_part_of_the_rows(n_rows: int, tokens: int) -> None:
    rng = torch_rng(0, "tiles")
    rows, inputs = torch.randn(n_rows, 33, generator=rng), torch.randn(tokens, 33, generator=rng)
    whole, parts = torch.empty(n_rows, tokens), torch.empty(n_rows, tokens)
    multiply(rows, inputs, out=whole)
    for row in range(n_rows):
        multiply(rows[row : row + 1], inputs, out=parts[row : row + 1])
    assert torch.equal(whole, parts)
    torch.testing.assert_close(whole.double(), rows.double() @ inputs.double().T, atol=1e-4, rtol=0)
