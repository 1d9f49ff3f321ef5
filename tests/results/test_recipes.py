"""The recipes about figures run as they are written, each of at most ten lines."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

import entangle

PAGE = Path(__file__).parents[2] / "docs" / "figures_are_yours.md"


def test_the_recipes(
    made: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("scores", "ablation"):
        shutil.copytree(made[kind], tmp_path / "runs" / kind)
    codes = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for code in codes:
        assert len(code.splitlines()) <= 10
        exec(code, names)
    plt.close("all")
    assert (tmp_path / "mine.pdf").exists()
    assert [path.suffix for path in sorted(tmp_path.glob("figures/wd_distribution.*"))] == [
        ".csv", ".pdf", ".png"
    ]  # fmt: skip
    assert isinstance(names["scores"], entangle.results.scores.NeuronScores)
