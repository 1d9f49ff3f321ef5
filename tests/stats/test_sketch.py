import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.stats import sketch
from entangle.stats.edges import HALF
from entangle.stats.sketch import OutputSketch
from entangle.stats.wasserstein import shape_statistics
from tests.reference.wasserstein import exact_wd
from tests.stats.outputs import MOMENTS, ROUGH, SMOOTH, assert_same, columns, grouped, sketched

# --- against the exact statistics ---------------------------------------------------------------


@pytest.mark.parametrize("n", [20_000, 100_000])
def test_smooth_distributions_are_within_a_thousandth(n: int) -> None:
    y = columns(SMOOTH, n)
    exact, found = shape_statistics(y.T), sketched(y)
    error = (found.shape.wd - exact.wd).abs()
    assert (error < 1e-3).all(), error
    assert (error <= found.wd_bound).all()
    assert (found.wd_bound < 0.03).all()
    assert (found.shape.ks - exact.ks).abs().max() < 0.01


def test_moments_agree_with_the_exact_ones() -> None:
    y = columns(SMOOTH, 100_000)
    exact, found = shape_statistics(y.T), sketched(y, chunk=30_000).shape
    torch.testing.assert_close(found.std, exact.std, rtol=1e-6, atol=0)
    assert ((found.mean - exact.mean).abs() < 1e-6 * exact.std).all()
    for name in ("skewness", "excess_kurtosis"):
        torch.testing.assert_close(
            getattr(found, name), getattr(exact, name), rtol=1e-6, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("chunk", [700, 20_000])
def test_any_distribution_is_within_the_bound(chunk: int) -> None:
    y = columns(ROUGH, 20_000)
    exact, found = shape_statistics(y.T), sketched(y, chunk=chunk)
    assert not found.shape.constant.any()
    error = (found.shape.wd - exact.wd).abs()
    assert (error <= found.wd_bound + 1e-6).all(), (list(ROUGH), error, found.wd_bound)


@settings(deadline=None, max_examples=60)
@example(atoms=[1.1920929e-07, 183566.0], weights=[300, 204] + 4 * [1], noise=0.0, shuffled=False)
@given(
    atoms=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6),
    weights=st.lists(st.integers(1, 400), min_size=6, max_size=6),
    noise=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    shuffled=st.booleans(),
)
def test_bound_by_hypothesis(
    atoms: list[float], weights: list[int], noise: float, shuffled: bool
) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.array(atoms), weights[: len(atoms)])
    y = y + noise * rng.standard_normal(len(y))
    y = (rng.permutation(y) if shuffled else y).astype(np.float32).astype(np.float64)
    assume(y.std() > max(1e-5 * np.abs(y).max(), 1e-15))
    found = sketched(torch.from_numpy(y).float()[:, None], chunk=300)
    assert abs(found.shape.wd.item() - exact_wd(y)) <= found.wd_bound.item() + 1e-5


@settings(deadline=None, max_examples=30)
@given(a=st.floats(0.01, 100), sign=st.sampled_from([-1, 1]), b=st.floats(-10, 10))
def test_wd_is_unchanged_by_an_affine_map(a: float, sign: int, b: float) -> None:
    y = columns({k: SMOOTH[k] for k in ("normal", "t3", "bimodal")}, 3000)
    one, two = sketched(y), sketched(sign * a * y + b)
    assert ((one.shape.wd - two.shape.wd).abs() < 1e-3).all()
    torch.testing.assert_close(a * one.shape.std, two.shape.std, rtol=1e-5, atol=0)


def test_hand_worked_counts() -> None:
    # Nine tokens 0…8: median 4, quartiles at positions 2 and 6, so the unit is 4/1.349 = 2.9652.
    # Token 8 is at x = 4/2.9652 = 1.349, in (1, 3): bin 64 + ⌊(2.349 / 2 − 1)·64⌋ = 75 from the
    # centre; token 5 at 0.33724: bin ⌊0.33724·64⌋ = 21. Four neighbours are one in the result:
    # 0, 21, 43, 64, 75 are in 0, 5, 10, 16, 18 and −76, −65, −44, −22 in −19, −17, −11, −6.
    found = sketched(torch.arange(9.0)[:, None])
    assert found.location.tolist() == [4.0]
    assert found.scale.tolist() == pytest.approx([4 / 1.3489795])
    full = found.counts[0].nonzero()[:, 0] - HALF // 4
    assert full.tolist() == [-19, -17, -11, -6, 0, 5, 10, 16, 18]
    assert (found.low.item(), found.high.item()) == pytest.approx((0.0, 8.0), abs=1e-6)
    assert found.n_tokens == 9
    assert found.shape.mean.item() == pytest.approx(4.0)
    assert found.shape.std.item() == pytest.approx(math.sqrt(60 / 9), rel=1e-6)
    assert found.wd_se.isnan().all()  # one group only
    assert found.wd_halves.isnan().all()


# --- additivity ---------------------------------------------------------------------------------


def test_merge_is_both_at_once() -> None:
    y = columns(SMOOTH | ROUGH, 9000)
    first, rest = y[:3000], y[3000:]
    whole, one = (grouped(first, [0, 1, 2]) for _ in range(2))
    two, three = one.fork(), one.fork()
    for i, part in enumerate(rest.split(1000)):
        whole.update(part, group=i % 5)
        (two if i % 2 else three).update(part, group=i % 5)
    two.merge(three)
    one.merge(two)
    assert_same(one.result(), whole.result(), tol=1e-9)


def test_merge_goes_on_after_it_and_leaves_the_other_alone() -> None:
    y = columns(SMOOTH, 4000)
    whole, one = grouped(y[:2000], [0, 1]), grouped(y[:1000], [0])
    two = one.fork()
    two.update(y[1000:2000], group=1)
    before = two.result()
    one.merge(two)
    assert_same(two.result(), before, tol=0)
    for made in (one, whole):
        made.update(y[2000:3000], group=2)
        made.update(y[3000:], group=0)
    assert_same(one.result(), whole.result(), tol=1e-9)


def test_merging_an_empty_fork_changes_nothing() -> None:
    made = grouped(columns(SMOOTH, 2000), [0, 3])
    before = made.result()
    made.merge(made.fork())
    assert_same(made.result(), before, tol=0)


def test_chunk_size_does_not_matter() -> None:
    y = columns(SMOOTH | ROUGH, 8192)
    results = []
    for chunk in (8192, 1024, 177):
        made = OutputSketch(y.shape[1])
        made.update(y[:512])
        for part in y[512:].split(chunk):
            made.update(part)
        results.append(made.result())
    assert_same(results[0], results[1], tol=2e-6)
    assert_same(results[0], results[2], tol=2e-6)


def test_order_of_batches_does_not_matter() -> None:
    y = columns(SMOOTH, 8000)
    order = [(i, i % 4) for i in range(1, 8)]
    results = []
    for ordered in (order, order[::-1], sorted(order, key=lambda pair: pair[1])):
        made = OutputSketch(y.shape[1], n_groups=4)
        made.update(y[:1000])
        for i, group in ordered:
            made.update(y[1000 * i : 1000 * (i + 1)], group=group)
        results.append(made.result())
    assert_same(results[0], results[1], tol=1e-10)
    assert_same(results[0], results[2], tol=1e-10)


def test_blocks_of_neurons_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    y = columns(SMOOTH | ROUGH, 2000)
    whole = grouped(y, [0, 1, 0, 2]).result()
    monkeypatch.setattr(sketch, "_block_columns", lambda outputs: 2)
    assert_same(grouped(y, [0, 1, 0, 2]).result(), whole, tol=2e-6)
    alone = grouped(y[:, 2:3].contiguous(), [0, 1, 0, 2]).result()
    assert torch.equal(alone.counts[0], whole.counts[2])
    assert alone.shape.wd[0].item() == pytest.approx(whole.shape.wd[2].item(), abs=1e-6)


def test_inputs_and_earlier_results_stay() -> None:
    y = columns(SMOOTH, 2000)
    kept = y.clone()
    made = grouped(y, [0, 1])
    result = made.result()
    copy = {name: getattr(result, name).clone() for name in ("counts", "low", "wd_halves")}
    flags = result.shape.nan.clone()
    made.update(torch.full_like(y, math.nan), group=1)
    assert torch.equal(y, kept)
    assert all(torch.equal(value, getattr(result, name)) for name, value in copy.items())
    assert torch.equal(result.shape.nan, flags)
    assert made.result().shape.nan.all()
    assert int(made.result().counts.sum()) == 2 * int(copy["counts"].sum())
    other = made.fork()
    other.merge(made)
    assert int(made.result().counts.sum()) == 2 * int(copy["counts"].sum())


def test_asking_for_the_result_changes_nothing() -> None:
    y = columns(SMOOTH, 3000)
    asked, silent = OutputSketch(y.shape[1]), OutputSketch(y.shape[1])
    for i, part in enumerate(y.split(500)):
        asked.update(part, group=i % 3)
        silent.update(part, group=i % 3)
        asked.result()
    assert_same(asked.result(), silent.result(), tol=0)


def test_memory_is_independent_of_the_number_of_tokens() -> None:
    y = columns(SMOOTH, 1000)
    made = grouped(y, [0, 1])

    def size() -> int:
        return sum(v.nbytes for v in vars(made).values() if isinstance(v, Tensor))

    before = size()
    for i in range(10):
        made.update(y, group=i % 8)
    made.result()
    assert size() == before > 0
    assert made.n_tokens == 11_000


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["pilot", "later"])
def test_constant_nan_and_infinity_are_flagged_and_stay_in_their_neuron(when: str) -> None:
    y = torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 8))).float()
    token = 0 if when == "pilot" else 1500
    y[token, 0] = math.nan
    y[token, 1] = math.inf
    y[token, 2] = -math.inf
    y[token, 3], y[token + 1, 3] = math.inf, math.nan
    y[:, 4], y[:, 5], y[:, 6] = 0.0, 0.1, -1e8
    found = grouped(y, [0, 1, 2, 3]).result()
    assert found.shape.nan.tolist() == [True, False, False, True, False, False, False, False]
    assert found.shape.inf.tolist() == [False, True, True, False, False, False, False, False]
    assert found.shape.constant.tolist() == [False] * 4 + [True] * 3 + [False]
    for name in ("wd", "ks", *MOMENTS):
        assert getattr(found.shape, name)[:7].isnan().all(), name
    for name in ("wd_bound", "wd_se", "wd_halves"):
        assert getattr(found, name)[..., :7].isnan().all(), name
        assert getattr(found, name)[..., 7].isfinite().all(), name
    assert found.wd_without.isfinite().tolist() == [[False] * 7 + [True]] * 4 + [[False] * 8] * 4
    assert found.shape.wd[7].item() == pytest.approx(exact_wd(y[:, 7].double().numpy()), abs=1e-3)


def test_all_nan_and_one_token() -> None:
    assert sketched(torch.full((5, 2), math.nan)).shape.nan.all()
    single = sketched(torch.tensor([[1.5, -2.0]]))
    assert single.shape.constant.all()
    assert single.n_tokens == 1
    assert single.low.tolist() == single.high.tolist() == [1.5, -2.0]


def test_few_tokens() -> None:
    y = torch.tensor([[-1.0], [1.0]])
    found = sketched(y)
    assert found.shape.wd.item() == pytest.approx(0.5353773, abs=found.wd_bound.item())
    assert found.shape.std.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type(dtype: torch.dtype) -> None:
    y = columns({k: SMOOTH[k] for k in ("normal", "t3", "bimodal")}, 2000).to(dtype)
    assert_same(sketched(y), sketched(y.float()), tol=1e-6)


@pytest.mark.parametrize("unit", [1e-27, 1e25])
def test_an_atom_and_a_few_values_far_from_one(unit: float) -> None:
    y = (columns({"normal": SMOOTH["normal"]}, 1000) * unit).clone()
    y[torch.arange(1000) % 5 != 0] = 0.0  # so that the quartiles are equal
    found = sketched(y)
    exact = shape_statistics(y.T)
    assert not found.shape.constant.any()
    assert ((found.shape.wd - exact.wd).abs() <= found.wd_bound).all()
    torch.testing.assert_close(found.shape.std, exact.std, rtol=1e-5, atol=0)


def test_fourth_powers_beyond_float32() -> None:
    y = torch.ones(2000, 1)  # a constant pilot: the unit is the rounding of 1
    y[1500:] = 1e4 * torch.arange(500.0)[:, None]
    found, exact = sketched(y).shape, shape_statistics(y.T)
    assert not found.inf.any()
    for name in MOMENTS:
        torch.testing.assert_close(
            getattr(found, name), getattr(exact, name), rtol=1e-5, atol=0, msg=name
        )


def test_denormal_outputs_do_not_break() -> None:
    y = columns({"normal": SMOOTH["normal"]}, 2000) * 1e-41
    found = sketched(y)
    assert not found.shape.nan.any()
    assert not found.shape.inf.any()
    exact = shape_statistics(y.T).wd
    assert ((found.shape.wd - exact).abs() <= found.wd_bound).all() or found.shape.constant.all()


def test_no_tokens_in_a_batch() -> None:
    y = columns(SMOOTH, 1000)
    made = OutputSketch(y.shape[1])
    made.update(y[:0])
    made.update(y)
    made.update(y[:0], group=5)
    assert_same(made.result(), grouped(y, [0]).result(), tol=0)


def test_gradients_are_not_kept() -> None:
    made = OutputSketch(2)
    made.update(torch.arange(20.0, requires_grad=True).view(10, 2) * 2)
    assert not made.result().shape.wd.requires_grad


def test_errors() -> None:
    y = torch.arange(20.0).view(10, 2)
    with pytest.raises(InvalidInput, match=r"n_neurons.*\b1\b.*\b0\b.*\b8\b"):
        OutputSketch(0)
    with pytest.raises(InvalidInput, match=r"n_neurons.*\b1\b.*\b3\b.*\b0\b"):
        OutputSketch(3, n_groups=0)
    with pytest.raises(InvalidInput, match=r"`outputs`.*columns.*\b2\b"):
        OutputSketch(3).update(y)
    for group in (-1, 8):
        with pytest.raises(InvalidInput, match=rf"`outputs`.*{group}"):
            OutputSketch(2).update(y, group=group)
    with pytest.raises(InvalidInput, match="no token"):
        OutputSketch(2).result()
    with pytest.raises(InvalidInput, match="no token"):
        grouped(y, [0]).fork().result()
    with pytest.raises(InvalidInput, match="`update`"):
        OutputSketch(2).fork()


def test_only_forks_merge() -> None:
    y = torch.arange(20.0).view(10, 2)
    made = grouped(y, [0])
    others = [OutputSketch(2), grouped(2 * y, [0]), grouped(y + 1, [0])]
    others += [grouped(y, [0], n_groups=4), grouped(y[:, :1].contiguous(), [0])]
    before = made.result()
    for other in others:
        with pytest.raises(InvalidInput, match="`fork`"):
            made.merge(other)
    assert_same(made.result(), before, tol=0)
