"""Reads a stream of tokens in blocks whose size does not depend on how the stream was chunked."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.errors import InvalidInput

BLOCK_BYTES = 2**26
"""Size of a block of float32 tokens."""
BLOCK_TOKENS = 2**15
"""Most tokens of a block, but on a GPU: a block of few features would hold a whole text."""
_BLOCK_BYTES_GPU = 2**28


def fixed_blocks(
    stream: Iterable[Tensor], *, device: torch.device | None = None
) -> Iterator[Float[Tensor, "tokens features"]]:
    """Yield the tokens of ``stream`` in order, in float32 blocks of one size (the last is shorter).

    Sums over the blocks are then the same to the bit for any chunking of the same tokens. On a GPU
    16-bit tokens stay as they are.

    Parameters
    ----------
    stream
        Chunks of shape (tokens, features) of a floating dtype, all of one width.
    device
        Where the blocks live; by default where the chunks do.

    Raises
    ------
    InvalidInput
        If a chunk has another shape or dtype, or there is no token at all.
    """
    pending: list[Tensor] = []
    held, features, empty = 0, None, True
    for chunk in stream:
        features = _width(chunk, features)
        target = torch.device(device or chunk.device)
        size = rows_per_block(features, on_gpu=target.type == "cuda")
        rest = chunk
        while rest.shape[0]:
            empty = False
            piece, rest = rest[: size - held], rest[size - held :]
            pending.append(piece.detach().to(target, _dtype(chunk, target)))
            held += piece.shape[0]
            if held == size:
                whole, pending, held = torch.cat(pending), [], 0
                del piece  # what is put together is not held twice
                yield whole
                del whole
    if empty:
        raise InvalidInput("`stream` must give at least one token; it is empty.")
    if held:
        yield torch.cat(pending)


def rows_per_block(features: int, *, item_bytes: int = 4, on_gpu: bool = False) -> int:
    """Return how many tokens of this width fit in a block, at least one."""
    size = _BLOCK_BYTES_GPU if on_gpu else BLOCK_BYTES
    rows = max(1, size // (item_bytes * max(features, 1)))
    return rows if on_gpu else min(rows, BLOCK_TOKENS)


def _dtype(chunk: Tensor, device: torch.device) -> torch.dtype:
    half = chunk.dtype in (torch.float16, torch.bfloat16)
    return chunk.dtype if half and device.type == "cuda" else torch.float32


def _width(chunk: Tensor, expected: int | None) -> int:
    if not isinstance(chunk, Tensor):
        raise InvalidInput(f"`stream` must give tensors; got {type(chunk).__name__}.")
    if chunk.ndim != 2 or chunk.shape[1] < 1 or not chunk.dtype.is_floating_point:
        raise InvalidInput(
            f"`stream` must give floating-point chunks of shape (tokens, features); "
            f"got {chunk.dtype} of shape {tuple(chunk.shape)}."
        )
    if expected is not None and chunk.shape[1] != expected:
        raise InvalidInput(
            f"`stream` must give chunks of one width; got {expected} and {chunk.shape[1]} features."
        )
    return chunk.shape[1]
