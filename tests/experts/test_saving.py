from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from entangle.errors import InvalidInput
from entangle.experts.build import structural_copy
from entangle.experts.checkpoint import load_expanded, refuse_saving
from entangle.experts.expand import expand
from entangle.models.loading import LanguageModel
from entangle.texts.calibration_set import CalibrationSet

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
    loaded = load_expanded(tmp_path / "x", base=tiny("llama"))
    for model in (found.model, loaded):
        module: Any = model.module
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
