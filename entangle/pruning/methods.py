"""One entrance to all pruning methods, and those that choose a whole mask at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.checks import choice, finite, seed_of, whole
from entangle.doors import Door
from entangle.errors import EntangleError, InvalidInput
from entangle.pruning.masks import BLOCK, dead_first
from entangle.pruning.problem import (
    Problem,
    PruneResult,
    Rows,
    finish,
    mask_only,
    prepare,
    select,
)
from entangle.pruning.solver import in_groups, solve_sparsegpt
from entangle.seeding import torch_rng

Solver = Callable[..., PruneResult]
"""Solves a `Problem`, given ``damping``, ``seed`` and ``block_size`` by name."""
OwnPruner = Callable[[Tensor, Tensor | None, float | Tensor], Tensor]
"""A pruner of one's own: see `pruner`."""


def pruner(name: str, function: Any) -> Solver:
    """Return a solver that calls somebody's own function, one expert at a time.

    Parameters
    ----------
    name
        How it is called.
    function
        Takes ``weight`` (rows, cols), float32, ``gram`` (cols, cols), ``X^T X`` over the
        calibration tokens, and ``zeros`` (rows,), int64: how many zeros each row is to have. It
        returns the pruned weight, (rows, cols), with that many zeros in every row at least, and
        must not change what it is given.

    Raises
    ------
    InvalidInput
        When it is run: if it raises, returns another shape or what is not finite, changes its
        arguments, or makes fewer zeros than it should; or if the pattern is not ``"row"``.
    """
    if getattr(function, "solves_problems", False):
        solver: Solver = function
        return solver
    if not callable(function):
        raise InvalidInput(f"a pruner must be a function; {name!r} is {type(function).__name__}.")
    return partial(_own, name, function)


def _own(name: str, function: OwnPruner, problem: Problem, **_settings: object) -> PruneResult:
    if problem.pattern.kind != "row" or problem.bits is not None:
        raise InvalidInput(f"the pruner {name!r} has pattern 'row' alone, and no `bits`.")
    weights = []
    for expert, weight in enumerate(problem.weight):
        gram = None if problem.gram is None else problem.gram[expert]
        zeros = problem.budget[expert]
        before = weight.clone()
        try:
            found: object = function(weight.clone(), gram, zeros)
        except EntangleError:
            raise
        except Exception as error:
            raise InvalidInput(
                f"the pruner {name!r} failed: {type(error).__name__}: {error}"
            ) from error
        weights.append(_checked(name, found, before, zeros))
    sparse = torch.stack(weights)
    return finish(
        problem, sparse.to(problem.dense.dtype), sparse == 0, sparse.new_zeros(len(sparse))
    )


def _checked(name: str, found: object, weight: Tensor, zeros: Tensor) -> Tensor:
    """Return what a pruner gave, if it is a weight with as many zeros as asked for."""
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidInput(
            f"the pruner {name!r} must return a weight of shape {tuple(weight.shape)}; got {shape}."
        )
    found = found.to(weight)
    if not bool(found.isfinite().all()):
        raise InvalidInput(f"the pruner {name!r} returned NaN or infinity.")
    made = (found == 0).sum(1)
    short = (made < zeros).nonzero()[:, 0]
    if len(short):
        row = int(short[0])
        raise InvalidInput(
            f"the pruner {name!r} must make {int(zeros[row])} zeros in row {row}; it made "
            f"{int(made[row])}."
        )
    return found


PRUNERS: Door[Solver] = Door("pruners", pruner)
"""The pruning methods by name."""


def prune(
    weight: Float[Tensor, "*experts rows cols"],
    gram: Float[Tensor, "*experts cols cols"] | None = None,
    *,
    method: str = "sparsegpt",
    sparsity: float | int | Float[Tensor, "..."] | None = None,
    pattern: str = "row",
    rows: Rows = None,
    bits: int | None = None,
    group_size: int | None = None,
    damping: float | int = 0.01,
    seed: int = 0,
    loss: bool = True,
    block_size: int = BLOCK,
) -> PruneResult:
    """Prune one layer, or a stack of layers of one shape, without changing the inputs.

    Parameters
    ----------
    weight
        Dense weight, (rows, cols) or (experts, rows, cols), on any device. float64 is solved in
        float64, all others in float32; the result has the dtype of `weight`.
    gram
        ``X^T X`` over the calibration tokens, (cols, cols) or (experts, cols, cols), symmetric.
        Only ``"wanda"`` and ``"sparsegpt"`` need it; the others report a loss if they get it.
    method
        One of `PRUNERS`:

        ``"random"``
            Every weight draws one uniform number, and the smallest go: with one seed, the zeros at
            a lower sparsity are among those at a higher one, and a row's do not depend on `rows`.
        ``"magnitude"``
            The smallest absolute values go.
        ``"wanda"``
            The smallest ``|w_j| * ||X_j||`` go; only the gram's diagonal ``||X_j||**2`` decides.
            Weights of dead inputs (zero diagonal) go first, the smallest before the larger.
        ``"sparsegpt"``
            See `entangle.pruning.solver.solve_sparsegpt`; the weights that stay are changed, too.
    sparsity
        Share of zeros in [0, 1]: one value, or with pattern ``"row"`` or ``"n:4"`` one per row, of
        shape (rows,) or (experts, rows).
    pattern
        Where the zeros lie, for each expert by itself:

        ``"row"``
            ``sparsity * cols`` zeros in every row;
        ``"layer"``
            ``sparsity * rows * cols`` zeros in the layer, wherever they cost least;
        ``"block"``
            the published rule, one threshold over 128 columns of all rows: about ``sparsity`` of
            the weights, rows unequal (see `entangle.pruning.masks.prune_block`);
        ``"n:m"``, such as ``"2:4"``
            ``n`` weights kept of every ``m`` neighbours of a row; `sparsity` None or ``1 - n/m``;
            where ``m`` does not divide the columns, the last ``r`` keep ``ceil(n * r / m)``;
        ``"n:4"`` with the letter n and any number for m
            ``sparsity * m`` zeros in every group of ``m`` neighbours of a row: every row has an n
            of its own. ``sparsity * m`` must be a whole number, or ``sparsity * cols`` the zeros of
            a row that keeps a whole number of every group.

        Counts are exact (save for ``"block"``), rounded to the nearest integer, halves to the even
        one. Sparsity 0 gives the dense weight, bit for bit, and 1 gives zeros.
    rows
        Boolean mask or indices of the rows to prune, a tensor or a list; the others come back
        bit-identical and do not count in the sparsity of a ``"layer"`` or ``"block"``. None prunes
        all.
    bits
        Also round the kept weights of the pruned rows to ``2**bits`` evenly spaced values from each
        dense row's minimum to its maximum; zero is one of them. ``"sparsegpt"`` makes up for the
        rounding as for the pruning.
    group_size
        Beside `bits` in [2, 8]: 128 gives every 128 neighbouring columns of a row a grid of their
        own, symmetric about zero, as packed int4 and int8 experts store it
        (`entangle.pruning.grid.fit_groups`). None, the default, is one grid a row.
    damping
        For ``"sparsegpt"``: multiple of the gram's mean diagonal added to the diagonal.
    seed
        For ``"random"``.
    loss
        Whether to compute the losses, which costs about as many operations as a solve.
    block_size
        For ``"sparsegpt"``: columns whose masks are chosen together.

    Returns
    -------
    PruneResult

    Raises
    ------
    UnknownName
        For a method that does not exist.
    InvalidInput
        For a sparsity outside [0, 1], a pattern that does not fit the columns, shapes that do not
        fit each other, or a weight that is not finite.
    NumericalError
        For a gram that is not finite or cannot be factorised, or a result that overflows.

    References
    ----------
    Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
    ICLR 2024, equation 1 (Wanda).
    """
    method = choice("method", method, PRUNERS, kind="pruning method")
    damping, seed = finite("damping", damping, least=0), seed_of(seed)
    problem = prepare(
        weight, gram, sparsity=sparsity, pattern=pattern, rows=rows, bits=bits,
        group_size=group_size, loss=loss,
    )  # fmt: skip
    return solve(problem, method=method, damping=damping, seed=seed, block_size=block_size)


def solve(
    problem: Problem, *, method: str, damping: float | int, seed: int, block_size: int = BLOCK
) -> PruneResult:
    """Prune a checked problem by one of `PRUNERS` (see `prune`)."""
    method = choice("method", method, PRUNERS, kind="pruning method")
    return PRUNERS[method](problem, damping=damping, seed=seed, block_size=block_size)


def _ours(name: str, source: str) -> Callable[[Solver], Solver]:
    """Register one of our own solvers."""

    def add(function: Solver) -> Solver:
        function.solves_problems = True  # type: ignore[attr-defined]
        PRUNERS.own(name, function, source=source)
        return function

    return add


@_ours("random", "a uniform draw for every weight")
def _random(problem: Problem, *, seed: int, **_settings: object) -> PruneResult:
    return mask_only(problem, select(_draws(problem, seed).to(problem.dense.device), problem))


@_ours("magnitude", "|w|")
def _magnitude(problem: Problem, **_settings: object) -> PruneResult:
    return mask_only(problem, select(problem.weight.abs(), problem))


@_ours("wanda", "arXiv 2306.11695")
def _wanda(problem: Problem, **_settings: object) -> PruneResult:
    power = problem.need_gram().diagonal(dim1=-2, dim2=-1)
    saliency = problem.weight.abs() * power.sqrt()[:, None, :]
    return mask_only(problem, select(dead_first(saliency, problem.weight, power == 0), problem))


@_ours("sparsegpt", "arXiv 2301.00774")
def _sparsegpt(
    problem: Problem, *, damping: float | int, block_size: int, **_settings: object
) -> PruneResult:
    block_size = whole("block_size", block_size, least=1)
    return in_groups(problem, partial(solve_sparsegpt, damping=damping, block_size=block_size))


def _draws(problem: Problem, seed: int) -> Tensor:
    """Draw a uniform number for every weight to prune, as among all of the caller's experts."""
    rng, shape = torch_rng(seed, "pruning", "random"), problem.dense.shape
    for _ in range(problem.first):
        torch.rand(shape[1:], generator=rng)
    draws = torch.rand(shape, generator=rng)
    return draws if problem.rows is None else draws[:, problem.rows.cpu()]


METHODS = ("random", "magnitude", "wanda", "sparsegpt")
"""Names of our own pruners, the weakest first."""
