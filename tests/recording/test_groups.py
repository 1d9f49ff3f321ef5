from collections.abc import Callable

import pytest
import torch

from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.recording.groups import shared_inputs

IDS = torch.arange(4, 8)[None]
GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gemma3": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
}


@pytest.mark.parametrize("name", GROUPS)
def test_layers_that_read_one_input(name: str, tiny: Callable[[str], LanguageModel]) -> None:
    module = tiny(name).module
    found = shared_inputs(module, find_layers(module, "all"), IDS)
    members = [sorted(layer.projection for layer in group) for group in found]
    assert members == [sorted(group) for group in GROUPS[name]] * 3


def test_no_hook_is_left_behind(
    tiny: Callable[[str], LanguageModel], count_hooks: Callable[[torch.nn.Module], int]
) -> None:
    module = tiny("llama").module
    shared_inputs(module, find_layers(module, "all"), IDS)
    assert count_hooks(module) == 0
