from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.recording.groups import Group, record_groups
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.texts.calibration_set import CalibrationSet

Tiny = Callable[[str], LanguageModel]


def record(
    module: nn.Module, names: list[str], text: CalibrationSet, stack: ExitStack, *, memory: int = 0
) -> tuple[list[Group], list[int]]:
    told: list[int] = []
    layers = find_layers(module, names)
    groups = record_groups(module, layers, text, memory=memory, stack=stack, report=told.append)
    return groups, told


@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize(
    ("name", "wanted", "shared"),
    [
        ("llama", "model.layers.1.mlp.*", [["gate_proj", "up_proj"], ["down_proj"]]),
        ("gpt2", "transformer.h.1.mlp.*", [["c_fc"], ["c_proj"]]),
        ("bert", "encoder.layer.1.*.dense", [["dense"], ["dense"], ["dense"]]),
    ],
)
def test_inputs_are_those_of_a_plain_pass(
    name: str, wanted: str, shared: list[list[str]], memory: int, tiny: Tiny,
    calibration: CalibrationSet, count_hooks: Callable[[nn.Module], int],
) -> None:  # fmt: skip
    module = tiny(name).module
    seen: dict[str, Tensor] = {}
    handles = [
        layer.module.register_forward_hook(
            lambda _m, args, _o, key=layer.name: seen.update({key: args[0].flatten(0, -2)})
        )
        for layer in find_layers(module, wanted)
    ]
    module(calibration.ids)
    for handle in handles:
        handle.remove()
    with ExitStack() as stack:
        groups, told = record(module, [wanted], calibration, stack, memory=memory)
        assert sum(told) == calibration.n_seq
        assert [[layer.projection for layer in members] for members, _ in groups] == shared
        for members, store in groups:
            for layer in members:
                torch.testing.assert_close(store.span(0, store.n_tokens), seen[layer.name])
    assert count_hooks(module) == 0


def test_a_common_input_is_kept_once(
    tiny: Tiny, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TokenStore] = []

    def make(budget: ByteBudget) -> TokenStore:
        made.append(TokenStore(budget))
        return made[-1]

    monkeypatch.setattr("entangle.recording.groups.TokenStore", make)
    with ExitStack() as stack:
        groups, _ = record(tiny("llama").module, ["model.layers.1.mlp.*"], calibration, stack)
        assert made == [store for _, store in groups]
        assert len(made) == 2


class _Strange(nn.Module):
    """One layer runs twice, one never, one on the first token only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(112, 8)
        self.twice, self.never, self.first = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.twice(self.twice(self.table(ids)))
        self.first(hidden[:, :1])
        return hidden


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twice", r"'twice'.*\b2\b"),
        ("first", r"'first'.*\b12\b.*\b16\b|'first'.*\b4\b.*\b1\b"),
        ("never", "'never'"),
    ],
)
def test_layers_that_do_not_run_once_on_every_token(
    name: str, message: str, calibration: CalibrationSet
) -> None:
    with ExitStack() as stack, pytest.raises(InvalidInput, match=message):
        record(_Strange(), [name], calibration, stack)
