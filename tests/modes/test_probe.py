"""A text of one's own through one neuron."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import entangle
from entangle.cli import probe as command
from entangle.cli.main import main
from entangle.errors import InvalidInput, UnknownName
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.modes.modes import find_modes
from entangle.modes.probe import Probe, _shown, histogram_modes, probe
from entangle.results.scores import NeuronScores
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.words import TokenText, decoded
from tests.tiny_models import CONFIGS, tiny_tokenizer

LAYER = "model.layers.1.mlp.gate_proj"
HOSTILE = '<b>a</b> [bold]x[/bold]\n& "q"'


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], LanguageModel]) -> LanguageModel:
    return replace(tiny("llama"), tokenizer=tiny_tokenizer(adds=True))


@pytest.fixture(scope="module")
def scores(model: LanguageModel, calibration: CalibrationSet) -> NeuronScores:
    return entangle.score(model, calibration, layers=LAYER, progress=False)


def test_outputs_are_those_of_the_model(model: LanguageModel, scores: NeuronScores) -> None:
    found = probe(model, LAYER, 3, "hello", scores=scores, special_tokens="model")
    ids = model.tokenizer("hello")["input_ids"]  # type: ignore[misc]
    seen: list[torch.Tensor] = []
    layer = model.module.get_submodule(LAYER)
    handle = layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0, :, 3]))
    with torch.no_grad():
        model.module(torch.tensor([ids]))
    handle.remove()
    np.testing.assert_allclose(found.frame["output"], seen[0].numpy(), rtol=1e-5, atol=1e-6)
    assert found.frame["token_id"].tolist() == ids
    assert found.frame["token"].tolist() == ["<s>", *"hello", "</s>"]
    assert found.frame["special"].tolist() == [True, *[False] * 5, True]
    row = scores.frame.loc[3]
    expected = (found.frame["output"] - row["mean"]) / row["std"]
    np.testing.assert_allclose(found.frame["sigma"], expected)
    assert found.frame["percentile"].between(0, 100).all()
    assert set(found.frame["mode"].dropna()) <= set(found.modes["mode"])
    assert found.frame["mode"].notna().all()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_any_architecture(tiny: Callable[[str], LanguageModel], name: str) -> None:
    model = replace(tiny(name), tokenizer=tiny_tokenizer())
    layers = find_layers(model.module, "all", None)
    found = probe(model, layers[0], 0, "some text")
    assert len(found.frame) == 9
    assert np.isfinite(found.frame["output"]).all()


def test_without_scores_there_is_no_unit(model: LanguageModel) -> None:
    found = probe(model, LAYER, 0, "hello")
    assert found.frame[["sigma", "percentile", "mode"]].isna().all().all()
    assert np.abs(found.strength).max() == 1.0


def test_special_tokens_are_those_of_the_scores(model: LanguageModel, scores: NeuronScores) -> None:
    text: Any = {**scores.manifest["calibration"], "settings": {"special_tokens": {}}}  # type: ignore[dict-item]
    none = replace(scores, manifest={**scores.manifest, "calibration": text})
    assert not probe(model, LAYER, 0, "ab", scores=none).frame["special"].any()
    assert probe(model, LAYER, 0, "ab").frame["special"].any()


def test_modes_of_a_histogram_are_those_of_the_values() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-4, 0.7, 800), rng.normal(0, 1, 4000)])
    counts, edges = np.histogram(values, 200)
    frame = pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": counts})
    found, exact = histogram_modes(frame), find_modes(values)
    assert found["tokens"].sum() == len(values)
    assert len(found) == len(exact) == 2
    assert found["left"].iloc[1] == pytest.approx(exact["left"].iloc[1], abs=0.2)


def test_given_modes_count(model: LanguageModel, scores: NeuronScores) -> None:
    modes = find_modes(np.array([-1.0, 1.0]))
    modes = pd.concat([modes, modes]).assign(mode=[0, 1], left=[-np.inf, 0.0], right=[0.0, np.inf])
    found = probe(model, LAYER, 1, "hello world", scores=scores, modes=modes)
    assert found.frame["mode"].tolist() == (found.frame["output"] >= 0).astype(int).tolist()
    assert len(set(found.colors)) == found.frame["mode"].nunique()


def test_what_is_refused(model: LanguageModel, scores: NeuronScores, tiny: Any) -> None:
    with pytest.raises(InvalidInput, match="token"):
        probe(model, LAYER, 0, "")
    with pytest.raises(UnknownName, match="nothing"):
        probe(model, LAYER, 0, "x", special_tokens="nothing")
    with pytest.raises(InvalidInput, match="tokens"):
        probe(model, LAYER, 0, "x" * 10_000)
    with pytest.raises(InvalidInput, match=r"0\.\.47"):
        probe(model, LAYER, 48, "x")
    with pytest.raises(UnknownName, match="no_such"):
        probe(model, "no_such", 0, "x")
    with pytest.raises(InvalidInput, match="tokenizer"):
        probe(replace(model, tokenizer=None), LAYER, 0, "x")
    other = replace(tiny("mistral"), tokenizer=tiny_tokenizer())
    with pytest.raises(InvalidInput, match="digest"):
        probe(other, LAYER, 0, "x", scores=scores)
    with pytest.raises(UnknownName):
        probe(model, "model.layers.0.mlp.gate_proj", 0, "x", scores=scores)


def test_nothing_in_a_text_acts_on_the_page(model: LanguageModel, scores: NeuronScores) -> None:
    found = probe(model, LAYER, 0, HOSTILE, scores=scores)
    for page in (found.html(), found._repr_html_()):
        assert "<b>a" not in page
        assert page.count("tabindex=") == len(found.frame)
    assert r"\n" in found._repr_html_()


def run(folder: Path, *more: str) -> int:
    return main(["probe", LAYER, "3", "--model", str(folder), "--text", HOSTILE, *more])


def test_the_command(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tiny_folder("llama")
    page = tmp_path / "page.html"
    assert run(folder, "--json", "--html", str(page)) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["tokens"]) == len(HOSTILE)
    assert page.is_file()
    assert run(folder, "--html", str(page)) == 2
    assert run(folder, "--scores", str(tmp_path / "gone")) == 2
    assert main(["probe", LAYER, "3", "--model", str(folder), "--text", ""]) == 2
    capsys.readouterr()
    assert run(folder) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert plain.count("\n") > len(HOSTILE)
    monkeypatch.setattr(command, "in_colours", lambda: True)
    assert run(folder) == 0
    assert "bold" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_that_are_not_wanted(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "on_terminal", lambda _stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert command.in_colours()
    monkeypatch.setenv(name, value)
    assert not command.in_colours()


def test_a_token_of_a_rare_mode_is_numbered() -> None:
    frame = pd.DataFrame(
        {"position": [0, 1], "token_id": [0, 1], "token": ["[red]", "\x1b[2J"],
         "piece": ["[red]", "\x1b[2J"], "special": False,
         "output": [0.0, 5.0], "sigma": [0.0, 5.0], "percentile": [50.0, 100.0],
         "mode": pd.array([0, 1], dtype="Int64")}
    )  # fmt: skip
    modes = pd.DataFrame(
        {"mode": [0, 1], "left": [-np.inf, 2.0], "right": [2.0, np.inf], "share": [0.9, 0.1]}
    )
    found = Probe("l", 0, frame, modes, 0.0, 1.0, {})
    pieces = command._pieces(found)
    assert [text for text, _style in pieces] == ["[red]", "\x1b[2J", "₁"]
    assert pieces[0][1] == ""
    assert "on #" in pieces[1][1]


def test_tokens_that_share_characters_are_shown_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = {1: b"a", 2: b"\xd7", 3: b"\xa9", 4: b"\xff"}
    words = TokenText(None)
    text = {"token": lambda one: decoded(pieces[one])}
    text["run"] = lambda some: decoded(b"".join(pieces[one] for one in some))
    for name, function in text.items():
        monkeypatch.setattr(words, name, function)
    assert _shown(words, [1, 2, 3, 1]) == ["a", "ש", "", "a"]
    assert _shown(words, [4, 1]) == ["<0xFF>", "a"]
    assert _shown(words, [2]) == ["<0xD7>"]
