"""What the recorder hands on is the text's tokens, whatever a model does with them."""

import copy
import signal
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.recording.hooks import joined, look_at, observe
from entangle.recording.recorder import Recorded, Recorder
from entangle.texts.calibration_set import CalibrationSet
from tests.recording.toys import (
    Adding,
    ByPlace,
    ClampedLinear,
    Experts,
    FlatByPlace,
    FlatPieces,
    LongScaledLinear,
    Padded,
    Pieces,
    RowPieces,
    ScaledLinear,
    Tables,
    Toy,
)
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], LanguageModel]
CountHooks = Callable[[nn.Module], int]
ARCHITECTURES = sorted(CONFIGS)


def run(
    module: nn.Module,
    names: int | list[str],
    ids: Tensor,
    *,
    sizes: tuple[int, ...] = (2, 3),
    **how: bool,
) -> tuple[list[Recorded], Recorder]:
    """Run a module over batches of so many sequences, and return what was recorded."""
    found: list[Recorded] = []
    recorder = Recorder(find_layers(module, names), found.append, **how)  # type: ignore[arg-type]
    batches = ids[: sum(sizes)].split(sizes)
    recorder.run(module, list(enumerate(batches)))
    return found, recorder


def by_layer(found: list[Recorded]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every layer's inputs and outputs on all tokens."""
    names = dict.fromkeys(one.layer.name for one in found)
    return {
        name: (
            torch.cat([one.inputs for one in found if one.layer.name == name]),
            torch.cat([one.outputs for one in found if one.layer.name == name]),
        )
        for name in names
    }


@pytest.mark.parametrize("kind", [Pieces, RowPieces, FlatPieces, ByPlace, FlatByPlace])
@pytest.mark.parametrize("shape", [(5, 16), (1, 16), (5, 4), (5, 5)])
def test_rows_are_the_tokens_in_the_order_of_the_text(
    kind: type[Toy], shape: tuple[int, int], calibration: CalibrationSet
) -> None:
    toy, ids = kind(), calibration.ids[: shape[0], : shape[1]]
    sizes = (shape[0],) if shape[0] == 1 else (2, 3)
    found, recorder = run(toy, ["a"], ids, sizes=sizes)
    inputs, outputs = by_layer(found)["a"]
    expected = toy.table(ids.flatten())
    assert torch.equal(inputs, expected)
    torch.testing.assert_close(outputs, toy.a(expected))
    assert recorder.tokens == {"a": ids.numel()}
    assert all(one.affine for one in found)


def test_pieces_that_are_written_to_later_keep_their_values(calibration: CalibrationSet) -> None:
    toy = Adding()
    found, _ = run(toy, ["a"], calibration.ids)
    inputs, outputs = by_layer(found)["a"]
    expected = toy.table(calibration.ids[:5].flatten())
    assert torch.equal(inputs, expected)
    torch.testing.assert_close(outputs, toy.a(expected))


@pytest.mark.parametrize("rows", [6, 16, None])
def test_tables_are_left_out(rows: int | None, calibration: CalibrationSet) -> None:
    """Also one sequence at a time, where a table may have the shape of the text."""
    toy = Tables(rows)
    found, recorder = run(toy, ["a", "b"], calibration.ids, sizes=(1, 1), lenient=True)
    inputs, _ = by_layer(found)["a"]
    assert torch.equal(inputs, toy.table(calibration.ids[:2].flatten()))
    assert recorder.tokens == {"a": 32, "b": 0}
    assert list(recorder.left_out) == ["b"]
    with pytest.raises(InvalidInput, match="'b'"):
        run(toy, ["a", "b"], calibration.ids)


def test_rows_beyond_the_text_are_refused_by_name(calibration: CalibrationSet) -> None:
    toy = Padded()
    found, _ = run(toy, ["a", "b"], calibration.ids)
    assert len(found) == 4
    with pytest.raises(InvalidInput, match=r"'a'.*\(2, 16\).*\b2\b.*\b13\b"):
        run(toy, ["a", "b"], calibration.ids[:, :13])
    with pytest.raises(InvalidInput, match="'a'"):
        run(toy, ["a", "b"], calibration.ids[:, :13], lenient=True)  # nothing would be left


def test_experts_see_some_of_the_tokens(calibration: CalibrationSet) -> None:
    toy = Experts()
    found, recorder = run(toy, ["a", "b"], calibration.ids)
    ids = calibration.ids[:5].flatten()
    inputs = {name: one for name, (one, _) in by_layer(found).items()}
    assert torch.equal(inputs["a"], toy.table(ids[ids % 2 == 0]))
    assert torch.equal(inputs["b"], toy.table(ids[ids % 2 == 1]))
    assert sum(recorder.tokens.values()) == 80
    with pytest.raises(InvalidInput, match="'a'"):
        run(toy, ["a", "b"], calibration.ids, once=True)


@pytest.mark.parametrize("order", ["absba", "aabs", "abasc"])
def test_a_layer_that_runs_several_times_is_pooled_and_said(
    order: str, calibration: CalibrationSet, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy(order)
    found, recorder = run(toy, ["a", "b"], calibration.ids)
    assert [one.layer.name for one in found] == [name for name in order if name in "ab"] * 2
    assert recorder.depths == {n: order.count(n) for n in "ab" if order.count(n) > 1}
    assert "'a'" in caplog.text or "'b'" in caplog.text
    with pytest.raises(InvalidInput, match=r"'[ab]'.*\b2\b"):
        run(toy, ["a", "b"], calibration.ids, once=True)


def test_nothing_runs_after_the_last_token_of_the_last_layer(calibration: CalibrationSet) -> None:
    toy = Toy()
    found, _ = run(toy, ["a", "b"], calibration.ids)
    assert [(one.group, one.layer.name, len(one.inputs)) for one in found] == [
        (0, "a", 32), (0, "b", 32), (1, "a", 48), (1, "b", 48)
    ]  # fmt: skip
    assert toy.s.n_runs == 4  # the look at a few tokens only
    run(toy, ["a", "c"], calibration.ids)
    assert toy.s.n_runs == 10


class Sometimes(Toy):
    """Runs ``b`` only on more than ten tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.a(self.table(ids))
        if ids.shape[1] > 10:
            x = self.b(x)
        return self.s(x)  # type: ignore[no-any-return]


class OnNothing(Toy):
    """Runs ``b`` on no token at all, as a mixture runs an expert that nobody chose."""

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.a(self.table(ids).flatten(0, 1))
        return torch.cat([x, self.b(x[:0])])


def test_a_layer_that_did_not_run_on_a_few_tokens_is_waited_for(
    calibration: CalibrationSet,
) -> None:
    toy = Sometimes()
    found, _ = run(toy, ["a", "b"], calibration.ids)
    assert [one.layer.name for one in found] == ["a", "b", "a", "b"]
    assert toy.s.n_runs == 6


@pytest.mark.parametrize(
    ("toy", "names"), [(Toy("ab"), ["a", "c"]), (Toy("ab"), ["c"]), (OnNothing(), ["a", "b"])]
)
def test_a_layer_that_sees_no_token_is_named(
    toy: Toy, names: list[str], calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    with pytest.raises(InvalidInput, match=f"'{names[-1]}'"):
        run(toy, names, calibration.ids)
    assert count_hooks(toy) == 0
    if len(names) > 1:
        _, recorder = run(toy, names, calibration.ids, lenient=True)
        assert list(recorder.left_out) == [names[-1]]


class ByKeyword(Toy):
    def forward(self, ids: Tensor) -> Tensor:
        return self.a(input=self.table(ids))  # type: ignore[no-any-return]


def test_an_input_given_by_keyword_is_found(calibration: CalibrationSet) -> None:
    found, _ = run(ByKeyword(), ["a"], calibration.ids)
    assert [len(one.inputs) for one in found] == [32, 48]


@pytest.mark.parametrize(("kind", "affine"), [(nn.Linear, True), (ScaledLinear, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_compared_with_the_weight(
    kind: type[nn.Linear], affine: bool, dtype: torch.dtype, calibration: CalibrationSet
) -> None:
    toy = Toy()
    layer = kind(8, 8)
    layer.load_state_dict(toy.a.state_dict())
    toy.a = layer
    toy = toy.to(dtype)
    found, _ = run(toy, ["a"], calibration.ids)
    assert {one.affine for one in found} == {affine}
    if not affine:
        with pytest.raises(InvalidInput, match=r"pruning.*'a'.*ScaledLinear"):
            found[0].check_affine("pruning")


def test_sequences_of_full_length_are_compared_too(calibration: CalibrationSet) -> None:
    toy = Toy()
    toy.a = LongScaledLinear(8, 8)
    found: list[Recorded] = []
    recorder = Recorder(find_layers(toy, ["a"]), found.append)
    with pytest.raises(InvalidInput, match=r"'a'.*LongScaledLinear"):
        recorder.run(toy, [(0, calibration.ids[:1, :5]), (0, calibration.ids[:2])])


def _clamped(place: int, ids: Tensor, dtype: torch.dtype) -> Toy:
    """Return a toy whose layer departs from its weight on one token, which the text has once."""
    toy, layer = Toy(), ClampedLinear(8, 8)
    layer.load_state_dict(toy.a.state_dict())
    with torch.no_grad():
        layer.bias[0] = 3.0  # the first output is one that a clamp would bound
    toy.a = layer
    toy = toy.to(dtype)
    ids.view(-1)[ids.view(-1) == 111] = 7
    ids.view(-1)[place] = 111
    layer.rare = toy.table.weight[111].detach()
    return toy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 501, 999])
def test_a_single_token_that_departs_is_seen(place: int, dtype: torch.dtype) -> None:
    ids = torch.randint(112, (10, 100), generator=torch.Generator().manual_seed(0))
    toy = _clamped(place, ids, dtype)
    found, _ = run(toy, ["a"], ids, sizes=(10,))
    assert [one.affine for one in found] == [False]
    toy.a = nn.Linear(8, 8).to(dtype)
    found, _ = run(toy, ["a"], ids, sizes=(10,))
    assert [one.affine for one in found] == [True]


def test_a_token_of_a_later_pass_that_departs_is_refused() -> None:
    ids = torch.randint(112, (10, 100), generator=torch.Generator().manual_seed(0))
    toy = _clamped(501, ids, torch.float32)
    with pytest.raises(InvalidInput, match=r"'a'.*ClampedLinear"):
        run(toy, ["a"], ids, sizes=(5, 5))
    found, _ = run(toy, ["a"], ids, sizes=(5, 5), compared=False)
    assert [one.affine for one in found] == [False, False]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pass_that_stops_early_leaves_the_model_as_it_was(
    name: str, tiny: Tiny, calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = tiny(name).module
    plain, before = module(calibration.ids)[0], count_hooks(module)
    found, recorder = run(module, 1, calibration.ids, sizes=(5, 7))
    experts = {layer.name for layer in recorder.layers if layer.is_expert}
    assert {n for x, n in recorder.tokens.items() if x not in experts} == {calibration.n_tokens}
    assert all(0 < recorder.tokens[one] <= calibration.n_tokens for one in experts)
    assert all(one.affine for one in found)
    assert count_hooks(module) == before
    assert torch.equal(module(calibration.ids)[0], plain)


def test_a_run_inside_an_observation_is_observed_too(
    tiny: Tiny, calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = tiny("llama").module
    layers, seen = find_layers(module, 0, "gate_proj"), [0]

    def outer(_layer: object, _inputs: Tensor, _outputs: Tensor) -> None:
        seen[0] += 1

    with observe(layers, outer):
        found, _ = run(module, [layers[0].name], calibration.ids, sizes=(2,))
        assert count_hooks(module) == 1
    assert (len(found), seen) == (1, [5])  # the first of the outer ones are the looks


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_no_hook_is_left_after_an_error_where_rows_are_taken(
    error: type[BaseException], tiny: Tiny, calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = tiny("llama").module

    def fail(_found: Recorded) -> None:
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise error("where rows are taken")

    with pytest.raises(error):
        Recorder(find_layers(module, "all"), fail).run(module, [(0, calibration.ids)])
    assert count_hooks(module) == 0


def test_no_hook_is_left_after_an_error_in_the_model(tiny: Tiny, count_hooks: CountHooks) -> None:
    module = tiny("llama").module
    with pytest.raises(IndexError):
        run(module, 1, torch.full((1, 4), 5000), sizes=(1,))
    assert count_hooks(module) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_head_sees_every_token_when_it_is_watched(
    name: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    _, recorder = run(tiny(name).module, ["lm_head"], calibration.ids, sizes=(5, 7))
    assert recorder.tokens == {"lm_head": calibration.n_tokens}


@pytest.mark.parametrize("how", ["module", "mlp", "whole"])
def test_compiled_modules_are_recorded(how: str, calibration: CalibrationSet) -> None:
    from tests.tiny_models import TINY

    module = TINY["llama"]()
    plain = by_layer(run(module, 1, calibration.ids)[0])
    if how == "module":
        module.compile(backend="eager")
    elif how == "mlp":
        for block in module.model.layers:  # type: ignore[union-attr]
            block.mlp.compile(backend="eager")
    else:
        module.forward = torch.compile(module.forward, backend="eager")
    with torch.no_grad():
        module(calibration.ids, use_cache=False)
    compiled = by_layer(run(module, 1, calibration.ids)[0])
    assert plain.keys() == compiled.keys()
    assert all(torch.equal(plain[name][1], compiled[name][1]) for name in plain)


def test_inference_mode_of_the_caller_changes_nothing(
    tiny: Tiny, calibration: CalibrationSet
) -> None:
    module = tiny("llama").module
    plain = by_layer(run(module, 1, calibration.ids)[0])
    with torch.inference_mode():
        inside = by_layer(run(module, 1, calibration.ids)[0])
        copied = by_layer(run(copy.deepcopy(module), 1, calibration.ids)[0])
    for found in (inside, copied):
        assert all(torch.equal(plain[name][1], found[name][1]) for name in plain)


def test_what_is_learned_by_hand() -> None:
    ids = torch.arange(4, 32).view(2, 14)
    habits = look_at(Tables(), find_layers(Tables(), ["a", "b"]), ids)
    assert [one.depths for one in habits.values()] == [0, 0]  # another module's layers never ran
    toy = Tables()
    found = look_at(toy, find_layers(toy, ["a", "b"]), ids)
    assert [one.depths for one in found.values()] == [1, 0]
    assert [len(one.tables) for one in found.values()] == [2, 1]
    assert found["a"].tables[0] is None
    one_token = look_at(toy, find_layers(toy, ["a"]), torch.full((1, 6), 9))
    assert one_token["a"].depths == 1


def test_pieces_joined_by_hand() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    flat = x.flatten(0, 1)
    for pieces in ([x], [flat], [x[:, :1], x[:, 1:]], [x[:1], x[1:]], [flat[:4], flat[4:]]):
        whole = joined(pieces, (2, 3), by_place=False)
        assert whole is not None
        assert torch.equal(whole, flat)
    turned = joined([x.transpose(0, 1)], (2, 3), by_place=True)
    assert turned is not None
    assert torch.equal(turned, flat)
    for wrong in ([x[:, :2]], [torch.zeros(2, 4, 2)], [x, x], [flat[:4], x[:1]], [flat[:5]]):
        assert joined(wrong, (2, 3), by_place=False) is None


class Flipped(Toy):
    """Runs ``a`` on the last token first."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.a(self.table(ids).flip(1)).flip(1)  # type: ignore[no-any-return]


def test_another_order_of_tokens_is_refused_where_places_matter(
    calibration: CalibrationSet,
) -> None:
    assert len(run(Flipped(), ["a"], calibration.ids)[0]) == 2
    with pytest.raises(InvalidInput, match="'a'"):
        run(Flipped(), ["a"], calibration.ids, once=True)


def test_a_forward_under_inference_mode_is_recorded(calibration: CalibrationSet) -> None:
    toy, plain = Toy(), Toy()
    toy.forward = torch.inference_mode()(toy.forward)  # type: ignore[method-assign]
    inside, right = (by_layer(run(one, ["a"], calibration.ids)[0]) for one in (toy, plain))
    assert torch.equal(inside["a"][1], right["a"][1])
    assert not inside["a"][0].is_inference()
