import torch

from entangle.expansion.build import _joined


def test_batches_are_joined_in_order_and_within_the_limit() -> None:
    ids = torch.arange(70).view(10, 7)
    joined = _joined(ids.split(3), 42)
    assert [tuple(part.shape) for part in joined] == [(6, 7), (4, 7)]
    assert torch.equal(torch.cat(joined), ids)


def test_other_lengths_are_not_joined() -> None:
    batches = [torch.zeros(1, 4), torch.zeros(1, 5), torch.zeros(2, 5), torch.zeros(9, 5)]
    assert [tuple(part.shape) for part in _joined(batches, 20)] == [(1, 4), (3, 5), (9, 5)]
