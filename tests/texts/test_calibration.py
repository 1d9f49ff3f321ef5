"""`load_calibration`: windows against references, and every input that is refused."""

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import InvalidInput, Unavailable
from entangle.texts import calibration_set
from entangle.texts.calibration import load_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.documents import load_texts
from tests.tiny_models import tiny_tokenizer

TEXTS = ["The first document.", "", "A second one,\nlonger than the first.", "End"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def _ids(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def _load(source: Any, **options: Any) -> CalibrationSet:
    return load_calibration(source, tiny_tokenizer(), **options)


def _adding(source: Any, **options: Any) -> CalibrationSet:
    """Load with a tokenizer that puts <s> before and </s> after a text."""
    return load_calibration(source, tiny_tokenizer(adds=True), **options)


def _starts(tokens: int, length: int, n: int, seed: int) -> list[int]:
    """Recompute the starts without the package: the documented stream, one uniform draw each."""
    words = np.frombuffer(hashlib.sha256(b"calibration").digest(), dtype=np.uint32)
    sequence = np.random.SeedSequence(seed, spawn_key=tuple(int(word) for word in words))
    generator = np.random.Generator(np.random.PCG64(sequence))
    return [int(start) for start in generator.integers(0, tokens - length, size=n)]


@pytest.mark.parametrize("join", ["\n\n", "", " | "])
def test_contiguous_windows(source: Path, join: str) -> None:
    ids = _ids(join.join(TEXTS))
    got = _load(source, n_seq=5, seq_len=7, sampling="contiguous", join=join)
    assert got.ids.tolist() == [ids[7 * i : 7 * i + 7] for i in range(5)]


def test_contiguous_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("de")
    got = _load(tmp_path, n_seq=2, seq_len=3, sampling="contiguous", join="+")
    assert [tiny_tokenizer().decode(row) for row in got.ids.tolist()] == ["abc", "+de"]


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_random_windows(source: Path, seed: int) -> None:
    ids = _ids("\n\n".join(TEXTS))
    got = _load(source, n_seq=50, seq_len=6, seed=seed)
    starts = _starts(len(ids), 6, 50, seed)
    assert got.ids.tolist() == [ids[start : start + 6] for start in starts]
    assert len(set(starts)) > 10


def test_random_starts_cover_the_text_and_never_leave_it() -> None:
    got = load_calibration(np.arange(20), n_seq=2000, seq_len=4)
    starts = got.ids[:, 0].unique().tolist()
    assert starts == list(range(16))  # 20 − 4 starts: the last one is left out, as published


@given(
    tokens=st.integers(2, 60),
    n_seq=st.integers(1, 9),
    length=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_random_windows_are_windows(tokens: int, n_seq: int, length: int, seed: int) -> None:
    running = torch.arange(tokens) * 3
    if tokens <= length:
        with pytest.raises(InvalidInput, match=r"seq_len.*longer"):
            load_calibration(running, n_seq=n_seq, seq_len=length, seed=seed)
        return
    got = load_calibration(running, n_seq=n_seq, seq_len=length, seed=seed)
    steps = got.ids - got.ids[:, :1]
    assert torch.equal(steps, (torch.arange(length) * 3).expand(n_seq, -1))
    again = load_calibration(running, n_seq=n_seq, seq_len=length, seed=seed)
    assert again.digest == got.digest


def test_seed_changes_random_windows_only(source: Path) -> None:
    random = [_load(source, n_seq=5, seq_len=7, seed=seed).digest for seed in (0, 1)]
    fixed = [
        _load(source, n_seq=5, seq_len=7, seed=seed, sampling="contiguous").digest
        for seed in (0, 1)
    ]
    assert random[0] != random[1]
    assert fixed[0] == fixed[1]


def test_pool_is_the_beginning_of_a_long_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_set, "_POOL_CHARACTERS", 100)
    (tmp_path / "a.txt").write_text("a" * 100 + "b" * 10_000)
    small = _load(tmp_path, n_seq=3, seq_len=2)
    assert small.ids.unique().tolist() == _ids("a")
    assert small.settings["n_characters"] == 100
    assert small.settings["whole_text"] is False
    large = _load(tmp_path, n_seq=40, seq_len=2)
    assert large.settings["n_characters"] == 16 * 40 * 2


def test_special_tokens_stand_around_every_sequence(source: Path) -> None:
    ids = _ids("\n\n".join(TEXTS))
    options = {"n_seq": 4, "seq_len": 7}
    got = _adding(source, sampling="contiguous", **options)
    assert got.ids.tolist() == [[1, *ids[5 * i : 5 * i + 5], 2] for i in range(4)]
    drawn = _adding(source, **options)
    starts = _starts(len(ids), 5, 4, 0)
    assert drawn.ids.tolist() == [[1, *ids[start : start + 5], 2] for start in starts]
    with pytest.raises(InvalidInput, match=r"seq_len.*room.*\b2\b"):
        _adding(source, seq_len=2)


def test_settings_tell_everything(source: Path) -> None:
    got = _load(source, n_seq=2, seq_len=3, seed=5)
    text = "\n\n".join(TEXTS)
    settings = dict(got.settings)
    tokenizer = settings.pop("tokenizer")
    assert isinstance(tokenizer, dict)
    assert tokenizer["n_tokens"] == len(tiny_tokenizer())
    assert settings == {
        "n_seq": 2,
        "seq_len": 3,
        "sampling": "random",
        "seed": 5,
        "n_files": 1,
        "column": "text",
        "join": "\n\n",
        "special_tokens": {
            "policy": "model",
            "before": [],
            "after": [],
            "before_tokens": [],
            "after_tokens": [],
            "habit": {"before": [], "after": [], "evidence": "none"},
            "alternative": {"before": [1], "before_tokens": ["<s>"]},
        },
        "n_documents": 4,
        "n_characters": len(text),
        "n_text_tokens": len(_ids(text)),
        "whole_text": True,
    }
    assert got.source == str(source)


def test_settings_of_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ([text] for text in TEXTS)
    monkeypatch.setattr("entangle.texts.documents.read_hub", lambda request: rows)
    settings = _load("wikitext2", n_seq=1, seq_len=3, split="test").settings
    asked = {key: settings[key] for key in ("dataset", "config", "split", "column")}
    assert asked == {
        "dataset": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
        "column": "text",
    }


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [("A", "first article"), ("B", "second article")]
    demo = ModuleType("entangle.models.demo")  # the real one fetches files and is slow to import
    vars(demo)["demo_articles"] = lambda: articles
    monkeypatch.setitem(sys.modules, demo.__name__, demo)
    got = _load("demo", n_seq=1, seq_len=20, sampling="contiguous")
    assert got.ids[0].tolist() == _ids("first article\n\nsecond article")[:20]


def test_splits_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [(f"title {i}", f"text {i}") for i in range(7)]
    demo = ModuleType("entangle.models.demo")
    vars(demo)["demo_articles"] = lambda: articles
    monkeypatch.setitem(sys.modules, demo.__name__, demo)
    test, train = (list(load_texts("demo", split=split)) for split in ("test", "train"))
    assert test == ["text 2", "text 5"]
    assert train == ["text 0", "text 1", "text 3", "text 4", "text 6"]
    assert list(load_texts("demo")) == [text for _, text in articles]
    with pytest.raises(InvalidInput, match="'dev'"):
        load_texts("demo", split="dev")


def test_path_object_is_never_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    Path("demo/a.txt").write_text("from disk")
    got = _load(Path("demo"), n_seq=1, seq_len=9, sampling="contiguous")
    assert got.ids[0].tolist() == _ids("from disk")
    with pytest.raises(Unavailable, match="'c4'"):
        _load(Path("c4"))


def test_default_sizes() -> None:
    text = torch.zeros(5000, dtype=torch.int64)
    assert tuple(load_calibration(text).ids.shape) == (32, 1024)
    assert tuple(load_calibration(text, context_length=64).ids.shape) == (32, 64)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_rows_of_a_table_of_ids(kind: torch.dtype) -> None:
    table = torch.arange(12).reshape(3, 4).to(kind)
    got = load_calibration(table)
    assert got.ids.tolist() == table.tolist()
    assert got.settings["sampling"] == "rows"
    part = load_calibration(table.numpy(), n_seq=2, seq_len=3)
    assert part.ids.tolist() == [[0, 1, 2], [4, 5, 6]]
    table[0, 0] = 9
    assert got.ids[0, 0] == 0


@pytest.mark.parametrize("name", ["ids", "input_ids"])
def test_file_of_ids(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    other = torch.zeros(2)
    safetensors.torch.save_file({name: torch.arange(10, dtype=torch.int32), "w": other}, path)
    got = load_calibration(str(path), n_seq=2, seq_len=4, sampling="contiguous")
    assert got.ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (torch.zeros(3), r"\(3,\).*integer.*float32"),
        (np.zeros(3), r"\(3,\).*integer.*float64"),
        (torch.zeros(3, dtype=torch.bool), r"\(3,\).*integer.*bool"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"\(1, 2, 3\).*n_seq"),
        (torch.zeros(0, dtype=torch.int64), r"token.*n_seq"),
        (torch.tensor([[-2]]), r"\b0\b.*-2\b.*attention_mask"),
    ],
)
def test_arrays_that_are_no_ids(values: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        load_calibration(values, n_seq=1, seq_len=1)


def test_table_that_is_too_small() -> None:
    table = torch.zeros(3, 4, dtype=torch.int64)
    too_large: list[dict[str, Any]] = [{"n_seq": 4}, {"seq_len": 5}]
    for options in too_large:
        with pytest.raises(InvalidInput, match=r"\b3\b.*\b4\b.*sequences.*n_seq"):
            load_calibration(table, **options)
    with pytest.raises(InvalidInput, match=r"seq_len.*context.*\b3\b.*\b4\b"):
        load_calibration(table, context_length=3)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100])
def test_corrupt_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"a\.safetensors.*valid"):
        load_calibration(path)


def test_safetensors_without_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InvalidInput, match=r"a\.safetensors'.*`ids`.*input_ids"):
        load_calibration(path)
    safetensors.torch.save_file({"ids": torch.zeros(2)}, path)
    with pytest.raises(InvalidInput, match=r"`ids`.*integer"):
        load_calibration(path)


def test_foreign_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    ids = {"ids": torch.zeros(1, 2, dtype=torch.int64)}
    safetensors.torch.save_file(ids, path, metadata={"format": "pt"})
    assert "origin" not in load_calibration(path).settings
    safetensors.torch.save_file(ids, path, metadata={"entangle.calibration_set": "[]"})
    with pytest.raises(InvalidInput, match=r"`entangle\.calibration_set`"):
        load_calibration(path)


def test_options_of_a_text_for_ids() -> None:
    options_given: list[dict[str, Any]] = [
        {"split": "a"},
        {"column": "a"},
        {"special_tokens": "published"},
        {"add_special_tokens": True},
    ]
    for options in options_given:
        with pytest.raises(InvalidInput, match=f"`{next(iter(options))}`"):
            load_calibration(torch.zeros(1, 2, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_seq": 0}, r"n_seq.*\b1\b.*\b0\b"),
        ({"n_seq": True}, "`n_seq`"),
        ({"seq_len": -3}, r"seq_len.*\b1\b.*-3\b"),
        ({"seq_len": 9, "context_length": 8}, r"seq_len.*\b8\b.*\b9\b"),
        ({"sampling": "first"}, "'first'"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_options_out_of_range(source: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        _load(source, **options)


def test_text_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 50)
    with pytest.raises(InvalidInput, match=r"\b50\b.*n_seq.*\b4\b"):
        _load(path, n_seq=5, seq_len=12, sampling="contiguous")
    assert _load(path, n_seq=4, seq_len=12, sampling="contiguous").n_tokens == 48
    assert _load(path, n_seq=1, seq_len=50, sampling="contiguous").n_tokens == 50
    with pytest.raises(InvalidInput, match=r"\b51\b.*seq_len.*\b50\b"):
        _load(path, n_seq=1, seq_len=51, sampling="contiguous")
    with pytest.raises(InvalidInput, match=r"\b51\b.*seq_len.*\b49\b"):
        _load(path, n_seq=1, seq_len=50)
    with pytest.raises(InvalidInput, match=r"a\.txt'.*\b51\b"):
        _adding(path, n_seq=1, seq_len=52)
    assert _adding(path, n_seq=1, seq_len=51).seq_len == 51


def test_empty_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("")
    with pytest.raises(InvalidInput, match=r"a\.txt"):
        _load(path)


def test_text_needs_a_tokenizer(source: Path) -> None:
    with pytest.raises(InvalidInput, match="needs a tokenizer"):
        load_calibration(source)


def test_tokenizer_that_does_not_fit(source: Path) -> None:
    ids = _ids("\n\n".join(TEXTS))[:14]
    options = {"n_seq": 2, "seq_len": 7, "sampling": "contiguous"}
    assert _load(source, vocab_size=max(ids) + 1, **options).n_tokens == 14
    with pytest.raises(InvalidInput, match=rf"token.*{max(ids)}"):
        _load(source, vocab_size=max(ids), **options)


def test_missing_file(tmp_path: Path) -> None:
    for name in ("no.txt", "no.safetensors"):
        with pytest.raises(Unavailable, match="wikitext2"):
            _load(str(tmp_path / name))
