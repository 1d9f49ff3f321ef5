"""`harness_model` in EleutherAI's harness, on tasks made here; without it, one clear line."""

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from entangle.errors import InvalidInput, Unavailable
from entangle.evaluation import load_evaluation, perplexity
from entangle.evaluation.harness import harness_model
from entangle.models.loading import LanguageModel
from tests.tiny_models import TINY, tiny_tokenizer

Tiny = Callable[[str], LanguageModel]
Evaluated = Callable[[Any, dict[str, Any], list[dict[str, Any]]], dict[str, Any]]
TEXTS = ["A first text of some words.", "The second one is a little longer."]
ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
QUESTIONS: list[dict[str, Any]] = [
    {"question": "one, two,", "choices": [" three", " tree"]},
    {"question": "abc", "choices": ["xyz!", "d", "??"]},
]


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    reason = "the optional extra `harness` is not installed"
    pytest.importorskip("lm_eval.tasks", reason=reason, exc_type=ImportError)
    return pytest.importorskip("lm_eval", reason=reason)


@pytest.fixture
def evaluated(lm_eval: Any, tmp_path: Path) -> Evaluated:
    """Return a function that runs one task over rows of its own."""

    def run(model: Any, task: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
        settings = {"task": "own", "dataset_path": "json", "dataset_kwargs": source}
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=model,
            tasks=[{**settings, "test_split": "test", **task}],
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        return found

    return run


def _plain_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer without the special tokens that it puts around a text."""
    tokenizer = tiny_tokenizer()
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing("$A", None, [])
    return tokenizer


def _ids(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def _log_likelihood(module: nn.Module, before: list[int], text: str) -> float:
    after = _ids(text)
    with torch.no_grad():
        log_p = module(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[len(before) + i - 1, token]) for i, token in enumerate(after))


def test_word_perplexity_on_a_task_of_our_own(tiny: Tiny, evaluated: Evaluated) -> None:
    model = harness_model(tiny("llama"), _plain_tokenizer(), batch_size=2)
    got = evaluated(model, ROLLING, [{"text": text} for text in TEXTS])["results"]["own"]
    total = -sum(_log_likelihood(tiny("llama").module, [1], text) for text in TEXTS)  # <s> first
    words, size = sum(len(text.split()) for text in TEXTS), sum(map(len, TEXTS))
    assert got["word_perplexity,none"] == pytest.approx(math.exp(total / words), rel=1e-3)
    assert got["bits_per_byte,none"] == pytest.approx(total / size / math.log(2), rel=1e-5)


def test_word_perplexity_is_the_one_of_this_package(
    tiny: Tiny, evaluated: Evaluated, tmp_path: Path
) -> None:
    model = harness_model(tiny("llama"), _plain_tokenizer())
    theirs = evaluated(model, ROLLING, [{"text": TEXTS[0]}])["results"]["own"]
    file = tmp_path / "text.txt"
    file.write_text(TEXTS[0])
    text = load_evaluation(file, tiny_tokenizer(adds=True), seq_len=len(TEXTS[0]) + 2)
    ours = perplexity(tiny("llama"), text)
    assert theirs["word_perplexity,none"] == pytest.approx(ours.word_perplexity, rel=1e-3)
    assert theirs["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-5)


@pytest.mark.parametrize("policy", ["model", "published"])
def test_the_first_token_stands_once_before_a_text(
    policy: str, tiny: Tiny, evaluated: Evaluated
) -> None:
    """By itself the harness puts <s> before "<s> text </s>", and predicts both of its ends."""
    model = harness_model(tiny("llama"), tiny_tokenizer(adds=True), special_tokens=policy)
    got = evaluated(model, ROLLING, [{"text": TEXTS[0]}])["results"]["own"]
    total = -_log_likelihood(tiny("llama").module, [1], TEXTS[0])
    ours = total / len(TEXTS[0]) / math.log(2)
    theirs = got["bits_per_byte,none"]
    assert (theirs == pytest.approx(ours, rel=1e-5)) == (policy == "model")
    assert model.tok_encode("ab") == [1, *_ids("ab"), *([] if policy == "model" else [2])]


def test_multiple_choice_on_a_task_of_our_own(tiny: Tiny, evaluated: Evaluated) -> None:
    model = harness_model(tiny("gpt2"), _plain_tokenizer(), batch_size=3)
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    expected = [
        [_log_likelihood(tiny("gpt2").module, _ids(row["question"]), c) for c in row["choices"]]
        for row in QUESTIONS
    ]
    best = [max(range(len(row)), key=row.__getitem__) for row in expected]
    right = [{**row, "answer": answer} for row, answer in zip(QUESTIONS, best, strict=True)]
    found = evaluated(model, task, right)
    samples = sorted(found["samples"]["own"], key=lambda sample: sample["doc_id"])
    got = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    for ours, theirs in zip(expected, got, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    assert found["results"]["own"]["acc,none"] == 1.0
    half = [right[0], {**right[1], "answer": (best[1] + 1) % 3}]
    assert evaluated(model, task, half)["results"]["own"]["acc,none"] == 0.5


def test_the_module_is_wrapped_as_it_is(lm_eval: Any, caplog: pytest.LogCaptureFixture) -> None:
    module, tokenizer = TINY["llama"](), tiny_tokenizer()
    tokenizer.pad_token = None
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = harness_model(module, tokenizer)
    assert model.model is module
    assert model.max_length == 128
    assert tokenizer.pad_token is None
    assert model.tokenizer.pad_token is not None
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert caplog.text == ""
    assert logging.getLogger("lm_eval.models.huggingface").level == logging.NOTSET


def test_without_the_harness(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(Unavailable, match=r"`pip install 'neuron-entanglement\[harness\]'`"):
        harness_model(tiny("llama"), tiny_tokenizer())


def test_models_it_cannot_take(tiny: Tiny) -> None:
    with pytest.raises(InvalidInput, match=r"causal.*Embedding"):
        harness_model(nn.Embedding(4, 4), tiny_tokenizer())
    with pytest.raises(InvalidInput, match=r"language.*BertModel"):
        harness_model(tiny("bert"), tiny_tokenizer())
    with pytest.raises(InvalidInput, match="`tokenizer`"):
        harness_model(tiny("llama"))
