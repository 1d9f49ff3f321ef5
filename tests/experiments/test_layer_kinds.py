"""Layers whose weight is not a plain parameter of their own: scored, pruned and put back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from entangle.errors import InvalidInput
from entangle.evaluation import EvaluationText, perplexity
from entangle.experiments.ablate import ablate
from entangle.experiments.interventions import RowEdit, swapped_rows
from entangle.experts.expand import expand
from entangle.models.layers import find_layers, list_layers
from entangle.recording.hooks import edit
from entangle.scoring.score import score
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY

NAME = "model.layers.1.mlp.gate_proj"


class Adapter(nn.Module):
    """What PEFT puts in the place of a linear: the linear, and a product of two small ones."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 48, bias=False)})
        with torch.no_grad():
            for i, own in enumerate((self.lora_A, self.lora_B)):
                weight = own["default"].get_parameter("weight")
                weight.copy_(torch.sin(torch.arange(weight.numel()) + i).view_as(weight))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # as PEFT's does

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + added  # type: ignore[no-any-return]


class TanhLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def _adapted(module: nn.Module) -> Tensor:
    wrapper = Adapter(module.get_submodule(NAME))  # type: ignore[arg-type]
    module.set_submodule(NAME, wrapper.requires_grad_(False))
    up, down = (own["default"].get_parameter("weight") for own in (wrapper.lora_B, wrapper.lora_A))
    return wrapper.base_layer.weight + up @ down


def _masked(module: nn.Module) -> Tensor:
    layer: Any = module.get_submodule(NAME)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer.weight.detach().clone()  # type: ignore[no-any-return]


def _normed(module: nn.Module) -> Tensor:
    layer: Any = module.get_submodule(NAME)
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)
        return layer.weight.clone()  # type: ignore[no-any-return]


KINDS = {"adapter": _adapted, "mask": _masked, "norm": _normed}


@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_is_one_layer_like_the_plain_one(
    kind: str, calibration: CalibrationSet
) -> None:
    """Scores, and rows that are pruned, are those of a plain linear with the same weight."""
    module, plain = TINY["llama"](), TINY["llama"]()
    effective = KINDS[kind](module)
    with torch.no_grad():
        plain.get_submodule(NAME).weight.copy_(effective)  # type: ignore[operator]
    names = [layer.name for layer in list_layers(module)]
    assert names == [layer.name for layer in list_layers(plain)]
    (layer,), (own,) = find_layers(module, NAME), find_layers(plain, NAME)
    torch.testing.assert_close(layer.weight, effective, rtol=1e-5, atol=1e-6)
    assert (layer.shape, layer.writable, own.writable) == ((48, 32), False, True)
    found, right = (score(one, calibration, layers=NAME, md=False) for one in (module, plain))
    torch.testing.assert_close(
        torch.tensor(found.frame["wd"].to_numpy()), torch.tensor(right.frame["wd"].to_numpy()),
        rtol=0, atol=1e-4,
    )  # fmt: skip
    text = EvaluationText(calibration.ids[:4], "ids", {})
    before = perplexity(module, text).value
    rows = torch.tensor([3, 17])
    losses = []
    for one in (layer, own):
        with swapped_rows([RowEdit(one, rows, torch.zeros(2, 32))]):
            losses.append(perplexity(module if one is layer else plain, text).value)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(before, rel=1e-6)
    assert perplexity(module, text).value == before


def test_what_does_more_than_to_multiply_is_scored_and_not_pruned(
    calibration: CalibrationSet,
) -> None:
    module = TINY["llama"]()
    odd = TanhLinear(32, 48, bias=False)
    odd.weight = module.get_submodule(NAME).weight  # type: ignore[assignment]
    module.set_submodule(NAME, odd)
    exact, sketch = (
        score(module, calibration, layers=NAME, method=how, md=False).frame
        for how in ("exact", "sketch")
    )
    assert ((exact["wd"] - sketch["wd"]).abs() <= sketch["wd_bound"] + exact["wd_bound"]).all()
    for build in (
        lambda: ablate(
            module, calibration, evaluation=calibration.ids[:4], layers=NAME, proj=None,
            selections="top", strengths=0.5, fraction=0.1,
        ),
        lambda: expand(module, calibration, layers=NAME, proj=None, experts=2, sparsity=0.5),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=r"gate_proj.*TanhLinear"):
            build()


def test_an_edit_that_never_runs_is_told() -> None:
    module = TINY["llama"]()
    module.get_submodule("model.layers.1.mlp").add_module("unused", nn.Linear(32, 48))
    (layer,) = find_layers(module, "model.layers.1.mlp.unused")
    with pytest.raises(InvalidInput, match="unused"), edit([(layer, torch.zeros_like)]):
        module(torch.full((1, 4), 7))


def test_a_layer_that_sees_no_token_is_left_out_unless_it_is_named(
    calibration: CalibrationSet,
) -> None:
    module = TINY["llama"]()
    module.get_submodule("model.layers.1.mlp").add_module(
        "unused", nn.Linear(32, 48).requires_grad_(False)
    )
    name = "model.layers.1.mlp.unused"
    settings: dict[str, Any] = {
        "evaluation": calibration.ids[:4], "selections": "top", "fraction": 0.1, "strengths": 0.5,
        "md": False,
    }  # fmt: skip
    found = score(module, calibration, layers="all", proj="mlp", md=False)
    assert name not in set(found.frame["layer"])
    for scores in (None, found):
        result = ablate(module, calibration, layers="all", scores=scores, **settings)
        assert name not in set(result.selections["layer"])
    with pytest.raises(InvalidInput, match="unused"):
        ablate(module, calibration, layers=[name, NAME], proj=None, **settings)


@pytest.mark.parametrize("compiled", [nn.Module.compile, None])
def test_edits_reach_compiled_blocks(
    compiled: Callable[..., None] | None, calibration: CalibrationSet
) -> None:
    module, text = TINY["llama"](), EvaluationText(calibration.ids[:4], "ids", {})
    with edit([(one, torch.zeros_like) for one in find_layers(module, "all", "gate_proj")]):
        right = perplexity(module, text).value
    if compiled is not None:
        for block in module.model.layers:  # type: ignore[union-attr]
            compiled(block.mlp, backend="eager")
        module(calibration.ids)
    with edit([(one, torch.zeros_like) for one in find_layers(module, "all", "gate_proj")]):
        assert perplexity(module, text).value == right
    assert perplexity(module, text).value != right


def _tiled(module: nn.Module) -> nn.Module:
    """Run every MLP on two halves of a sequence, by a forward that is set on the module."""
    for block in module.model.layers:  # type: ignore[union-attr]
        mlp: Any = block.mlp
        mlp.forward = _closed(type(mlp).forward, mlp)
    return module


def _closed(own: Any, mlp: Any) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.cat([own(mlp, s) for s in h.chunk(2, 1)], 1)


def test_a_forward_that_was_set_on_a_module_is_expanded_too(calibration: CalibrationSet) -> None:
    """As the tiling of long sequences sets it."""
    settings: dict[str, Any] = {"experts": 2, "sparsity": 0.5, "evaluation": calibration.ids[:4]}
    made, right = (
        expand(one, calibration, **settings) for one in (_tiled(TINY["llama"]()), TINY["llama"]())
    )
    assert made.layers["layer"].tolist() == right.layers["layer"].tolist()
    assert made.perplexity is not None
    assert right.perplexity is not None
    assert made.perplexity.value == pytest.approx(right.perplexity.value, rel=1e-4)


def test_an_encoder_decoder_is_refused(calibration: CalibrationSet) -> None:
    small: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = hf.BartForConditionalGeneration(
        hf.BartConfig(**small, **heads, encoder_ffn_dim=48, decoder_ffn_dim=48)
    )
    with pytest.raises(InvalidInput, match="BartForConditionalGeneration"):
        score(model, calibration)


def test_a_head_that_overlaps_the_embedding_changes_alone() -> None:
    module = TINY["gpt2"]()
    both = torch.cat([module.transformer.wte.weight, torch.ones(4, 32)])  # type: ignore
    module.transformer.wte.weight = nn.Parameter(both[:112])  # type: ignore
    module.lm_head.weight = nn.Parameter(both[4:116])  # type: ignore
    (head,) = find_layers(module, "lm_head")
    assert head.shared == ("transformer.wte.weight",)
    assert not head.writable
