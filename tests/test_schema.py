"""What a table may hold: every rule names the file, the column and the value."""

from pathlib import Path

import pandas as pd
import pytest

from entangle.errors import InvalidInput
from entangle.schema import Schema, check_table, integers, reals, shares, texts

SCHEMA: Schema = {
    "layer": texts(), "flag": texts("", "inf"), "block": integers(null=True),
    "neuron": integers(high=9), "wd": reals(0), "ks": shares(null=False),
    "note": texts(optional=True),
}  # fmt: skip
GOOD = {
    "layer": ["a", "a"], "flag": ["", "inf"], "block": pd.array([1, None], "Int64"),
    "neuron": [0, 1], "wd": [0.5, None], "ks": [0.0, 1.0], "extra": [1, 2],
}  # fmt: skip


def test_a_good_table_passes() -> None:
    check_table(pd.DataFrame(GOOD), SCHEMA, Path("t.parquet"))
    check_table(pd.DataFrame(GOOD | {"wd": [1, 2]}), SCHEMA, Path("t.parquet"))


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("layer", ["a", None], "missing"),
        ("layer", [b"a", "a"], "b'a'"),
        ("layer", [["a"], "a"], "'a'"),
        ("flag", ["", {"inf": 1}], "'inf'"),
        ("flag", ["", "nan"], "'nan'"),
        ("block", [0.5, 1.0], "float64"),
        ("neuron", [0, 10], "10"),
        ("neuron", [-1, 0], "-1"),
        ("neuron", ["0", "1"], "str"),
        ("wd", [0.1, -0.1], "-0.1"),
        ("wd", [float("inf"), float("-inf")], "-inf"),
        ("ks", [0.5, None], "missing"),
        ("ks", [0.5, 1.5], "1.5"),
        ("note", [1, 2], "1"),
    ],
)
def test_what_breaks_a_rule_is_named(column: str, values: list[object], said: str) -> None:
    with pytest.raises(InvalidInput, match=rf"t\.parquet'.*'{column}'.*{said}"):
        check_table(pd.DataFrame(GOOD | {column: values}), SCHEMA, Path("t.parquet"))


def test_columns_must_be_there_once() -> None:
    table = pd.DataFrame(GOOD)
    with pytest.raises(InvalidInput, match="'ks'"):
        check_table(table.drop(columns="ks"), SCHEMA, Path("t.parquet"))
    with pytest.raises(InvalidInput, match=r"'ks' once"):
        check_table(pd.concat([table, table[["ks"]]], axis=1), SCHEMA, Path("t.parquet"))
