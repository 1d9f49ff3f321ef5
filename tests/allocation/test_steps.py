import numpy as np
import pytest

from entangle.allocation.allocation import LayerRows, step_sizes
from entangle.errors import InvalidInput
from entangle.results.allocation import step_size

ROWS = LayerRows(("up", "down"), (0, 0), np.array([3, 2]), np.array([8, 12]))


def test_a_row_loses_one_weight_at_a_time() -> None:
    assert step_sizes(ROWS, "row").tolist() == [1] * 5
    assert step_size("up", 7, "row") == 1


def test_with_groups_of_m_a_row_loses_one_weight_of_each_group() -> None:
    """A row of 8 has 2 groups of 4, one of 12 has 3: so many weights go together."""
    assert step_sizes(ROWS, "n:4").tolist() == [2, 2, 2, 3, 3]
    assert step_sizes(ROWS, "n:1").tolist() == [8, 8, 8, 12, 12]
    assert step_size("up", 8, "n:8") == 1
    assert step_size("up", 20, "n:10") == 2  # m of two digits


@pytest.mark.parametrize("pattern", ["2:4", "n:", "n:0", "n:04", "n:-4", "n:4x", "xn:4", "m:4", ""])
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidInput, match=f"`pattern`.*{pattern!r}"):
        step_size("up", 8, pattern)


def test_a_width_that_the_group_does_not_divide_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"'n:8'.*\b8\b.*'down'.*\b12\b"):
        step_sizes(ROWS, "n:8")
