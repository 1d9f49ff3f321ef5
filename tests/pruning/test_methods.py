"""What holds for every method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.errors import NumericalError, UnknownName
from entangle.pruning import METHODS, PruneResult, prune
from tests.pruning.problems import make
from tests.reference.groups import kept as reference

EVERY = pytest.mark.parametrize("method", METHODS)
PATTERNS = pytest.mark.parametrize("pattern", ["row", "layer", "block", "2:4", "n:4"])


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    method=st.sampled_from(METHODS),
    rows=st.integers(1, 6),
    cols=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_rows_hold_exactly_the_zeros_asked_for(
    data: st.DataObject, method: str, rows: int, cols: int, seed: int
) -> None:
    weight, gram = make(2, rows, cols, seed=seed)
    shape = data.draw(st.sampled_from([(), (rows,), (2, rows)]))
    numbers = st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0])
    count = int(torch.Size(shape).numel())
    drawn = data.draw(st.lists(numbers, min_size=count, max_size=count))
    share = torch.tensor(drawn, dtype=torch.float64).reshape(shape)
    result = prune(weight, gram, method=method, sparsity=share, seed=seed)
    full = share.expand(2, rows).tolist()
    expected = [[round(value * cols) for value in line] for line in full]
    assert (result.weight == 0).sum(-1).tolist() == expected
    assert (~result.mask).sum(-1).tolist() == expected
    torch.testing.assert_close(
        result.realised_sparsity, torch.tensor(expected, dtype=torch.float64) / cols
    )


@settings(deadline=None, max_examples=40)
@given(
    method=st.sampled_from(METHODS),
    rows=st.integers(1, 6),
    cols=st.integers(1, 40),
    sparsity=st.floats(0, 1),
)
def test_layers_hold_exactly_the_zeros_asked_for(
    method: str, rows: int, cols: int, sparsity: float
) -> None:
    weight, gram = make(2, rows, cols)
    result = prune(weight, gram, method=method, sparsity=sparsity, pattern="layer")
    assert (result.weight == 0).sum((-1, -2)).tolist() == [round(sparsity * (rows * cols))] * 2


@EVERY
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 3), (0, 4), (4, 4), (12, 12)])
def test_groups_hold_exactly_the_zeros_asked_for(method: str, kept: int, of: int) -> None:
    weight, gram = make(2, 5, 12)
    result = prune(weight, gram, method=method, pattern=f"{kept}:{of}", sparsity=1 - kept / of)
    groups = (result.weight != 0).reshape(2, 5, -1, of).sum(-1)
    assert (groups == kept).all()


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    method=st.sampled_from(METHODS),
    rows=st.integers(1, 6),
    groups=st.integers(1, 6),
    group=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_rows_hold_numbers_of_their_own_in_every_group(
    data: st.DataObject, method: str, rows: int, groups: int, group: int, seed: int
) -> None:
    weight, gram = make(2, rows, groups * group, seed=seed)
    shape = data.draw(st.sampled_from([(), (rows,), (2, rows)]))
    count = int(torch.Size(shape).numel())
    drawn = data.draw(st.lists(st.integers(0, group), min_size=count, max_size=count))
    zeros = torch.tensor(drawn).reshape(shape)
    result = prune(
        weight, gram, method=method, sparsity=zeros / group, pattern=f"n:{group}", seed=seed
    )
    expected = zeros.expand(2, rows)[..., None].expand(2, rows, groups)
    found = (result.weight == 0).reshape(2, rows, groups, group).sum(-1)
    assert torch.equal(found, expected)
    assert torch.equal((~result.mask).reshape(2, rows, groups, group).sum(-1), expected)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("group", [1, 3, 4, 24])
def test_groups_match_a_loop_over_rows_and_groups(method: str, group: int) -> None:
    weight, gram = make(2, 5, 24)
    weight[0, :, 2:5] = weight[0, :, 2:3]  # equal ones fall from left to right
    zeros = [0, group, group // 2, group - 1, 1]
    share = torch.tensor(zeros, dtype=torch.float64) / group
    result = prune(weight, gram, method=method, sparsity=share, pattern=f"n:{group}")
    for e in range(2):
        norms = gram[e].diagonal().sqrt() if method == "wanda" else torch.ones(24)
        stays = reference((weight[e].abs() * norms).tolist(), zeros, group)
        assert result.mask[e].tolist() == stays
        assert torch.equal(result.weight[e], weight[e] * torch.tensor(stays))


@EVERY
def test_one_number_for_all_rows_is_the_plain_pattern(method: str) -> None:
    weight, gram = make(2, 5, 24)
    plain = prune(weight, gram, method=method, pattern="3:8")
    for share in (0.625, torch.full((5,), 0.625), torch.full((2, 5), 0.625)):
        found = prune(weight, gram, method=method, sparsity=share, pattern="n:8")
        assert torch.equal(found.weight, plain.weight)
        assert torch.equal(found.mask, plain.mask)


@pytest.mark.parametrize("method", METHODS[1:])  # one random stream runs through all experts
@PATTERNS
def test_batched_is_the_loop_over_experts(method: str, pattern: str) -> None:
    weight, gram = make(3, 6, 140)
    together = prune(weight, gram, method=method, sparsity=0.5, pattern=pattern)
    for e in range(3):
        alone = prune(weight[e], gram[e], method=method, sparsity=0.5, pattern=pattern)
        assert torch.equal(alone.mask, together.mask[e])
        torch.testing.assert_close(alone.weight, together.weight[e])
        torch.testing.assert_close(alone.loss_per_neuron, together.loss_per_neuron[e])
        torch.testing.assert_close(alone.damping, together.damping[e])
        torch.testing.assert_close(alone.realised_sparsity, together.realised_sparsity[e])


@EVERY
@PATTERNS
def test_the_ends_are_exact(method: str, pattern: str) -> None:
    weight, gram = make(2, 5, 140)
    weight[0, 0, :3] = torch.tensor([0.0, -0.0, 1e-300])
    nothing = pattern if pattern != "2:4" else "4:4"
    dense = prune(weight, gram, method=method, sparsity=0, pattern=nothing)
    assert torch.equal(dense.weight.view(torch.int64), weight.view(torch.int64))
    assert dense.mask.all()
    assert not dense.loss_per_neuron.any()
    everything = pattern if pattern != "2:4" else "0:4"
    empty = prune(weight, gram, method=method, sparsity=1, pattern=everything)
    assert not empty.weight.any()
    assert not empty.mask.any()
    output = (weight @ gram * weight).sum(-1)
    torch.testing.assert_close(empty.loss_per_neuron, output)


@EVERY
@PATTERNS
@pytest.mark.parametrize("bits", [None, 4])
def test_rows_left_out_are_bit_identical(method: str, pattern: str, bits: int | None) -> None:
    weight, gram = make(2, 6, 40)
    chosen = torch.tensor([True, False, True, True, False, False])
    options = {"method": method, "sparsity": 0.5, "pattern": pattern, "bits": bits}
    some = prune(weight, gram, rows=chosen, **options)  # type: ignore[arg-type]
    assert torch.equal(some.weight[:, ~chosen], weight[:, ~chosen])
    assert some.mask[:, ~chosen].all()
    assert not some.loss_per_neuron[:, ~chosen].any()
    assert (some.loss_per_neuron[:, chosen] > 0).all()
    again = prune(weight, gram, rows=torch.tensor([3, 0, 2]), **options)  # type: ignore[arg-type]
    assert torch.equal(again.mask, some.mask)
    if method != "random":
        sub = prune(weight[:, chosen], gram, **options)  # type: ignore[arg-type]
        assert torch.equal(sub.mask, some.mask[:, chosen])


@EVERY
def test_a_sparsity_per_row_belongs_to_the_whole_layer(method: str) -> None:
    weight, gram = make(2, 4, 10)
    share = torch.tensor([0.1, 0.2, 0.3, 0.4])
    result = prune(weight, gram, method=method, sparsity=share, rows=torch.tensor([3, 1]))
    assert (~result.mask).sum(-1).tolist() == [[0, 2, 0, 4]] * 2
    share = torch.tensor([0.3, 0.2, 0.5, 0.8])  # the first row, which stays, may have any number
    result = prune(
        weight, gram, method=method, sparsity=share, rows=torch.tensor([3, 1]), pattern="n:5"
    )
    assert (~result.mask).sum(-1).tolist() == [[0, 2, 0, 8]] * 2
    nobody = prune(
        weight, gram, method=method, sparsity=share, rows=torch.zeros(4, dtype=torch.bool)
    )
    assert torch.equal(nobody.weight, weight)


@EVERY
def test_rows_of_sparsity_zero_stay(method: str) -> None:
    weight, gram = make(2, 4, 10)
    share = torch.tensor([0.0, 0.5, 0, 1])
    result = prune(weight, gram, method=method, sparsity=share)
    assert torch.equal(result.weight[:, [0, 2]], weight[:, [0, 2]])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(method: str, dtype: torch.dtype) -> None:
    weight, gram = make(2, 5, 32)
    low = weight.to(dtype)
    result = prune(low, gram, method=method, sparsity=0.5)
    exact = prune(low.float(), gram.float(), method=method, sparsity=0.5)
    assert result.weight.dtype == dtype
    assert torch.equal(result.mask, exact.mask)
    assert torch.equal(result.weight, exact.weight.to(dtype))
    change = low.double() - result.weight.double()
    loss = (change @ gram * change).sum(-1)
    torch.testing.assert_close(result.loss_per_neuron.double(), loss, rtol=1e-3, atol=0)
    untouched = prune(low, gram, method=method, sparsity=0)
    assert torch.equal(untouched.weight, low)


@EVERY
@PATTERNS
def test_inputs_are_not_changed(method: str, pattern: str) -> None:
    weight, gram = make(2, 4, 12)
    gram[0, 3] = gram[0, :, 3] = 0
    before = weight.clone(), gram.clone()
    weight.requires_grad_()
    result = prune(weight, gram, method=method, sparsity=0.5, pattern=pattern, bits=4)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert not result.weight.requires_grad
    dense = prune(weight, gram, method=method, sparsity=0)
    dense.weight.zero_()
    assert torch.equal(weight, before[0])


@EVERY
def test_views_work(method: str) -> None:
    weight, gram = make(1, 6, 12)
    shared = weight.expand(3, 6, 12)
    result = prune(shared, gram.expand(3, 12, 12), method=method, sparsity=0.5)
    flipped = prune(weight[0].T.contiguous().T, gram[0].T, method=method, sparsity=0.5)
    assert result.weight.is_contiguous()
    if method != "random":
        assert torch.equal(result.mask[2], flipped.mask)


@EVERY
@PATTERNS
def test_quantised_weights_lie_on_the_grid(method: str, pattern: str) -> None:
    weight, gram = make(1, 5, 40)
    result = prune(weight, gram, method=method, sparsity=0.5, pattern=pattern, bits=3)
    low, high = weight.amin(-1), weight.amax(-1)
    index = result.weight / ((high - low) / 7)[..., None]
    torch.testing.assert_close(index, index.round())
    assert max(len(set(row)) for row in result.weight[0].tolist()) <= 8
    assert not result.weight[~result.mask].any()


@EVERY
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("pattern", ["row", "layer", "block", "1:1"])
def test_one_row_or_column(method: str, shape: tuple[int, int], pattern: str) -> None:
    weight, gram = (part[0] for part in make(1, *shape))
    sparsity = 0 if pattern == "1:1" else 0.4
    result = prune(weight, gram, method=method, sparsity=sparsity, pattern=pattern)
    assert result.weight.shape == shape
    assert result.damping.shape == ()


@EVERY
def test_constant_weights(method: str) -> None:
    gram = make(1, 1, 10)[1]
    result = prune(torch.ones(1, 4, 10).double(), gram, method=method, sparsity=0.3)
    assert ((~result.mask).sum(-1) == 3).all()


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gram_not_finite(method: str, bad: float) -> None:
    weight, gram = make(3, 2, 4)
    gram[1, 2, 0] = bad
    with pytest.raises(NumericalError, match=r"`gram`.*\b1\b.*\bNaN\b"):
        prune(weight, gram, method=method, sparsity=0.5)


def test_overflow_of_the_result_is_an_error() -> None:
    # The second weight makes up for the first: 60000 + 60000 is beyond float16.
    gram = torch.tensor([[1.0, 0.999], [0.999, 1]])
    with pytest.raises(NumericalError, match=r"torch\.float16"):
        prune(torch.tensor([[60000, 60001]]).half(), gram, sparsity=0.5, damping=0)


def test_unknown_method() -> None:
    with pytest.raises(UnknownName, match="'wander'"):
        prune(torch.ones(2, 2), None, method="wander", sparsity=0.5)


def test_result_is_immutable() -> None:
    result: PruneResult = prune(torch.ones(2, 2), method="magnitude", sparsity=0.5)
    with pytest.raises(AttributeError):
        result.weight = torch.ones(2, 2)  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY
@PATTERNS
def test_cuda_is_the_cpu(method: str, pattern: str) -> None:
    weight, gram = make(3, 20, 300)
    options = {"method": method, "sparsity": 0.5, "pattern": pattern, "bits": 4}
    here = prune(weight, gram, **options)  # type: ignore[arg-type]
    there = prune(weight.cuda(), gram.cuda(), **options)  # type: ignore[arg-type]
    assert there.weight.is_cuda
    assert torch.equal(there.mask.cpu(), here.mask)
    torch.testing.assert_close(there.weight.cpu(), here.weight)
