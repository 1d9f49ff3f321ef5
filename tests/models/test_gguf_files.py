import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
import torch
import transformers as hf
from transformers import modeling_gguf_pytorch_utils as hf_gguf
from transformers.integrations import peft as peft_integration
from transformers.models.auto import auto_factory

from entangle.errors import InvalidInput
from entangle.models import cache, gguf_files
from entangle.models.loading import load_model
from entangle.models.pretrained import FLAGS
from entangle.runs.places import cache_folder
from tests.tiny_models import GROUPED, WORDS, write_gguf


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("ENTANGLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)


@pytest.mark.parametrize(
    "data", [b"", b"junk" * 100, b"GGUF", HEADER, HEADER[:12], HEADER[:-8] + b"\xff" * 8]
)
def test_corrupt_gguf(data: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"GGUF.*x\.gguf'") as caught:
        load_model(str(file))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A tiny Llama, two tokens wide at its flags."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "vocab_size": len(WORDS)}))
    write_gguf(tmp_path / "tiny.gguf", model, add_bos_token=True, add_eos_token=False)
    return tmp_path / "tiny.gguf"


def test_a_gguf_gives_a_plain_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = hf.LlamaConfig(**{**GROUPED, "vocab_size": len(WORDS)})
    original = hf.LlamaForCausalLM(config)
    write_gguf(tmp_path / "tiny.gguf", original)
    capfd.readouterr()
    model = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert "tiny.gguf" in capfd.readouterr().err  # converted, once
    assert load_model(str(tmp_path / "tiny.gguf"), device="cpu").digest == model.digest
    assert capfd.readouterr() == ("", "")
    assert (model.source, model.dtype, model.context_length) == ("gguf", torch.float32, 128)
    expected, got = dict(original.named_parameters()), dict(model.module.named_parameters())
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    ids = torch.arange(len(WORDS))[None]
    torch.testing.assert_close(model.module(ids).logits, original(ids).logits)
    assert model.tokenizer is not None
    assert model.tokenizer("ab").input_ids == [5]
    model.module.save_pretrained(tmp_path / "folder")  # type: ignore[operator]
    assert load_model(str(tmp_path / "folder")).digest == model.digest
    half = load_model(str(tmp_path / "tiny.gguf"), dtype="bfloat16")
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}


def _converted(place: Path) -> Path:
    (folder,) = place.glob("gguf-*")
    return folder


def test_it_is_parsed_once_and_then_never_again(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Path] = []
    whole = gguf_files._Parsed.__init__

    def counted(self: Any, path: Path) -> None:
        parsed.append(path)
        whole(self, path)

    monkeypatch.setattr(gguf_files._Parsed, "__init__", counted)
    before = gguf.GGUFReader, hf_gguf.load_gguf_checkpoint
    first = load_model(tiny_gguf, device="cpu")
    assert len(parsed) == 1
    again = load_model(tiny_gguf, device="cpu")
    elsewhere = shutil.copy(tiny_gguf, tiny_gguf.with_name("copy.gguf"))
    assert load_model(elsewhere, device="cpu").digest == again.digest == first.digest
    assert len(parsed) == 1
    assert (gguf.GGUFReader, hf_gguf.load_gguf_checkpoint) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_changes_no_bit(tiny_gguf: Path, dtype: torch.dtype) -> None:
    direct, tokenizer = gguf_files.load_gguf(tiny_gguf, dtype=dtype)
    model = load_model(tiny_gguf, dtype=dtype, device="cpu")
    for kind in ("named_parameters", "named_buffers"):
        expected, got = dict(getattr(direct, kind)()), dict(getattr(model.module, kind)())
        assert expected.keys() == got.keys()
        assert all(expected[key].dtype == got[key].dtype for key in expected)
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert tokenizer is not None
    assert model.tokenizer is not None
    assert tokenizer.backend_tokenizer.to_str() == model.tokenizer.backend_tokenizer.to_str()
    assert model.tokenizer.name_or_path == str(tiny_gguf)


@pytest.mark.parametrize("flags", [(True, False), (False, True), (True, True), (False, False)])
def test_the_flags_and_the_chat_template_are_carried_on(
    flags: tuple[bool, bool], tmp_path: Path, place: Path
) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "vocab_size": len(WORDS)}))
    named = dict(zip(FLAGS, flags, strict=True))
    write_gguf(tmp_path / "x.gguf", model, **named)
    for _ in range(2):  # converted, and opened again
        tokenizer = load_model(tmp_path / "x.gguf", device="cpu").tokenizer
        assert tokenizer is not None
        assert {flag: tokenizer.init_kwargs[flag] for flag in named} == named
        assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
        expected = [*([1] if flags[0] else []), 5, *([2] if flags[1] else [])]
        assert tokenizer("ab").input_ids == expected
    written = (_converted(place) / "tokenizer_config.json").read_text()
    assert all(f'"{flag}": {str(value).lower()}' in written for flag, value in named.items())


def test_an_adapter_beside_it_is_not_applied(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers would where peft is installed."""
    alone = load_model(tiny_gguf, device="cpu").digest
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "no/such"}')
    for module in (auto_factory, peft_integration):
        monkeypatch.setattr(module, "is_peft_available", lambda: True)
    monkeypatch.setenv("ENTANGLE_CACHE", str(tmp_path / "another"))
    assert load_model(tiny_gguf, device="cpu").digest == alone


def test_no_flags_stay_none(tmp_path: Path) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "vocab_size": len(WORDS)}))
    write_gguf(tmp_path / "x.gguf", model)
    tokenizer = load_model(tmp_path / "x.gguf", device="cpu").tokenizer
    assert tokenizer is not None
    assert not set(FLAGS) & set(tokenizer.init_kwargs)


def test_one_changed_byte_means_converting_again(
    tiny_gguf: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    digest = load_model(tiny_gguf, device="cpu").digest
    weights = _converted(place) / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    capfd.readouterr()
    assert load_model(tiny_gguf, device="cpu").digest == digest
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "tiny.gguf" in said
    assert load_model(tiny_gguf, device="cpu").digest == digest
    assert capfd.readouterr().err == ""


def test_a_changed_byte_in_any_file_is_seen(tiny_gguf: Path, place: Path) -> None:
    load_model(tiny_gguf, device="cpu")
    folder = _converted(place)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {one.name for one in files}
    for path, content in files.items():
        for at in (0, 1, len(content) // 3, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            assert not cache.is_intact(folder), (path.name, at)
        path.write_bytes(content)
        assert cache.is_intact(folder)


def _no_room(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(9, 9, 0))


def _unwritable(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    place.write_text("a file where the folder should be")


def _disk_full_on_the_way(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.LlamaForCausalLM, "save_pretrained", fail)


@pytest.mark.parametrize("trouble", [_no_room, _unwritable, _disk_full_on_the_way])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_without_a_cache_it_loads_all_the_same(
    trouble: Any,
    dtype: str,
    tiny_gguf: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wanted = None if dtype == "auto" else torch.bfloat16
    direct, _ = gguf_files.load_gguf(tiny_gguf, dtype=wanted)
    trouble(monkeypatch, place)
    capfd.readouterr()
    model = load_model(tiny_gguf, dtype=dtype, device="cpu")
    expected = dict(direct.named_parameters())
    assert all(torch.equal(expected[key], one) for key, one in model.module.named_parameters())
    said = capfd.readouterr().err
    assert str(place) in said.splitlines()[-1]
    assert "ENTANGLE_CACHE" in said.splitlines()[-1]


def test_memory_for_float32_is_only_needed_for_the_cache(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    assert load_model(tiny_gguf, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert "without the cache" in capfd.readouterr().err
    assert cache_folder().exists()
