import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, RobertaConfig, RobertaModel

from entangle.errors import InvalidInput, UnknownName
from entangle.models import loading
from entangle.models.loading import LanguageModel, as_language_model, load_model
from tests.tiny_models import TINY, WIDE, save_tiny, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "tiny")


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_model_round_trips(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = save_tiny(name, tmp_path)
    capfd.readouterr()
    state = torch.random.get_rng_state()
    model = load_model(str(saved), device="cpu")
    assert torch.equal(state, torch.random.get_rng_state())
    assert capfd.readouterr() == ("", "")
    original = TINY[name]()
    assert type(model.module) is type(original)
    expected, got = dict(original.named_parameters()), dict(model.module.named_parameters())
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())
    assert (model.source, model.name, model.revision) == ("folder", str(saved), None)
    assert (model.vocab_size, model.dtype, model.device.type) == (112, torch.float32, "cpu")
    assert model.context_length == (None if name == "bloom" else 128)
    assert isinstance(model.tokenizer, PreTrainedTokenizerBase)
    text = "Two  lines,\nof text."
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    assert model.tokenizer.decode(ids) == text
    module = original(torch.tensor([ids]))[0]
    assert torch.equal(model.module(torch.tensor([ids]))[0], module)


def test_dtype_is_as_stored_or_as_asked(tmp_path: Path) -> None:
    TINY["llama"]().to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[operator]
    assert load_model(str(tmp_path)).dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype="float32").dtype == torch.float32
    assert load_model(str(tmp_path), dtype=torch.float16).dtype == torch.float16


def test_the_tokenizer_may_be_missing(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_model(str(folder)).tokenizer is None


def test_nan_weights_load(tmp_path: Path) -> None:
    module = TINY["opt"]()
    next(module.parameters())[0] = torch.nan
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = next(load_model(str(tmp_path)).module.parameters())
    assert loaded[0].isnan().all()


def test_a_device_map_spreads_and_offloads(folder: Path, tmp_path: Path) -> None:
    whole = load_model(str(folder), device="cpu")
    spread = load_model(str(folder), device_map={"": "cpu"})
    assert spread.digest == whole.digest
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(names, "cpu") | {f"model.layers.{i}": "disk" for i in range(3)}
    offloaded = load_model(str(folder), device_map=places)
    ids = torch.arange(8)[None]
    assert any(parameter.is_meta for parameter in offloaded.module.parameters())
    assert torch.equal(offloaded.module(ids).logits, whole.module(ids).logits)
    assert (offloaded.digest, offloaded.device.type) == (whole.digest, "cpu")


def test_roberta_positions_start_behind_the_padding() -> None:
    config = RobertaConfig(**{**WIDE, "pad_token_id": 1, "intermediate_size": 48})
    model = as_language_model(RobertaModel(config))
    assert model.context_length == 126
    model.module(torch.full((1, 126), 9))
    with pytest.raises((RuntimeError, IndexError)):
        model.module(torch.full((1, 127), 9))


# The digest


def _slow_digest(module: nn.Module) -> str:
    outer = hashlib.sha256()
    for name, parameter in module.named_parameters():
        raw = bytes(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        inner = hashlib.sha256(raw).hexdigest()
        outer.update(f"{name}\t{tuple(parameter.shape)}\t{parameter.dtype}\t{inner}\n".encode())
    return outer.hexdigest()


def test_digest_against_a_slow_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama", "gpt2"):
        assert as_language_model(TINY[name]()).digest == _slow_digest(TINY[name]())
    monkeypatch.setattr(loading, "CHUNK", 7)
    assert as_language_model(TINY["llama"]()).digest == _slow_digest(TINY["llama"]())


def test_digest_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    one = hashlib.sha256(b"\x00\x00\x80\x3f").hexdigest()  # 1.0 as little-endian float32
    line = f"weight\t(1, 1)\ttorch.float32\t{one}\n"
    assert as_language_model(module).digest == hashlib.sha256(line.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight.data[0, 0].add_(1e-7),
        lambda m: m.to(torch.float64),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.reshape(2, 3))),
        lambda m: setattr(m, "more", nn.Parameter(torch.zeros(0))),
    ],
)
def test_digest_sees_values_dtypes_shapes_and_names(change: Callable[[nn.Module], object]) -> None:
    module = nn.Linear(2, 3)
    before = as_language_model(module).digest
    assert as_language_model(module).digest == before
    change(module)
    assert as_language_model(module).digest != before


def test_digest_of_half_precision_scalars_and_transposed_weights() -> None:
    module = nn.Module()
    module.scalar = nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16))
    module.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    other = nn.Module()
    other.scalar = nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16))
    other.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).T.contiguous())
    assert as_language_model(module).digest == as_language_model(other).digest


def test_digest_is_kept() -> None:
    model = as_language_model(nn.Linear(2, 3))
    before = model.digest
    nn.init.zeros_(model.module.get_parameter("weight"))
    assert model.digest == before


def test_describe_is_ready_for_a_manifest(folder: Path) -> None:
    model = load_model(str(folder), device="cpu")
    assert model.describe() == {
        "name": str(folder),
        "source": "folder",
        "revision": None,
        "digest": model.digest,
        "class": "LlamaForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "n_parameters": sum(p.numel() for p in TINY["llama"]().parameters()),
    }


# Wrapping


def test_wrapping_a_module_a_name_and_a_model(folder: Path) -> None:
    module = TINY["bloom"]().train().requires_grad_(True)  # and so it stays
    tokenizer = tiny_tokenizer()
    model = as_language_model(module, tokenizer)
    assert (model.module, model.tokenizer, model.source) == (module, tokenizer, "memory")
    assert model.name == "BloomForCausalLM"
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    assert as_language_model(model) is model
    other = as_language_model(model, tiny_tokenizer())
    assert other.tokenizer is not tokenizer
    assert (other.module, other.name) == (module, model.name)
    assert as_language_model(str(folder)).source == "folder"
    assert as_language_model(folder).digest == as_language_model(str(folder)).digest


def test_a_plain_module_has_no_context_and_may_have_no_vocabulary() -> None:
    plain = as_language_model(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))
    assert (plain.context_length, plain.vocab_size) == (None, 9)
    with pytest.raises(InvalidInput, match="token embedding"):
        _ = as_language_model(nn.Linear(1, 1)).vocab_size
    empty = LanguageModel(nn.Module(), None, "empty", "memory", None)
    assert (empty.device, empty.dtype) == (torch.device("cpu"), torch.float32)


def test_load_model_takes_what_every_function_takes(folder: Path) -> None:
    model = load_model(folder, device="cpu")
    assert (model.name, model.source) == (str(folder), "folder")
    assert load_model(model) is model
    module, tokenizer = TINY["llama"](), tiny_tokenizer()
    wrapped = load_model(module, tokenizer=tokenizer)
    assert (wrapped.module, wrapped.tokenizer, wrapped.source) == (module, tokenizer, "memory")
    assert load_model(folder, tokenizer=tokenizer, device="cpu").tokenizer is tokenizer


@pytest.mark.parametrize(
    "setting", [{"dtype": "float16"}, {"device": "cpu"}, {"revision": "v1"}, {"device_map": "auto"}]
)
def test_a_module_is_not_moved_or_cast(setting: dict[str, str]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(InvalidInput, match=f"{name}.*{value}"):
        load_model(TINY["llama"](), **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, np.dtype("float16"), "float16", torch.float16])
def test_dtypes_of_numpy_and_torch_and_their_names(dtype: object, folder: Path) -> None:
    assert load_model(folder, dtype=dtype, device="cpu").dtype == torch.float16


@pytest.mark.parametrize("dtype", [np.int64, torch.int8, "int8", None, 3, "float63", str])
def test_other_dtypes(dtype: object, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="dtype"):
        load_model(folder, dtype=dtype, device="cpu")


# Bad input


def test_other_objects_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidInput, match=r"`model`.*got int"):
        as_language_model(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["./nothing", "/no/such/model", "~/no-such", "a.gguf", "a/b/c"])
def test_unknown_paths(name: str) -> None:
    with pytest.raises(UnknownName, match=re.escape(repr(name))):
        load_model(name)


def test_names_and_settings_that_break_a_rule(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="got ''"):
        load_model("")
    with pytest.raises(InvalidInput, match=r"\.gguf.*config\.json'"):
        load_model(str(folder / "config.json"))
    with pytest.raises(InvalidInput, match=r"`revision`.*'main'"):
        load_model(str(folder), revision="main")
    with pytest.raises(InvalidInput, match="`device_map`"):
        load_model(str(folder), device="cpu", device_map="auto")
    with pytest.raises(InvalidInput, match="`device_map`"):
        load_model("demo", device_map="auto")
    with pytest.raises(InvalidInput, match="`dtype`"):
        load_model(str(folder), dtype="int3")
    with pytest.raises(InvalidInput, match="`device`"):
        load_model(str(folder), device="abacus")
    with pytest.raises(InvalidInput, match=r"`device_map`.*'abacus'"):
        load_model(str(folder), device_map="abacus")
