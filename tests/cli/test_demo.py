import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

import entangle
from entangle.cli import demo
from entangle.errors import Unavailable
from entangle.evaluation import EvaluationText
from entangle.models.loading import LanguageModel
from entangle.texts import calibration_set
from entangle.texts.calibration_set import CalibrationSet
from tests.cli.runs import Run, holds

FIGURES = ["top_and_typical", "top_outputs", "wd_against_md", "wd_distribution"]
FILES = [f"{name}.{ending}" for name in FIGURES for ending in ("csv", "pdf", "png", "tex", "txt")]


@pytest.fixture
def tiny_demo(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Callable[[str], LanguageModel],
    calibration: CalibrationSet,
) -> None:
    """A tiny model and random ids in the place of the demo's."""
    monkeypatch.setattr("entangle.models.loading.load_model", lambda _name: tiny("llama"))
    monkeypatch.setattr("entangle.texts.calibration.load_calibration", lambda *_, **__: calibration)
    text = EvaluationText(calibration.ids[:4], "ids", {})
    monkeypatch.setattr("entangle.evaluation.load_evaluation", lambda *_, **__: text)


def check_result(folder: Path, out: str) -> None:
    scores = entangle.load_scores(folder)
    assert scores.layers["layer"].tolist() == [demo.LAYER]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == FILES
    assert all((folder / "figures" / name).stat().st_size > 0 for name in FILES)
    assert "The 10 largest WD" in out
    assert f"Saved to {folder}." in out
    assert out.count("Figure: ") == 5
    address = (folder / demo.PAGE).resolve().as_uri()
    assert out.splitlines()[-1].endswith(f" {address}")
    page = (folder / demo.PAGE).read_text("utf-8")
    assert all(section in page for section in ('"windows":', '"near":', '"arms":', '"modes":'))
    result = entangle.load_ablation(folder / "ablation")
    arms = result.frame[["selection", "seed", "strength"]].drop_duplicates()
    assert len(arms) == 1 + len(demo.STRENGTHS) * (2 + demo.SEEDS)
    figures = sorted(path.name for path in (folder / "ablation" / "figures").iterdir())
    assert figures == [
        f"ablation_perplexity_ratio.{e}" for e in ("csv", "pdf", "png", "tex", "txt")
    ]


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_from_model_to_figures(run: Run, tmp_path: Path) -> None:
    status, out, err = run("demo", "--out", tmp_path / "demo")
    assert status == 0
    check_result(tmp_path / "demo", out)
    assert err.splitlines()[:2] == [
        "entangle: loading the demo model",
        "entangle: reading the demo text",
    ]
    assert plt.get_fignums() == []
    status, out, err = run("demo", "--out", tmp_path / "demo", "--quiet")
    assert (status, out) == (2, "")
    assert holds(err, "exists --force"), err


@pytest.mark.usefixtures("tiny_demo")
def test_an_interrupted_demo_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["entangle.experiments.ablate"], "ablate", interrupt)
    assert run("demo", "--out", tmp_path / "demo").status == 130
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def real_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own model and text, fewer tokens of it."""
    from entangle.models.demo import demo_folder

    try:
        demo_folder()
    except Unavailable as error:
        pytest.skip(f"the demo files cannot be had: {error}")
    monkeypatch.setattr(calibration_set, "N_SEQ", 2)
    monkeypatch.setattr(calibration_set, "SEQ_LEN", 256)
    monkeypatch.setattr(demo, "EVAL_SEQ_LEN", 64)
    monkeypatch.setattr(demo, "EVAL_WINDOWS", 2)
    monkeypatch.setattr(demo, "SEEDS", 1)
    monkeypatch.setattr(demo, "ABLATED", demo.LAYER)


@pytest.mark.demo
@pytest.mark.usefixtures("real_demo")
def test_the_real_demo(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("demo", "--out", tmp_path / "demo")
    assert status == 0
    check_result(tmp_path / "demo", out)
    frame = entangle.load_scores(tmp_path / "demo").frame
    assert len(frame) == 1536
    assert 0.05 < frame["wd"].median() < 0.09
    assert 0.3 < frame["wd"].max() < 0.5
    assert (frame["flag"] == "").all()
