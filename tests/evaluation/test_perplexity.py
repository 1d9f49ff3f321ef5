"""`perplexity` against slow references on every architecture, by hand, and on bad models."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from entangle.errors import InvalidInput, MemoryLimit
from entangle.evaluation import EvaluationText, Perplexity, load_evaluation, perplexity
from entangle.evaluation.perplexity import measure_perplexity, windows_by_default
from entangle.models.loading import LanguageModel, load_model
from tests.reference import perplexity as reference
from tests.tiny_models import CONFIGS, TINY, WIDE

Tiny = Callable[[str], LanguageModel]
DECODERS = sorted(set(CONFIGS) - {"bert"})


class Fixed(nn.Module):
    """A model whose logits do not depend on its input; token 1 gets ``bonus``."""

    def __init__(self, bonus: float = 0.0, vocabulary: int = 112) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 2)
        self.bonus = bonus

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, self.embedding.num_embeddings)
        logits[..., 1] = self.bonus
        return logits


def _text(rows: list[list[int]]) -> EvaluationText:
    return load_evaluation(torch.tensor(rows))


@pytest.mark.parametrize("name", DECODERS)
def test_against_the_reference(name: str, tiny: Tiny, windows: EvaluationText) -> None:
    rows = windows.windows.tolist()
    logits = reference.rolled(tiny(name).module, rows)
    got = perplexity(tiny(name), windows)
    assert got.value == pytest.approx(reference.perplexity(logits, rows), rel=1e-5)
    losses = [reference.window_loss(a, b) for a, b in zip(logits, rows, strict=True)]
    assert got.window_losses == pytest.approx(losses, rel=1e-5)
    assert got.flag == ""


def test_against_the_loss_of_transformers(tiny: Tiny, windows: EvaluationText) -> None:
    module, ids = tiny("llama").module, windows.windows
    with torch.no_grad():
        loss = module(ids, labels=ids).loss
    assert perplexity(tiny("llama"), windows).value == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_batch_size_does_not_matter(name: str, tiny: Tiny, windows: EvaluationText) -> None:
    expected = perplexity(tiny(name), windows).window_losses
    for size in (1, 3, 100):
        got = perplexity(tiny(name), windows, batch_size=size).window_losses
        assert got == pytest.approx(expected, rel=1e-5)


def test_default_batch_is_bounded_in_logits(
    tiny: Tiny, windows: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    module = TINY["llama"]()
    handle = module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    measure_perplexity(module, windows)
    for limit in (3 * 32 * 112, 1):
        globals_of = vars(__import__("sys").modules["entangle.evaluation.perplexity"])
        monkeypatch.setitem(globals_of, "LOGITS_IN_A_PASS", limit)
        measure_perplexity(module, windows)
    handle.remove()
    assert sizes == [8, 3, 3, 2, *[1] * 8]


def test_two_runs_give_the_same_bits(tiny: Tiny, windows: EvaluationText) -> None:
    first, second = (perplexity(tiny("llama"), windows, batch_size=3) for _ in range(2))
    assert np.array_equal(first.window_losses, second.window_losses)


def test_uniform_by_hand(windows: EvaluationText) -> None:
    got = perplexity(Fixed(), windows)
    assert got.value == pytest.approx(112, rel=1e-6)
    total = windows.n_tokens * math.log(112)
    assert windows.n_words is not None
    assert got.word_perplexity == pytest.approx(math.exp(total / windows.n_words), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(math.log2(112), rel=1e-6)  # a byte is a token here


def test_without_words_there_is_no_word_perplexity() -> None:
    got = perplexity(Fixed(), _text([[1, 2, 3]]))
    assert (got.word_perplexity, got.bits_per_byte) == (None, None)


def test_the_result_is_fixed_and_complete(windows: EvaluationText) -> None:
    got = perplexity(Fixed(), windows)
    assert got.protocol == windows.describe()
    assert (got.window_losses.shape, got.n_tokens) == ((8,), 8 * 31)
    with pytest.raises(ValueError, match="read-only"):
        got.window_losses[0] = 0.0


@pytest.mark.parametrize(
    ("bonus", "row", "flag"),
    [
        (math.nan, [2, 2, 2], "nan"),
        (-math.inf, [2, 1, 2], "infinite"),  # impossible
        (1e30, [2, 2, 2], "infinite"),
        (900.0, [2, 2, 2], "infinite"),  # exp(900) is above float64
    ],
)
def test_no_finite_perplexity_is_flagged(bonus: float, row: list[int], flag: str) -> None:
    got = perplexity(Fixed(bonus), _text([row, row]))
    assert got.flag == flag
    assert math.isnan(got.value) if flag == "nan" else math.isinf(got.value)


def test_a_nan_in_one_window_is_counted(windows: EvaluationText) -> None:
    losses = torch.ones(8, dtype=torch.float64)
    losses[3] = math.nan
    got = Perplexity.of(losses, windows)
    assert (got.flag, got.n_bad_windows) == ("nan", 1)
    assert np.isfinite(got.window_losses).sum() == 7


def test_a_model_with_nan_weights_runs_to_its_end(windows: EvaluationText) -> None:
    module = TINY["llama"]()
    module.get_parameter("model.norm.weight").fill_(math.nan)
    got = perplexity(module, windows)
    assert (got.flag, got.n_bad_windows) == ("nan", 8)


def test_losses_that_were_computed_elsewhere(tiny: Tiny, windows: EvaluationText) -> None:
    whole = perplexity(tiny("llama"), windows)
    again = Perplexity.of(torch.from_numpy(whole.window_losses.copy()), windows)
    assert again.value == whole.value
    with pytest.raises(InvalidInput, match=r"`losses`.*\b8\b.*\(7,\)"):
        Perplexity.of(torch.ones(7, dtype=torch.float64), windows)


def test_the_model_is_left_as_it_was(
    tiny: Tiny, windows: EvaluationText, count_hooks: Callable[[nn.Module], int]
) -> None:
    module = TINY["gpt2"]()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    perplexity(module, windows)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert count_hooks(module) == 0


class OutOfMemory(Fixed):
    """Fails as torch does on the CPU."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")


class Broken(Fixed):
    """Fails for another reason."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")


def test_running_out_of_memory_names_the_setting() -> None:
    with pytest.raises(MemoryLimit, match=r"\b2\b.*--batch-size"):
        perplexity(OutOfMemory(), _text([[1, 2], [3, 4]]), batch_size=2)
    with pytest.raises(RuntimeError, match="shapes"):
        perplexity(Broken(), _text([[1, 2], [3, 4]]))


def test_models_that_predict_no_next_token(tiny: Tiny, windows: EvaluationText) -> None:
    with pytest.raises(InvalidInput, match=r"BertModel.*encoder"):
        perplexity(tiny("bert"), windows)
    masked = hf.BertForMaskedLM(hf.BertConfig(**WIDE, intermediate_size=48))
    with pytest.raises(InvalidInput, match="BertForMaskedLM"):
        perplexity(masked, windows)
    headless = TINY["llama"]().get_submodule("model")
    with pytest.raises(InvalidInput, match="LlamaModel"):
        perplexity(headless, windows)
    config: Any = TINY["llama"]().config
    classifier = hf.LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
    with pytest.raises(InvalidInput, match="LlamaForSequenceClassification"):
        perplexity(classifier, windows)


def test_texts_that_do_not_fit(tiny: Tiny) -> None:
    with pytest.raises(InvalidInput, match=r"seq_len.*context.*\b128\b.*\b129\b"):
        perplexity(tiny("llama"), _text([[5] * 129]))
    with pytest.raises(InvalidInput, match=r"\b112\b.*outside"):
        perplexity(tiny("llama"), _text([[5, 112]]))


@pytest.mark.parametrize("size", [0, -1, True])
def test_batch_sizes_out_of_range(size: Any, tiny: Tiny, windows: EvaluationText) -> None:
    with pytest.raises(InvalidInput, match=r"batch_size.*integer.*\b1\b"):
        perplexity(tiny("llama"), windows, batch_size=size)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same(windows: EvaluationText) -> None:
    expected = perplexity(TINY["llama"](), windows).value
    assert perplexity(TINY["llama"]().cuda(), windows).value == pytest.approx(expected, rel=1e-4)


@pytest.mark.demo
def test_the_demo_model_on_the_demo_text() -> None:
    model = load_model("demo", device="cpu")
    text = load_evaluation("demo", model.tokenizer, seq_len=256, n_windows=3)
    with torch.no_grad():
        loss = model.module(text.windows, labels=text.windows).loss
    got = perplexity(model, text, batch_size=2)
    assert got.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert 10 < got.value < 60
    assert got.bits_per_byte is not None
    assert 0.7 < got.bits_per_byte < 1.5


@pytest.mark.parametrize(
    ("seq_len", "vocabulary", "windows"), [(512, 256, 32), (2048, 32_000, 2), (2048, 262_144, 1)]
)
def test_default_batch_is_bounded_in_tokens(seq_len: int, vocabulary: int, windows: int) -> None:
    assert windows_by_default(seq_len, vocabulary) == windows
