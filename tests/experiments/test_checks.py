"""What cannot work is refused before any model runs."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import EvaluationText, MinimalPairs, load_evaluation
from entangle.experiments.ablate import Ablation, ablate
from entangle.experiments.experiment import Evaluation
from entangle.experiments.selection import SCORED, Selection
from entangle.models.loading import LanguageModel, as_language_model
from entangle.scoring.score import score
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
QUICK: dict[str, Any] = {"fraction": 0.1, "strengths": (0.5,), "seeds": 2}
PAIRS = MinimalPairs(("a b",), ("a c",), ("x",), "here", {})


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    ids = torch.randint(4, 112, (5, 12), generator=torch_rng(1, "evaluation tokens"))
    return load_evaluation(ids)


def _long() -> EvaluationText:
    return EvaluationText(torch.full((1, 129), 5), "ids", {})


def _listed(block: int, rows: list[int]) -> Selection:
    name = f"model.layers.{block}.mlp.up_proj"
    return Selection("listed", None, None, {name: np.array(rows)})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"fraction": 0.1, "count": 3}, InvalidInput, r"`fraction`.*`count`.*\b0\.1\b"),
        ({"fraction": None, "count": 49}, InvalidInput, r"\b49\b.*`fraction`"),
        (
            {"fraction": None, "count": 9_999, "scope": "model"},
            InvalidInput,
            r"\b9999\b.*\b384\b.*`fraction`",
        ),
        ({"fraction": 0.6, "selections": ("random-norm",)}, InvalidInput, r"\b29\b.*`fraction`"),
        ({"scope": "galaxy"}, InvalidInput, "'galaxy'"),
        ({"by": "md", "md": False}, InvalidInput, r"md=True.*--no-md"),
        ({"by": ("wd", "beauty"), "selections": ("random",)}, UnknownName, "'beauty'"),
        ({"experts": (1, 193)}, InvalidInput, r"`experts`.*calibration.*\b192\b.*\b193\b"),
        ({"evaluation": _long()}, InvalidInput, r"seq_len.*context.*\b128\b.*\b129\b"),
        ({"router": "nearest"}, UnknownName, r"router.*'nearest'"),
        ({"router": ("kmeans", "single")}, UnknownName, "'single'"),
        ({"router": ()}, InvalidInput, r"`router`.*\(\)"),
        ({"damping": float("nan")}, InvalidInput, r"`damping`.*\bnan\b"),
        ({"memory": -1}, InvalidInput, r"`memory`.*-1\b"),
        ({"measures": ("pairs",), "pairs": PAIRS}, InvalidInput, "need a tokenizer"),
        (
            {"layers": ["lm_head"], "proj": None, "experts": (2,)},
            InvalidInput,
            r"rows.*'lm_head'",
        ),
        ({"selections": ("tops",)}, UnknownName, "selection"),
        ({"selections": ()}, InvalidInput, r"`selections`.*at least one"),
        ({"interventions": ("snip",)}, UnknownName, "intervention"),
        ({"interventions": ()}, InvalidInput, r"`interventions`.*\(\)"),
        ({"strengths": (1.5,)}, InvalidInput, r"`strengths`.*\[0, 1\].*\b1\.5\b"),
        ({"edit_strengths": (-1.0,)}, InvalidInput, "edit_strengths"),
        ({"experts": (0,)}, InvalidInput, r"`experts`.*\b1\b.*\b0\b"),
        ({"seeds": 0}, InvalidInput, "`seeds`"),
        ({"fraction": 0.0}, InvalidInput, r"`fraction`.*\(0, 1\]"),
        ({"fraction": None, "count": 10_000}, InvalidInput, "10000"),
        ({"by": "beauty"}, UnknownName, "column"),
        ({"measures": ("taste",)}, UnknownName, "measure"),
        ({"measures": ("pairs",)}, InvalidInput, "`pairs`"),
        ({"evaluation": None}, InvalidInput, r"measured.*`evaluation`"),
        ({"evaluation": None, "measures": ("perplexity",)}, InvalidInput, "`evaluation`"),
        ({"proj": "nose"}, UnknownName, "projection"),
        ({"seed": -1}, InvalidInput, "`seed`"),
        ({"match": True, "selections": ("random",)}, InvalidInput, r"`match`.*add"),
        ({"match": True, "experts": (2,)}, InvalidInput, r"`match`.*\b1\b"),
        (
            {
                "match": True,
                "measures": ("pairs",),
                "pairs": PAIRS,
            },
            InvalidInput,
            r"`match`.*perplexity",
        ),
        ({"seeds": True}, InvalidInput, "`seeds`"),
        ({"fraction": None, "count": True}, InvalidInput, "`count`"),
        ({"layers": 0, "selections": [_listed(1, [3])]}, UnknownName, r"'listed'.*layer"),
        ({"selections": [_listed(0, [1000])]}, InvalidInput, r"\b0\b.*47.*\[1000\]"),
        ({"selections": [_listed(0, [3, 3])]}, InvalidInput, r"'listed'.*twice"),
        ({"selections": [Selection("listed", None, None, {})]}, InvalidInput, r"'listed'.*none"),
        (
            {"layers": ["lm_head"], "proj": None, "measures": ("divergence",)},
            InvalidInput,
            r"inside.*'lm_head'",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    tiny: Tiny,
    calibration: CalibrationSet,
    text: EvaluationText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(Ablation, "run", lambda *_args, **_kwargs: pytest.fail("it runs"))
    arguments = {"evaluation": text, **QUICK, **wrong}
    with pytest.raises(error, match=message):
        ablate(tiny("llama"), calibration, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused_before_anything_runs(
    calibration: CalibrationSet, text: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ablation, "run", lambda *_args, **_kwargs: pytest.fail("it runs"))
    with pytest.raises(InvalidInput, match=r"BertModel.*encoder"):
        ablate(as_language_model(TINY["bert"]()), calibration, evaluation=text, **QUICK)


def test_a_column_that_given_scores_do_not_hold(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ablation, "run", lambda *_args, **_kwargs: pytest.fail("it runs"))
    model = tiny("llama")
    scores = score(model, calibration, proj="mlp", method="sketch", md=False)
    with pytest.raises(InvalidInput, match=r"`by`.*scores"):
        ablate(model, calibration, evaluation=text, scores=scores, by="md", **QUICK)
    flagged = scores.frame.assign(flag="nan")
    object.__setattr__(scores, "frame", flagged)
    with pytest.raises(InvalidInput, match=r"\b0\b.*without.*`fraction`"):
        ablate(model, calibration, evaluation=text, scores=scores, **QUICK)


def test_a_text_that_the_dense_model_fails_on_is_met_before_the_calibration(
    tiny: Tiny, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = import_module("entangle.experiments.ablate")
    monkeypatch.setattr(home, "layer_statistics", lambda *_a, **_k: pytest.fail("calibrates"))
    monkeypatch.setattr(Evaluation, "measure", _failing)
    with pytest.raises(InvalidInput, match="logits"):
        ablate(tiny("llama"), calibration, evaluation=_text_of(4), **QUICK)


def _failing(*_args: object, **_kwargs: object) -> None:
    raise InvalidInput("logits")


def _text_of(windows: int) -> EvaluationText:
    return EvaluationText(torch.full((windows, 12), 5), "ids", {})


def test_the_columns_known_beforehand_are_those_of_scores(
    tiny: Tiny, calibration: CalibrationSet
) -> None:
    frame = score(tiny("llama"), calibration, layers=0, proj="mlp").frame
    assert tuple(frame.select_dtypes("number").columns) == SCORED


def test_experts_named_twice_are_taken_once(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    settings: dict[str, Any] = {**QUICK, "layers": 1, "selections": ("top",)}
    model = tiny("llama")
    result = ablate(model, calibration, evaluation=text, experts=(2, 1, 2), **settings)
    counts = result.frame.query("measure == 'perplexity'").groupby("experts").size()
    assert counts.to_dict() == {1: 2, 2: 1}  # the dense model among the first
