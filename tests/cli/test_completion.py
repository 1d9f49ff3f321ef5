"""Completion scripts, run by the shells that they are for."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from tests.cli.runs import Run

_BASH = r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_entangle entangle "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}" 2> /dev/null
printf '%s\n' "${COMPREPLY[@]}"
"""
_FISH = 'source $argv[1]; complete -C "$argv[2]" | string split -f 1 \\t'
_ZSH = "PROMPT='READY> '; fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D; echo DO''NE"


def _of_zsh(folder: Path, line: str) -> str:
    """Type a line and a tab in a terminal; return what appears after it."""
    (folder / "script.zsh").rename(folder / "_entangle")
    terminal = os.environ | {"TERM": "dumb", "PATH": f"{folder}:{os.environ['PATH']}"}
    shell = pexpect.spawn(
        "zsh", ["-f", "-i"], cwd=str(folder), env=terminal, encoding="utf-8", timeout=60,
        dimensions=(60, 120),
    )  # fmt: skip
    try:
        shell.sendline(_ZSH)
        for mark in ("DONE", "READY> "):
            shell.expect(mark)
        shell.send(f"{line}\t")
        shell.expect([r"\n.*\n.*\n", r"config ", pexpect.TIMEOUT], timeout=20)
        return str(shell.before) + str(shell.after)
    finally:
        shell.close(force=True)


@pytest.fixture
def complete(run: Run, tmp_path: Path) -> Callable[[str, str], str]:
    """Return what a shell offers after a command line."""
    (tmp_path / "entangle").write_text("#!/bin/sh\n")
    (tmp_path / "entangle").chmod(0o755)

    def complete(shell: str, line: str) -> str:
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        script = tmp_path / f"script.{shell}"
        script.write_text(run("completion", shell).out)
        if shell == "zsh":
            return _of_zsh(tmp_path, line)
        file, words = str(script), line.split(" ")
        commands = {
            "bash": ["bash", "--noprofile", "--norc", "-c", _BASH, "-", file, *words],
            "fish": ["fish", "--no-config", "-c", _FISH, file, line],
        }
        command: list[str] = commands[shell]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
        )
        return done.stdout

    return complete


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_commands_options_and_choices(complete: Callable[[str, str], str], shell: str) -> None:
    assert {"score", "show"} <= set(complete(shell, "entangle s").split())
    assert "--calibration-config" in complete(shell, "entangle score --calibration-").split()


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_values_and_files(complete: Callable[[str, str], str], shell: str, tmp_path: Path) -> None:
    rules = complete(shell, "entangle allocate x --rule ").split()
    assert {"uniform", "sensitivity", "search"} <= set(rules)
    assert "neurons" in complete(shell, "entangle score --table ").split()
    assert complete(shell, "entangle completion z").split() == ["zsh"]
    (tmp_path / "odd name.txt").touch()
    assert "odd name.txt" in complete(shell, "entangle score --calibration od").splitlines()


def test_an_unknown_shell_is_refused(run: Run) -> None:
    ran = run("completion", "cmd")
    assert (ran.status, ran.out) == (2, "")
    assert "bash" in ran.err
