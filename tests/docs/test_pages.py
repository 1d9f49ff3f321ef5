"""What README and pages show runs when pasted in order, on a tiny model in place of the demo's."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import pytest
import transformers as hf

from entangle.activation import ACTIVATION_METHODS
from entangle.allocation.rules import RULES
from entangle.cli.main import build_parser, main
from entangle.doors import Door
from entangle.evaluation.measures import MEASURES
from entangle.experts import checkpoint
from entangle.experts.router import ROUTERS
from entangle.mixtures import MIXTURE_METHODS
from entangle.models import demo, loading
from entangle.models.loading import LanguageModel
from entangle.pruning import PRUNERS
from entangle.scoring.columns import COLUMNS
from entangle.seeding import numpy_rng
from tests.docs.pages import PAGES, ROOT, blocks, commands, with_settings
from tests.tiny_models import GROUPED, own_generator, tiny_tokenizer

LONG = GROUPED | {"max_position_embeddings": 1024}
OWN = {"figures_are_yours"}  # tests/results/test_recipes.py runs it, on results of every kind
RUN = [page for page in PAGES if blocks(page, "python", "sh") and page.stem not in OWN]


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


@pytest.fixture
def place(tmp_path: Path, made: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own, where ``make figures`` has left results of every kind."""
    for path in made.values():
        to = tmp_path / "runs" / "gallery" / path.name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, to)
        (tmp_path / "runs" / "gallery").mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the name ``demo`` mean a tiny model and random words."""

    def loads(usual: Callable[..., LanguageModel]) -> Callable[..., LanguageModel]:
        def load(model: object = "demo", **options: object) -> LanguageModel:
            return small_demo() if model == "demo" else usual(model, **options)

        return load

    monkeypatch.setattr(demo, "demo_articles", articles)
    for home in (loading, checkpoint):
        monkeypatch.setattr(home, "load_model", loads(home.load_model))


@pytest.fixture
def doors() -> Iterator[None]:
    """Leave no name of a page behind."""
    doors: tuple[Door[Any], ...] = (
        PRUNERS, RULES, ACTIVATION_METHODS, MIXTURE_METHODS, ROUTERS, COLUMNS, MEASURES,
    )  # fmt: skip
    kept = [(door, tuple(door._things)) for door in doors]
    yield
    for door, names in kept:
        for name in set(door._things) - set(names):
            door.remove(name)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_shows_runs_in_order(
    page: Path, place: Path, tiny_demo: None, doors: None
) -> None:
    names: dict[str, Any] = {}
    for language, code in blocks(page, "python", "sh"):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
            plt.close("all")
            continue
        for settings, words in map(with_settings, commands(code)):
            with mock.patch.dict(os.environ, settings):
                assert main(words[1:]) == 0, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_only_shown_can_be_parsed(page: Path) -> None:
    parser = build_parser()
    for _, code in blocks(page, "console"):
        for words in commands(code):
            if words[0] == "entangle" and "|" not in words:
                parser.parse_args(words[1:])


def test_a_recipe_has_ten_lines_at_most() -> None:
    (recipes,) = (page for page in PAGES if page.name == "recipes.md")
    found = blocks(recipes, "python", "sh")
    assert len(found) > 20
    assert [code for _, code in found if len(code.splitlines()) > 10] == []


def test_the_readme_is_short_and_begins_with_what_there_is_to_see() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 250
    screen = "\n".join(lines[:25])
    assert "figures/claims.png" in screen
    assert "make demo" in screen
    assert sum(line.startswith(("make ", "entangle ")) for line in screen.splitlines()) == 3


START = """
import os
from unittest import mock
from entangle.cli.main import main
def _entangle(settings, words):
    with mock.patch.dict(os.environ, settings):
        assert main(words) == 0, words
"""


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_shows_runs_on_the_demo_model(page: Path, place: Path) -> None:
    lines = [START]
    for language, code in blocks(page, "python", "sh"):
        if language == "python":
            lines.append(code)
            continue
        asked = map(with_settings, commands(code))
        lines += [f"_entangle({settings!r}, {words[1:]!r})" for settings, words in asked]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=place, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
