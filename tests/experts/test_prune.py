"""Pruned models are ordinary ones: other tools load them, and they compute what was measured."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import entangle
from entangle.errors import EntangleError, InvalidInput
from entangle.evaluation import EvaluationText, perplexity
from entangle.experts import prune as pruning
from entangle.experts.expand import expand
from entangle.experts.linear import ExpandedLinear
from entangle.experts.prune import Pruned, prune
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model, load_model
from entangle.pruning.grid import quantize
from entangle.results.expansion import PruneReport
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import GROUPED, TINY, WORDS, save_tiny, tiny_tokenizer, write_gguf

Tiny = Callable[[str], LanguageModel]


def run(model: Any, calibration: CalibrationSet, **settings: object) -> Pruned:
    chosen: dict[str, object] = {"sparsity": 0.5, "progress": False}
    return prune(model, calibration, **{**chosen, **settings})  # type: ignore[arg-type]


def other_tool(folder: Path, ids: torch.Tensor, out: Path) -> torch.Tensor:
    """Load the folder in a process that knows nothing of this package; return its logits."""
    code = (
        "import sys, torch, transformers as hf\n"
        "model = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "with torch.no_grad(): torch.save(model(ids).logits, sys.argv[3])\n"
        "assert 'entangle' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(folder), repr(ids.tolist()), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    logits: torch.Tensor = torch.load(out)
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "falcon", "bloom"])
def test_the_model_is_of_its_own_class_with_exact_zeros_and_its_other_tensors(
    name: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    found = run(model, calibration)
    assert type(found.model.module) is type(model.module)
    chosen = {layer.name for layer in find_layers(model.module, "all", "mlp")}
    for layer in find_layers(found.model.module, "all", "mlp"):
        assert (layer.weight == 0).sum(1).eq(round(0.5 * layer.in_features)).all()
    after = found.model.module.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(model.module.state_dict()[key], value)
        if key.removesuffix(".weight") not in chosen:
            assert after[key].data_ptr() == model.module.state_dict()[key].data_ptr()
    assert not any(isinstance(one, ExpandedLinear) for one in found.model.module.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
def test_it_computes_what_the_expansion_with_one_expert_does(
    name: str, tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    model = tiny(name)
    settings: dict[str, Any] = {"sparsity": 0.6, "evaluation": text, "progress": False}
    found = prune(model, calibration, **settings)
    expanded = expand(model, calibration, experts=1, **settings)
    assert expanded.model is not None
    ids = calibration.ids[:2]
    torch.testing.assert_close(found.model.module(ids).logits, expanded.model.module(ids).logits)
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(perplexity(found.model, text).value, rel=1e-6)
    assert found.costs == expanded.costs


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])  # gpt2: Conv1D, biases, tied
def test_another_tool_computes_the_same(
    name: str, tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    model = tiny(name)
    found = run(model, calibration, out=tmp_path / "x")
    ids = calibration.ids[:1, :20]
    with torch.no_grad():
        ours = found.model.module(ids).logits
    assert torch.equal(other_tool(tmp_path / "x", ids, tmp_path / "logits"), ours)
    assert (found.model.name, found.model.source) == (str(tmp_path / "x"), "folder")
    again = load_model(str(tmp_path / "x"), device="cpu")
    assert again.digest == found.model.digest
    head, table = again.module.get_output_embeddings(), again.module.get_input_embeddings()  # type: ignore[operator]
    tied = model.module.get_output_embeddings().weight is model.module.get_input_embeddings().weight  # type: ignore[operator]
    assert (head.weight is table.weight) == tied
    assert torch.equal(table.weight, model.module.get_input_embeddings().weight)  # type: ignore[operator]
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not any("entangle" in str(value).lower() for value in config.values())


def test_dtype_tokenizer_generation_and_report_are_written(
    calibration: CalibrationSet, tmp_path: Path
) -> None:
    module: Any = TINY["llama"]().to(torch.bfloat16)
    module.generation_config.max_length = 77
    model = LanguageModel(module, tiny_tokenizer(), "tiny", "memory", None)
    found = run(model, calibration, out=tmp_path / "x", bits=4, sparsity=0.0)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert again.dtype == torch.bfloat16
    assert again.generation_config.max_length == 77
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "x").get_vocab() == (
        tiny_tokenizer().get_vocab()
    )
    report = entangle.load_result(tmp_path / "x")
    assert isinstance(report, PruneReport)
    assert report.layers.equals(found.layers)
    assert report.manifest["settings"]["bits"] == 4  # type: ignore[index]
    assert "Pruning of" in report._repr_html_()
    assert report.run.keys() >= {"seconds"}
    for layer in find_layers(found.model.module, "all", "mlp"):
        assert layer.weight.float().unique().numel() > 2
        assert max(len(row.unique()) for row in layer.weight) <= 16


def test_magnitude_quantised_by_groups_is_the_dense_weight_on_its_grid(
    tiny: Tiny, calibration: CalibrationSet
) -> None:
    model = tiny("llama")
    settings: dict[str, Any] = {
        "pruner": "magnitude",
        "bits": 4,
        "group_size": 128,
        "sparsity": 0.0,
    }
    found = run(model, calibration, **settings)
    after = {layer.name: layer.weight for layer in find_layers(found.model.module, "all", "mlp")}
    for layer in find_layers(model.module, "all", "mlp"):
        assert torch.equal(after[layer.name], quantize(layer.weight[None], 4, 128)[0])
    assert found.manifest["settings"]["group_size"] == 128  # type: ignore[index]


def test_of_16_at_a_width_that_is_no_multiple(tiny: Tiny, calibration: CalibrationSet) -> None:
    found = run(tiny("llama"), calibration, pattern="5:20", sparsity=None)
    for layer in find_layers(found.model.module, "all", "mlp"):
        full, rest = divmod(layer.in_features, 20)
        assert (layer.weight != 0).sum(1).eq(full * 5 + -(-5 * rest // 20)).all()


def test_sharded_and_gguf_sources(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTANGLE_CACHE", str(tmp_path / "cache"))
    module: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "vocab_size": len(WORDS)}))
    module.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    write_gguf(tmp_path / "model.gguf", module)
    few = replace(calibration, ids=calibration.ids % len(WORDS))
    ids = few.ids[:1]
    for source in (tmp_path / "sharded", tmp_path / "model.gguf"):
        model = load_model(str(source), device="cpu")
        found = run(model, few, out=tmp_path / f"pruned {source.name}")
        with torch.no_grad():
            ours = found.model.module(ids).logits
        logits = other_tool(tmp_path / f"pruned {source.name}", ids, tmp_path / "logits")
        assert torch.equal(logits, ours)


class Stop(Exception):
    """Ends a pruning after some blocks."""


def stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    written = list[int]()
    write = pruning.PrunedFolder.write

    def some(folder: pruning.PrunedFolder, index: int, *rest: Any) -> None:
        if len(written) == blocks:
            raise Stop
        written.append(index)
        write(folder, index, *rest)

    monkeypatch.setattr(pruning.PrunedFolder, "write", some)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unfinished_and_finished_work_is_resumed(
    name: str, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = load_model(str(save_tiny(name, tmp_path / "model")), device="cpu")
    settings: dict[str, Any] = {"evaluation": text}
    whole = run(model, calibration, out=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            run(model, calibration, out=tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()
    with pytest.raises(InvalidInput, match="resume"):
        run(model, calibration, out=tmp_path / "x", **settings)
    run(model, calibration, out=tmp_path / "x", resume=True, **settings)
    assert content(tmp_path / "x") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole", "x"]
    before = content(tmp_path / "x")
    again = run(model, calibration, out=tmp_path / "x", resume=True, **settings)
    assert content(tmp_path / "x") == before
    assert again.perplexity is not None
    assert whole.perplexity is not None
    assert again.perplexity.value == whole.perplexity.value
    assert again.layers.equals(whole.layers)
    with pytest.raises(InvalidInput, match="exists"):
        run(model, calibration, out=tmp_path / "x", sparsity=0.6)
    run(model, calibration, out=tmp_path / "x", sparsity=0.6, force=True)


def test_what_is_added_lies_in_the_folder(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    def add(pruned: Pruned, folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        (folder / "note.json").write_text(f'"{pruned.costs["nonzeros"]}"')

    run(tiny("llama"), calibration, out=tmp_path / "x", extra=add)
    assert (tmp_path / "x" / "note.json").exists()
    entangle.load_result(tmp_path / "x")


class Bare(nn.Module):
    """A causal model that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        inner: Any = TINY["llama"]()
        self.model, self.lm_head = inner.model, inner.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.model(ids).last_hidden_state)
        return logits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.5}, "`sparsity`"),
        ({"bits": 4, "group_size": 64}, "`group_size`"),
        ({"group_size": 128}, "`group_size` needs `bits`"),
        ({"pruner": "nosuch"}, "nosuch"),
        ({"layers": "lm_head", "proj": None}, "outside the blocks"),
        ({"allocation": {}}, "must name every layer"),
    ],
)
def test_bad_settings(
    settings: dict[str, object], message: str, tiny: Tiny, calibration: CalibrationSet,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(EntangleError, match=message):
        run(tiny("llama"), calibration, out=tmp_path / "x", **settings)
    assert not any(tmp_path.iterdir())


def test_models_that_cannot_be_written(calibration: CalibrationSet, tmp_path: Path) -> None:
    bare = as_language_model(Bare().eval())
    with pytest.raises(InvalidInput, match="Bare has no save_pretrained"):
        run(bare, calibration, out=tmp_path / "x")
    module: Any = TINY["llama"]()
    torch.nn.utils.parametrizations.weight_norm(module.model.layers[0].mlp.up_proj)
    with pytest.raises(InvalidInput, match="up_proj"):
        run(as_language_model(module), calibration)


def test_random_pruning_depends_on_the_seed(tiny: Tiny, calibration: CalibrationSet) -> None:
    layers = [
        find_layers(
            run(tiny("llama"), calibration, pruner="random", seed=seed).model.module, 0, "mlp"
        )
        for seed in (0, 0, 1)
    ]
    weights = [torch.cat([one.weight.flatten() for one in some]) for some in layers]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_numbers_of_an_evaluation(tiny: Tiny, calibration: CalibrationSet) -> None:
    ids = torch.randint(4, 90, (3, 16), generator=torch_rng(1, "evaluation"))
    found = run(tiny("llama"), calibration, evaluation=EvaluationText(ids, "ids", {}))
    assert found.report.perplexity == found.perplexity.value  # type: ignore[union-attr]
