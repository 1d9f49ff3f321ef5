"""Steps of SparseGPT on one block of at most 128 columns, on a GPU."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entangle.kernels.dispatch import launch, shared_limit, usable

WIDTH = 128
"""Columns of a block at most."""

_CHUNKS = 64
_ROWS_PER_BLOCK = 32
_DIGITS = ((21, 11), (10, 11), (0, 10))


def fits(weight: Float[Tensor, "experts rows cols"], block_size: int) -> bool:
    """Tell whether the kernels take these weights, in blocks of so many columns."""
    return (
        usable(weight)
        and weight.numel() > 0
        and weight.element_size() == 4
        and block_size <= WIDTH
        and weight.shape[2] <= shared_limit(weight.device) // 4 - 512  # `choose_rows` compares them
    )


def choose_rows(
    weight: Float[Tensor, "experts rows cols"],
    power: Float[Tensor, "experts cols"],
    dead: Bool[Tensor, "experts cols"],
    left: Int[Tensor, "experts rows"],
    pruned: Bool[Tensor, "experts rows cols"],
    start: int,
    stop: int,
) -> None:
    """Mark what each row loses in the columns ``[start, stop)``, and take it off the budget.

    Parameters
    ----------
    weight
        Float32; columns left of ``start`` are settled.
    power
        Divides the squared weights.
    dead
        Inputs that are always zero: their weights go first, the smallest before the larger.
    left
        How many of the columns from ``start`` on each row has still to lose. Lowered.
    pruned
        Written in the block's columns.
    """
    experts, rows, cols = weight.shape
    launch(
        "solver",
        "choose_rows",
        grid=(rows, experts),
        threads=256,
        arguments=[weight, power, dead, left, pruned, rows, cols, start, stop - start],
        shared_bytes=4 * (cols - start),
    )


def choose_block(
    weight: Float[Tensor, "experts rows cols"],
    power: Float[Tensor, "experts cols"],
    dead: Bool[Tensor, "experts cols"],
    rank: int,
    pruned: Bool[Tensor, "experts rows cols"],
    start: int,
    stop: int,
) -> None:
    """Mark the weights of a block whose saliency does not exceed the ``rank``-th smallest, or 0.

    Parameters as in `choose_rows`; ``rank`` counts from 1 over all rows of an expert.
    """
    experts, rows, cols = weight.shape
    histogram = torch.zeros(experts, 2048, dtype=torch.int32, device=weight.device)
    state = torch.zeros(experts, 3, dtype=torch.int32, device=weight.device)
    place = [rows, cols, start, stop - start]
    inputs = [weight, power, dead]
    for shift, bits in _DIGITS:
        launch(
            "solver",
            "count_digits",
            grid=(min(_CHUNKS, -(-rows // 2)), experts),
            threads=256,
            arguments=[*inputs, histogram, state, *place, shift, bits, rank],
        )
    launch(
        "solver",
        "mark_block",
        grid=(-(-rows // 2), experts),
        threads=256,
        arguments=[*inputs, state, pruned, *place],
    )


def eliminate(
    weight: Float[Tensor, "experts rows cols"],
    factor: Float[Tensor, "experts cols cols"],
    pruned: Bool[Tensor, "experts rows cols"],
    start: int,
    stop: int,
) -> Float[Tensor, "experts rows width"]:
    """Settle the columns ``[start, stop)`` in place and return their errors.

    As `entangle.pruning.solver.eliminate` without a grid, on rows instead of columns.
    """
    experts, rows, cols = weight.shape
    errors = torch.empty(experts, rows, stop - start, dtype=torch.float32, device=weight.device)
    launch(
        "solver",
        "eliminate",
        grid=(-(-rows // _ROWS_PER_BLOCK), experts),
        threads=128,
        arguments=[weight, factor, pruned, errors, rows, cols, start, stop - start],
    )
    return errors
