"""Data sets through the `datasets` library, whose network side is replaced."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from entangle.errors import InvalidInput, Unavailable, UnknownName
from entangle.evaluation import load_evaluation
from entangle.texts.documents import load_texts
from tests.tiny_models import tiny_tokenizer

ROWS = [{"text": "one", "n": 1}, {"text": None, "n": 2}, {"text": "three", "n": 3}]


class Hub:
    """Stands in for `datasets.load_dataset`: records the call, returns rows or raises."""

    def __init__(self) -> None:
        self.call: tuple[Any, ...] = ()
        self.rows: Any = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
        self.error: Exception | None = None

    def __call__(self, path: str, name: str | None = None, **options: Any) -> Any:
        self.call = (path, name, options)
        if self.error is not None:
            logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
            raise self.error
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


def _error(kind: type[Exception], source: str, **options: str) -> str:
    with pytest.raises(kind) as caught:
        list(load_texts(source, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wikitext2_is_kept(hub: Hub) -> None:
    assert list(load_texts("wikitext2")) == ["one", "", "three"]
    options = {"split": "train", "streaming": False}
    assert hub.call == ("Salesforce/wikitext", "wikitext-2-raw-v1", options)


def test_c4_is_streamed_and_its_settings_can_be_replaced(hub: Hub) -> None:
    assert next(iter(load_texts("c4"))) == "one"
    assert hub.call == ("allenai/c4", "en", {"split": "train", "streaming": True})
    load_texts("c4", split="validation", config="de")
    assert hub.call == ("allenai/c4", "de", {"split": "validation", "streaming": True})


def test_any_id(hub: Hub) -> None:
    assert list(load_texts("some/data")) == ["one", "", "three"]
    assert hub.call == ("some/data", None, {"split": "train", "streaming": True})


def test_name_that_exists_as_a_folder_is_a_path_unless_it_is_a_short_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("some", "c4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("from disk")
    assert list(load_texts("some")) == ["from disk"]
    assert list(load_texts("./c4")) == ["from disk"]
    assert next(iter(load_texts("c4"))) == "one"


def test_column_from_features_though_the_first_row_is_null(hub: Hub) -> None:
    features = datasets.Features({"n": datasets.Value("int64"), "body": datasets.Value("string")})
    hub.rows = datasets.Dataset.from_dict({"n": [1, 2], "body": [None, "x"]}, features=features)
    assert list(load_texts("some/data")) == ["", "x"]
    assert "'text'" in _error(UnknownName, "some/data", column="text")
    assert "holds no text" in _error(InvalidInput, "some/data", column="n")


def test_a_stream_without_features_is_looked_at_before_the_choice(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    def stream(*rows: dict[str, Any]) -> Any:
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    hub.rows = stream({"url": "u"}, {"url": "u", "text": None}, {"url": "u", "text": "one"})
    assert list(load_texts("some/data")) == ["", "", "one"]
    hub.rows = stream({"url": "u"}, {"url": "u", "body": "one"})
    assert "url, body" in _error(InvalidInput, "some/data")
    hub.rows = stream({"n": 1}, {"n": 1, "body": "one"})
    assert list(load_texts("some/data")) == ["", "one"]
    assert "'body'" in capsys.readouterr().err


def test_text_that_is_a_list_or_bytes_is_refused(hub: Hub) -> None:
    for kind, value in ((datasets.Value("binary"), b"x"), ([datasets.Value("string")], ["x"])):
        features = datasets.Features({"id": datasets.Value("string"), "text": kind})
        hub.rows = datasets.Dataset.from_dict({"id": ["a"], "text": [value]}, features=features)
        assert "'text'" in _error(InvalidInput, "some/data")


def test_validation_where_a_data_set_has_no_test(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if options["split"] not in ("train", "validation"):
            raise ValueError("Bad split: test. Available splits: ['train', 'validation']")
        return hub(path, name, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    got = load_evaluation("some/data", tiny_tokenizer(), seq_len=2)
    assert got.settings["split"] == "validation"
    assert "validation" in capsys.readouterr().err
    with pytest.raises(UnknownName, match="'test'"):
        load_evaluation("some/data", tiny_tokenizer(), seq_len=2, split="test")


def test_value_that_is_no_text(hub: Hub) -> None:
    hub.rows = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": 3}]))
    assert "has int" in _error(InvalidInput, "some/data")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ConnectionError("Couldn't reach 'x' on the Hub"), Unavailable, "check the network"),
        (HTTPError("[Errno -2] Name unknown"), Unavailable, "check the network"),
        (DatasetNotFoundError("Dataset 'x' doesn't exist"), UnknownName, "wikitext2"),
        (DatasetNotFoundError("Dataset 'x' is a gated dataset."), Unavailable, "hf auth login"),
        (RuntimeError("Dataset scripts are no longer supported"), InvalidInput, "scripts"),
        (ImportError("To decode audio, install\n torchcodec."), InvalidInput, "torchcodec"),
        (
            ValueError("Unknown split \"train\". Should be one of ['test', 'validation']."),
            UnknownName,
            "split of data set 'wikitxt2' 'train'. Closest: ",
        ),
    ],
)
def test_errors_are_one_line(
    hub: Hub, error: Exception, kind: type[Exception], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.error = error
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    try:
        assert says in _error(kind, "wikitxt2")
    finally:
        logging.getLogger("huggingface_hub").removeHandler(caplog.handler)
    assert not caplog.records


def test_log_levels_come_back(hub: Hub) -> None:
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    list(load_texts("some/data"))
    assert [logger.level for logger in loggers] == before


def test_connection_lost_on_the_way(hub: Hub) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("Server Disconnected")

    class Stream:
        features = None

        def __iter__(self) -> Iterator[dict[str, str]]:
            return rows()

    hub.rows = Stream()
    assert "Server Disconnected" in _error(Unavailable, "some/data")


def test_name_of_a_format_is_no_data_set() -> None:
    assert "file format" in _error(InvalidInput, "json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder as the real library reads it: two configurations, one split each."""
    lines = ["---", "configs:"]
    for name in ("one", "two"):
        pq.write_table(pa.table({"text": [name], "n": [1]}), tmp_path / f"{name}.parquet")
        files = f"  data_files: [{{split: {name}-split, path: {name}.parquet}}]"
        lines += [f"- config_name: {name}", files]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---"]).replace("-split", ""))
    return tmp_path


def test_folder_with_configurations(folder: Path) -> None:
    assert list(load_texts(folder, config="two", split="two")) == ["two"]
    assert list(load_texts(folder, split="all")) == ["one", "two"]  # without the library
    assert "one, two" in _error(InvalidInput, str(folder))


def test_folder_whose_readme_lays_out_its_files(tmp_path: Path) -> None:
    for name in ("main", "held"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    files = "[{split: train, path: main.parquet}, {split: test, path: held.parquet}]"
    lines = ["---", "configs:", "- config_name: default", f"  data_files: {files}", "---"]
    (tmp_path / "README.md").write_text("\n".join(lines))
    assert list(load_texts(tmp_path)) == ["main"]
    got = load_evaluation(tmp_path, tiny_tokenizer(), seq_len=4)
    assert tiny_tokenizer().decode(got.windows[0]) == "held"
    assert got.settings["split"] == "test"


def test_real_errors_of_the_library(folder: Path, tmp_path: Path) -> None:
    source = str(folder)
    assert "one, two" in _error(InvalidInput, source, split="one")
    assert "'three'. Closest: t" in _error(UnknownName, source, split="one", config="three")
    message = _error(UnknownName, source, split="eno", config="one")
    assert message.startswith("unknown split of data set")
    assert message.endswith("'eno'. Closest: one.")
    (tmp_path / "empty").mkdir()
    assert "data files" in _error(InvalidInput, str(tmp_path / "empty"), split="train")


def test_real_error_of_an_impossible_id() -> None:
    assert "Repo id must use" in _error(InvalidInput, "we!rd")


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "settings",
    [
        "data_files: {above}/secret.jsonl", "data_files: ../secret.jsonl", "data_dir: ..",
        "data_files: x/../../secret.jsonl", "data_dir: {above}", "data_files: '{above}/s*.jsonl'",
        "data_files: [{{split: train, path: ../secret.jsonl}}]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("link", [False, True])
def test_the_files_that_a_readme_names_lie_in_its_folder(
    link: bool, settings: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    folder = tmp_path / "above" / "set"
    (folder / "x").mkdir(parents=True)
    (folder / "x.jsonl").write_text('{"text": "own"}\n')
    (folder.parent / "secret.jsonl").write_text('{"text": "secret"}\n')
    if link:
        (tmp_path / "link").symlink_to(folder)
    source = str(tmp_path / "link" if link else folder)

    def write(one: str) -> None:
        text = f"configs:\n- config_name: default\n  {one}\n"
        (folder / file).write_text(f"---\n{text}---\n" if file == "README.md" else text)

    write(settings.format(above=folder.parent))
    error = _error(InvalidInput, source, split="train", config="default")
    assert "README" in error
    assert "secret.jsonl" in error
    write("data_files: x.jsonl")
    assert list(load_texts(source, split="train", config="default")) == ["own"]
