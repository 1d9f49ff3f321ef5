"""Reading minimal pairs: files, folders, data sets with their network side replaced."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from entangle.errors import EntangleError, InvalidInput, Unavailable, UnknownName
from entangle.evaluation import load_minimal_pairs


def _row(number: int, uid: str | None = None) -> dict[str, str]:
    row = {"sentence_good": f"good {number}.", "sentence_bad": f"bad {number}."}
    return row if uid is None else {**row, "UID": uid, "field": "syntax"}


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two files, one without paradigms, and files that are not read."""
    _write(tmp_path / "b.jsonl", [_row(i) for i in range(5)])
    _write(tmp_path / "a.jsonl", [_row(10 + i, ("odd", "even")[i % 2]) for i in range(40)])
    (tmp_path / ".hidden.jsonl").write_text("no JSON")
    (tmp_path / "README.md").write_text("no JSON")
    return tmp_path


def _error(kind: type[EntangleError], source: str | Path, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_minimal_pairs(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder(folder: Path) -> None:
    pairs = load_minimal_pairs(folder)
    assert pairs.counts == {"odd": 20, "even": 20, "b": 5}
    assert (pairs.good[0], pairs.bad[0], pairs.paradigms[0]) == ("good 10.", "bad 10.", "odd")
    assert pairs.good[-1] == "good 4."
    expected = {"n_files": 2, "chosen": None, "n_per_paradigm": None, "seed": None}
    expected |= {"special_tokens": "model"}  # type: ignore[dict-item]
    assert pairs.settings == expected
    assert pairs.source == str(folder)


def test_one_file_with_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.JSONL", [_row(0), _row(1)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n"))
    pairs = load_minimal_pairs(str(path))
    assert (pairs.good, pairs.paradigms) == (("good 0.", "good 1."), ("x", "x"))


def test_paradigms(folder: Path) -> None:
    pairs = load_minimal_pairs(folder, paradigms=["b", "odd"])
    assert pairs.counts == {"odd": 20, "b": 5}
    assert pairs.settings["chosen"] == ["b", "odd"]
    assert "paradigm of" in (message := _error(UnknownName, folder, paradigms=["b", "evn"]))
    assert message.endswith("'evn'. Closest: even, odd, b.")


def test_subset_is_random_in_order_and_fixed_by_its_seed(folder: Path) -> None:
    whole = load_minimal_pairs(folder)
    first, again, other = (load_minimal_pairs(folder, n_per_paradigm=5, seed=s) for s in (3, 3, 4))
    assert first.counts == {"odd": 5, "even": 5, "b": 5}
    assert first.digest == again.digest != other.digest
    places = [whole.good.index(sentence) for sentence in first.good]
    assert places == sorted(set(places))
    assert all(first.bad[i] == whole.bad[place] for i, place in enumerate(places))
    assert first.settings["seed"] == 3
    odd, even = ([i // 2 for i in places if i < 40 and i % 2 == k] for k in (0, 1))
    assert odd != even  # a draw of its own for each paradigm
    alone = load_minimal_pairs(folder, paradigms=["even"], n_per_paradigm=5, seed=3)
    kept = [s for s, p in zip(first.good, first.paradigms, strict=True) if p == "even"]
    assert list(alone.good) == kept


def test_every_pair_is_drawn_equally_often(folder: Path) -> None:
    drawn = [
        load_minimal_pairs(folder / "b.jsonl", n_per_paradigm=2, seed=seed).good
        for seed in range(200)
    ]
    times = np.unique(np.concatenate(drawn), return_counts=True)[1]
    assert len(times) == 5
    assert abs(times - 80).max() < 5 * (200 * 0.4 * 0.6) ** 0.5


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ('{"sentence_good": "a",', InvalidInput, "line 2 of '*' is not valid JSON"),
        ('["a", "b"]', InvalidInput, "line 2 of '*' is not a JSON object"),
        ('{"sentence_good": "a", "bad": "b"}', UnknownName, "line 2 of '*': 'sentence_bad'"),
        ('{"sentence_bad": "a"}', UnknownName, "line 2 of '*': 'sentence_good'"),
        (
            '{"sentence_good": 3, "sentence_bad": "b"}',
            InvalidInput,
            "'sentence_good' must hold text; line 2 of '*' has int",
        ),
        (
            '{"sentence_good": "a", "sentence_bad": null}',
            InvalidInput,
            "'sentence_bad' must hold text; line 2 of '*' has NoneType",
        ),
        (
            '{"sentence_good": "a", "sentence_bad": "b", "UID": 7}',
            InvalidInput,
            "'UID' must hold text; line 2 of '*' has int",
        ),
        ('{"sentence_good": "a", "sentence_bad": ""}', InvalidInput, "one of line 2 of '*'"),
        (
            '{"sentence_good": "a", "sentence_bad": "a"}',
            InvalidInput,
            "must differ; both of line 2 of '*' are 'a'",
        ),
    ],
)
def test_lines_that_are_wrong(
    tmp_path: Path, line: str, kind: type[EntangleError], says: str
) -> None:
    path = _write(tmp_path / "bad.jsonl", [_row(0)])
    path.write_text(path.read_text() + line + "\n")
    assert says.replace("*", str(path)) in _error(kind, path)


def test_null_and_empty_paradigms_are_unnamed(tmp_path: Path) -> None:
    lines = [{**_row(0), "UID": None}, {**_row(1), "UID": ""}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert load_minimal_pairs(path).counts == {"x": 2}


def test_paths_that_are_wrong(tmp_path: Path) -> None:
    assert "No such file" in _error(Unavailable, tmp_path / "none.jsonl")
    assert "No such file" in _error(Unavailable, "nowhere/none.jsonl")
    assert "must be in .jsonl files" in _error(InvalidInput, tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert "must be in .jsonl files" in _error(InvalidInput, tmp_path / "a.txt")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "holds no minimal pair" in _error(InvalidInput, tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"sentence_good": "\xe9"}')
    assert "is not valid JSON" in _error(InvalidInput, tmp_path / "latin.jsonl")


def test_options_that_are_wrong(folder: Path) -> None:
    assert "at most 5, as many pairs as 'b' has; got 6" in _error(
        InvalidInput, folder, n_per_paradigm=6
    )
    for wrong in (0, -1, True):
        assert "`n_per_paradigm` must" in _error(InvalidInput, folder, n_per_paradigm=wrong)
    assert "`paradigms` must" in _error(InvalidInput, folder, paradigms=[])
    assert "`seed` must" in _error(InvalidInput, folder, seed=-1)


class Hub:
    """Stands in for the library's two functions: records what is loaded, returns rows or raises."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {
            "wh_island": [_row(0, "wh_island"), _row(1, "wh_island")],
            "causative": [_row(2, "causative")],
        }
        self.loaded: list[tuple[str, str, str]] = []
        self.error: Exception | None = None

    def names(self, path: str) -> list[str]:
        if self.error is not None:
            raise self.error
        return list(self.rows)

    def load(self, path: str, name: str, *, split: str) -> list[dict[str, Any]]:
        self.loaded.append((path, name, split))
        return self.rows[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(datasets, "get_dataset_config_names", stand_in.names)
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load)
    return stand_in


def test_blimp(hub: Hub) -> None:
    pairs = load_minimal_pairs("blimp")
    assert pairs.counts == {"wh_island": 2, "causative": 1}
    names = ["wh_island", "causative"]
    assert hub.loaded == [("nyu-mll/blimp", name, "train") for name in names]
    assert pairs.source == "blimp"
    assert pairs.settings["dataset"] == "nyu-mll/blimp"
    assert pairs.settings["split"] == "train"


def test_only_the_paradigms_asked_for_are_loaded(hub: Hub) -> None:
    assert load_minimal_pairs("blimp", paradigms=["causative"]).counts == {"causative": 1}
    assert [name for _, name, _ in hub.loaded] == ["causative"]
    message = _error(UnknownName, "blimp", paradigms=["casative"])
    assert message.startswith("unknown paradigm of data set 'nyu-mll/blimp' 'casative'. Closest: ")


def test_another_data_set(hub: Hub) -> None:
    hub.rows = {"default": [_row(0, "one"), _row(1, "two"), _row(2)]}
    assert load_minimal_pairs("some/pairs").counts == {"one": 1, "two": 1, "default": 1}
    assert load_minimal_pairs("some/pairs", paradigms=["two"]).good == ("good 1.",)
    assert "Closest: " in _error(UnknownName, "some/pairs", paradigms=["three"])
    hub.rows = {"default": [_row(0), {"sentence_good": "a"}]}
    assert "row 2 of 'default' of data set 'some/pairs': 'sentence_bad'" in _error(
        UnknownName, "some/pairs"
    )


def test_errors_of_the_hub(hub: Hub) -> None:
    hub.error = ConnectionError("Couldn't reach\n'x'")
    assert "data set 'nyu-mll/blimp' cannot be reached" in _error(Unavailable, "blimp")
    hub.error = datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist")
    assert "data set 'some/pairs'" in _error(UnknownName, "some/pairs")


@pytest.mark.parametrize("name", ["json", "blmp"])
def test_names_without_an_owner(hub: Hub, name: str) -> None:
    assert f"{name!r}. Closest: blimp." in _error(UnknownName, name)


def test_a_folder_of_that_name_does_not_hide_blimp(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blimp").mkdir()
    _write(tmp_path / "blimp" / "x.jsonl", [_row(0)])
    assert load_minimal_pairs("blimp").n_pairs == 3
    assert load_minimal_pairs("./blimp").n_pairs == 1
