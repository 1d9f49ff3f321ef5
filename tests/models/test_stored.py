import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.models.cache import stored_dtype
from entangle.models.loading import load_model
from tests.tiny_models import save_tiny


def _save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_dtype(dtype: torch.dtype, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = _save(tmp_path, {"a": torch.zeros(2, dtype=dtype), "ids": torch.zeros(9).long()})
    assert stored_dtype(folder) == dtype
    assert capfd.readouterr().err == ""


def test_of_several_the_one_of_most_values_and_what_it_rounds_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    many, few = torch.zeros(100), torch.zeros(3)
    assert stored_dtype(_save(tmp_path, {"a": many, "b": few.half()})) == torch.float32
    assert capfd.readouterr().err == ""  # float32 holds every float16
    assert stored_dtype(_save(tmp_path, {"a": many.bfloat16(), "b": few})) == torch.bfloat16
    said = capfd.readouterr().err
    assert all(part in said for part in (str(tmp_path), "3 of 103", "dtype=float32"))
    assert stored_dtype(_save(tmp_path, {"a": many.bfloat16(), "b": few.half()})) == torch.bfloat16
    assert "3 of 103" in capfd.readouterr().err  # neither holds the other


def test_shards_and_what_is_no_file_of_the_model(tmp_path: Path) -> None:
    for number, dtype in ((1, torch.float16), (2, torch.float16)):
        save_file({f"{number}": torch.zeros(4, dtype=dtype)}, tmp_path / f"{number}.safetensors")
    save_file({"x": torch.zeros(99)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"1": "1.safetensors", "2": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_dtype(tmp_path) == torch.float16


def test_none_and_eight_bits(tmp_path: Path) -> None:
    assert stored_dtype(tmp_path) is None
    assert stored_dtype(_save(tmp_path, {"ids": torch.zeros(2).long()})) is None
    with pytest.raises(InvalidInput, match="F8"):
        stored_dtype(_save(tmp_path, {"a": torch.zeros(2).to(torch.float8_e4m3fn)}))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_auto_keeps_what_is_stored_whatever_the_config_says(
    stored: torch.dtype, said: str | None, key: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = save_tiny("llama", tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value.to(stored) for name, value in weights.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for old in ("dtype", "torch_dtype"):
        config.pop(old, None)
    (folder / "config.json").write_text(json.dumps(config | ({key: said} if said else {})))
    model = load_model(folder, device="cpu")
    got = dict(model.module.named_parameters())
    assert all(torch.equal(got[name], value) for name, value in kept.items() if name in got)
    assert {p.dtype for p in got.values()} == {stored}
