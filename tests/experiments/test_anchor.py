"""What dictionaries say about neurons, on tiny models of several architectures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

from entangle.errors import InvalidInput, NumericalError, Unavailable, UnknownName
from entangle.experiments.anchor import anchor
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.results.anchor import COLUMNS, load_anchor
from entangle.scoring.score import score
from entangle.seeding import torch_rng
from entangle.stats.dictionary import PursuitDictionary, measure_coding, principal_atoms
from entangle.stats.gram import require_finite
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.words import TokenText
from tests.experiments.test_sae import saelens
from tests.mixtures import TEXT, mixture
from tests.tiny_models import TINY, tiny_tokenizer

Tiny = Callable[[str], LanguageModel]
LAYERS = {
    "llama": ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"],
    "gpt2": ["transformer.h.1.mlp.c_fc"],
    "phi3": ["model.layers.2.mlp.gate_up_proj"],
}
SMALL: dict[str, Any] = {"atoms": 24, "active": 4, "n_boot": 20, "progress": False}


@pytest.mark.parametrize("name", LAYERS)
def test_tables_and_scores(name: str, tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny(name)
    found = anchor(model, calibration, layers=LAYERS[name], **SMALL)
    for table, types in COLUMNS.items():
        own = found.frame if table == "anchor" else getattr(found, table)
        assert own.dtypes.astype(str).to_dict() == types
    assert found.frame["layer"].drop_duplicates().tolist() == LAYERS[name]
    scores = score(model, calibration, layers=LAYERS[name], progress=False).frame
    for _, own in found.frame.groupby("dictionary"):
        for column in ("wd", "md", "weight_norm"):
            np.testing.assert_allclose(own[column], scores[column])
    sizes = found.dictionaries.set_index(["layer", "dictionary"])["atoms"].unstack()
    assert sizes.nunique(axis=1).eq(1).all()
    assert (found.frame["participation"].between(1 - 1e-9, 24 + 1e-9)).all()
    measured = found.dictionaries["tokens_measured"].unique().tolist()
    assert measured == [calibration.n_seq // 2 * calibration.ids.shape[1]]


def test_principal_directions_from_the_module_itself(
    tiny: Tiny, calibration: CalibrationSet
) -> None:
    """Inputs hooked anew; the halves are told apart by which the centre was taken from."""
    model, layer = tiny("llama"), LAYERS["llama"][1]
    found = anchor(model, calibration, layers=layer, **SMALL).frame
    own = found[found["dictionary"] == "principal directions"]
    module, seen = find_layers(model.module, layer)[0].module, list[torch.Tensor]()
    hook = module.register_forward_pre_hook(lambda _m, given: seen.append(given[0].detach()))
    with torch.no_grad():
        model.module(calibration.ids)
    hook.remove()
    tokens, half = torch.cat(seen), calibration.n_seq // 2
    order = torch.randperm(calibration.n_seq, generator=torch_rng(0, "anchor halves"))
    fitted, measured = (tokens[some].flatten(0, 1).double() for some in order.split(
        [calibration.n_seq - half, half]))  # fmt: skip
    centre = fitted.mean(0)
    atoms = principal_atoms(fitted - centre, atoms=24)
    coding = measure_coding(PursuitDictionary(atoms, centre, 4), [measured])
    weight = find_layers(model.module, layer)[0].weight.double()
    q = coding.energy * (weight @ atoms.mT).square()
    expected = q.sum(1).square() / q.square().sum(1)
    np.testing.assert_allclose(own["participation"], expected, rtol=1e-3)


def test_correlations_against_scipy(tiny: Tiny, calibration: CalibrationSet) -> None:
    found = anchor(tiny("llama"), calibration, layers=LAYERS["llama"], **SMALL)
    rows = found.correlations.query("scope == 'layer' and predictor == 'wd'")
    assert len(rows) == 6
    for row in rows.to_dict("records"):
        own = found.frame[
            (found.frame["layer"] == row["layer"])
            & (found.frame["dictionary"] == row["dictionary"])
        ]
        expected = spearmanr(own["wd"], own["participation"]).statistic
        assert row["spearman"] == pytest.approx(expected)
        assert row["spearman_low"] <= row["spearman"] <= row["spearman_high"]


def test_atoms_are_tokens_of_the_text(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = as_language_model(tiny("llama").module, tiny_tokenizer())
    reads = anchor(model, calibration, layers=LAYERS["llama"], **SMALL).reads
    assert set(reads["rank"]) == set(range(5))
    assert reads.groupby(["layer", "neuron"])["share"].sum().le(1 + 1e-9).all()
    ordered = reads.groupby(["layer", "neuron"])["share"]
    assert ordered.apply(lambda one: one.is_monotonic_decreasing).all()
    text = TokenText(model.tokenizer)
    for row in reads.to_dict("records"):
        sequence, place = divmod(row["position"], calibration.ids.shape[1])
        ids = calibration.ids[sequence].tolist()
        assert (row["before"], row["token"], row["after"]) == text.context(ids, place, 12)


def test_saved_loaded_and_drawn(tiny: Tiny, calibration: CalibrationSet, tmp_path: Path) -> None:
    found = anchor(tiny("llama"), calibration, layers=LAYERS["llama"], **SMALL)
    found.save(tmp_path / "run")
    again = load_anchor(tmp_path / "run")
    for name in COLUMNS:
        field = "frame" if name == "anchor" else name
        pd.testing.assert_frame_equal(getattr(again, field), getattr(found, field))
    assert len(found.plot().axes) == 2
    assert set(found.summary()["predictor"]) >= {"wd", "md"}
    same = anchor(tiny("llama"), calibration, layers=LAYERS["llama"], **SMALL)
    pd.testing.assert_frame_equal(same.correlations, found.correlations)


def test_a_brought_dictionary(tiny: Tiny, calibration: CalibrationSet, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(InvalidInput, match="4 features"):
        anchor(model, calibration, layers=LAYERS["llama"], dictionary=saelens(tmp_path), **SMALL)
    with pytest.raises(Unavailable):
        anchor(model, calibration, layers=LAYERS["llama"], dictionary=tmp_path / "no", **SMALL)
    width = find_layers(model.module, LAYERS["llama"][0])[0].in_features
    made = {"W_enc": torch.eye(width), "W_dec": torch.eye(width)}
    made |= {name: torch.zeros(width) for name in ("b_enc", "b_dec")}
    save_file(made, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": width, "d_sae": width}))
    found = anchor(
        model, calibration, layers=LAYERS["llama"], dictionary=tmp_path,
        **{**SMALL, "atoms": None},
    )  # fmt: skip
    assert set(found.frame["dictionary"]) == {"sae", "random tokens", "principal directions"}
    assert found.reads.empty
    row = found.dictionaries.query("dictionary == 'sae'").iloc[0]
    assert (row["atoms"], row["tokens_fitted"]) == (width, 0)
    assert row["unexplained"] > 0.1  # negative halves are lost


def test_mistakes(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny("llama")
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"threshold": 1.5}, InvalidInput, "threshold"), ({"active": 0}, InvalidInput, "active"),
        ({"atoms": 1}, InvalidInput, "atoms"), ({"controls": "nothing"}, UnknownName, "nothing"),
        ({"layers": "nowhere"}, UnknownName, "nowhere"), ({"n_boot": 0}, InvalidInput, "n_boot"),
    ]  # fmt: skip
    for settings, error, match in wrong:
        with pytest.raises(error, match=match):
            anchor(model, calibration, **{"layers": LAYERS["llama"], **SMALL, **settings})
    one = CalibrationSet(calibration.ids[:1], "one", {})
    with pytest.raises(InvalidInput, match="2 sequences"):
        anchor(model, one, layers=LAYERS["llama"], **SMALL)


def test_inputs_that_are_not_finite_are_counted(calibration: CalibrationSet) -> None:
    model, n = as_language_model(TINY["llama"]()), calibration.n_tokens
    model.module.get_parameter("model.layers.1.post_attention_layernorm.weight").data[3] = torch.nan
    with pytest.raises(NumericalError, match=f"gate_proj: {n} of {n} tokens hold NaN"):
        anchor(model, calibration, layers=LAYERS["llama"][0], **SMALL)
    some, others = torch.zeros(3, 2), torch.zeros(4, 2)
    others[1:3, 0] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(NumericalError, match="2 of 7 tokens"):
        require_finite(some, others)


def test_pads_are_no_tokens(tiny: Tiny, calibration: CalibrationSet) -> None:
    """Sequences that a mask cuts are those that are shorter: same halves, same numbers."""
    model, layer = tiny("llama"), LAYERS["llama"][0]
    ids = calibration.ids[:6, :20]
    padded = torch.cat([ids, torch.zeros_like(ids[:, :3])], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :3])], 1)
    text = {"input_ids": padded, "attention_mask": mask}
    found = anchor(model, text, layers=layer, **SMALL)
    plain = anchor(model, ids, layers=layer, **SMALL)
    pd.testing.assert_frame_equal(found.frame, plain.frame)
    pd.testing.assert_frame_equal(found.reads, plain.reads)
    mask[2:, 15:] = 0  # sequences of two lengths
    found = anchor(model, text, layers=layer, **SMALL)
    told = found.dictionaries.iloc[0]
    assert told["tokens_measured"] in {3 * 15, 2 * 15 + 20, 15 + 2 * 20}
    assert found.reads["position"].between(0, 2 * 20 + 4 * 15 - 1).all()


def test_experts_of_a_mixture_are_refused() -> None:
    """They see some of the tokens, and halves are of all."""
    with pytest.raises(InvalidInput, match=r"anchor.*experts\.0\.gate_proj"):
        anchor(mixture("Mixtral"), TEXT(), layers="*.experts.0.gate_proj", proj=None, **SMALL)
