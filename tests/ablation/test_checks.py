"""What cannot work is refused before any model runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entangle.ablation import Selection, ablate
from entangle.ablation.candidates import SCORED
from entangle.ablation.engine import Sweep
from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import EvaluationText, MinimalPairs, load_evaluation
from entangle.models.loading import LanguageModel, as_language_model
from entangle.scoring.score import score
from entangle.seeding import torch_rng
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
        ({"fraction": 0.1, "count": 3}, InvalidInput, "exactly one of `fraction` and `count`; got"),
        ({"fraction": None, "count": 49}, InvalidInput, "49 neurons does not fit layer"),
        (
            {"fraction": None, "count": 9_999, "scope": "model"},
            InvalidInput,
            "9999 neurons does not fit the model, which has 384",
        ),
        ({"fraction": 0.6, "selections": ("random-norm",)}, InvalidInput, "matched controls of 29"),
        ({"scope": "galaxy"}, InvalidInput, "scope 'galaxy'.*layer"),
        ({"by": "md", "md": False}, InvalidInput, "md=True, without --no-md"),
        ({"by": ("wd", "beauty"), "selections": ("random",)}, UnknownName, "column 'beauty'"),
        ({"experts": (1, 193)}, InvalidInput, "number of calibration tokens, 192; got 193"),
        ({"evaluation": _long()}, InvalidInput, "at most the model's context, 128; got 129"),
        ({"router": "nearest"}, UnknownName, "unknown router 'nearest'. Closest: "),
        ({"router": ("kmeans", "single")}, UnknownName, "unknown router 'single'"),
        ({"router": ()}, InvalidInput, r"`router`.*got \(\)"),
        ({"damping": float("nan")}, InvalidInput, "`damping` must be finite"),
        ({"memory": -1}, InvalidInput, "`memory` .*; got -1"),
        ({"measures": ("pairs",), "pairs": PAIRS}, InvalidInput, "need a tokenizer"),
        (
            {"layers": ["lm_head"], "proj": None, "experts": (2,)},
            InvalidInput,
            "rows of layers inside the blocks; got 'lm_head'",
        ),
        ({"selections": ("tops",)}, UnknownName, "selection"),
        ({"selections": ()}, InvalidInput, "at least one"),
        ({"interventions": ("snip",)}, UnknownName, "intervention"),
        ({"interventions": ()}, InvalidInput, r"`interventions`.*got \(\)"),
        ({"strengths": (1.5,)}, InvalidInput, r"`strengths`.*\[0, 1\]; got 1\.5"),
        ({"edit_strengths": (-1.0,)}, InvalidInput, "edit_strengths"),
        ({"experts": (0,)}, InvalidInput, "at least 1; got 0"),
        ({"seeds": 0}, InvalidInput, "`seeds`"),
        ({"fraction": 0.0}, InvalidInput, r"\(0, 1\]"),
        ({"fraction": None, "count": 10_000}, InvalidInput, "10000"),
        ({"by": "beauty"}, UnknownName, "column"),
        ({"measures": ("taste",)}, UnknownName, "measure"),
        ({"measures": ("pairs",)}, InvalidInput, "give `pairs`"),
        ({"evaluation": None}, InvalidInput, "nothing is measured"),
        ({"evaluation": None, "measures": ("perplexity",)}, InvalidInput, "give `evaluation`"),
        ({"proj": "nose"}, UnknownName, "projection"),
        ({"seed": -1}, InvalidInput, "`seed`"),
        ({"match": True, "selections": ("random",)}, InvalidInput, "add top"),
        ({"match": True, "experts": (2,)}, InvalidInput, "1 expert"),
        (
            {
                "match": True,
                "measures": ("pairs",),
                "pairs": PAIRS,
            },
            InvalidInput,
            "measure perplexity",
        ),
        ({"seeds": True}, InvalidInput, "`seeds`"),
        ({"fraction": None, "count": True}, InvalidInput, "`count`"),
        ({"layers": 0, "selections": [_listed(1, [3])]}, UnknownName, "Choose its layer too"),
        ({"selections": [_listed(0, [1000])]}, InvalidInput, r"in 0\.\.47; got \[1000\]"),
        ({"selections": [_listed(0, [3, 3])]}, InvalidInput, "one twice"),
        ({"selections": [Selection("listed", None, None, {})]}, InvalidInput, "got none"),
        (
            {"layers": ["lm_head"], "proj": None, "measures": ("divergence",)},
            InvalidInput,
            "inside the blocks only",
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
    monkeypatch.setattr(Sweep, "run", lambda *_args, **_kwargs: pytest.fail("it runs"))
    arguments = {"evaluation": text, **QUICK, **wrong}
    with pytest.raises(error, match=message):
        ablate(tiny("llama"), calibration, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused_before_anything_runs(
    calibration: CalibrationSet, text: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sweep, "run", lambda *_args, **_kwargs: pytest.fail("it runs"))
    with pytest.raises(InvalidInput, match="is an encoder: give a causal language model"):
        ablate(as_language_model(TINY["bert"]()), calibration, evaluation=text, **QUICK)


def test_a_column_that_given_scores_do_not_hold(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sweep, "run", lambda *_args, **_kwargs: pytest.fail("it runs"))
    model = tiny("llama")
    scores = score(model, calibration, proj="mlp", method="sketch", md=False)
    with pytest.raises(InvalidInput, match="`by` md needs scores that hold it"):
        ablate(model, calibration, evaluation=text, scores=scores, by="md", **QUICK)
    flagged = scores.frame.assign(flag="nan")
    object.__setattr__(scores, "frame", flagged)
    with pytest.raises(InvalidInput, match="which has 0 without a flag"):
        ablate(model, calibration, evaluation=text, scores=scores, **QUICK)


def test_a_text_that_the_dense_model_fails_on_is_met_before_the_calibration(
    tiny: Tiny, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entangle.ablation import engine

    monkeypatch.setattr(engine, "layer_statistics", lambda *_a, **_k: pytest.fail("calibrates"))
    monkeypatch.setattr(engine, "Meter", _failing_meter)
    with pytest.raises(InvalidInput, match="no logits"):
        ablate(tiny("llama"), calibration, evaluation=_text_of(4), **QUICK)


def _failing_meter(*_args: object, **_kwargs: object) -> None:
    raise InvalidInput("no logits")


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
