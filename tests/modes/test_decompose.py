from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr, wasserstein_distance
from torch import nn

from entangle.errors import InvalidInput, MemoryLimit, NumericalError, UnknownName
from entangle.experiments.predictors import predictor_table
from entangle.experts.routed_rows import fit_rows
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.modes.decompose import decompose
from entangle.results.decomposition import COLUMNS, Decomposition
from entangle.scoring.score import score
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
SMALL: dict[str, Any] = {
    "experts": (1, 3), "sparsity": 0.75, "restarts": 2, "contexts": 3, "token_pairs": 40,
    "separated": 6, "near": 0.1, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    """8 sequences of 20 characters."""
    ids = torch.randint(4, 100, (8, 20), generator=torch_rng(0, "text"))
    return CalibrationSet(ids, "random characters", {})


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return as_language_model(TINY["llama"](), tiny_tokenizer())


@pytest.fixture(scope="module")
def found(model: LanguageModel, text: CalibrationSet) -> Decomposition:
    return decompose(model, text, layers=1, proj="mlp", **SMALL)


@pytest.mark.parametrize("name", LAYERS)
def test_neurons_are_those_of_score_and_fit_rows(
    name: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    model, layer = tiny(name), LAYERS[name]
    found = decompose(model, calibration, layers=layer, **SMALL).neurons
    scores = score(model, calibration, layers=layer, method="exact", progress=False).frame
    width = find_layers(model.module, layer)[0].out_features
    assert found["neuron"].tolist() == [i for i in range(width) for _ in range(2)]
    assert found["experts"].tolist() == [1, 3] * width
    for column in ("wd", "md", "mean", "std", "skewness", "excess_kurtosis", "ks", "weight_norm"):
        own = found.loc[found["experts"] == 3, column]
        np.testing.assert_allclose(own, scores[column], rtol=1e-4, atol=1e-5)
    if name == "bert":
        return
    rows = fit_rows(
        model, calibration, {layer: range(width)}, sparsities=[0.75], experts=[1, 3], restarts=2,
        progress=False,
    )  # fmt: skip
    pd.testing.assert_frame_equal(
        found[rows.neurons.columns], rows.neurons, check_dtype=False, rtol=1e-4
    )


def test_tables_and_types(found: Decomposition) -> None:
    for name, types in COLUMNS.items():
        table = getattr(found, name)
        assert len(table) > 0
        assert table.dtypes.astype(str).to_dict() == types
        assert table.index.equals(pd.RangeIndex(len(table)))
        names = [f"model.layers.1.mlp.{key}_proj" for key in ("gate", "up", "down")]
        assert table["layer"].drop_duplicates().tolist() == names
    assert found.neurons.drop(columns="block").notna().all().all()
    assert set(found.neurons["flag"]) == {""}


def test_chosen_neurons(found: Decomposition) -> None:
    for layer, own in found.modes.groupby("layer"):
        wd = found.neurons.query("layer == @layer and experts == 1").set_index("neuron")["wd"]
        chosen = own["neuron"].drop_duplicates().tolist()
        assert chosen[:3] == wd.sort_values(ascending=False).index[:3].tolist()
        assert len(chosen) == 4
        distance = (wd - wd.median()).abs()
        assert distance[chosen[3]] == distance.min()
        for table in (found.outputs, found.pairs, found.separated, found.contexts):
            mine = table.loc[table["layer"] == layer, "neuron"]
            assert mine.drop_duplicates().tolist() == chosen


def test_improvement_of_every_expert_against_the_layer_itself(
    found: Decomposition, model: LanguageModel, text: CalibrationSet
) -> None:
    """The module's own inputs, weights given back by `fit_rows`, and errors summed in numpy."""
    layer = LAYERS["llama"]
    watched, seen = find_layers(model.module, layer)[0], list[np.ndarray]()
    hook = watched.module.register_forward_pre_hook(
        lambda _module, given: seen.append(given[0].detach().flatten(0, 1).numpy())
    )
    model.module(text.ids)
    hook.remove()
    tokens, dense = np.concatenate(seen), watched.weight.detach().numpy()
    rows = fit_rows(
        model, text, {layer: range(len(dense))}, sparsities=[0.75], experts=[1, 3], restarts=2,
        progress=False,
    )  # fmt: skip
    labels = rows.router(layer, 3).route(torch.from_numpy(tokens)).numpy()

    def squares(k: int, expert: int, own: np.ndarray) -> float:
        change = rows.weight(layer, range(len(dense)), k, 0.75)[expert].numpy() - dense
        return float(np.square(own @ change.T).sum())

    expected = [
        np.sqrt(squares(1, 0, tokens[labels == c]) / squares(3, c, tokens[labels == c]))
        for c in range(3)
    ]
    clusters = found.components.query("layer == @layer")
    np.testing.assert_allclose(clusters.query("experts == 3")["ri"], expected, rtol=1e-3)
    assert clusters.query("experts == 1")["ri"].tolist() == [1.0]


def test_improvement_needs_one_expert(model: LanguageModel, text: CalibrationSet) -> None:
    layer = LAYERS["llama"]
    without = decompose(model, text, layers=layer, **{**SMALL, "experts": [3]})
    assert without.components["ri"].isna().all()
    last = decompose(model, text, layers=layer, **{**SMALL, "experts": [3, 1]})
    first = decompose(model, text, layers=layer, **SMALL)
    key = ["experts", "cluster"]
    one, other = (table.components.set_index(key)["ri"].sort_index() for table in (first, last))
    pd.testing.assert_series_equal(one, other)


def test_distance_predicts_improvement_as_any_other_column(found: Decomposition) -> None:
    """A cluster is what `predictor_table` calls a neuron: its rows need no other shape."""
    clusters = found.components.rename(columns={"cluster": "neuron"}).query("experts == 3")
    table = predictor_table(clusters, "ri", predictors="sliced_wd", n_boot=10)
    own = clusters[clusters["layer"] == LAYERS["llama"]]
    expected = spearmanr(own["sliced_wd"], own["ri"]).statistic
    row = table[table["layer"] == LAYERS["llama"]]
    assert row["spearman"].tolist() == pytest.approx([expected])


def test_histograms_agree_with_the_neurons(found: Decomposition, text: CalibrationSet) -> None:
    key = ["layer", "neuron", "experts", "kind"]
    neurons = found.neurons.set_index(key[:3])
    for values, own in found.outputs.groupby(key):
        everything = own[own["cluster"] == -1]
        assert everything["count"].sum() == text.n_tokens
        parts = own[own["cluster"] >= 0].groupby(["left", "right"])["count"].sum()
        filled = everything.set_index(["left", "right"])["count"]
        assert parts[parts > 0].to_dict() == filled[filled > 0].to_dict()
        layer, neuron, experts, kind = values
        row = neurons.loc[[(layer, neuron, experts)]]
        if kind == "dense":
            middle = (everything["left"] + everything["right"]) / 2
            mean = float((middle * everything["count"]).sum() / text.n_tokens)
            assert mean == pytest.approx(row["mean"].iloc[0], abs=0.1 * row["std"].iloc[0])


def test_histograms_show_the_output_distance(found: Decomposition) -> None:
    neurons = found.neurons.set_index(["layer", "neuron", "experts"])
    for key, own in found.outputs.query("cluster == -1").groupby(list(neurons.index.names)):
        (dense, weights), (sparse, others) = (
            ((part["left"] + part["right"]) / 2, part["count"])
            for part in (own[own["kind"] == kind] for kind in ("dense", "sparse"))
        )
        row = neurons.loc[[key]]
        moved = wasserstein_distance(dense, sparse, weights, others) / row["std"].iloc[0]
        assert moved == pytest.approx(row["output_wd"].iloc[0], abs=0.05)


def test_a_layer_by_itself_is_the_same(
    found: Decomposition, model: LanguageModel, text: CalibrationSet
) -> None:
    """Gate and up share inputs, and are solved and measured together."""
    alone = decompose(model, text, layers=LAYERS["llama"], **SMALL)
    for name in COLUMNS:
        table = getattr(found, name)
        own = table[table["layer"] == LAYERS["llama"]].reset_index(drop=True)
        pd.testing.assert_frame_equal(getattr(alone, name), own, rtol=1e-4)


def test_dense_and_sparse_have_common_bins(found: Decomposition) -> None:
    for _, own in found.outputs.groupby(["layer", "neuron"]):
        edges = own[["left", "right"]].drop_duplicates().sort_values("left")
        assert (edges["right"].to_numpy()[:-1] <= edges["left"].to_numpy()[1:]).all()


def test_clusters_are_the_same_everywhere(found: Decomposition, text: CalibrationSet) -> None:
    """160 tokens are all on the map; gate and up share a router."""
    sizes = found.components.set_index(["layer", "experts", "cluster"])["tokens"]
    on_map = found.router_map.groupby(["layer", "experts", "cluster"]).size()
    assert on_map.to_dict() == sizes.to_dict()
    assert (sizes.groupby(["layer", "experts"]).sum() == text.n_tokens).all()
    counted = found.outputs.groupby(["layer", "neuron", "experts", "kind", "cluster"])[
        "count"
    ].sum()
    for key, counts in counted.groupby(["layer", "experts", "cluster"]):
        assert set(counts) == {sizes.to_dict().get(key, text.n_tokens)}
    gate, up = (
        found.router_map.query(f"layer == 'model.layers.1.mlp.{name}_proj'").drop(columns="layer")
        for name in ("gate", "up")
    )
    pd.testing.assert_frame_equal(gate.reset_index(drop=True), up.reset_index(drop=True))


def test_one_expert_is_the_reference(found: Decomposition) -> None:
    single = found.neurons.query("experts == 1").set_index(["layer", "neuron"])
    three = found.neurons.query("experts == 3").set_index(["layer", "neuron"])
    assert (single["ri"] == 1).all()
    assert (single["weighted_wd"] == single["wd"]).all()
    pd.testing.assert_series_equal(three["ri"], single["rmse"] / three["rmse"], check_names=False)
    assert (found.neurons["realised_sparsity"] == 0.75).all()


def test_summary(found: Decomposition) -> None:
    table = found.summary()
    assert table.columns.tolist() == [
        "layer", "neuron", "wd", "modes", "ri_1", "ri_3", "weighted_wd_change"
    ]  # fmt: skip
    assert len(table) == 12
    row = table.iloc[4]
    own = found.neurons.query("layer == @row.layer and neuron == @row.neuron").set_index("experts")
    assert row["ri_3"] == own["ri"][3]
    assert row["weighted_wd_change"] == own["weighted_wd"][3] / own["wd"][3] - 1
    assert row["modes"] == len(found.modes.query("layer == @row.layer and neuron == @row.neuron"))


def test_contexts_hold_the_tokens(found: Decomposition, text: CalibrationSet) -> None:
    tokenizer, ids = tiny_tokenizer(), text.ids.flatten().tolist()
    for row in found.separated.to_dict("records"):
        for side in "ab":
            start, end = row[f"start_{side}"], row[f"end_{side}"]
            assert row[f"context_{side}"][start:end] == row[f"token_{side}"]
            token = str(tokenizer.decode(ids[row[f"position_{side}"]]))
            assert row[f"token_{side}"] == {" ": "␣", "\n": "\\n"}.get(token, token)
        assert row["output_a"] < row["output_b"]


def test_chosen_by_name_and_without_the_reference(
    model: LanguageModel, text: CalibrationSet
) -> None:
    found = decompose(
        model, text, layers=LAYERS["llama"], neurons=np.array([7, 2]), **{**SMALL, "experts": [2]}
    )
    assert found.modes["neuron"].drop_duplicates().tolist() == [7, 2]
    assert found.neurons["ri"].isna().all()
    assert found.manifest["settings"]["neurons"] == [7, 2]  # type: ignore[index]
    assert found.summary().columns.tolist()[4:] == ["ri_2", "weighted_wd_change"]


def test_the_same_seed_gives_the_same_bytes(
    found: Decomposition, model: LanguageModel, text: CalibrationSet, tmp_path: Any
) -> None:
    found.save(tmp_path / "a")
    decompose(model, text, layers=1, proj="mlp", **SMALL).save(tmp_path / "b")
    other = decompose(model, text, layers=1, proj="mlp", **SMALL, seed=1)
    for name in COLUMNS:
        first, again = (tmp_path / run / f"{name}.parquet" for run in "ab")
        assert first.read_bytes() == again.read_bytes()
    assert not other.pairs.equals(found.pairs)
    assert not other.contexts.equals(found.contexts)


def test_little_memory_changes_nothing(
    found: Decomposition, model: LanguageModel, text: CalibrationSet
) -> None:
    """A layer then comes in several parts of rows, and every number of experts by itself."""
    tight = decompose(model, text, layers=1, proj="mlp", **SMALL, memory=2**20)
    for name in COLUMNS:
        pd.testing.assert_frame_equal(getattr(tight, name), getattr(found, name), rtol=1e-4)
    for name in ("pairs", "separated", "modes", "contexts"):
        pd.testing.assert_frame_equal(getattr(tight, name), getattr(found, name), check_exact=True)


def test_the_random_router_is_a_control(model: LanguageModel, text: CalibrationSet) -> None:
    found = decompose(model, text, layers=LAYERS["llama"], router="random", **SMALL)
    wd = found.neurons.query("experts == 3")
    assert (wd["weighted_wd"] > wd["wd"]).mean() > 0.5


def test_the_model_is_left_alone(
    model: LanguageModel, text: CalibrationSet, count_hooks: Callable[[nn.Module], int]
) -> None:
    before = model.module(text.ids).logits
    decompose(model, text, layers=LAYERS["llama"], **SMALL)
    assert torch.equal(model.module(text.ids).logits, before)
    assert count_hooks(model.module) == 0


def test_sparsity_zero_changes_no_output(model: LanguageModel, text: CalibrationSet) -> None:
    found = decompose(model, text, layers=LAYERS["llama"], **{**SMALL, "sparsity": 0.0})
    assert (found.neurons["rmse"] == 0).all()
    assert (found.components["error"] == 0).all()
    dense, sparse = (
        found.outputs.query(f"kind == '{kind}'").drop(columns="kind").reset_index(drop=True)
        for kind in ("dense", "sparse")
    )
    pd.testing.assert_frame_equal(dense, sparse)


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "layers": (
        {"layers": "model.layers.1.mlp.upproj"},
        UnknownName,
        r"'model\.layers\.1\.mlp\.upproj'",
    ),
    "block": ({"layers": 3}, InvalidInput, r"index.*\b0\b.*2.*\b3\b"),
    "proj": ({"layers": 1, "proj": "upp"}, UnknownName, "'upp'"),
    "neuron": ({"neurons": [48]}, InvalidInput, r"\b0\b.*47.*\b48\b"),
    "experts": ({"experts": (1, 0)}, InvalidInput, r"`experts`.*got 0"),
    "no experts": ({"experts": ()}, InvalidInput, r"`experts`.*got \(\)"),
    "experts twice": ({"experts": (2, 2)}, InvalidInput, r"`experts`.*got \[2, 2\]"),
    "tokens": (
        {"experts": (1, 161)},
        InvalidInput,
        r"`experts`.*\b160\b.*\b161\b",
    ),
    "sparsity": ({"sparsity": 1.1}, InvalidInput, r"`sparsity`.*\[0, 1\].*\b1\.1\b"),
    "pruner": ({"pruner": "obs"}, UnknownName, "'obs'"),
    "contexts": ({"contexts": -1}, InvalidInput, r"`contexts`.*\b0\b"),
    "token pairs": ({"token_pairs": -1}, InvalidInput, r"`token_pairs`.*\b0\b"),
    "separated": ({"separated": -1}, InvalidInput, r"`separated`.*\b0\b"),
    "near": ({"near": 0.0}, InvalidInput, r"`near`.*\(0, 1\]"),
    "seed": ({"seed": -1}, InvalidInput, r"`seed`.*-1\b"),
    "memory": ({"memory": 5}, InvalidInput, r"`memory`.*\b5\b"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, model: LanguageModel, text: CalibrationSet) -> None:
    changed, kind, message = MISTAKES[case]
    with pytest.raises(kind, match=message):
        decompose(model, text, **{"layers": LAYERS["llama"], **SMALL, **changed})


def test_neurons_that_do_not_fit_into_memory(model: LanguageModel, tmp_path: Any) -> None:
    ids = torch.randint(4, 100, (20, 100), generator=torch_rng(0, "long"))
    text = CalibrationSet(ids, "random", {})
    with pytest.raises(MemoryLimit, match=r"\b48\b.*\b4\b.*MiB.*\b0\b.*MiB"):
        decompose(
            model, text, layers=LAYERS["llama"], neurons=range(48), memory=2**20, progress=False
        )


def test_broken_weights_name_the_layer(text: CalibrationSet) -> None:
    module = TINY["llama"]()
    module.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj.*\b48\b.*\b48\b.*\bNaN\b"):
        decompose(module, text, layers=LAYERS["llama"], **SMALL)


def test_a_layer_that_never_varies(text: CalibrationSet) -> None:
    module = TINY["gpt2"]()
    module.get_parameter("transformer.h.1.mlp.c_fc.weight").zero_()
    with pytest.raises(InvalidInput, match=r"'transformer\.h\.1\.mlp\.c_fc'"):
        decompose(module, text, layers=LAYERS["gpt2"], **SMALL)
    found = decompose(module, text, layers=LAYERS["gpt2"], neurons=[1], **SMALL)
    assert set(found.neurons["flag"]) == {"constant"}
    assert found.modes["share"].tolist() == [1.0]
    assert len(found.separated) == 0
    assert found.pairs["output_normalised"].isna().all()
    assert found.components["error"].isna().all()
    assert found.summary()["modes"].tolist() == [1]


def test_no_room_for_pairs_and_contexts(model: LanguageModel, text: CalibrationSet) -> None:
    none = {"contexts": 0, "token_pairs": 0, "separated": 0}
    found = decompose(model, text, layers=LAYERS["llama"], **{**SMALL, **none})
    assert [len(found.contexts), len(found.pairs), len(found.separated)] == [0, 0, 0]
    assert found.pairs.dtypes.astype(str).to_dict() == COLUMNS["pairs"]


@pytest.mark.gpu
def test_on_a_gpu(found: Decomposition, text: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]().to("cuda"), tiny_tokenizer())
    there, again = (decompose(model, text, layers=1, proj="mlp", **SMALL) for _ in range(2))
    for name in COLUMNS:
        pd.testing.assert_frame_equal(getattr(again, name), getattr(there, name))
    for column in ("wd", "md", "rmse", "weighted_wd", "weighted_md", "output_wd"):
        np.testing.assert_allclose(there.neurons[column], found.neurons[column], rtol=0.01)
    assert there.components["tokens"].equals(found.components["tokens"])
    pd.testing.assert_frame_equal(there.pairs, found.pairs, rtol=1e-3)


class _NoBlocks(nn.Module):
    """An embedding and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(112, 8), nn.Linear(8, 24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(self.table(ids))
        return outputs


def test_a_model_without_blocks(text: CalibrationSet) -> None:
    with pytest.raises(InvalidInput, match="ModuleList"):
        decompose(_NoBlocks(), text, layers=1, **SMALL)
    found = decompose(_NoBlocks(), text, layers="layer", **SMALL)
    assert found.neurons["block"].isna().all()
    assert len(found.neurons) == 48


def test_a_layer_outside_the_blocks(model: LanguageModel, text: CalibrationSet) -> None:
    found = decompose(model, text, layers="lm_head", **SMALL)
    assert found.neurons["block"].isna().all()
    assert len(found.neurons) == 2 * 112


def test_one_token() -> None:
    text = CalibrationSet(torch.tensor([[5]]), "one", {})
    with pytest.raises(InvalidInput, match=r"'model\.layers\.1\.mlp\.up_proj'.*outputs"):
        decompose(TINY["llama"](), text, layers=LAYERS["llama"], **{**SMALL, "experts": (1,)})
