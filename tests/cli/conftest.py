import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from entangle.cli.main import main
from tests.cli.runs import Ran, Run


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = int(str(error.code))
        return Ran(status, *capfd.readouterr())

    return run


@pytest.fixture
def small(tiny_folder: Callable[[str], Path], text_file: Path) -> Sequence[object]:
    """Arguments that score the MLP of a tiny model on a short text, quietly."""
    return (
        "score", tiny_folder("llama"), "--layer", 1, "--proj", "mlp", "--calibration", text_file,
        "--n-seq", 4, "--seq-len", 32, "--quiet",
    )  # fmt: skip


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The current folder: a copy of the tiny Llama, ``model``, and ``text.txt``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    shutil.copy(text_file, tmp_path / "text.txt")
    return tmp_path
