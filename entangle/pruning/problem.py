"""The common entrance of all pruners: arguments checked, shapes and dtypes made uniform."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entangle.checks import tensor_of
from entangle.errors import InvalidInput, NumericalError
from entangle.pruning.factor import Factor
from entangle.pruning.masks import Pattern, count_zeros, parse_pattern
from entangle.pruning.quantize import check_bits

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
    factor: Factor | None = None
    """From `entangle.pruning.factor.inverse_factor` of the gram, if it is known already; SparseGPT
    needs no gram then."""

    @property
    def zeros_a_group(self) -> Int[Tensor, " experts *rows"]:
        """Zeros of every group of a row (``n:m``; meaningless for the other patterns)."""
        return self.budget // (self.weight.shape[2] // self.pattern.group)

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
    loss: bool = True,
) -> Problem:
    """Check the arguments that all pruners share (documented in `entangle.pruning.prune`)."""
    parsed = parse_pattern(pattern)
    dense = _check_weight(weight)
    chosen = None if rows is None else _check_rows(rows, dense.shape[1]).to(dense.device)
    if parsed.kind == "n:m" and dense.shape[2] % parsed.group:
        raise InvalidInput(
            f"`pattern` {pattern!r} needs a multiple of {parsed.group} columns; "
            f"got {dense.shape[2]}: use another n:m, or pattern 'row'."
        )
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
        bits=check_bits(bits),
        batched=weight.ndim == 3,
        wants_loss=loss,
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
    zeros = count_zeros(share, cols).expand(experts, rows)
    step = cols // pattern.group
    for count in zeros[zeros % step != 0].tolist()[:1] if pattern.kind == "n:m" else ():
        raise InvalidInput(
            f"`sparsity` must give every row a multiple of {step} zeros, equally many for each of "
            f"its {step} groups of {pattern.group} columns; got {count}: use pattern 'row'."
        )
    return zeros
