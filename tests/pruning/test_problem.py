import math

import pytest
import torch

from entangle.errors import InvalidInput, NumericalError
from entangle.pruning.problem import Problem, prepare
from tests.pruning.problems import make


def _prepare(**changes: object) -> Problem:
    weight, gram = make(2, 3, 8)
    options = {
        "weight": weight,
        "gram": gram,
        "sparsity": 0.5,
        "pattern": "row",
        "rows": None,
        "bits": None,
    }
    return prepare(**{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("sparsity", [1.3, -0.1, math.nan, math.inf, torch.tensor([0.5, 2, 0.5])])
@pytest.mark.parametrize("pattern", ["row", "layer", "block", "2:4", "n:4"])
def test_sparsity_out_of_range(sparsity: float, pattern: str) -> None:
    with pytest.raises(InvalidInput, match=r"`sparsity`.*\[0, 1\].*(1.3|-0.1|nan|inf|2)"):
        _prepare(sparsity=sparsity, pattern=pattern)


def test_sparsity_missing() -> None:
    with pytest.raises(InvalidInput, match=r"`sparsity`.*\bNone\b.*'layer'"):
        _prepare(sparsity=None, pattern="layer")


def test_sparsity_must_fit_the_groups() -> None:
    assert (_prepare(sparsity=None, pattern="1:4").budget == 6).all()
    assert (_prepare(sparsity=0.75, pattern="1:4").budget == 6).all()
    with pytest.raises(InvalidInput, match=r"\bNone\b.*\b0\.75\b.*'1:4'.*\b0\.25\b"):
        _prepare(sparsity=0.25, pattern="1:4")


def test_rows_may_have_groups_of_their_own() -> None:
    share = torch.tensor([0, 0.25, 1])
    assert _prepare(sparsity=share, pattern="n:4").budget.tolist() == [[0, 2, 8]] * 2
    assert _prepare(sparsity=share, pattern="n:4").zeros_a_group.tolist() == [[0, 1, 4]] * 2


@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (torch.tensor([0.5, 0.375, 0.5]), "n:4", r"`sparsity`.*\b2\b.*\b2\b.*\b4\b.*\b3\b"),
        (0.9, "n:4", r"\b2\b.*\b7\b.*'row'"),
        (None, "n:4", r"`sparsity`.*\bNone\b.*'n:4'"),
        (0.5, "n:3", r"\b2 groups of 3\b.*\b2; got 4\b"),
        (torch.full((8,), 0.5), "n:4", r"`sparsity`.*\(3,\).*\(2, 3\).*\(8,\)"),
        (torch.full((3,), 0.5), "2:4", r"`sparsity`.*\bNone\b.*\b0\.5\b.*'2:4'"),
    ],
)
def test_what_does_not_fit_the_groups(
    sparsity: float | torch.Tensor | None, pattern: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        _prepare(sparsity=sparsity, pattern=pattern)


@pytest.mark.parametrize("pattern", ["layer", "block"])
def test_one_sparsity_per_layer(pattern: str) -> None:
    with pytest.raises(InvalidInput, match=rf"'{pattern}'.*\(3,\)"):
        _prepare(sparsity=torch.full((3,), 0.5), pattern=pattern)


@pytest.mark.parametrize("shape", [(2,), (8,), (3, 2), (1, 3), (2, 3, 1)])
def test_sparsity_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"`sparsity`.*\(3,\).*\(2, 3\)"):
        _prepare(sparsity=torch.full(shape, 0.5))


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3), torch.ones(1, 1, 2, 2), torch.ones(0, 2), torch.ones(2, 2, dtype=torch.int64)],
)
def test_weight_of_a_wrong_kind(weight: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"`weight`.*floating-point"):
        _prepare(weight=weight, gram=None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weight_not_finite(bad: float) -> None:
    with pytest.raises(InvalidInput, match=r"`weight`.*finite"):
        _prepare(weight=torch.tensor([[1, bad]]), gram=None)


@pytest.mark.parametrize(
    "gram", [torch.eye(8), torch.ones(2, 7, 7), torch.ones(1, 8, 8), torch.ones(2, 8, 8).long()]
)
def test_gram_of_a_wrong_kind(gram: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"`gram`.*\(2, 8, 8\)"):
        _prepare(gram=gram)


def test_gram_not_finite_names_the_expert() -> None:
    gram = make(2, 3, 8)[1]
    gram[1, 0, 3] = math.nan
    with pytest.raises(NumericalError, match=r"`gram`.*\b1\b.*\bNaN\b"):
        _prepare(gram=gram)


def test_negative_diagonal() -> None:
    gram = make(2, 3, 8)[1]
    gram[1, 4, 4] = -2.5
    with pytest.raises(InvalidInput, match=r"`gram`.*\b1\b.*-2\.5\b"):
        _prepare(gram=gram)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([3]),
        torch.tensor([-1]),
        torch.tensor([0, 0]),
        torch.ones(2).bool(),
        torch.ones(3),
    ],
)
def test_bad_rows(rows: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"`rows`.*\b3\b.*different"):
        _prepare(rows=rows)


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.7, 4), (0.3, 2), (0.1, 0), (0.9, 4)])
def test_halves_are_those_of_the_number_that_was_given(sparsity: float, zeros: int) -> None:
    weight = torch.ones(1, 2, 5)  # 3.5, 1.5, 0.5 and 4.5 zeros a row, to the even integer
    for share in (sparsity, torch.full((2,), sparsity, dtype=torch.float64)):
        problem = _prepare(weight=weight, gram=None, sparsity=share)
        assert problem.budget.tolist() == [[zeros, zeros]]


def test_solver_dtype_follows_the_weight() -> None:
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        problem = _prepare(weight=torch.ones(2, 3, 8, dtype=dtype))
        assert problem.weight.dtype == problem.need_gram().dtype == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([0, 2], [0, 2]), ([True, False, True], [0, 2]), (range(1, 3), [1, 2]), ([], [])],
)
def test_rows_may_be_a_list(rows: list[int], expected: list[int]) -> None:
    found = _prepare(rows=rows).rows
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@pytest.mark.parametrize("rows", [[3], [0, 0], [-1], [True, False]])
def test_bad_lists_of_rows(rows: list[int]) -> None:
    with pytest.raises(InvalidInput, match=r"`rows`.*boolean.*\b3\b"):
        _prepare(rows=rows)


def test_a_gram_that_the_solver_cannot_hold_names_the_expert() -> None:
    gram = make(2, 3, 8)[1]
    gram[1] *= 1e-48
    weight = torch.ones(2, 3, 8, dtype=torch.float32)
    with pytest.raises(NumericalError, match=r"\b1\b.*torch\.float32.*e-4\d"):
        _prepare(weight=weight, gram=gram)
    assert _prepare(gram=gram).gram is not None  # in float64
    gram[1] *= 1e96
    with pytest.raises(NumericalError, match=r"`gram`.*\b1\b.*\bNaN\b"):
        _prepare(weight=weight, gram=gram)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_last_of_many_weights_and_grams_is_checked(dtype: torch.dtype, bad: float) -> None:
    weight, gram = torch.ones(3, 2, 40, dtype=dtype), torch.eye(40).repeat(3, 1, 1)
    weight[2, 1, 39] = bad
    for broken in (weight, weight[2].expand(4, -1, -1)):
        with pytest.raises(InvalidInput, match=r"`weight`.*\bNaN\b"):
            _prepare(weight=broken, gram=None)
    gram[2, 39, 39] = bad
    with pytest.raises(NumericalError, match=r"`gram`.*\b2\b.*\bNaN\b"):
        _prepare(weight=torch.ones(3, 2, 40, dtype=dtype), gram=gram)
