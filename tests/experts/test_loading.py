"""Which dense model a checkpoint is put on, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from entangle.errors import InvalidInput, Unavailable
from entangle.experts import checkpoint as loading
from entangle.experts.checkpoint import load_base, load_expanded
from entangle.experts.expand import expand
from entangle.models.loading import LanguageModel
from entangle.texts.calibration_set import CalibrationSet
from tests.saved import without_digests

Tiny = Callable[[str], LanguageModel]


@pytest.fixture(scope="module")
def built(
    tiny: Tiny, calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a checkpoint of the first block's MLP; its model was in memory."""
    path = tmp_path_factory.mktemp("checkpoint") / "x"
    expand(
        tiny("llama"), calibration, experts=2, sparsity=0.5, restarts=1, layers=[0, 2],
        progress=False, out=path, keep=False,
    )  # fmt: skip
    return path


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of the checkpoint whose manifest is changed by a function or new fields."""

    def copy(change: Callable[[Any], object] | None = None, **model: object) -> Path:
        path = tmp_path / "copy"
        shutil.copytree(built, path)
        without_digests(path)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["model"] |= model
        if change is not None:
            change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return copy


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> list[tuple[str, dict[str, object]]]:
    """Return the calls of `load_model`, which gives the right model whatever the name."""
    calls = list[tuple[str, dict[str, object]]]()

    def load(name: str, **options: object) -> LanguageModel:
        calls.append((name, options))
        return tiny("llama")

    monkeypatch.setattr(loading, "load_model", load)
    return calls


def test_a_base_from_the_hub_has_the_recorded_revision_and_dtype(
    copied: Callable[..., Path], asked: list[Any]
) -> None:
    path = copied(name="owner/name", source="hub", revision="abc123", dtype="bfloat16")
    load_base(path, device="cpu")
    load_base(path, "other/name", device="cpu")
    load_base(path, "other/name", revision="v2", device="cpu")
    assert asked == [
        ("owner/name", {"revision": "abc123", "dtype": "bfloat16", "device": "cpu"}),
        ("other/name", {"revision": None, "dtype": "bfloat16", "device": "cpu"}),
        ("other/name", {"revision": "v2", "dtype": "bfloat16", "device": "cpu"}),
    ]


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_a_base_on_disk_is_where_it_was_or_where_its_name_leads(
    source: str, copied: Callable[..., Path], asked: list[Any], tmp_path: Path
) -> None:
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.mkdir()
    (tmp_path / "too").mkdir()
    for name, recorded in ((str(tmp_path / "too"), there), (str(there), gone)):
        load_base(copied(name=name, source=source, revision=None, path=str(recorded)))
        shutil.rmtree(tmp_path / "copy")
    assert [name for name, _ in asked] == [str(there), str(there)]
    with pytest.raises(Unavailable, match=r"gone2.*--base"):
        load_base(copied(name=str(tmp_path / "gone2"), source=source, path=str(gone)))


def test_a_base_in_memory_must_be_given(built: Path, tiny: Tiny) -> None:
    digest = tiny("llama").digest
    with pytest.raises(Unavailable, match=rf"'LlamaForCausalLM'.*{digest[:12]}….*--base"):
        load_base(built)
    assert load_expanded(built, base=tiny("llama")).source == "expansion"


def test_what_stops_the_base_keeps_its_kind_and_names_the_checkpoint(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (InvalidInput, Unavailable):

        def fails(*_args: object, kind: type[Exception] = kind, **_options: object) -> None:
            raise kind("no such thing as 'm'.")

        monkeypatch.setattr(loading, "load_model", fails)
        with pytest.raises(kind, match=r"x'.*'m'"):
            load_base(built, "m")


def test_another_base_is_named_by_both_digests(built: Path, tiny: Tiny) -> None:
    right, wrong = tiny("llama").digest, tiny("qwen3").digest
    with pytest.raises(InvalidInput, match=rf"{wrong[:12]}….*{right[:12]}…"):
        load_expanded(built, base=tiny("qwen3"))


def test_a_base_that_is_loaded_must_be_the_right_one_too(
    built: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *_args, **_options: tiny("qwen3"))
    with pytest.raises(InvalidInput, match=tiny("qwen3").digest[:12]):
        load_base(built, "m")


def test_layers_outside_the_checkpoint_stay_dense_and_the_base_stays(
    built: Path, tiny: Tiny
) -> None:
    base = replace(tiny("llama"), revision="abc")
    before = {key: value.clone() for key, value in base.module.state_dict().items()}
    found = load_expanded(built, base=base)
    for key, value in base.module.state_dict().items():
        assert torch.equal(value, before[key])
    kinds = {
        block: type(found.module.get_submodule(f"model.layers.{block}.mlp.up_proj")).__name__
        for block in range(3)
    }
    assert kinds == {0: "PackedLinear", 1: "Linear", 2: "PackedLinear"}
    assert type(base.module.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "Linear"
    assert (found.name, found.revision, found.tokenizer) == (str(built), "abc", base.tokenizer)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.pop("model"),
        lambda m: m.update(model=[]),
        lambda m: m["model"].pop("digest"),
        lambda m: m["model"].pop("dtype"),
        lambda m: m.pop("files"),
        lambda m: m.update(files=[]),
        lambda m: m.pop("settings"),
        lambda m: m.update(settings=None),
        lambda m: m["settings"].pop("sparsity"),
        lambda m: m["settings"].update(sparsity=0.5),
    ],
)
def test_a_manifest_that_lost_a_part_is_refused(
    damage: Callable[[Any], object], copied: Callable[..., Path], tiny: Tiny
) -> None:
    path = copied(damage)
    with pytest.raises(InvalidInput, match=r"copy'.*manifest\.json"):
        load_base(path, "m")
    with pytest.raises(InvalidInput, match=r"copy'.*manifest\.json"):
        load_expanded(path, base=tiny("llama"))


@pytest.mark.parametrize(
    "name",
    ["../other/block-0000.safetensors", "{other}/block-0000.safetensors", "..", "", "a/b", "link"],
)
def test_a_manifest_names_files_of_its_own_folder(
    name: str, built: Path, copied: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    """Even where the file that it names has the digest and experts that it should have."""
    other = tmp_path / "other"
    shutil.copytree(built, other)
    named = name.format(other=other)
    path = copied(lambda m: m["files"].update({named: m["files"].pop("block-0000.safetensors")}))
    (path / "link").symlink_to(other / "block-0000.safetensors")
    loads: list[Callable[[], object]] = [
        partial(load_base, path, "m"), partial(load_expanded, path, base=tiny("llama")),
    ]  # fmt: skip
    for load in loads:
        with pytest.raises(InvalidInput, match=r"manifest\.json of .*copy'") as caught:
            load()
        assert repr(named) in str(caught.value)


def test_every_expanded_layer_must_have_its_experts(
    copied: Callable[..., Path], tiny: Tiny
) -> None:
    """The first one missing is named, in the order of names."""
    path = copied(
        lambda m: m["settings"]["sparsity"].update({"model.layers.1.mlp.up_proj": 0.5, "z": 0.5})
    )
    with pytest.raises(InvalidInput, match=r"'model\.layers\.1\.mlp\.up_proj'"):
        load_expanded(path, base=tiny("llama"))
