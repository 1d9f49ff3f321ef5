"""Blocks of experts on disk: what comes back is what was written, and the dense layer's bias."""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from entangle.errors import InvalidInput
from entangle.experts import block_files
from entangle.experts.block_files import block_file, read_block, write_block, write_build
from entangle.experts.build import ExpandedLayer, structural_copy
from entangle.experts.checkpoint import install, load_expanded, refuse_saving
from entangle.experts.expand import expand
from entangle.experts.linear import ExpandedLinear, SharedRouting
from entangle.experts.router import fit_router
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel
from entangle.packed.linear import PackedLinear
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet

Tiny = Callable[[str], LanguageModel]


def numbers(*shape: int, name: str = "weight") -> Tensor:
    return torch.randn(shape, generator=torch_rng(0, "checkpoint", name))


def linear(name: str, out: int, width: int, *, bias: bool, dtype: torch.dtype) -> Layer:
    module = nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)
    module.weight.copy_(numbers(out, width, name=name))
    if bias:
        module.bias.copy_(numbers(out, name=f"{name} bias"))
    return Layer(name, 0, name, module, transposed=False)


def conv1d(name: str, out: int, width: int) -> Layer:
    made: Any = Conv1D
    module = made(out, width).requires_grad_(False)
    module.weight.copy_(numbers(width, out, name=name))
    module.bias.copy_(numbers(out, name=f"{name} bias"))
    return Layer(name, 0, name, module, transposed=True)


def routing(features: int, k: int) -> SharedRouting:
    return SharedRouting(fit_router([numbers(50, features, name="tokens")], k, seed=0, restarts=1))


def expanded(layer: Layer, shared: SharedRouting) -> ExpandedLayer:
    """Give every cluster an expert of its own, a third of its weights zero."""
    k, (out, width) = shared.router.k, layer.shape
    weight = numbers(k, out, width, name="experts").to(layer.weight.dtype)
    weight[weight.abs() < 0.43] = 0
    return ExpandedLayer(layer, ExpandedLinear(weight, layer.bias, shared), None)


def through(layer: ExpandedLinear, tokens: Tensor) -> Tensor:
    """Multiply every token by its own expert and add the bias, a token at a time."""
    rows = []
    for token in tokens:
        row = layer.weight[int(layer.routing.router.route(token))] @ token
        rows.append(row if layer.bias is None else row + layer.bias)
    return torch.stack(rows)


def dense_layers(dtype: torch.dtype = torch.float32) -> list[Layer]:
    """Gate and up, which read one input of 6, and down, which reads another of 9."""
    return [
        linear("gate", 9, 6, bias=True, dtype=dtype),
        linear("up", 9, 6, bias=False, dtype=dtype),
        linear("down", 6, 9, bias=True, dtype=dtype),
    ]


def written(path: Path, layers: list[Layer]) -> list[ExpandedLayer]:
    narrow, wide = routing(6, 3), routing(9, 2)
    made = [expanded(layer, narrow if layer.in_features == 6 else wide) for layer in layers]
    write_block(path, made)
    report = [{"layer": layer.name, "experts": 3} for layer in layers]
    write_build(path.with_suffix(".build"), made, report)
    return made


def read(
    path: Path, layers: Mapping[str, Layer]
) -> tuple[list[ExpandedLayer], list[dict[str, object]]]:
    return read_block(path, path.with_suffix(".build"), layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_biases_routers_and_report_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    layers = dense_layers(dtype)
    made = written(tmp_path / "x", layers)
    found, report = read(tmp_path / "x", {layer.name: layer for layer in layers})
    assert [one.layer.name for one in found] == ["gate", "up", "down"]
    assert [row["layer"] for row in report] == ["gate", "up", "down"]
    for layer, before, after in zip(layers, made, found, strict=True):
        assert after.layer is layer
        assert after.experts is None
        assert after.module.weight.dtype == dtype
        assert torch.equal(after.module.weight, before.module.weight)
        tokens = numbers(20, layer.in_features, name="other tokens").to(dtype)
        assert torch.equal(after.module(tokens), before.module(tokens))
    assert found[0].module.routing is found[1].module.routing
    assert found[0].module.routing is not found[2].module.routing
    assert [one.module.routing.router.k for one in found] == [3, 3, 2]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_dense_layers_bias_is_added_to_every_expert(tmp_path: Path, kind: str) -> None:
    layer = (
        conv1d("up", 7, 6)
        if kind == "conv1d"
        else linear("up", 7, 6, bias=True, dtype=torch.float32)
    )
    assert layer.bias is not None
    assert (layer.bias.abs() > 0.01).all()
    written(tmp_path / "x", [layer])
    (found,), _ = read(tmp_path / "x", {"up": layer})
    tokens = numbers(30, 6, name="tokens")
    assert found.module.bias is not None
    assert torch.equal(found.module.bias, layer.bias)
    nothing = found.module(torch.zeros(1, 6))  # whatever its expert, 0 gives the bias
    torch.testing.assert_close(nothing[0], layer.bias, rtol=0, atol=0)
    torch.testing.assert_close(found.module(tokens), through(found.module, tokens))


def test_a_layer_without_bias_gets_none(tmp_path: Path) -> None:
    layer = linear("up", 7, 6, bias=False, dtype=torch.float32)
    written(tmp_path / "x", [layer])
    (found,), _ = read(tmp_path / "x", {"up": layer})
    assert found.module.bias is None
    assert not found.module(torch.zeros(1, 6)).any()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "bloom", "falcon", "llama"])
def test_a_loaded_model_computes_what_the_built_one_did(
    name: str, tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    """Biases of GPT-2, GPT-NeoX, OPT and BLOOM are in no file of the checkpoint."""
    model = tiny(name)
    layers = find_layers(model.module, "all", "mlp")
    has_bias = name not in ("falcon", "llama")
    assert all((layer.bias is not None and bool(layer.bias.any())) == has_bias for layer in layers)
    built = expand(
        model, calibration, experts=2, sparsity=0.5, restarts=1, progress=False, out=tmp_path / "x"
    ).model
    assert built is not None
    loaded = load_expanded(tmp_path / "x", base=tiny(name))
    ids = calibration.ids[:3]
    assert torch.equal(loaded.module(ids).logits, built.module(ids).logits)
    for layer in layers:
        found = loaded.module.get_submodule(layer.name)
        assert isinstance(found, PackedLinear)
        width = layer.in_features
        assert torch.equal(
            found(torch.zeros(1, width)), layer.module(torch.zeros(1, width))
        )  # of nothing both give the bias alone


def test_install_replaces_the_dense_layers_only(tmp_path: Path) -> None:
    model = nn.ModuleDict({layer.name: layer.module for layer in dense_layers()})
    untouched = model["up"]
    gate = dense_layers()[0]
    made = expanded(gate, routing(6, 3))
    install(model, [made])
    assert model["gate"] is made.module
    assert model["up"] is untouched


def test_a_block_of_another_shape_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "x", [linear("up", 7, 6, bias=False, dtype=torch.float32)])
    other = linear("up", 6, 7, bias=False, dtype=torch.float32)
    with pytest.raises(InvalidInput, match=r"'up'.*\(6, 7\).*\[3, 7, 6\]"):
        read(tmp_path / "x", {"up": other})
    with pytest.raises(InvalidInput, match=r"'.*x'.*'up'"):
        read(tmp_path / "x", {"down": other})


def test_names_of_the_files_sort_as_the_blocks_do() -> None:
    assert block_file(7) == "block-0007.safetensors"
    names = [block_file(index) for index in (0, 2, 10, 99, 100, 9999)]
    assert sorted(names) == names


def test_what_the_disk_says_is_an_os_error(tmp_path: Path) -> None:
    layer = linear("up", 7, 6, bias=False, dtype=torch.float32)
    with pytest.raises(FileNotFoundError) as caught:
        written(tmp_path / "nowhere" / "x", [layer])
    assert caught.value.errno == errno.ENOENT


def test_what_is_not_of_the_disk_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_args: object) -> None:
        raise SafetensorError("the header is too large")

    monkeypatch.setattr(block_files, "save_file", fails)
    with pytest.raises(SafetensorError, match="header"):
        written(tmp_path / "x", [linear("up", 7, 6, bias=False, dtype=torch.float32)])


MESSAGE = r"transformers cannot write the routers .*expand\(\.\.\., out=DIR\).*load_expanded"


def test_an_expanded_model_says_how_it_is_saved(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet, tmp_path: Path
) -> None:
    dense: Any = tiny("llama").module
    found = expand(
        tiny("llama"), calibration, experts=2, layers=[0], restarts=1, out=tmp_path / "x",
        progress=False,
    )  # fmt: skip
    assert found.model is not None
    module: Any = found.model.module
    again: Any = structural_copy(module)
    for broken in (module, again):
        with pytest.raises(InvalidInput, match=MESSAGE):
            broken.save_pretrained(tmp_path / "y")
        with pytest.raises(InvalidInput, match=MESSAGE):
            broken.push_to_hub("owner/name")
    assert not (tmp_path / "y").exists()
    dense.save_pretrained(tmp_path / "dense")  # the dense model is not touched
    assert (tmp_path / "dense" / "model.safetensors").exists()


def test_a_module_without_the_method_is_left_alone() -> None:
    module = torch.nn.Linear(2, 2)
    refuse_saving(module)
    assert not hasattr(module, "save_pretrained")
