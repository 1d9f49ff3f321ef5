import pytest
import torch

from entangle.pruning import prune
from entangle.pruning.problem import prepare
from entangle.pruning.solver import can_fuse
from tests.pruning.problems import make

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
