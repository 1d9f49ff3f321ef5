"""What a pruner returns."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entangle.errors import NumericalError
from entangle.precision import full_precision
from entangle.pruning.problem import Problem, is_finite
from entangle.pruning.quadratic import quadratic
from entangle.pruning.quantize import quantize


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A pruned layer, or a stack of them; without an axis of experts if the input had none."""

    weight: Float[Tensor, "*experts rows cols"]
    """The sparse weight, in the dtype and on the device of the dense one."""
    mask: Bool[Tensor, "*experts rows cols"]
    """True where the weight was kept. A kept weight may still have the value zero."""
    loss_per_neuron: Float[Tensor, "*experts rows"]
    """Squared error of each neuron's output, summed over the tokens of the gram: ``d H d^T`` with
    ``d`` the change of the row and ``H`` the undamped gram; NaN if no gram was given, or no loss
    asked for."""
    damping: Float[Tensor, "*experts"]
    """Damping used for each expert, as a multiple of its gram's mean diagonal; 0 if none was."""
    realised_sparsity: Float[Tensor, "*experts rows"]
    """Share of each row's weights that the mask removes, in [0, 1]."""


def mask_only(problem: Problem, pruned: Bool[Tensor, "experts rows cols"]) -> PruneResult:
    """Zero the marked weights and leave the others alone, save for quantisation."""
    weight = problem.weight
    solved = weight if problem.bits is None else quantize(weight, problem.bits)
    sparse = solved.to(problem.dense.dtype).masked_fill(pruned, 0)
    return finish(problem, sparse, pruned, weight.new_zeros(len(weight)))


def finish(
    problem: Problem,
    sparse: Float[Tensor, "experts rows cols"],
    pruned: Bool[Tensor, "experts rows cols"],
    damping: Float[Tensor, " experts"],
) -> PruneResult:
    """Assemble the result: untouched rows bit-identical, losses in the end dtype.

    `sparse` holds 0 where `pruned` and is of the end dtype; it becomes the result's weight.
    """
    chosen = slice(None) if problem.rows is None else problem.rows
    untouched = ~pruned.any(-1, keepdim=True)
    if problem.bits is None and untouched.any():
        sparse = torch.where(untouched, problem.dense[:, chosen], sparse)
    if not is_finite(sparse):
        raise NumericalError(
            f"the pruned weight overflows {sparse.dtype}: raise `damping`, or use a wider dtype."
        )
    weight, kept, loss = sparse.contiguous(), ~pruned, _loss(problem, sparse)
    if problem.rows is not None:
        weight = problem.dense.clone(memory_format=torch.contiguous_format)
        weight[:, chosen] = sparse
        kept = torch.ones_like(weight, dtype=torch.bool).index_copy_(1, problem.rows, kept)
        loss = loss.new_zeros(weight.shape[:2]).index_copy_(1, problem.rows, loss)
    zeros = [(~own).mean(-1, dtype=loss.dtype) for own in kept]  # one by one: it makes a copy
    fields = weight, kept, loss, damping, torch.stack(zeros)
    return PruneResult(*(fields if problem.batched else (field[0] for field in fields)))


def _loss(
    problem: Problem, sparse: Float[Tensor, "experts rows cols"]
) -> Float[Tensor, "experts rows"]:
    if problem.gram is None or not problem.wants_loss:
        return problem.weight.new_full(sparse.shape[:2], torch.nan)
    with full_precision():
        return quadratic(problem.weight - sparse, problem.gram).clamp_(min=0)
