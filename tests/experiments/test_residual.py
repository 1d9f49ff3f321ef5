from collections.abc import Callable

import pytest
import torch

from entangle.errors import InvalidInput
from entangle.experiments.damage import residual_variance, residual_writers
from entangle.models.layers import find_blocks
from entangle.models.loading import LanguageModel
from entangle.texts.calibration_set import CalibrationSet

Tiny = Callable[[str], LanguageModel]

WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gemma3": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "phi3": ["self_attn.o_proj", "mlp.down_proj"],
    "mistral": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "opt": ["self_attn.out_proj", "fc2"],
    "falcon": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "bloom": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "mixtral": ["self_attn.o_proj"],
}


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize("seed", [0, 1])
def test_writers_are_found_without_names(
    tiny: Tiny, calibration: CalibrationSet, name: str, seed: int
) -> None:
    model = tiny(name)
    prefix, blocks = find_blocks(model.module)
    expected = {f"{prefix}.{b}.{w}" for b in range(len(blocks)) for w in WRITERS[name]}
    found = residual_writers(model, calibration.ids, seed=seed)
    assert {layer.name for layer in found} == expected
    assert [layer.block for layer in found] == sorted(layer.block or 0 for layer in found)


@pytest.mark.usefixtures("any_memory")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_variance_is_that_of_the_models_own_hidden_states(
    tiny: Tiny, calibration: CalibrationSet, name: str
) -> None:
    model, after = tiny(name), list[torch.Tensor]()
    prefix, blocks = find_blocks(model.module)
    handles = [
        block.register_forward_hook(
            lambda _module, _args, out: after.append(
                out if isinstance(out, torch.Tensor) else out[0]
            )
        )
        for block in blocks
    ]
    model.module(calibration.ids)
    for handle in handles:
        handle.remove()
    found = residual_variance(model, calibration, memory=0, progress=False)
    for b, hidden in enumerate(after):
        expected = hidden.flatten(0, 1).double().var(dim=0, correction=0)
        for writer in WRITERS[name]:
            torch.testing.assert_close(found[f"{prefix}.{b}.{writer}"], expected)
    assert len(found) == len(after) * 2


def test_batches_do_not_matter(
    tiny: Tiny, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = residual_variance(tiny("llama"), calibration)
    monkeypatch.setattr("entangle.texts.calibration_set._TOKENS_IN_A_PASS", 64)
    parts = residual_variance(tiny("llama"), calibration)
    assert whole.keys() == parts.keys()
    for name, variance in whole.items():
        assert variance.dtype == torch.float64
        torch.testing.assert_close(parts[name], variance, rtol=1e-4, atol=0)


def test_an_encoder_is_refused(tiny: Tiny, calibration: CalibrationSet) -> None:
    with pytest.raises(InvalidInput, match=r"BertModel.*block"):
        residual_variance(tiny("bert"), calibration)
