import pytest
import torch

from entangle.errors import InvalidInput
from entangle.experts import router as module
from entangle.experts.router import fixed_blocks, rows_per_block


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [3, 0, 7], [4, 4, 2], [9, 1]])
def test_blocks_have_one_size_and_keep_the_order(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 32)
    tokens = torch.arange(20.0).view(10, 2)
    found = list(fixed_blocks(tokens.split(sizes)))
    assert [len(block) for block in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found), tokens)


def test_blocks_are_float32() -> None:
    (block,) = fixed_blocks([torch.ones(2, 3, dtype=torch.bfloat16)])
    assert block.dtype == torch.float32


def test_a_block_holds_at_least_one_token() -> None:
    assert rows_per_block(2**40) == 1


@pytest.mark.parametrize("stream", [[], [torch.empty(0, 3)]])
def test_an_empty_stream_is_refused(stream: list[torch.Tensor]) -> None:
    with pytest.raises(InvalidInput, match=r"`stream`.*token"):
        list(fixed_blocks(stream))


def test_wrong_chunks_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"torch\.float32.*\(3,\)"):
        list(fixed_blocks([torch.ones(3)]))
    with pytest.raises(InvalidInput, match=r"torch\.int64.*\(1, 3\)"):
        list(fixed_blocks([torch.ones(1, 3, dtype=torch.int64)]))
    with pytest.raises(InvalidInput, match=r"`stream`.*\b3\b.*\b4\b"):
        list(fixed_blocks([torch.ones(1, 3), torch.ones(1, 4)]))


@pytest.mark.parametrize(("features", "rows"), [(32, 2**15), (512, 2**15), (768, 21_845)])
def test_a_block_of_few_features_is_bounded_in_tokens(features: int, rows: int) -> None:
    assert rows_per_block(features) == rows
