"""Bringing results to the CPU."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from entangle.seeding import torch_rng
from entangle.stats.bins import fetched, to_host

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@dataclass(frozen=True, eq=False)
class Part:
    numbers: Tensor
    name: str
    flags: Tensor


def _tensors(device: str) -> list[Tensor]:
    x = torch.randn(300, 70, generator=torch_rng(0, "transfer"))
    all_of_it = [x, x.t(), x[::3, 5:9], x > 0, x.int(), x[:0], x.sum(), x.bfloat16()]
    return [one.to(device) for one in all_of_it]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_arrive_as_they_were(device: str) -> None:
    there = [*_tensors(device), torch.arange(3)]
    here = to_host(there)
    assert len(here) == len(there)
    for one, other in zip(there, here, strict=True):
        assert other.device.type == "cpu"
        assert not other.is_pinned()
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)
    assert to_host([]) == []


@pytest.mark.parametrize("numbers", [2**20, 2**20 + 1, 2**24, 2**24 + 1])
@pytest.mark.parametrize("device", DEVICES)
def test_large_tensors_arrive_too(device: str, numbers: int) -> None:
    there = torch.arange(numbers, dtype=torch.int32, device=device)
    (here,) = to_host([there])
    assert here.is_pinned() == (device == "cuda" and 2**20 < numbers <= 2**24)
    assert torch.equal(here, torch.arange(numbers, dtype=torch.int32))


@pytest.mark.parametrize("device", DEVICES)
def test_threads_get_their_own(device: str) -> None:
    def worked(number: int) -> list[Tensor]:
        x = torch.full((600, 600), float(number), device=device)
        for _ in range(20):
            x = x @ torch.eye(600, device=device)
        return to_host([x, x.t()[::2], x.sum()])

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(worked, range(40))):
            assert torch.equal(found[0], torch.full((600, 600), float(number)))
            assert torch.equal(found[1], torch.full((300, 600), float(number)))
            assert found[2].item() == pytest.approx(number * 360_000, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_queued_before_is_in_it(device: str) -> None:
    x = torch.ones(512, 512, device=device)
    for _ in range(50):
        x = x @ x / 512
    found, total = to_host([x, x.sum()])
    assert torch.equal(found, torch.ones(512, 512))
    assert total.item() == 512**2


@pytest.mark.parametrize("device", DEVICES)
def test_the_tensors_of_dataclasses_are_moved(device: str) -> None:
    x = _tensors(device)
    pair = fetched(Part(x[0], "a", x[3]), Part(x[2], "b", x[4]))
    assert [one.name for one in pair] == ["a", "b"]
    here = [tensor for one in pair for tensor in (one.numbers, one.flags)]
    for found, there in zip(here, (x[0], x[3], x[2], x[4]), strict=True):
        assert found.device.type == "cpu"
        assert torch.equal(found, there.cpu())
    alone, nothing = fetched(pair[0], None)
    assert nothing is None
    assert torch.equal(alone.numbers, pair[0].numbers)
