"""Nothing is lost: results without a name are named after what was asked, and found again."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import entangle
from entangle.cli import asked
from entangle.cli.main import _parsers
from tests.cli.runs import Run

Small = Sequence[object]


def name_of(*words: object) -> str:
    arguments = _parsers()[0].parse_args([str(one) for one in words])
    asked.name_output(arguments)
    return str(arguments.out)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENTANGLE_HOME")
    return tmp_path


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("score m", "score m", True),
        ("score m --top 3 --csv --quiet", "score m --json --wide --force", True),
        ("score m --n-seq 3", "score m --n-seq=3", True),
        ("score", "score demo", True),
        ("score m", "score other", False),
        ("score m --seed 1", "score m", False),
        ("score m --layer 1", "score m --layer 2", False),
        ("allocate s --sparsity 0.5 --plot x", "allocate s --sparsity 0.5 --export csv:x", True),
        ("allocate s --sparsity 0.5", "allocate s --sparsity 0.6", False),
        ("prune m", "expand m", False),
    ],
)
def test_a_name_tells_what_was_asked(one: str, other: str, same: bool) -> None:
    names = [name_of(*words.split()) for words in (one, other)]
    assert (names[0] == names[1]) is same
    assert all(name.startswith(f"runs/{one.split()[0]}-") for name in names[:1])


def test_the_content_of_files_belongs_to_the_question(here: Path) -> None:
    text, folder = here / "a.txt", here / "model"
    command = ("score", "model", "--calibration", "a.txt")
    names = [name_of(*command)]
    text.write_text("one")
    names.append(name_of(*command))
    text.write_text("two")
    names.append(name_of(*command))
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names.append(name_of(*command))
    (folder / "config.json").write_text("{ }")
    names.append(name_of(*command))
    assert len(set(names)) == 5
    os.utime(text, (1, 1))  # when it was written does not matter
    assert name_of(*command) == names[-1]
    (here / "copy.txt").write_text("two")
    assert name_of("ablate", "--allocation", "x=copy.txt") != name_of("ablate", "--allocation", "x")


def test_another_version_asks_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    before = name_of("score")
    monkeypatch.setattr(asked, "__version__", "99")
    assert name_of("score") != before


def test_a_named_result_keeps_its_name() -> None:
    assert name_of("score", "--out", "x") == "x"
    assert name_of("allocate", "s", "--sparsity", "0.5").endswith(".safetensors")


def test_entangle_home(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setenv("ENTANGLE_HOME", str(here / "home"))
    assert name_of("score").startswith(str(here / "home" / "runs" / "score-"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded since."""
    from entangle.models import loading

    seen: list[str] = []
    load = loading.load_model

    def noted(model: str, **options: object) -> object:
        seen.append(str(model))
        return load(model, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "load_model", noted)
    return seen


def test_the_same_command_again_finds_what_it_made(
    run: Run, small: Small, here: Path, loads: list[str]
) -> None:
    first = run(*small)
    (folder,) = (here / "runs").iterdir()
    assert first.out.splitlines()[-1] == f"Saved to runs/{folder.name}."
    again = run(*small)
    assert (again.status, again.out, len(loads)) == (0, first.out, 1)
    assert again.err.count("\n") == 1
    assert f"runs/{folder.name}" in again.err
    assert "--force" in again.err
    printed = run(*small, "--json", "--top", 2)
    assert len(loads) == 1
    content = json.loads(printed.out)
    assert (content["out"], len(content["top"])) == (f"runs/{folder.name}", 2)
    assert content["manifest"] == entangle.load_scores(folder).manifest
    stamp = (folder / "manifest.json").stat().st_ino
    assert run(*small, "--force").status == 0
    assert len(loads) == 2
    assert (folder / "manifest.json").stat().st_ino != stamp
    assert list((here / "runs").iterdir()) == [folder]


def test_an_explicit_place_is_refused_as_ever(run: Run, small: Small) -> None:
    assert run(*small, "--out", "x").status == 0
    assert run(*small, "--out", "x").status == 2


def test_a_damaged_result_is_not_shown(run: Run, small: Small, here: Path) -> None:
    run(*small)
    (table,) = (here / "runs").glob("*/scores.parquet")
    table.write_bytes(table.read_bytes()[:-1])
    ran = run(*small)
    assert (ran.status, ran.out) == (2, "")
    assert "scores.parquet" in ran.err


def _options(text: Path, model: Path) -> dict[str, tuple[object, ...]]:
    read = ("--calibration", text, "--n-seq", 4, "--seq-len", 32, "--quiet")
    evaluated = ("--evaluation", text, "--eval-seq-len", 32, "--eval-windows", 2)
    up = ("--proj", "up_proj")
    return {
        "ablate": (model, *up, *read, *evaluated, "--seeds", 1, "--strength", 0.5, "--count", 2,
                   "--no-md"),
        "compare": (model, *read, *evaluated, "--methods", "wanda", "--sparsity", 0.5),
        "decompose": (model, "--layer", 1, "--proj", "gate_proj", *read, "--experts", "1,2"),
        "evaluate": (model, *evaluated, "--quiet"),
        "expand": (model, *up, *read, *evaluated, "--experts", 2),
        "prune": (model, *up, *read),
    }  # fmt: skip


@pytest.mark.parametrize(
    "command", ["ablate", "compare", "decompose", "evaluate", "expand", "prune"]
)
def test_every_command_that_works_keeps_and_finds_its_result(
    run: Run, command: str, text_file: Path, tiny_folder: Callable[[str], Path], here: Path,
    loads: list[str],
) -> None:  # fmt: skip
    words = (command, *_options(text_file, tiny_folder("llama"))[command])
    first = run(*words)
    assert first.status == 0, first.err
    (folder,) = [one for one in (here / "runs").iterdir() if not one.name.startswith(".")]
    assert first.out.splitlines()[-1] == f"Saved to runs/{folder.name}."
    n_loads = len(loads)
    again = run(*words)
    assert (again.status, len(loads)) == (0, n_loads)
    assert again.out.splitlines()[-1] == first.out.splitlines()[-1]
    assert [line.split()[:4] for line in again.out.splitlines()] == [
        line.split()[:4] for line in first.out.splitlines()
    ]


def test_unfinished_work_is_gone_on_with(
    run: Run, text_file: Path, tiny_folder: Callable[[str], Path], here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from entangle.experiments.compare import Comparing

    model = tiny_folder("llama")
    words = ("compare", *_options(text_file, model)["compare"], "--methods", "magnitude,wanda")
    measure = Comparing.measure
    done: list[object] = []

    def stopped(self: Comparing, arm: object) -> object:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(arm)
        return measure(self, arm)  # type: ignore[arg-type]

    monkeypatch.setattr(Comparing, "measure", stopped)
    assert run(*words).status == 130
    shown = run("show", "runs")
    assert "unfinished" in shown.out

    def going_on(self: Comparing, arm: object) -> object:
        done.append(arm)
        return measure(self, arm)  # type: ignore[arg-type]

    monkeypatch.setattr(Comparing, "measure", going_on)
    ran = run(*words)
    assert ran.status == 0
    assert "unfinished" in ran.err
    assert len(done) == 2  # the first arm was not made again
    assert [one.name.startswith(".") for one in (here / "runs").iterdir()] == [False]


def test_a_command_that_does_not_say_how_is_shown_plainly(
    run: Run, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*small)
    name_of_it = asked.finished

    def without_show(arguments: argparse.Namespace) -> bool:
        vars(arguments).pop("show", None)
        return arguments.unnamed and name_of_it(arguments.out) is not None

    monkeypatch.setattr(asked, "is_found", without_show)
    ran = run(*small)
    assert ran.status == 0
    assert ran.out.splitlines()[0].endswith(": scores")


def test_a_dry_run_finds_nothing() -> None:
    arguments = _parsers()[0].parse_args(["score"])
    arguments.dry_run = True
    asked.name_output(arguments)
    Path(arguments.out).mkdir(parents=True)
    (Path(arguments.out) / "manifest.json").touch()
    assert not asked.is_found(arguments)
    arguments.dry_run = False
    assert asked.is_found(arguments)


def test_an_allocation_is_kept_and_found_and_exported_later(
    run: Run, made: dict[str, Path], here: Path, loads: list[str]
) -> None:
    words = ("allocate", made["scores"], "--sparsity", 0.5, "--quiet")
    first = run(*words)
    (file,) = (here / "runs").iterdir()
    assert file.suffix == ".safetensors"
    n_loads = len(loads)
    again = run(*words, "--export", "csv:x.csv")
    assert (again.status, len(loads)) == (0, n_loads)
    assert (here / "x.csv").is_file()
    assert f"Saved to runs/{file.name}." in first.out.splitlines()
    assert run(*words, "--export", "csv:x.csv").status == 2  # what is named is not replaced


@pytest.mark.parametrize(
    ("words", "tells"),
    [("prune m", True), ("expand m", True), ("prune m --out x", False), ("prune m --quiet", False),
     ("score m", False)],
)  # fmt: skip
def test_where_a_whole_model_goes_is_told_first(
    words: str, tells: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _parsers()[0].parse_args(words.split())
    asked.name_output(arguments)
    asked.tell_place(arguments)
    assert (str(arguments.out) in capsys.readouterr().err) is tells
