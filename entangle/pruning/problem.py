"""The common entrance of all pruners: arguments checked, shapes and dtypes made uniform.

Quadratic forms of rows: what a change of a weight does to the squared error of the output.

A GPU's float32 products are slow. Its TensorFloat-32 units multiply numbers of 11 significant bits,
and cut off what they add instead of rounding it. Rows and grams are therefore split in two such
numbers, and at most 1,024 products of them are summed before the sum is added in float32. Of
SparseGPT's changes of bfloat16 weights (2048 and 4096 inputs, 50 % and 80 % zeros, sums that cancel
to 1/300 to 1/1400), with such units imitated in float64, the largest relative errors beside float64
are:

==========================================  ===========  ==================
sum                                         of a row     of all rows
==========================================  ===========  ==================
float32, one product after another          1.6e-6       1.4e-7
only the first parts of both                4.7e-4       3.2e-5
all but the second part of the rows         4.0e-5       3.0e-6
both parts of both, all products together   8.9e-5       8.0e-5
both parts of both, 1,024 products at most  2.3e-6       5.0e-7
==========================================  ===========  ==================

What a pruner returns.

The choice of a whole mask at once, for pruners that leave the kept weights alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entangle.checks import tensor_of
from entangle.errors import InvalidInput, NumericalError
from entangle.kernels.dispatch import dispatch, on_cpu
from entangle.precision import full_precision, has_tf32, tensor_cores
from entangle.pruning.factor import Factor
from entangle.pruning.grid import check_bits, check_group_size, quantize
from entangle.pruning.masks import (
    BLOCK,
    Pattern,
    count_zeros,
    parse_pattern,
    prune_block,
    prune_groups,
    prune_smallest,
    zeros_by_group,
)

_WHOLE = 1e-6  # of a whole number of weights, at most

Rows = Bool[Tensor, " rows"] | Int[Tensor, " chosen"] | Sequence[int] | Sequence[bool] | None
"""Rows to prune: a mask or indices; None for all."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a pruner works on: the chosen rows of every expert, in the dtype of the solver."""

    dense: Float[Tensor, "experts all_rows cols"]
    """The weight as it was received, with an axis of experts."""
    weight: Float[Tensor, "experts rows cols"]
    """The rows to prune, in float32 (float64 for a float64 weight). May share memory: read only."""
    gram: Float[Tensor, "experts cols cols"] | None
    """``X^T X`` over the calibration tokens, in the dtype of `weight`."""
    pattern: Pattern
    sparsity: float
    """The share of zeros of the ``layer`` and ``block`` patterns; NaN for the others."""
    budget: Int[Tensor, " experts *rows"]
    """Zeros of every row (``row`` and ``n:m``) or of every expert (``layer`` and ``block``)."""
    rows: Int[Tensor, " rows"] | None
    """Indices of the rows to prune; None means all."""
    bits: int | None
    """Width of the quantisation grid; None keeps full precision."""
    batched: bool
    """Whether the caller's weight had an axis of experts."""
    first: int = 0
    """Index of the first expert among the caller's."""
    wants_loss: bool = True
    """Whether the result is to hold the losses."""
    group_size: int | None = None
    """Columns that share a grid; None for all of a row."""
    factor: Factor | None = None
    """From `entangle.pruning.factor.inverse_factor` of the gram, if it is known already; SparseGPT
    needs no gram then."""

    @property
    def zeros_a_group(self) -> Int[Tensor, " experts *rows"]:
        """Zeros of every whole group of a row (``n:m``; meaningless for the other patterns)."""
        counts = zeros_by_group(self.weight.shape[2], self.pattern.group).to(self.budget.device)
        return torch.searchsorted(counts, self.budget.contiguous(), right=True) - 1

    def need_gram(self) -> Float[Tensor, "experts cols cols"]:
        """Return the gram, or raise `InvalidInput` if none was given."""
        if self.gram is None:
            raise InvalidInput("`gram` is None; wanda and sparsegpt need X^T X: give it.")
        return self.gram


def prepare(
    weight: Tensor,
    gram: Tensor | None,
    *,
    sparsity: float | int | Tensor | None,
    pattern: str,
    rows: Tensor | Sequence[int] | Sequence[bool] | None,
    bits: int | None,
    group_size: int | None = None,
    loss: bool = True,
) -> Problem:
    """Check the arguments that all pruners share (documented in `entangle.pruning.prune`)."""
    parsed, bits = parse_pattern(pattern), check_bits(bits)
    dense = _check_weight(weight)
    chosen = None if rows is None else _check_rows(rows, dense.shape[1]).to(dense.device)
    share = _check_sparsity(sparsity, parsed, dense)
    selected = dense if chosen is None else dense[:, chosen]
    solver_dtype = torch.float64 if dense.dtype == torch.float64 else torch.float32
    return Problem(
        dense=dense,
        weight=_cast(selected, solver_dtype),
        gram=None if gram is None else check_gram(gram, weight, solver_dtype),
        pattern=parsed,
        sparsity=float(share) if parsed.kind in ("layer", "block") else torch.nan,
        budget=_budget(share, parsed, selected, chosen).to(dense.device),
        rows=chosen,
        bits=bits,
        batched=weight.ndim == 3,
        wants_loss=loss,
        group_size=check_group_size(group_size, bits),
    )


def is_finite(values: Float[Tensor, "..."]) -> bool:
    """Tell whether all values are finite, without a copy of them."""
    if not values.numel():
        return True
    lowest, highest = values.aminmax()
    return bool(lowest.isfinite() & highest.isfinite())


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a stack of weights; one that all experts share is converted once."""
    if weight.stride(0) == 0:
        return weight[:1].to(dtype).expand_as(weight)
    return weight.to(dtype)


def _check_weight(weight: Tensor) -> Float[Tensor, "experts rows cols"]:
    if not isinstance(weight, Tensor):
        raise InvalidInput(f"`weight` must be a tensor; got {type(weight).__name__}.")
    if weight.ndim not in (2, 3) or not weight.is_floating_point() or not weight.numel():
        raise InvalidInput(
            "`weight` must be a non-empty floating-point tensor of shape (rows, cols) or "
            f"(experts, rows, cols); got {tuple(weight.shape)} of {weight.dtype}."
        )
    if not is_finite(weight[:1] if weight.stride(0) == 0 else weight):
        raise InvalidInput("`weight` must be finite; got NaN or infinity: check the model's file.")
    return weight.detach().reshape(-1, *weight.shape[-2:])


def check_gram(
    gram: Tensor, weight: Tensor, dtype: torch.dtype
) -> Float[Tensor, "experts cols cols"]:
    """Return the grams of weights in the solver's dtype, which must hold them.

    Raises
    ------
    InvalidInput
        If the gram is not one of the weight.
    NumericalError
        If it is not finite, or too small for the dtype.
    """
    if not isinstance(gram, Tensor):
        raise InvalidInput(f"`gram` must be a tensor; got {type(gram).__name__}.")
    shape = (*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
    if gram.shape != shape or not gram.is_floating_point() or gram.device != weight.device:
        raise InvalidInput(
            f"`gram` must be a floating-point tensor of shape {shape} on {weight.device}; "
            f"got {tuple(gram.shape)} of {gram.dtype} on {gram.device}."
        )
    received = gram.detach().reshape(-1, *shape[-2:])
    gram = received.to(dtype)
    if not is_finite(gram):
        finite = gram.isfinite().all(-1).all(-1)
        raise NumericalError(
            f"`gram` of expert {int(finite.int().argmin())} holds NaN or infinity: "
            "look for overflow in the layer's inputs."
        )
    diagonal = received.diagonal(dim1=-2, dim2=-1)
    lost = (diagonal.amax(-1) > 0) & (gram.diagonal(dim1=-2, dim2=-1).amax(-1) == 0)
    if lost.any():
        raise NumericalError(
            f"`gram` of expert {int(lost.int().argmax())} is too small for {dtype}: its largest "
            f"element is {float(diagonal[lost].max()):g}; scale the inputs up."
        )
    lowest = diagonal.amin(-1)
    if (lowest < 0).any():
        raise InvalidInput(
            f"`gram` must have a diagonal of sums of squares; expert {int(lowest.argmin())} "
            f"has {float(lowest.min()):g} on it: pass X^T X."
        )
    return gram


def _check_rows(
    given: Tensor | Sequence[int] | Sequence[bool], n_rows: int
) -> Int[Tensor, " chosen"]:
    rows = tensor_of("rows", given)
    if not rows.numel() and rows.ndim == 1 and not isinstance(given, Tensor):
        return rows.long()  # an empty list has no type of its own
    if rows.dtype == torch.bool and rows.shape == (n_rows,):
        return rows.nonzero()[:, 0]
    valid = rows.dtype in (torch.int32, torch.int64) and rows.ndim == 1
    if not valid or ((rows < 0) | (rows >= n_rows)).any() or len(set(rows.tolist())) < len(rows):
        raise InvalidInput(
            f"`rows` must be a boolean mask of {n_rows} entries or different indices in "
            f"[0, {n_rows}); got {tuple(rows.shape)} of {rows.dtype}."
        )
    return rows.long()


def _check_sparsity(
    sparsity: float | int | Tensor | None,
    pattern: Pattern,
    dense: Float[Tensor, "experts rows cols"],
) -> Float[Tensor, "..."]:
    """Return the sparsity in float64 on the CPU: one value, or one per row of every expert."""
    fixed = None if pattern.kept is None else 1 - pattern.kept / pattern.group
    if sparsity is None and pattern.kind == "n:m" and fixed is not None:
        return torch.tensor(fixed, dtype=torch.float64)
    if sparsity is None:
        name = pattern.kind if fixed is not None else f"n:{pattern.group}"
        raise InvalidInput(f"`sparsity` is None; pattern {name!r} needs one in [0, 1].")
    share = tensor_of("sparsity", sparsity, torch.float64).detach().cpu().double()
    for value in share[~((share >= 0) & (share <= 1))].tolist()[:1]:
        raise InvalidInput(f"`sparsity` must be in [0, 1]; got {value:g}.")
    if (
        pattern.kind == "n:m"
        and fixed is not None
        and not (share.ndim == 0 and abs(float(share) - fixed) < 1e-6)
    ):
        raise InvalidInput(
            f"`sparsity` must be None or {fixed:g} with pattern "
            f"'{pattern.kept}:{pattern.group}'; got {sparsity}."
        )
    if share.ndim and pattern.kind not in ("row", "n:m"):
        raise InvalidInput(
            f"`sparsity` must be one value with pattern {pattern.kind!r}; got "
            f"{tuple(share.shape)} values: use pattern 'row' for one per row."
        )
    if share.ndim and share.shape not in (dense.shape[1:2], dense.shape[:2]):
        raise InvalidInput(
            f"`sparsity` must be one value, or of shape {tuple(dense.shape[1:2])} or "
            f"{tuple(dense.shape[:2])}; got {tuple(share.shape)}."
        )
    return share


def _budget(
    share: Float[Tensor, "..."],
    pattern: Pattern,
    selected: Float[Tensor, "experts rows cols"],
    chosen: Int[Tensor, " rows"] | None,
) -> Int[Tensor, " experts *rows"]:
    experts, rows, cols = selected.shape
    if pattern.kind in ("layer", "block"):
        return count_zeros(share, rows * cols).expand(experts)
    if share.ndim and chosen is not None:
        share = share[..., chosen.cpu()]
    if pattern.kind == "n:m":
        return _grouped_zeros(share, pattern, cols).expand(experts, rows)
    return count_zeros(share, cols).expand(experts, rows)


def _grouped_zeros(share: Float[Tensor, "..."], pattern: Pattern, cols: int) -> Int[Tensor, "..."]:
    """Return the zeros of rows that lose a whole number of weights of every group."""
    group, counts = pattern.group, zeros_by_group(cols, pattern.group)
    if pattern.kept is not None:
        return counts[group - pattern.kept]
    zeros, asked = count_zeros(share, cols), share * group
    whole = (asked - asked.round()).abs() < _WHOLE
    zeros = torch.where(whole, counts[asked.round().long()], zeros)
    for count in zeros[~torch.isin(zeros, counts)].tolist()[:1]:
        step, rest = divmod(cols, group)
        last = f", and its share, rounded down, for the last {rest}" if rest else ""
        raise InvalidInput(
            f"`sparsity` must give every row a multiple of {step} zeros, equally many for each of "
            f"its {step} groups of {group} columns{last}; got {count}: use pattern 'row'."
        )
    return zeros


_PANEL = 1024
_PART_BYTES = 2**28

AddProduct = Callable[[Tensor, slice, Tensor], None]
"""Adds to a (experts, rows, panel) the product of some columns of the rows with a gram's part."""
Multiplier = Callable[[Tensor], AddProduct]
"""Prepares the products with some rows."""


def _in_one_product(rows: Tensor, gram: Tensor) -> Tensor:
    return torch.einsum("erc,erc->er", rows @ gram, rows)


@dispatch(_in_one_product, where=on_cpu)
def quadratic(
    rows: Float[Tensor, "experts rows cols"], gram: Float[Tensor, "experts cols cols"]
) -> Float[Tensor, "experts rows"]:
    """Return ``r G r^T`` of every row, for symmetric ``G`` of the rows' dtype.

    On a GPU the products are those of the upper triangle only, a panel of columns at a time. Those
    of float32 are exact to float32 if an NVIDIA GPU does them, whatever the precision that is set.
    """
    multiplier: Multiplier = _split if has_tf32(rows) else _plain
    bytes_each = rows.shape[1:].numel() * rows.element_size()
    at_once = max(1, _PART_BYTES // max(1, bytes_each))
    parts = zip(rows.split(at_once), gram.split(at_once), strict=True)
    return torch.cat([_by_panels(some, own, multiplier(some)) for some, own in parts])


def _by_panels(
    rows: Float[Tensor, "experts rows cols"],
    gram: Float[Tensor, "experts cols cols"],
    add_product: AddProduct,
) -> Float[Tensor, "experts rows"]:
    total = rows.new_zeros(rows.shape[:2])
    for start in range(0, rows.shape[2], _PANEL):
        panel = slice(start, min(start + _PANEL, rows.shape[2]))
        product = torch.zeros_like(rows[..., panel], memory_format=torch.contiguous_format)
        for left in range(0, start, _PANEL):
            above = slice(left, left + _PANEL)
            add_product(product, above, gram[:, above, panel])
        product.mul_(2)
        add_product(product, panel, gram[:, panel, panel])
        total += product.mul_(rows[..., panel]).sum(-1)
    return total


def _plain(rows: Float[Tensor, "experts rows cols"]) -> AddProduct:
    """Multiply in the precision that is set."""

    def add_product(product: Tensor, columns: slice, gram: Tensor) -> None:
        product.baddbmm_(rows[..., columns], gram)

    return add_product


def _split(rows: Float[Tensor, "experts rows cols"]) -> AddProduct:
    """Multiply as float32 does, by TensorFloat-32."""
    high, low = _two_parts(rows)
    exact = not bool(low.any())

    def add_product(product: Tensor, columns: slice, gram: Tensor) -> None:
        gram_high, gram_low = _two_parts(gram)
        with tensor_cores():
            product.baddbmm_(high[..., columns], gram_low)
            if not exact:
                product.baddbmm_(low[..., columns], gram_high)
            product.baddbmm_(high[..., columns], gram_high)

    return add_product


def _two_parts(values: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor]:
    """Round float32 numbers to 11 significant bits, and return what that leaves over, too."""
    bits = values.view(torch.int32).add(0x1000).bitwise_and_(~0x1FFF)
    high = bits.view(torch.float32)
    return high, values - high


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
    bits = problem.bits
    solved = weight if bits is None else quantize(weight, bits, problem.group_size)
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


def select(
    saliency: Float[Tensor, "experts rows cols"], problem: Problem
) -> Bool[Tensor, "experts rows cols"]:
    """Mark the least salient weights of `problem` in its pattern; equal ones in reading order.

    Returns
    -------
    Tensor
        True where pruned.
    """
    pattern = problem.pattern
    if pattern.kind == "row":
        return prune_smallest(saliency, problem.budget)
    if pattern.kind == "layer":
        return prune_smallest(saliency.flatten(1), problem.budget).view_as(saliency)
    if pattern.kind == "block":
        blocks = torch.split(saliency, BLOCK, dim=-1)
        return torch.cat([prune_block(block, problem.sparsity) for block in blocks], -1)
    return prune_groups(saliency, problem.zeros_a_group, pattern.group)
