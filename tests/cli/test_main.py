import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import entangle
from entangle.cli import layers
from entangle.cli.main import COMMANDS, main
from entangle.errors import InvalidInput, NumericalError
from entangle.runs.provenance import output_folder
from tests.cli.runs import Run, holds


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
        ([], "COMMAND"),
        (["scor"], "'scor'"),
        (["score", "--n-seq", "many"], "--n-seq int 'many'"),
        (["score", "--sampling", "odd"], "--sampling 'odd'"),
        (["layers", "--layer", "1"], "--layer"),
    ],
)
def test_arguments_that_cannot_be_parsed(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert holds(err.splitlines()[-1], message), err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InvalidInput("a\n\x1b[31m  b"), 2, "entangle: error: a\\n\\x1b[31m  b\n"),
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_with_a_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    number = getattr(signal, name)

    def stop(_arguments: object) -> None:
        with output_folder(tmp_path / "x") as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), number)
            time.sleep(60)

    monkeypatch.setattr(layers, "run", stop)
    before = signal.getsignal(number)
    assert run("layers") == (128 + number, "", f"entangle: ended by {name}\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_comes_while_an_object_is_freed_is_not_lost(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    class Freed:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    def stop(_arguments: object) -> None:
        Freed()
        time.sleep(60)

    monkeypatch.setattr(layers, "run", stop)
    done = run("layers")
    assert (done.status, done.err.count("\n")) == (status, 1)


def test_a_signal_that_is_ignored_stays_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by nohup."""
    monkeypatch.setattr(layers, "run", lambda _: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("layers").status == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(layers, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["layers"])


CLOSED = 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["layers", "model"]])
def test_a_reader_that_has_seen_enough(arguments: list[str], place: Path) -> None:
    command = [sys.executable, "-m", "entangle", *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=buffered
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED, "")


def test_a_pipe_that_closes_while_a_table_is_printed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_arguments: object) -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:  # as rich does
            raise SystemExit(1)  # noqa: B904

    monkeypatch.setattr(layers, "run", fail)
    assert run("layers") == (CLOSED, "", "")


def test_another_exit_keeps_its_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(_arguments: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(layers, "run", leave)
    assert run("layers").status == 3


NO_ROOM = "entangle: error: standard output cannot be written: No space left on device"


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("--version > /dev/full", 1, NO_ROOM),
        ("layers model > /dev/full", 1, NO_ROOM),
        ("layers model --json > /dev/full", 1, NO_ROOM),
        ("layers model --json >&-", 0, ""),
        ("layers ./nowhere >&-", 2, "entangle: error: unknown model './nowhere'"),
        ("layers ./nowhere 2>&-", 2, ""),
        ("layers ./nowhere 2> /dev/full", 2, ""),
        ("--nonsense 2>&-", 2, ""),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_streams_that_are_full_or_closed(place: Path, command: str, status: int, said: str) -> None:
    shell = f'exec "{sys.executable}" -m entangle {command}'
    done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)
