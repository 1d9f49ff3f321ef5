from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5Model,
)

from entangle.errors import InvalidInput, UnknownName
from entangle.models.layers import (
    asked_by_name,
    find_blocks,
    find_layers,
    list_fused_experts,
    list_layers,
)
from tests.tiny_models import GROUPED, TINY

# Written out by hand: the name of the blocks; the attention and then the feed-forward linears of
# one block as name -> (out_features, in_features); the linears outside the blocks.
Q32, KV16 = (32, 32), (16, 32)
SPLIT = {
    "self_attn.q_proj": Q32,
    "self_attn.k_proj": KV16,
    "self_attn.v_proj": KV16,
    "self_attn.o_proj": Q32,
}
GATED = {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
PLAIN = {"mlp.dense_h_to_4h": (48, 32), "mlp.dense_4h_to_h": (32, 48)}
EXPERTS = {
    f"mlp.experts.{expert}.{name}": shape
    for expert in range(4)
    for name, shape in (("gate_proj", (48, 32)), ("up_proj", (48, 32)), ("down_proj", (32, 48)))
}
Parts = dict[str, tuple[int, int]]
EXPECTED: dict[str, tuple[str, Parts, Parts, list[str]]] = {
    "llama": ("model.layers", SPLIT, GATED, ["lm_head"]),
    "gemma3": ("model.layers", SPLIT, GATED, ["lm_head"]),
    "qwen3": ("model.layers", SPLIT, GATED, ["lm_head"]),
    "mistral": ("model.layers", SPLIT, GATED, ["lm_head"]),
    "mixtral": ("model.layers", SPLIT, EXPERTS, ["lm_head"]),
    "phi3": (
        "model.layers",
        {"self_attn.o_proj": Q32, "self_attn.qkv_proj": (64, 32)},
        {"mlp.gate_up_proj": (96, 32), "mlp.down_proj": (32, 48)},
        ["lm_head"],
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {"attention.query_key_value": (96, 32), "attention.dense": Q32},
        PLAIN,
        ["lm_head"],
    ),
    "gpt2": (
        "transformer.h",
        {"attn.c_attn": (96, 32), "attn.c_proj": Q32},
        {"mlp.c_fc": (48, 32), "mlp.c_proj": (32, 48)},
        ["lm_head"],
    ),
    "opt": (
        "model.decoder.layers",
        {
            "self_attn.k_proj": Q32,
            "self_attn.v_proj": Q32,
            "self_attn.q_proj": Q32,
            "self_attn.out_proj": Q32,
        },
        {"fc1": (48, 32), "fc2": (32, 48)},
        ["lm_head"],
    ),
    "falcon": (
        "transformer.h",
        {"self_attention.query_key_value": (48, 32), "self_attention.dense": Q32},
        PLAIN,
        ["lm_head"],
    ),
    "bloom": (
        "transformer.h",
        {"self_attention.query_key_value": (96, 32), "self_attention.dense": Q32},
        {"mlp.dense_h_to_4h": (128, 32), "mlp.dense_4h_to_h": (32, 128)},
        ["lm_head"],
    ),
    "bert": (
        "encoder.layer",
        {
            "attention.self.query": Q32,
            "attention.self.key": Q32,
            "attention.self.value": Q32,
            "attention.output.dense": Q32,
        },
        {"intermediate.dense": (48, 32), "output.dense": (32, 48)},
        ["pooler.dense"],
    ),
}


def test_every_tiny_model_has_expectations() -> None:
    assert EXPECTED.keys() == TINY.keys()


@pytest.mark.parametrize("name", TINY)
def test_names_shapes_and_blocks_of_every_architecture(name: str) -> None:
    blocks, attention, feed_forward, outside = EXPECTED[name]
    module = TINY[name]()
    inside = [
        (f"{blocks}.{block}.{part}", block, part.split(".")[-1], shape)
        for block in range(3)
        for part, shape in (attention | feed_forward).items()
    ]
    layers = list_layers(module)
    got = [(x.name, x.block, x.projection, x.shape) for x in layers if x.block is not None]
    assert got == inside
    assert [layer.name for layer in layers if layer.block is None] == outside
    assert find_blocks(module)[0] == blocks
    assert len(find_blocks(module)[1]) == 3


@pytest.mark.parametrize("name", TINY)
def test_mlp_is_the_feed_forward_part(name: str) -> None:
    blocks, _, feed_forward, _ = EXPECTED[name]
    found = find_layers(TINY[name](), 2, "mlp")
    assert [layer.name for layer in found] == [f"{blocks}.2.{part}" for part in feed_forward]


@pytest.mark.parametrize("name", TINY)
def test_weights_are_views_that_reproduce_the_module(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in list_layers(TINY[name]()):
        x = torch.randn(5, layer.in_features, generator=generator)
        bias = 0.0 if layer.bias is None else layer.bias
        torch.testing.assert_close(x @ layer.weight.T + bias, layer.module(x))
        raw = layer.weight if layer.is_expert else layer.module.get_parameter("weight")
        assert layer.weight.data_ptr() == raw.data_ptr()
        assert not layer.weight.requires_grad
        assert layer.transposed == (name == "gpt2" and layer.name != "lm_head")
        layer.weight[0].zero_()
        neuron = raw[:, 0] if layer.transposed else raw[0]
        assert neuron.abs().max() == 0


def test_bias_is_none_without_one() -> None:
    assert all(layer.bias is None for layer in list_layers(TINY["llama"]()))
    assert [layer.bias is None for layer in find_layers(TINY["gpt2"](), 0)] == [False] * 4


@pytest.mark.parametrize(
    ("spec", "proj", "expected"),
    [
        (1, "gate_proj", ["1.mlp.gate_proj"]),
        ("1", "mlp.gate_proj", ["1.mlp.gate_proj"]),
        ("model.layers.2.mlp.up_proj", None, ["2.mlp.up_proj"]),
        ("model.layers.2.mlp.up_proj", "up_proj", ["2.mlp.up_proj"]),
        ("*.mlp.gate_proj", None, [f"{i}.mlp.gate_proj" for i in range(3)]),
        ("model.layers.[02].*_proj", "v_proj", ["0.self_attn.v_proj", "2.self_attn.v_proj"]),
        ([2, "0", 2], "down_proj", ["0.mlp.down_proj", "2.mlp.down_proj"]),
        (("*.up_proj", 1), "up_proj", [f"{i}.mlp.up_proj" for i in range(3)]),
        ("all", "self_attn.o_proj", [f"{i}.self_attn.o_proj" for i in range(3)]),
    ],
)
def test_addresses(spec: object, proj: str | None, expected: list[str]) -> None:
    found = find_layers(TINY["llama"](), spec, proj)  # type: ignore[arg-type]
    assert [layer.name for layer in found] == [f"model.layers.{name}" for name in expected]


@pytest.mark.parametrize("proj", ["attn", "attention"])
@pytest.mark.parametrize("name", [name for name in TINY if name != "mixtral"])
def test_every_linear_of_a_block_is_attention_or_feed_forward(name: str, proj: str) -> None:
    module = TINY[name]()
    attention, mlp = (find_layers(module, "all", one) for one in (proj, "mlp"))
    assert len({layer.name for layer in attention} & {layer.name for layer in mlp}) == 0
    both = [layer.name for layer in find_layers(module, "all", ["mlp", proj])]
    assert both == [layer.name for layer in find_layers(module, "all")]
    feed = {"mlp", "fc1", "fc2", "intermediate", "output"}
    assert all(feed & set(layer.name.split(".")) for layer in mlp)


def test_the_attention_of_a_mixture() -> None:
    found = find_layers(TINY["mixtral"](), 1, "attn")
    assert [layer.projection for layer in found] == ["q_proj", "k_proj", "v_proj", "o_proj"]


class Odd(nn.Module):
    """Blocks whose parts are named by nobody's habit."""

    def __init__(self) -> None:
        super().__init__()
        parts = {
            "mixer_attn": nn.ModuleDict({"q": nn.Linear(4, 4)}),
            "attn_out": nn.Linear(4, 4),
            "conv": nn.ModuleDict({"taps": nn.Conv1d(4, 4, 2), "proj": nn.Linear(4, 4)}),
            "wide": nn.Linear(4, 8),
        }
        self.blocks = nn.ModuleList(nn.ModuleDict(parts) for _ in range(2))
        self.attention_head = nn.Linear(4, 4)


def test_attention_is_seen_in_the_names_inside_a_block() -> None:
    for proj, names in (
        ("attn", ["mixer_attn.q", "attn_out"]),
        ("mlp", ["wide"]),
        (["wide", "attn"], ["mixer_attn.q", "attn_out", "wide"]),
    ):
        found = find_layers(Odd(), 0, proj)
        assert [layer.name.removeprefix("blocks.0.") for layer in found] == names


def test_a_decoder_layer_inside_a_block_is_not_all_attention() -> None:
    from transformers import ZambaConfig, ZambaForCausalLM

    sizes: Any = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
                  "attention_head_dim": 16, "mamba_d_state": 4, "mamba_dt_rank": 4}  # fmt: skip
    config = ZambaConfig(**{**GROUPED, "num_key_value_heads": 4, **sizes})
    found = find_layers(ZambaForCausalLM(config), "all", "mlp")
    assert {one.projection for one in found} == {"gate_proj", "up_proj", "down_proj", "linear"}


def test_several_projections() -> None:
    module = TINY["llama"]()
    wanted = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    for proj in (["up_proj", "q_proj"], ("q_proj", "mlp.up_proj"), {"q_proj", "up_proj"}):
        assert [layer.name for layer in find_layers(module, 1, proj)] == wanted
    with pytest.raises(UnknownName, match="projection 'gate'"):
        find_layers(module, 1, ["q_proj", "gate"])
    with pytest.raises(UnknownName, match="projection 'attn'"):
        find_layers(module, "*.up_proj", "attn")
    nothing: list[Any] = [[], {}]
    for wrong in nothing:
        with pytest.raises(InvalidInput, match=r"`proj`.*got"):
            find_layers(module, 1, wrong)


def test_a_layer_of_another_copy_is_meant_by_its_name() -> None:
    module, other = TINY["llama"](), TINY["llama"]()
    layer = find_layers(other, 1, "up_proj")[0]
    for spec in (layer, [layer], (one for one in [layer])):
        (found,) = find_layers(module, spec)
        assert found.name == layer.name
        assert found.module is not layer.module


def test_all_means_every_linear_inside_the_blocks() -> None:
    module = TINY["bert"]()
    inside = [layer.name for layer in list_layers(module) if layer.block is not None]
    assert [layer.name for layer in find_layers(module, "all")] == inside
    assert [layer.name for layer in find_layers(module, "pooler.dense")] == ["pooler.dense"]


def test_unknown_names_list_the_five_closest() -> None:
    module = TINY["llama"]()
    with pytest.raises(
        UnknownName, match=r"layer 'model\.layers\.1\.mlp\.gate'.*1\.mlp\.gate_proj"
    ):
        find_layers(module, "model.layers.1.mlp.gate")
    with pytest.raises(UnknownName) as caught:
        find_layers(module, "nothing.*")
    assert str(caught.value).split("Closest: ")[1].split(". `")[0].count(",") == 4
    with pytest.raises(UnknownName, match=r"projection 'gate'\. Closest: gate_proj"):
        find_layers(module, 1, "gate")
    with pytest.raises(UnknownName, match="projection 'mlp'"):
        find_layers(module, "*.q_proj", "mlp")
    with pytest.raises(UnknownName, match="layer 'oops'"):
        find_layers(module, [1, "oops"])


@pytest.mark.parametrize("spec", [3, "3", -1, "-1", 10**6])
def test_block_out_of_range(spec: int | str) -> None:
    with pytest.raises(InvalidInput, match=rf"in 0\.\.2 for this model; got {spec}\."):
        find_layers(TINY["opt"](), spec)


def test_empty_and_boolean_specs_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"`layers`.*got \[\]"):
        find_layers(TINY["opt"](), [])
    with pytest.raises(InvalidInput, match="got True"):
        find_layers(TINY["opt"](), True)


class Strange(nn.Module):
    """Experts in a layout that nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(4, 96, 32))


def strange() -> nn.Module:
    """A model whose first mixture is held otherwise."""
    module = TINY["mixtral"]()
    module.get_submodule("model.layers.0.mlp").experts = Strange()
    return module


def test_experts_of_an_unknown_layout_are_listed() -> None:
    experts = list_fused_experts(strange())
    assert [(e.name, e.block, e.shape) for e in experts] == [
        ("model.layers.0.mlp.experts.wide", 0, (4, 96, 32))
    ]
    assert all(list_fused_experts(TINY[name]()) == () for name in TINY)


@pytest.mark.parametrize(
    ("spec", "proj"),
    [
        ("model.layers.0.mlp.experts.wide", None),
        ("model.layers.0.mlp.experts", None),
        ("*.0.mlp.experts.*", None),
        (0, "mlp"),
        ("all", "experts.wide"),
        ([1, "model.layers.0.mlp.experts.wide"], None),
    ],
)
def test_unknown_experts_are_refused(spec: int | str | list[int | str], proj: str | None) -> None:
    with pytest.raises(InvalidInput, match=r"'model\.layers\.0\.mlp.*\b4 experts"):
        find_layers(strange(), spec, proj)


class Shared(nn.Module):
    """Two blocks that share one linear."""

    def __init__(self) -> None:
        super().__init__()
        linear = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": linear}) for _ in range(2))


def test_a_shared_module_is_listed_once_and_answers_to_both_names() -> None:
    module = Shared()
    assert [layer.name for layer in list_layers(module)] == ["blocks.0.a"]
    assert [layer.name for layer in find_layers(module, "blocks.1.a")] == ["blocks.0.a"]
    assert len(find_layers(module, ["blocks.0.a", "blocks.1.a"])) == 1


def test_who_asks_by_name_asks_for_that_layer() -> None:
    module = TINY["llama"]()
    found = find_layers(module, 1, "mlp")
    first, name = found[0], found[0].name
    asking: list[Any] = [name, np.str_(name), first, [0, name], {name}, (one for one in [name])]
    others: list[Any] = ["all", 1, "1", [1], "*.gate_proj", name[:-1], find_layers(module, 0)]
    assert all(asked_by_name(spec, found) for spec in asking)
    assert not any(asked_by_name(spec, found) for spec in others)
    shared = find_layers(Shared(), "all")
    assert asked_by_name("blocks.1.a", shared)
    assert asked_by_name("blocks.0.a", shared)


class Mixed(nn.Module):
    """Long lists that are not blocks: plain activations, and experts inside the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = nn.ModuleList(nn.ReLU() for _ in range(9))
        self.odd = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))] * 3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(8))})
            for _ in range(2)
        )


def test_blocks_are_like_modules_with_linears_and_not_nested() -> None:
    assert find_blocks(Mixed())[0] == "blocks"


def test_a_model_without_blocks() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert [(layer.name, layer.block) for layer in list_layers(module)] == [
        ("0", None),
        ("1", None),
    ]
    with pytest.raises(InvalidInput, match="ModuleList"):
        find_layers(module, 0)


class Convolving(nn.Module):
    """Blocks that mix tokens by a convolution, as state-space models do."""

    def __init__(self) -> None:
        super().__init__()
        parts = {"conv1d": nn.Conv1d(4, 4, 2), "in_proj": nn.Linear(4, 4)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mixer": nn.ModuleDict(parts), "mlp": nn.Sequential(nn.Linear(4, 8))})
            for _ in range(2)
        )


def test_convolutions_are_neither_feed_forward_nor_experts() -> None:
    module = Convolving()
    assert [layer.name for layer in find_layers(module, 1, "mlp")] == ["blocks.1.mlp.0"]
    assert list_fused_experts(module) == ()


def _t5() -> PreTrainedModel:
    return T5Model(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2))


def test_blocks_of_an_encoder_decoder_are_the_decoders() -> None:
    module = _t5()
    assert find_blocks(module)[0] == "decoder.block"
    assert find_layers(module, "encoder.block.1.layer.1.DenseReluDense.wi")[0].block is None
    found = [layer.name for layer in find_layers(module, 1, "mlp")]
    assert found == [f"decoder.block.1.layer.2.DenseReluDense.{name}" for name in ("wi", "wo")]


def test_blocks_of_a_multimodal_model_are_the_texts() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={"model_type": "llama", **GROUPED},
        vision_config={
            "model_type": "clip_vision_model",
            **vision,
            "num_hidden_layers": 5,
            "image_size": 8,
            "patch_size": 4,
        },
    )
    module = LlavaForConditionalGeneration(config)
    assert find_blocks(module)[0] == "model.language_model.layers"


class _Router(nn.Linear):
    """Inherits from a linear layer, but returns no single tensor, as Llama 4's router does."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores, scores.softmax(-1)


class _QuantisedLinear(nn.Linear):
    """A linear layer with a way of its own to compute the same output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_a_router_that_inherits_from_linear_is_no_layer() -> None:
    module = nn.ModuleDict({"router": _Router(4, 2), "own": _QuantisedLinear(4, 2)})
    assert [layer.name for layer in list_layers(module)] == ["own"]
