"""`score` against a slow reference on every architecture, and what must not change its result."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn

from entangle.errors import InvalidInput, MemoryLimit, UnknownName
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.scoring import score as score_module
from entangle.scoring.score import Method, score
from entangle.stats.mapping_difficulty import draw_pairs
from entangle.stats.wasserstein import null_floor
from entangle.texts.calibration_set import CalibrationSet
from tests.reference import scoring as reference
from tests.tiny_models import CONFIGS, TINY

Tiny = Callable[[str], LanguageModel]
Scored = Callable[[str, Method], NeuronScores]
METHODS: tuple[Method, ...] = ("exact", "sketch")
MEASURES = ["wd", "ks", "mean", "std", "skewness", "excess_kurtosis"]
LOOKED_AT = (0, 7, 13)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_exact_scores_against_the_reference(
    name: str, tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    scores, module = scored(name, "exact"), tiny(name).module
    layers = find_layers(module, 1)
    assert scores.frame["layer"].unique().tolist() == [layer.name for layer in layers]
    experts = scores.frame["layer"].isin([one.name for one in layers if one.is_expert])
    layers = tuple(one for one in layers if not one.is_expert)
    streams = reference.inputs_and_outputs(module, [one.name for one in layers], calibration.ids)
    pairs = draw_pairs(calibration.n_tokens, seed=0).T.tolist()
    for layer in layers:
        rows = scores.frame[scores.frame["layer"] == layer.name]
        inputs, outputs = streams[layer.name]
        assert rows["neuron"].tolist() == list(range(outputs.shape[1]))
        weight = reference.weight_rows(module, layer.name, transposed=name == "gpt2")
        np.testing.assert_allclose(rows["weight_norm"], np.linalg.norm(weight, axis=1), rtol=1e-6)
        for neuron in LOOKED_AT:
            expected = reference.neuron_scores(outputs[:, neuron])
            got = rows.iloc[neuron]
            np.testing.assert_allclose(
                got[MEASURES].astype(float), list(expected.values()), atol=3e-5, rtol=3e-5
            )
            md = reference.mapping_difficulty(inputs, outputs[:, neuron], pairs)
            assert got["md"] == pytest.approx(md, rel=1e-4)
    frame = scores.frame[~experts]
    assert (frame["flag"] == "").all()
    assert (frame["n_tokens"] == calibration.n_tokens).all()
    assert (scores.frame["block"] == 1).all()
    assert frame["wd_bound"].between(0, 1e-4, inclusive="neither").all()


def test_standard_error_and_halves_against_the_reference(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    scores, name = scored("llama", "exact"), "model.layers.1.mlp.gate_proj"
    outputs = reference.inputs_and_outputs(tiny("llama").module, [name], calibration.ids)[name][1]
    groups = [range(start, start + 16) for start in range(0, 192, 16)]
    rows = scores.layer(name).frame
    for neuron in LOOKED_AT:
        expected = reference.jackknife(outputs[:, neuron], groups)
        assert rows["wd_se"][neuron] == pytest.approx(expected, rel=0.15, abs=1e-3)
    halves = [
        [
            reference.wasserstein(outputs[[t for g in half for t in g], neuron])
            for neuron in range(48)
        ]
        for half in (groups[::2], groups[1::2])
    ]
    expected = pd.Series(halves[0]).corr(pd.Series(halves[1]), method="spearman")
    assert scores.layer(name).layers["split_half"][0] == pytest.approx(expected, abs=0.05)


def test_the_rank_agreement_of_other_normalisers(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    name = "model.layers.1.mlp.gate_proj"
    streams = reference.inputs_and_outputs(tiny("llama").module, [name], calibration.ids)
    inputs, outputs = streams[name]
    pairs = draw_pairs(calibration.n_tokens, seed=0).T.tolist()
    ranks = [
        pd.Series([reference.mapping_difficulty(inputs, y, pairs, norm) for y in outputs.T]).rank()
        for norm in (np.median, np.mean, max)
    ]
    row = scored("llama", "exact").layer(name).layers.iloc[0]
    assert row["md_rank_agreement_mean"] == pytest.approx(ranks[0].corr(ranks[1]), abs=1e-3)
    assert row["md_rank_agreement_max"] == pytest.approx(ranks[0].corr(ranks[2]), abs=1e-3)


def test_layers_are_described(scored: Scored, calibration: CalibrationSet) -> None:
    layers = scored("llama", "exact").layers.set_index("projection")
    floor, high = null_floor(calibration.n_tokens)
    assert layers["n_neurons"].to_dict() == {
        "q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32,
        "gate_proj": 48, "up_proj": 48, "down_proj": 32,
    }  # fmt: skip
    assert (layers["n_tokens"] == 192).all()
    assert (layers["null_floor"] == floor).all()
    assert (layers["null_floor_high"] == high).all()
    assert (layers["n_pairs"] + layers["n_identical_pairs"] == 96).all()
    assert layers["split_half"].between(-1, 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_batch_size_and_memory_change_nothing(
    method: Method, tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    usual = scored("llama", method).frame
    changes: list[dict[str, Any]] = [{"batch_size": 1}, {"batch_size": 100}, {"memory": 2**20}]
    for change in changes:
        other = score(
            tiny("llama"), calibration, layers=1, proj=None, method=method, **change
        ).frame
        tolerance = usual["wd_bound"] + other["wd_bound"] + 1e-5
        assert ((usual["wd"] - other["wd"]).abs() <= tolerance).all()
        columns = ["mean", "std", "skewness", "weight_norm"]
        columns += ["ks", "md", "wd_se"] if method == "exact" else []
        np.testing.assert_allclose(usual[columns], other[columns], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_device_changes_nothing(
    name: str, method: Method, scored: Scored, calibration: CalibrationSet
) -> None:
    usual = scored(name, method)
    other = score(TINY[name]().to("cuda"), calibration, layers=1, proj=None, method=method)
    tolerance = usual.frame["wd_bound"] + 1e-4
    assert ((usual.frame["wd"] - other.frame["wd"]).abs() <= tolerance).all()
    columns = ["mean", "std", "md", "weight_norm"]
    np.testing.assert_allclose(usual.frame[columns], other.frame[columns], rtol=1e-3, atol=1e-4)
    assert other.manifest["model"]["device"] == "cuda:0"  # type: ignore[index]


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_with_one_seed_agree_to_the_last_bit(
    method: Method, tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    first = scored("gpt2", method)
    state = torch.get_rng_state()
    second = score(tiny("gpt2"), calibration, layers=1, proj=None, method=method)
    assert torch.equal(torch.get_rng_state(), state)
    assert_frame_equal(first.frame, second.frame, check_exact=True)
    assert_frame_equal(first.layers, second.layers, check_exact=True)
    other = score(tiny("gpt2"), calibration, layers=1, proj=None, method=method, seed=1)
    assert_frame_equal(
        first.frame.drop(columns="md"), other.frame.drop(columns="md"), check_exact=True
    )
    assert (first.frame["md"] != other.frame["md"]).any()


@pytest.mark.parametrize("method", METHODS)
def test_without_mapping_difficulty(
    method: Method, tiny: Tiny, calibration: CalibrationSet
) -> None:
    scores = score(tiny("llama"), calibration, layers=1, proj=None, method=method, md=False)
    assert scores.frame["md"].isna().all()
    assert scores.frame["wd"].notna().all()
    assert scores.layers["n_pairs"].eq(0).all()
    assert scores.manifest["settings"]["md"] is False  # type: ignore[index]


def test_auto_is_exact_where_the_inputs_fit(tiny: Tiny) -> None:
    ids = CalibrationSet(torch.full((64, 64), 7), "many", {})
    for budget, method in ((2**22, "exact"), (2**21, "sketch")):
        scores = score(tiny("llama"), ids, layers=1, proj="mlp", md=False, memory=budget)
        assert scores.layers["method"].eq(method).all()


def test_auto_chooses_alike_on_every_machine(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `memory` by the size of the inputs alone, not by what is free."""
    ids = CalibrationSet(torch.full((8, 64), 7), "many", {})
    needed = 512 * 2 * (32 + 32 + 48) * 4 // 2
    for free in (2**22, 2**45):
        monkeypatch.setattr("entangle.memory.free_ram", lambda free=free: free)
        for most, method in ((needed, "exact"), (needed - 1, "sketch")):
            monkeypatch.setattr(score_module, "AUTO_EXACT_BYTES", most)
            scores = score(tiny("llama"), ids, layers=1, proj="mlp", md=False)
            assert scores.manifest["settings"]["method"] == method  # type: ignore[index]
            assert scores.manifest["memory_bytes"] == free // 2
            assert "memory" not in str(scores.manifest["settings"])


def test_the_manifest_tells_what_was_done(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    manifest = dict(scored("gpt2", "sketch").manifest)
    assert (manifest["kind"], manifest["schema_version"]) == ("scores", 1)
    assert manifest["model"] == tiny("gpt2").describe()
    assert manifest["calibration"] == calibration.describe()
    assert manifest["settings"] == {
        "layers": [layer.name for layer in find_layers(tiny("gpt2").module, 1)],
        "layers_without_tokens": [],
        "method": "sketch", "n_groups": 6, "batch_size": 256, "md": True, "seed": 0,
    }  # fmt: skip
    assert isinstance(manifest["seconds"], float)
    assert isinstance(manifest["peak_memory_bytes"], int)
    assert {"python", "torch", "transformers", "entangle"} <= set(manifest["packages"])  # type: ignore[call-overload]


class Plain(nn.Module):
    """A model from outside transformers: no configuration, no head, blocks without names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(112, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).sin().view(p.shape))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.table(ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_module(method: Method, calibration: CalibrationSet) -> None:
    module = Plain()
    scores = score(module, calibration, method=method)
    assert scores.frame["layer"].unique().tolist() == ["layers.0", "layers.1"]
    assert scores.frame["model"].eq("Plain").all()
    assert module.training
    outputs = reference.inputs_and_outputs(module, ["layers.1"], calibration.ids)["layers.1"][1]
    tolerance = 0.01 if method == "sketch" else 1e-5
    got = scores.layer("layers.1").frame["wd"]
    for neuron in range(6):
        assert got[neuron] == pytest.approx(
            reference.wasserstein(outputs[:, neuron]), abs=tolerance
        )


def test_layers_outside_the_blocks(tiny: Tiny, calibration: CalibrationSet) -> None:
    scores = score(tiny("llama"), calibration, layers=["lm_head", "model.layers.2.mlp.up_proj"])
    assert scores.frame["block"].isna().sum() == 112
    assert scores.layers["n_tokens"].tolist() == [192, 192]
    bert = score(tiny("bert"), calibration, layers="pooler.dense")
    assert bert.layers["n_tokens"].tolist() == [12]  # it sees the first token of a sequence


def test_a_stored_half_precision_model(calibration: CalibrationSet, scored: Scored) -> None:
    module = TINY["llama"]().to(torch.bfloat16)
    for method in METHODS:
        got = score(module, calibration, layers=1, proj=None, method=method).frame["wd"]
        usual = scored("llama", method).frame["wd"]
        assert (got - usual).abs().max() < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_inside_inference_mode(
    method: Method, tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    with torch.inference_mode():
        scores = score(tiny("llama"), calibration, layers=1, proj=None, method=method)
    assert_frame_equal(scores.frame, scored("llama", method).frame, check_exact=True)


@pytest.mark.parametrize("where", ["score_exact", "neuron_table"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_names_the_settings(
    error: Exception,
    where: str,
    tiny: Tiny,
    calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(score_module, where, fail)
    message = r"\b256\b.*\b16\b.*--seq-len"
    with pytest.raises(MemoryLimit, match=message):
        score(tiny("llama"), calibration, layers=1, proj=None, method="exact")


def test_torch_says_so_when_memory_runs_out_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        torch.empty(2**60)


def test_other_errors_are_not_taken_for_it(
    tiny: Tiny, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(score_module, "score_exact", fail)
    with pytest.raises(RuntimeError, match="something else"):
        score(tiny("llama"), calibration, layers=1, proj=None, method="exact")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, r"`seed`.*-1\b"),
        ({"layers": []}, r"`layers`.*\[\]"),
        ({"layers": 3}, r"\b0\b.*2.*\b3\b"),
        ({"memory": 2**20 - 1}, r"`memory`.*1048575"),
        ({"batch_size": 0}, r"batch_size.*\b1\b.*\b0\b"),
    ],
)
def test_settings_that_break_a_rule(
    settings: dict[str, int], message: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    with pytest.raises(InvalidInput, match=message):
        score(tiny("llama"), calibration, **settings)  # type: ignore[arg-type]


def test_unknown_layers(tiny: Tiny, calibration: CalibrationSet) -> None:
    with pytest.raises(UnknownName, match=r"'model\.layers\.1\.mlp\.gate'"):
        score(tiny("llama"), calibration, layers="model.layers.1.mlp.gate")


def test_a_layer_that_never_runs(calibration: CalibrationSet) -> None:
    module = Plain()
    module.unused = nn.Linear(6, 6)
    for method in METHODS:
        with pytest.raises(InvalidInput, match="'unused'"):
            score(module, calibration, layers="unused", method=method)
