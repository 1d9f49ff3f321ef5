import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.runs import Run

Folder = Callable[[str], Path]


def test_the_listing(run: Run, tiny_folder: Folder) -> None:
    status, out, err = run("layers", tiny_folder("gpt2"))
    assert (status, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines() if line.strip()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert rows[0] == [f"Linear layers of {tiny_folder('gpt2')}"]
    assert rows[1] == ["name", "block", "projection", "shape"]
    assert rows[3] == ["transformer.h.0.attn.c_attn", "0", "c_attn", "96 × 32"]
    assert rows[5] == ["transformer.h.0.mlp.c_fc", "0", "c_fc", "48 × 32"]
    assert rows[-1] == ["lm_head", "–", "lm_head", "112 × 32"]
    assert len(rows) == 3 + 12 + 1


def test_experts_are_listed_one_by_one(run: Run, tiny_folder: Folder) -> None:
    out = run("layers", tiny_folder("mixtral")).out
    rows = [line.split() for line in out.splitlines() if "experts" in line]
    assert [row[0] for row in rows[:3]] == [
        f"model.layers.0.mlp.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert len(rows) == 3 * 4 * 3


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_json(run: Run, tiny_folder: Folder, name: str) -> None:
    status, out, err = run("layers", tiny_folder(name), "--json")
    rows = json.loads(out)
    assert (status, err) == (0, "")
    assert all(
        row.keys() == {"name", "block", "projection", "shape", "addressable"} for row in rows
    )
    assert {row["addressable"] for row in rows} == {True}
    assert {row["block"] for row in rows} >= {0, 1, 2}


def test_names_of_folders_are_printed_as_they_are(
    run: Run, tiny_folder: Folder, tmp_path: Path
) -> None:
    link = tmp_path / "[bold]v2[" / "]:smile:"
    link.parent.mkdir()
    link.symlink_to(tiny_folder("llama"))
    status, out, _ = run("layers", link)
    assert status == 0
    assert f"Linear layers of {link}" in out
