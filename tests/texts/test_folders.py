"""Which files of a folder are text, and which split a folder gives."""

import json
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import get_data_patterns, resolve_pattern

from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import load_evaluation
from entangle.texts.calibration import load_calibration
from entangle.texts.documents import load_texts
from entangle.texts.files import split_of
from tests.tiny_models import tiny_tokenizer


def _fill(folder: Path, *names: str) -> Path:
    """Write files whose text is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        elif path.suffix in (".json", ".jsonl"):
            path.write_text(json.dumps({"text": name}) + "\n")
        else:
            path.write_text(name)
    return folder


def _evaluated(folder: Path, **options: Any) -> tuple[str, object]:
    text = load_evaluation(folder, tiny_tokenizer(), seq_len=2, join="", **options)
    return str(tiny_tokenizer().decode(text.windows.flatten())), text.settings.get("split")


LAYOUTS: dict[str, tuple[list[str], list[str]]] = {
    "shards": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["data/test-00000-of-00001.parquet"],
    ),
    "by file": (["train.jsonl"], ["test.jsonl"]),
    "by name with more": (["wiki.train.txt"], ["wiki.test.txt"]),
    "by other words": (["my-training_1.json"], ["eval.json"]),
    "by folder": (["train/1.txt", "train/a/2.txt"], ["test/1.txt"]),
    "deeper": (["en/data/train/1.txt"], ["en/data/test/1.txt"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits(layout: str, tmp_path: Path) -> None:
    train, test = LAYOUTS[layout]
    folder = _fill(tmp_path, *train, *test)
    assert list(load_texts(folder)) == list(load_texts(folder, split="train")) == train
    assert list(load_texts(folder, split="test")) == test
    assert list(load_texts(folder, split="all")) == sorted([*train, *test])
    got = load_calibration(folder, tiny_tokenizer(), n_seq=1, seq_len=4)
    assert (got.settings["split"], got.settings["n_files"]) == ("train", len(train))
    assert _evaluated(folder)[1] == "test"
    assert _evaluated(folder)[0] == _evaluated(folder, split="test")[0] != _evaluated(
        folder, split="train"
    )[0]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_library_means_the_same_files(layout: str, tmp_path: Path) -> None:
    train, test = LAYOUTS[layout]
    folder = _fill(tmp_path, *train, *test)
    patterns = get_data_patterns(str(folder))
    assert set(map(str, patterns)) == {"train", "test"}
    for split, names in (("train", train), ("test", test)):
        found = set[str]()
        for one in patterns[split]:
            with suppress(FileNotFoundError):  # one keyword of several
                found |= set(resolve_pattern(one, str(folder)))
        assert found == {str(folder / name) for name in names}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.txt", None),
        ("contest.txt", None),
        ("latest.jsonl", None),
        ("trainer.txt", None),
        ("test.txt", "test"),
        ("TEST.txt", "test"),
        ("x_dev.jsonl", "validation"),
        ("val2.txt", "validation"),
        ("data/part-00000-of-00002.parquet", "part"),
        ("part-00000-of-00002.parquet", None),
        ("c4-train.00000-of-01024.json", "train"),
        ("data/train_sft-00000-of-00001.parquet", "train_sft"),
        ("test/train.txt", "test"),
    ],
)
def test_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of(PurePosixPath(name)) == split


def test_validation_where_there_is_no_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _fill(tmp_path, "train.txt", "validation.txt")
    assert _evaluated(folder) == ("validation.txt", "validation")
    assert "validation" in capsys.readouterr().err
    (folder / "validation.txt").unlink()
    with pytest.raises(UnknownName, match="'test'"):
        _evaluated(folder)
    assert _evaluated(folder, split="train") == ("train.tx", "train")


def test_splits_are_never_joined_or_guessed(tmp_path: Path) -> None:
    folder = _fill(tmp_path, "train.txt", "test.txt")
    with pytest.raises(UnknownName, match="'dev'"):
        load_texts(folder, split="dev")
    _fill(folder, "notes.txt")
    with pytest.raises(InvalidInput, match=r"notes\.txt"):
        load_texts(folder)
    assert list(load_texts(folder, split="test")) == ["test.txt"]
    assert len(list(load_texts(folder, split="all"))) == 3
    two = _fill(tmp_path / "two", "en/train.txt", "de/train.txt", "de/test.txt")
    with pytest.raises(InvalidInput, match="'train'"):
        load_texts(two)
    assert list(load_texts(two / "de")) == ["de/train.txt"]
    only = _fill(tmp_path / "only", "validation.txt")
    with pytest.raises(UnknownName, match=r"'train'.*validation"):
        load_texts(only)


def test_folders_without_splits_are_read_as_before(tmp_path: Path) -> None:
    folder = _fill(tmp_path, "a.txt", "b/c.txt", "data/part-00000-of-00001.parquet")
    assert len(list(load_texts(folder))) == 3
    assert _evaluated(folder)[1] is None


ABOUT = ["_meta.json", "dataset_info.json", "dataset_infos.json", "state.json", "README.txt",
         "config.json", "tokenizer_config.json", "LICENSE.txt", ".hidden.json", "_cache/a.txt",
         "metadata.json", "vocab.txt", "requirements.txt", "dataset_dict.json"]  # fmt: skip


@pytest.mark.parametrize("name", ABOUT)
def test_files_about_the_data(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _fill(tmp_path, "b.jsonl", name)
    assert list(load_texts(folder)) == ["b.jsonl"]
    hidden = name.startswith(".")
    assert (name in capsys.readouterr().err) == (not hidden)
    got = load_calibration(folder, tiny_tokenizer(), n_seq=1, seq_len=2)
    assert got.settings.get("left_out", []) == ([] if hidden else [name])


@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_object_that_may_be_either_is_refused(tmp_path: Path, indent: int | None) -> None:
    folder = _fill(tmp_path, "b.jsonl")
    (folder / "facts.json").write_text(
        json.dumps({"license": "CC BY-SA", "rows": 5}, indent=indent)
    )
    with pytest.raises(InvalidInput, match=r"facts\.json"):
        load_texts(folder)
    (folder / "facts.json").rename(folder / "_facts.json")
    assert list(load_texts(folder)) == ["b.jsonl"]


def test_one_line_of_json_with_a_text_is_text(tmp_path: Path) -> None:
    assert list(load_texts(_fill(tmp_path, "a.json", "b.jsonl"))) == ["a.json", "b.jsonl"]


def test_all_files_have_one_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"body": name, "n": 1}) + "\n")
    assert list(load_texts(tmp_path)) == ["a", "b"]
    assert capsys.readouterr().err.count("body") == 1
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b"}) + "\n")
    with pytest.raises(UnknownName, match=r"b\.jsonl.*'body'"):
        list(load_texts(tmp_path))


def test_only_files_about_the_data(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"parquet.*`datasets`"):
        load_texts(_fill(tmp_path, "README.txt"))
