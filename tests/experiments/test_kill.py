"""A sweep that is killed goes on to the same tables."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from entangle.cli.main import main
from tests.killed import killed_before

COMMAND = (
    "ablate", "model", "--layer", "all", "--calibration", "text.txt", "--evaluation", "text.txt",
    "--n-seq", "6", "--seq-len", "32", "--eval-seq-len", "32", "--eval-windows", "4",
    "--fraction", "0.1", "--strength", "0.5,0.9", "--seeds", "2", "--device", "cpu", "--quiet",
    "--out",
)  # fmt: skip


def test_a_sweep_that_was_killed_resumes_to_the_same_tables(
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama"), "model")
    shutil.copy(text_file, "text.txt")
    killed_before("arm-", 3, [*COMMAND, "cut"])  # two arms have their names
    assert not Path("cut").exists()
    assert len(list(Path(".cut.ablating").glob("arm-*.safetensors"))) == 2
    assert main([*COMMAND, "cut"]) == 2  # not without --resume
    assert main([*COMMAND, "cut", "--resume"]) == 0
    assert main([*COMMAND, "whole"]) == 0
    for name in ("ablation", "windows", "selections"):
        one, other = (Path(run) / f"{name}.parquet" for run in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "model", "text.txt", "whole"]
