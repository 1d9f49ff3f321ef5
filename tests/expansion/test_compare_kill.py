"""A comparison that is killed goes on to the same tables."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from entangle.cli.main import main

COMMAND = (
    "compare", "model", "--calibration", "text.txt", "--data", "text.txt", "--n-seq", "6",
    "--seq-len", "32", "--eval-seq-len", "32", "--eval-windows", "4", "--methods",
    "magnitude, sparsegpt, expansion", "--sparsity", "0.5, 0.8", "--experts", "2", "--device",
    "cpu", "--quiet", "--out",
)  # fmt: skip
DRIVER = """
import os, signal, sys
from entangle.cli.main import main

replace, arms = os.replace, []

def killed(source, target):
    arms.append(target)
    if sum("arm-" in str(path) for path in arms) == 4:  # dense and two arms have their names
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = killed
main(sys.argv[1:])
"""


def test_a_comparison_that_was_killed_resumes_to_the_same_tables(
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama"), "model")
    shutil.copy(text_file, "text.txt")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *COMMAND, "cut"],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("cut").exists()
    assert len(list(Path(".cut.comparing").glob("arm-*.safetensors"))) == 3
    assert main([*COMMAND, "cut"]) == 2  # not without --resume
    assert main([*COMMAND, "cut", "--resume"]) == 0
    assert main([*COMMAND, "whole"]) == 0
    for name in ("comparison", "windows", "equal_nonzeros"):
        one, other = (Path(run) / f"{name}.parquet" for run in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()
    for name in ("csv", "pdf", "png"):
        one, other = (Path(run) / "figures" / f"perplexity.{name}" for run in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "model", "text.txt", "whole"]
