"""A trace of tiny checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import entangle
from entangle.cli.main import main
from entangle.errors import InvalidInput
from entangle.results.study import Trace
from entangle.seeding import torch_rng
from entangle.studies.trace import revisions_of, step_of
from tests.tiny_models import TINY, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a model: far from the last one, near, and the last one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step, scale in ((1, 1.0), (20, 0.01), (100, 0.0)):
        model = TINY["llama"]()
        assert isinstance(model, PreTrainedModel)
        rng = torch_rng(0, "checkpoint", str(step))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=rng), alpha=scale)
        model.save_pretrained(folder / f"step{step}")
        tiny_tokenizer().save_pretrained(folder / f"step{step}")
    return folder


def test_checkpoints_are_followed(checkpoints: Path, text_file: Path, tmp_path: Path) -> None:
    text = (
        "--calibration", text_file, "--n-seq", 6, "--seq-len", 48, "--evaluation", text_file,
        "--eval-seq-len", 32, "--eval-windows", 4, "--seeds", 1, "--quiet",
    )  # fmt: skip
    out = tmp_path / "t"
    assert main(["trace", str(checkpoints), *map(str, text), "--out", str(out)]) == 0
    found = entangle.load_result(out)
    assert isinstance(found, Trace)
    assert found.frame["revision"].tolist() == ["step1", "step20", "step100"]
    assert found.frame["step"].tolist() == [1, 20, 100]
    overlap = found.frame["overlap"].to_numpy()
    assert overlap[2] == 1.0
    assert overlap[0] < overlap[1]
    assert found.frame["chance"].to_numpy() == pytest.approx(1 / 48)  # one top row of a layer
    for row in found.frame.itertuples():
        place = next(
            one for one in (tmp_path / "t-runs").glob("*/damage")
            if entangle.load_ablation(one).manifest["model"]["name"].endswith(str(row.revision))  # type: ignore[index]
        )  # fmt: skip
        ablation = entangle.load_ablation(place)
        contrast = ablation.contrasts().iloc[-1]
        assert row.ratio == pytest.approx(contrast["ratio"])
        dense = ablation.frame[ablation.frame["measure"] == "perplexity"].iloc[0]["value"]
        assert row.perplexity == pytest.approx(dense)
        scores = entangle.load_scores(place.parent / "scores")
        wide = scores.frame[scores.frame["projection"] != "down_proj"]
        assert row.wd_largest == pytest.approx(wide["wd"].max())
        medians = wide.groupby("layer")["wd"].median()
        assert row.wd_median == pytest.approx(float(np.median(medians)))
    assert (out / "figures" / "trace.png").is_file()
    assert len(found.layers) == 3 * 6
    again = ["trace", str(checkpoints), *map(str, text), "--out", str(out), "--resume"]
    before = (out / "manifest.json").read_bytes()
    assert main(again) == 0
    assert (out / "manifest.json").read_bytes() == before
    assert main([*again, "--seed", "1"]) == 2


def test_folders_without_a_number_come_last(tmp_path: Path) -> None:
    for name in ("step10", "final", "step2", "best", "step1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    found = [Path(one).name for one in revisions_of([str(tmp_path)])]
    assert found == ["step1", "step2", "step10", "best", "final"]


def test_equal_revisions_of_two_names(tiny_folder: Callable[[str], Path], text_file: Path,
                                      tmp_path: Path) -> None:  # fmt: skip
    for name in ("step1", "final"):
        shutil.copytree(tiny_folder("llama"), tmp_path / "c" / name)
    text = ("--calibration", text_file, "--n-seq", 4, "--seq-len", 32, "--evaluation", text_file,
            "--eval-seq-len", 32, "--eval-windows", 2, "--seeds", 1, "--quiet")  # fmt: skip
    out = tmp_path / "t"
    assert main(["trace", str(tmp_path / "c"), *map(str, text), "--out", str(out)]) == 0
    frame = Trace.load(out).frame
    assert frame["overlap"].tolist() == [1.0, 1.0]
    assert frame["damage"].nunique() == 1


def test_the_series(checkpoints: Path) -> None:
    names = revisions_of([str(checkpoints)])
    assert [Path(one).name for one in names] == ["step1", "step20", "step100"]
    assert revisions_of([str(checkpoints)], ["step20", "step1"]) == [names[1], names[0]]
    assert revisions_of(["org/m"], ["step1", "step10"]) == ["org/m@step1", "org/m@step10"]
    assert revisions_of(["a", "b"]) == ["a", "b"]
    assert [step_of(one) for one in ("org/m-2@step10", "x/ck-7", "a3/b")][:2] == [10, 7]
    assert np.isnan(step_of("a3/b"))
    for models, revisions, said in (
        (["org/m"], (), "org/m"), ([str(checkpoints)], ["step7"], "step7"),
        (["a", "b"], ["step1"], "revisions"), (["org/m"], ["step1"], "two"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=said):
            revisions_of(models, revisions)


def test_revisions_of_another_shape_are_refused(
    tiny_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    fewer, wider = tmp_path / "fewer", tmp_path / "wider"
    for folder, more in ((fewer, {"num_hidden_layers": 2}), (wider, {"intermediate_size": 64})):
        settings = TINY["llama"]().config.to_dict() | more  # type: ignore[union-attr, operator]
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    text = ("--calibration", text_file, "--evaluation", text_file, "--n-seq", 4, "--seq-len", 32,
            "--eval-seq-len", 32, "--eval-windows", 2, "--seeds", 1, "--quiet")  # fmt: skip
    for first in (tiny_folder("gpt2"), fewer, wider):
        models = [str(first), str(tiny_folder("llama"))]
        out = tmp_path / f"t-{first.name}"
        assert main(["trace", *models, *map(str, text), "--out", str(out)]) == 2
        assert not out.exists()
