import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import entangle
from entangle.errors import InvalidInput, Unavailable, UnknownName
from entangle.explorer import Explorer, explore
from entangle.models.loading import LanguageModel
from entangle.modes.decompose import decompose
from entangle.results.decomposition import Decomposition
from entangle.results.scores import NeuronScores
from entangle.texts.calibration_set import CalibrationSet

GATE, DOWN = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"
VIEW = "application/vnd.jupyter.widget-view+json"
PNG = b"\x89PNG"
TABS = ["Distribution", "Experts", "Modes", "Pairs", "Search", "Own text", "Layer"]


def pane(explorer: Explorer, tab: str) -> Any:
    """Return a view after a click on its tab."""
    board = explorer._board
    board.tabs.selected_index = TABS.index(tab)
    return board.panes[TABS.index(tab)]


def shown(view: Any) -> list[bytes]:
    return [bytes(one.value) for one in view.pictures if one.layout.display is None]


def test_scores_alone(scores: NeuronScores) -> None:
    explorer = entangle.explore(scores)
    explorer.widget()
    assert (explorer.layer, explorer.neuron) == (
        GATE,
        int(scores.layer(GATE).top(1)["neuron"].iloc[0]),
    )
    board = explorer._board
    assert list(board.tabs.titles) == TABS
    assert f"<b>{GATE} · neuron {explorer.neuron}</b>" in board.name.value
    assert "rank 1 of 48" in board.name.value
    (first,) = shown(pane(explorer, "Distribution"))
    assert first.startswith(PNG)
    board.neurons.lines.index = 5
    (second,) = shown(pane(explorer, "Distribution"))
    assert first != second
    (place,) = shown(pane(explorer, "Layer"))
    assert place.startswith(PNG)
    for tab, words in (("Experts", "Experts need a decomposition"), ("Modes", "Modes need")):
        view = pane(explorer, tab)
        assert words in view.html.value
        assert shown(view) == []
        assert view.button.layout.display == "none"


def test_a_saved_folder(scores: NeuronScores, tmp_path: Path) -> None:
    folder = scores.save(tmp_path / "scores")
    for source in (folder, str(folder)):
        assert explore(source).scores.frame.equals(scores.frame)


def test_a_neuron_is_opened_by_name(scores: NeuronScores) -> None:
    explorer = explore(scores, by="md")
    explorer.open(DOWN, 7)
    assert (explorer.layer, explorer.neuron) == (DOWN, 7)
    explorer.open("lm_head")
    assert explorer._board.block.value == "outside the blocks"
    with pytest.raises(UnknownName, match="'nope'"):
        explorer.open("nope")
    with pytest.raises(InvalidInput, match="4711"):
        explorer.open(DOWN, 4711)
    assert explorer.layer == "lm_head"


def test_modes_and_experts_on_demand(
    scores: NeuronScores, llama: LanguageModel, calibration: CalibrationSet
) -> None:
    explorer = explore(scores, calibration, model=llama, experts=(1, 2), sparsity=0.5)
    explorer.widget()
    modes = pane(explorer, "Modes")
    assert modes.button.description.startswith("Find modes: run the model over 12 × 16 tokens")
    modes.button.click()
    assert "<b>Mode 0</b>" in modes.html.value
    assert len(shown(modes)) == 1
    explorer._board.neurons.lines.index = 3  # no second pass over the text
    assert "<b>Mode 0</b>" in modes.html.value
    assert modes.button.layout.display == "none"

    experts = pane(explorer, "Experts")
    assert experts.button.description == "Fit 1, 2 experts with 50 % zeros to this layer"
    assert shown(experts) == []
    experts.button.click()
    assert len(shown(experts)) == 2
    assert experts.html.value.count("<tr>") == 3
    explorer._board.neurons.lines.index = 0  # among those whose outputs were kept
    assert len(shown(experts)) == 2
    explorer._board.neurons.lines.index = 40  # not among them
    assert shown(experts) == []
    assert experts.html.value.count("<tr>") == 3
    assert experts.button.layout.display is None


def test_modes_are_those_of_neuron_modes(
    scores: NeuronScores, llama: LanguageModel, calibration: CalibrationSet
) -> None:
    from entangle.modes import neuron_modes

    explorer = explore(scores, calibration, model=llama, seed=3, memory=2**20)
    for layer, neuron in ((GATE, 4), (DOWN, 2), (GATE, 5)):
        found = explorer._modes.find(layer, neuron)
        expected = neuron_modes(llama, calibration, layer, [neuron], seed=3, progress=False)
        assert found.modes.equals(expected.modes)
        assert found.contexts.equals(expected.contexts)
        outputs = expected.outputs[neuron].astype(np.float64)
        assert found.mean == pytest.approx(outputs.mean())
        assert found.std == pytest.approx(outputs.std())
        assert found.histogram["count"].sum() == len(outputs)


def test_modes_come_with_the_outputs_that_they_are_of(
    scores: NeuronScores, llama: LanguageModel, calibration: CalibrationSet
) -> None:
    """Not with those of the scores, which may be of another text."""
    half = CalibrationSet(calibration.ids[:6], "half of it", {})
    mine = decompose(
        llama, half, layers=GATE, neurons=[3, 5], experts=(1,), contexts=1, separated=0
    )
    for neuron in (3, 5):
        of_table = explore(scores, decomposition=mine)._modes.known(GATE, neuron)
        of_model = explore(scores, half, model=llama)._modes.find(GATE, neuron)
        assert of_table is not None
        for found in (of_table, of_model):
            assert found.histogram["count"].sum() == found.modes["tokens"].sum() == 6 * 16
        assert of_table.mean == pytest.approx(of_model.mean)
        assert of_table.std == pytest.approx(of_model.std)


def test_a_decomposition_is_shown_at_once(
    scores: NeuronScores, decomposition: Decomposition, tmp_path: Path
) -> None:
    for given in (decomposition, decomposition.save(tmp_path / "decomposition")):
        explorer = explore(scores, decomposition=given)
        explorer.open(GATE, 3)
        assert len(shown(pane(explorer, "Experts"))) == 2
        modes = pane(explorer, "Modes")
        assert "<b>Mode 0</b>" in modes.html.value
        explorer.open(GATE, 7)
        assert "Modes need" in modes.html.value
        experts = pane(explorer, "Experts")
        assert shown(experts) == []
        assert experts.html.value.count("<tr>") == 3
        explorer.open(DOWN, 0)
        assert "Experts need" in experts.html.value


def test_constant_and_nan_neurons(
    flawed: NeuronScores, llama: LanguageModel, calibration: CalibrationSet
) -> None:
    explorer = explore(flawed, calibration, model=llama)
    for neuron, flag in ((0, "constant"), (1, "nan")):
        explorer.open(GATE, neuron)
        assert f"<b>{flag}</b>" in explorer._board.name.value
        assert "no rank" in explorer._board.name.value
        distribution = pane(explorer, "Distribution")
        assert shown(distribution) == []
        assert "has no distribution to draw" in distribution.html.value
        assert len(shown(pane(explorer, "Layer"))) == 1
        modes = pane(explorer, "Modes")
        if modes.button.layout.display is None:
            modes.button.click()
        assert "<b>Mode 0</b>" in modes.html.value


def test_scores_that_are_all_nan(scores: NeuronScores) -> None:
    frame = scores.frame.assign(wd=np.nan, flag="nan")
    explorer = explore(replace(scores, frame=frame))
    explorer.widget()
    assert explorer.neuron == 0
    view = pane(explorer, "Layer")
    assert shown(view) == []
    assert "at least 2 neurons with finite wd" in view.html.value
    assert "at least 2 neurons" in explorer._repr_html_()


def test_one_neuron(scores: NeuronScores) -> None:
    explorer = explore(replace(scores, frame=scores.frame[scores.frame["neuron"] == 0]))
    explorer.widget()
    assert explorer._board.neurons.count.value == "of 1, listed 1–1"
    assert len(shown(pane(explorer, "Distribution"))) == 1
    assert "<table" in explorer._repr_html_()


def test_names_are_escaped(scores: NeuronScores) -> None:
    evil = "model.layers.1.<script>alert(1)</script>\n"
    renamed = NeuronScores(
        frame=scores.layer(GATE).frame.assign(layer=evil),
        layers=scores.layer(GATE).layers.assign(layer=evil),
        histograms={evil: scores.histograms[GATE]},
        manifest={"model": {"name": evil}},
    )
    explorer = explore(renamed)
    explorer.widget()
    board = explorer._board
    assert explorer.layer == evil
    for source in (board.name.value, explorer._repr_html_()):
        assert "<script" not in source
        assert "&lt;script&gt;" in source
    assert board.projection.options == (r"<script>alert(1)</script>\n",)


def odd_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are hard to show."""
    pieces = ["<b>", "&amp;", "\x1b[0m", "日本語", "مرحبا", "\u202e", "</bdi>", "\n", '"']
    vocabulary = {f"{pieces[i % len(pieces)]}{i}": i for i in range(112)}
    made: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = made(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<b>0"))
    )
    return tokenizer


def test_tokens_are_escaped(
    scores: NeuronScores, llama: LanguageModel, calibration: CalibrationSet
) -> None:
    odd = replace(llama, tokenizer=odd_tokenizer())
    explorer = explore(scores, calibration, model=odd)
    explorer.widget()
    view = pane(explorer, "Modes")
    view.button.click()
    html = view.html.value
    html.encode()
    assert html.count("<bdi>") == html.count("</bdi>") > 10
    assert "<b><" not in html
    for part in ("&lt;b&gt;", "日本語", "مرحبا", "&lt;/bdi&gt;", "&amp;amp;", "\\u202e", "\\n"):
        assert part in html, part
    assert not {"\x1b", "\u202e", "\n"} & set(html)


def test_bad_arguments(
    scores: NeuronScores,
    llama: LanguageModel,
    calibration: CalibrationSet,
    decomposition: Decomposition,
) -> None:
    with pytest.raises(InvalidInput, match=r"`model`.*with `calibration`"):
        explore(scores, model=llama)
    with pytest.raises(InvalidInput, match=r"`calibration`.*with `model`"):
        explore(scores, calibration)
    with pytest.raises(InvalidInput, match=r"`model`.*`source`.*got both"):
        explore(llama, calibration, model=llama)
    with pytest.raises(UnknownName, match="'size'"):
        explore(scores, by="size")
    other = replace(decomposition, manifest={"model": {"digest": "f" * 64}})
    with pytest.raises(InvalidInput, match=r"ffffffffffff"):
        explore(scores, decomposition=other)
    empty = replace(scores, frame=scores.frame.head(0), layers=scores.layers.head(0))
    with pytest.raises(InvalidInput, match=r"`scores`.*got none"):
        explore(empty)


def test_a_model_is_scored(llama: LanguageModel, calibration: CalibrationSet) -> None:
    explorer = explore(llama, calibration, layers=1, proj="up_proj", progress=False)
    assert list(explorer.scores.histograms) == ["model.layers.1.mlp.up_proj"]
    assert explorer._modes.subject is not None


def test_pictures_are_shown_at_one_size_of_text() -> None:
    from matplotlib.figure import Figure

    from entangle.explorer.evidence import image, picture, shown_width

    narrow, wide = (picture(Figure(figsize=(inches, 1.0))) for inches in (2.0, 4.0))
    assert (shown_width(narrow), shown_width(wide)) == (230, 460)
    assert 'style="width: 230px; max-width: 100%"' in image(narrow)


def kernel(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    parent = {"header": {"msg_id": message}}
    shell = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda _channel: parent))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_shown_in_a_page(scores: NeuronScores, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = explore(scores)
    kernel(monkeypatch, "3f0c4c3e-8f1e-4b3a-9b1e-5f0e6b6d7c11")
    bundle: Any = explorer._repr_mimebundle_(include=None, exclude=None)
    assert bundle[VIEW]["model_id"] == explorer._board.box.model_id
    assert "<table" in bundle["text/html"]
    assert "data:image/png;base64," in bundle["text/html"]


@pytest.mark.parametrize("widgets", [None, False, True])
def test_static_where_nothing_can_be_clicked(
    scores: NeuronScores, monkeypatch: pytest.MonkeyPatch, widgets: bool | None
) -> None:
    explorer = explore(scores, widgets=widgets)
    assert (VIEW in explorer._repr_mimebundle_()) is bool(widgets)  # no kernel
    kernel(monkeypatch, "3f0c4c3e-8f1e4b3a_12345_7")  # sent by nbclient
    assert (VIEW in explorer._repr_mimebundle_()) is bool(widgets)
    assert set(explorer._repr_mimebundle_()) >= {"text/plain", "text/html"}


def test_without_ipywidgets(scores: NeuronScores, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = explore(scores)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    kernel(monkeypatch, "3f0c4c3e-8f1e-4b3a-9b1e-5f0e6b6d7c11")
    assert set(explorer._repr_mimebundle_()) == {"text/plain", "text/html"}
    assert "192 neurons in 3 layer(s)" in repr(explorer)
    with pytest.raises(Unavailable, match="pip install ipywidgets"):
        explorer.widget()
