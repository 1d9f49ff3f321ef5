"""`entangle experts`: what is printed and kept, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import entangle
from entangle.cli.main import main
from tests.mixtures import mixture, text, with_super
from tests.tiny_models import TINY

IDS = text(4, 24)


def test_the_command_prints_and_keeps_them(
    tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_super().save_pretrained(tmp_path / "model")
    entangle.load_calibration(IDS).save(tmp_path / "ids.safetensors")
    given = ["experts", str(tmp_path / "model"), "--calibration", str(tmp_path / "ids.safetensors")]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["experts"]) == 12
    assert {"reap", "mone", "peak", "super"} <= set(found["experts"][0])
    (kept,) = (own_home / "runs").iterdir()
    assert main(["show", str(kept), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "experts"
    assert main([*given, "--table", "experts"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("model.layers.") == 12
    assert f"read from {kept}" in printed.err
    assert len(list((own_home / "runs").iterdir())) == 1  # read from there
    TINY["llama"]().save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    assert main([given[0], str(tmp_path / "plain"), *given[2:]]) == 2


def test_scores_of_experts_tell_how_many_tokens_they_saw_and_a_page_reads_them(
    tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tmp_path / "model")
    module: Any = mixture("Mixtral")
    module.save_pretrained(model)
    entangle.load_calibration(text(8, 32)).save(tmp_path / "ids.safetensors")
    calibration = ["--calibration", str(tmp_path / "ids.safetensors")]
    given = ["score", model, "--proj", "experts", "--min-tokens", "2", *calibration]
    assert main([*given, "--out", str(tmp_path / "scores")]) == 0
    counts = entangle.load_scores(tmp_path / "scores").layers["n_tokens"]
    assert counts.min() < counts.max()
    title = capsys.readouterr().out.splitlines()[0]
    assert f" {counts.min()} to {counts.max()} tokens" in title
    page = ["report", str(tmp_path / "scores"), "--model", model, *calibration]
    assert main([*page, "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr()
    assert "Nothing was read" not in said.out + said.err


def test_scores_of_another_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = with_super()
    module.save_pretrained(tmp_path / "model")
    ids = tmp_path / "ids.safetensors"
    entangle.load_calibration(IDS).save(ids)
    scored = entangle.score(
        entangle.load_model(tmp_path / "model"), IDS, layers=1, proj="experts", min_tokens=8,
        progress=False,
    )  # fmt: skip
    scored.save(tmp_path / "scores")
    given = ["--calibration", str(ids), "--scores", str(tmp_path / "scores"), "--quiet", "--json"]
    assert main(["experts", str(tmp_path / "model"), *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "overlap" in found
    known = found["manifest"]["settings"]["scores"]["calibration"]
    assert known["digest"] == found["manifest"]["calibration"]["digest"]
    module.model.layers[1].mlp.experts.down_proj[0] *= 2
    module.save_pretrained(tmp_path / "other")
    assert main(["experts", str(tmp_path / "other"), *given]) == 2
    assert "digest" in capsys.readouterr().err


def test_scores_without_experts_are_refused_before_the_text_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_super().save_pretrained(tmp_path / "model")
    scored = entangle.score(
        entangle.load_model(tmp_path / "model"), IDS, layers=1, proj="q_proj", progress=False
    )
    scored.save(tmp_path / "scores")
    entangle.load_calibration(IDS).save(tmp_path / "ids.safetensors")

    def never(*_given: object) -> None:
        raise AssertionError

    monkeypatch.setattr("entangle.mixtures.gather", never)
    given = ["--calibration", str(tmp_path / "ids.safetensors"), "--quiet"]
    command = ["experts", str(tmp_path / "model"), "--scores", str(tmp_path / "scores"), *given]
    assert main(command) == 2
    assert "--proj experts" in capsys.readouterr().err


def test_mixtures_are_pruned_into_a_folder(
    tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture("Qwen3Moe").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    entangle.load_calibration(IDS).save(tmp_path / "ids.safetensors")
    given = [
        "prune", str(tmp_path / "model"), "--calibration", str(tmp_path / "ids.safetensors"),
        "--method", "ean", "--sparsity", "0.5",
    ]  # fmt: skip
    assert main([*given, "--evaluation", str(tmp_path / "ids.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["experts"] for one in found["layers"]] == [2, 2, 2]
    assert [one["model"] for one in found["model"]] == ["dense", "pruned"]
    (kept,) = (own_home / "runs").iterdir()
    written: Any = entangle.load_model(kept).module
    assert written.config.num_experts == 2
    assert main(["show", str(kept), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "pruning"
    assert main([*given, "--evaluation", str(tmp_path / "ids.safetensors")]) == 0
    printed = capsys.readouterr()
    assert f"read from {kept}" in printed.err
    assert "experts_before" in printed.out
    for wrong in (["--pattern", "2:4"], ["--layer", "0"], ["--dry-run"]):
        assert main([*given, *wrong]) == 2
        assert "--method" in capsys.readouterr().err
    assert main([*given[:-2], "--out", str(tmp_path / "no")]) == 2
    assert "--sparsity" in capsys.readouterr().err
    assert main([*given[:-3], "mone", "--sparsity", "0.25", "--out", str(tmp_path / "no")]) == 2
    assert "constants" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
