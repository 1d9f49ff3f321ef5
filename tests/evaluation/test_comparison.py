"""Several models on one text: ratios by hand, paired intervals, the table."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from entangle.errors import InvalidInput
from entangle.evaluation import (
    EvaluationText,
    Perplexity,
    evaluate_models,
    load_evaluation,
    perplexity,
    perplexity_ratio,
    perplexity_table,
)
from entangle.models.loading import LanguageModel
from entangle.seeding import numpy_rng, torch_rng

Tiny = Callable[[str], LanguageModel]
TOKENS = 31


def _result(text: EvaluationText, losses: list[float]) -> Perplexity:
    return Perplexity.of(torch.tensor(losses, dtype=torch.float64), text)


@pytest.fixture
def noisy(windows: EvaluationText) -> list[float]:
    rng = torch_rng(0, "window losses")
    return (60 + 20 * torch.randn(8, generator=rng)).tolist()


def test_ratio_by_hand(windows: EvaluationText, noisy: list[float]) -> None:
    baseline = _result(windows, noisy)
    shifted = _result(windows, [loss + TOKENS * math.log(1.5) for loss in noisy])
    got = perplexity_ratio(shifted, baseline)
    assert got.value == pytest.approx(shifted.value / baseline.value)
    assert (got.value, got.low, got.high) == pytest.approx((1.5, 1.5, 1.5))  # paired: no spread


def test_interval_against_a_loop(windows: EvaluationText, noisy: list[float]) -> None:
    baseline = _result(windows, noisy)
    other = _result(windows, [loss + 3 * (i % 3) for i, loss in enumerate(noisy)])
    got = perplexity_ratio(other, baseline, n_boot=200, seed=7, level=0.9)
    rng = numpy_rng(7, "perplexity ratio")
    ratios = []
    for _ in range(200):
        chosen = rng.integers(8, size=8)
        gap = sum(other.window_losses[i] - baseline.window_losses[i] for i in chosen)
        ratios.append(math.exp(gap / (8 * TOKENS)))
    low, high = np.quantile(np.log(ratios), [0.05, 0.95])
    assert (got.low, got.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert got.low < got.value < got.high
    assert got != perplexity_ratio(other, baseline, n_boot=200, seed=8, level=0.9)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    text = load_evaluation(torch.ones(40, 11, dtype=torch.int64))
    gaps = 2 * torch.randn(200, 40, generator=torch_rng(1, "gaps"), dtype=torch.float64)
    hard = 30 * torch.rand(40, generator=torch_rng(2, "hard"), dtype=torch.float64)
    baseline = Perplexity.of(hard, text)
    found = [
        perplexity_ratio(Perplexity.of(hard + row, text), baseline, n_boot=200) for row in gaps
    ]
    assert 0.88 < np.mean([one.low <= 1.0 <= one.high for one in found]) < 0.99


def test_one_window_and_broken_losses_have_no_interval(windows: EvaluationText) -> None:
    one = load_evaluation(torch.ones(1, 5, dtype=torch.int64))
    got = perplexity_ratio(_result(one, [8.0]), _result(one, [4.0]))
    assert got.value == pytest.approx(math.e)
    assert np.isnan([got.low, got.high]).all()
    fine = _result(windows, [5.0] * 8)
    for value, ratio in [(math.nan, math.nan), (math.inf, math.inf)]:
        broken = _result(windows, [5.0] * 7 + [value])
        got = perplexity_ratio(broken, fine)
        assert got.value == pytest.approx(ratio, nan_ok=True)
        assert np.isnan([got.low, got.high]).all()
    assert math.isnan(perplexity_ratio(broken, broken).value)


def test_table(tiny: Tiny, windows: EvaluationText) -> None:
    models = [("dense", tiny("llama")), ("other", tiny("qwen3"))]
    results = evaluate_models(models, windows, batch_size=3)
    assert list(results) == ["dense", "other"]
    expected = perplexity(tiny("qwen3"), windows, batch_size=3)
    assert np.array_equal(results["other"].window_losses, expected.window_losses)
    table = perplexity_table(results, n_boot=50)
    assert table["model"].tolist() == ["dense", "other"]
    assert table["perplexity"].tolist() == [result.value for result in results.values()]
    ratio = table[["ratio", "ratio_low", "ratio_high"]].to_numpy()
    assert ratio[0].tolist() == [1.0, 1.0, 1.0]
    assert ratio[1, 0] == pytest.approx(expected.value / results["dense"].value)
    assert table["word_perplexity"][1] == expected.word_perplexity
    assert table["bits_per_byte"][1] == expected.bits_per_byte
    assert table["windows"].tolist() == [8, 8]
    assert table["tokens"].tolist() == [8 * TOKENS] * 2
    assert table["flag"].tolist() == ["", ""]


def test_table_keeps_what_is_broken_or_unknown() -> None:
    text = load_evaluation(torch.ones(2, 5, dtype=torch.int64))
    results = {"dense": _result(text, [1.0, 2.0]), "broken": _result(text, [math.nan, 1.0])}
    table = perplexity_table(results)
    assert table["flag"].tolist() == ["", "nan"]
    assert table["word_perplexity"].isna().all()
    assert table["perplexity"].dtype == table["word_perplexity"].dtype == np.float64


def test_models_are_asked_for_one_at_a_time(tiny: Tiny, windows: EvaluationText) -> None:
    module = torch.nn.Embedding(112, 112)
    seen = []

    def models() -> Iterator[tuple[str, torch.nn.Module]]:
        for scale in (1.0, 0.0):
            with torch.no_grad():
                module.weight.mul_(scale)
            seen.append(scale)
            yield str(scale), module

    results = evaluate_models(models(), windows)
    assert seen == [1.0, 0.0]
    assert results["0.0"].value == pytest.approx(112, rel=1e-6)
    assert results["1.0"].value > 112


def test_what_is_refused(tiny: Tiny, windows: EvaluationText) -> None:
    result = _result(windows, [5.0] * 8)
    other = _result(load_evaluation(torch.ones(8, 32, dtype=torch.int64)), [5.0] * 8)
    with pytest.raises(InvalidInput, match="same windows"):
        perplexity_table({"a": result, "b": other})
    with pytest.raises(InvalidInput, match=r"`results`.*at least one"):
        perplexity_table({})
    with pytest.raises(InvalidInput, match=r"'a'.*twice"):
        evaluate_models([("a", tiny("llama")), ("a", tiny("llama"))], windows)
    for options in ({"n_boot": 0}, {"level": 0.0}, {"level": 1.0}):
        with pytest.raises(InvalidInput, match=r"`(n_boot|level)`"):
            perplexity_ratio(result, result, **options)
