"""An experiment that is killed goes on to the same tables."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from entangle.cli.main import main
from tests.killed import killed_before

COMMON = (
    "model", "--calibration", "text.txt", "--evaluation", "text.txt", "--n-seq", "6", "--seq-len",
    "32", "--eval-seq-len", "32", "--eval-windows", "4", "--device", "cpu", "--quiet",
)  # fmt: skip
SWEEP = (
    "ablate", *COMMON, "--layer", "all", "--fraction", "0.1", "--strength", "0.5,0.9", "--seeds",
    "2", "--out",
)  # fmt: skip
COMPARISON = (
    "compare", *COMMON, "--methods", "magnitude, sparsegpt, expansion", "--sparsity", "0.5, 0.8",
    "--experts", "2", "--out",
)  # fmt: skip
PERPLEXITY = tuple(f"figures/perplexity.{ending}" for ending in ("csv", "pdf", "png"))


@pytest.mark.parametrize(
    ("command", "hidden", "finished", "files"),
    [
        (SWEEP, ".cut.ablating", 2, ("ablation", "windows", "selections")),
        (COMPARISON, ".cut.comparing", 3, ("comparison", "windows", "equal_nonzeros", *PERPLEXITY)),
    ],
    ids=["sweep", "comparison"],
)
def test_what_was_killed_resumes_to_the_same_tables(
    command: tuple[str, ...],
    hidden: str,
    finished: int,
    files: tuple[str, ...],
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama"), "model")
    shutil.copy(text_file, "text.txt")
    killed_before("arm-", finished + 1, [*command, "cut"])
    assert not Path("cut").exists()
    assert len(list(Path(hidden).glob("arm-*.safetensors"))) == finished
    assert main([*command, "cut"]) == 2  # not without --resume
    assert main([*command, "cut", "--resume"]) == 0
    assert main([*command, "whole"]) == 0
    for name in files:
        file = name if "." in name else f"{name}.parquet"
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "model", "text.txt", "whole"]
