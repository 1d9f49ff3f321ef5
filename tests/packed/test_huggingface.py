"""An expansion is an ordinary folder: transformers loads, runs, saves and uploads it."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import entangle
from entangle.errors import InvalidInput
from entangle.experts.expand import expand
from entangle.models.loading import LanguageModel, as_language_model
from entangle.packed.huggingface import SparseExpansionConfig
from entangle.packed.linear import PackedGated, PackedLinear, PackedRouter
from tests.tiny_models import GROUPED, WIDE, tiny_tokenizer

Tiny = Callable[[str], LanguageModel]
IDS = torch.randint(5, 112, (8, 16), generator=torch.Generator().manual_seed(0))
PROMPT = IDS[:2, :5]


def built(model: Any, out: Path, **settings: Any) -> Any:
    """Return the model with dense experts, whose folder is written."""
    chosen = {"experts": 3, "sparsity": 0.5, "restarts": 1, "progress": False, **settings}
    found = expand(model, IDS, out=out, **chosen).model
    assert found is not None
    return found.module


def load(folder: Path, **settings: Any) -> Any:
    auto: Any = hf.AutoModelForCausalLM
    return auto.from_pretrained(folder, **settings)


def generated(model: Any) -> list[list[int]]:
    found: list[list[int]] = model.generate(PROMPT, max_new_tokens=8, do_sample=False).tolist()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """An expansion of the tiny Llama, with its tokenizer."""
    path = tmp_path_factory.mktemp("packed") / "x"
    model = LanguageModel(tiny("llama").module, tiny_tokenizer(), "tiny", "memory", None)
    built(model, path)
    return path


OTHERS = {
    "qwen2": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "phi": ("PhiConfig", {**WIDE, "intermediate_size": 48}),
}


def model_of(name: str, tiny: Tiny) -> nn.Module:
    if name not in OTHERS:
        return tiny(name).module
    kind, settings = OTHERS[name]
    auto: Any = hf.AutoModelForCausalLM
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(getattr(hf, kind)(**settings)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


@pytest.mark.parametrize("proj", ["mlp", None])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", "opt", "gpt_neox", "phi"])
def test_every_architecture_gives_the_tokens_of_dense_experts(
    name: str, proj: str | None, tiny: Tiny, tmp_path: Path
) -> None:
    reference = built(as_language_model(model_of(name, tiny)), tmp_path / "x", proj=proj)
    loaded = load(tmp_path / "x")
    torch.testing.assert_close(loaded(IDS).logits, reference(IDS).logits)
    assert generated(loaded) == generated(reference)
    assert any(isinstance(one, PackedLinear) for one in loaded.modules())
    gated = any(isinstance(one, PackedGated) for one in loaded.modules())
    assert gated == (name in ("llama", "qwen2", "gemma3"))


def test_without_a_head_it_loads_too(folder: Path) -> None:
    auto: Any = hf.AutoModel
    hidden = auto.from_pretrained(folder)(IDS)[0]
    torch.testing.assert_close(hidden, load(folder).model(IDS)[0])


@pytest.mark.parametrize("settings", [
    {"pattern": "2:4", "format": "n16", "sparsity": None},
    {"pattern": "2:4", "format": "n16", "sparsity": None, "bits": 4},
    {"bits": 4}, {"bits": 8}, {"bits": 3}, {"bits": 4, "values": "float32"},
    {"values": "bfloat16"}, {"experts": 1}, {"router": "random"},
])  # fmt: skip
def test_every_way_to_store_runs_as_it_was_built(
    settings: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    reference = built(tiny("llama"), tmp_path / "x", **settings)
    loaded = load(tmp_path / "x")
    torch.testing.assert_close(loaded(IDS).logits, reference(IDS).logits)
    layer = loaded.model.layers[1].mlp.down_proj
    bits = settings.get("bits")
    coded = bits is not None and "values" not in settings
    kind = f"int{8 if bits == 8 else 4}" if coded else settings.get("values", "float32")
    assert layer.layout.values == kind
    assert layer.layout.format == settings.get("format", "bitmap")
    assert len(layer.layout.tensors()["values"][0]) == (1 if layer.layout.stored else 5)
    card = (tmp_path / "x" / "README.md").read_text()
    assert (f"values\ncodes of {bits} bits)" in card) == coded


def test_formats_that_do_not_fit_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for settings in ({"format": "n16"}, {"format": "csr"}, {"values": "int4"}):
        with pytest.raises(InvalidInput):
            built(tiny("llama"), tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dense_rest_follows_dtype_and_experts_do_not(folder: Path, dtype: torch.dtype) -> None:
    loaded, before = load(folder, dtype=dtype), dict(load(folder).named_buffers())
    assert loaded.dtype == dtype
    assert loaded(IDS).logits.dtype == dtype
    loaded.model.layers[0].to(torch.float64)  # nor do they when they are cast
    for name, module in loaded.named_modules():
        if isinstance(module, PackedLinear | PackedRouter):
            for key, buffer in module.named_buffers():
                if key != "weight":
                    assert buffer.dtype == before[f"{name}.{key}"].dtype
                    assert torch.equal(buffer, before[f"{name}.{key}"])


def test_what_is_loaded_is_mapped_from_the_file(folder: Path) -> None:
    loaded = load(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for index, layer in enumerate(loaded.model.layers):
        name = str(folder / f"block-{index:04d}.safetensors")
        spans = [one[0].split("-") for one in maps if one[-1] == name]
        at = layer.mlp.up_proj.values.data_ptr()
        assert any(int(low, 16) <= at < int(high, 16) for low, high in spans)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in set(index.values()):
        found |= load_file(path / name)
    assert found.keys() == index.keys()
    return found


def test_it_is_saved_again_as_it_is(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "y")
    before, after = tensors(folder), load_file(tmp_path / "y" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("README.md", "modeling_sparse_expansion.py"):
        assert (tmp_path / "y" / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(load(tmp_path / "y")(IDS).logits, load(folder)(IDS).logits)


def test_it_is_uploaded_with_its_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    sent: dict[str, bytes] = {}

    class Repository:
        repo_id = "owner/name"

    class Api:
        def create_repo(self, *_args: object, **_kw: object) -> type[Repository]:
            return Repository

    def upload(_self: object, folder: str, *_args: object, **_kw: object) -> None:
        sent.update({path.name: path.read_bytes() for path in Path(folder).iterdir()})

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_args, **_kw: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    load(folder).push_to_hub("owner/name")
    assert sent["README.md"] == (folder / "README.md").read_bytes()
    assert {"model.safetensors", "config.json", "modeling_sparse_expansion.py"} <= sent.keys()


class Card:
    def save(self, path: str) -> None:
        Path(path).write_text("a default card")


def test_a_pipeline_runs(folder: Path) -> None:
    pipe: Any = hf.pipeline("text-generation", model=str(folder), device="cpu")
    text = pipe("a prompt", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("a prompt")


def test_the_card_and_the_config_hold_no_path(folder: Path) -> None:
    for name in ("README.md", "config.json", "generation_config.json", "tokenizer_config.json"):
        assert str(folder.parent) not in (folder / name).read_text()
    assert "| expansion |" in (folder / "README.md").read_text()


IN_A_PROCESS = """
import sys, torch
{first}
from transformers import AutoModelForCausalLM
{then}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], {settings})
ids = torch.arange(5, 21)[None]
found = model(ids).logits
{last}
print(found.double().sum().item())
"""


COMPILED = """
with torch.no_grad():
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, found)
"""


def in_a_process(folder: Path, **parts: str) -> "subprocess.CompletedProcess[str]":
    code = IN_A_PROCESS.format(**{"first": "", "then": "", "settings": "", "last": "", **parts})
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("parts", [
    {"first": "import entangle", "last": COMPILED}, {"then": "import entangle"},
    {"settings": "trust_remote_code=True"},
])  # fmt: skip
def test_it_loads_in_a_new_process(
    parts: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    done = in_a_process(folder, **parts)
    assert done.returncode == 0, done.stderr
    expected = load(folder)(torch.arange(5, 21)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_without_the_package_nothing_is_drawn_at_random(folder: Path) -> None:
    done = in_a_process(folder)
    assert done.returncode == 1
    assert "mismatch" in done.stderr


def copied(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """Return a copy without digests whose quantisation config is changed."""
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_newer_format_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path, version=3)
    with pytest.raises(InvalidInput, match="3"):
        load(path)
    with pytest.raises(InvalidInput, match="altered"):
        entangle.load_expanded(path)


@pytest.mark.parametrize("change", [
    {"routers": {}}, {"layers": {"model.layers.0.mlp.up_proj": {}}},
    {"gated": {"model.layers.0.mlp": {"gate": "gate_proj"}}},
])  # fmt: skip
def test_a_damaged_config_is_refused(change: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="config"):
        load(copied(folder, tmp_path, **change))


def test_truncated_and_swapped_files_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    block = path / "block-0001.safetensors"
    content = block.read_bytes()
    block.write_bytes(content[:-9])
    with pytest.raises(InvalidInput, match="block-0001"):
        load(path)
    with pytest.raises(InvalidInput, match="block-0001"):
        entangle.load_expanded(path)
    block.write_bytes((path / "block-0002.safetensors").read_bytes())
    with pytest.raises(InvalidInput, match=r"layers\.1"):
        load(path)
    found = load_file(folder / "block-0001.safetensors")
    found["model.layers.1.mlp.up_proj.values"] = found["model.layers.1.mlp.up_proj.values"][:-8]
    save_file(found, block, {"format": "pt"})
    with pytest.raises(InvalidInput, match=r"up_proj\.values"):
        load(path)


@pytest.mark.parametrize("form", ["bitmap", "delta", "n16"])
def test_a_file_of_another_build_is_refused(form: str, tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"pattern": "2:4", "sparsity": None, "format": form}
    for name, pruner in (("x", "sparsegpt"), ("y", "random")):
        built(tiny("llama"), tmp_path / name, pruner=pruner, **settings)
    block = tmp_path / "x" / "block-0001.safetensors"
    shutil.copyfile(tmp_path / "y" / block.name, block)
    with pytest.raises(InvalidInput, match=r"layers\.1.*another build"):
        load(tmp_path / "x")


@pytest.mark.parametrize("change", [
    lambda starts: starts + 1, lambda starts: starts - 1, lambda starts: starts.flip(1),
    lambda starts: starts.flip(0), lambda starts: starts.clamp(max=int(starts[0, 1])),
])  # fmt: skip
@pytest.mark.parametrize("form", ["bitmap", "delta"])
def test_rows_that_lie_elsewhere_are_refused(
    form: str, change: Callable[[torch.Tensor], torch.Tensor], tiny: Tiny, tmp_path: Path
) -> None:
    built(tiny("llama"), tmp_path / "x", format=form)
    block = tmp_path / "x" / "block-0001.safetensors"
    found = load_file(block)
    name = "model.layers.1.mlp.up_proj.starts"
    found[name] = change(found[name])
    save_file(found, block, {"format": "pt"})
    with pytest.raises(InvalidInput, match="damaged"):
        load(tmp_path / "x")


def test_it_is_pickled(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    again = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    for number, one in enumerate((again, copy.deepcopy(loaded))):
        one.save_pretrained(tmp_path / str(number))
        assert (tmp_path / str(number) / "modeling_sparse_expansion.py").is_file()
        assert torch.equal(load(tmp_path / str(number))(IDS).logits, loaded(IDS).logits)


def test_a_config_of_another_model_is_refused(folder: Path, tiny: Tiny) -> None:
    from entangle.packed.huggingface import install

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = SparseExpansionConfig(**settings)
    with pytest.raises(InvalidInput, match="another model"):
        install(tiny("gpt2").module, config)


def test_two_builds_are_the_same_bytes(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    model = LanguageModel(tiny("llama").module, tiny_tokenizer(), "tiny", "memory", None)
    built(model, tmp_path / "again")
    for path in folder.iterdir():
        if path.name != "run.json":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_load_expanded_needs_no_base_and_takes_one(folder: Path, tiny: Tiny) -> None:
    alone = entangle.load_expanded(folder, device="cpu")
    beside = entangle.load_expanded(folder, base=tiny("llama"))
    for model in (alone, beside):
        assert any(isinstance(one, PackedGated) for one in model.module.modules())
        assert torch.equal(model.module(IDS).logits, load(folder)(IDS).logits)
        assert model.source == "expansion"
    assert alone.tokenizer is not None


def test_a_digest_of_a_model_tells_its_experts(folder: Path) -> None:
    first, second = (entangle.load_expanded(folder, device="cpu") for _ in range(2))
    values: Any = second.module.get_submodule("model.layers.0.mlp.up_proj").values
    values[0] += 1
    assert first.digest != second.digest
