import errno
import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from entangle.errors import InvalidInput, Unavailable, UnknownName
from entangle.results import base as base_module
from entangle.results.scores import NeuronScores, load_scores
from entangle.scoring.score import Method
from tests.saved import without_digests

Scored = Callable[[str, Method], NeuronScores]
FILES = ["histograms.safetensors", "layers.parquet", "manifest.json", "scores.parquet",
         "scores.safetensors"]  # fmt: skip
GATE = "model.layers.1.mlp.gate_proj"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def scores(scored: Scored) -> NeuronScores:
    return scored("llama", "exact")


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_what_was_saved_comes_back(scored: Scored, tmp_path: Path, method: Method) -> None:
    scores = scored("llama", method)
    assert scores.save(tmp_path / "run") == tmp_path / "run"
    assert names(tmp_path / "run") == FILES
    assert names(tmp_path) == ["run"]
    loaded = load_scores(tmp_path / "run")
    assert_frame_equal(loaded.frame, scores.frame, check_exact=True)
    assert_frame_equal(loaded.layers, scores.layers, check_exact=True)
    assert loaded.manifest == scores.manifest
    assert loaded.histograms.keys() == scores.histograms.keys()
    for layer in scores.histograms:
        for neuron in (0, 15):
            assert_frame_equal(
                loaded.histogram(layer, neuron), scores.histogram(layer, neuron), check_exact=True
            )


def test_one_vector_a_layer(scores: NeuronScores, tmp_path: Path) -> None:
    scores.save(tmp_path / "run")
    vectors = load_file(tmp_path / "run" / "scores.safetensors")
    assert vectors.keys() == scores.histograms.keys()
    assert vectors[GATE].dtype == np.float64
    assert np.array_equal(vectors[GATE], scores.layer(GATE).frame["wd"])
    with safe_open(tmp_path / "run" / "scores.safetensors", framework="np") as file:
        assert file.metadata() == {"column": "wd"}


def test_the_same_scores_give_the_same_bytes(scores: NeuronScores, tmp_path: Path) -> None:
    for name in ("one", "two"):
        scores.save(tmp_path / name)
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_an_existing_result_needs_force(scores: NeuronScores, tmp_path: Path) -> None:
    scores.save(tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"run'.*--force.*force=True"):
        scores.layer(GATE).save(tmp_path / "run")
    assert len(load_scores(tmp_path / "run").layers) == 7
    scores.layer(GATE).save(tmp_path / "run", force=True)
    assert len(load_scores(tmp_path / "run").layers) == 1
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("file", FILES)
def test_a_disk_that_fills_up_leaves_nothing(
    scores: NeuronScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write = Path.write_bytes

    def write_bytes(path: Path, content: bytes) -> int:
        if path.name == file:
            full()
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    if file.endswith("parquet"):
        monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    if file.endswith("json"):
        monkeypatch.setattr(base_module, "write_json", full)
    with pytest.raises(Unavailable, match=r"run'.*full"):
        scores.save(tmp_path / "run")
    assert names(tmp_path) == []


def test_ctrl_c_while_saving_leaves_nothing(
    scores: NeuronScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base_module, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scores.save(tmp_path / "run")
    assert names(tmp_path) == []


@pytest.mark.parametrize("file", sorted({*FILES} - {"scores.safetensors"}))
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "folder"])
def test_damaged_files_are_named(
    scores: NeuronScores, tmp_path: Path, file: str, damage: str
) -> None:
    path = scores.save(tmp_path / "run") / file
    content = path.read_bytes()
    path.unlink()
    if damage == "empty":
        path.touch()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    if damage == "noise":
        path.write_bytes(b"\x00\xff" * 500)
    if damage == "folder":
        path.mkdir()
    with pytest.raises((InvalidInput, Unavailable)) as caught:
        load_scores(tmp_path / "run")
    missing_manifest = (file, damage) == ("manifest.json", "missing")
    assert (str(tmp_path / "run") if missing_manifest else file) in str(caught.value)


def test_tables_must_have_their_columns(scores: NeuronScores, tmp_path: Path) -> None:
    for file, column in (("scores.parquet", "wd_se"), ("layers.parquet", "split_half")):
        path = without_digests(scores.save(tmp_path / "run", force=True)) / file
        pd.read_parquet(path).drop(columns=column).to_parquet(path)
        with pytest.raises(InvalidInput, match=rf"{file}.*'{column}'"):
            load_scores(tmp_path / "run")


def test_the_files_must_belong_together(scores: NeuronScores, tmp_path: Path) -> None:
    scores.save(tmp_path / "run")
    scores.layer(GATE).save(tmp_path / "other")
    for file in ("scores.parquet", "layers.parquet", "histograms.safetensors"):
        mixed = scores.save(tmp_path / "run", force=True)
        (mixed / file).write_bytes((tmp_path / "other" / file).read_bytes())
        with pytest.raises(InvalidInput, match=rf"run/{file}'"):
            load_scores(mixed)
        with pytest.raises(InvalidInput, match=r"run'.*make"):
            load_scores(without_digests(mixed))


def test_a_manifest_may_list_anything_as_layers(scores: NeuronScores, tmp_path: Path) -> None:
    path = without_digests(scores.save(tmp_path / "run")) / "manifest.json"
    layers: list[object] = [[GATE], {}, None]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"layers": layers}}))
    with pytest.raises(InvalidInput, match="not among the manifest's"):
        load_scores(tmp_path / "run")


@pytest.mark.parametrize("first", ["[]", "{", "{}", '{"a": 0}', None])
def test_histograms_without_their_metadata(
    scores: NeuronScores, tmp_path: Path, first: str | None
) -> None:
    path = without_digests(scores.save(tmp_path / "run")) / "histograms.safetensors"
    save_file(load_file(path), path, None if first is None else {"first_bin": first})
    with pytest.raises(InvalidInput, match=re.escape(str(path.parent))):
        load_scores(tmp_path / "run")


def test_the_top(scores: NeuronScores) -> None:
    top = scores.top(7)
    assert len(top) == 7
    assert top["wd"].is_monotonic_decreasing
    assert top["wd"].iloc[0] == scores.frame["wd"].max()
    assert scores.top(3, by="skewness")["skewness"].tolist() == (
        scores.frame["skewness"].nlargest(3).tolist()
    )
    assert len(scores.top(10**6)) == len(scores.frame)
    assert len(scores.top()) == 20
    assert_frame_equal(scores.frame.loc[top.index], top)


def test_flagged_neurons_are_not_in_the_top_and_ties_keep_their_order(
    scores: NeuronScores,
) -> None:
    frame = scores.frame.copy()
    frame["wd"] = 0.5
    frame.loc[4, "wd"] = np.nan
    changed = replace(scores, frame=frame)
    assert changed.top(5)["neuron"].tolist() == [0, 1, 2, 3, 5]
    assert len(changed.top(10**6)) == len(frame) - 1


def test_what_the_top_refuses(scores: NeuronScores) -> None:
    with pytest.raises(InvalidInput, match=r"`k`.*\b1\b.*\b0\b"):
        scores.top(0)
    for column in ("wdd", "layer"):
        with pytest.raises(UnknownName, match=f"'{column}'"):
            scores.top(3, by=column)


def test_one_layer(scores: NeuronScores) -> None:
    one = scores.layer(GATE)
    assert one.frame["layer"].unique().tolist() == one.layers["layer"].tolist() == [GATE]
    assert one.frame.index.tolist() == list(range(48))
    assert list(one.histograms) == [GATE]
    assert one.manifest is scores.manifest
    with pytest.raises(UnknownName, match="'gate'"):
        scores.layer("gate")
    with pytest.raises(UnknownName, match="'gate'"):
        scores.histogram("gate", 0)


def test_html_for_notebooks(scores: NeuronScores) -> None:
    html = scores._repr_html_()
    assert "<b>Scores of LlamaForCausalLM</b><br>224 neurons in 7 layer(s), 192 tokens of " in html
    assert html.count("<tr") == 11
    assert f"largest {scores.frame['wd'].max():.4g} σ" in html
    assert html.endswith("<p>… and 214 more rows</p></div>")


def test_html_lists_neurons_without_a_score_last(scores: NeuronScores) -> None:
    constant = scores.frame.index >= 3
    frame = scores.frame.assign(
        wd=scores.frame["wd"].mask(constant), flag=np.where(constant, "constant", "")
    )
    html = replace(scores, frame=frame)._repr_html_()
    assert "no score: 221 constant" in html
    assert html.count(">constant<") == 7
    html = replace(scores, frame=frame.assign(wd=np.nan, flag="nan"))._repr_html_()
    assert "WD: median – σ, largest – σ" in html


def test_html_escapes_names(scores: NeuronScores) -> None:
    evil = "<script>alert(1)</script>"
    frame = scores.frame.assign(layer=evil)
    changed = replace(scores, frame=frame, manifest={"model": {"name": evil}})
    html = changed._repr_html_()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 11
    assert "<b>Scores of ?</b>" in replace(scores, manifest={})._repr_html_()


def test_scores_are_frozen(scores: NeuronScores) -> None:
    with pytest.raises(FrozenInstanceError):
        scores.frame = scores.frame  # type: ignore[misc]
