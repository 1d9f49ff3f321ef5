"""Checkpoints of version 1 load, and are written anew in today's format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import entangle
from entangle.cli.main import main
from entangle.errors import InvalidInput
from entangle.experts.block_files import read_block
from entangle.experts.checkpoint import load_expanded
from entangle.experts.convert import convert
from entangle.experts.expand import expand
from entangle.experts.linear import pack
from entangle.models.layers import list_layers
from entangle.models.loading import LanguageModel
from entangle.runs.sealing import file_digest, manifest_digest
from entangle.texts.calibration_set import CalibrationSet

Tiny = Callable[[str], LanguageModel]


def write_old(path: Path, build: Path, model: LanguageModel) -> None:
    """Write a block as version 1 did, in the place of today's."""
    layers = {layer.name: layer for layer in list_layers(model.module)}
    found, report = read_block(path, build, layers)
    tensors: dict[str, torch.Tensor] = {}
    described = {}
    routers = list(dict.fromkeys(one.module.routing for one in found))
    for one in found:
        name, weight = one.layer.name, one.module.weight.detach()
        tensors[f"{name}:bitmap"], tensors[f"{name}:values"] = pack(weight)
        described[name] = {
            "router": routers.index(one.module.routing), "shape": list(weight.shape),
        }  # fmt: skip
    for number, routing in enumerate(routers):
        for key, value in routing.router.state().items():
            tensors[f"router {number}:{key}"] = value
    path.unlink()
    save_file(tensors, path, {"entangle": json.dumps({"layers": described, "report": report})})


@pytest.fixture
def old(tiny: Tiny, calibration: CalibrationSet, tmp_path: Path) -> Path:
    """Return a checkpoint of the tiny Llama as version 1 wrote it."""
    path = tmp_path / "old"
    expand(tiny("llama"), calibration, experts=2, restarts=1, progress=False, out=path)
    manifest = json.loads((path / "manifest.json").read_text())
    for block in sorted(path.glob("block-*.safetensors")):
        write_old(block, block.with_suffix(".build"), tiny("llama"))
    kept = {"manifest.json", "layers.parquet", "run.json"}
    for file in path.iterdir():
        if file.name not in kept and not (file.name[:5] == "block" and file.suffix != ".build"):
            file.unlink()
    for name in ("format", "values"):
        del manifest["settings"][name]
    manifest["files"] = {file.name: file_digest(file) for file in sorted(path.glob("block-*"))}
    del manifest["digests"]
    layers = {"layers.parquet": file_digest(path / "layers.parquet")}
    manifest["digests"] = {
        "manifest": manifest_digest(manifest), "files": layers, "figures": {},
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_an_old_checkpoint_loads_and_is_converted(old: Path, tiny: Tiny, tmp_path: Path) -> None:
    ids = torch.arange(5, 15)[None]
    before: Any = load_expanded(old, base=tiny("llama"))
    convert(old, tmp_path / "new", base=tiny("llama"))
    convert(tmp_path / "new", tmp_path / "again", base=tiny("llama"))
    auto: Any = hf.AutoModelForCausalLM
    for name in ("new", "again"):
        loaded = auto.from_pretrained(tmp_path / name)
        torch.testing.assert_close(loaded(ids).logits, before.module(ids).logits)
    narrow = tmp_path / "narrow"
    convert(tmp_path / "new", narrow, base=tiny("llama"), values="bfloat16")
    assert auto.from_pretrained(narrow).model.layers[0].mlp.up_proj.layout.values == "bfloat16"
    with pytest.raises(InvalidInput):
        convert(old, tmp_path / "x", base=tiny("llama"), format="n16")


@pytest.mark.parametrize("settings", [
    {"bits": 4, "group_size": 128}, {"bits": 3, "values": "float16"}, {"values": "bfloat16"},
])  # fmt: skip
def test_what_is_converted_keeps_its_values(
    settings: dict[str, Any], tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    made = {"experts": 2, "restarts": 1, "progress": False, **settings}
    expand(tiny("llama"), calibration, out=tmp_path / "old", **made)
    convert(tmp_path / "old", tmp_path / "new", base=tiny("llama"), format="delta")
    auto: Any = hf.AutoModelForCausalLM
    old, new = (auto.from_pretrained(tmp_path / name) for name in ("old", "new"))
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(new(ids).logits, old(ids).logits)
    layers = [one.model.layers[0].mlp.up_proj for one in (old, new)]
    assert layers[0].layout.values == layers[1].layout.values
    assert layers[1].layout.format == "delta"
    report: Any = entangle.load_result(tmp_path / "new")
    before: Any = entangle.load_result(tmp_path / "old")
    table = report.layers.set_index("layer")
    stored = sum(tensor.nbytes for tensor in layers[1].tensors.values())
    assert table.loc["model.layers.0.mlp.up_proj", "bytes"] == stored
    difference = int(report.layers["bytes"].sum() - before.layers["bytes"].sum())
    dense = sum(layer.weight.nbytes for layer in list_layers(tiny("llama").module))
    changed = report.costs["bytes"] - before.costs["bytes"]
    assert changed == pytest.approx(difference / dense, rel=1e-6)


def test_the_command(
    old: Path, tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    new, base = old.parent / "new", tiny_folder("llama")
    command = ["convert", str(old), "--base", str(base), "--device", "cpu", "--out", str(new)]
    assert main(command) == 0
    assert "Saved" in capsys.readouterr().out
    assert main(command) == 2
    assert load_expanded(new, device="cpu").source == "expansion"
