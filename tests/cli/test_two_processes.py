"""Two commands that write one result: one does, the other says so before its work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from entangle.cli.main import main
from entangle.runs.claims import claim_file

COMMAND = (
    "compare", "model", "--calibration", "text.txt", "--evaluation", "text.txt", "--n-seq", "6",
    "--seq-len", "32", "--eval-seq-len", "32", "--eval-windows", "4", "--methods",
    "magnitude,wanda", "--device", "cpu", "--quiet", "--out", "x",
)  # fmt: skip
_STOPPED = """
import os, sys, time
from entangle.cli.main import main

replace, named = os.replace, []

def stopped(source, target):
    named.append(target)
    if sum("arm-" in str(path) for path in named) == 3:
        open("waiting", "w").close()
        time.sleep(120)
    replace(source, target)

os.replace = stopped
sys.exit(main(sys.argv[1:]))
"""


def start(code: str, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *COMMAND, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(file: Path, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert file.exists(), process.communicate()


@pytest.fixture
def place(
    tmp_path: Path, tiny_folder: Callable[[str], Path], text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama"), "model")
    shutil.copy(text_file, "text.txt")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], more: Sequence[str], pid: int) -> None:
    shutil.move("model", "hidden")  # the loser does not get as far as the model
    try:
        assert main([*COMMAND, *more]) == 2
    finally:
        shutil.move("hidden", "model")
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"process {pid} on " in err


def test_the_second_stops_the_first_is_killed_and_a_third_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(_STOPPED, "--sparsity", "0.5,0.8")
    wait_for(place / "waiting", first)
    for more in ([], ["--resume"], ["--force"], ["--sparsity", "0.7", "--force"]):
        refused(capsys, more, first.pid)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert claim_file(place / "x").exists()
    pieces = len(list(Path(".x.comparing").glob("arm-*.safetensors")))
    assert main([*COMMAND, "--sparsity", "0.7", "--resume"]) == 2  # of another plan
    assert "settings" in capsys.readouterr().err
    assert main([*COMMAND, "--sparsity", "0.5,0.8", "--resume"]) == 0
    assert pieces == 2
    left = {path.name for path in place.iterdir()}
    assert left == {"model", "text.txt", "waiting", "x"}
