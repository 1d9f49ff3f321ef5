import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from entangle.errors import InvalidInput, UnknownName
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.modes import NeuronModes, describe_modes, find_modes, neuron_modes
from entangle.modes.modes import mode_of
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY, tiny_tokenizer

Tiny = Callable[[str], LanguageModel]
LAYERS = {
    "llama": "model.layers.1.mlp.up_proj",
    "gpt2": "transformer.h.1.mlp.c_fc",
    "phi3": "model.layers.2.mlp.gate_up_proj",
    "bert": "encoder.layer.1.intermediate.dense",
}


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    """8 sequences of 20 characters."""
    ids = torch.randint(4, 100, (8, 20), generator=torch_rng(0, "text"))
    return CalibrationSet(ids, "random characters", {})


@pytest.fixture
def with_text() -> LanguageModel:
    return as_language_model(TINY["llama"](), tiny_tokenizer())


@pytest.fixture
def found(with_text: LanguageModel, text: CalibrationSet) -> NeuronModes:
    return neuron_modes(
        with_text, text, LAYERS["llama"], [40, 3], per_mode=5, window=4, progress=False
    )


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_those_of_the_layer(name: str, tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny(name)
    found = neuron_modes(model, calibration, LAYERS[name], [5, 0, 31], progress=False)
    seen: list[torch.Tensor] = []
    module = model.module.get_submodule(LAYERS[name])
    with module.register_forward_hook(lambda _m, _a, output: seen.append(output)):
        model.module(calibration.ids)
    outputs = torch.cat(seen).flatten(0, -2).numpy()
    assert list(found.outputs) == [5, 0, 31]
    for neuron, values in found.outputs.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, outputs[:, neuron], rtol=1e-4, atol=1e-5)
    assert found.modes["neuron"].drop_duplicates().tolist() == [5, 0, 31]
    assert found.contexts["token"].str.fullmatch(r"\d+").all()


def test_tables_against_plain_loops(
    found: NeuronModes, with_text: LanguageModel, text: CalibrationSet
) -> None:
    tokenizer = with_text.tokenizer
    assert tokenizer is not None
    ids = text.ids.flatten().tolist()
    for neuron, values in found.outputs.items():
        own = found.modes[found.modes["neuron"] == neuron]
        pd.testing.assert_frame_equal(
            own[["mode", "center", "left", "right", "tokens", "share"]].reset_index(drop=True),
            find_modes(values),
        )
        for row in own.to_dict("records"):
            inside = [
                i for i, y in enumerate(values) if row["left"] <= float(y) < row["right"]
            ]  # fmt: skip
            counted = Counter(str(tokenizer.decode([ids[i]])) for i in inside)
            top = json.loads(row["top_tokens"])
            assert len(top) == min(10, len(counted))
            shown = {"\n": "\\n", " ": "␣"}
            known = {shown.get(token, token): count for token, count in counted.items()}
            assert [known[token] for token, _, _ in top] == [count for _, count, _ in top]
            assert [c for _, c, _ in top] == sorted(known.values(), reverse=True)[:10]
            assert [share for *_, share in top] == [count / len(inside) for _, count, _ in top]


def test_contexts_are_in_the_text(
    found: NeuronModes, with_text: LanguageModel, text: CalibrationSet
) -> None:
    tokenizer = with_text.tokenizer
    assert tokenizer is not None
    assert (found.contexts.groupby(["neuron", "mode"]).size() <= 5).all()
    for row in found.contexts.to_dict("records"):
        sequence, place = divmod(row["position"], text.seq_len)
        whole = str(tokenizer.decode(text.ids[sequence])).replace("\n", "\\n")
        assert row["before"] + row["token"].replace("␣", " ") + row["after"] in whole
        assert row["output"] == found.outputs[row["neuron"]][row["position"]]
        before = tokenizer(row["before"].replace("\\n", "\n"), add_special_tokens=False)
        assert len(before["input_ids"]) == min(place, 4)
    inside = found.contexts.merge(found.modes, on=["neuron", "mode"])
    for _, own in inside.groupby(["neuron", "mode"]):
        assert own["output"].between(own["left"], own["right"]).all()
        assert own["rank"].tolist() == list(range(len(own)))
        assert own["position"].is_unique
        assert (own["output"] - own["center"]).abs().is_monotonic_increasing


def test_types(found: NeuronModes) -> None:
    assert found.modes.dtypes.astype(str).to_dict() == {
        "layer": "str", "neuron": "int64", "mode": "int64", "center": "float64",
        "left": "float64", "right": "float64", "tokens": "int64", "share": "float64",
        "top_tokens": "str",
    }  # fmt: skip
    assert found.contexts.dtypes.astype(str).to_dict() == {
        "layer": "str", "neuron": "int64", "mode": "int64", "rank": "int64", "position": "int64",
        "output": "float64", "token": "str", "before": "str", "after": "str",
    }  # fmt: skip
    assert (found.modes["layer"] == LAYERS["llama"]).all()


def test_the_same_seed_gives_the_same(
    found: NeuronModes, with_text: LanguageModel, text: CalibrationSet
) -> None:
    again, alone, other = (
        neuron_modes(
            with_text, text, LAYERS["llama"], neurons, per_mode=5, window=4, seed=seed,
            progress=False,
        )
        for neurons, seed in (([40, 3], 0), ([3], 0), ([40, 3], 1))
    )  # fmt: skip
    pd.testing.assert_frame_equal(again.contexts, found.contexts)
    mine = found.contexts.query("neuron == 3").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.contexts, mine)
    assert other.contexts["position"].tolist() != found.contexts["position"].tolist()
    pd.testing.assert_frame_equal(other.modes, found.modes)


def test_two_groups_of_tokens(calibration: CalibrationSet) -> None:
    """A neuron that fires on the tokens from 60 on has these in its upper mode."""
    ids = calibration.ids.flatten().numpy()
    values = np.where(ids >= 60, 5, 0) + 0.5 * np.sin(np.arange(ids.size))
    modes, contexts = describe_modes(
        {7: values.astype(np.float32)}, calibration, None, "a layer", per_mode=3
    )
    assert modes["tokens"].tolist() == [int((ids < 60).sum()), int((ids >= 60).sum())]
    upper = json.loads(modes["top_tokens"].iloc[1])
    assert all(int(token) >= 60 for token, *_ in upper)
    assert (contexts.query("mode == 1")["token"].astype(int) >= 60).all()
    assert (contexts.query("mode == 0")["token"].astype(int) < 60).all()
    assert (mode_of(values, modes) == (ids >= 60)).all()


def test_a_constant_neuron(calibration: CalibrationSet) -> None:
    values = np.full(calibration.n_tokens, 2, dtype=np.float32)
    modes, contexts = describe_modes({0: values}, calibration, None, "a layer")
    assert modes["share"].tolist() == [1.0]
    assert len(contexts) == 8


def test_no_contexts_and_no_neuron(calibration: CalibrationSet) -> None:
    values = np.arange(calibration.n_tokens, dtype=np.float32)
    modes, contexts = describe_modes({0: values}, calibration, None, "a", per_mode=0)
    assert (len(modes), len(contexts)) == (1, 0)
    modes, contexts = describe_modes({}, calibration, None, "a")
    assert (len(modes), len(contexts)) == (0, 0)
    assert modes["tokens"].dtype == contexts["rank"].dtype == "int64"


def test_not_finite(calibration: CalibrationSet) -> None:
    values = np.zeros(calibration.n_tokens, dtype=np.float32)
    values[3] = np.nan
    with pytest.raises(InvalidInput, match=r"\b4\b.*'a'.*\bNaN\b"):
        describe_modes({4: values}, calibration, None, "a")
    with pytest.raises(InvalidInput, match=r"'a'.*\b192\b"):
        describe_modes({4: values[:5]}, calibration, None, "a")


MISTAKES: dict[str, tuple[dict[str, object], type[InvalidInput], str]] = {
    "no such layer": (
        {"layer": "model.layers.1.mlp.upproj"},
        UnknownName,
        r"'model\.layers\.1\.mlp\.upproj'",
    ),
    "several layers": ({"layer": "*.mlp.up_proj"}, InvalidInput, r"`layer`.*\b3\b"),
    "beyond": ({"neurons": [3, 48]}, InvalidInput, r"\b0\b.*47.*\b48\b"),
    "negative": ({"neurons": [-1]}, InvalidInput, r"`neurons`.*-1\b"),
    "twice": ({"neurons": [3, 3]}, InvalidInput, r"`neurons`.*\[3, 3\]"),
    "none": ({"neurons": []}, InvalidInput, r"`neurons`.*got"),
    "a table": ({"neurons": np.ones((2, 2), int)}, InvalidInput, r"`neurons`.*got"),
    "per_mode": ({"per_mode": -1}, InvalidInput, r"per_mode.*\b0\b"),
    "window": ({"window": -2}, InvalidInput, r"`window`.*\b0\b"),
    "seed": ({"seed": -2}, InvalidInput, r"`seed`.*-2\b"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, with_text: LanguageModel, calibration: CalibrationSet) -> None:
    changed, kind, message = MISTAKES[case]
    settings: dict[str, object] = {"layer": LAYERS["llama"], "neurons": [1], **changed}
    with pytest.raises(kind, match=message):
        neuron_modes(with_text, calibration, **settings)  # type: ignore[arg-type]


def test_text_that_does_not_fit(with_text: LanguageModel) -> None:
    long = CalibrationSet(torch.zeros(1, 500, dtype=torch.int64), "zeros", {})
    with pytest.raises(InvalidInput, match=r"seq_len.*\b128\b"):
        neuron_modes(with_text, long, LAYERS["llama"], [1])
    strange = CalibrationSet(torch.full((1, 5), 112), "large", {})
    with pytest.raises(InvalidInput, match=r"\b112\b.*outside"):
        neuron_modes(with_text, strange, LAYERS["llama"], [1])


class _Twice(nn.Module):
    """Uses one layer two times."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(112, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.layer(self.layer(self.table(ids)))
        return hidden


def test_a_layer_that_runs_twice(calibration: CalibrationSet) -> None:
    with pytest.raises(InvalidInput, match=r"'layer'.*\b2\b"):
        neuron_modes(_Twice(), calibration, "layer", [1], progress=False)


def test_the_model_is_left_alone(
    tiny: Tiny, calibration: CalibrationSet, count_hooks: Callable[[nn.Module], int]
) -> None:
    model = tiny("llama")
    before = find_layers(model.module, LAYERS["llama"])[0].weight.clone()
    neuron_modes(model, calibration, LAYERS["llama"], [1], progress=False)
    assert torch.equal(find_layers(model.module, LAYERS["llama"])[0].weight, before)
    assert count_hooks(model.module) == 0
