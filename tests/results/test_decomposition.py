import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from entangle.errors import InvalidInput
from entangle.results.decomposition import (
    COLUMNS,
    SCHEMAS,
    Decomposition,
    joined,
    load_decomposition,
    typed,
)
from entangle.runs.provenance import make_manifest
from entangle.runs.sealing import Column
from tests.saved import without_digests

HARD = 'naïve "東京"\\n👨‍👩‍👧<0xE6>'


def value_of(name: str, column: Column) -> Any:
    if column.kind == "text":
        return column.among[-1] if column.among else HARD
    return 0.5 if column.kind == "real" else 0 if name == "neuron" else 3


@pytest.fixture
def result() -> Decomposition:
    tables = {
        name: typed(
            name, pd.DataFrame([{column: value_of(column, one) for column, one in schema.items()}])
        )
        for name, schema in SCHEMAS.items()
    }
    return Decomposition(**tables, manifest=make_manifest("decomposition", settings={"seed": 0}))


def test_saved_and_loaded(result: Decomposition, tmp_path: Path) -> None:
    assert result.save(tmp_path / "run") == tmp_path / "run"
    again = load_decomposition(tmp_path / "run")
    for name in COLUMNS:
        pd.testing.assert_frame_equal(getattr(again, name), getattr(result, name))
    assert again.manifest == json.loads(json.dumps(result.manifest))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        ["manifest.json", *(f"{name}.parquet" for name in COLUMNS)]
    )


def test_empty_tables_keep_their_types(result: Decomposition, tmp_path: Path) -> None:
    empty = Decomposition(
        **{name: joined(name, [], []) for name in COLUMNS}, manifest=result.manifest
    )
    empty.save(tmp_path / "run")
    again = load_decomposition(tmp_path / "run")
    for name, types in COLUMNS.items():
        assert getattr(again, name).dtypes.astype(str).to_dict() == types


@pytest.mark.parametrize("name", COLUMNS)
def test_a_table_that_is_missing_or_lacks_a_column(
    name: str, result: Decomposition, tmp_path: Path
) -> None:
    without_digests(result.save(tmp_path / "run"))
    path = tmp_path / "run" / f"{name}.parquet"
    last = [one for one in COLUMNS[name] if one not in ("sliced_wd", "ri")][
        -1
    ]  # which may be missing
    pd.read_parquet(path).drop(columns=last).to_parquet(path)
    with pytest.raises(InvalidInput, match=f"'{last}'"):
        load_decomposition(tmp_path / "run")
    path.unlink()
    with pytest.raises(InvalidInput, match=rf"{name}\.parquet'"):
        load_decomposition(tmp_path / "run")


def test_a_manifest_may_list_anything_as_layers(result: Decomposition, tmp_path: Path) -> None:
    path = without_digests(result.save(tmp_path / "run")) / "manifest.json"
    layers: list[object] = [["a"], {}, None]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"layers": layers}}))
    with pytest.raises(InvalidInput, match="not among the manifest's"):
        load_decomposition(tmp_path / "run")


def test_parts_are_joined_in_the_order_of_the_layers() -> None:
    parts = [
        pd.DataFrame({"layer": ["b", "b"], "experts": [1, 2]}),
        pd.DataFrame(),
        pd.DataFrame({"layer": ["a", "c"], "experts": [5, 4]}),
    ]
    parts = [part.assign(position=0, x=0.0, y=0.0, cluster=0) for part in parts]
    whole = joined("router_map", parts, ["a", "b", "c"])
    assert whole["layer"].tolist() == ["a", "b", "b", "c"]
    assert whole["experts"].tolist() == [5, 1, 2, 4]
    assert whole.index.tolist() == [0, 1, 2, 3]
