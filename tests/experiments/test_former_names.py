"""What was renamed is found for one release, with a note."""

import numpy as np
import pytest

from entangle import experiments
from entangle.experiments.selection import SELECTION_RULES, Selection


def test_former_names() -> None:
    with pytest.warns(DeprecationWarning, match="SELECTION_RULES"):
        assert experiments.RULES == SELECTION_RULES
    one = Selection("random-norm", None, 0, {"a": np.array([0])}, {"x": 1.0})
    with pytest.warns(DeprecationWarning, match="likeness"):
        assert one.match is one.likeness
    with pytest.raises(AttributeError, match="nothing"):
        _ = experiments.nothing
