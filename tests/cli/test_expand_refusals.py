"""`entangle expand`: mistakes and full disks end in one line and leave nothing half-written."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from entangle.runs import unfinished
from tests.cli.expansions import (
    BLOCKS,
    BUILDS,
    SMALL,
    TOKENS,
    WIDE,
    check_one_line,
    content_of,
    listing,
    without_run,
)
from tests.cli.runs import Run
from tests.tiny_models import TINY

pytestmark = pytest.mark.usefixtures("place")

MISTAKES = {
    "--experts 0": "`experts` integer 1 0",
    f"--experts {TOKENS + 1}": f"`experts` {TOKENS} {TOKENS + 1}",
    f"--experts {TOKENS + 1} --router random": f"`experts` {TOKENS} {TOKENS + 1}",
    "--sparsity 1.01": "`sparsity` [0, 1] 1.01",
    "--sparsity=-0.1": "`sparsity` [0, 1] -0.1",
    "--sparsity nan": "`sparsity` [0, 1] nan",
    "--pattern 3:5 --sparsity 0.5": "model.layers.0.mlp.gate_proj `sparsity` 0.4 '3:5' 0.5",
    "--pattern 3:2": "`pattern` n:m '3:2'",
    "--pattern rows": "`pattern` n:m 'rows'",
    "--pattern 2:4 --sparsity 0.7": "`sparsity` 0.5 '2:4' 0.7",
    "--bits 0": "`bits` integer [1, 16] 0",
    "--damping=-1": "`damping` finite least 0 -1.0",
    "--seed -1": "`seed` integer [0, 2**63)",
    "--memory lots": "size 512M 2G 'lots'",
    "--layer lm_head --proj lm_head": "'lm_head' outside",
    "--layer 3": "index 0..2 3",
    "--proj gate": "unknown projection 'gate' gate_proj",
    "--seq-len 129": "`seq_len` context 128 129",
    "--calibration nowhere.txt": "'nowhere.txt' exist",
    "--evaluation nowhere.txt": "'nowhere.txt' exist",
    "--evaluation text.txt --eval-seq-len 129": "`seq_len` context 128",
    "--evaluation text.txt --eval-windows 0": "integer 1 0",
    "--evaluation text.txt --evaluation-split test": "`split` 'test' meaning",
    "--evaluation-split test": "--evaluation-split needs --evaluation SOURCE",
    "--eval-windows 2": "--eval-windows needs --evaluation SOURCE",
    "--out text.txt": "output 'text.txt' file",
    "--out text.txt/x": "folder write",
    f"--out {'x' * 300}": "written long",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_clear_line(run: Run, case: str) -> None:
    options = case.split()
    if "--out" not in options:
        options += ["--out", "results/x"]
    before = listing()
    check_one_line(run(*WIDE, *options), MISTAKES[case])
    assert listing() == before


def test_tokens_that_do_not_differ_name_their_layers(run: Run) -> None:
    save_file({"ids": torch.full((2, 16), 7)}, "same.safetensors")
    options = ("--calibration", "same.safetensors", "--n-seq", 2, "--seq-len", 16)
    ran = run(*WIDE, *options, "--experts", 32)
    check_one_line(ran, "model.layers.0.mlp.gate_proj model.layers.0.mlp.up_proj `k`")


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude", "random"])
def test_weights_that_are_nan_name_their_layer(run: Run, pruner: str) -> None:
    broken("model.layers.1.mlp.up_proj.weight")
    before = listing()
    ran = run(*WIDE, "--out", "results/x", "--pruner", pruner)
    check_one_line(ran, "model.layers.1.mlp.up_proj `weight` finite NaN")
    assert listing() == before


@pytest.mark.parametrize("router", ["kmeans", "random"])
def test_activations_that_are_nan_name_their_layers(run: Run, router: str) -> None:
    broken("model.layers.0.post_attention_layernorm.weight")
    before = listing()
    ran = run(*WIDE, "--out", "results/x", "--router", router)
    message = f".gate_proj model.layers.0.mlp.up_proj {TOKENS} NaN"
    check_one_line(ran, message, status=1)
    assert listing() == before


def broken(name: str) -> None:
    """Write a NaN into one weight of the model."""
    module: Any = TINY["llama"]()
    module.get_parameter(name).view(-1)[0] = torch.nan
    tensors = {key: value.clone() for key, value in module.state_dict().items()}
    save_file(tensors, "model/model.safetensors", {"format": "pt"})


def test_an_output_that_is_read_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path.cwd())
    monkeypatch.setattr(os, "access", lambda path, _mode: str(path) != here)
    before = listing()
    ran = run(*SMALL, "--out", "results/x")
    check_one_line(ran, "folder write")
    assert listing() == before


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "disk full"),
    ],
)
def test_a_disk_that_refuses_the_plan_keeps_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def refuse(path: Path, _content: object) -> None:
        path.write_text("{")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(unfinished, "write_json", refuse)
    before = listing()
    check_one_line(run(*SMALL, "--out", "x"), f".x.building' {reason}")
    assert listing() == before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the operating system refuse files above a size in bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_block_that_the_disk_refuses(run: Run, whole: dict[str, bytes]) -> None:
    with largest_file(len(whole[BLOCKS[0]]) // 2):
        ran = run(*SMALL, "--out", "x")
    check_one_line(
        ran,
        "block-0000.safetensors' large --resume",
    )
    assert not Path("x").exists()
    assert sorted(content_of(".x.building")) == [BUILDS[0], "digests.json", "plan.json"]
    assert run(*SMALL, "--out", "x", "--resume").status == 0
    assert without_run("x") == whole


@pytest.fixture
def whole(run: Run, place: Path) -> dict[str, bytes]:
    """What an undisturbed build writes."""
    assert run(*SMALL, "--out", "whole").status == 0
    return without_run("whole")


def _full(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _at_the_second_block(patch: pytest.MonkeyPatch) -> None:
    replace: Callable[..., None] = os.replace

    def refuse(source: Path, target: Path) -> None:
        (_full if target.name == BLOCKS[1] else replace)(source, target)

    patch.setattr(os, "replace", refuse)


def _at_the_table(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pd.DataFrame, "to_parquet", _full)


def _at_the_name(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "rename", _full)


@pytest.mark.parametrize(
    ("fill", "blocks"), [(_at_the_second_block, 1), (_at_the_table, 3), (_at_the_name, 3)]
)
def test_a_full_disk_leaves_a_build_that_can_be_resumed(
    run: Run,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    fill: Callable[[pytest.MonkeyPatch], None],
    blocks: int,
) -> None:
    with monkeypatch.context() as patch:
        fill(patch)
        check_one_line(run(*SMALL, "--out", "x"), "disk full")
    assert not Path("x").exists()
    assert [name for name in BLOCKS if name in content_of(".x.building")] == BLOCKS[:blocks]
    assert run(*SMALL, "--out", "x", "--resume").status == 0
    assert without_run("x") == whole


@pytest.mark.parametrize("command", ["score", "prune"])
def test_other_results_that_the_disk_refuses(command: str, run: Run) -> None:
    given = (*[one for one in SMALL if one not in ("expand", "--experts", 3)], "--out", "x")
    with largest_file(512):
        ran = run(command, *given)
    check_one_line(ran, "large")
    assert not Path("x").exists()
    assert run(command, *given, "--force").status == 0
