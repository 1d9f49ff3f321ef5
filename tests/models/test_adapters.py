import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from entangle.errors import InvalidInput, UnknownName
from entangle.models.layers import list_layers
from entangle.models.loading import load_model
from tests.planted import planted_weights
from tests.tiny_models import save_tiny

peft = pytest.importorskip("peft", reason="adapters need the optional package peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = torch.arange(4, 20)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "base")


@pytest.fixture
def adapted(base: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter's folder, and the logits of the base with it."""
    model: Any = load_model(base, device="cpu").module
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["gate_proj", "q_proj"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, settings).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", wrapped(IDS).logits


def _config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_is_merged_into_its_base(
    base: Path, adapted: tuple[Path, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, logits = adapted
    capfd.readouterr()
    model = load_model(folder, device="cpu")
    said = capfd.readouterr().err
    assert str(folder) in said
    assert str(base) in said
    assert model.source == "adapter"
    assert model.tokenizer is not None  # the base's
    torch.testing.assert_close(model.module(IDS).logits, logits)
    plain = load_model(base, device="cpu").module
    assert not torch.allclose(plain(IDS).logits, logits, atol=1e-3)
    names = [layer.name for layer in list_layers(model.module)]
    assert names == [layer.name for layer in list_layers(plain)]
    assert {p.dtype for p in load_model(folder, dtype="bfloat16").module.parameters()} == {
        torch.bfloat16
    }


def test_a_base_named_from_beside_the_adapter(adapted: tuple[Path, torch.Tensor]) -> None:
    folder, logits = adapted
    _config(folder, base_model_name_or_path="../base")
    torch.testing.assert_close(load_model(folder, device="cpu").module(IDS).logits, logits)


@pytest.mark.parametrize("installed", [True, False])
def test_a_model_beside_an_adapter_is_loaded_without_it_and_that_is_said(
    installed: bool,
    base: Path,
    adapted: tuple[Path, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plain = load_model(base, device="cpu")
    for file in adapted[0].iterdir():
        if file.name.startswith("adapter_"):
            shutil.copy(file, base / file.name)
    if not installed:
        from transformers.models.auto import auto_factory

        monkeypatch.setattr(auto_factory, "is_peft_available", lambda: False)
    capfd.readouterr()
    model = load_model(base, device="cpu")
    assert "adapter" in capfd.readouterr().err
    assert model.digest == plain.digest
    assert torch.equal(model.module(IDS).logits, plain.module(IDS).logits)
    assert not hasattr(model.module, "peft_config") or not model.module.peft_config


def test_what_cannot_be_merged_is_one_line(
    base: Path, adapted: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = adapted
    for wrong, kind, value in (
        (None, InvalidInput, str(folder)),
        ("/no/such/base", InvalidInput, "/no/such/base"),
        (str(folder), InvalidInput, str(folder)),
        ("demo", InvalidInput, "demo"),
    ):
        _config(folder, base_model_name_or_path=wrong)
        with pytest.raises(kind, match=value) as caught:
            load_model(folder, device="cpu")
        assert "\n" not in str(caught.value)
    _config(folder, base_model_name_or_path=str(base), peft_type="NONSENSE")
    with pytest.raises(InvalidInput, match=str(folder)):
        load_model(folder, device="cpu")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidInput, match=str(folder)):
        load_model(folder, device="cpu")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidInput, match=r"adapter_model\.bin"):
        load_model(folder, device="cpu")


def test_an_adapter_of_adapters_unpickles_none(
    base: Path, adapted: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """X-LoRA names folders of adapters, whose pickles PEFT would load."""
    folder, _ = adapted
    config = json.loads((base / "config.json").read_text()) | {"use_cache": False}
    (base / "config.json").write_text(json.dumps(config))
    inner = tmp_path / "inner"
    shutil.copytree(folder, inner)
    (inner / "adapter_model.safetensors").unlink()
    (inner / "adapter_model.bin").write_bytes(planted_weights(tmp_path / "trace"))
    settings = {
        "peft_type": "XLORA", "base_model_name_or_path": str(base), "hidden_size": 32,
        "task_type": "CAUSAL_LM", "adapters": {"0": str(inner)},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidInput, match=r"pickle.*adapter_model\.bin"):
        load_model(folder, device="cpu")
    assert not (tmp_path / "trace").exists()


def test_a_prompt_has_no_merged_form(base: Path, tmp_path: Path) -> None:
    model: Any = load_model(base, device="cpu").module
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "prompt")
    with pytest.raises(InvalidInput, match="PROMPT_TUNING"):
        load_model(tmp_path / "prompt", device="cpu")


def test_weights_of_another_base(adapted: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    _config(adapted[0], base_model_name_or_path=str(save_tiny("gpt_neox", tmp_path / "other")))
    with pytest.raises(InvalidInput, match=str(adapted[0])):
        load_model(adapted[0], device="cpu")


def test_without_peft(adapted: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InvalidInput, match="peft"):
        load_model(adapted[0], device="cpu")


def test_settings_that_do_not_apply(adapted: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(InvalidInput, match="auto"):
        load_model(adapted[0], device_map="auto")
    with pytest.raises(UnknownName, match="no-such"):
        load_model(adapted[0].parent / "no-such.gguf")
