from collections.abc import Callable, Mapping

import numpy as np
import ot
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from entangle.errors import EntangleError, InvalidInput, NumericalError, UnknownName
from entangle.experts.expand import expand
from entangle.experts.linear import ExpandedLinear, installed
from entangle.experts.routed_rows import RoutedRows, fit_rows
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.pruning import prune
from entangle.texts.calibration_set import CalibrationSet
from tests.reference import routed_rows as reference
from tests.reference.mapping_difficulty import mapping_difficulty
from tests.tiny_models import TINY

DECODERS = [name for name in TINY if name not in ("bert", "mixtral")]
GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
ROWS: Mapping[str, list[int]] = {GATE: [7, 2, 40], UP: [2, 11], DOWN: [31, 0]}
Tiny = Callable[[str], LanguageModel]


def fit(model: LanguageModel, calibration: CalibrationSet, **settings: object) -> RoutedRows:
    chosen: dict[str, object] = {
        "rows": ROWS, "sparsities": [0.5, 0.8], "experts": [1, 3], "restarts": 2, "progress": False
    }  # fmt: skip
    return fit_rows(model, calibration, **{**chosen, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted(tiny: Tiny, calibration: CalibrationSet) -> RoutedRows:
    return fit(tiny("llama"), calibration)


def every_row(layers: tuple[Layer, ...]) -> dict[str, np.ndarray]:
    return {layer.name: np.arange(layer.out_features) for layer in layers}


def inputs_of(model: LanguageModel, name: str, calibration: CalibrationSet) -> Tensor:
    """Return what a layer receives in plain forward passes of the dense model."""
    seen: list[Tensor] = []
    layer = model.module.get_submodule(name)
    with layer.register_forward_hook(lambda _m, args, _o: seen.append(args[0])):
        model.module(calibration.ids)
    return torch.cat(seen).flatten(0, -2)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_all_rows_of_the_first_block_are_those_of_expand(
    name: str, experts: int, tiny: Tiny, calibration: CalibrationSet
) -> None:
    model = tiny(name)
    layers = find_layers(model.module, 0, "mlp")
    found = fit(model, calibration, rows=every_row(layers), experts=[experts], sparsities=[0.6])
    whole = expand(
        model, calibration, experts=experts, sparsity=0.6, layers=0, restarts=2, progress=False
    ).model
    assert whole is not None
    for layer in layers:
        module = whole.module.get_submodule(layer.name)
        assert isinstance(module, ExpandedLinear)
        weight = found.weight(layer.name, range(layer.out_features), experts, 0.6)
        torch.testing.assert_close(weight, module.weight.detach(), rtol=0, atol=1e-6)
        assert torch.equal(weight == 0, module.weight == 0)
        router = found.router(layer.name, experts)
        assert torch.equal(router.centroids, module.routing.router.centroids)
        assert torch.equal(router.components, module.routing.router.components)


def test_one_expert_is_the_plainly_pruned_row(
    tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows
) -> None:
    for name, rows in ROWS.items():
        x = inputs_of(tiny("llama"), name, calibration)
        layer = find_layers(tiny("llama").module, name)[0]
        plain = prune(layer.weight, x.T @ x, sparsity=0.5, rows=torch.tensor(rows)).weight[rows]
        weight = fitted.weight(name, rows, 1, 0.5)[0]
        assert torch.equal(weight == 0, plain == 0)
        torch.testing.assert_close(weight, plain, rtol=1e-4, atol=1e-5)


def test_zeros_are_exact_in_every_expert(fitted: RoutedRows) -> None:
    for name, rows in ROWS.items():
        for k in (1, 3):
            for sparsity in (0.5, 0.8):
                weight = fitted.weight(name, rows, k, sparsity)
                zeros = round(sparsity * weight.shape[2])
                assert (weight == 0).sum(2).eq(zeros).all()
                arm = "layer == @name and experts == @k and sparsity == @sparsity"
                own = fitted.neurons.query(arm)["realised_sparsity"]
                assert own.eq(zeros / weight.shape[2]).all()


@pytest.mark.parametrize("name", DECODERS)
def test_sparsity_zero_is_the_dense_model_bit_for_bit(
    name: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    model = tiny(name)
    rows = {layer.name: [3, 1, 8] for layer in find_layers(model.module, [0, 2], "mlp")}
    found = fit(model, calibration, rows=rows, sparsities=[0.0, 0.9])
    ids = calibration.ids[:3]
    dense = model.module(ids).logits
    with installed(model.module, found.modules(model, rows, 3, 0.0)):
        assert torch.equal(model.module(ids).logits, dense)
    with installed(model.module, found.modules(model, rows, 3, 0.9)):
        assert not torch.equal(model.module(ids).logits, dense)
    assert torch.equal(model.module(ids).logits, dense)
    table = found.neurons.query("sparsity == 0")
    assert (table["rmse"] == 0).all()
    assert (table["output_wd"] == 0).all()


@pytest.mark.parametrize("kind", ["kmeans", "random"])
def test_measures_against_plain_loops(kind: str, tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny("llama")
    found = fit(model, calibration, router=kind)
    for name, rows in ROWS.items():
        x = inputs_of(model, name, calibration)
        dense = x.double() @ find_layers(model.module, name)[0].weight.double()[rows].T
        clusters = [int(found.router(name, 3).route(token)) for token in x]
        weight = found.weight(name, rows, 3, 0.8).double().numpy()
        sparse = reference.routed_outputs(x.double().numpy(), clusters, weight, None)
        table = found.neurons.query("layer == @name and experts == 3 and sparsity == 0.8")
        for place, row in enumerate(rows):
            measured = table.set_index("neuron").loc[row]
            a, b = dense[:, place].numpy(), sparse[:, place]
            assert measured["rmse"] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=1e-4)
            distance = float(ot.emd2_1d(a, b, metric="euclidean")) / a.std()
            assert measured["output_wd"] == pytest.approx(distance, rel=1e-3, abs=1e-6)
            weighted = reference.weighted_wd(a, clusters)
            assert measured["weighted_wd"] == pytest.approx(weighted, abs=1e-5)
            assert measured["wd"] == pytest.approx(reference.weighted_wd(a, [0] * len(a)), abs=1e-5)
            assert measured["smallest_cluster"] == min(clusters.count(c) for c in range(3))


def test_mapping_difficulty_of_all_tokens(
    tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows
) -> None:
    from entangle.stats.mapping_difficulty import draw_pairs

    x = inputs_of(tiny("llama"), GATE, calibration)
    outputs = x @ find_layers(tiny("llama").module, GATE)[0].weight[7]
    pairs = [(a, b) for a, b in draw_pairs(len(x), seed=0).T.tolist()]
    expected = mapping_difficulty(outputs.tolist(), x.tolist(), pairs)
    table = fitted.neurons.query("layer == @GATE and neuron == 7")
    assert table["md"].to_numpy() == pytest.approx(expected, rel=1e-4)
    single = table.query("experts == 1")
    assert (single["weighted_md"] == single["md"]).all()
    assert (table.query("experts == 3")["weighted_md"] != single["md"].iloc[0]).all()


def test_relative_improvement(tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows) -> None:
    wide = fitted.neurons.pivot_table(
        index=["layer", "neuron", "sparsity"], columns="experts", values=["rmse", "ri"]
    )
    assert (wide["ri", 1] == 1).all()
    np.testing.assert_allclose(wide["ri", 3], wide["rmse", 1] / wide["rmse", 3])
    assert wide["ri", 3].between(0.5, 5).all()
    assert fit(tiny("llama"), calibration, experts=[3]).neurons["ri"].isna().all()


def test_the_frame_has_one_row_an_arm(fitted: RoutedRows) -> None:
    columns = ["layer", "neuron", "experts", "sparsity"]
    expected = [
        (name, row, k, sparsity)
        for name, rows in ROWS.items()
        for row in sorted(rows)
        for k in (1, 3)
        for sparsity in (0.5, 0.8)
    ]
    assert list(fitted.neurons[columns].itertuples(index=False, name=None)) == expected
    assert set(fitted.neurons["block"]) == {1}
    assert not fitted.neurons.isna().any().any()


def test_a_row_does_not_depend_on_what_else_is_fitted(
    tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows
) -> None:
    rows = {"model.layers.0.mlp.up_proj": [1], UP: [11], DOWN: [0, 4]}
    alone = fit(tiny("llama"), calibration, rows=rows, sparsities=[0.8], experts=[3])
    torch.testing.assert_close(
        alone.weight(UP, [11], 3, 0.8), fitted.weight(UP, [11], 3, 0.8), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        alone.weight(DOWN, [0], 3, 0.8), fitted.weight(DOWN, [0], 3, 0.8), rtol=0, atol=1e-6
    )


def test_rows_come_in_the_order_asked_for(fitted: RoutedRows) -> None:
    whole = fitted.weight(GATE, [2, 7, 40], 3, 0.5)
    assert torch.equal(fitted.weight(GATE, [40, 2], 3, 0.5), whole[:, [2, 0]])
    assert fitted.weight(GATE, [], 3, 0.5).shape == (3, 0, 32)


def test_layers_of_one_input_share_router_and_routing(tiny: Tiny, fitted: RoutedRows) -> None:
    made = fitted.modules(tiny("llama"), {**ROWS, GATE: [2]}, 3, 0.5)
    assert list(made) == [GATE, UP, DOWN]
    assert made[GATE].rows.tolist() == [2]
    assert made[GATE].routing is made[UP].routing
    assert made[GATE].routing is not made[DOWN].routing
    assert fitted.router(GATE, 3) is fitted.router(UP, 3)
    assert list(fitted.modules(tiny("llama"), {GATE: [2], UP: []}, 3, 0.5)) == [GATE]
    assert fitted.modules(tiny("llama").module, ROWS, 1, 0.5)[GATE].routing is None


def test_installed_modules_put_out_the_routed_rows(
    tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows
) -> None:
    model = tiny("llama")
    x = inputs_of(model, GATE, calibration)
    made = fitted.modules(model, {GATE: ROWS[GATE]}, 3, 0.8)
    outputs = made[GATE](x)
    error = outputs - model.module.get_submodule(GATE)(x)
    table = fitted.neurons.query("layer == @GATE and experts == 3 and sparsity == 0.8")
    expected = table.set_index("neuron")["rmse"].loc[ROWS[GATE]]
    np.testing.assert_allclose(error[:, ROWS[GATE]].square().mean(0).sqrt(), expected, rtol=1e-4)


@pytest.mark.usefixtures("any_memory")
def test_less_memory_gives_the_same(
    tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows
) -> None:
    small = fit(tiny("llama"), calibration, memory=1)
    pd.testing.assert_frame_equal(small.neurons, fitted.neurons, rtol=1e-4, atol=1e-7)


def test_rows_solved_in_parts_are_the_same(
    tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entangle.experts.rows._SOLVE_BYTES", 1)
    monkeypatch.setattr("entangle.experts.solver._WORK_BYTES", 1)
    parts = fit(tiny("llama"), calibration)
    for name, rows in ROWS.items():
        for arm in ((1, 0.5), (3, 0.8)):
            torch.testing.assert_close(
                parts.weight(name, rows, *arm), fitted.weight(name, rows, *arm), rtol=0, atol=1e-6
            )
    pd.testing.assert_frame_equal(parts.neurons, fitted.neurons, rtol=1e-4)


def test_the_same_seed_gives_the_same_bytes(
    tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows
) -> None:
    again = fit(tiny("llama"), calibration)
    pd.testing.assert_frame_equal(again.neurons, fitted.neurons, check_exact=True)
    other = fit(tiny("llama"), calibration, seed=1)
    assert not other.neurons["weighted_md"].equals(fitted.neurons["weighted_md"])


def test_clusters_below_the_rank_are_counted(tiny: Tiny, calibration: CalibrationSet) -> None:
    table = fit(tiny("llama"), calibration, experts=[1, 40]).neurons
    assert (table.query("experts == 1")["shrunk"] == 0).all()
    assert (table.query("experts == 40")["shrunk"] > 20).all()


def test_the_model_is_left_as_it_was(
    calibration: CalibrationSet, count_hooks: Callable[[nn.Module], int]
) -> None:
    model = as_language_model(TINY["gpt2"]())
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    rows = {layer.name: [0, 5] for layer in find_layers(model.module, 1, "mlp")}
    fit(model, calibration, rows=rows)
    assert count_hooks(model.module) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_mapping_difficulty_can_be_left_out(
    tiny: Tiny, calibration: CalibrationSet, fitted: RoutedRows
) -> None:
    found = fit(tiny("llama"), calibration, md=False).neurons
    left = [name for name in fitted.neurons if "md" not in str(name)]
    pd.testing.assert_frame_equal(found, fitted.neurons[left])


def test_activations_that_are_not_finite_name_the_layers(calibration: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]())
    with torch.no_grad():
        find_layers(model.module, 0, "down_proj")[0].weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.gate_proj.*layers\.1\.mlp\.up_proj"):
        fit(model, calibration)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsities": []}, "`sparsities`"),
        ({"sparsities": [0.5, 1.2]}, "`sparsities`"),
        ({"sparsities": [0.5, 0.5]}, "`sparsities`"),
        ({"sparsities": [float("nan")]}, "`sparsities`"),
        ({"experts": []}, "`experts`"),
        ({"experts": [0]}, "`experts`"),
        ({"experts": [4, 4]}, "`experts`"),
        ({"experts": [1000]}, r"`k`.*\b1000\b"),
        ({"pruner": "nosuch"}, "nosuch"),
        ({"seed": -1}, "`seed`"),
        ({"rows": {}}, r"`rows`.*neuron"),
        ({"rows": {GATE: []}}, r"`rows`.*neuron"),
        ({"rows": {GATE: [48]}}, r"`rows`.*lie.*\[0, 48\)"),
        ({"rows": {GATE: [-1]}}, r"gate_proj.*-1\b"),
        ({"rows": {GATE: np.array([1.5])}}, r"gate_proj.*\b1\.5\b"),
        ({"rows": {GATE: np.array([[1]])}}, r"rows.*gate_proj.*got array"),
        ({"rows": {GATE[:-1]: [1]}}, "Closest"),
        ({"rows": {"lm_head": [1]}}, r"'lm_head'.*outside"),
    ],
)
def test_bad_settings_are_one_clear_line(
    settings: dict[str, object], message: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    with pytest.raises(EntangleError, match=message):
        fit(tiny("llama"), calibration, **settings)


def test_what_was_not_fitted_is_refused(fitted: RoutedRows) -> None:
    with pytest.raises(UnknownName, match=r"'model\.layers\.0\.mlp\.up_proj'"):
        fitted.weight("model.layers.0.mlp.up_proj", [1], 1, 0.5)
    with pytest.raises(InvalidInput, match=r"`rows`.*\b3\b.*union"):
        fitted.weight(GATE, [2, 3], 1, 0.5)
    with pytest.raises(InvalidInput, match=r"`k`.*\b2\b"):
        fitted.weight(GATE, [2], 2, 0.5)
    with pytest.raises(InvalidInput, match=r"`sparsity`.*\b0\.7\b"):
        fitted.weight(GATE, [2], 1, 0.7)


def test_a_layer_that_never_runs_is_refused(calibration: CalibrationSet) -> None:
    model = TINY["llama"]()
    model.get_submodule("model.layers.1.mlp").add_module("spare", nn.Linear(32, 32))
    rows = {GATE: [1], "model.layers.1.mlp.spare": [1]}
    with pytest.raises(InvalidInput, match=r"mlp\.spare"):
        fit(as_language_model(model), calibration, rows=rows)
