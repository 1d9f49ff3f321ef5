"""Pages that are made from the code, and the check of the built site."""

import argparse
import html
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.hooks import alternatives, broken, commands, notebook, reference
from entangle.cli.main import build_parser
from tests.docs.pages import ROOT

FULL = """<h1 id="top">A</h1><a href="b.html#here">b</a><a href="https://x.org/y">x</a>
<img src="p.png" alt="a picture"><a href="#top">up</a>"""


def site(folder: Path, page: str) -> Path:
    (folder / "a.html").write_text(page)
    (folder / "b.html").write_text('<h2 id="here">B</h2>')
    (folder / "p.png").write_bytes(b"")
    return folder


def test_a_whole_site_is_fine(tmp_path: Path) -> None:
    assert broken(site(tmp_path, FULL)) == ([], ["https://x.org/y"])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("b.html#here", "c.html", "'c.html' leads nowhere"),
        ("b.html#here", "b.html#there", "'b.html#there' has no such anchor"),
        ("#top", "#bottom", "'#bottom' has no such anchor"),
        ('alt="a picture"', "", "'p.png' has no words"),
        ("p.png", "q.png", "'q.png' leads nowhere"),
        ("p.png", "https://x.org/p.png", "is fetched from elsewhere"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    (line,), _ = broken(site(tmp_path, FULL.replace(f'"{old}"', f'"{new}"').replace(old, new)))
    assert line.startswith("a.html: ")
    assert told in line


def test_every_command_and_option_is_on_the_page_of_commands() -> None:
    page = commands()
    found = next(
        one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)
    )
    for name, parser in found.choices.items():
        part = page.split(f"\n## entangle {name}\n")[1].split("\n## ")[0]
        for action in parser._actions:
            if action.help is not argparse.SUPPRESS:
                shown = action.option_strings or [str(action.metavar or action.dest.upper())]
                assert all(re.search(rf"[`{{ ]{re.escape(one)}\b", part) for one in shown), shown


def test_every_public_name_is_referred_to() -> None:
    import entangle
    from entangle import plotting

    pages = reference()
    for page, names in (("api.md", entangle.__all__), ("plotting.md", plotting.__all__)):
        named = set(re.findall(r"^::: [\w.]+\.(\w+)$", pages[page], re.MULTILINE))
        assert named == set(names) - {"__version__"}
    for module in re.findall(r"^::: ([\w.]+)$", pages["rooms.md"], re.MULTILINE):
        assert importlib.util.find_spec(module) is not None, module


def test_every_figure_has_words_and_code() -> None:
    words = alternatives()
    assert set(words) == {path.stem for path in (ROOT / "figures").glob("*.png")}
    assert all(len(said) > 30 for said in words.values())


def test_notebooks_show_pictures_with_words() -> None:
    words = alternatives()
    pages = [notebook(path, words) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    shown = [re.findall(r"!\[(.*?)\]\(\.\./figures/(\w+)\.png\)", page) for page in pages]
    assert [len(found) for found in shown] >= [4, 1, 5, 1, 10]
    assert all(words[name] == said for found in shown for said, name in found)
    assert ".ipynb)" not in "".join(pages)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocstrings_handlers") is None:
        pytest.skip("the site needs the extra docs, which make docs installs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measures = (tmp_path / "measures.html").read_text("utf-8")
    assert html.unescape(measures).count("<math") > 30
    assert "arithmatex" not in measures
    assert "entangle.scoring.score.score" in (tmp_path / "api.html").read_text("utf-8")
    shutil.rmtree(tmp_path)
