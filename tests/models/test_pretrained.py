import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as hf
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from entangle.errors import InvalidInput, MemoryLimit, Unavailable, UnknownName
from entangle.models import gguf_files, pretrained
from entangle.models.layers import list_layers
from entangle.models.loading import load_model
from tests.tiny_models import WIDE, save_tiny

hub_utils: Any = huggingface_hub.utils
hf_logging: Any = hf.utils.logging


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "tiny")


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return change


def _write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _only_gguf(folder: Path) -> None:
    (folder / "config.json").rename(folder / "model.gguf")


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_remove("config.json"), "must hold config.json; .*tiny' has none"),
    "a gguf in it": (_only_gguf, "name the file itself, for example model.gguf"),
    "corrupt config": (_write("config.json", b"{nope"), "not a valid JSON file"),
    "binary config": (_write("config.json", b"\xff\xfe\x80"), "not a valid JSON file"),
    "config is a list": (_write("config.json", b"[1]"), "model_type"),
    "no architecture": (_write("config.json", b"{}"), "model_type"),
    "unknown architecture": (_config(model_type="zorgon"), "model type `zorgon`"),
    "code in the folder": (_config(model_type="zorgon", auto_map=CODE), "custom code"),
    "config type": (_config(hidden_size="abc"), "hidden_size"),
    "config value": (_config(num_attention_heads=5), "attention heads"),
    "config zero": (_config(num_attention_heads=0), "ZeroDivisionError"),
    "unknown activation": (_config(hidden_act="zorgon"), "KeyError: 'zorgon'"),
    "config shape": (_config(intermediate_size=40), r"is \(.*48.*\), not \(.*40.*\)"),
    "config depth": (_config(num_hidden_layers=5), r"18 are missing, .*'model\.layers\.3\."),
    "config labels": (_config(num_labels=10**9), r"`num_labels` .*at most .*1000000000"),
    "config labels of the text": (_config(text_config={"num_labels": 10**9}), "`num_labels`"),
    "a weight missing": (_without_a_weight, r"\b1\b.*\b1\b.*mlp\.up_proj\.weight"),
    "quantised": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "weights cut off": (_truncate, "not fully covered"),
    "weights corrupt": (_write("model.safetensors", b"junk" * 30), r"model\.safetensors.*header"),
    "weights empty": (_write("model.safetensors", b""), r"model\.safetensors.*header"),
    "no weights": (_remove("model.safetensors"), r"model\.safetensors.*config\.json"),
    "pickle": (_only_pickle, r"pytorch_model\.bin"),
    "shard missing": (_missing_shard, "model-1-of-2.safetensors"),
    "tokenizer corrupt": (_write("tokenizer.json", b"{nope"), "JSONDecodeError"),
    "tokenizer empty": (_write("tokenizer.json", b"{}"), "the tokenizer of"),
    "tokenizer of no kind": (
        _write("tokenizer.json", b'{"version":"1.0","added_tokens":[],"model":{"type":"X"}}'),
        "the tokenizer of",
    ),
    "tokenizer of two": (
        _write("tokenizer_config.json", b'{"tokenizer_class": "RagTokenizer"}'),
        "TypeError: RagTokenizer",
    ),
    "tokenizer half": (_remove("tokenizer.json"), "the tokenizer of"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_give_one_clear_line(
    case: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_FOLDERS[case]
    damage(folder)
    capfd.readouterr()
    with pytest.raises(InvalidInput, match=message) as caught:
        load_model(str(folder), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("case", ["corrupt config", "weights cut off", "tokenizer corrupt"])
def test_errors_are_chained(case: str, folder: Path) -> None:
    BAD_FOLDERS[case][0](folder)
    with pytest.raises(InvalidInput) as caught:
        load_model(str(folder))
    assert caught.value.__cause__ is not None


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = hf.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    hf.T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="t5"):
        load_model(str(tmp_path))


def test_an_encoder_stored_with_a_head_comes_without_a_pooler(tmp_path: Path) -> None:
    model = hf.BertForMaskedLM(hf.BertConfig(**{**WIDE, "intermediate_size": 48}))
    model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    loaded = load_model(str(tmp_path), device="cpu").module
    assert torch.equal(state, torch.random.get_rng_state())
    assert isinstance(loaded, hf.BertModel)
    assert [layer.name for layer in list_layers(loaded) if layer.block is None] == []
    expected = model.bert.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in loaded.state_dict().items())


def test_a_bert_decoder_is_a_causal_model(tmp_path: Path) -> None:
    config = hf.BertConfig(**{**WIDE, "intermediate_size": 48, "is_decoder": True})
    hf.BertLMHeadModel(config).save_pretrained(tmp_path)
    assert isinstance(load_model(str(tmp_path)).module, hf.BertLMHeadModel)


def test_a_bug_of_ours_stays_itself() -> None:
    with pytest.raises(AssertionError), pretrained.broken_as("it"):
        raise AssertionError


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_names_the_setting(error: type[Exception]) -> None:
    with (
        pytest.raises(MemoryLimit, match="dtype=bfloat16"),
        pretrained.broken_as("it"),
    ):
        raise error("boom")


def test_without_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"device_map.*accelerate"):
        pretrained.load_folder(folder, dtype=None, device_map="auto")
    with pytest.raises(InvalidInput, match="`pip install accelerate`"):
        gguf_files.load_gguf(folder, dtype=None)


# Quiet


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("hub_bars", [True, False])
def test_quiet_restores_every_setting(
    bars: bool, hub_bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = hf_logging.get_verbosity()
    pretrained._switch_bars(bars, hub_bars)
    try:
        with contextlib.suppress(ZeroDivisionError), pretrained.quiet(catch_stderr=True):
            assert not hf_logging.is_progress_bar_enabled()
            assert hub_utils.are_progress_bars_disabled()
            assert hf_logging.get_verbosity() == logging.CRITICAL
            raise ZeroDivisionError
        assert hf_logging.is_progress_bar_enabled() == bars
        assert hub_utils.are_progress_bars_disabled() != hub_bars
        assert hf_logging.get_verbosity() == level
    finally:
        pretrained._switch_bars(True, True)


# The hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_hub_models_come_through_a_snapshot(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(folder, tmp_path / "snapshots" / COMMIT)
    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_model("some/model", revision="main", device="cpu")
    assert (model.source, model.name, model.revision) == ("hub", "some/model", COMMIT)
    assert (asked["name"], asked["revision"]) == ("some/model", "main")
    wanted = ["config.json", "model.safetensors", "tokenizer.model", "vocab.txt", "tokenizer.json"]
    unwanted = ["pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "c.py"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(hub_utils.filter_repo_objects([*wanted, *unwanted], **patterns)) == wanted


def test_a_folder_of_no_commit_gives_no_revision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert load_model("gpt2").revision is None


def _http(kind: type[hub_errors.HfHubHTTPError]) -> Exception:
    response: Any = SimpleNamespace(headers={}, status_code=404, request=None)
    return kind("no", response=response)


HUB_ERRORS: dict[str, tuple[Exception, type[Exception], str]] = {
    "offline": (
        hub_errors.LocalEntryNotFoundError("Got: ConnectError"),
        Unavailable,
        r"ConnectError.*HF_HOME.*HF_HUB_OFFLINE",
    ),
    "switched off": (hub_errors.OfflineModeIsEnabled("offline"), Unavailable, "HF_HOME"),
    "server": (_http(hub_errors.HfHubHTTPError), Unavailable, "HF_HOME"),
    "disk": (OSError(28, "No space left on device"), Unavailable, r"model'.*space"),
    "unknown": (
        _http(hub_errors.RepositoryNotFoundError),
        UnknownName,
        "'some/model'",
    ),
    "gated": (_http(hub_errors.GatedRepoError), Unavailable, r"model'.*login"),
    "revision": (_http(hub_errors.RevisionNotFoundError), UnknownName, "'v9'"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_hub_errors(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raised, kind, message = HUB_ERRORS[case]

    def download(*_: object, **__: object) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(kind, match=message) as caught:
        load_model("some/model", revision="v9")
    assert caught.value.__cause__ is raised
    assert "\n" not in str(caught.value)


def test_a_name_that_cannot_be_a_hub_id() -> None:
    with pytest.raises(UnknownName, match="'what is this'"):
        load_model("what is this")
