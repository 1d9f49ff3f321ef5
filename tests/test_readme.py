"""The README's Python runs when pasted in order, on a tiny model in place of the demo's."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import transformers as hf

from entangle.experts import checkpoint as expanded_loading
from entangle.models import demo, loading
from entangle.models.loading import LanguageModel
from entangle.seeding import numpy_rng
from tests.tiny_models import GROUPED, own_generator, tiny_tokenizer

README = Path(__file__).parent.parent / "README.md"
LONG = GROUPED | {"max_position_embeddings": 1024}


def snippets() -> list[str]:
    text = README.read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def small_demo() -> LanguageModel:
    with own_generator(0):
        module: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**LONG))
    return LanguageModel(
        module.eval().requires_grad_(False), tiny_tokenizer(), "demo", "demo", None
    )


def articles() -> list[tuple[str, str]]:
    rng = numpy_rng(0, "articles")
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in rng.integers(2, 9, 200)]
    return [(f"title {i}", " ".join(rng.choice(words, 1500))) for i in range(9)]


def test_the_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(snippets()) >= 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "demo_articles", articles)
    for place in (loading, expanded_loading):
        monkeypatch.setattr(place, "load_model", lambda name="demo", **_options: small_demo())
    names: dict[str, Any] = {}
    for code in snippets():
        exec(code, names)
    plt.close("all")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"runs/block1/manifest.json", "runs/ablation/manifest.json", "runs/x16/manifest.json",
            "figures/top_and_typical.pdf"} <= written  # fmt: skip
    assert len(names["scores"].top(10)) == 10
    assert names["expanded"].source == "expansion"


@pytest.mark.slow
@pytest.mark.demo
def test_the_snippets_run_on_the_demo_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets())], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={"PYTHONPATH": str(README.parent), "PATH": "", "HOME": str(Path.home())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
