from pathlib import Path

import pytest

from entangle.errors import InvalidInput, UnknownName
from entangle.models.sources import check_folder, model_source


@pytest.mark.parametrize(
    "name",
    ["gpt2", "owner/name", "EleutherAI/pythia-1.4b", "google/gemma-3-270m", "a_b/c.d-e", "_x/y"],
)
def test_names_that_can_be_hub_ids(name: str) -> None:
    assert model_source(name) == "hub"


@pytest.mark.parametrize(
    "name",
    [
        "what is this", "a/b/c", "./x", "~/x", "/x", "x.gguf", "a--b", "a..b", "a/b.", "a/b.git",
        "-a", "x" * 97, "x" * 3000, "a/ä", "a:b", "a\\b", "a/",
    ],
)  # fmt: skip
def test_names_that_cannot(name: str) -> None:
    with pytest.raises(UnknownName) as caught:
        model_source(name)
    assert repr(name[:40])[1:20] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_no_names(name: str) -> None:
    with pytest.raises(InvalidInput, match="`model`"):
        model_source(name)


def _files(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_folders(tmp_path: Path) -> None:
    assert model_source("demo") == "demo"
    whole = _files(tmp_path / "whole", "config.json", "model.safetensors")
    assert model_source(whole) == model_source(str(whole)) == "folder"
    sharded = _files(tmp_path / "sharded", "config.json", "model.safetensors.index.json")
    assert model_source(sharded) == "folder"
    adapter = _files(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors")
    assert model_source(adapter) == "adapter"
    assert model_source(_files(adapter, "config.json")) == "adapter"  # a config, but no weights
    assert model_source(_files(adapter, "model.safetensors")) == "folder"
    (tmp_path / "x.gguf").touch()
    assert model_source(tmp_path / "x.gguf") == "gguf"


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        ((), "config.json"),
        (("config.json",), "model.safetensors"),
        (("config.json", "pytorch_model.bin"), "pytorch_model.bin"),
        (("model.safetensors",), "config.json"),
        (("x.gguf",), "x.gguf"),
        (("adapter_config.json",), "adapter_model.safetensors"),
        (("adapter_config.json", "adapter_model.bin"), "adapter_model.bin"),
        (("config.json", "adapter_model.safetensors"), "model.safetensors"),
    ],
)
def test_folders_that_hold_no_model(files: tuple[str, ...], remedy: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=remedy) as caught:
        check_folder(_files(tmp_path / "x", *files))
    assert str(tmp_path / "x") in str(caught.value)
