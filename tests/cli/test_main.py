import os
from pathlib import Path

import pytest

import entangle
from entangle.cli import layers
from entangle.cli.main import COMMANDS, main
from entangle.errors import InvalidInput, NumericalError
from tests.cli.runs import Run


def test_the_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"entangle {entangle.__version__}\n")


@pytest.mark.parametrize("command", [one.__name__.rpartition(".")[2] for one in COMMANDS])
def test_every_command_has_help(run: Run, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: entangle {command}")
    assert command in run("--help").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["scor"], "invalid choice: 'scor'"),
        (["score", "--n-seq", "many"], "argument --n-seq: invalid int value: 'many'"),
        (["score", "--sampling", "odd"], "argument --sampling: invalid choice: 'odd'"),
        (["layers", "--layer", "1"], "unrecognized arguments: --layer"),
    ],
)
def test_arguments_that_cannot_be_parsed(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InvalidInput("two\n  lines"), 2, "entangle: error: two lines\n"),
        (NumericalError("not positive definite"), 1, "entangle: error: not positive definite\n"),
        (KeyboardInterrupt(), 130, "entangle: interrupted\n"),
    ],
)
def test_errors_become_a_line_and_a_status(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(_arguments: object) -> None:
        raise error

    monkeypatch.setattr(layers, "run", fail)
    assert run("layers") == (status, "", message)


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(layers, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["layers"])


def test_a_reader_that_has_seen_enough(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_arguments: object) -> None:
        raise BrokenPipeError

    replaced: list[int] = []
    monkeypatch.setattr(layers, "run", fail)
    monkeypatch.setattr(os, "dup2", lambda _old, new: replaced.append(new))
    assert run("layers") == (0, "", "")
    assert len(replaced) == 1
