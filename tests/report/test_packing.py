import json

import numpy as np
import pandas as pd
import pytest

from entangle.report.packing import as_script, pack, pack_table, pack_texts
from tests.report.samples import unpacked


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([0, 255]), "u1"), (np.array([256]), "u2"), (np.array([2**16, 2**32 - 1]), "u4"),
        (np.array([-8, 7]), "i1"), (np.array([True, False]), "u1"), (np.arange(0), "u1"),
        (np.zeros(0), "f3"),
    ],
)  # fmt: skip
def test_what_is_packed_comes_back(values: np.ndarray, kind: str) -> None:
    packed = pack(values)
    assert packed["t"] == kind
    assert unpacked(packed).tolist() == values.tolist()


def test_numbers_below_zero_must_fit() -> None:
    with pytest.raises(ValueError, match="one byte"):
        pack(np.array([-129]))


def test_reals_keep_sixteen_bits() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=4000) * 10.0 ** rng.integers(-30, 30, 4000)
    found = unpacked(pack(values))
    assert np.abs(found / values - 1).max() <= 2.0**-16
    assert len(unpacked(pack(values)).tobytes()) == 4 * 4000


def test_what_is_no_number_stays_so() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0])
    assert np.array_equal(unpacked(pack(values)), values, equal_nan=True)


@pytest.mark.parametrize("value", [1e300, 1e-40, -3.3e38])
def test_reals_beyond_single_precision_keep_all_bits(value: float) -> None:
    packed = pack(np.array([value, 0.1]))
    assert packed["t"] == "f8"
    assert unpacked(packed).tolist() == [value, 0.1]


def test_texts_are_spelled_out_and_come_back() -> None:
    assert unpacked(pack_texts(["b", "a\x1b", "b", "\u202e"])) == ["b", "a\\x1b", "b", "\\u202e"]


def test_rows_of_a_page_stay_in_order() -> None:
    frame = pd.DataFrame({"x": [1.5, 2.5, np.nan, 4.5], "s": list("abcd"), "n": [4, 3, 2, 1]})
    table = pack_table(frame, np.array([2, 0, 2, 0]), 4)
    assert unpacked(table["starts"]).tolist() == [0, 2, 2, 4, 4]
    columns = {name: unpacked(one) for name, one in table["columns"].items()}  # type: ignore[attr-defined]
    assert columns["s"] == ["b", "d", "a", "c"]
    assert columns["n"].tolist() == [3, 1, 4, 2]
    assert np.array_equal(columns["x"], [2.5, 4.5, 1.5, np.nan], equal_nan=True)


def test_nothing_ends_the_script() -> None:
    content = {"a": "</script><!--<script>&amp;", "b": "é 漢 😀"}
    text = as_script(content)
    assert not set("<>&") & set(text)
    assert json.loads(text) == content
