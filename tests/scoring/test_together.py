"""Experts counted and measured at once: the same numbers as one after the other."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import entangle
from entangle.kernels import sketch as kernels
from entangle.kernels.sketch import RowBlocks
from entangle.models.grouped import Blocks
from entangle.models.layers import find_layers
from entangle.models.mixtures import banks_of, together
from entangle.recording.hooks import observe
from entangle.results.scores import NeuronScores
from entangle.scoring import layer_scores
from entangle.scoring.finer_experts import FinerExperts, block_moments, block_squares
from entangle.scoring.finer_experts import _moments_at_once as moments_at_once
from entangle.seeding import torch_rng
from entangle.stats import bins
from entangle.stats import sketches as sketches_module
from entangle.stats.edges import N_BINS
from entangle.stats.sketch import OutputSketch
from entangle.stats.sketches import OutputSketches
from tests.mixtures import TEXT, mixture, text


def scored(module: nn.Module, **settings: Any) -> NeuronScores:
    given: dict[str, Any] = {"proj": "experts", "min_tokens": 16, "method": "sketch"}
    return entangle.score(module, TEXT(), batch_size=2, progress=False, **given | settings)


def assert_same(at_once: NeuronScores, alone: NeuronScores) -> None:
    """Counts, moments and WD to the bit; the bound of its error to rounding."""
    for one, other in ((at_once.frame, alone.frame), (at_once.layers, alone.layers)):
        assert list(one.columns) == list(other.columns)
        for name in one:
            if name == "wd_bound":
                np.testing.assert_allclose(one[name], other[name], rtol=1e-9, atol=1e-10)
            else:
                assert one[name].equals(other[name]), name
    assert list(at_once.histograms) == list(alone.histograms)
    for name, counted in at_once.histograms.items():
        theirs = alone.histograms[name]
        assert counted.first_bin == theirs.first_bin
        for part in ("counts", "location", "scale", "low", "high", "wd_without"):
            np.testing.assert_array_equal(getattr(counted, part), getattr(theirs, part))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Mixtral", torch.bfloat16), ("GptOss", torch.float32), ("GptOss", torch.bfloat16),
     ("JetMoe", torch.float32)],
)  # fmt: skip
def test_experts_at_once_have_the_scores_of_each_alone(name: str, dtype: torch.dtype) -> None:
    module = mixture(name).to(dtype)
    given = {"layers": 1}
    assert_same(scored(module, **given), scored(module, watch=lambda _seen: None, **given))


def test_top_1_experts_without_tokens_and_some_layers_alone() -> None:
    module: Any = mixture("Mixtral", num_experts_per_tok=1)
    module.model.layers[1].mlp.gate.weight.zero_()
    module.model.layers[2].mlp.experts.gate_up_proj[1, 3, 2] = torch.nan
    found = scored(module)
    assert_same(found, scored(module, watch=lambda _seen: None))
    assert found.manifest["settings"]["layers_without_tokens"]  # type: ignore[index]
    assert set(found.frame["flag"]) >= {"", "nan"}
    some = ["model.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.3.*"]
    picked = scored(module, layers=some, proj=None)
    rows = found.frame[found.frame["layer"].isin(picked.frame["layer"])]
    assert len(picked.frame) == 48 + 48 + 48 + 32
    assert picked.frame["wd"].tolist() == rows["wd"].tolist()


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss", "DeepseekV2", "Dbrx"])
def test_what_is_told_at_once_is_what_each_expert_gives(name: str) -> None:
    module: Any = mixture(name)
    (bank, *_), ids, alone = banks_of(module), text(3, 12), dict[str, Tensor]()
    layers = [
        one for one in find_layers(module, "all", "experts") if one.name.startswith(bank.name)
    ]
    with observe(layers, lambda layer, _inputs, outputs: alone.update({layer.name: outputs})):
        logits = module(ids).logits
    told: list[Any] = []
    with together(bank, told.append):
        watched = module(ids).logits
    assert torch.equal(watched, logits)
    (rows,) = told
    assert rows.starts == rows.bounds.tolist()
    for layer in layers:
        number, key = layer.name.split(".")[-2:]
        own = rows.outputs[key][slice(*rows.starts[int(number) : int(number) + 2])]
        assert torch.equal(own, alone.get(layer.name, own[:0]))
    assert "forward" not in bank.runs[0].__dict__
    assert not bank.watchers


def test_padding_is_of_no_expert() -> None:
    (bank, *_) = banks_of(mixture("Mixtral"))
    x, index, weights = torch.randn(3, 32), torch.tensor([[0, 4], [4, 4], [3, 1]]), torch.rand(3, 2)
    told: list[Any] = []
    with together(bank, told.append):
        found = bank.run(bank.home, x, index, weights)
    assert torch.equal(found, bank.run(bank.home, x, index, weights))
    assert told[0].starts == [0, 1, 2, 2, 3]


def test_blocks_multiply_each_row_by_its_own_weight() -> None:
    rng = torch_rng(0, "blocks")
    numbers = torch.tensor([0, 0, 2, 2, 2, 3])  # 1 has none, 3 is of no expert
    x, weight = torch.randn(6, 5, generator=rng), torch.randn(3, 4, 5, generator=rng)
    bias = torch.randn(3, 4, generator=rng)
    blocks = Blocks.of(numbers, 3)
    found = blocks.linear(x, weight, bias)
    for row in range(5):
        torch.testing.assert_close(found[row], weight[numbers[row]] @ x[row] + bias[numbers[row]])


def test_sketches_at_once_are_sketches_of_each() -> None:
    rng = torch_rng(0, "sketches")
    sketches, alone = (
        OutputSketches(4, 6, n_groups=3),
        [OutputSketch(6, n_groups=3) for _ in "1234"],
    )
    for group in (0, 0, 1, 2):
        y = torch.randn(900, 6, generator=rng).exp()
        ends = [(0, 500), (500, 500), (500, 900 - 7 * group), (890, 900)]
        ends[3] = ends[3] if group == 2 else (0, 0)  # the last sees its first tokens late
        sketches.update(y, RowBlocks(ends, y.device), group=group)
        for one, (start, end) in zip(alone, ends, strict=True):
            one.update(y[start:end], group=group)
    seen = [0, 2, 3]
    found = {}
    for numbers, result, _used in sketches.result():
        for place, number in enumerate(numbers):
            found[number] = result, slice(6 * place, 6 * place + 6)
    assert sorted(found) == seen
    for number in seen:
        (result, own), other = found[number], alone[number].result()
        assert sketches.each[number].n_tokens == other.n_tokens
        first, last = result.first_bin, result.first_bin + result.counts.shape[1]
        assert torch.equal(result.counts[own], other.counts[:, first:last])
        assert int(result.counts[own].sum()) == int(other.counts.sum())
        for name in ("wd", "ks", "mean", "std", "skewness", "excess_kurtosis", "constant"):
            one, two = getattr(result.shape, name)[own], getattr(other.shape, name)
            assert torch.equal(one, two), name
        for name in ("wd_se", "wd_halves", "wd_without", "location", "low", "high"):
            one, two = getattr(result, name)[..., own], getattr(other, name)
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_sums_over_blocks() -> None:
    y = torch.randn(40, 7, generator=torch_rng(0, "sums")) + 2
    blocks = RowBlocks([(0, 11), (11, 11), (20, 40)], y.device)
    squares, (mean, std) = block_squares(y, blocks), moments_at_once(y, blocks)
    for number, (start, end) in enumerate(blocks.ends):
        own = y[start:end].double()
        torch.testing.assert_close(squares[number], own.square().sum(0), rtol=1e-6, atol=0)
        if end > start:
            torch.testing.assert_close(mean[number], own.mean(0), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(std[number], own.std(0, correction=0), rtol=1e-5, atol=1e-6)
            for one, two in zip(block_moments(y, blocks), (mean, std), strict=True):
                torch.testing.assert_close(one[number], two[number], rtol=1e-5, atol=1e-6)


def counted_plainly(rows: Tensor, location: Tensor, scale: Tensor, **state: Any) -> None:
    """Do what the kernel does, on a CPU."""
    n = rows.shape[1]
    for number, (start, end) in enumerate(state["blocks"].ends):
        own = slice(number * n, (number + 1) * n)
        if end == start:
            continue
        x = (rows[start:end].float() - location[own]) / scale[own]
        index = bins.signed_index(x).long()
        state["counts"][own] += torch.zeros(n, N_BINS, dtype=torch.int32).scatter_add_(
            1, index.T, torch.ones_like(index.T, dtype=torch.int32)
        )
        for k in range(4):
            state["powers"][k, own] += x.double().pow(k + 1).sum(0)
            if k < 2:
                state["group_powers"][k, own] += x.double().pow(k + 1).sum(0)
        state["low"][own] = state["low"][own].minimum(x.amin(0))
        state["high"][own] = state["high"][own].maximum(x.amax(0))


def closed_plainly(counts: Tensor, **state: Any) -> None:
    now = bins.fold_counts(counts, bins.GROUP_FOLD)
    state["group"] += now - state["closed"]
    state["closed"].copy_(now)


def test_the_way_of_a_gpu_keeps_books_as_each_sketch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, ends = torch_rng(0, "books"), [(0, 500), (500, 500), (500, 900)]
    alone = [OutputSketch(6, n_groups=3) for _ in ends]
    passes = [(group, torch.randn(900, 6, generator=rng)) for group in (0, 0, 2)]
    for group, y in passes:
        for one, (start, end) in zip(alone, ends, strict=True):
            one.update(y[start:end], group=group)
    expected = {number: alone[number].result() for number in (0, 2)}
    monkeypatch.setattr(kernels, "fits", lambda *_, **__: True)
    monkeypatch.setattr(sketches_module, "usable", lambda _tensor: True)
    monkeypatch.setattr(kernels, "add_outputs", counted_plainly)
    monkeypatch.setattr(kernels, "close_group", closed_plainly)
    sketches = OutputSketches(3, 6, n_groups=3)
    for group, y in passes:
        sketches.update(y, RowBlocks(ends, y.device), group=group)
    ((numbers, found, _used),) = sketches.result()
    assert numbers == [0, 2]
    for place, number in enumerate(numbers):
        own, other = slice(6 * place, 6 * place + 6), expected[number]
        counts = other.counts[:, found.first_bin : found.first_bin + found.counts.shape[1]]
        assert torch.equal(found.counts[own], counts)
        for name in ("wd_se", "wd_halves", "wd_without"):
            one, two = getattr(found, name)[..., own], getattr(other, name)
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(found.shape.wd[own], other.shape.wd, rtol=1e-5, atol=1e-7)


def test_totals_of_several_layers_are_each_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the jackknife on a GPU: moments of sets of groups, whose tokens differ by layer."""
    given: dict[str, Tensor] = {}

    def noted(_counts: Any, _chosen: Any, shift: Tensor, spread: Tensor, *_: Any, **__: Any) -> Any:
        given.update(shift=shift, spread=spread)
        return torch.zeros(3, *shift.shape, dtype=torch.float64)

    monkeypatch.setattr(bins, "binned_at_once", noted)
    x = torch.randn(3, 50, 4, generator=torch_rng(0, "totals"), dtype=torch.float64)
    tokens = torch.tensor([[50, 20], [0, 0], [30, 40]])  # groups, layers of two neurons
    powers = torch.zeros(3, 2, 4, dtype=torch.float64)
    for group in range(3):
        for layer in range(2):
            own = x[group, : tokens[group, layer], 2 * layer : 2 * layer + 2]
            powers[group, :, 2 * layer : 2 * layer + 2] = torch.stack([own.sum(0), (own**2).sum(0)])
    nothing = torch.zeros(3, 4, 192, dtype=torch.int32)
    bins.resampled(nothing, powers, tokens, torch.zeros(4), torch.zeros(4))
    assert len(given["shift"]) == 2  # each half is one group without the other
    for layer in range(2):  # without group 0, and without group 2
        for row, group in enumerate((2, 0)):
            own = x[group, : tokens[group, layer], 2 * layer : 2 * layer + 2]
            found = given["shift"][row, 2 * layer : 2 * layer + 2]
            torch.testing.assert_close(found, own.mean(0))


def test_neurons_to_compute_again_are_chosen_at_once_as_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = mixture("GptOss")
    for name, parameter in module.named_parameters():
        if "experts" in name and parameter.ndim == 2:
            parameter[:, ::7] += 6.0  # of a bias: their outputs are mostly rounding
    module = module.to(torch.bfloat16)
    alone = scored(module, layers=0, watch=lambda _seen: None)
    seen = list[int]()

    def decide(experts: FinerExperts, *given: Any) -> None:
        FinerExperts._decide_at_once(experts, *given)
        seen.append(sum(one.chosen.numel() for one in experts.each if one.is_decided))

    monkeypatch.setattr(FinerExperts, "_decide", decide)
    assert_same(scored(module, layers=0), alone)
    assert min(seen) > 0


def test_correlations_of_halves_at_once_are_those_of_each_layer() -> None:
    halves = torch.rand(2, 4, 50, dtype=torch.float64, generator=torch_rng(0, "halves"))
    halves[0, 1, 3] = torch.nan
    halves[1, 2, 7] = halves[1, 2, 8]
    at_once = layer_scores._correlations_on_gpu(halves)
    np.testing.assert_allclose(at_once, layer_scores.half_correlations(halves), rtol=1e-12)


def biased(name: str) -> Any:
    module: Any = mixture(name)
    for key, parameter in module.named_parameters():
        if "experts" in key and parameter.ndim == 2:
            parameter[:, ::7] += 6.0
    return module.to(torch.bfloat16)


def assert_same_up_to_rounding(one: NeuronScores, other: NeuronScores, *, mean: float) -> None:
    """WD within the error that both state, of rounding and of the histogram."""
    a, b = one.frame, other.frame
    for column in ("flag", "n_tokens"):
        assert a[column].equals(b[column])
    np.testing.assert_allclose(a["weight_norm"], b["weight_norm"], rtol=1e-5)
    np.testing.assert_array_less((a["wd"] - b["wd"]).abs(), a["wd_bound"] + b["wd_bound"])
    for column in ("mean", "std"):
        np.testing.assert_allclose(a[column], b[column], atol=mean, rtol=1e-4)


def test_a_bias_added_after_products_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.nn.functional.grouped_mm` has it on a GPU: bfloat16 outputs are rounded twice."""
    linear = Blocks.linear

    def twice(rows: Blocks, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = linear(rows, x, weight, None)
        return found if bias is None else found + bias[rows.numbers.clamp_max(len(bias) - 1)]

    module, given = biased("GptOss"), {"layers": 0}  # later inputs are rounded otherwise, too
    alone = scored(module, watch=lambda _seen: None, **given)
    monkeypatch.setattr(Blocks, "linear", twice)
    monkeypatch.setattr(FinerExperts, "_decide", FinerExperts._decide_at_once)
    at_once = scored(module, **given)
    assert not at_once.frame["wd"].equals(alone.frame["wd"])
    assert_same_up_to_rounding(at_once, alone, mean=3e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen2Moe"])
def test_experts_at_once_on_a_gpu_have_the_scores_of_each_alone(name: str) -> None:
    module = biased(name).to("cuda")
    given = {"layers": 0} if name == "GptOss" else {}  # has biases, which are rounded otherwise
    one, other = scored(module, **given), scored(module, watch=lambda _seen: None, **given)
    assert_same_up_to_rounding(one, other, mean=3e-3 if given else 1e-4)
    np.testing.assert_allclose(one.layers["split_half"], other.layers["split_half"], atol=0.05)
