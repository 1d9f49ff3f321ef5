import pytest
import torch
from torch import Tensor

from entangle.errors import InvalidInput, NumericalError
from entangle.pruning import PruneResult, prune
from entangle.pruning.factor import inverse_factor
from entangle.pruning.grid import fit_grids
from entangle.pruning.problem import prepare
from entangle.pruning.solver import can_fuse, eliminate
from tests.pruning.problems import magnitude, make, wanda
from tests.reference.sparsegpt import sparsegpt as reference


def _assert_same(result: PruneResult, weight: Tensor, gram: Tensor, **options: object) -> None:
    """Compare a single layer with the reference."""
    expected, kept = reference(weight.double().numpy(), gram.double().numpy(), **options)  # type: ignore[arg-type]
    assert torch.equal(result.mask, torch.from_numpy(kept))
    torch.testing.assert_close(
        result.weight.double(), torch.from_numpy(expected), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["row", "block", "layer"])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_matches_the_reference(dtype: torch.dtype, pattern: str, sparsity: float) -> None:
    # 150 columns: a block of 128, an incomplete one, and incomplete panels.
    weight, gram = (part[0] for part in make(1, 5, 150, dtype=dtype))
    result = prune(weight, gram, sparsity=sparsity, pattern=pattern)
    _assert_same(result, weight, gram, rule=pattern, sparsity=sparsity)


@pytest.mark.parametrize("pattern", ["row", "block", "layer"])
@pytest.mark.parametrize("block", [1, 7, 20, 64])
def test_matches_the_reference_in_other_blocks(pattern: str, block: int) -> None:
    weight, gram = (part[0] for part in make(1, 6, 40))
    result = prune(weight, gram, sparsity=0.6, pattern=pattern, block_size=block)
    _assert_same(result, weight, gram, rule=pattern, sparsity=0.6, block=block)


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (3, 5), (0, 2), (2, 2), (4, 20)])
def test_matches_the_reference_in_groups(kept: int, of: int) -> None:
    weight, gram = (part[0] for part in make(1, 6, 60))
    result = prune(weight, gram, pattern=f"{kept}:{of}", block_size=16)
    _assert_same(result, weight, gram, group=(kept, of))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_matches_the_reference_in_groups_with_a_number_for_every_row(
    block: int, bits: int | None
) -> None:
    weight, gram = (part[0] for part in make(1, 6, 60))
    dead = [0, 17, 18, 19, 59]
    gram[dead] = 0
    gram[:, dead] = 0
    kept = [0, 1, 2, 3, 4, 2]
    share = 1 - torch.tensor(kept, dtype=torch.float64) / 4
    result = prune(weight, gram, sparsity=share, pattern="n:4", block_size=block, bits=bits)
    _assert_same(result, weight, gram, group=(kept, 4), bits=bits)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_matches_the_reference_quantised(bits: int, sparsity: float) -> None:
    weight, gram = (part[0] for part in make(1, 6, 40))
    result = prune(weight, gram, sparsity=sparsity, bits=bits, block_size=16)
    _assert_same(result, weight, gram, sparsity=sparsity, bits=bits, block=16)


def test_matches_the_reference_with_rows_of_their_own_and_dead_inputs() -> None:
    weight, gram = (part[0] for part in make(1, 5, 40))
    dead = [0, 17, 39]
    gram[dead] = 0
    gram[:, dead] = 0
    shares = [0.0, 0.05, 0.5, 0.9, 1.0]
    result = prune(weight, gram, sparsity=torch.tensor(shares), block_size=16)
    _assert_same(result, weight, gram, sparsity=shares, block=16)


def test_by_hand() -> None:
    # H = [[2, 1], [1, 2]] undamped, w = [1, 3]: U_11**2 = 2/3 and U_22**2 = 1/2 (test_factor.py).
    # Saliencies 1 / (2/3) = 1.5 and 9 / (1/2) = 18: the first weight goes. Its error 1 / U_11 times
    # U_12 is U_12 / U_11 = -1/2, so the second becomes 3.5. d = [1, -0.5], d H d^T = 1.5.
    gram = torch.tensor([[2.0, 1], [1, 2]])
    result = prune(torch.tensor([[1.0, 3]]), gram, sparsity=0.5, damping=0)
    torch.testing.assert_close(result.weight, torch.tensor([[0, 3.5]]))
    torch.testing.assert_close(result.loss_per_neuron, torch.tensor([1.5]))
    assert result.mask.tolist() == [[False, True]]
    assert result.realised_sparsity.tolist() == [0.5]
    assert result.damping.item() == 0


def test_groups_of_their_own_by_hand() -> None:
    # H = I undamped: no weight makes up for another, and saliency is magnitude. The rows lose 0,
    # 1 and 2 of each of two neighbours.
    weight = torch.tensor([[1.0, 2, 4, 3]]).repeat(3, 1)
    share = torch.tensor([0, 0.5, 1])
    result = prune(weight, torch.eye(4), sparsity=share, pattern="n:2", damping=0)
    assert result.weight.tolist() == [[1, 2, 4, 3], [0, 2, 4, 0], [0, 0, 0, 0]]
    assert result.loss_per_neuron.tolist() == [0, 1 + 9, 1 + 4 + 16 + 9]
    assert result.realised_sparsity.tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("pattern", ["row", "layer", "block", "2:5", "n:5"])
def test_identity_gram_is_magnitude(pattern: str) -> None:
    weight, _ = make(2, 6, 300)
    gram = 3 * torch.eye(300, dtype=weight.dtype).expand(2, 300, 300)
    sparsity = 0.6
    ours = prune(weight, gram, sparsity=sparsity, pattern=pattern)
    theirs = magnitude(weight, gram, sparsity=sparsity, pattern=pattern)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.mask, theirs.mask)
    torch.testing.assert_close(ours.loss_per_neuron, theirs.loss_per_neuron)


@pytest.mark.parametrize("pattern", ["row", "layer", "block", "1:2"])
def test_beats_wanda(pattern: str) -> None:
    weight, gram = make(2, 20, 160)
    ours = prune(weight, gram, sparsity=0.5, pattern=pattern).loss_per_neuron
    theirs = wanda(weight, gram, sparsity=0.5, pattern=pattern).loss_per_neuron
    assert (ours.sum(-1) < 0.9 * theirs.sum(-1)).all()


def test_scale_and_order_of_rows() -> None:
    weight, gram = make(1, 8, 40)
    gram[0, 5] = gram[0, :, 5] = 0
    base = prune(weight, gram, sparsity=0.6)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    moved = prune(weight[:, order] * 4, gram * 1000, sparsity=0.6)
    assert torch.equal(moved.mask, base.mask[:, order])
    torch.testing.assert_close(moved.weight, 4 * base.weight[:, order])
    torch.testing.assert_close(moved.loss_per_neuron, 16_000 * base.loss_per_neuron[:, order])


@pytest.mark.parametrize("power", [2.0**-140, 2.0**-120, 2.0**-60, 2.0**100])
@pytest.mark.parametrize("pattern", ["row", "block", "1:2"])
def test_grams_at_the_ends_of_float32(power: float, pattern: str) -> None:
    weight, gram = make(2, 8, 40, dtype=torch.float32)
    gram[0, 5] = gram[0, :, 5] = 0
    base = prune(weight, gram, sparsity=0.5, pattern=pattern)
    scale = torch.tensor([1.0, power])  # one expert keeps its scale
    found = prune(weight, gram * scale[:, None, None], sparsity=0.5, pattern=pattern)
    assert torch.equal(found.mask, base.mask)
    assert torch.equal(found.weight[0], base.weight[0])
    torch.testing.assert_close(found.weight[1], base.weight[1], rtol=0, atol=2e-4)
    assert torch.equal(found.damping, base.damping)


def test_dead_weights_go_first_and_the_spared_stay() -> None:
    weight, gram = make(1, 1, 10)
    weight[0, 0, 2], weight[0, 0, 8] = 5, -4
    gram[0, [2, 8]] = 0
    gram[0, :, [2, 8]] = 0
    one = prune(weight, gram, sparsity=0.1)
    expected = weight.clone()
    expected[0, 0, 8] = 0
    torch.testing.assert_close(one.weight, expected, rtol=0, atol=0)
    assert one.loss_per_neuron.item() == 0
    three = prune(weight, gram, sparsity=0.3)
    assert not three.mask[0, 0, [2, 8]].any()


def test_all_inputs_dead_is_magnitude() -> None:
    weight, gram = make(1, 3, 10)
    result = prune(weight, gram * 0, sparsity=0.5)
    assert torch.equal(result.weight, magnitude(weight, sparsity=0.5).weight)
    assert not result.loss_per_neuron.any()


def test_escalates_only_where_needed() -> None:
    weight = torch.tensor([[[1.0, 3]], [[1.0, 3]]])
    gram = torch.tensor([[[1.0, 2], [2, 1]], [[2.0, 1], [1, 2]]])
    result = prune(weight, gram, sparsity=0.5, damping=0.05)
    torch.testing.assert_close(result.damping, torch.tensor([5, 0.05]))
    alone = prune(weight[1], gram[1], sparsity=0.5, damping=0.05)
    assert torch.equal(alone.weight, result.weight[1])


def test_names_the_expert_that_cannot_be_factorised() -> None:
    weight, gram = make(3, 2, 4)
    gram[2, 0, 1] = gram[2, 1, 0] = 1e12
    with pytest.raises(NumericalError, match=r"\b2\b.*\b10000\b"):
        prune(weight, gram, sparsity=0.5)


def test_rank_deficient_gram_is_damped() -> None:
    weight = make(1, 4, 30, dtype=torch.float32)[0]
    few = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    result = prune(weight[0], few.T @ few, sparsity=0.7)
    masked = wanda(weight[0], few.T @ few, sparsity=0.7)
    assert result.damping.item() == pytest.approx(0.01)
    assert (result.loss_per_neuron < 0.1 * masked.loss_per_neuron).all()


def test_bad_block_size() -> None:
    with pytest.raises(InvalidInput, match=r"block_size.*\b1\b.*\b0\b"):
        prune(torch.ones(1, 2), torch.eye(2), sparsity=0.5, block_size=0)


def test_errors_add_up_to_the_damped_loss() -> None:
    weight, gram = make(2, 5, 24)
    factor, used, _ = inverse_factor(gram, damping=0.1)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = gram + (used * mean)[:, None, None] * torch.eye(24)
    columns = weight.mT.contiguous()
    pruned = torch.rand(2, 24, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    errors = eliminate(columns, factor, pruned, grids=fit_grids(weight, 3))
    change = weight - columns.mT
    loss = (change @ damped * change).sum(-1)
    torch.testing.assert_close(errors.square().sum(1), loss)
    assert not columns[pruned].any()


def test_update_lowers_the_loss_of_wandas_mask() -> None:
    weight, gram = make(2, 16, 48)
    masked = wanda(weight, gram, sparsity=0.6)
    factor, _, _ = inverse_factor(gram, damping=0.01)
    columns = weight.mT.contiguous()
    eliminate(columns, factor, ~masked.mask.mT)
    change = weight - columns.mT
    loss = (change @ gram * change).sum(-1)
    # Not in every row: each column is settled before those right of it are known.
    assert (loss < masked.loss_per_neuron).double().mean() > 0.9
    assert (loss.sum(-1) < 0.9 * masked.loss_per_neuron.sum(-1)).all()


def test_pruning_the_first_column_alone_is_least_squares() -> None:
    weight, gram = make(1, 3, 6)
    factor, _, _ = inverse_factor(gram, damping=0)
    columns = weight.mT.contiguous()
    pruned = torch.zeros_like(columns, dtype=torch.bool)
    pruned[:, 0] = True
    eliminate(columns, factor, pruned)
    # The best others solve H_oo x = H_o: w^T.
    best = torch.linalg.solve(gram[0, 1:, 1:], gram[0, 1:] @ weight[0].T)
    torch.testing.assert_close(columns[0, 1:], best)


SHAPES = [(1, 1, 1), (2, 40, 1), (2, 1, 200), (3, 20, 300), (2, 7, 129), (64, 3, 40), (5, 33, 1100)]


def test_the_cpu_is_left_to_the_plain_solver() -> None:
    weight, gram = make(1, 2, 8, dtype=torch.float32)
    problem = prepare(weight, gram, sparsity=0.5, pattern="row", rows=None, bits=None)
    assert not can_fuse(problem, None, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["row", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_the_plain_solver(shape: tuple[int, int, int], pattern: str, dtype: torch.dtype) -> None:
    weight, gram = make(*shape, dtype=torch.float32)
    weight = weight.to(dtype)
    if shape[2] > 20:
        gram[0, 3] = gram[0, :, 3] = 0
    for sparsity in (0.0, 0.3, 0.8, 1.0):
        here = prune(weight, gram, sparsity=sparsity, pattern=pattern)
        there = prune(weight.cuda(), gram.cuda(), sparsity=sparsity, pattern=pattern)
        same = here.mask == there.mask.cpu()
        assert same.double().mean() >= 0.999
        error = ((here.weight - there.weight.cpu()).float() * same).norm()
        assert error <= 1e-2 * weight.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_grams_that_need_more_damping() -> None:
    weight = torch.tensor([[[1.0, 3]]]).expand(3, -1, -1)
    bad = torch.tensor([[1.0, 2], [2, 1]])
    gram = torch.stack([bad, torch.eye(2), 4 * bad])
    result = prune(weight.cuda(), gram.cuda(), sparsity=0.5, damping=0.05)
    torch.testing.assert_close(result.damping.cpu(), torch.tensor([5, 0.05, 5]))
