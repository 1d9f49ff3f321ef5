"""Texts to evaluate on from the hub, for every command that has one; the network is replaced."""

import json
from typing import Any

import datasets
import pytest

from entangle.evaluation import load_evaluation
from tests.cli.runs import Run
from tests.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("place")

DOCUMENTS = [f"{i * i % 89} some body {i % 7} of text" for i in range(40)]
CALIBRATION = ("--calibration", "text.txt", "--n-seq", 4, "--seq-len", 32)
WINDOWS = ("--eval-seq-len", 32, "--eval-windows", 3)
BEGIN: dict[str, tuple[object, ...]] = {
    "expand": ("expand", "model", *CALIBRATION, *WINDOWS, "--experts", 1, "--evaluation"),
    "compare": (
        "compare", "model", *CALIBRATION, *WINDOWS, "--methods", "magnitude", "--sparsity", 0.5,
        "--evaluation",
    ),
    "ablate": (
        "ablate", "model", *CALIBRATION, *WINDOWS, "--layer", 1, "--intervention", "zero",
        "--select", "top", "--no-md", "--evaluation",
    ),
    "evaluate": ("evaluate", "model", "--eval-seq-len", 32, "--eval-windows", 3, "--evaluation"),
}  # fmt: skip
NAMES = ("--evaluation-config", "raw", "--evaluation-split", "dev", "--evaluation-column", "body")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What `datasets.load_dataset` was asked for; it answers with two columns of text."""
    asked: list[tuple[object, ...]] = []

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append((path, name, options["split"]))
        rows = [{"title": "a title", "body": text} for text in DOCUMENTS]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("command", BEGIN)
def test_configuration_split_and_column(
    run: Run, calls: list[tuple[object, ...]], command: str
) -> None:
    options = (*NAMES, "--device", "cpu", "--quiet", "--json")
    status, out, err = run(*BEGIN[command], "some/data", *options)
    assert (status, err) == (0, "")
    assert set(calls) == {("some/data", "raw", "dev")}
    found = json.loads(out)["manifest"]["evaluation"]
    found = found.get("text", found)
    tokenizer = tiny_tokenizer()
    expected = load_evaluation(
        "some/data", tokenizer, config="raw", split="dev", column="body", seq_len=32, n_windows=3
    )
    assert found["digest"] == expected.digest
    assert [found["settings"][name] for name in ("config", "split", "column")] == [
        "raw", "dev", "body",
    ]  # fmt: skip


@pytest.mark.parametrize("command", BEGIN)
def test_the_split_is_test_unless_named(
    run: Run, calls: list[tuple[object, ...]], command: str
) -> None:
    options = ("--evaluation-column", "body", "--device", "cpu", "--quiet", "--json")
    assert run(*BEGIN[command], "some/data", *options).status == 0
    assert set(calls) == {("some/data", None, "test")}


@pytest.mark.parametrize("command", BEGIN)
def test_a_column_that_must_be_named(
    run: Run, calls: list[tuple[object, ...]], command: str
) -> None:
    status, out, err = run(*BEGIN[command], "some/data", "--device", "cpu", "--quiet")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "name one with `column`" in err


def test_the_calibration_text_has_options_of_its_own(
    run: Run, calls: list[tuple[object, ...]]
) -> None:
    own = ("--calibration", "other/data", "--split", "train", "--column", "title")
    done = run(*BEGIN["compare"], "some/data", *own, *NAMES, "--device", "cpu", "--quiet")
    assert done.status == 0
    assert set(calls) == {("other/data", None, "train"), ("some/data", "raw", "dev")}
