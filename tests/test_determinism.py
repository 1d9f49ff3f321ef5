"""The same bytes with any memory, batch size and number of threads, as docs/promises.md says."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from entangle.models.loading import LanguageModel
from entangle.scoring.score import score
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import save_tiny

TEXT = ["--n-seq", "24", "--seq-len", "50"]
COMMANDS = {
    "score": ["score", "model", *TEXT, "--method", "exact"],
    "decompose": ["decompose", "model", *TEXT, "--layer", "1", "--proj", "mlp",
                  "--experts", "1,3", "--sparsity", "0.75"],
    "ablate": ["ablate", "model", *TEXT, "--proj", "mlp", "--fraction", "0.1",
               "--strength", "0.9", "--experts", "1,3", "--evaluation", "text.txt"],
    "expand": ["expand", "model", *TEXT, "--experts", "3", "--sparsity", "0.75"],
}  # fmt: skip
SMALL = ("--memory", "1M")
BATCHES = [("--batch-size", size) for size in ("1", "5")]
_DRIVER = """
import sys, torch
from entangle.cli.main import main

torch.set_num_threads(int(sys.argv[1]))
for line in sys.argv[2:]:
    assert not main(line.split()), line
"""


def name_of(command: str, options: Sequence[str]) -> str:
    return "".join([command, *options])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a result, by threads, command and options; a process a thread count."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny("llama", folder / "model")
    words = (f"{i * i % 97} word{i % 13}" for i in range(400))
    (folder / "text.txt").write_text(" ".join(words))

    @cache
    def made(threads: int) -> Path:
        out = folder / str(threads)
        lines = [
            [
                *line,
                "--calibration",
                "text.txt",
                *options,
                "--out",
                str(out / name_of(command, options)),
            ]
            for command, line in COMMANDS.items()
            for options in ((), SMALL, *(BATCHES if command == "score" else ()))
        ]
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, str(threads), *map(" ".join, lines)],
            cwd=folder, capture_output=True, text=True, check=False, timeout=600,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return out

    return lambda threads, command, *options: made(threads) / name_of(command, options)


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every table and tensor file of a result."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".parquet", ".safetensors")
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("command", COMMANDS)
def test_memory_changes_no_byte(runs: Callable[..., Path], command: str, threads: int) -> None:
    small = contents(runs(threads, command, *SMALL))
    assert small
    assert small == contents(runs(threads, command))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", BATCHES)
def test_batch_size_changes_no_byte_of_exact_scores(
    runs: Callable[..., Path], options: Sequence[str], threads: int
) -> None:
    assert contents(runs(threads, "score", *options)) == contents(runs(threads, "score"))


def test_threads_change_no_score(runs: Callable[..., Path]) -> None:
    one, two = (runs(threads, "score") for threads in (1, 2))
    assert contents(one) == contents(two)
    for folder, threads in ((one, 1), (two, 2)):
        assert json.loads((folder / "manifest.json").read_text())["threads"] == threads


@pytest.mark.parametrize("command", ["decompose", "ablate"])
def test_threads_change_numbers_by_1e_5_at_most(runs: Callable[..., Path], command: str) -> None:
    one, two = (runs(threads, command) for threads in (1, 2))
    for path in one.glob("*.parquet"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(path), pd.read_parquet(two / path.name), rtol=1e-5, atol=1e-5
        )


def test_threads_leave_masks_and_weights_of_an_expansion(runs: Callable[..., Path]) -> None:
    folders = [runs(threads, "expand") for threads in (1, 2)]
    flipped = weights = 0
    for path in folders[0].glob("*.safetensors"):
        one, two = (load_file(folder / path.name) for folder in folders)
        assert one.keys() == two.keys()
        for name, before in one.items():
            after = two[name]
            if not before.is_floating_point() or before.ndim < 2:
                continue
            moved = (before == 0) != (after == 0)
            flipped, weights = flipped + int(moved.sum()), weights + moved.numel()
            kept = ~moved.any(-1)
            torch.testing.assert_close(before[kept], after[kept], rtol=0, atol=1e-5)
    assert weights > 0
    assert flipped <= 1e-4 * weights


@pytest.mark.parametrize("size", [1, 2, 5])
def test_other_batches_move_a_sketch_within_its_tolerance(
    tiny: Callable[[str], LanguageModel], size: int
) -> None:
    ids = torch.randint(4, 112, (64, 16), generator=torch_rng(0, "sketched"))
    text = CalibrationSet(ids, "random ids", {})
    usual, other = (
        score(tiny("gpt2"), text, proj="mlp", method="sketch", batch_size=batch).frame
        for batch in (None, size)
    )
    assert (other["wd"] - usual["wd"]).abs().le(other["wd_bound"] + usual["wd_bound"]).all()
    assert (other["md"] / usual["md"]).between(0.5, 2).all()
    assert not other["md"].equals(usual["md"])
