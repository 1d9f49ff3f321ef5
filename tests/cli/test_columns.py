"""Names of columns are refused before a model is loaded, with the closest names."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from entangle.cli import columns
from entangle.experiments.selection import DERIVED, SCORED
from tests.cli.runs import Run, holds


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*_args: object, **_kwargs: object) -> None:
        pytest.fail("no model may be loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("entangle.models.loading.load_model", load)
    pd.DataFrame({"body": ["a"], "title": ["b"]}).to_parquet("t.parquet")
    Path("t.jsonl").write_text(json.dumps({"body": "a"}) + "\n")
    Path("texts").mkdir()
    Path("texts/1.jsonl").write_text(json.dumps({"body": "a"}) + "\n")
    Path("texts/notes.txt").write_text("x")
    Path("rows.csv").write_text("layer,neurons\na,1\n")
    pd.DataFrame({"neuron": [1]}).to_parquet("rows.parquet")
    Path("empty.csv").touch()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ablate --by wdd", "'wdd' wd"),
        ("ablate --scores S --by wdd", "'wdd' wd"),
        ("ablate --scores S --by layer", "'layer'"),
        ("ablate --scores S --by wd,abs_men", "'abs_men' abs_mean"),
        ("allocate S --sparsity 0.5 --by skewnes", "'skewnes' skewness"),
        ("allocate S --sparsity 0.5 --by wd+variance", "'variance'"),
        ("allocate S --sparsity 0.5 --by neuron", "'neuron'"),
        ("ablate --scores S --select rows.csv", "'rows.csv' 'neuron' neurons"),
        ("ablate --scores S --select top,rows.parquet", "'rows.parquet' 'layer' neuron"),
        ("ablate --scores S --select empty.csv", "'empty.csv' 'layer'"),
        ("score --calibration t.parquet --column bod", "'bod' body"),
        ("score --calibration t.jsonl --column text", "'text' body"),
        ("score --calibration texts --column titel", "'titel' body"),
        ("evaluate --evaluation t.parquet --evaluation-column x", "'x' body"),
        ("score --table neuron", "'neuron' neurons"),
        ("show S --table heads", "'heads' head"),
    ],
)
def test_a_wrong_name(
    run: Run, unloaded: None, made: dict[str, Path], command: str, said: str
) -> None:
    words = [str(made["scores"]) if one == "S" else one for one in command.split()]
    status, out, err = run(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert holds(err, said), err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("score --calibration owner/name --column bod", "'bod' body"),
        ("score --calibration c4 --column titel", "'titel' title"),
        ("evaluate --evaluation owner/name --evaluation-column bod", "'bod' body"),
        ("score --calibration demo --column text", "`column` 'text' 'demo'"),
    ],
)
def test_a_wrong_name_of_a_data_set(
    run: Run, unloaded: None, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    seen = []

    def load(_path: str, _config: str | None, *, split: str, **_: object) -> object:
        seen.append(split)
        if split == "test":  # as the library says it
            message = "Unknown split \"test\". Should be one of ['train', 'validation']."
            raise ValueError(message)
        return datasets.IterableDataset.from_generator(lambda: iter([{"body": "a", "title": "b"}]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    status, out, err = run(*command.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert holds(err, said), err
    assert seen == {"evaluate": ["test", "validation"]}.get(
        command.split()[0], [] if "demo" in command else ["train"]
    )


@pytest.mark.parametrize(
    "given",
    [
        {"command": "ablate", "by": "wd, abs_mean"},
        {"command": "ablate", "by": "variance", "scores": "S"},
        {"command": "allocate", "by": "wd+md", "scores": "S"},
        {"column": "body", "calibration": "t.parquet"},
        {"column": "body", "calibration": "texts"},
        {"select": "top,random"},
    ],
)
def test_a_right_name(unloaded: None, made: dict[str, Path], given: dict[str, str]) -> None:
    columns.check_columns({k: str(made["scores"]) if v == "S" else v for k, v in given.items()})


def test_the_names_are_those_that_exist(made: dict[str, Path]) -> None:
    assert columns.SCORED == SCORED
    assert {name: source for name, (source, _) in DERIVED.items()} == columns.DERIVED
    assert set(columns.scored_columns(made["scores"])) == set(SCORED)


def test_scores_with_another_column(made: dict[str, Path], tmp_path: Path) -> None:
    frame = pd.read_parquet(made["scores"] / "scores.parquet").drop(columns="std")
    (tmp_path / "s").mkdir()
    frame.assign(own=1.5, name="x").to_parquet(tmp_path / "s" / "scores.parquet")
    found = columns.scored_columns(tmp_path / "s", derived=True)
    assert "own" in found
    assert not {"name", "std", "variance"} & set(found)
