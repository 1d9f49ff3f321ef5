"""Rules that equalise what the last zero costs, neuron for neuron."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from entangle.allocation.budget import Wish
from entangle.allocation.measurements import Measurements
from entangle.allocation.request import Request
from entangle.allocation.rows import Reals
from entangle.allocation.sensitivity import output_sensitivity
from entangle.errors import InvalidInput, NumericalError
from entangle.models.layers import Layer
from entangle.precision import accumulator_dtype, full_precision
from entangle.pruning import prune

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
