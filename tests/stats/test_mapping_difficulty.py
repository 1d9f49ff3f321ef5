import dataclasses
import inspect
import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.stats.mapping_difficulty import (
    InputNorm,
    MappingDifficulty,
    OutputNorm,
    PairSketch,
    draw_pairs,
    mapping_difficulty,
)
from tests.reference.mapping_difficulty import mapping_difficulty as slow

STATISTICS = ("slope", "dy_median", "dy_mean", "dy_max", "dx_max", "dx_mean")


def _problem(n: int = 401, neurons: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs (tokens, features), outputs (neurons, tokens) and pairs; some inputs repeat."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5))
    x[: n // 3] = x[0]
    y = np.tanh(x @ rng.standard_normal((5, neurons))) + 0.1 * rng.standard_normal((n, neurons))
    return (
        torch.from_numpy(x).float(),
        torch.from_numpy(y.T.copy()).float(),
        draw_pairs(n, seed=seed),
    )


def _distance(x: Tensor, pairs: Tensor) -> Tensor:
    return (x[pairs[0]] - x[pairs[1]]).square().sum(1).sqrt()


def _at(y: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs (pairs, neurons) at the first and at the second token of every pair."""
    return y.T[pairs[0]], y.T[pairs[1]]


def _sketch(y: Tensor, pairs: Tensor, distance: Tensor) -> PairSketch:
    sketch = PairSketch(y.shape[0])
    sketch.update(*_at(y, pairs), distance)
    return sketch


def _assert_same(a: MappingDifficulty, b: MappingDifficulty, *, rtol: float) -> None:
    assert (a.n_pairs, a.n_identical) == (b.n_pairs, b.n_identical)
    for name in STATISTICS:
        first, second = (torch.as_tensor(getattr(r, name), dtype=torch.float64) for r in (a, b))
        torch.testing.assert_close(first, second, rtol=rtol, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("output_norm", "input_norm"),
    list(itertools.product(get_args(OutputNorm), get_args(InputNorm))),
)
def test_agrees_with_plain_loops(output_norm: OutputNorm, input_norm: InputNorm) -> None:
    x, y, pairs = _problem()
    result = mapping_difficulty(y, pairs, _distance(x, pairs))
    listed = [(int(a), int(b)) for a, b in pairs.T]
    expected = [
        slow(row, x.tolist(), listed, output_norm=output_norm, input_norm=input_norm)
        for row in y.tolist()
    ]
    measured = result.md(output_norm=output_norm, input_norm=input_norm)
    np.testing.assert_allclose(measured.numpy(), expected, rtol=2e-6)


def test_hand_worked_case() -> None:
    # Three pairs with |dy| = 1, 2, 6 and ‖dx‖ = 1, 4, 2, and one of identical inputs (|dy| = 9).
    # N_y = median = 2, N_x = max = 4: MD = (0.5/0.25 + 1/1 + 3/0.5)/3 = (2 + 1 + 6)/3 = 3.
    y = torch.tensor([[0.0, 5.0, 3.0, 0.0, 1.0, 7.0, 9.0, 9.0]])
    pairs = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    result = mapping_difficulty(y, pairs, torch.tensor([1.0, 4.0, 2.0, 0.0]))
    assert result.md().tolist() == pytest.approx([3.0])
    assert result.slope.tolist() == pytest.approx([1.5])  # (1/1 + 2/4 + 6/2)/3
    assert result.md(output_norm="mean").tolist() == pytest.approx([2.0])
    assert result.md(output_norm="max").tolist() == pytest.approx([1.0])
    assert result.md(input_norm="mean").tolist() == pytest.approx([1.75])
    assert (result.n_pairs, result.n_identical) == (3, 1)
    assert (result.dx_max, result.dx_mean) == pytest.approx((4.0, 7 / 3))


def test_median_of_an_even_number_of_pairs_is_the_mean_of_the_middle_two() -> None:
    y = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 4.0, 9.0]])
    pairs = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert mapping_difficulty(y, pairs, torch.ones(4)).dy_median.tolist() == [3.0]


@pytest.mark.parametrize(("n", "limit"), [(10, 50), (11, 50), (1001, 500), (1001, 30), (3, 1)])
def test_pairs_are_disjoint_and_deterministic(n: int, limit: int) -> None:
    pairs = draw_pairs(n, seed=3, max_pairs=limit)
    assert pairs.shape == (2, min(limit, n // 2))
    assert pairs.flatten().unique().numel() == pairs.numel()
    assert int(pairs.min()) >= 0
    assert int(pairs.max()) < n
    before = torch.get_rng_state()
    assert torch.equal(pairs, draw_pairs(n, seed=3, max_pairs=limit))
    assert torch.equal(before, torch.get_rng_state())


def test_pairs_depend_on_the_seed_and_reach_every_token() -> None:
    assert not torch.equal(draw_pairs(1000, seed=0), draw_pairs(1000, seed=1))
    assert draw_pairs(1000, seed=0).flatten().sort().values.tolist() == list(range(1000))
    drawn = torch.cat([draw_pairs(11, seed=s).flatten() for s in range(60)])
    assert drawn.unique().tolist() == list(range(11))  # the odd one out is not always the same


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_tokens_give_no_pair(n: int) -> None:
    assert draw_pairs(n, seed=0).shape == (2, 0)


@settings(max_examples=30, deadline=None)
@given(
    a=st.floats(0.01, 100).flatmap(lambda v: st.sampled_from([v, -v])),
    b=st.floats(-5, 5),
    c=st.floats(0.01, 100),
)
def test_md_has_no_unit(a: float, b: float, c: float) -> None:
    x, y, pairs = _problem()
    distance = _distance(x, pairs)
    plain = mapping_difficulty(y.double(), pairs, distance).md()
    scaled = mapping_difficulty((a * y.double() + b).float(), pairs, c * distance).md()
    rounding = 2e-6 * (1 + abs(b / a))
    torch.testing.assert_close(plain, scaled, rtol=20 * rounding, atol=0)


def test_order_of_pairs_and_of_their_ends_does_not_matter() -> None:
    x, y, pairs = _problem()
    order = torch.randperm(pairs.shape[1], generator=torch.Generator().manual_seed(0))
    swapped = pairs[:, order].flip(0)
    one = mapping_difficulty(y, pairs, _distance(x, pairs))
    two = mapping_difficulty(y, swapped, _distance(x, swapped))
    _assert_same(one, two, rtol=1e-12)


def test_a_neuron_alone_is_the_neuron_in_a_batch_and_inputs_stay() -> None:
    x, y, pairs = _problem()
    distance = _distance(x, pairs)
    kept = y.clone(), pairs.clone(), distance.clone()
    together = mapping_difficulty(y, pairs, distance).md()
    for i in range(3):
        alone = mapping_difficulty(y[i : i + 1], pairs, distance).md()
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=0)
    _sketch(y, pairs, distance)
    assert all(torch.equal(a, b) for a, b in zip(kept, (y, pairs, distance), strict=True))


def test_identical_inputs_are_left_out_and_counted() -> None:
    x, y, pairs = _problem()
    distance = _distance(x, pairs)
    same = distance == 0
    assert 0 < int(same.sum()) < same.numel()
    for result in (
        mapping_difficulty(y, pairs, distance),
        _sketch(y, pairs, distance).result(),
    ):
        assert result.n_identical == int(same.sum())
        assert result.n_pairs == int((~same).sum())
    without = mapping_difficulty(y, pairs[:, ~same], distance[~same])
    _assert_same(
        dataclasses.replace(without, n_identical=int(same.sum())),
        mapping_difficulty(y, pairs, distance),
        rtol=1e-12,
    )


def test_only_identical_inputs_give_nan() -> None:
    _, y, pairs = _problem()
    nowhere = torch.zeros(pairs.shape[1])
    for result in (mapping_difficulty(y, pairs, nowhere), _sketch(y, pairs, nowhere).result()):
        assert result.md().isnan().all()
        assert result.md().shape == (3,)
        assert (result.n_pairs, result.n_identical) == (0, 200)
        assert math.isnan(result.dx_max)


def test_nan_and_infinite_outputs_show_and_stay_in_their_neuron() -> None:
    x, y, pairs = _problem()
    clean = mapping_difficulty(y, pairs, _distance(x, pairs)).md()
    dirty = y.clone()
    used = pairs[0, _distance(x, pairs) > 0][0]
    dirty[0, used], dirty[1, used] = math.nan, math.inf
    exact = mapping_difficulty(dirty, pairs, _distance(x, pairs))
    sketched = _sketch(dirty, pairs, _distance(x, pairs)).result()
    for result in (exact, sketched):
        assert result.md().isfinite().tolist() == [False, False, True]
        assert result.dy_median.isnan().tolist() == [True, False, False]
    assert exact.md()[2] == pytest.approx(clean[2].item(), rel=1e-12)


@pytest.mark.parametrize("norm", ["rms", "Median", ""])
def test_unknown_normaliser(norm: str) -> None:
    x, y, pairs = _problem(31)
    result = mapping_difficulty(y, pairs, _distance(x, pairs))
    unchecked = inspect.unwrap(MappingDifficulty.md)  # without the tests' own type check
    with pytest.raises(InvalidInput, match=r"output_norm.*'max'"):
        unchecked(result, output_norm=norm)


def test_sketch_agrees_with_the_exact_statistics() -> None:
    rng = np.random.default_rng(4)
    y = torch.from_numpy(np.stack([rng.standard_normal(20_001), rng.standard_t(3, 20_001),
                                   rng.exponential(1e-3, 20_001)])).float()  # fmt: skip
    pairs = draw_pairs(20_001, seed=0)
    distance = torch.from_numpy(rng.uniform(0.5, 2, pairs.shape[1])).float()
    exact, sketched = mapping_difficulty(y, pairs, distance), PairSketch(3)
    for part in torch.arange(pairs.shape[1]).split(999):
        sketched.update(*_at(y, pairs[:, part]), distance[part])
    approximate = sketched.result()
    first = (y[:, pairs[0, :512]] - y[:, pairs[1, :512]]).abs().double().median(dim=1).values
    assert ((approximate.dy_median - exact.dy_median).abs() <= first / 32).all()
    assert ((approximate.dy_median / exact.dy_median - 1).abs() < 2e-3).all()  # interpolated
    _assert_same(dataclasses.replace(approximate, dy_median=exact.dy_median), exact, rtol=2e-6)
    torch.testing.assert_close(approximate.md(), exact.md(), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("starts", "n_pairs"), [((0, 0), 20), ((5, 0), 20), ((3, 19), 20), ((7, 18), 11), ((4, 4), 1)]
)
def test_pairs_from_some_rows_on(starts: tuple[int, int], n_pairs: int) -> None:
    rng = np.random.default_rng(1)
    first, second = (torch.from_numpy(rng.standard_normal((20, 3))).float() for _ in range(2))
    distance = torch.from_numpy(rng.uniform(0.5, 2, n_pairs)).float()
    sketch, gathered = PairSketch(3), PairSketch(3)
    a, b = ([(start + i) % 20 for i in range(n_pairs)] for start in starts)
    for _ in range(2):
        sketch.update(first, second, distance, starts=starts)
        gathered.update(first[a], second[b], distance)
    _assert_same(sketch.result(), gathered.result(), rtol=0)


@pytest.mark.parametrize(("n_pairs", "starts"), [(21, (0, 0)), (3, (20, 0)), (3, (0, -1))])
def test_pairs_must_have_rows(n_pairs: int, starts: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match=r"\b20\b.*`starts`"):
        PairSketch(3).update(torch.zeros(20, 3), torch.ones(20, 3), torch.ones(n_pairs),
                             starts=starts)  # fmt: skip


def test_no_pair_changes_nothing() -> None:
    sketch = PairSketch(3)
    sketch.update(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0))
    assert sketch.result().n_pairs == 0


def test_merge_is_both_at_once() -> None:
    x, y, pairs = _problem(2001)
    distance = _distance(x, pairs)
    whole, first = PairSketch(3), PairSketch(3)
    first.update(*_at(y, pairs[:, :300]), distance[:300])
    second, third = first.fork(), first.fork()
    second.update(*_at(y, pairs[:, 300:700]), distance[300:700])
    third.update(*_at(y, pairs[:, 700:]), distance[700:])
    whole.update(*_at(y, pairs[:, :300]), distance[:300])
    whole.update(*_at(y, pairs[:, 300:]), distance[300:])
    second.merge(third)
    first.merge(second)
    merged, expected = first.result(), whole.result()
    assert torch.equal(merged.dy_median, expected.dy_median)
    _assert_same(merged, expected, rtol=2e-7)


def test_merging_an_empty_fork_changes_nothing() -> None:
    x, y, pairs = _problem()
    sketch = _sketch(y, pairs, _distance(x, pairs))
    before = sketch.result()
    sketch.merge(sketch.fork())
    _assert_same(sketch.result(), before, rtol=0)


def test_a_median_beyond_the_last_bin_is_nan_not_wrong() -> None:
    x, y, pairs = _problem()
    distance = _distance(x, pairs)
    sketch = _sketch(1e-3 * y, pairs, distance)
    for _ in range(3):
        sketch.update(*_at(y, pairs), distance)
    assert sketch.result().dy_median.isnan().all()


def test_chunks_of_neurons_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.standard_normal((40, 30_000))).float()  # 15,000 pairs: 17 at a time
    pairs = draw_pairs(30_000, seed=0)
    distance = torch.ones(pairs.shape[1])
    whole = _sketch(y, pairs, distance).result()
    for i in (0, 16, 17, 39):
        alone = _sketch(y[i : i + 1], pairs, distance).result()
        assert alone.dy_median[0] == whole.dy_median[i]
        assert alone.slope[0] == pytest.approx(float(whole.slope[i]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sketch_takes_any_floating_type(dtype: torch.dtype) -> None:
    x, y, pairs = _problem()
    low = y.to(dtype)
    one = _sketch(low, pairs, _distance(x, pairs)).result()
    two = _sketch(low.float(), pairs, _distance(x, pairs)).result()
    _assert_same(one, two, rtol=0)


def test_memory_does_not_grow() -> None:
    x, y, pairs = _problem()
    sketch = _sketch(y, pairs, _distance(x, pairs))

    def size() -> int:
        return sum(v.nbytes for v in vars(sketch).values() if isinstance(v, Tensor))

    before = size()
    for _ in range(5):
        sketch.update(*_at(y, pairs), _distance(x, pairs))
    assert size() == before > 0


def test_fork_and_merge_need_common_bins() -> None:
    x, y, pairs = _problem()
    distance = _distance(x, pairs)
    with pytest.raises(InvalidInput, match="`update`"):
        PairSketch(3).fork()
    with pytest.raises(InvalidInput, match="`fork`"):
        _sketch(y, pairs, distance).merge(PairSketch(3))
    with pytest.raises(InvalidInput, match="`fork`"):
        _sketch(y, pairs, distance).merge(_sketch(2 * y, pairs, distance))
    with pytest.raises(InvalidInput, match="`fork`"):
        _sketch(y, pairs, distance).merge(_sketch(y[:2], pairs, distance))


def test_no_number_where_the_output_normaliser_is_zero() -> None:
    """|dy| = 0, 0, 0, 6, 9 at ‖dx‖ = 1, 1, 1, 2, 3: most outputs are equal, and the slope is not 0.

    The slope is (6/2 + 9/3)/5 = 1.2 and its ratio to the median, 0, would be infinite. The mean is
    3: MD = 1.2 · 3/3. The maximum is 9: MD = 1.2 · 3/9. A neuron that never changes has 0/0.
    """
    y = torch.tensor([[0.0] * 8 + [6.0, 9.0], [4.0] * 10, [0.0] * 5 + [1.0] * 5])
    pairs = torch.stack([torch.arange(5), torch.arange(5, 10)])
    distance = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0])
    for found in (mapping_difficulty(y, pairs, distance), _sketch(y, pairs, distance).result()):
        assert found.slope.tolist() == pytest.approx([1.2, 0.0, (3 + 1 / 2 + 1 / 3) / 5])
        assert found.md().isnan().tolist() == [True, True, False]
        for norm, expected in (("mean", 1.2), ("max", 0.4)):
            by: OutputNorm = norm  # type: ignore[assignment]
            assert found.md(output_norm=by)[0].item() == pytest.approx(expected, rel=1e-6)
            assert found.md(output_norm=by)[1].isnan()


@pytest.mark.parametrize(("n", "pairs"), [(99_999, 49_999), (100_000, 50_000), (100_003, 50_000)])
def test_at_most_fifty_thousand_pairs_by_default(n: int, pairs: int) -> None:
    assert draw_pairs(n, seed=0).shape == (2, pairs)  # as in the published code


def test_pairs_at_any_distance_above_zero_count() -> None:
    y = torch.tensor([[0.0, 0.0, 1.0, 3.0]])
    pairs = torch.tensor([[0, 1], [2, 3]])
    for distance in ([1e-30, 1e-30], [0.5, 1e-30]):
        found = mapping_difficulty(y, pairs, torch.tensor(distance))
        assert (found.n_pairs, found.n_identical) == (2, 0)
        expected = (1 / distance[0] + 3 / distance[1]) / 2
        assert found.slope.item() == pytest.approx(expected, rel=1e-6)


def test_pairs_keep_no_order_of_all_tokens() -> None:
    pairs = draw_pairs(1000, seed=0, max_pairs=3)
    assert pairs.untyped_storage().nbytes() == 6 * 8
