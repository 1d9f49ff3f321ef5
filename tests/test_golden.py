"""`benchmarks.golden diff` tells of every kind of difference, and of none between equal sets."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import golden, golden_commands
from entangle.allocation import RULES


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal sets of results but for what is not compared."""
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "run" / "figures").mkdir(parents=True)
    wd = np.array([0.5, np.nan, 2.0], dtype=np.float32)
    table = {"layer": ["a", "b", "c"], "wd": wd, "seconds": [1.0, 2.0, 3.0]}
    pd.DataFrame(table).to_parquet(old / "run" / "scores.parquet")
    save_file({"a:counts": np.arange(4.0)}, old / "run" / "arrays.safetensors", {"m": '{"k": 1}'})
    manifest: dict[str, Any] = {"seconds": 1.5, "settings": {"rule": "top", "sizes": [1, 2]}}
    (old / "run" / "manifest.json").write_text(json.dumps(manifest))
    (old / "run" / "figures" / "wd.csv").write_text("x,y\n0.10,1\n")
    (old / "run" / "figures" / "wd.png").write_bytes(b"old")
    shutil.copytree(old, new)
    pd.DataFrame({**table, "seconds": 0.0}).to_parquet(new / "run" / "scores.parquet")
    (new / "run" / "manifest.json").write_text(json.dumps({**manifest, "seconds": 9.0}))
    (new / "run" / "figures" / "wd.png").write_bytes(b"new")
    return old, new


def told(sets: tuple[Path, Path], names: golden.Names | None = None) -> list[str]:
    found = golden.compare(*sets, names or {})
    assert found.different == len(found.lines)
    return found.lines


def test_equal_sets_do_not_differ(sets: tuple[Path, Path]) -> None:
    assert told(sets) == []


def test_a_value_a_dtype_and_the_order_of_rows_in_a_table(sets: tuple[Path, Path]) -> None:
    path = sets[1] / "run" / "scores.parquet"
    table = pd.read_parquet(path)
    changed = table.assign(wd=np.nextafter(table["wd"].to_numpy(), np.float32(9)))
    changed.to_parquet(path)
    where = "run/scores.parquet"
    assert told(sets) == [
        f"{where} wd[0]: 0.5 -> 0.5000000596046448", f"{where} wd[2]: 2.0 -> 2.000000238418579"
    ]  # fmt: skip
    table.astype({"wd": np.float64}).to_parquet(path)
    assert told(sets) == [f"{where} wd dtype: float32 -> float64"]
    table.iloc[[1, 0, 2]].reset_index(drop=True).to_parquet(path)
    assert [line.split(":")[0] for line in told(sets)] == [
        f"{where} {cell}" for cell in ("layer[0]", "layer[1]", "wd[0]", "wd[1]")
    ]


def test_a_value_of_a_tensor_and_of_its_metadata(sets: tuple[Path, Path]) -> None:
    path = sets[1] / "run" / "arrays.safetensors"
    tensors = load_file(path)
    tensors["a:counts"][0] = -0.0
    save_file(tensors, path, {"m": '{"k": 2}'})
    assert told(sets) == [
        "run/arrays.safetensors metadata m.k: 1 -> 2",
        "run/arrays.safetensors a:counts[0]: 0.0 -> -0.0",
    ]


def test_a_value_of_a_manifest(sets: tuple[Path, Path]) -> None:
    path = sets[1] / "run" / "manifest.json"
    path.write_text(json.dumps({"settings": {"rule": "top", "sizes": [1, 3]}, "more": None}))
    assert told(sets) == [
        "run/manifest.json settings.sizes.1: 2 -> 3", "run/manifest.json more: absent -> None"
    ]  # fmt: skip


def test_a_figure_and_files_that_are_missing(sets: tuple[Path, Path]) -> None:
    (sets[1] / "run" / "figures" / "wd.csv").write_text("x,y\n0.11,1\n")
    (sets[1] / "run" / "arrays.safetensors").rename(sets[1] / "more.txt")
    assert told(sets) == [
        "more.txt: missing -> file",
        "run/arrays.safetensors: file -> missing",
        "run/figures/wd.csv x[0]: 0.10 -> 0.11",
    ]


def test_what_was_renamed_on_purpose(sets: tuple[Path, Path]) -> None:
    path = sets[1] / "run" / "scores.parquet"
    table = pd.read_parquet(path).rename(columns={"wd": "distance", "layer": "place"})
    table.replace({"place": {"b": "B"}}).to_parquet(path.with_name("neurons.parquet"))
    path.unlink()
    manifest = {"options": {"rule": "first", "sizes": [1, 2]}}
    (sets[1] / "run" / "manifest.json").write_text(json.dumps(manifest))
    tensors = load_file(sets[1] / "run" / "arrays.safetensors")
    tensors = {"a:numbers": tensors["a:counts"]}
    save_file(tensors, sets[1] / "run" / "arrays.safetensors", {"m": '{"k": 1}'})
    (sets[1] / "run").rename(sets[1] / "made")
    assert len(told(sets)) == 10
    names: golden.Names = {
        "columns": {"wd": "distance", "layer": "place", "counts": "numbers"},
        "files": {"run": "made", "scores.parquet": "neurons.parquet"},
        "values": {"place": {"b": "B"}, "rule": {"top": "first"}},
        "manifest": {"settings": "options"},
    }
    assert told(sets, names) == []


def test_every_allocation_rule_is_run() -> None:
    assert set(golden_commands.RULES) == {*RULES, "search"}
