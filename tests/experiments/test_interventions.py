import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.experiments.interventions import (
    OUTPUT_EDITS,
    RowEdit,
    edited_outputs,
    mean_outputs,
    pruned_rows,
    swapped_rows,
)
from entangle.experiments.selection import Selection
from entangle.models.layers import Layer, find_layers, list_layers
from entangle.recording import hooks
from entangle.recording.hooks import observe
from entangle.scoring.score import score
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.experiments.toys import bits, differing, identity, toy
from tests.tiny_models import CONFIGS, TINY

CountHooks = Callable[[nn.Module], int]
ARCHITECTURES = sorted(CONFIGS)
FORMULAS: dict[str, Callable[[float, float], float]] = {
    "zero": lambda y, mean: 0.0,
    "mean": lambda y, mean: mean,
    "clamp-negative": lambda y, mean: max(y, 0.0),
    "clamp-positive": lambda y, mean: min(y, 0.0),
    "flip-negative": lambda y, mean: -y if y < 0 else y,
}


def every_third(layers: tuple[Layer, ...]) -> Selection:
    rows = {layer.name: np.arange(1, layer.out_features, 3) for layer in layers}
    return Selection("listed", None, None, rows)


def random_edits(layers: tuple[Layer, ...]) -> list[RowEdit]:
    """New weights for rows 5, 0 and 2 of every layer."""
    rows, rng = torch.tensor([5, 0, 2]), torch_rng(0, "rows")
    return [
        RowEdit(layer, rows, torch.randn(3, layer.in_features, generator=rng)) for layer in layers
    ]


def chosen(rows: list[int], name: str = "0") -> Selection:
    return Selection("listed", None, None, {name: np.array(rows)})


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def without_experts(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Leave out experts, which a few tokens may not reach (`tests.experiments.test_mixtures`)."""
    return tuple(layer for layer in layers if ".experts." not in layer.name)


def fail() -> None:
    raise ValueError("inside the block")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_swapped_rows_come_back_bit_for_bit(name: str, calibration: CalibrationSet) -> None:
    module = TINY[name]()
    before, objects = bits(module), list(module.parameters())
    layers = without_experts(find_layers(module, 1))
    edits = random_edits(layers)

    def use(stop: Callable[[], None]) -> None:
        for layer, edit in zip(layers, edits, strict=True):
            assert torch.equal(layer.weight[edit.rows], edit.weight)
        assert differing(before, bits(module)) == {f"{layer.name}.weight" for layer in layers}
        module(calibration.ids)
        stop()

    for stop, error in ((interrupt, KeyboardInterrupt), (fail, ValueError)):
        with pytest.raises(error), swapped_rows(edits):
            use(stop)
        assert differing(before, bits(module)) == set()
    assert all(one is two for one, two in zip(objects, module.parameters(), strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_rows_named_change(name: str, calibration: CalibrationSet) -> None:
    module = TINY[name]()
    layer = find_layers(module, 1)[-1]
    dense, seen = layer.weight.clone(), list[Tensor]()

    def note(_layer: Layer, _inputs: Tensor, outputs: Tensor) -> None:
        seen.append(outputs.clone())

    with observe([layer], note):
        module(calibration.ids)
        with swapped_rows(random_edits((layer,))):
            changed = (layer.weight != dense).any(1).nonzero()[:, 0]
            module(calibration.ids)
    assert changed.tolist() == [0, 2, 5]
    moved = (seen[0] - seen[1]).abs().flatten(0, -2).amax(0)
    rest = [row for row in range(layer.out_features) if row not in (0, 2, 5)]
    assert moved[[0, 2, 5]].min() > 0.01
    assert moved[rest].max() < 1e-5  # other rows of the product may be summed in another order


def test_bits_that_compare_as_unequal_come_back() -> None:
    layer = toy([[1.0, 2.0], [3.0, 4.0]], [0.0, 0.0])
    weird = torch.tensor([[0x7FC01234, -(2**31)], [0x7F812345, 1]], dtype=torch.int32)
    layer.module.get_parameter("weight").data.copy_(weird.view(torch.float32))
    before = bits(layer.module)
    with swapped_rows([RowEdit(layer, torch.tensor([1, 0]), torch.ones(2, 2))]):
        assert torch.equal(layer.weight, torch.ones(2, 2))
    assert differing(before, bits(layer.module)) == set()


def test_a_write_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = TINY["gpt2"]()
    before, layers, write, calls = bits(module), find_layers(module, 1), hooks._write, [0]

    def half(weight: Tensor, rows: Tensor, values: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 2:
            write(weight, rows[:1], values[:1])
            assert len(differing(before, bits(module))) == 2
            interrupt()
        write(weight, rows, values)

    monkeypatch.setattr(hooks, "_write", half)
    with pytest.raises(KeyboardInterrupt), swapped_rows(random_edits(layers)):
        pytest.fail("the block must not run")
    assert calls == [4]
    assert differing(before, bits(module)) == set()


def test_swaps_nest_and_the_later_one_holds() -> None:
    layer = identity()
    one, two = torch.tensor([0, 1]), torch.tensor([1, 2])
    outer, inner = (
        RowEdit(layer, one, torch.full((2, 3), 5.0)),
        RowEdit(layer, two, torch.ones(2, 3)),
    )
    with swapped_rows([outer]):
        with swapped_rows([inner]):
            assert layer.weight[:, 0].tolist() == [5, 1, 1]
        assert layer.weight[:, 0].tolist() == [5, 5, 0]
    with swapped_rows([outer, inner]):
        assert layer.weight[:, 0].tolist() == [5, 1, 1]
    assert torch.equal(layer.weight, torch.eye(3))


def test_rows_of_a_tied_head_change_alone(calibration: CalibrationSet) -> None:
    """As if the head had a weight of its own."""
    module, untied = TINY["gpt2"](), TINY["gpt2"]()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())  # type: ignore
    before, plain = bits(module), module(calibration.ids).logits
    (head,), (own,) = find_layers(module, "lm_head"), find_layers(untied, "lm_head")
    assert head.shared == ("transformer.wte.weight",)
    assert (head.writable, own.writable) == (False, True)
    edits = random_edits((head,))
    with swapped_rows(edits):
        assert differing(before, bits(module)) == set()
        changed = module(calibration.ids).logits
    with swapped_rows([RowEdit(own, edits[0].rows, edits[0].weight)]):
        torch.testing.assert_close(changed, untied(calibration.ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(module(calibration.ids).logits, plain)


@pytest.mark.parametrize(
    ("rows", "weight", "error"),
    [
        ([0, 3], torch.zeros(2, 3), r"int64.*\b0\b.*2.*\[0, 3\].*torch\.int64"),
        ([-1], torch.zeros(1, 3), r"'0'.*\[-1\]"),
        ([0, 0], torch.zeros(2, 3), r"'0'.*named"),
        ([0.0], torch.zeros(1, 3), r"torch\.float32"),
        ([[0]], torch.zeros(1, 3), r"'0'.*\(1, 1\)"),
        ([0], torch.zeros(2, 3), r"\(1, 3\).*torch\.float32.*\(2, 3\)"),
        ([0], torch.zeros(1, 3).bfloat16(), r"\(1, 3\).*torch\.bfloat16"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(
    rows: list[int], weight: Tensor, error: str
) -> None:
    layer = identity()
    good = RowEdit(layer, torch.tensor([1]), torch.full((1, 3), 7.0))
    with (
        pytest.raises(InvalidInput, match=error),
        swapped_rows([good, RowEdit(layer, torch.tensor(rows), weight)]),
    ):
        pytest.fail("the block must not run")
    assert torch.equal(layer.weight, torch.eye(3))


def test_offloaded_weights_are_refused() -> None:
    layer = list_layers(nn.Sequential(nn.Linear(3, 3, device="meta")))[0]
    row = torch.tensor([0])
    with (
        pytest.raises(InvalidInput, match=r"'0'.*offloaded"),
        swapped_rows([RowEdit(layer, row, torch.zeros(1, 3))]),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(InvalidInput, match=r"'0'.*offloaded"):
        pruned_rows(layer, None, row, 0.5, pruner="magnitude")


@pytest.mark.parametrize("kind", sorted(FORMULAS))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_selected_outputs_change(
    name: str, kind: str, calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = TINY[name]()
    weights, layers = bits(module), without_experts(find_layers(module, 1))
    selection = every_third(layers)
    means = {layer.name: torch.randn(layer.out_features).double() for layer in layers}
    dense: dict[str, Tensor] = {}
    edited: dict[str, Tensor] = {}

    def into(found: dict[str, Tensor]) -> Callable[[Layer, Tensor, Tensor], None]:
        return lambda layer, _inputs, outputs: found.update({layer.name: outputs.clone()})

    with (
        observe(layers, into(dense)),
        edited_outputs(layers, selection, kind, means=means),
        observe(layers, into(edited)),
    ):
        module(calibration.ids)
    assert dense.keys() == edited.keys() == selection.rows.keys()
    for layer, rows in selection.rows.items():
        expected = dense[layer].clone()
        for row in rows:
            values = [
                FORMULAS[kind](y, float(means[layer][row]))
                for y in dense[layer][..., row].flatten().tolist()
            ]
            expected[..., row] = torch.tensor(values).view(expected.shape[:-1])
        assert torch.equal(edited[layer], expected)
        assert not torch.equal(edited[layer], dense[layer])
    assert count_hooks(module) == 0
    assert differing(weights, bits(module)) == set()


def run(layer: Layer, values: list[float]) -> list[float]:
    outputs: list[float] = layer.module(torch.tensor([values])).flatten().tolist()
    return outputs


@pytest.mark.parametrize(
    ("kind", "strength", "expected"),
    [
        ("zero", 1.0, [0, -2, 0]),
        ("mean", 1.0, [10, -2, 30]),
        ("clamp-negative", 1.0, [0, -2, 4]),
        ("clamp-positive", 1.0, [-1, -2, 0]),
        ("flip-negative", 1.0, [1, -2, 4]),
        ("zero", 0.25, [-0.75, -2, 3]),
        ("mean", 0.5, [4.5, -2, 17]),
        ("clamp-negative", 0.75, [-0.25, -2, 4]),
        ("flip-negative", 0.25, [-0.5, -2, 4]),
    ],
)
def test_edits_by_hand(kind: str, strength: float, expected: list[float]) -> None:
    layer, means = identity(), {"0": torch.tensor([10.0, 20.0, 30.0])}
    with edited_outputs([layer], chosen([0, 2]), kind, strength=strength, means=means):
        assert run(layer, [-1.0, -2.0, 4.0]) == expected
    assert run(layer, [-1.0, -2.0, 4.0]) == [-1, -2, 4]


def test_strength_zero_changes_no_bit(calibration: CalibrationSet, count_hooks: CountHooks) -> None:
    module = TINY["llama"]()
    layers, plain = find_layers(module, 1), module(calibration.ids).logits
    with edited_outputs(layers, every_third(layers), "zero", strength=0):
        assert count_hooks(module) == 0
        assert torch.equal(module(calibration.ids).logits, plain)
    with edited_outputs(layers, every_third(layers), "zero", strength=1e-3):
        assert not torch.equal(module(calibration.ids).logits, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", sorted(OUTPUT_EDITS))
def test_the_dtype_is_kept_and_untouched_outputs_keep_their_bits(
    dtype: torch.dtype, kind: str
) -> None:
    layer, x = identity(dtype), torch.randn(50, 3, generator=torch_rng(0, "x")).to(dtype)
    plain, means = layer.module(x), {"0": torch.ones(3)}
    with edited_outputs([layer], chosen([2, 0]), kind, strength=0.3, means=means):
        found = layer.module(x)
    assert found.dtype == dtype
    keeps = {
        "clamp-negative": plain >= 0,
        "clamp-positive": plain <= 0,
        "flip-negative": plain >= 0,
    }
    same = keeps.get(kind, torch.zeros_like(plain, dtype=torch.bool))
    same[:, 1] = True
    assert torch.equal(found == plain, same)


def test_edits_and_swaps_combine_and_all_end(
    calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = TINY["phi3"]()
    before, layers = bits(module), find_layers(module, "all", "mlp")
    plain, selection = module(calibration.ids).logits, every_third(layers)

    def use(stack: ExitStack) -> None:
        stack.enter_context(swapped_rows(random_edits(layers)))
        stack.enter_context(edited_outputs(layers, selection, "clamp-negative"))
        stack.enter_context(edited_outputs(layers, selection, "zero", strength=0.5))
        assert count_hooks(module) == 2 * len(layers)
        assert not torch.equal(module(calibration.ids).logits, plain)
        interrupt()

    with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
        use(stack)
    assert count_hooks(module) == 0
    assert differing(before, bits(module)) == set()
    assert torch.equal(module(calibration.ids).logits, plain)


@pytest.mark.parametrize(
    ("kind", "selection", "options", "error"),
    [
        ("zeros", chosen([0]), {}, r"outputs.*'zeros'"),
        ("zero", chosen([0], "1"), {}, r"'1'.*\b0\b"),
        ("zero", chosen([3]), {}, r"int64.*\b0\b.*2.*\[3\]"),
        ("zero", chosen([0]), {"strength": 1.5}, r"`strength`.*\[0, 1\].*\b1\.5\b"),
        ("zero", chosen([0]), {"strength": float("nan")}, r"`strength`.*\bnan\b"),
        ("mean", chosen([0]), {}, r"`means`.*'0'.*\bNone\b"),
        ("mean", chosen([0]), {"means": {"1": torch.ones(3)}}, "'1'"),
        ("mean", chosen([0]), {"means": {"0": torch.ones(2)}}, r"`means`.*\b3\b.*\(2,\)"),
        ("mean", chosen([1]), {"means": {"0": torch.tensor([0, torch.nan, 0])}}, "finite"),
    ],
)  # fmt: skip
def test_edits_that_are_refused(
    kind: str, selection: Selection, options: dict[str, float], error: str
) -> None:
    layer = identity()
    with (
        pytest.raises(InvalidInput, match=error),
        edited_outputs([layer], selection, kind, **options),  # type: ignore[arg-type]
    ):
        pytest.fail("the block must not run")
    assert run(layer, [1.0, 2.0, 3.0]) == [1, 2, 3]


def test_means_come_from_the_scores(calibration: CalibrationSet) -> None:
    module = TINY["llama"]()
    layer = find_layers(module, 1, "gate_proj")[0]
    frame = score(module, calibration, layers=1, proj=None).frame
    outputs: list[Tensor] = []
    with observe([layer], lambda _layer, _inputs, found: outputs.append(found)):
        module(calibration.ids)
    means = mean_outputs(frame.sample(frac=1, random_state=0))
    assert means.keys() == set(frame["layer"])
    mean = outputs[0].double().flatten(0, -2).mean(0)
    torch.testing.assert_close(means[layer.name], mean, rtol=1e-5, atol=1e-6)
    assert mean_outputs(frame[frame["neuron"] != 3])[layer.name].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_a_constant_neuron_is_set_to_its_constant(
    calibration: CalibrationSet, method: Literal["exact", "sketch"]
) -> None:
    module = TINY["gpt_neox"]()
    layer = find_layers(module, 1, "dense_h_to_4h")[0]
    layer.weight[3] = 0.0  # its bias is left
    scores = score(module, calibration, layers=1, proj="mlp", method=method)
    assert scores.frame.query("flag == 'constant'")["neuron"].tolist() == [3]
    means = mean_outputs(scores)
    assert layer.bias is not None
    assert means[layer.name][3].item() == pytest.approx(layer.bias[3].item(), rel=1e-6)
    others = torch.arange(layer.out_features) != 3
    plain = mean_outputs(scores.frame)[layer.name]
    assert torch.equal(means[layer.name][others], plain[others])
    logits = module(calibration.ids).logits
    with edited_outputs([layer], chosen([3], layer.name), "mean", means=means):
        torch.testing.assert_close(module(calibration.ids).logits, logits, rtol=1e-4, atol=1e-5)
    with edited_outputs([layer], chosen([2, 3], layer.name), "mean", means=means):
        assert not torch.allclose(module(calibration.ids).logits, logits, rtol=1e-3, atol=1e-3)


def test_every_edit_has_a_formula_in_these_tests() -> None:
    assert FORMULAS.keys() == OUTPUT_EDITS.keys()
