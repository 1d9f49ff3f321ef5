"""One entrance to all pruning methods."""

from jaxtyping import Float
from torch import Tensor

from entangle.checks import choice, finite, seed_of
from entangle.pruning import magnitude, randomly, sparsegpt, wanda
from entangle.pruning.problem import Problem, Rows, prepare
from entangle.pruning.result import PruneResult

METHODS = ("random", "magnitude", "wanda", "sparsegpt")
"""Names of the pruning methods, the weakest first."""


def prune(
    weight: Float[Tensor, "*experts rows cols"],
    gram: Float[Tensor, "*experts cols cols"] | None = None,
    *,
    method: str = "sparsegpt",
    sparsity: float | int | Float[Tensor, "..."] | None = None,
    pattern: str = "row",
    rows: Rows = None,
    bits: int | None = None,
    damping: float | int = 0.01,
    seed: int = 0,
    loss: bool = True,
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
        One of `METHODS`.
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
        ``"n:4"`` with the letter n and any number for m
            ``sparsity * m`` zeros in every group of ``m`` neighbours of a row: every row has an n
            of its own. ``sparsity * cols`` must be a multiple of ``cols / m``.

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
    damping
        For ``"sparsegpt"``: multiple of the gram's mean diagonal added to the diagonal.
    seed
        For ``"random"``.
    loss
        Whether to compute the losses, which costs about as many operations as a solve.

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
    """
    method = choice("method", method, METHODS, kind="pruning method")
    damping, seed = finite("damping", damping, least=0), seed_of(seed)
    problem = prepare(
        weight, gram, sparsity=sparsity, pattern=pattern, rows=rows, bits=bits, loss=loss
    )
    return solve(problem, method=method, damping=damping, seed=seed)


def solve(problem: Problem, *, method: str, damping: float | int, seed: int) -> PruneResult:
    """Prune a checked problem by one of `METHODS` (see `prune`)."""
    method = choice("method", method, METHODS, kind="pruning method")
    if method == "random":
        return randomly.solve(problem, seed=seed)
    if method == "magnitude":
        return magnitude.solve(problem)
    if method == "wanda":
        return wanda.solve(problem)
    return sparsegpt.solve(problem, damping=damping)
