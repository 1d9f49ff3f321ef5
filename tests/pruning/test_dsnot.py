"""DSnoT against a slow reference, by hand, and at its edges."""

import pytest
import torch
from torch import Tensor

import entangle
from entangle.errors import EntangleError, InvalidInput
from entangle.experts.dsnot import prune_dsnot
from entangle.pruning import prune
from entangle.pruning.dsnot import InputStatistics, dsnot
from entangle.results.comparison import flops_saved
from tests.tiny_models import TINY


def statistics(x: Tensor) -> InputStatistics:
    found = InputStatistics.empty(x.shape[-1], torch.device("cpu"))
    for part in x.split(1):
        found.update(part)
    return found


def sizes(x: Tensor) -> tuple[list[float], list[float]]:
    """Return sums over a sequence, and Euclidean norms, of what a column is given."""
    m, squares = (one.sum((0, 1)) / len(x) for one in (x.double(), x.double().square()))
    return m.tolist(), squares.sqrt().tolist()


def begun(
    w: Tensor, s: Tensor, x: Tensor
) -> tuple[list[float], list[float], float, list[int]]:  # fmt: skip
    """Return a row dense and sparse, its error, and what may grow, by mean over variance."""
    m, v = sizes(x)[0], x.double().var(1, correction=0).mean(0).tolist()
    dense, sparse = w.double().tolist(), s.double().tolist()
    places = range(len(dense))
    error = sum((dense[j] - sparse[j]) * m[j] for j in places)
    grow = sorted((j for j in places if sparse[j] == 0), key=lambda j: dense[j] * m[j] / v[j])
    return dense, sparse, error, grow


def reference(w: Tensor, s: Tensor, x: Tensor, cycles: int = 50, limit: float = 0.1) -> Tensor:
    """Row by row, in lists."""
    found, m, a = s.clone(), *sizes(x)
    for row in range(len(w)):
        dense, sparse, error, grow = begun(w[row], s[row], x)
        kept = sorted(
            (j for j in range(len(sparse)) if sparse[j]), key=lambda j: abs(sparse[j]) * a[j]
        )
        signed = {sign: [j for j in kept if sparse[j] * m[j] * sign > 0] for sign in (-1, 1)}
        for _ in range(cycles):
            candidates = signed[-1] if error > 0 else signed[1]
            if abs(error) <= limit * x.shape[1] / 2048 or not grow or not candidates:
                break
            g = grow.pop() if error > 0 else grow.pop(0)
            d = candidates.pop(0)
            error += sparse[d] * m[d] - dense[g] * m[g]
            found[row, g], found[row, d] = w[row, g], 0
    return found


@pytest.mark.parametrize("seed", range(4))
def test_as_the_reference(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    w, shift = torch.randn(9, 40, generator=rng), torch.randn(40, generator=rng)
    x = torch.randn(3, 64, 40, generator=rng) + 0.3 * shift
    flat = x.flatten(0, 1)
    method = ("wanda", "sparsegpt")[seed % 2]
    s = prune(w, flat.T @ flat, method=method, sparsity=0.6).weight
    kept = w.clone(), s.clone()
    found = dsnot(w, s, statistics(x))
    assert torch.equal(found, reference(w, s, x))
    assert ((found == 0).sum(1) == (s == 0).sum(1)).all()
    assert torch.equal(w, kept[0])
    assert torch.equal(s, kept[1])


def in_groups(w: Tensor, s: Tensor, x: Tensor, group: int) -> Tensor:
    """Row by row: what goes is of the group of what grows, and the error keeps its sign."""
    found, m, a = s.clone(), *sizes(x)
    for row in range(len(w)):
        dense, sparse, error, grow = begun(w[row], s[row], x)
        left = {j for j in range(len(sparse)) if sparse[j]}
        for _ in range(50):
            if abs(error) <= 0.1 * x.shape[1] / 2048 or not grow:
                break
            g = grow.pop() if error > 0 else grow.pop(0)
            here = sorted(left & {*range(g - g % group, g - g % group + group)},
                          key=lambda j: abs(sparse[j]) * a[j])  # fmt: skip
            if not here:
                continue
            after = error + sparse[here[0]] * m[here[0]] - dense[g] * m[g]
            if after * error <= 0:
                break
            error = after
            left.remove(here[0])
            found[row, g], found[row, here[0]] = w[row, g], 0
    return found


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
def test_groups_keep_their_zeros_as_the_reference(pattern: str) -> None:
    rng = torch.Generator().manual_seed(3)
    w, shift = torch.randn(9, 42, generator=rng), torch.randn(42, generator=rng)
    x = torch.randn(3, 64, 42, generator=rng) + 0.3 * shift
    flat, group = x.flatten(0, 1), int(pattern[-1])
    s = prune(w, flat.T @ flat, method="wanda", pattern=pattern).weight
    found = dsnot(w, s, statistics(x), group=group)
    assert torch.equal(found, in_groups(w, s, x, group))
    assert not torch.equal(found, s)
    for a, b in zip(found.split(group, 1), s.split(group, 1), strict=True):
        assert torch.equal((a == 0).sum(1), (b == 0).sum(1))


def test_a_model_keeps_n_of_m() -> None:
    ids = torch.randint(4, 112, (4, 16), generator=torch.Generator().manual_seed(0))
    found = prune_dsnot(TINY["qwen3"](), ids, pattern="2:4")
    up = dict(found.module.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    assert ((up.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
    with pytest.raises(EntangleError):
        prune_dsnot(TINY["qwen3"](), ids, pattern="5:4")
    with pytest.raises(EntangleError):
        prune_dsnot(TINY["qwen3"](), ids, pruner="none")


def test_lengths_are_averaged_over_sequences() -> None:
    found = statistics(torch.randn(3, 8, 4))
    found.update(torch.randn(1, 16, 4))
    assert (found.sequences, found.length) == (4, 10.0)


def test_one_swap_by_hand() -> None:
    w, s = torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([[0.0, 1.0, -2.0]])
    x = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]])  # sums of 3: the error is 9
    assert dsnot(w, s, statistics(x)).tolist() == [[3.0, 1.0, 0.0]]
    assert torch.equal(dsnot(w, s, statistics(x), cycles=0), s)
    assert torch.equal(dsnot(w, s, statistics(x), threshold=1e6), s)


def test_a_sign_that_is_kept_stops_a_swap() -> None:
    w, s = torch.tensor([[3.0, 1.0, -9.0]]), torch.tensor([[0.0, 1.0, -9.0]])
    x = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]])
    assert not torch.equal(dsnot(w, s, statistics(x)), s)
    assert torch.equal(dsnot(w, s, statistics(x), keep_sign=True), s)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInput):
        dsnot(torch.ones(2, 3), torch.ones(2, 3), InputStatistics.empty(3, torch.device("cpu")))


def test_a_model_is_pruned_block_by_block() -> None:
    model = TINY["llama"]()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(4, 112, (4, 16), generator=torch.Generator().manual_seed(0))
    found = prune_dsnot(model, ids, pruner="magnitude", sparsity=0.5)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    for name, p in found.module.named_parameters():
        zeros = int((p == 0).sum())
        assert zeros == (p.numel() // 2 if ".mlp." in name and p.ndim == 2 else 0)


def test_it_costs_in_a_comparison_what_the_pruner_alone_costs() -> None:
    ids = torch.randint(4, 112, (4, 16), generator=torch.Generator().manual_seed(0))
    methods = ["wanda", "dsnot:wanda", "teal", "griffin"]
    found = entangle.compare(TINY["llama"](), ids, ids, methods, sparsity=0.5, progress=False)
    rows = found.frame.set_index("method")
    for cost in ("flops", "nonzeros", "bytes", "density"):
        assert rows[cost]["dsnot:wanda"] == pytest.approx(rows[cost]["wanda"], rel=1e-6)
    assert rows["density"]["teal"] == pytest.approx(0.5, abs=0.03)
    assert rows["perplexity"].isna()["griffin"]  # no prefix to choose from
    saved = flops_saved(found, at=(0.05,), resamples=20).set_index("method")
    assert set(saved.index) == {"wanda", "dsnot:wanda", "teal"}
    assert ((saved["saved"] >= 0) & (saved["saved"] <= 1)).all()


def test_an_allocation_out_of_scope_has_no_density_and_nothing_finite_saves_nothing() -> None:
    ids = torch.randint(4, 112, (4, 16), generator=torch.Generator().manual_seed(0))
    model = TINY["llama"]()
    scores = entangle.score(model, ids, layers=[1], proj="attn", md=False, progress=False)
    given = entangle.allocate(scores, sparsity=0.5, rule="linear", model=model)
    found = entangle.compare(model, ids, ids, ["wanda"], allocations=("own", given), progress=False)
    assert found.frame["density"].tolist()[0] == 1
    assert found.frame["density"].isna().tolist()[1:] == [True, True]
    none = entangle.compare(model, ids, ids, ["griffin"], sparsity=0.5, progress=False)
    assert none.frame["perplexity"].isna().tolist() == [False, True]
    assert flops_saved(none).empty
    mixture = entangle.compare(TINY["mixtral"](), ids, ids, ["dsnot:wanda"], sparsity=0.5,
                               progress=False)  # fmt: skip
    assert mixture.frame["perplexity"].isna().tolist() == [False, True]
    assert "saved" in flops_saved(none)
