from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from entangle.checks import real, tensor_of, whole
from entangle.errors import InvalidInput


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.int32(3)])
def test_integers_of_any_kind(value: object) -> None:
    found = whole("k", value, least=1)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize(
    "value", [0, -1, np.int8(-3), 2.0, 2.5, np.float64(2), True, np.True_, "2", None, [2]]
)
def test_what_is_no_count(value: object) -> None:
    with pytest.raises(InvalidInput, match=r"^`k` must be an integer of at least 1; got .*\.$"):
        whole("k", value, least=1)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind(value: object) -> None:
    found = real("share", value)
    assert (found, type(found)) == (0.5, float)
    assert real("share", 1) == real("share", np.int8(1)) == 1.0


@pytest.mark.parametrize("value", [True, "0.5", None, Decimal("0.5"), [0.5], np.array([0.5])])
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(InvalidInput, match=r"^`share` must be a number; got .*\.$"):
        real("share", value)


def test_tensors_of_numbers() -> None:
    given = torch.ones(3)
    assert tensor_of("share", given, torch.float64) is given
    for value in ([0.7, 0.1], (0.7, 0.1), np.array([0.7, 0.1])):
        found = tensor_of("share", value, torch.float64)
        assert found.tolist() == [0.7, 0.1]  # no digit is lost
    assert tensor_of("rows", [1, 2]).dtype == torch.int64
    assert tensor_of("rows", [True]).dtype == torch.bool
    for bad in ("x", None, ["a"], [[1], [1, 2]], object()):
        with pytest.raises(InvalidInput, match=r"^`rows` must be numbers; got .*\.$"):
            tensor_of("rows", bad)
