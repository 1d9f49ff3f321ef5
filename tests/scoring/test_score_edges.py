"""Broken weights, hardly any token, ids that do not fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from entangle.errors import InvalidInput
from entangle.models.loading import LanguageModel, as_language_model, load_model
from entangle.results.scores import NeuronScores
from entangle.scoring.score import Method, score
from entangle.texts.calibration import load_calibration
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
Scored = Callable[[str, Method], NeuronScores]
METHODS: tuple[Method, ...] = ("exact", "sketch")
MEASURES = ["wd", "ks", "mean", "std", "skewness", "excess_kurtosis"]


def broken_llama() -> nn.Module:
    """A llama whose gate_proj of block 1 has a NaN, two infinite, a constant and a tiny neuron."""
    module = TINY["llama"]()
    gate = module.get_submodule("model.layers.1.mlp.gate_proj").get_parameter("weight")
    gate[3, 5] = torch.nan
    gate[8, 0] = torch.inf
    gate[9, 0] = -torch.inf
    gate[20] = 0
    gate[21] *= 1e-30
    return module


@pytest.mark.parametrize("method", METHODS)
def test_neurons_without_a_score_are_flagged_and_kept(
    method: Method, scored: Scored, calibration: CalibrationSet
) -> None:
    name = "model.layers.1.mlp.gate_proj"
    scores = score(broken_llama(), calibration, layers=name, method=method)
    flags = {3: "nan", 8: "inf", 9: "inf", 20: "constant"}
    frame, clean = scores.frame, scored("llama", method).layer(name).frame
    assert frame["flag"][frame["flag"] != ""].to_dict() == flags
    assert len(frame) == 48
    measured = [*MEASURES, "wd_se", "wd_bound", "md"]
    assert frame.loc[list(flags), measured].isna().all(axis=None)
    frame.loc[21, ["mean", "std"]] *= 1e30
    good = frame.index.difference([*flags])
    assert frame.loc[good, measured].notna().all(axis=None)
    np.testing.assert_allclose(
        frame.loc[good, measured], clean.loc[good, measured], rtol=1e-4, atol=1e-5
    )
    assert np.isnan(frame["weight_norm"][3])
    assert frame["weight_norm"][[8, 9]].eq(np.inf).all()
    assert set(scores.top(48)["neuron"]).isdisjoint(flags)
    assert np.isfinite(scores.layers["split_half"][0])


@pytest.mark.parametrize("method", METHODS)
def test_nan_that_spreads_ends_and_is_seen(method: Method, calibration: CalibrationSet) -> None:
    scores = score(broken_llama(), calibration, layers="all", proj=None, method=method)
    spread = scores.frame[scores.frame["block"] == 2]
    assert (spread["flag"] == "nan").all()
    assert len(scores.top(10)) == 10
    assert scores.layers["n_tokens"].eq(calibration.n_tokens).all()
    assert scores.layer("model.layers.2.mlp.up_proj").layers["split_half"].isna().all()
    scores._repr_html_()


@pytest.mark.parametrize("method", METHODS)
def test_one_sequence_has_scores_but_no_standard_error(
    method: Method, tiny: Tiny, calibration: CalibrationSet
) -> None:
    one = CalibrationSet(calibration.ids[:1], "one", {})
    scores = score(tiny("llama"), one, layers=1, proj=None, method=method)
    assert scores.frame["wd"].notna().all()
    assert scores.frame["wd_se"].isna().all()
    assert scores.layers["split_half"].isna().all()
    assert scores.manifest["settings"]["n_groups"] == 1  # type: ignore[index]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_hardly_any_token(method: Method, tokens: int, tiny: Tiny) -> None:
    ids = CalibrationSet(torch.arange(5, 5 + tokens)[None], "few", {})
    scores = score(tiny("llama"), ids, layers=1, proj=None, method=method)
    assert len(scores.frame) == 224
    assert (scores.frame["flag"] == ("constant" if tokens == 1 else "")).all()
    assert scores.frame["wd"].isna().all() == (tokens == 1)
    assert (scores.frame["n_tokens"] == tokens).all()


def test_equal_inputs_have_no_mapping_difficulty(tiny: Tiny) -> None:
    ids = CalibrationSet(torch.full((4, 1), 7), "equal", {})
    scores = score(tiny("llama"), ids, layers=0, proj="q_proj")
    assert scores.frame["md"].isna().all()
    assert scores.layers[["n_pairs", "n_identical_pairs"]].to_numpy().tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((2, 8), 112), r"\b112\b.*\[0, 112\)"),
        (torch.full((2, 8), -1), r"\b0\b.*-1\b.*attention_mask"),
        (torch.full((1, 129), 5), r"seq_len.*\b128\b.*\b129\b"),
    ],
)
def test_ids_that_do_not_fit_the_model(ids: torch.Tensor, message: str, tiny: Tiny) -> None:
    with pytest.raises(InvalidInput, match=message):
        score(tiny("llama"), CalibrationSet(ids, "bad", {}), layers=1, proj=None)


def test_an_offloaded_layer_is_refused(calibration: CalibrationSet) -> None:
    module = TINY["llama"]()
    module.get_submodule("model.layers.1.mlp.gate_proj").to("meta")
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.gate_proj' .*offloaded"):
        score(as_language_model(module), calibration, layers=1, proj="gate_proj")


class _SpareHead(nn.Module):
    """A causal model with one linear in its blocks that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TINY["llama"]()
        self.config = self.inner.config
        self.inner.model.layers[0].spare = nn.Linear(8, 8)  # type: ignore[union-attr, index]

    def forward(self, ids: torch.Tensor, **options: object) -> object:
        return self.inner(ids, **options)


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_see_no_token_are_left_out_unless_named(
    method: Method, calibration: CalibrationSet
) -> None:
    module = _SpareHead()
    scores = score(module, calibration, layers="all", proj=None, method=method)
    spare = "inner.model.layers.0.spare"
    assert spare not in set(scores.frame["layer"])
    settings = scores.manifest["settings"]
    assert isinstance(settings, dict)
    assert settings["layers_without_tokens"] == [spare]
    with pytest.raises(InvalidInput, match=r"'inner\.model\.layers\.0\.spare'"):
        score(module, calibration, layers=[0, spare], method=method)


def test_a_pilot_without_spread_is_flagged_and_not_scored(tiny: Tiny) -> None:
    ids = torch.randint(4, 112, (12, 64), generator=torch.Generator().manual_seed(0))
    ids[:4] = 7  # the bins are placed where all tokens are one
    calibration = CalibrationSet(ids, "padded", {})
    layer = "model.layers.1.mlp.gate_proj"
    exact = score(tiny("llama"), calibration, layers=layer, method="exact").frame
    sketch = score(tiny("llama"), calibration, layers=layer, method="sketch", batch_size=4).frame
    assert (exact["flag"] == "").all()
    scored = sketch["flag"] == ""
    assert (sketch.loc[~scored, "flag"] == "coarse").all()
    assert sketch.loc[~scored, ["wd", "wd_se", "ks"]].isna().all(axis=None)
    error = (sketch["wd"] - exact["wd"]).abs()[scored]
    assert (error <= sketch["wd_bound"][scored]).all()
    assert not scored.all()


def test_a_path_is_a_calibration_source(
    tiny_folder: Callable[[str], Path], text_file: Path
) -> None:
    model = load_model(str(tiny_folder("llama")))
    calibration = load_calibration(
        text_file, model.tokenizer, context_length=model.context_length, vocab_size=model.vocab_size
    )
    expected = score(model, calibration, layers=1, proj="up_proj").frame
    assert score(model, text_file, layers=1, proj="up_proj").frame.equals(expected)


def test_few_sequences_have_a_group_each(tiny: Tiny, calibration: CalibrationSet) -> None:
    few = CalibrationSet(calibration.ids[:3], "few", {})
    scores = score(tiny("llama"), few, layers=1, proj=None, method="sketch")
    assert scores.manifest["settings"]["n_groups"] == 3  # type: ignore[index]
    assert scores.frame["wd_se"].notna().all()
