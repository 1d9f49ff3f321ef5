import json
from pathlib import Path

import pytest

from entangle.errors import InvalidInput, UnknownName
from entangle.models.hub import check_folder, indexed_files, model_source


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


def _index(folder: Path, names: object, file: str = "model.safetensors.index.json") -> None:
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_folders(tmp_path: Path) -> None:
    assert model_source("demo") == "demo"
    whole = _files(tmp_path / "whole", "config.json", "model.safetensors")
    assert model_source(whole) == model_source(str(whole)) == "folder"
    sharded = _files(tmp_path / "sharded", "config.json")
    _index(sharded, {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"})
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
        *(
            (("config.json", name), f"{name} is no safetensors file")
            for name in ("pytorch_model.bin", "model.pt", "x.pth", "last.ckpt", "x.pkl", "x.pickle")
        ),
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


OTHERS: list[object] = [
    "pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl", "x", "x.safetensors.bin",
    "x.SAFETENSORS", "../x.safetensors", "/x.safetensors", "below/x.safetensors", "", None, 3, [],
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "file", ["model.safetensors.index.json", "model.other.safetensors.index.json"]
)
@pytest.mark.parametrize("beside", [False, True])
def test_an_index_may_name_nothing_but_safetensors_of_its_folder(
    file: str, name: object, beside: bool, tmp_path: Path
) -> None:
    folder = _files(tmp_path / "x", "config.json", "a.safetensors")
    if beside:
        _files(folder, "model.safetensors")
    _index(folder, {"a": "a.safetensors", "b": name}, file)
    with pytest.raises(InvalidInput) as caught:
        model_source(folder)
    assert all(part in str(caught.value) for part in (str(folder / file), repr(name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[", b"[1]", b"3", b"\xff", b'{"weight_map": [1]}', b"{}", b"[" * 10**6]
)
def test_an_index_that_is_none(content: bytes, tmp_path: Path) -> None:
    folder = _files(tmp_path / "x", "config.json", "model.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"model\.safetensors\.index\.json"):
        model_source(folder)


def test_an_index_names_every_file_once(tmp_path: Path) -> None:
    folder = _files(tmp_path / "x")
    _index(folder, {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    found = indexed_files(folder / "model.safetensors.index.json")
    assert found == [folder / "1.safetensors", folder / "2.safetensors"]


def test_indices_of_weights_that_are_never_read_may_lie_beside(tmp_path: Path) -> None:
    folder = _files(tmp_path / "x", "config.json", "model.safetensors", "pytorch_model-1-of-1.bin")
    _index(folder, {"a": "pytorch_model-1-of-1.bin"}, "pytorch_model.bin.index.json")
    assert model_source(folder) == "folder"
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match=r"pytorch_model-1-of-1\.bin is no safetensors file"):
        model_source(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "x.pt", 3, ["x"]])
def test_a_config_may_name_nothing_else_either(name: object, tmp_path: Path) -> None:
    folder = _files(tmp_path / "x", "model.safetensors", "adapter_model.bin")
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(InvalidInput, match="transformers_weights") as caught:
        model_source(folder)
    assert repr(name) in str(caught.value)
    (folder / "config.json").write_text('{"transformers_weights": "x.safetensors"}')
    assert model_source(folder) == "folder"


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_link_to_nothing_is_no_weight_file(name: str, tmp_path: Path) -> None:
    """Or PEFT would take the pickle beside it."""
    config = "config.json" if name.startswith("model") else "adapter_config.json"
    folder = _files(tmp_path / "x", config, "adapter_model.bin")
    (folder / name).symlink_to(tmp_path / "missing")
    with pytest.raises(InvalidInput, match=r"adapter_model\.bin"):
        model_source(folder)


def test_shards_of_the_hub_are_links_to_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("c" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    _files(blobs, "1f")
    _files(snapshot, "config.json")
    (snapshot / "1.safetensors").symlink_to("../../blobs/1f")
    _index(snapshot, {"a": "1.safetensors"})
    assert model_source(snapshot) == "folder"
    (snapshot / "1.safetensors").unlink()
    (snapshot / "1.safetensors").symlink_to(_files(tmp_path / "y", "z") / "z")
    with pytest.raises(InvalidInput, match=r"1\.safetensors.*link"):
        model_source(snapshot)
