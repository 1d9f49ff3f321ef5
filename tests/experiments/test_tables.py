import numpy as np
import pytest
from numpy.typing import NDArray

from entangle.errors import NumericalError
from entangle.experiments.ablate import check_sparsity
from entangle.experiments.arms import AblationArm
from entangle.experiments.selection import Selection

ROWS = {"wide": np.array([4, 7]), "narrow": np.array([0])}
ARM = AblationArm(Selection("top", "wd", None, ROWS), "prune", 0.9)
PLANNED = np.array([0.9, 0.9, 43 / 48])
"""48 inputs cannot hold a share of 0.9 zeros."""


def check(realised: NDArray[np.float64], planned: NDArray[np.float64] = PLANNED) -> None:
    check_sparsity(ARM, realised, planned)


def test_rows_of_different_widths_may_differ_by_the_rounding() -> None:
    check(PLANNED)
    check(PLANNED.astype(np.float32).astype(np.float64))
    edited = AblationArm(ARM.selection, "zero", 1.0)
    check_sparsity(edited, np.zeros(0), np.zeros(0))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (
            0,
            1 / 576,
            r"row 4 of layer 'wide' must hold a share of 0\.900000 zeros in the arm prune",
        ),
        (2, -1 / 48, r"row 0 of layer 'narrow' .*0\.895833 .* got 0\.875000 \(1 such rows\)"),
        (1, np.nan, r"row 7 of layer 'wide' .* got nan"),
    ],
)
def test_one_weight_too_many_or_too_few_is_refused(place: int, change: float, message: str) -> None:
    realised = PLANNED.copy()
    realised[place] += change
    with pytest.raises(NumericalError, match=message):
        check(realised)


def test_a_row_that_is_missing_is_refused() -> None:
    with pytest.raises(NumericalError, match=r"\b3\b.*\b2\b"):
        check(PLANNED[:2])
