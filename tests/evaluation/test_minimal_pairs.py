"""`minimal_pair_scores` against slow references, by hand, and with tokenizers of every kind."""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from entangle.errors import InvalidInput, MemoryLimit
from entangle.evaluation import MinimalPairs, minimal_pair_scores
from entangle.models.loading import LanguageModel
from tests.reference import minimal_pairs as reference
from tests.tiny_models import TINY, tiny_tokenizer

Tiny = Callable[[str], LanguageModel]
NAMES = ["llama", "gpt2", "opt", "gemma3", "gpt_neox"]
GOOD = ("The cats sleep.", "I see it", "Who left?", "A dog who barks bites.", "No")
BAD = ("The cats sleeps.", "I sees it", "Who leave?", "A dog which who barks bites.", "On")


def _pairs(good: tuple[str, ...] = GOOD, bad: tuple[str, ...] = BAD) -> MinimalPairs:
    return MinimalPairs(good, bad, ("p",) * len(good), "here", {})


def _bare_tokenizer(**special: str | None) -> hf.PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return tokenizer


class Fixed(nn.Module):
    """A model that gives token i + 1 after token i the probability 1/2, all others the same."""

    def __init__(self, vocabulary: int = 112) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 2)
        self.shapes: list[torch.Size] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.shapes.append(ids.shape)
        size = self.embedding.num_embeddings
        logits = torch.full((*ids.shape, size), -math.log(2 * (size - 1)))
        return logits.scatter_(-1, (ids[..., None] + 1) % size, -math.log(2))


@pytest.mark.parametrize("name", NAMES)
def test_against_the_reference(name: str, tiny: Tiny) -> None:
    tokenizer, module = tiny_tokenizer(), tiny(name).module
    got = minimal_pair_scores(module, _pairs(), tokenizer)
    for sentences, values in ((GOOD, got.good), (BAD, got.bad)):
        expected = [reference.sentence_score(module, tokenizer, one) for one in sentences]
        assert values == pytest.approx(expected, rel=1e-5)
    assert got.good.dtype == np.float64


def test_by_hand() -> None:
    # after <s> and a space: "ab" and "ba"; only b after a is the next token, of probability 1/2
    got = minimal_pair_scores(Fixed(), _pairs(("ab",), ("ba",)), tiny_tokenizer())
    other = math.log(1 / 222)
    assert got.good.tolist() == pytest.approx([2 * other + math.log(0.5)])
    assert got.bad.tolist() == pytest.approx([3 * other])
    assert got.correct.tolist() == [True]


@pytest.mark.parametrize("name", NAMES)
def test_batch_size_does_not_matter(name: str, tiny: Tiny) -> None:
    whole = minimal_pair_scores(tiny(name), _pairs(), tiny_tokenizer())
    for batch_tokens in (1, 20, 64):
        got = minimal_pair_scores(tiny(name), _pairs(), tiny_tokenizer(), batch_tokens=batch_tokens)
        assert got.good == pytest.approx(whole.good, rel=1e-5)
        assert got.bad == pytest.approx(whole.bad, rel=1e-5)


def test_order_of_pairs_does_not_matter(tiny: Tiny) -> None:
    whole = minimal_pair_scores(tiny("llama"), _pairs(), tiny_tokenizer())
    for order in itertools.islice(itertools.permutations(range(5)), 1, 120, 24):
        mixed = _pairs(tuple(GOOD[i] for i in order), tuple(BAD[i] for i in order))
        got = minimal_pair_scores(tiny("llama"), mixed, tiny_tokenizer())
        assert got.good == pytest.approx(whole.good[list(order)], rel=1e-5)
    swapped = minimal_pair_scores(tiny("llama"), _pairs(BAD, GOOD), tiny_tokenizer())
    assert swapped.margins == pytest.approx(-whole.margins, rel=1e-4)


def test_passes_hold_one_length_and_stay_in_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _pairs(("aa", "b" * 10, "cc", "dd"), ("ab", "c" * 10, "cd", "de"))
    module = Fixed()
    minimal_pair_scores(module, pairs, tiny_tokenizer(), batch_tokens=12)
    assert module.shapes == [(1, 12), (1, 12), (3, 4), (3, 4)]
    module.shapes.clear()
    scoring = sys.modules["entangle.evaluation.minimal_pairs"]
    monkeypatch.setattr(scoring, "LOGITS_IN_A_PASS", 8 * 112)
    minimal_pair_scores(module, pairs, tiny_tokenizer())
    assert module.shapes == [(1, 12), (1, 12), (2, 4), (2, 4), (2, 4)]


def test_the_first_token() -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    seen: list[list[int]] = []

    class Noted(Fixed):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            seen.extend(ids.tolist())
            return super().forward(ids)

    def first(tokenizer: hf.PreTrainedTokenizerFast, good: str = "ab") -> tuple[int, int, Any]:
        seen.clear()
        got = minimal_pair_scores(Noted(), _pairs((good,), ("bb",)), tokenizer, batch_tokens=1)
        ids = next(row for row in seen if vocabulary["a"] in row)
        return ids[0], len(ids), got.settings

    start, length, settings = first(tiny_tokenizer())
    assert (start, length, settings["first_token"]) == (vocabulary["<s>"], 4, 1)
    assert settings["sentence_token_not_counted"] is False
    start, length, _ = first(_bare_tokenizer(bos_token=None))
    assert (start, length) == (vocabulary["</s>"], 4)
    start, length, settings = first(_bare_tokenizer(bos_token=None, eos_token=None))
    assert (start, length, settings["first_token"]) == (vocabulary[" "], 3, None)
    assert settings["sentence_token_not_counted"] is True
    start, length, _ = first(_bare_tokenizer(bos_token=" "))  # a sentence that begins with it
    assert (start, length) == (vocabulary[" "], 3)


def test_without_a_first_token_by_hand() -> None:
    tokenizer = _bare_tokenizer(bos_token=None, eos_token=None)
    got = minimal_pair_scores(Fixed(), _pairs(("ab",), ("ba",)), tokenizer)
    other = math.log(1 / 222)
    assert got.good.tolist() == pytest.approx([other + math.log(0.5)])
    assert got.bad.tolist() == pytest.approx([2 * other])


def test_special_tokens_are_not_added(tiny: Tiny) -> None:
    """The tokenizer would put </s> after a text; a sentence's score does not have it."""
    tokenizer = tiny_tokenizer(adds=True)
    assert tokenizer("a")["input_ids"][-1] == 2
    module = tiny("llama").module
    short, long = (minimal_pair_scores(module, _pairs((s,), ("zz",)), tokenizer) for s in "ab")
    ids = [1, *tokenizer.encode(" a", add_special_tokens=False)]
    assert short.good[0] == pytest.approx(reference.log_probability(module, ids), rel=1e-5)
    assert short.bad == pytest.approx(long.bad)


def test_nan_logits_are_kept_and_flagged() -> None:
    module = TINY["llama"]()
    module.get_parameter("model.norm.weight").fill_(math.nan)
    got = minimal_pair_scores(module, _pairs(), tiny_tokenizer())
    assert got.flag == "nan"
    assert not got.correct.any()


def test_the_models_own_tokenizer_is_used(tiny: Tiny) -> None:
    model = LanguageModel(tiny("gpt2").module, tiny_tokenizer(), "x", "memory", None)
    got = minimal_pair_scores(model, _pairs())
    expected = minimal_pair_scores(tiny("gpt2"), _pairs(), tiny_tokenizer())
    assert got.good.tolist() == expected.good.tolist()
    assert got.settings == expected.settings


def test_what_is_refused(tiny: Tiny) -> None:
    llama, tokenizer = tiny("llama"), tiny_tokenizer()
    with pytest.raises(InvalidInput, match="`tokenizer`"):
        minimal_pair_scores(llama, _pairs())
    with pytest.raises(InvalidInput, match=r"BertModel.*encoder"):
        minimal_pair_scores(tiny("bert"), _pairs(), tokenizer)
    for size in (0, -1, True):
        with pytest.raises(InvalidInput, match=r"batch_tokens.*\b1\b"):
            minimal_pair_scores(llama, _pairs(), tokenizer, batch_tokens=size)
    with pytest.raises(InvalidInput, match=r"\b128\b.*tokens.*\b129\b"):
        minimal_pair_scores(llama, _pairs(("a" * 127,), ("b",)), tokenizer)
    with pytest.raises(InvalidInput, match=r"\d+.*outside"):
        minimal_pair_scores(Fixed(60), _pairs(), tokenizer)
    headless = llama.module.get_submodule("model")
    with pytest.raises(InvalidInput, match="LlamaModel"):
        minimal_pair_scores(headless, _pairs(), tokenizer)


def test_a_sentence_without_a_token_to_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    scoring = sys.modules["entangle.evaluation.minimal_pairs"]
    monkeypatch.setattr(scoring, "_BEFORE", "")
    tokenizer = _bare_tokenizer(bos_token=None, eos_token=None)
    with pytest.raises(InvalidInput, match=r"token.*'a'.*\b1\b"):
        minimal_pair_scores(Fixed(), _pairs(("a",), ("bc",)), tokenizer)


def test_running_out_of_memory_names_the_setting() -> None:
    class Greedy(Fixed):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            raise MemoryError

    with pytest.raises(MemoryLimit, match=r"\d+.*batch_tok"):
        minimal_pair_scores(Greedy(), _pairs(), tiny_tokenizer())


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same(tiny: Tiny) -> None:
    expected = minimal_pair_scores(tiny("llama"), _pairs(), tiny_tokenizer())
    got = minimal_pair_scores(TINY["llama"]().cuda(), _pairs(), tiny_tokenizer())
    assert got.good == pytest.approx(expected.good, rel=1e-4)
