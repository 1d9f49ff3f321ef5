"""`compare_with_dense` and `DenseReference` against slow references, by hand, and on edges."""

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from entangle.errors import InvalidInput, MemoryLimit, UnknownName
from entangle.evaluation import (
    DenseReference,
    EvaluationText,
    compare_with_dense,
    load_evaluation,
    perplexity,
)
from entangle.models.loading import LanguageModel
from entangle.seeding import torch_rng
from entangle.stats.intervals import window_mean_interval
from tests.reference import divergence as reference
from tests.reference.perplexity import rolled
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
NAMES = ["llama", "gpt2", "opt", "gemma3", "gpt_neox"]


def _changed(name: str, scale: float = 0.3) -> nn.Module:
    """Return a tiny model whose blocks' matrices have noise added."""
    module = TINY[name]()
    rng = torch_rng(0, "noise", name)
    for key, value in module.named_parameters():
        if ".1." in key and value.ndim == 2:
            value.data.add_(
                torch.randn(value.shape, generator=rng), alpha=scale * float(value.std())
            )
    return module


class Table(nn.Module):
    """Logits that depend on the token alone."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(rows))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.table(ids)
        return logits


class FixedReference(DenseReference):
    """A reference whose logits are given."""

    def __init__(self, text: EvaluationText, logits: torch.Tensor) -> None:
        self.text, self.batch_size, self._logits = text, 1, logits
        self.perplexity = perplexity(Table([[0.0] * logits.shape[-1]] * 4), text)

    def logits(self, start: int, end: int, part: slice = slice(None)) -> torch.Tensor:
        return self._logits[start:end, part]


@pytest.mark.parametrize("name", NAMES)
def test_against_the_reference(name: str, tiny: Tiny, windows: EvaluationText) -> None:
    changed, rows = _changed(name), windows.windows.tolist()
    got = compare_with_dense(changed, DenseReference(tiny(name), windows))
    logits = zip(rolled(tiny(name).module, rows), rolled(changed, rows), strict=True)
    kl, agreements = zip(*(reference.window(a, b) for a, b in logits), strict=True)
    assert got.window_kl == pytest.approx(kl, rel=1e-4)
    assert got.window_agreements.tolist() == list(agreements)
    assert got.kl == pytest.approx(sum(kl) / (8 * 31), rel=1e-4)
    assert got.kl > 1e-4
    assert got.top1_agreement == sum(agreements) / (8 * 31) < 1
    assert (got.n_positions, got.window_positions.tolist()) == (8 * 31, [31] * 8)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_perplexity(name: str, tiny: Tiny, windows: EvaluationText) -> None:
    changed, dense = _changed(name), DenseReference(tiny(name), windows, batch_size=3)
    got = compare_with_dense(changed, dense)
    expected = perplexity(changed, windows, batch_size=3)
    assert got.perplexity.window_losses.tolist() == expected.window_losses.tolist()
    assert got.perplexity.protocol == windows.describe()
    expected = perplexity(tiny(name), windows, batch_size=3)
    assert got.dense.window_losses.tolist() == expected.window_losses.tolist()


@pytest.mark.parametrize("name", [*NAMES, "qwen3", "mixtral"])
def test_the_dense_model_against_itself(name: str, tiny: Tiny, windows: EvaluationText) -> None:
    dense = DenseReference(tiny(name), windows)
    same = compare_with_dense(tiny(name), dense)
    assert same.window_kl.tolist() == [0.0] * 8
    assert same.top1_agreement == 1.0
    other = compare_with_dense(tiny(name), dense, batch_size=3)  # rounds differently
    assert 0 <= other.kl < 1e-9
    assert other.top1_agreement == 1.0


def test_logits_are_the_models_own(tiny: Tiny, windows: EvaluationText) -> None:
    dense = DenseReference(tiny("gpt2"), windows, batch_size=4)
    with torch.no_grad():
        expected = tiny("gpt2").module(windows.windows[4:]).logits
    assert torch.equal(dense.logits(4, 8), expected)
    assert torch.allclose(dense.logits(5, 7), expected[1:3], atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 1, 5])
@pytest.mark.usefixtures("any_memory")
@pytest.mark.parametrize("memory", [0, 3 * 32 * 32 * 4, 2**20])
def test_memory_and_batches_do_not_matter(
    memory: int, batch_size: int | None, tiny: Tiny, windows: EvaluationText
) -> None:
    changed = _changed("llama")
    expected = compare_with_dense(changed, DenseReference(tiny("llama"), windows))
    with DenseReference(tiny("llama"), windows, memory=memory, batch_size=2) as dense:
        got = compare_with_dense(changed, dense, batch_size=batch_size)
    assert got.window_kl == pytest.approx(expected.window_kl, rel=1e-4)
    assert got.window_agreements.tolist() == expected.window_agreements.tolist()


def test_edits_inside_the_blocks_of_the_same_module(windows: EvaluationText) -> None:
    module = TINY["llama"]()
    dense = DenseReference(module, windows)
    other = compare_with_dense(_changed("llama"), dense)
    for (_, own), (_, new) in zip(
        module.named_parameters(), _changed("llama").named_parameters(), strict=True
    ):
        own.data.copy_(new)
    assert compare_with_dense(module, dense).window_kl.tolist() == other.window_kl.tolist()
    assert other.kl > 1e-4


def test_a_copy_with_replaced_layers(tiny: Tiny, windows: EvaluationText) -> None:
    class Halved(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y / 2

    module = copy.deepcopy(tiny("llama").module)
    name = "model.layers.1.mlp.gate_proj"
    module.set_submodule(name, Halved(module.get_submodule(name)))
    assert compare_with_dense(module, DenseReference(tiny("llama"), windows)).kl > 1e-6


def test_larger_changes_diverge_more(tiny: Tiny, windows: EvaluationText) -> None:
    dense = DenseReference(tiny("llama"), windows)
    found = [compare_with_dense(_changed("llama", scale), dense) for scale in (0.01, 0.1, 1.0)]
    divergences = [one.kl for one in found]
    assert divergences == sorted(divergences)
    assert found[0].top1_agreement >= found[2].top1_agreement
    assert divergences[1] / divergences[0] == pytest.approx(100, rel=0.2)  # KL is quadratic


def test_by_hand() -> None:
    # one position, dense (1/2, 1/4, 1/4), changed (1/4, 1/2, 1/4): KL = ln 2 / 4
    text = load_evaluation(torch.tensor([[0, 1]]))
    dense = torch.tensor([[[2.0, 1.0, 1.0], [9.0, 0.0, 0.0]]]) * math.log(2)
    table = (torch.tensor([[1.0, 2.0, 1.0], [0.0, 9.0, 0.0], [0.0] * 3]) * math.log(2)).tolist()
    got = compare_with_dense(Table(table), FixedReference(text, dense))
    assert got.kl == pytest.approx(math.log(2) / 4)
    assert (got.n_positions, got.top1_agreement) == (1, 0.0)
    assert got.perplexity.value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("dense", "changed", "kl", "agreed"),
    [
        ([-math.inf, 0.0, 0.0], [-math.inf, 0.0, 0.0], 0.0, 1),  # impossible in both
        ([-math.inf, 1.0, 0.0], [0.0, 1.0, 0.0], None, 1),  # possible in one only
        ([0.0, 0.0, 0.0], [0.0, 0.0, -math.inf], math.inf, 1),
        ([-2000.0, 0.0, 0.0], [-math.inf, 0.0, 0.0], 0.0, 1),  # its probability is 0 in float64
        ([1.0, 0.0, 0.0], [math.nan] * 3, math.nan, 0),
        ([math.nan] * 3, [1.0, 0.0, 0.0], math.nan, 0),
        ([500.0, 0.0, 0.0], [0.0, 500.0, 0.0], 500.0, 0),
    ],
)
def test_edges(dense: list[float], changed: list[float], kl: float | None, agreed: int) -> None:
    text = load_evaluation(torch.tensor([[0, 1]]))
    table = [changed, [0.0] * 3, [0.0] * 3]
    got = compare_with_dense(Table(table), FixedReference(text, torch.tensor([[dense, [0.0] * 3]])))
    if kl is None:
        kl = math.log((1 + math.e + 1) / (1 + math.e))
    assert got.kl == pytest.approx(kl, nan_ok=True)
    assert got.window_agreements.tolist() == [agreed]


def test_small_divergences_are_not_lost_in_rounding() -> None:
    text = load_evaluation(torch.tensor([[0, 1]]))
    rng = torch_rng(0, "small")
    dense = 30 + torch.randn(1, 2, 3000, generator=rng)
    changed = dense + 1e-4 * torch.randn(dense.shape, generator=rng)
    expected, _ = reference.window(dense[0], changed[0])
    table = [changed[0, 0].tolist(), *([0.0] * 3000 for _ in range(2999))]
    got = compare_with_dense(Table(table), FixedReference(text, dense))
    assert 1e-9 < expected < 1e-8
    assert got.kl == pytest.approx(expected, rel=1e-5)


def test_half_precision(windows: EvaluationText) -> None:
    module = TINY["llama"]().to(torch.bfloat16)
    same = compare_with_dense(module, DenseReference(module, windows))
    assert (same.window_kl.tolist(), same.top1_agreement) == ([0.0] * 8, 1.0)


def test_parts_of_a_window_do_not_matter(
    tiny: Tiny, windows: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, dense = _changed("llama"), DenseReference(tiny("llama"), windows)
    expected = compare_with_dense(changed, dense)
    monkeypatch.setattr(sys.modules["entangle.evaluation.divergence"], "LOGITS_AT_ONCE", 5 * 112)
    got = compare_with_dense(changed, dense)
    assert got.window_kl == pytest.approx(expected.window_kl, rel=1e-12)
    assert got.window_agreements.tolist() == expected.window_agreements.tolist()


def test_logits_that_come_in_parts(
    tiny: Tiny, windows: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = _changed("llama")
    expected = compare_with_dense(changed, DenseReference(tiny("llama"), windows))
    for module in ("entangle.models.blocks", "entangle.evaluation.logits"):
        monkeypatch.setattr(sys.modules[module], "MOST_LOGITS", 112)
    monkeypatch.setattr(sys.modules["entangle.models.blocks"], "LOGITS_OF_A_PART", 8 * 5 * 112)
    seen: list[int] = []
    handle = changed.get_submodule("lm_head").register_forward_hook(
        lambda *args: seen.append(args[2].shape[1])
    )
    dense = DenseReference(tiny("llama"), windows)
    got = compare_with_dense(changed, dense)
    handle.remove()
    assert seen[-7:] == [5] * 6 + [2]
    assert dense.perplexity.window_losses == pytest.approx(expected.dense.window_losses, rel=1e-6)
    assert got.window_kl == pytest.approx(expected.window_kl, rel=1e-5)
    assert got.perplexity.window_losses == pytest.approx(
        expected.perplexity.window_losses, rel=1e-6
    )
    assert got.window_agreements.tolist() == expected.window_agreements.tolist()
    same = compare_with_dense(tiny("llama").module, dense)
    assert (same.window_kl.tolist(), same.top1_agreement) == ([0.0] * 8, 1.0)


def test_intervals(tiny: Tiny, windows: EvaluationText) -> None:
    got = compare_with_dense(_changed("llama"), DenseReference(tiny("llama"), windows))
    sums: dict[str, Any] = {
        "kl": got.window_kl,
        "top1_agreement": got.window_agreements.astype(float),
        "loss": got.perplexity.window_losses,
    }
    for name, values in sums.items():
        found = got.interval(name, n_boot=100, seed=3, level=0.8)
        counts = np.full(8, 31)
        assert found == window_mean_interval(values, counts, n_boot=100, seed=3, level=0.8)
        assert found.low < found.value < found.high
    assert got.interval("kl").value == got.kl
    assert got.interval("top1_agreement").value == got.top1_agreement
    assert math.exp(got.interval("loss").value) == pytest.approx(got.perplexity.value)
    with pytest.raises(UnknownName, match="'kll'"):
        got.interval("kll")


def test_the_result_is_fixed(tiny: Tiny, windows: EvaluationText) -> None:
    got = compare_with_dense(tiny("llama"), DenseReference(tiny("llama"), windows))
    for values in (got.window_kl, got.window_agreements, got.window_positions):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


def test_the_model_is_left_as_it_was(
    windows: EvaluationText, count_hooks: Callable[[nn.Module], int]
) -> None:
    module = TINY["gpt2"]()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    compare_with_dense(module, DenseReference(module, windows))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert count_hooks(module) == 0


def test_what_is_refused(tiny: Tiny, windows: EvaluationText) -> None:
    with pytest.raises(InvalidInput, match=r"BertModel.*encoder"):
        DenseReference(tiny("bert"), windows)
    with pytest.raises(InvalidInput, match=r"seq_len.*context.*\b128\b.*\b129\b"):
        DenseReference(tiny("llama"), load_evaluation(torch.full((1, 129), 5)))
    with pytest.raises(InvalidInput, match=r"batch_size.*integer.*\b0\b"):
        DenseReference(tiny("llama"), windows, batch_size=0)
    with pytest.raises(InvalidInput, match=r"`memory`.*-1\b"):
        DenseReference(tiny("llama"), windows, memory=-1)
    with pytest.raises(InvalidInput, match="ModuleList"):
        DenseReference(Table([[0.0] * 112] * 112), windows)
    dense = DenseReference(tiny("llama"), windows)
    with pytest.raises(InvalidInput, match=r"\b112\b.*compared"):
        compare_with_dense(Table([[0.0] * 113] * 113), dense)
    with pytest.raises(InvalidInput, match=r"batch_size.*integer.*\b0\b"):
        compare_with_dense(tiny("llama"), dense, batch_size=0)
    with pytest.raises(InvalidInput, match=r"\d+.*outside"):
        compare_with_dense(Table([[0.0] * 50] * 50), dense)


def test_running_out_of_memory_names_the_setting(tiny: Tiny, windows: EvaluationText) -> None:
    class Greedy(Table):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            raise MemoryError

    dense = DenseReference(tiny("llama"), windows)
    with pytest.raises(MemoryLimit, match=r"\b2\b.*--batch-size"):
        compare_with_dense(Greedy([[0.0] * 112] * 112), dense, batch_size=2)


@pytest.mark.usefixtures("any_memory")
@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same(tiny: Tiny, windows: EvaluationText) -> None:
    expected = compare_with_dense(_changed("llama"), DenseReference(tiny("llama"), windows))
    with DenseReference(TINY["llama"]().cuda(), windows, memory=0) as dense:
        got = compare_with_dense(_changed("llama").cuda(), dense)
        same = compare_with_dense(TINY["llama"]().cuda(), dense)
    assert got.kl == pytest.approx(expected.kl, rel=1e-3)
    assert same.kl < 1e-9
