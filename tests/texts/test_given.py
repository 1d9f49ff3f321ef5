"""What Python code holds after the usual loaders: each kind gives the same ids, or one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf

from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import load_evaluation
from entangle.texts.calibration import load_calibration
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import tiny_tokenizer

ROWS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
RAGGED = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
TEXTS = ["The first document.", "", "A second one,\nlonger than the first.", "End"]
LOADERS = pytest.mark.parametrize("load", [load_calibration, load_evaluation])
Load = Callable[..., Any]


class Wrapper:
    """As the test text of Wanda's loader: an object with `input_ids`."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.input_ids = ids


def _tensor() -> torch.Tensor:
    return torch.tensor(ROWS)


def _memmap(tmp_path: Path) -> Any:
    np.array(ROWS, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    return np.memmap(tmp_path / "ids.bin", dtype=np.uint16, mode="r", shape=(3, 4))


def _stream(column: str, values: list[Any]) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: ({column: one} for one in values))


TABLES: dict[str, Callable[[Path], Any]] = {
    "tensor": lambda _: _tensor(),
    "uint16 tensor": lambda _: _tensor().to(torch.uint16),
    "int32 array": lambda _: np.array(ROWS, dtype=np.int32),
    "memmap": _memmap,
    "object array": lambda _: np.array([*map(np.array, ROWS), None], dtype=object)[:3],
    "lists": lambda _: ROWS,
    "tuple of lists": lambda _: tuple(map(tuple, ROWS)),
    "list of NumPy integers": lambda _: [list(np.array(row)) for row in ROWS],
    "list of tensors": lambda _: list(_tensor()),
    "list of rows of shape (1, n)": lambda _: list(_tensor().split(1)),
    "list of arrays": lambda _: list(np.array(ROWS)),
    "generator": lambda _: (row for row in ROWS),
    "pairs": lambda _: [(row[None], row[None].clone()) for row in _tensor()],
    "pairs with targets of -100": lambda _: [
        (r[None], torch.full((1, 4), -100)) for r in _tensor()
    ],
    "batches of a DataLoader": lambda _: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(_tensor()), batch_size=2
    ),
    "wrapper": lambda _: Wrapper(_tensor()),
    "dict of lists": lambda _: {"input_ids": ROWS},
    "BatchEncoding": lambda _: hf.BatchEncoding(
        {"input_ids": _tensor(), "attention_mask": torch.ones(3, 4, dtype=torch.int64)}
    ),
    "list of BatchEncodings": lambda _: [
        hf.BatchEncoding({"input_ids": row[None], "attention_mask": torch.ones(1, 4).long()})
        for row in _tensor()
    ],
    "list of dicts": lambda _: [{"input_ids": row, "labels": row} for row in ROWS],
    "Dataset": lambda _: datasets.Dataset.from_dict({"input_ids": ROWS, "n": [1, 2, 3]}),
    "Dataset in torch's format": lambda _: datasets.Dataset.from_dict(
        {"input_ids": ROWS}
    ).with_format("torch"),
    "IterableDataset": lambda _: _stream("input_ids", ROWS),
    "Series": lambda _: pd.Series(ROWS),
    "DataFrame": lambda _: pd.DataFrame({"input_ids": ROWS, "n": [1, 2, 3]}),
    "calibration set": lambda _: CalibrationSet(_tensor(), "x", {}),
    "evaluation text": lambda _: load_evaluation(_tensor()),
}


@LOADERS
@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_ids(load: Load, kind: str, tmp_path: Path) -> None:
    got = load(TABLES[kind](tmp_path), vocab_size=17)
    assert got.digest == load(_tensor()).digest
    assert json.loads(json.dumps(got.describe())) == got.describe()


RUNNING: dict[str, Any] = {
    "list": list(range(5, 17)),
    "NumPy": np.arange(5, 17, dtype=np.uint16),
    "Series": pd.Series(range(5, 17)),
    "tokenizer's output": {"input_ids": list(range(5, 17)), "attention_mask": [1] * 12},
    "one long row": {"input_ids": torch.arange(5, 17)[None]},
    "one long row in a list": [list(range(5, 17))],
}


@pytest.mark.parametrize("kind", RUNNING)
def test_running_texts(kind: str) -> None:
    got = load_evaluation(RUNNING[kind], seq_len=4)
    assert got.windows.tolist() == ROWS
    cut = load_calibration(RUNNING[kind], seq_len=4, n_seq=3, sampling="contiguous")
    assert cut.ids.tolist() == ROWS
    assert load_evaluation(RUNNING[kind], context_length=4).windows.tolist() == ROWS


MASKED = {"input_ids": [[5, 6, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13]],
          "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]}  # fmt: skip
UNEQUAL: dict[str, Any] = {
    "lists": RAGGED,
    "tensors": [torch.tensor(row) for row in RAGGED],
    "pairs": [(torch.tensor([row]), torch.tensor([row])) for row in RAGGED],
    "tokenizer's output": {"input_ids": RAGGED, "attention_mask": [[1] * len(r) for r in RAGGED]},
    "padded": MASKED,
    "booleans": {
        "input_ids": torch.tensor(MASKED["input_ids"]),
        "attention_mask": np.array(MASKED["attention_mask"], dtype=bool),
    },
    "Dataset": datasets.Dataset.from_dict({"input_ids": RAGGED}),
    "padded Dataset": datasets.Dataset.from_dict(MASKED),
    "DataFrame": pd.DataFrame(MASKED),
    "records": [{"input_ids": row} for row in RAGGED],
}


@LOADERS
@pytest.mark.parametrize("kind", UNEQUAL)
def test_rows_of_unequal_length(load: Load, kind: str) -> None:
    got = load(UNEQUAL[kind])
    assert [got.rows.sequence(i).tolist() for i in range(3)] == RAGGED


STRINGS: dict[str, Any] = {
    "list": TEXTS,
    "tuple": tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "array": np.array(TEXTS),
    "Series": pd.Series(TEXTS),
    "Series with a null": pd.Series([TEXTS[0], None, *TEXTS[2:]]),
    "DataFrame": pd.DataFrame({"url": ["u"] * 4, "text": TEXTS}),
    "DataFrame with a null": pd.DataFrame({"text": [TEXTS[0], None, *TEXTS[2:]], "n": range(4)}),
    "records": [{"text": text, "id": "x"} for text in TEXTS],
    "dict": {"text": TEXTS, "id": ["x"] * 4},
    "Dataset": datasets.Dataset.from_dict({"id": ["a"] * 4, "text": TEXTS}),
    "tokenised Dataset": datasets.Dataset.from_dict({"input_ids": [[1]] * 4, "text": TEXTS}),
    "IterableDataset": _stream("text", TEXTS),
    "DatasetDict": datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": TEXTS}),
            "test": datasets.Dataset.from_dict({"text": TEXTS}),
            "other": datasets.Dataset.from_dict({"text": ["no"]}),
        }
    ),
}


@pytest.mark.parametrize("kind", STRINGS)
def test_documents(kind: str) -> None:
    source = STRINGS[kind]() if callable(STRINGS[kind]) else STRINGS[kind]
    whole = tiny_tokenizer()("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    got = load_calibration(source, tiny_tokenizer(), n_seq=8, seq_len=7, sampling="contiguous")
    assert got.ids.flatten().tolist() == whole[:56]
    assert got.settings["n_documents"] == 4
    source = STRINGS[kind]() if callable(STRINGS[kind]) else STRINGS[kind]
    text = load_evaluation(source, tiny_tokenizer(), seq_len=7)
    assert text.windows.flatten().tolist() == whole[:63]
    assert text.n_bytes == 54


def test_columns_of_tables_that_are_asked_for_or_the_only_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: Any = {"n_seq": 1, "seq_len": 4, "sampling": "contiguous"}
    table = pd.DataFrame({"text": ["none of"] * 2, "body": ["abcd", "efgh"], "n": [1, 2]})
    for source in (table, datasets.Dataset.from_pandas(table), table.to_dict("records")):
        got = load_calibration(source, tiny_tokenizer(), column="body", **options)
        assert tiny_tokenizer().decode(got.ids[0]) == "abcd"
        assert got.settings["column"] == "body"
    assert capsys.readouterr().err == ""
    only = table.drop(columns="text")
    got = load_calibration(only, tiny_tokenizer(), **options)
    assert got.settings["column"] == "body"
    assert "'body'" in capsys.readouterr().err
    with pytest.raises(UnknownName, match="'bodi'"):
        load_calibration(table, tiny_tokenizer(), column="bodi")
    with pytest.raises(InvalidInput, match=r"DataFrame.*url"):
        load_calibration(only.assign(url="u")[["url", "body"]], tiny_tokenizer())
    with pytest.raises(InvalidInput, match="'text'"):
        load_calibration(only.assign(text=3), tiny_tokenizer())


def test_splits_of_a_dictionary(capsys: pytest.CaptureFixture[str]) -> None:
    def one(text: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [text * 9]})

    splits = datasets.DatasetDict(train=one("a"), validation=one("b"), extra=one("c"))
    options: Any = {"n_seq": 1, "seq_len": 1, "sampling": "contiguous"}
    got = load_calibration(splits, tiny_tokenizer(), **options)
    assert (tiny_tokenizer().decode(got.ids[0]), got.settings["split"]) == ("a", "train")
    text = load_evaluation(splits, tiny_tokenizer(), seq_len=2)
    assert (tiny_tokenizer().decode(text.windows[0]), text.settings["split"]) == (
        "bb",
        "validation",
    )
    assert "validation" in capsys.readouterr().err
    named = load_calibration(splits, tiny_tokenizer(), split="extra", **options)
    assert tiny_tokenizer().decode(named.ids[0]) == "c"
    with pytest.raises(UnknownName, match="'nope'"):
        load_calibration(splits, tiny_tokenizer(), split="nope")
    del splits["train"], splits["validation"]
    with pytest.raises(UnknownName, match="DatasetDict"):
        load_calibration(splits, tiny_tokenizer())


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict", "ids"])
def test_folders_of_save_to_disk(kind: str, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    saved: Any = datasets.Dataset.from_dict({"text": TEXTS})
    if kind == "ids":
        saved = datasets.Dataset.from_dict({"input_ids": RAGGED})
    elif kind == "DatasetDict":
        other = datasets.Dataset.from_dict({"text": ["no"]})
        saved = datasets.DatasetDict({"test": saved, "train": other})
    saved.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "saved", str(tmp_path / "saved")):
        if kind == "ids":
            assert load_calibration(source).digest == load_calibration(RAGGED).digest
            continue
        got = load_evaluation(source, tiny_tokenizer(), seq_len=7)
        assert got.digest == load_evaluation(TEXTS, tiny_tokenizer(), seq_len=7).digest
        assert got.source == str(source)


@pytest.mark.parametrize("how", ["above", "absolute", "link", "split", "text", "number"])
def test_a_saved_data_set_lists_files_of_its_own_folder(how: str, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    for name in ("saved", "other"):
        datasets.Dataset.from_dict({"text": [name]}).save_to_disk(tmp_path / name)
    folder, (other,) = tmp_path / "saved", (tmp_path / "other").glob("*.arrow")
    state = json.loads((folder / "state.json").read_text())
    named: object = f"../other/{other.name}" if how == "above" else str(other)
    if how == "link":
        named = "x.arrow"
        (folder / "x.arrow").symlink_to(other)
    state["_data_files"] = 3 if how == "number" else [{"filename": named}]
    if how in ("split", "text"):
        (folder / "state.json").unlink()
        (folder / "below").mkdir()
        (folder / "below" / "state.json").write_text("{}")
        splits = "/." if how == "text" else ["../other"]
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    else:
        (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InvalidInput, match="saved") as caught:
        load_evaluation(folder, tiny_tokenizer(), seq_len=2)
    assert {
        "split": "../other", "text": "'/'", "number": "int", "link": "x.arrow"
    }.get(how, other.name) in str(caught.value)  # fmt: skip
    assert "\n" not in str(caught.value)


def test_a_stream_is_read_as_far_as_asked() -> None:
    read = []

    def rows() -> Iterator[dict[str, list[int]]]:
        for i in range(10_000):
            read.append(i)
            yield {"input_ids": [i, i + 1]}

    stream = datasets.IterableDataset.from_generator(rows)
    assert load_calibration(stream, n_seq=3).ids.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert len(read) < 2100


@LOADERS
@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "None"),
        (5, "5"),
        (0.5, "0.5"),
        (b"text", "bytes"),
        ({"a", "b"}, "set"),
        ([], "empty"),
        ({}, "dict"),
        ({"labels": ROWS}, "labels"),
        (_tensor()[None], r"\(1, 3, 4\).*n_seq"),
        ([[ROWS, ROWS]], r"\(1, 2, 3, 4\)|\(2, 3, 4\)"),
        ([[5, 6.5]], "row 0"),
        ([["a"], ["b"]], "row 0"),
        (["text", [1, 2]], "row 0"),
        ([[1, 2], "text"], "row 1"),
        ([True, False], "bool"),
        (torch.where(_tensor() < 7, -100, _tensor()), "-100"),
        ([[5, -100], [1, 2]], "-100"),
        ((_tensor(), _tensor()), "pairs"),
        (torch.rand(2, 3), "float32"),
        ([torch.rand(3)], "float32"),
        (torch.nn.Linear(2, 2), "Linear"),
        ({"input_ids": RAGGED, "attention_mask": [[1], [1], [1]]}, "attention_mask"),
        (pd.DataFrame({"n": [1]}), "DataFrame"),
    ],
)
def test_what_is_no_text(load: Load, source: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        load(source, tiny_tokenizer())
    assert "\n" not in str(caught.value)


def test_options_that_have_no_meaning() -> None:
    for source in (TEXTS, ROWS, _tensor(), {"input_ids": ROWS}, pd.Series(TEXTS)):
        for name in ("split", "config", "column"):
            if name == "column" and isinstance(source, dict):
                continue
            option: dict[str, Any] = {name: "x"}
            with pytest.raises(InvalidInput, match=f"`{name}`"):
                load_calibration(source, tiny_tokenizer(), **option)


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("a\ud83db", "a\ufffdb"),
        ("a\udc00", "a\ufffd"),
        ("\ud83d", "\ufffd"),
        ("\ud83d\ude00b", "😀b"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("plain é", "plain é"),
    ],
)
def test_lone_surrogates(text: str, becomes: str, tmp_path: Path) -> None:
    slow = hf.ByT5Tokenizer()
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    expected = slow(becomes, add_special_tokens=False)["input_ids"]
    plain: dict[str, Any] = {"n_seq": 1, "sampling": "contiguous", "special_tokens": "none"}
    for source in ([text], path, datasets.Dataset.from_dict({"text": [becomes]})):
        got = load_calibration(source, slow, seq_len=len(expected), **plain)
        assert got.ids[0].tolist() == expected
    joined = load_calibration(["x", "y"], slow, seq_len=5, join="\ud83d", **plain)
    assert slow.decode(joined.ids[0]) == "x\ufffdy"


def test_a_column_text_that_comes_late_is_told(tmp_path: Path) -> None:
    rows = [{"url": "http://a"}] * 1500 + [{"text": "right text", "url": "x"}]
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidInput, match=r"1501.*'text'.*'url'"):
        load_evaluation(path, tiny_tokenizer(), seq_len=8)
    named = load_evaluation(path, tiny_tokenizer(), seq_len=8, n_windows=1, column="url")
    assert tiny_tokenizer().decode(named.windows[0]) == "http://a"


@pytest.mark.parametrize("source", [[""] * 200, ["", ""]])
def test_documents_without_a_character_are_no_text(source: list[str]) -> None:
    for load in (load_calibration, load_evaluation):
        with pytest.raises(InvalidInput, match="no text"):
            load(source, tiny_tokenizer(), seq_len=2)
