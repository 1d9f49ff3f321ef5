"""Models whose blocks come from their shards: the same to the bit, or refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from entangle.errors import InvalidInput, MemoryLimit
from entangle.evaluation import logits, perplexity
from entangle.experiments.ablate import ablate
from entangle.experiments.compare import compare
from entangle.experts.expand import expand
from entangle.experts.prune import prune
from entangle.models import blocks, streaming
from entangle.models.blocks import BlockRunner
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, load_model
from entangle.models.shards import Shards, stored_of
from entangle.modes.decompose import decompose
from entangle.recording.hooks import changed_rows
from entangle.scoring.score import score
from entangle.seeding import torch_rng
from tests.tiny_models import TINY

DECODERS = [name for name in TINY if name != "bert"]
Pair = tuple[LanguageModel, LanguageModel]


def _ids(*shape: int) -> Tensor:
    return torch.randint(4, 112, shape, generator=torch_rng(0, "streaming tests", *shape))


def _save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    TINY[name]().to(dtype).save_pretrained(folder, max_shard_size="20KB")  # type: ignore[operator]
    return folder


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Pair]:
    """Return the same model held and streamed, no part of which is small enough to be kept."""
    monkeypatch.setattr(streaming, "_SMALL", 100)

    def load(name: str) -> Pair:
        folder = _save(name, tmp_path / name)
        return load_model(folder, stream=False), load_model(folder, stream=True)

    return load


def _logits(model: LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.module(ids).logits
    return logits


@pytest.mark.parametrize("name", DECODERS)
def test_a_streamed_model_is_the_held_one_to_the_bit(
    name: str, pair: Callable[[str], Pair]
) -> None:
    held, streamed = pair(name)
    ids = _ids(2, 40)
    assert len(list(Path(held.name).glob("*.safetensors"))) > 1
    assert torch.equal(_logits(streamed, ids), _logits(held, ids))
    buffers = dict(streamed.module.named_buffers())
    for key, buffer in held.module.named_buffers():
        assert buffers[key].dtype == buffer.dtype
        assert torch.equal(buffers[key], buffer)
    runner = BlockRunner(streamed.module)
    hidden, _ = runner.enter(ids)
    for index in range(runner.n_blocks):
        hidden = runner.run(index, hidden, runner.enter(ids)[1])
    assert torch.equal(runner.leave(hidden, ids), _logits(held, ids))
    assert streamed.digest == held.digest
    assert [one.name for one in find_layers(streamed.module, "all")] == [
        one.name for one in find_layers(held.module, "all")
    ]


@pytest.mark.parametrize("method", ["sketch", "exact"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_the_same_to_the_bit(
    name: str, method: str, pair: Callable[[str], Pair]
) -> None:
    held, streamed = (
        score(model, _ids(6, 16), layers="*", proj=None, method=method)  # type: ignore[arg-type]
        for model in pair(name)
    )
    pd.testing.assert_frame_equal(streamed.frame, held.frame, check_exact=True)
    pd.testing.assert_frame_equal(streamed.layers, held.layers, check_exact=True)
    assert streamed.manifest["model"] == held.manifest["model"]
    assert streamed.manifest["settings"] == held.manifest["settings"]


def test_a_token_for_padding_beyond_those_that_are_looked_up(tmp_path: Path) -> None:
    module: Any = TINY["llama"]()
    module.config.pad_token_id = module.config.vocab_size - 1
    module.save_pretrained(tmp_path)
    held, streamed = (load_model(tmp_path, stream=stream) for stream in (False, True))
    table: Any = streamed.module.get_input_embeddings()  # type: ignore[operator]
    assert table.padding_idx == 111
    assert torch.equal(_logits(streamed, _ids(1, 3)), _logits(held, _ids(1, 3)))
    assert table.padding_idx == 111


@pytest.mark.parametrize("most", [blocks.MOST_LOGITS, 2 * 5 * 112])
def test_perplexities_are_the_same_to_the_bit(
    most: int, pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MOST_LOGITS", most)
    monkeypatch.setattr(logits, "MOST_LOGITS", most)
    monkeypatch.setattr(blocks, "LOGITS_OF_A_PART", most)
    held, streamed = (perplexity(model, _ids(5, 24), batch_size=2) for model in pair("gemma3"))
    assert np.array_equal(held.window_losses, streamed.window_losses)


def test_the_head_is_read_once_for_all_batches(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, streamed = pair("llama")
    read: list[str] = []
    original = Shards.read

    def spy(own: Shards, name: str) -> Tensor:
        read.append(name)
        return original(own, name)

    monkeypatch.setattr(Shards, "read", spy)
    found = perplexity(streamed, _ids(5, 24), batch_size=1)
    assert len(found.window_losses) == 5
    assert read.count("lm_head.weight") == 2  # tried on four tokens before
    assert all(p.is_meta for p in streamed.module.get_submodule("lm_head").parameters())


def test_checkpoints_of_expansions_are_the_same_to_the_byte(
    pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    made = []
    for number, model in enumerate(pair("llama")):
        out = tmp_path / str(number)
        expand(
            model, _ids(6, 16), experts=2, sparsity=0.5, restarts=1, evaluation=_ids(2, 16),
            out=out, keep=False,
        )  # fmt: skip
        made.append({one.name: one.read_bytes() for one in out.iterdir() if one.name != "run.json"})
    assert made[0].keys() == made[1].keys()
    assert made[0] == made[1]


def test_one_block_is_there_at_a_time(pair: Callable[[str], Pair]) -> None:
    _, model = pair("llama")
    blocks = model.module.get_submodule("model.layers")
    there: list[list[int]] = []

    def note(*_: object) -> None:
        present = [
            index for index, block in enumerate(blocks.children())
            if any(not p.is_meta for p in block.parameters())
        ]  # fmt: skip
        there.append(present)

    handles = [block.register_forward_hook(note) for block in blocks.children()]
    _logits(model, _ids(1, 8))
    for handle in handles:
        handle.remove()
    assert there == [[0], [1], [2]]
    streaming.release(model.module)
    assert all(p.is_meta for p in blocks.parameters())


def test_changed_rows_hold_inside_their_block_and_no_longer(pair: Callable[[str], Pair]) -> None:
    ids, found = _ids(1, 8), []
    for model in pair("gpt2"):
        layer = find_layers(model.module, 1, "c_fc")[0]
        before = _logits(model, ids)
        with changed_rows([(layer, torch.tensor([3, 5]), torch.zeros(2, layer.in_features))]):
            changed = _logits(model, ids)
            assert not layer.weight[[3, 5]].any()
        assert torch.equal(_logits(model, ids), before)
        assert not torch.equal(changed, before)
        found.append(changed)
    assert torch.equal(*found)


def test_a_shard_that_goes_or_is_cut_off_is_told(pair: Callable[[str], Pair]) -> None:
    _, model = pair("llama")
    layer = find_layers(model.module, 2, "up_proj")[0]
    stored = stored_of(layer.module.weight)
    assert stored is not None
    shards = stored.recipe.shards
    file = shards.slabs[stored.recipe.sources[0][0]].file
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(InvalidInput, match=file.name):
        _logits(model, _ids(1, 8))
    with pytest.raises(InvalidInput, match=file.name):
        Shards([file])
    file.unlink()
    with pytest.raises(InvalidInput, match=file.name):
        _logits(model, _ids(1, 8))


def test_a_shard_that_is_cut_off_in_the_middle_of_a_run(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair("llama")
    stored = stored_of(find_layers(model.module, 2, "up_proj")[0].module.weight)
    assert stored is not None
    file = stored.recipe.shards.slabs[stored.recipe.sources[0][0]].file
    original, read = Shards.read, list[str]()

    def cut(own: Shards, name: str) -> Tensor:
        read.append(name)
        if "layers.1." in name:
            file.write_bytes(file.read_bytes()[:200])
        return original(own, name)

    monkeypatch.setattr(Shards, "read", cut)
    with pytest.raises(InvalidInput, match=file.name) as caught:
        score(model, _ids(4, 16), method="sketch")
    assert "--resume" in str(caught.value)
    assert any("layers.0.mlp" in name for name in read)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="causal"):
        load_model(_save("bert", tmp_path / "bert"), stream=True)
    folder = _save("llama", tmp_path / "llama")
    with pytest.raises(InvalidInput, match="device_map"):
        load_model(folder, stream=True, device_map="auto")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    with pytest.raises(InvalidInput, match="shapes"):
        load_model(folder, stream=True)


def test_a_model_that_does_not_fit_is_streamed_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _save("llama", tmp_path / "llama")
    assert not streaming.is_streamed(load_model(folder, device="cpu").module)
    monkeypatch.setattr("entangle.memory.free_ram", lambda: 1000)
    assert streaming.is_streamed(load_model(folder, device="cpu").module)
    assert str(folder) in capsys.readouterr().err
    with pytest.raises(MemoryLimit, match="--no-stream"):
        load_model(folder, device="cpu", stream=False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pruned_models_are_written_without_being_held(
    name: str, pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    found = []
    for number, model in enumerate(pair(name)):
        made = prune(model, _ids(4, 16), sparsity=0.5, out=tmp_path / str(number))
        assert streaming.is_streamed(made.model.module) == bool(number)
        held = load_model(tmp_path / str(number), stream=False)
        found.append((held.digest, made.model.digest, _logits(held, _ids(1, 8)).sum().item()))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experiments_are_the_same_to_the_bit(name: str, pair: Callable[[str], Pair]) -> None:
    text, windows = _ids(6, 16), _ids(3, 24)
    found = []
    for model in pair(name):
        compared = compare(model, text, windows, methods=["wanda", "expansion"], sparsity=0.5,
                           experts=2, progress=False)  # fmt: skip
        ablated = ablate(model, text, evaluation=windows, strengths=[0.5], seeds=1, progress=False)
        parts = decompose(model, text, layers=0, experts=(1, 2), sparsity=0.5, progress=False)
        tables = [compared.frame.drop(columns="seconds"), compared.windows, ablated.frame]
        tables += [ablated.windows, parts.neurons, parts.outputs]
        found.append([one.drop(columns="model", errors="ignore") for one in tables])
    for held, streamed in zip(*found, strict=True):
        assert len(held)
        pd.testing.assert_frame_equal(streamed, held, check_exact=True)
