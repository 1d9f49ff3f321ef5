"""Experts solved a few clusters at a time; the memory of a GPU is played by the parts' size."""

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from entangle.errors import NumericalError
from entangle.evaluation import EvaluationText
from entangle.experts import build, solver
from entangle.experts.expand import expand
from entangle.experts.router import Kind
from entangle.experts.solver import (
    ClusterTokens,
    Experts,
    ExpertSettings,
    clusters_at_once,
    prune_part,
    solve_experts,
    solve_in_parts,
)
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.pruning.factor import inverse_factor
from entangle.pruning.problem import _PART_BYTES
from entangle.recording import stream
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.seeding import torch_rng
from entangle.stats.gram import ClusterGrams
from entangle.texts.calibration_set import CalibrationSet

FEATURES = 12
SIZES = (90, 5, 0, 70, 1, 60)  # of clusters: three are short, one of them empty


def layer_of(weight: Tensor) -> Layer:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return Layer("mlp", 0, "mlp", module, transposed=False)


def make_layers(dtype: torch.dtype = torch.float32, features: int = FEATURES) -> list[Layer]:
    rng = torch_rng(0, "parts", "weights")
    return [layer_of(torch.randn(n, features, generator=rng).to(dtype)) for n in (7, 4)]


def make_tokens(sizes: Sequence[int] = SIZES, features: int = FEATURES) -> tuple[Tensor, Tensor]:
    """Return tokens and their clusters, mixed."""
    rng = torch_rng(0, "parts", "tokens")
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=rng)]
    tokens = torch.randn(len(labels), features, generator=rng) * torch.linspace(0.5, 2, features)
    return tokens + labels[:, None], labels


def stored(tokens: Tensor, *sizes: int) -> TokenStore:
    store = TokenStore(ByteBudget(2**30))
    for chunk in tokens.split(list(sizes) or len(tokens)):
        store.append(chunk)
    return store


def at_once(
    layers: Sequence[Layer], tokens: Tensor, labels: Tensor, settings: ExpertSettings, k: int
) -> list[Experts]:
    """Solve all clusters together, with all grams held."""
    grams = ClusterGrams(k, tokens.shape[1])
    grams.update(tokens, labels)
    return [solve_experts(layer, grams.result(), 0.5, settings) for layer in layers]


def in_parts(
    layers: Sequence[Layer], store: TokenStore, labels: Tensor, k: int, size: int,
    settings: ExpertSettings | None = None,
) -> list[Experts]:  # fmt: skip
    shares = [0.5] * len(layers)
    return solve_in_parts(
        layers, store, labels, shares, settings or ExpertSettings(), k=k, size=size
    )


def assert_same(found: Sequence[Experts], expected: Sequence[Experts]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(one.weight == 0, other.weight == 0)
        torch.testing.assert_close(one.squared_error, other.squared_error, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.damping, other.damping)
        assert one.energy == pytest.approx(other.energy, rel=1e-5)
        assert torch.equal(one.tokens, other.tokens)
        assert one.realised_sparsity == other.realised_sparsity
        assert one.shrunk == other.shrunk


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_parts_give_what_all_clusters_together_give(size: int, n_layers: int) -> None:
    layers, (tokens, labels) = make_layers()[:n_layers], make_tokens()
    found = in_parts(layers, stored(tokens, 100, 1, 125), labels, len(SIZES), size)
    expected = at_once(layers, tokens, labels, ExpertSettings(), len(SIZES))
    assert_same(found, expected)
    assert [experts.shrunk for experts in found] == [3] * n_layers
    assert all(experts.squared_error[2] == 0 for experts in found)


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize(
    "settings",
    [
        ExpertSettings(pattern="block"),
        ExpertSettings(pattern="layer"),
        ExpertSettings(pruner="wanda"),
        ExpertSettings(pruner="magnitude"),
        ExpertSettings(pruner="random", seed=3),
        ExpertSettings(bits=4),
    ],
    ids=str,
)
def test_whatever_the_pruner(settings: ExpertSettings, size: int) -> None:
    layers, (tokens, labels) = make_layers(torch.bfloat16), make_tokens()
    found = in_parts(layers, stored(tokens), labels, len(SIZES), size, settings)
    assert_same(found, at_once(layers, tokens, labels, settings, len(SIZES)))


def test_one_cluster() -> None:
    layers, (tokens, labels) = make_layers(), make_tokens([200])
    found = in_parts(layers, stored(tokens, 150, 50), labels, 1, 1)
    assert_same(found, at_once(layers, tokens, labels, ExpertSettings(), 1))


def test_weights_of_float64_are_solved_in_float64() -> None:
    layers, (tokens, labels) = make_layers(torch.float64), make_tokens()
    found = in_parts(layers, stored(tokens), labels, len(SIZES), 2)
    assert found[0].weight.dtype == torch.float64
    assert_same(found, at_once(layers, tokens, labels, ExpertSettings(), len(SIZES)))


def test_grams_are_factorised_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def counted(gram: Tensor, *, damping: float, first: int) -> object:
        calls.append(first)
        return inverse_factor(gram, damping=damping, first=first)

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr(solver, "inverse_factor", counted)
    layers, (tokens, labels) = make_layers(), make_tokens()
    with monkeypatch.context() as patched:
        patched.setattr("entangle.pruning.solver.inverse_factor", never)
        in_parts(layers, stored(tokens), labels, len(SIZES), 4)
        assert calls == [0, 4]
        in_parts(layers[:1], stored(tokens), labels, len(SIZES), 3)
        assert calls == [0, 4, 0, 3]
        in_parts(layers, stored(tokens), labels, len(SIZES), 4, ExpertSettings(pruner="wanda"))
    in_parts(make_layers(torch.float64), stored(tokens), labels, len(SIZES), 4)
    assert calls == [0, 4, 0, 3]


@pytest.mark.parametrize("most", [1, 2, 4])
def test_parts_are_halved_until_they_fit(
    most: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = list[int]()

    def limited(*args: object, experts: int, **kwargs: object) -> object:
        tried.append(experts)
        if experts > most:
            raise torch.OutOfMemoryError("no room")
        return prune_part(*args, experts=experts, **kwargs)  # type: ignore[arg-type]

    layers, (tokens, labels) = make_layers(), make_tokens()
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
        patched.setattr(solver, "prune_part", limited)
        found = in_parts(layers, stored(tokens), labels, len(SIZES), len(SIZES))
    assert_same(found, at_once(layers, tokens, labels, ExpertSettings(), len(SIZES)))
    assert tried[0] == 6
    assert max(tried[-2:]) <= most
    assert "GPU memory ran out: solving 3 of 6 experts at a time" in caplog.text


@pytest.mark.parametrize("where", ["prune_part", "squared_errors"])
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
def test_parts_that_were_half_written_are_solved_again(
    pruner: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out with the second layer, when the first one's experts have been put away."""
    calls, work = list[int](), getattr(solver, where)

    def limited(*args: object, **kwargs: object) -> object:
        calls.append(len(calls))
        if len(calls) in (2, 6):
            raise torch.OutOfMemoryError("no room")
        return work(*args, **kwargs)

    monkeypatch.setattr(solver, where, limited)
    layers, (tokens, labels) = make_layers(), make_tokens()
    settings = ExpertSettings(pruner=pruner)
    found = in_parts(layers, stored(tokens), labels, len(SIZES), 4, settings)
    assert_same(found, at_once(layers, tokens, labels, settings, len(SIZES)))
    assert len(calls) > 6


@pytest.mark.parametrize(
    ("settings", "dtype", "held"),
    [
        (ExpertSettings(), torch.float32, False),
        (ExpertSettings(pattern="2:4"), torch.bfloat16, False),
        (ExpertSettings(), torch.float64, True),
        (ExpertSettings(pruner="wanda"), torch.float32, True),
    ],
    ids=str,
)
def test_grams_are_held_only_for_those_who_need_them(
    settings: ExpertSettings, dtype: torch.dtype, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bool]()

    def watched(weight: Tensor, gram: Tensor | None, *args: object, **kwargs: object) -> object:
        seen.append(gram is not None)
        return prune_part(weight, gram, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(solver, "prune_part", watched)
    layers, (tokens, labels) = make_layers(dtype), make_tokens()
    in_parts(layers, stored(tokens), labels, len(SIZES), 4, settings)
    assert seen == [held] * 4


def test_grams_that_overflow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of many batches may, each of which is finite."""
    summed = ClusterTokens.grams

    def overflowing(self: ClusterTokens, clusters: Sequence[int], device: torch.device) -> Tensor:
        return summed(self, clusters, device).fill_(torch.inf)

    monkeypatch.setattr(ClusterTokens, "grams", overflowing)
    tokens, labels = make_tokens()
    with pytest.raises(NumericalError, match="NaN"):
        in_parts(make_layers(), stored(tokens), labels, len(SIZES), 2)


def test_one_cluster_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(solver, "prune_part", full)
    tokens, labels = make_tokens()
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(make_layers(), stored(tokens), labels, len(SIZES), 2)


def test_tokens_that_are_not_finite_are_refused() -> None:
    tokens, labels = make_tokens()
    tokens[7, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"\b1\b.*NaN"):
        in_parts(make_layers(), stored(tokens), labels, len(SIZES), 2)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
@pytest.mark.parametrize("chunks", [(226,), (1, 1, 224), (100, 26, 50, 50)])
def test_tokens_come_cluster_by_cluster_in_order(
    batch: int, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "_GRAM_TOKENS", batch)
    tokens, labels = make_tokens()
    found = ClusterTokens(stored(tokens.bfloat16(), *chunks), labels, len(SIZES))
    assert found.count.tolist() == list(SIZES)
    for cluster, size in enumerate(SIZES):
        batches = [rows.clone() for rows in found.batches(cluster)]
        assert [len(rows) for rows in batches[:-1]] == [batch] * (max(1, -(-size // batch)) - 1)
        own = torch.cat([tokens[:0].bfloat16(), *batches])
        assert torch.equal(own, tokens[labels == cluster].bfloat16())


def _meta_layers(*shapes: tuple[int, int]) -> list[Layer]:
    return [layer_of(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in shapes]


def test_size_of_the_parts_of_a_7b_block() -> None:
    # 2**18 tokens. Gate and up: inputs 2.15 GB, experts 2.89 GB, a third is 1.68 GB. A cluster has
    # a factor of 67 MB and 1.75 times 180 MB: 4.4 clusters. Down: inputs 5.77 GB, experts 1.44 GB,
    # a third is 2.40 GB; 2⅓ grams of 485 MB: 2.1 clusters.
    first, second = _meta_layers((11008, 4096), (11008, 4096)), _meta_layers((4096, 11008))
    settings = ExpertSettings(pattern="block")
    tokens = 2 * 2**18
    assert clusters_at_once(first, tokens * 4096, settings, 16) == 4
    assert clusters_at_once(second, tokens * 11008, settings, 16) == 2
    assert clusters_at_once(first, tokens * 4096, ExpertSettings(pattern="2:4"), 16) == 1


def test_small_layers_are_solved_in_one_part() -> None:
    for shape in ((1536, 576), (576, 1536)):
        for settings in (ExpertSettings(), ExpertSettings(bits=4)):
            assert clusters_at_once(_meta_layers(shape), 2**20, settings, 16) == 16


def test_parts_are_of_about_one_size() -> None:
    layers = _meta_layers((4096, 11008))  # of one cluster 1.13 GB, so that 11 of 16 have room
    assert clusters_at_once(layers, 35 * 10**9, ExpertSettings(), 16) == 8
    assert clusters_at_once(layers, 0, ExpertSettings(), 16) == 1


@pytest.mark.parametrize("router", ["kmeans", "random"])
@pytest.mark.parametrize("experts", [1, 5])
def test_a_model_is_expanded_alike_both_ways(
    tiny: Callable[[str], LanguageModel],
    calibration: CalibrationSet,
    text: EvaluationText,
    monkeypatch: pytest.MonkeyPatch,
    router: Kind,
    experts: int,
) -> None:
    def run() -> tuple[list[float], float]:
        found = expand(
            tiny("llama"), calibration, experts=experts, sparsity=0.5, router=router, restarts=2,
            layers=[0], evaluation=text, progress=False,
        )  # fmt: skip
        assert found.perplexity is not None
        return found.layers["relative_error"].to_list(), found.perplexity.value

    expected = run()
    monkeypatch.setattr(build, "_lies_on_gpu", lambda _store: True)
    monkeypatch.setattr(solver, "clusters_at_once", lambda *_: 2)
    errors, value = run()
    assert errors == pytest.approx(expected[0], rel=1e-3)
    assert value == pytest.approx(expected[1], rel=1e-3 if router == "kmeans" else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [1, 3, 6])
def test_on_a_gpu_as_on_the_cpu(size: int) -> None:
    sizes, features = (900, 50, 0, 700, 10, 600), 200
    tokens, labels = make_tokens(sizes, features)
    tokens = tokens.bfloat16()
    layers = make_layers(torch.bfloat16, features)
    expected = at_once(layers, tokens.float(), labels, ExpertSettings(), len(sizes))
    there = [layer_of(layer.weight.cuda()) for layer in layers]
    found = in_parts(there, stored(tokens.cuda(), 1000, 1260), labels.cuda(), len(sizes), size)
    for one, other in zip(found, expected, strict=True):
        assert ((one.weight.cpu() == 0) == (other.weight == 0)).double().mean() > 0.99
        torch.testing.assert_close(
            one.squared_error.cpu(), other.squared_error, rtol=0.02, atol=1e-3
        )
        assert one.energy == pytest.approx(other.energy, rel=1e-4)
        assert one.tokens.tolist() == list(sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "features", "n_layers"), [(8192, 2048, 2), (1024, 4096, 1)])
def test_a_gpu_holds_what_was_reckoned(rows: int, features: int, n_layers: int) -> None:
    rng = torch.Generator("cuda").manual_seed(0)
    k, size = 8, 4
    tokens = torch.randn(k * 5000, features, device="cuda", generator=rng).bfloat16()
    weights = [
        torch.randn(rows, features, device="cuda", generator=rng).bfloat16()
        for _ in range(n_layers)
    ]
    labels = torch.arange(len(tokens), device="cuda") % k
    layers, settings = [layer_of(weight) for weight in weights], ExpertSettings(pattern="block")
    store = stored(tokens)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    in_parts(layers, store, labels, k, size, settings)
    taken = torch.cuda.max_memory_allocated() - before
    experts = k * sum(2 * weight.numel() for weight in weights)
    once = 4 * 4 * weights[0].numel()  # float32 copies of one expert's rows
    errors = 2 * _PART_BYTES  # two parts of some experts' changes
    assert taken <= size * solver._bytes_a_cluster(weights, settings) + experts + once + errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_runs_out_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    """Eight grams of 4,096 inputs and their factor are 1.07 GB, four are half of that."""
    rng = torch.Generator("cuda").manual_seed(0)
    k, features = 8, 4096
    tokens = torch.randn(k * 5000, features, device="cuda", generator=rng).bfloat16()
    layer = layer_of(torch.randn(1024, features, device="cuda", generator=rng).bfloat16())
    labels, store = torch.arange(len(tokens), device="cuda") % k, stored(tokens)
    (expected,) = in_parts([layer], store, labels, k, 1)
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved() + 10**9
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.mem_get_info()[1])
    try:
        with caplog.at_level(logging.WARNING):
            (found,) = in_parts([layer], store, labels, k, k)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "GPU memory ran out: solving 4 of 8 experts at a time" in caplog.text
    assert ((found.weight == 0) == (expected.weight == 0)).double().mean() > 0.999
    torch.testing.assert_close(found.squared_error, expected.squared_error, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows_in_memory", [0, 100, 150])
@pytest.mark.parametrize("size", [1, 4])
def test_rows_in_ram_beside_a_gpu_give_the_same_bits(
    rows_in_memory: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played on the CPU: the rows that a budget does not hold lie elsewhere, in other chunks."""
    layers, (tokens, labels) = make_layers(), make_tokens()
    monkeypatch.setattr(solver, "_GRAM_TOKENS", 32)
    whole = in_parts(layers, stored(tokens), labels, len(SIZES), size)
    monkeypatch.setattr(stream, "_is_far", lambda _rows: True)
    with TokenStore(ByteBudget(rows_in_memory * 4 * FEATURES)) as store:
        for chunk in tokens.split(50):
            store.append(chunk)
        assert not store.in_memory
        assert not store.in_file
        found = in_parts(layers, store, labels, len(SIZES), size)
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.squared_error, other.squared_error)
