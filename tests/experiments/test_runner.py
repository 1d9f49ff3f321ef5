"""Steps of a search for matched controls are arms: counted, kept, and read again."""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from entangle.errors import InvalidInput
from entangle.evaluation import EvaluationText, load_evaluation
from entangle.experiments.ablate import Ablation, ablate
from entangle.experiments.arms import MOST_STEPS, STEPS
from entangle.experiments.experiment import Evaluation
from entangle.experiments.selection import select
from entangle.models.loading import LanguageModel
from entangle.runs.progress import Progress
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet

Tiny = Callable[[str], LanguageModel]
MATCH: dict[str, Any] = {
    "fraction": 0.1, "strengths": (0.9, 1.0), "selections": ("top", "bottom"), "md": False,
    "match": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    ids = torch.randint(4, 112, (5, 12), generator=torch_rng(1, "evaluation tokens"))
    return load_evaluation(ids)


class _Bars(Progress):
    """Stands for the progress bars of a sweep; remembers how far they came."""

    def __init__(self) -> None:
        self.counts: list[list[int]] = []

    def __call__(self, _title: str, **_options: object) -> "_Bars":
        return self

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, total: int, unit: str) -> None:
        self.counts.append([total, 0])

    def advance(self, count: int = 1) -> None:
        self.counts[-1][1] += count


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Count measurements, and interrupt the one of a number."""
    measure = Evaluation.measure

    def stop_at(limit: int) -> list[int]:
        made: list[int] = []

        def counted(*given: Any, **options: Any) -> object:
            made.append(1)
            if len(made) == limit:
                raise KeyboardInterrupt
            return measure(*given, **options)

        monkeypatch.setattr(Evaluation, "measure", counted)
        return made

    return stop_at


def test_steps_are_kept_and_a_resumed_search_ends_the_same(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    calls: Callable[[int], list[int]],
) -> None:  # fmt: skip
    model = tiny("llama")
    made = calls(-1)
    whole = ablate(model, calibration, evaluation=text, out=tmp_path / "whole", **MATCH)
    total, steps = len(made), whole.matched.drop_duplicates(["strength", "loss"])
    assert total == 1 + 4 + len(steps)  # shares that come to the same neurons are measured once
    calls(1 + 4 + 3)  # in the third step
    with pytest.raises(KeyboardInterrupt):
        ablate(model, calibration, evaluation=text, out=tmp_path / "cut", **MATCH)
    kept = list((tmp_path / ".cut.ablating").glob("arm-step-*.safetensors"))
    assert len(kept) == 2
    made = calls(-1)
    cut = ablate(model, calibration, evaluation=text, out=tmp_path / "cut", resume=True, **MATCH)
    assert len(made) == total - 4 - 2  # the dense model, and the steps that were left
    pd.testing.assert_frame_equal(cut.matched, whole.matched)
    assert cut.frame.equals(whole.frame)
    for name in ("ablation", "matched", "windows"):
        one, other = (tmp_path / run / f"{name}.parquet" for run in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()


def test_the_bar_counts_steps_and_ends_full(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = _Bars()
    monkeypatch.setattr(import_module("entangle.experiments.experiment"), "ProgressBar", bars)
    ablate(tiny("llama"), calibration, evaluation=text, **MATCH)
    assert bars.counts == [[4 + 2 * MOST_STEPS, 4 + 2 * MOST_STEPS]]
    assert MOST_STEPS == STEPS + 1
    ablate(tiny("llama"), calibration, evaluation=text, **MATCH | {"match": False})
    assert bars.counts[1] == [4, 4]


def test_the_closest_step_is_an_arm(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    result = ablate(tiny("llama"), calibration, evaluation=text, measures=("divergence",), **MATCH)
    searched = result.matched.dropna(subset="matched")
    assert len(searched)
    for strength in searched["strength"].unique().tolist():
        steps = searched[searched["strength"] == strength]
        place = (steps["loss"] - steps["target"]).abs().to_numpy().argmin()
        loss, fraction = (float(steps[name].iloc[place]) for name in ("loss", "fraction"))
        arm = result.frame.query("selection == 'matched' and strength == @strength")
        assert set(arm["measure"]) == {"perplexity", "perplexity_ratio", "kl", "top1_agreement"}
        value = arm.loc[arm["measure"] == "perplexity", "value"].item()
        assert value == pytest.approx(math.exp(loss * text.n_windows / text.n_tokens))
        lowest = select(result.scores.frame, "bottom", fraction=fraction)
        assert arm["n_rows"].unique().tolist() == [lowest.n_rows]
        assert arm["realised_sparsity"].to_numpy() == pytest.approx(strength, abs=0.02)
        top, named = ({"selection": name, "strength": strength} for name in ("top", "matched"))
        gap = result.compare(top, named, measure="kl")
        assert gap.low <= gap.value <= gap.high
    assert "matched" not in set(result.selections["selection"])


def test_a_finished_result_is_given_back_on_resume(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = {**MATCH, "match": False, "resume": True}
    out = tmp_path / "out"
    first = ablate(tiny("llama"), calibration, evaluation=text, out=out, **settings)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(Ablation, "prepare", lambda *_a, **_k: pytest.fail("it runs"))
        again = ablate(tiny("llama"), calibration, evaluation=text, out=out, **settings)
        assert again.frame.equals(first.frame)
        with pytest.raises(InvalidInput, match=r"out'.*settings"):
            ablate(tiny("llama"), calibration, evaluation=text, out=out, **settings | {"seed": 1})
        with pytest.raises(InvalidInput, match=r"out'.*exists.*--force.*force=True"):
            ablate(
                tiny("llama"), calibration, evaluation=text, out=out, **settings | {"resume": False}
            )
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    ablate(tiny("llama"), calibration, evaluation=text, out=out, force=True, **settings)
    assert before != {path: path.stat().st_mtime_ns for path in out.rglob("*")}
