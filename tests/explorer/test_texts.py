"""Views that look into texts, the warning that a text is another one, and what is taken along."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import entangle
from entangle.errors import InvalidInput, UnknownName
from entangle.explorer import Explorer, explore
from entangle.explorer.export import link
from entangle.explorer.texts import SeenText, other_text
from entangle.models.loading import LanguageModel
from entangle.results.decomposition import Decomposition
from entangle.results.scores import NeuronScores
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import tiny_tokenizer

GATE = "model.layers.1.mlp.gate_proj"


@pytest.fixture
def worded(llama: LanguageModel) -> LanguageModel:
    return replace(llama, tokenizer=tiny_tokenizer())


def pane(explorer: Explorer, tab: str) -> Any:
    """Return a view after a click on its tab."""
    board = explorer._board
    board.tabs.selected_index = list(board.tabs.titles).index(tab)
    return board.panes[board.tabs.selected_index]


@pytest.mark.parametrize("tab", ["Pairs", "Search", "Own text"])
def test_scores_alone_say_what_is_needed(scores: NeuronScores, tab: str) -> None:
    view = pane(explore(scores), tab)
    assert "entangle.explore" in view.html.value
    assert view.button.layout.display == "none"


def test_a_search_finds_every_token(
    scores: NeuronScores, worded: LanguageModel, calibration: CalibrationSet
) -> None:
    explorer = explore(scores, calibration, model=worded)
    view = pane(explorer, "Search")
    assert view.button.description == "Search"
    view.entry.value = "A"  # answered at Enter
    ids = worded.tokenizer.convert_tokens_to_ids(["a", "A"])  # type: ignore[union-attr]
    count = int(np.isin(calibration.ids.numpy(), ids).sum())
    assert f"<p>{count:,} of {calibration.n_tokens:,} tokens hold" in view.html.value
    assert "<mark>" in view.html.value
    explorer._board.neurons.lines.index = 4  # no second pass, asked or not
    assert f"<p>{count:,} of" in view.html.value
    view.entry.value = "<img src=x>"
    assert "<img src=x" not in view.html.value
    assert "No token" in view.html.value


def test_a_search_without_a_model_looks_at_the_modes_known(
    scores: NeuronScores, decomposition: Decomposition
) -> None:
    explorer = explore(scores, decomposition=decomposition)
    view = pane(explorer, "Search")
    view.entry.value = "1"
    assert "Modes with it" in view.html.value
    view.entry.value = "no such token"
    assert "No mode" in view.html.value


def test_pairs_of_a_decomposition_and_of_the_text(
    scores: NeuronScores, worded: LanguageModel, calibration: CalibrationSet,
    decomposition: Decomposition,
) -> None:  # fmt: skip
    explorer = explore(scores, decomposition=decomposition)
    view = pane(explorer, "Pairs")
    explorer.open(GATE, 3)
    known = decomposition.separated
    count = int(((known["layer"] == GATE) & (known["neuron"] == 3)).sum())
    assert view.html.value.count("entangle-mode") == count > 0

    asked = explore(scores, calibration, model=worded)
    view = pane(asked, "Pairs")
    assert view.button.description.startswith("Find pairs")
    view.button.click()
    assert view.html.value.count("<mark>") % 2 == 0
    assert view.button.layout.display == "none"


def test_a_text_of_ones_own(
    scores: NeuronScores, worded: LanguageModel, calibration: CalibrationSet
) -> None:
    view = pane(explore(scores, calibration, model=worded), "Own text")
    view.button.click()
    assert view.html.value == ""
    view.entry.value = "<b>"
    view.button.click()
    assert view.html.value.count("tabindex=") == 3
    assert "<b>model" in view.html.value
    assert "σ" in view.html.value
    view.entry.value = "x" * 5000
    view.button.click()
    assert "shorten it" in view.html.value
    assert view.button.layout.display is None


def test_a_view_of_another_text_says_so(
    scores: NeuronScores, llama: LanguageModel, decomposition: Decomposition,
    calibration: CalibrationSet,
) -> None:  # fmt: skip
    same = explore(scores, decomposition=decomposition)
    same.open(GATE, 3)
    for tab in ("Experts", "Modes", "Pairs"):
        assert pane(same, tab).note.value == "", tab
    text = CalibrationSet(calibration.ids[:6], "another <i>", {"seed": 8})
    other = entangle.decompose(
        llama, text, layers=GATE, neurons=[3], experts=(1, 2), contexts=2, progress=False
    )
    explorer = explore(scores, decomposition=other)
    explorer.open(GATE, 3)
    for tab in ("Experts", "Modes", "Pairs"):
        note = pane(explorer, tab).note.value
        assert "entangle-warning" in note, tab
        assert "another &lt;i&gt;, seed 8" in note, tab
    ours, theirs = (
        float(one[(one["layer"] == GATE) & (one["neuron"] == 3)]["wd"].iloc[0])
        for one in (scores.frame, other.neurons)
    )
    note = pane(explorer, "Experts").note.value
    assert f"{ours:.4g}" in note
    assert f"{theirs:.4g}" in note
    assert pane(explorer, "Distribution").note.value == ""


def test_a_text_that_is_not_known_is_not_warned_of(scores: NeuronScores) -> None:
    assert other_text(scores, None, wd=(0.1, 0.2)) == ""
    own = SeenText.of(scores.manifest["calibration"])
    assert other_text(scores, own, wd=(0.1, 0.2)) == ""


def test_a_neuron_is_exported(
    scores: NeuronScores, decomposition: Decomposition, tmp_path: Path
) -> None:
    explorer = explore(scores, decomposition=decomposition)
    page = explorer.export(tmp_path / "n.html", layer=GATE, neuron=3).read_text("utf-8")
    for words in (
        f"{GATE} · neuron 3",
        "<h2>Distribution</h2>",
        "<h2>Modes</h2>",
        "<h2>Pairs</h2>",
    ):
        assert words in page
    assert 'src="data:image/png' in page
    assert "http" not in page
    picture = explorer.export(tmp_path / "n.png", layer=GATE, neuron=3, tab="Layer")
    assert picture.read_bytes().startswith(b"\x89PNG")
    for path, options, error in (
        ("n.png", {}, InvalidInput), ("n.pdf", {}, UnknownName),
        ("m.png", {"tab": "Search"}, UnknownName), ("m.png", {"tab": "Pairs"}, InvalidInput),
        ("m.png", {"neuron": 4711}, InvalidInput), ("m.png", {"layer": "nope"}, UnknownName),
    ):  # fmt: skip
        with pytest.raises(error):
            explorer.export(tmp_path / path, **options)
    explorer.export(tmp_path / "n.png", force=True)


def test_the_buttons_give_a_link(scores: NeuronScores) -> None:
    board = explore(scores)._board
    for button, kind in zip(board.exports, ("text/html", "image/png"), strict=True):
        button.click()
        assert f'href="data:{kind};base64,' in board.link.value
    board.neurons.lines.index = 2
    assert board.link.value == ""
    assert "<script" not in link('"><script>.html', b"x")
