"""`load_evaluation`: windows of every kind of source, what is recorded, what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from entangle.errors import InvalidInput, Unavailable
from entangle.evaluation import EvaluationText, load_evaluation
from entangle.seeding import torch_rng
from entangle.texts import evaluation
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.documents import TextSource
from tests.reference import perplexity as reference
from tests.tiny_models import tiny_tokenizer

TEXTS = ["The first document.", "", "A second one,\nlonger than the first.", "End"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": evaluation}) + "\n" for evaluation in TEXTS))
    return path


def _ids(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def _load(source: Any, **options: Any) -> EvaluationText:
    return load_evaluation(source, tiny_tokenizer(), **options)


@pytest.mark.parametrize("join", ["\n\n", "", " | "])
@pytest.mark.parametrize("n_windows", [None, 4])
def test_windows_lie_end_to_end(source: Path, join: str, n_windows: int | None) -> None:
    whole = join.join(TEXTS)
    n = n_windows or len(whole) // 7
    got = _load(source, seq_len=7, join=join, n_windows=n_windows)
    assert got.windows.tolist() == [_ids(whole)[7 * i : 7 * i + 7] for i in range(n)]
    spans = [(7 * i + 1, 7 * i + 7) for i in range(n)]
    assert got.n_words == reference.words_begun(whole, spans)
    assert (got.n_bytes, got.n_tokens, got.seq_len) == (6 * n, 6 * n, 7)
    assert got.settings["dropped_tokens"] == (None if n_windows else len(whole) % 7)


def test_special_tokens_enclose_every_window_and_all_text_is_predicted(source: Path) -> None:
    whole = "\n\n".join(TEXTS)
    got = load_evaluation(source, tiny_tokenizer(adds=True), seq_len=9)
    n = len(whole) // 7
    assert got.windows.tolist() == [[1, *_ids(whole)[7 * i : 7 * i + 7], 2] for i in range(n)]
    assert (got.special_tokens, got.around, got.n_tokens) == ("<s> … </s>", (1, 1), 7 * n)
    assert got.n_words == reference.words_begun(whole, [(0, 7 * n)])
    assert got.n_bytes == 7 * n
    assert got.settings["dropped_tokens"] == len(whole) - 7 * n


def test_the_protocol_is_recorded(source: Path) -> None:
    got = _load(source, seq_len=7, split=None)
    described = got.describe()
    assert json.loads(json.dumps(described)) == described
    assert (described["source"], described["seq_len"], described["stride"]) == (str(source), 7, 7)
    assert (described["n_windows"], described["n_tokens"]) == (9, 54)
    settings = described["settings"]
    assert isinstance(settings, dict)
    assert settings["join"] == "\n\n"
    assert settings["n_documents"] == 4
    assert settings["tokenizer"]["n_tokens"] == 100
    shape = np.array([9, 7], dtype="<i8").tobytes()
    content = shape + got.windows.numpy().astype("<i8").tobytes()
    assert described["digest"] == hashlib.sha256(content).hexdigest()
    with pytest.raises(TypeError):
        got.settings["join"] = ""  # type: ignore[index]


def test_a_long_text_is_the_same_as_when_tokenised_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entangle.texts.calibration.CHUNK", 300)
    monkeypatch.setattr("entangle.texts.calibration.OVERLAP", 40)
    letters = torch.randint(97, 123, (2000,), generator=torch_rng(0, "letters")).tolist()
    whole = "".join(" " if i % 6 == 0 else chr(letter) for i, letter in enumerate(letters))
    path = tmp_path / "long.txt"
    path.write_text(whole)
    got = _load(path, seq_len=50)
    assert got.windows.flatten().tolist() == _ids(whole)
    spans = [(50 * i + 1, 50 * i + 50) for i in range(40)]
    assert got.n_words == reference.words_begun(whole, spans)
    part = _load(path, seq_len=50, n_windows=3)
    assert torch.equal(part.windows, got.windows[:3])
    assert part.n_words == reference.words_begun(whole, spans[:3])


def test_only_the_text_that_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entangle.texts.calibration.CHUNK", 200)
    monkeypatch.setattr("entangle.texts.calibration.OVERLAP", 40)
    read = []

    def documents() -> Any:
        for i in range(1000):
            read.append(i)
            yield [f"document {i}"]

    monkeypatch.setattr(evaluation, "open_texts", lambda *_, **__: TextSource(documents(), {}))
    assert _load("some/dataset", seq_len=20, n_windows=5).n_windows == 5
    assert len(read) < 60


@pytest.mark.parametrize(
    ("source", "options", "split"),
    [
        ("wikitext2", {}, "test"),
        ("wikitext2", {"split": "validation"}, "validation"),
        ("c4", {}, "validation"),
        ("some/dataset", {}, "test"),
        ("demo", {}, None),
        (".", {}, None),
        (".", {"config": "x"}, "test"),
        ("here.txt", {}, None),
    ],
)
def test_which_split(
    source: str,
    options: dict[str, str],
    split: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def opened(_source: str, **names: Any) -> TextSource:
        asked.update(names)
        return TextSource(iter([["some text"]]), {})

    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").touch()
    monkeypatch.setattr(evaluation, "open_texts", opened)
    _load(source, seq_len=4, **options)
    assert asked["split"] == split


def test_token_ids(tmp_path: Path) -> None:
    running = torch.arange(23)
    got = load_evaluation(running, seq_len=5, vocab_size=23)
    assert got.windows.tolist() == running[:20].view(4, 5).tolist()
    assert (got.n_words, got.n_bytes, got.settings["dropped_tokens"]) == (None, None, 3)
    assert load_evaluation(running.numpy(), seq_len=5, n_windows=2).n_windows == 2
    table = running[:20].view(4, 5)
    assert torch.equal(load_evaluation(table).windows, table)
    save_file({"input_ids": running}, tmp_path / "ids.safetensors")
    assert load_evaluation(tmp_path / "ids.safetensors", seq_len=5).digest == got.digest
    CalibrationSet(table, "x", {}).save(tmp_path / "set.safetensors")
    assert load_evaluation(str(tmp_path / "set.safetensors")).digest == got.digest


def test_a_slow_tokenizer_gives_windows_without_words(source: Path) -> None:
    slow = hf.ByT5Tokenizer()
    got = load_evaluation(source, slow, seq_len=8)
    assert (got.n_windows, got.n_words, got.n_bytes) == (9, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1000}, r"\b64\b.*seq_len.*\b64\b"),
        ({"seq_len": 129, "context_length": 128}, r"seq_len.*context.*\b128\b.*\b129\b"),
        ({"seq_len": 7, "n_windows": 10}, r"n_windows.*\b9\b"),
        ({"seq_len": 7, "vocab_size": 50}, "the tokenizer does not fit the model"),
        ({"split": "test", "seq_len": 7}, r"`split`.*'test'"),
        ({"column": "nope", "seq_len": 7}, r"column.*'nope'"),
        ({}, r"seq_len.*\b2048\b"),
    ],
)
def test_what_is_refused(source: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        _load(source, **options)


def test_text_needs_a_tokenizer_and_ids_take_no_options(source: Path) -> None:
    with pytest.raises(InvalidInput, match="needs a tokenizer"):
        load_evaluation(source, seq_len=7)
    with pytest.raises(InvalidInput, match=r"add_special_tokens.*\bTrue\b"):
        load_evaluation(torch.arange(9), add_special_tokens=True)
    with pytest.raises(InvalidInput, match=r"special_tokens.*'published'"):
        load_evaluation(torch.arange(9), special_tokens="published")
    with pytest.raises(InvalidInput, match=r"`split`.*'test'"):
        load_evaluation(torch.arange(9), split="test")
    with pytest.raises(InvalidInput, match=r"\(9,\).*integer.*torch\.float32"):
        load_evaluation(torch.zeros(9), seq_len=3)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="wikitext2"):
        _load(tmp_path / "missing.txt", seq_len=4)
    with pytest.raises(Unavailable, match="wikitext2"):
        _load(tmp_path / "missing.safetensors", seq_len=4)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InvalidInput, match=r"empty\.txt'.*no text"):
        _load(tmp_path / "empty.txt", seq_len=4)


def test_windows_of_one_token() -> None:
    with pytest.raises(InvalidInput, match=r"`windows`.*\b2\b.*\(3, 1\)"):
        EvaluationText(torch.zeros(3, 1, dtype=torch.int64), "x", {})
