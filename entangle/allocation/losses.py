"""Rules that equalise what the last zero costs, neuron for neuron.

How much the model's own loss cares about each neuron's output.

Run a model with every block twice: dense, and pruned on the same inputs.

NeuroAL: the schedule of sparsities that leaves the layers' inputs most alike.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from entangle.allocation.allocation import LayerRows, Reals
from entangle.allocation.measurements import Measurements, square_sum
from entangle.allocation.request import Request, Wish, keep_more
from entangle.errors import InvalidInput, NumericalError
from entangle.models.layers import Layer, find_blocks
from entangle.precision import accumulator_dtype, full_precision
from entangle.pruning import prune
from entangle.pruning.masks import prune_smallest
from entangle.recording.hooks import Change, Edit, changed_rows, edit, forward, look_at
from entangle.recording.recorder import Recorded, Recorder
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet


class _Tap(torch.autograd.Function):
    """The identity, whose backward pass shows the gradient to ``sink``."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
        ctx.sink = sink
        return output.clone()  # a model may add to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.sink(grads[0])
        return grads[0], None


def output_sensitivity(measured: Measurements) -> dict[str, Float[Tensor, " _"]]:
    """Return the mean squared gradient of the loss with respect to each neuron's output.

    Times the mean squared error that pruning makes in that output, and halved, it estimates what
    the error adds to the loss of a token (empirical Fisher information, with gradients and errors
    taken as independent).

    One forward and backward pass, a sequence at a time. The loss is the summed cross-entropy of the
    next token; for a model without logits (an encoder) it is a random projection of its last
    hidden states, whose squared gradient is in expectation that of all of them together.

    Parameters
    ----------
    measured
        Model, layers and calibration set.

    Returns
    -------
    dict
        (out_features,) by layer name, float64 on the CPU.
    """
    module = measured.model.module
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        square = square_sum(gradient.detach().flatten(0, -2)).cpu().double()
        sums[name] = sums[name] + square if name in sums else square

    def tap(name: str, output: Tensor) -> Tensor:
        return tapped(output, partial(add, name))

    edits: list[Edit] = [(layer, partial(tap, layer.name)) for layer in measured.layers]
    measured.progress.start(measured.calibration.n_seq, "sequences")
    with torch.inference_mode(False), torch.enable_grad(), edit(edits):
        for index, ids in measured.calibration.batches(1):
            text_loss(module, ids.to(measured.model.device), index).backward()
            measured.progress.advance()
    tokens = measured.calibration.n_tokens
    return {layer.name: sums[layer.name] / tokens for layer in measured.layers}


def tapped(tensor: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
    """Return a tensor whose gradient a backward pass shows to ``sink``."""
    followed = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    found: Tensor = _Tap.apply(followed, sink)  # type: ignore[no-untyped-call]
    return found


def text_loss(module: nn.Module, ids: Int[Tensor, "sequences tokens"], index: int) -> Tensor:
    """Return the summed cross-entropy of the next tokens, or what stands for it.

    For a model without logits a projection of its last hidden states; ``index`` seeds it.
    """
    accepted = inspect.signature(module.forward).parameters
    found = module(ids, **({"use_cache": False} if "use_cache" in accepted else {}))
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        flat = logits[:, :-1].flatten(0, 1).float()
        return nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")
    hidden = found if isinstance(found, Tensor) else found[0]
    signs = torch.randint(2, hidden.shape, generator=torch_rng(0, "projection", index)) * 2 - 1
    return (hidden.float() * signs.to(hidden.device)).sum()


REACH = 0.2
"""How far a neuron's sparsity may be from its layer's, where that leaves room on both sides."""
STEEPNESS = (0.5, 100.0)
"""Range of ``d log(loss) / d sparsity`` that is believed; beyond it the nearer end is taken."""
_FAINT = 1e-9  # of a layer's mean loss: smaller ones are as good as none


def loss(request: Request) -> Wish:
    """Give each neuron the sparsity at which its last zero costs as much as any other's.

    Uniform sparsity wastes weights on neurons that SparseGPT can reconstruct from few, and starves
    those that it cannot. The cheapest way to place a layer's zeros makes the marginal loss per
    zero, ``∂loss_r / ∂zeros_r``, the same for all its neurons (the Lagrangian condition). The loss
    of each neuron (squared output error after SparseGPT) is measured at a lower and a higher
    sparsity, `REACH` around the layer's, and taken as exponential between the two; sparsities stay
    inside that range. Losses are relative to the layer's output energy.

    Squared error alone undervalues entangled neurons: their outputs matter where they are far from
    Gaussian, which a mean over tokens hides. So a neuron's loss counts ``exp(strength · z)`` times,
    z the z-score of its score (``by``, WD by default) within the layer. Strength 0 is the pure
    Lagrangian allocation. With ``across="layer"`` the layers' shares follow the mean WD instead of
    being equal.

    One pass over the calibration set, and two SparseGPT solves of each layer.
    """
    return _equalised(request, np.zeros(len(request.rows.weights)))


def sensitivity(request: Request) -> Wish:
    """Equalise what the last zero adds to the model's own loss, across all layers.

    As `loss`, but a neuron's squared error is weighed by the mean squared gradient of the model's
    loss with respect to its output (`output_sensitivity`), so that errors of different layers are
    in one currency, and by default neurons of all layers compete: how sparse a layer is follows
    from it, with no rule of layers in between. The weight ``exp(strength · z)`` of the score stays:
    a gradient is local, and an entangled neuron's error is not small.

    One forward pass, one forward and backward pass, and two SparseGPT solves of each layer.
    """
    measured = request.measurements()
    rows = request.rows
    found = measured.once("sensitivity", lambda: rows.join(output_sensitivity(measured)))
    floor = _FAINT * max(float(found.mean()), np.finfo(np.float64).tiny)
    return _equalised(request, np.log(np.maximum(found, floor)), absolute=True)


def depth(request: Request) -> Wish:
    """Let the layers' mean score decide between layers, and the loss between their neurons.

    WD says which layers are entangled, but within a layer few neurons stand out and the many others
    are told apart better by how well they can be reconstructed. The rule `layer` sets each layer's
    sparsity by its mean WD, and within it neurons are equalised as in `loss`, with their own WD as
    a weight.
    """
    return loss(request)


def _equalised(request: Request, importance: Reals, *, absolute: bool = False) -> Wish:
    """Solve the Lagrangian condition up to the multiplier, which is the budget's common shift.

    With ``log loss = a + b · s`` and importance m (a log), the condition
    ``m + a + b · s + log b − log n = μ`` gives ``s = (μ − m − a − log b + log n) / b``: a wish at
    some μ, and a gain of ``1 / b``.
    """
    rows, base = request.rows, request.base
    reach = np.minimum(REACH, np.minimum(base, (1 - base) / 2))
    low, high = base - reach, base + reach
    energy, first, last = _losses(request, low, high)
    if not absolute:
        first, last = first / rows.spread(energy), last / rows.spread(energy)
    width = np.maximum(high - low, 1e-12)
    steep = np.clip(np.log(last / first) / width, *STEEPNESS)
    middle = (np.log(first) + np.log(last)) / 2
    score = request.columns.zscores(request.score(), across_layers=False)
    wanted = np.log(rows.weights) - np.log(steep) - importance - middle
    wanted = wanted - request.settings.strength * score
    center = wanted - (
        rows.spread(rows.mean(wanted)) if request.target is not None else wanted.mean()
    )
    return request.limit(request.wish(base + center / steep, gain=1 / steep), low, high)


def _losses(request: Request, low: Reals, high: Reals) -> tuple[Reals, Reals, Reals]:
    """Return each layer's output energy, and each neuron's loss at two sparsities, all positive."""
    rows, measured = request.rows, request.measurements()
    ends = np.stack([low[rows.starts], high[rows.starts]], axis=1)
    whole = np.rint(ends * rows.widths[:, None])  # zeros of a row, which is all that is solved for
    key = ("losses", *whole.flatten().tolist())
    found = measured.once(key, lambda: _measure(measured, ends))
    energy, first, last = found[: len(rows.names)], *np.split(found[len(rows.names) :], 2)
    floors = rows.spread(_FAINT * np.maximum(rows.mean(last), np.finfo(np.float64).tiny / _FAINT))
    first = np.maximum(first, floors)
    return np.maximum(energy, np.finfo(np.float64).tiny), first, np.maximum(last, first)


def _measure(measured: Measurements, ends: Reals) -> Reals:
    """Return the energies of all layers, then all losses at the lower and at the higher end."""
    place = {name: i for i, name in enumerate(measured.names)}
    energy = np.zeros(len(place))
    losses: dict[str, Tensor] = {}
    for layers, gram in measured.grams():
        for layer in layers:
            i = place[layer.name]
            low, high = ends[i].tolist()
            losses[layer.name] = _solve(layer, gram.gram, (low, high))
            energy[i] = _energy(layer.weight.float(), gram.gram)
    both = torch.cat([losses[name] for name in measured.names], dim=1)
    return np.concatenate([energy, both.numpy().flatten()])


def _energy(weight: Float[Tensor, "rows cols"], gram: Float[Tensor, "cols cols"]) -> float:
    """Return the sum over tokens and neurons of the squared output."""
    with full_precision():
        return float(((weight @ gram) * weight).sum(dtype=accumulator_dtype(weight.device)))


def _solve(
    layer: Layer, gram: Float[Tensor, "cols cols"], ends: tuple[float, float]
) -> Float[Tensor, "2 rows"]:
    """Return what SparseGPT loses in each row at two sparsities, float64."""
    try:
        found = [prune(layer.weight, gram, sparsity=one).loss_per_neuron for one in ends]
    except (InvalidInput, NumericalError) as error:
        raise type(error)(f"{layer.name}: {error}") from error
    return torch.stack(found).cpu().double()


SEQUENCES = 8
"""Calibration sequences that are run, all in one batch, so of one length (`_first`)."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """How much pruning changes the inputs of layers inside their own block."""

    error: float
    """Sum over layers of ``‖n / Σn − n' / Σn'‖₂ / in_features``, n and n' the norms of the inputs
    over the tokens, dense and pruned."""
    difference: Mapping[str, Float[Tensor, " _"]]
    """``n − n'`` of each layer, (in_features,)."""


@contextmanager
def aligner(
    measured: Measurements,
) -> Iterator[Callable[[Mapping[str, Float[Tensor, " _"]]], Alignment]]:
    """Yield a function that tells how much pruning to given sparsities changes layers' inputs.

    Sparsities are of each neuron, by layer name. Block after block is pruned by Wanda, and the
    inputs of its layers are compared before and after: each block runs twice on what comes out of
    the pruned blocks before it, dense, which also gives the norms for Wanda, and pruned, which is
    handed on. Weights are put back bit for bit. Layers outside the blocks are not pruned.

    Parameters
    ----------
    measured
        Model, layers and calibration set.
    """
    doubled = _Doubled(measured)
    blocks = find_blocks(measured.model.module)[1]
    with doubled.recorder.watching(), _replaced(blocks, doubled.run_twice):
        yield doubled.align


class _Doubled:
    """What is pruned, and the sums of squares of inputs seen so far."""

    def __init__(self, measured: Measurements) -> None:
        self.layers = tuple(layer for layer in measured.layers if layer.block is not None)
        self._module, self._ids = measured.model.module, _first(measured.calibration)
        self._sparsity: Mapping[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        dense = Recorder(self.layers, lambda _seen: None, affine="pruning")
        dense.run(self._module, [(0, self._ids)])
        habits = look_at(self._module, self.layers, self._ids)
        self.recorder = Recorder(self.layers, self._note, compared=False, habits=habits)
        """Watches the layers, whose weights change meanwhile."""

    def align(self, sparsity: Mapping[str, Float[Tensor, " _"]]) -> Alignment:
        """Run the model once, every block twice."""
        self._sparsity = sparsity
        self._dense: dict[str, Tensor] = {}
        self._sparse: dict[str, Tensor] = {}
        with self.recorder.one_pass(tuple(self._ids.shape)):
            forward(self._module, self._ids)
        norms = {
            name: (self._dense[name].sqrt(), after.sqrt()) for name, after in self._sparse.items()
        }
        error = sum(
            float((before / before.sum() - after / after.sum()).nan_to_num().norm()) / len(before)
            for before, after in norms.values()
        )
        return Alignment(error, {name: before - after for name, (before, after) in norms.items()})

    def _note(self, seen: Recorded) -> None:
        """Add the squares of an input to the sums of the run that is on."""
        name = seen.layer.name
        self._squares[name] = self._squares.get(name, 0) + square_sum(seen.inputs)

    def run_twice(self, index: int, run: Callable[[], Any]) -> Any:
        """Run a block dense, then pruned; return what the pruned one gives."""
        layers = [layer for layer in self.layers if layer.block == index]
        self._squares = self._dense
        found = run()
        seen = [layer for layer in layers if layer.name in self._dense]
        if not seen:
            return found
        self._squares = self._sparse
        with _pruned(seen, self._dense, self._sparsity):
            return run()


def _first(calibration: CalibrationSet) -> Int64[Tensor, "sequences tokens"]:
    """Return the first sequences that are long enough; of unequal ones as makes most tokens."""
    rows = calibration.rows
    falling = sorted(rows.lengths, reverse=True)[:SEQUENCES]
    count = max(range(1, len(falling) + 1), key=lambda n: (n * falling[n - 1], n))
    length = falling[count - 1]
    long = (i for i, own in enumerate(rows.lengths) if own >= length)
    return torch.stack([rows.sequence(i)[:length] for i in islice(long, count)])


@contextmanager
def _pruned(
    layers: Sequence[Layer], squares: Mapping[str, Tensor], sparsity: Mapping[str, Tensor]
) -> Iterator[None]:
    """Zero the weights of least ``|w| · ‖X_j‖₂`` of each row inside the ``with`` block."""
    changes: list[Change] = []
    for layer in layers:
        weight = layer.weight
        saliency = weight.abs().float() * squares[layer.name].sqrt().float()
        budget = (sparsity[layer.name] * weight.shape[1]).long().to(weight.device)
        pruned = weight.masked_fill(prune_smallest(saliency, budget), 0)
        changes.append((layer, torch.arange(layer.out_features), pruned))
    with changed_rows(changes):
        yield


@contextmanager
def _replaced(
    blocks: nn.ModuleList, call: Callable[[int, Callable[[], Any]], Any]
) -> Iterator[None]:
    """Call ``call(index, run)`` where block ``index`` is called; ``run()`` is the block itself."""
    own = [block.__dict__.get("forward") for block in blocks]  # accelerate, for one, sets it
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = partial(_call, call, index, block.forward)
        yield
    finally:
        for block, kept in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            block.__dict__.update({} if kept is None else {"forward": kept})


def _call(
    call: Callable[[int, Callable[[], Any]], Any],
    index: int,
    run: Callable[..., Any],
    *args: object,
    **kwargs: object,
) -> Any:
    return call(index, partial(run, *args, **kwargs))


_RANGES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25)
_WIDE_UP_TO = 0.8  # at this sparsity and above the widest range is not tried for blocks
_LOWEST, _HIGHEST = 0.01, 0.99


def neuroal_blocks(request: Request) -> Wish:
    """Let sparsity grow linearly with depth, by the range that aligns the inputs best.

    Of the ranges ± λ, λ from 0.01 to 0.25, that with the smallest sum over the layers of
    ``‖n / Σn − n' / Σn'‖₂ / in_features``, with n and n' the norms of a layer's inputs before and
    after its block is pruned by Wanda (`entangle.allocation.losses.aligner`), on the first 8
    sequences of the calibration set.

    References
    ----------
    Cunegatti, Custode, Iacca, "Zeroth-Order Adaptive Neuron Alignment Based Pruning without
    Re-Training", arXiv 2411.07066; rule as in ``sparsity_distribution.py`` and ``lib/neuroal.py``
    of github.com/eliacunegatti/NeuroAL.
    """
    rows, measured = request.rows, request.measurements()
    sparsity = request.settings.sparsity
    chosen = measured.once(("neuroal", sparsity), lambda: _best_schedule(measured, rows, sparsity))
    return request.wish(chosen)


def neuroal(request: Request) -> Wish:
    """Give fewer zeros to neurons whose output, as the next layer's input, pruning shrinks most.

    Within each layer's sparsity, which `neuroal_blocks` gives by default. A neuron's score is
    ``n − n'`` of the input that it feeds: the input of the layers that run next, where that has as
    many features as the layer has neurons. The share kept is the score scaled to a range of ± λ and
    recentred; λ from 0 to 0.25 is chosen as for the blocks. Layers of the last block, and those
    that feed no such input (fused or grouped projections), stay uniform.

    References
    ----------
    As `neuroal_blocks`. The published code uses this step with Wanda and magnitude pruning only.
    """
    rows, measured = request.rows, request.measurements()
    base = request.base
    target = dict(zip(rows.names, base[rows.starts].tolist(), strict=True))
    best = base
    with aligner(measured) as align:
        found = align(rows.split_reals(base))
        scores, error = _fed(measured, found.difference), found.error
        for strength in _RANGES:
            tried = {name: part.numpy() for name, part in rows.split_reals(base).items()}
            for name, score in scores.items():
                tried[name] = keep_more(score, target[name], strength).clip(_LOWEST, _HIGHEST)
            joined = np.concatenate([tried[name] for name in rows.names])
            reached = align(rows.split_reals(joined)).error
            if reached < error:
                best, error = joined, reached
    return request.wish(best)


def _best_schedule(measured: Measurements, rows: LayerRows, sparsity: float | int) -> Reals:
    """Return the sparsity of each layer under the best linear schedule."""
    depth = np.arange(int(rows.groups.max()) + 1, dtype=np.float64)
    ranges = [one for one in _RANGES if sparsity < _WIDE_UP_TO or one <= 0.2]
    schedules = [keep_more(-depth, sparsity, one).clip(_LOWEST, _HIGHEST) for one in ranges]
    with aligner(measured) as align:
        spread = (rows.split_reals(rows.spread(one[rows.groups])) for one in schedules)
        errors = [align(one).error for one in spread]
    return schedules[int(np.argmin(errors))][rows.groups]


def _fed(measured: Measurements, difference: Mapping[str, Float[Tensor, " _"]]) -> dict[str, Reals]:
    """Return the score of each neuron of every layer that feeds the next input."""
    last = max((layer.block for layer in measured.layers if layer.block is not None), default=-1)
    scores = {}
    for group, following in zip(measured.groups, measured.groups[1:], strict=False):
        score = difference.get(following[0].name)
        for layer in group:
            fits = score is not None and len(score) == layer.out_features
            if fits and score is not None and layer.block not in (None, last):
                scores[layer.name] = score.double().cpu().numpy()
    return scores
