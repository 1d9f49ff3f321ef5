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
from torch import nn

from entangle.errors import InvalidInput, Unavailable
from entangle.evaluation.harness import harness_model
from entangle.models.loading import LanguageModel
from tests.tiny_models import TINY, tiny_tokenizer

Tiny = Callable[[str], LanguageModel]
TEXTS = ["A first text of some words.", "The second one is a little longer."]
QUESTIONS = [("one, two,", [" three", " tree"], 0), ("abc", ["xyz!", "d", "??"], 1)]


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    reason = "the optional extra `harness` is not installed"
    return pytest.importorskip("lm_eval", reason=reason, exc_type=ImportError)


@pytest.fixture
def evaluated(
    lm_eval: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any, dict[str, Any], list[dict[str, Any]]], dict[str, float]]:
    """Return a function that runs one task over rows of its own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(model: Any, task: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
        settings = {"task": "own", "dataset_path": "json", "dataset_kwargs": source}
        found = lm_eval.simple_evaluate(
            model=model, tasks=[{**settings, "test_split": "test", **task}], bootstrap_iters=0
        )
        results: dict[str, float] = found["results"]["own"]
        return results

    return run


def _log_likelihood(module: nn.Module, before: list[int], after: list[int]) -> float:
    with torch.no_grad():
        log_p = module(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[len(before) + i - 1, token]) for i, token in enumerate(after))


def _ids(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.mark.filterwarnings("default")
def test_word_perplexity_of_a_task_of_our_own(tiny: Tiny, evaluated: Any) -> None:
    model = harness_model(tiny("llama"), tiny_tokenizer(), batch_size=2)
    task = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    got = evaluated(model, task, [{"text": text} for text in TEXTS])
    total = -sum(_log_likelihood(tiny("llama").module, [1], _ids(text)) for text in TEXTS)
    words, size = (sum(len(part) for part in kind) for kind in zip(*_sizes(), strict=True))
    assert got["word_perplexity,none"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert got["bits_per_byte,none"] == pytest.approx(total / size / math.log(2), rel=1e-5)


def _sizes() -> list[tuple[list[str], bytes]]:
    return [(text.split(), text.encode()) for text in TEXTS]


@pytest.mark.filterwarnings("default")
def test_accuracy_on_a_task_of_our_own(tiny: Tiny, evaluated: Any) -> None:
    model = harness_model(tiny("gpt2"), tiny_tokenizer(), batch_size=3)
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    scores = [
        [_log_likelihood(tiny("gpt2").module, _ids(q), _ids(c)) for c in choices]
        for q, choices, _ in QUESTIONS
    ]
    best = [max(range(len(row)), key=row.__getitem__) for row in scores]
    for answers in (best, [1 - best[0], best[1]]):
        rows = [
            {"question": q, "choices": choices, "answer": answer}
            for (q, choices, _), answer in zip(QUESTIONS, answers, strict=True)
        ]
        expected = sum(a == b for a, b in zip(answers, best, strict=True)) / 2
        assert evaluated(model, task, rows)["acc,none"] == expected


@pytest.mark.filterwarnings("default")
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
    with pytest.raises(Unavailable, match=r"install it with `pip install 'entangle\[harness\]'`"):
        harness_model(tiny("llama"), tiny_tokenizer())


def test_models_it_cannot_take(tiny: Tiny) -> None:
    with pytest.raises(InvalidInput, match=r"causal language model.*got Embedding"):
        harness_model(nn.Embedding(4, 4), tiny_tokenizer())
    with pytest.raises(InvalidInput, match=r"causal language model.*got BertModel"):
        harness_model(tiny("bert"), tiny_tokenizer())
    with pytest.raises(InvalidInput, match="needs a tokenizer"):
        harness_model(tiny("llama"))
