"""A comparison that is killed goes on to the same tables."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from entangle.cli.main import main
from tests.killed import killed_before

COMMAND = (
    "compare", "model", "--calibration", "text.txt", "--evaluation", "text.txt", "--n-seq", "6",
    "--seq-len", "32", "--eval-seq-len", "32", "--eval-windows", "4", "--methods",
    "magnitude, sparsegpt, expansion", "--sparsity", "0.5, 0.8", "--experts", "2", "--device",
    "cpu", "--quiet", "--out",
)  # fmt: skip


def test_a_comparison_that_was_killed_resumes_to_the_same_tables(
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama"), "model")
    shutil.copy(text_file, "text.txt")
    killed_before("arm-", 4, [*COMMAND, "cut"])  # dense and two arms have their names
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
