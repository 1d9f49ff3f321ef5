"""All rules by name.

Rules that need no model: sparsities from columns of the scores.

AlphaPruning: layers with heavier-tailed spectra are less sparse.

OWL: blocks with more outlying weights are less sparse.

TRIM: sparsities of rows, moved towards those whose outputs survive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from entangle.allocation import losses
from entangle.allocation.allocation import Counts, Reals
from entangle.allocation.losses import neuroal, neuroal_blocks
from entangle.allocation.measurements import Measurements
from entangle.allocation.request import Request, Wish, keep_more, min_max
from entangle.checks import share
from entangle.doors import Door
from entangle.errors import EntangleError, InvalidInput, NumericalError
from entangle.models.layers import Layer
from entangle.precision import accumulator_dtype, full_precision


def uniform(request: Request) -> Wish:
    """Give every layer the same sparsity."""
    return request.wish(np.full(len(request.rows.names), request.settings.sparsity))


def by_layer(request: Request) -> Wish:
    """Give layers with a larger mean score a smaller sparsity.

    The layers' mean scores are scaled to a range of ``2 · strength``, as OWL does with its own
    score.
    """
    means = request.rows.mean(request.score())
    return request.wish(keep_more(means, request.settings.sparsity, request.settings.strength))


def protect(request: Request) -> Wish:
    """Keep the neurons of the largest scores at one low sparsity; all others pay evenly.

    A share ``protect`` of the neurons, rounded to the nearest integer but at least one, of every
    layer, or of all together where they compete across layers; of equal scores the earlier neuron.
    """
    wish = request.wish(request.base)
    if request.settings.protect == 0:
        return wish
    chosen = _top(request)
    kept = request.settings.protect_sparsity
    return replace(
        wish,
        sparsity=np.where(chosen, kept, wish.sparsity),
        low=np.where(chosen, kept, wish.low),
        high=np.where(chosen, kept, wish.high),
    )


def _top(request: Request) -> np.ndarray:
    """Mark the share ``protect`` of the neurons with the largest scores."""
    rows, score = request.rows, request.score()
    if request.target is None:
        layer, counts = np.zeros_like(rows.layer), np.array([len(score)])
    else:
        layer, counts = rows.layer, rows.counts
    wanted = np.maximum(1, np.rint(request.settings.protect * counts)).astype(np.int64)
    order = np.lexsort((-score, layer))
    place = np.arange(len(score)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(score), dtype=bool)
    chosen[order] = place < np.repeat(wanted, counts)
    return chosen


def linear(request: Request) -> Wish:
    """Take ``strength`` off the sparsity for each standard deviation of the score."""
    z = request.columns.zscores(request.score(), across_layers=request.target is None)
    return request.wish(request.base - request.settings.strength * z)


def rank(request: Request) -> Wish:
    """Spread sparsities evenly over ± ``strength`` by the rank of the score."""
    ranks = request.columns.ranks(request.score(), across_layers=request.target is None)
    return request.wish(request.base + request.settings.strength * (1 - 2 * ranks))


_BINS = 100
_CHUNK = 2**24  # entries of a table of candidates against eigenvalues


def alphapruning(request: Request) -> Wish:
    """Set each block's sparsity by the mean power-law exponent of its layers' spectra.

    Exponents (`power_law_exponent`) are averaged over the layers of a block, scaled linearly to
    [1 − ε, 1 + ε] with ε = ``strength`` (0.3 by default), and multiplied by the one factor that
    makes the weighted mean the sparsity asked for. A large exponent (a light tail) is pruned more.
    Needs the weights only.

    References
    ----------
    Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise
    Pruning of Large Language Models", NeurIPS 2024, arXiv 2410.10912; rule as ``ww_sparsity`` in
    ``lib/prune.py`` of github.com/haiquanlu/AlphaPruning, block-wise.
    """
    rows, measured = request.rows, request.measurements()
    spread = request.settings.strength
    spread = share("strength", spread, one=False)
    exponents = measured.once("alpha", lambda: np.array([_exponent(x) for x in measured.layers]))
    counts = np.bincount(rows.groups)
    means = np.bincount(rows.groups, weights=exponents) / counts
    shape: Reals = (1 - spread + 2 * spread * min_max(means[rows.groups])).astype(np.float64)
    scaled = shape * request.settings.sparsity
    return request.wish(scaled, gain=shape)


def _exponent(layer: Layer) -> float:
    try:
        return power_law_exponent(layer.weight)
    except NumericalError as error:
        raise NumericalError(f"{layer.name}: {error}") from error


def power_law_exponent(weight: Float[Tensor, "rows cols"]) -> float:
    """Estimate the exponent of the power law that the tail of a weight's spectrum follows.

    The eigenvalues of ``W Wᵀ`` above a lower end ``x_min`` give, by Hill's estimator,
    ``α = 1 + n / Σ log(λ_i / x_min)``. The lower end is the eigenvalue whose tail lies closest to
    its power law in Kolmogorov–Smirnov distance, among those up to 1.5 times the most frequent
    eigenvalue (the left edge of the fullest of 100 bins in log10 λ) and, as in the published code,
    above the *logarithm* of 0.95 times it. Eigenvalues that vanish in float32 are left out.

    Raises
    ------
    NumericalError
        If fewer than two eigenvalues differ from zero.

    References
    ----------
    ``net_esd_estimator`` with ``xmin_peak`` in ``lib/esd_utils.py`` of
    github.com/haiquanlu/AlphaPruning.
    """
    eigenvalues = _spectrum(weight)
    if len(eigenvalues) < 2 or float(eigenvalues[0]) == float(eigenvalues[-1]):
        raise NumericalError(
            f"a weight of shape {tuple(weight.shape)} has fewer than two different eigenvalues, so "
            "its spectrum has no tail; leave the layer out or choose another rule."
        )
    tried = _candidates(eigenvalues)
    logs = eigenvalues.log()
    tails = logs.flip(0).cumsum(0).flip(0)
    best, exponent = np.inf, np.nan
    for part in tried.split(max(1, _CHUNK // len(eigenvalues))):
        size = len(eigenvalues) - part
        alpha = 1 + size / (tails[part] - size * logs[part])
        distance = _distances(logs, part, alpha).where(alpha > 1, 1.0)
        found = int(distance.argmin())
        if float(distance[found]) < best:
            best, exponent = float(distance[found]), float(alpha[found])
    return exponent


def _spectrum(weight: Float[Tensor, "rows cols"]) -> Float[Tensor, " n"]:
    """Return the eigenvalues of ``W Wᵀ`` that do not vanish, ascending, float64 on the CPU."""
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    wide = weight.to(device, torch.float64)
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    found: Tensor = torch.linalg.eigvalsh(wide @ wide.T).cpu()
    smallest = torch.finfo(torch.float32).eps ** 2 * found[-1]
    return found[found > smallest]


def _candidates(eigenvalues: Float[Tensor, " n"]) -> Tensor:
    """Return the indices of the eigenvalues to try as lower end, all but the last at most."""
    logs = eigenvalues.log10()
    counts = torch.histc(logs, _BINS, min=float(logs[0]), max=float(logs[-1]))
    edges = torch.linspace(float(logs[0]), float(logs[-1]), _BINS + 1, dtype=logs.dtype)
    peak = 10 ** float(edges[int(counts.argmax())])
    inside = (eigenvalues >= np.log10(0.95 * peak)) & (eigenvalues <= 1.5 * peak)
    inside[-1] = False
    found = inside.nonzero()[:, 0]
    return found if len(found) else torch.arange(1)


def _distances(
    logs: Float[Tensor, " n"], first: Tensor, alpha: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """Return the largest gap between each tail's distribution and its power law."""
    index = torch.arange(len(logs))
    size = len(logs) - first
    law = 1 - torch.exp((logs - logs[first, None]) * (1 - alpha)[:, None])
    seen = (index - first[:, None]) / size[:, None]
    return (law - seen).abs().masked_fill(index < first[:, None], 0.0).amax(1)


OUTLIER = 5.0
"""A weight is outlying if its saliency is more than this many times its block's mean (M)."""


def owl(request: Request) -> Wish:
    """Set each block's sparsity by its share of outlying weights.

    A weight's saliency is ``|W_ij| · ‖X_j‖₂``; a block's score is the share of its weights (those
    to be pruned) with a saliency above `OUTLIER` times the block's mean. The share kept is the
    score scaled to a range of ``2 · strength`` (λ, 0.08 by default), moved to a mean over blocks of
    ``1 − sparsity``. All layers of a block get the same; a layer outside the blocks counts as one.
    The budget is then met exactly by a common shift, where the published code leaves it open when
    blocks are of unequal size. One pass over the calibration set.

    References
    ----------
    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv 2310.05175; rule as in
    ``lib/prune_all.py`` of github.com/luuyin/OWL.
    """
    groups, measured = request.rows.groups, request.measurements()
    score = measured.once("owl", lambda: outlier_shares(measured, groups))
    settings = request.settings
    return request.wish(keep_more(score, settings.sparsity, settings.strength)[groups])


def outlier_shares(measured: Measurements, groups: Counts) -> Reals:
    """Return the share of outlying weights of each group of layers.

    Parameters
    ----------
    measured
        Layers, and the norms of their inputs.
    groups
        Index of each layer's group.
    """
    shares = []
    for group in range(int(groups.max()) + 1):
        members = [measured.layers[i] for i in np.flatnonzero(groups == group)]
        shares.append(
            outlier_share([layer.weight for layer in members],
                          [measured.input_norms[layer.name] for layer in members])
        )  # fmt: skip
    return np.array(shares)


def outlier_share(
    weights: Sequence[Float[Tensor, "_ _"]], norms: Sequence[Float[Tensor, " _"]]
) -> float:
    """Return the share of weights whose saliency exceeds `OUTLIER` times the mean of all.

    Parameters
    ----------
    weights
        Weights of some layers, each (out_features, in_features).
    norms
        Norms of the inputs of each layer, (in_features,).
    """
    count = sum(weight.numel() for weight in weights)
    total = sum(
        float((weight.float().abs().sum(0, dtype=norm.dtype) * norm).sum())
        for weight, norm in zip(weights, norms, strict=True)
    )
    limit = OUTLIER * total / count
    above = sum(
        int(torch.count_nonzero(weight.float().abs() * norm.float() > limit))
        for weight, norm in zip(weights, norms, strict=True)
    )
    return above / count


CEILING = 0.95
"""No row is made sparser than this, unless its layer is."""
_RATES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
_BACKWARD_RATES = (-0.01, -0.02, -0.04)
_STEPS = 10


def trim(request: Request) -> Wish:
    """Give more zeros to neurons whose outputs keep their direction best.

    For each layer by itself (see `trim_rows`), starting from the layer's sparsity. Similarities of
    outputs are quadratic forms in the layer's Gram matrix ``XᵀX``, so that one pass over the
    calibration set serves all steps. Inputs are those of the dense model; the published code takes
    them from the blocks pruned so far.

    References
    ----------
    Beck, Rudman, Eickhoff, "TRIM: Achieving Extreme Sparsity with Targeted Row-wise Iterative
    Metric-driven Pruning", arXiv 2505.16743; rule as in ``lib/trim.py`` of github.com/flobk/TRIM
    with its default metrics.
    """
    rows, measured = request.rows, request.measurements()
    base = request.base
    target = dict(zip(rows.names, base[rows.starts].tolist(), strict=True))
    found: dict[str, Tensor] = {}
    for layers, gram in measured.grams():
        for layer in layers:
            found[layer.name] = trim_rows(layer.weight, gram.gram, target[layer.name])
    wish = request.wish(rows.join(found))
    return request.limit(wish, np.zeros_like(base), np.maximum(CEILING, base))


def trim_rows(
    weight: Float[Tensor, "rows cols"], gram: Float[Tensor, "cols cols"], target: float
) -> Float[Tensor, " rows"]:
    """Return a sparsity for every row of one layer, with mean ``target``.

    From uniform sparsity, 10 steps are made: row d moves by
    ``2 · rate · (minmax(q_d) − mean of minmax(q))``, with q_d the cosine similarity of its dense
    and pruned outputs; then rows are clipped to [0, 0.95] and recentred. The step with the largest
    similarity of the layer's whole output is kept. Rates grow from 0.01 to 0.16 while that helps;
    where none helps, negative ones are tried. Rows are pruned by Wanda.

    Parameters
    ----------
    weight
        Dense weight.
    gram
        ``XᵀX`` of the layer's inputs.
    target
        Mean sparsity of the rows.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with full_precision():
        problem = _Problem.of(weight.to(dtype), gram.to(dtype))
        wide = accumulator_dtype(weight.device)
        start = torch.full((len(weight),), target, dtype=wide, device=weight.device)
        baseline = problem.similarity(start)[1]
        for rates in (_RATES, _BACKWARD_RATES):
            best, quality = start, baseline
            reached = -np.inf
            for rate in rates:
                tried, similarity = _walk(problem, start, rate)
                if similarity > quality:
                    best, quality = tried, similarity
                if similarity <= reached:
                    break
                reached = similarity
            if quality > baseline:
                break
    return best


def _walk(
    problem: "_Problem", start: Float[Tensor, " rows"], rate: float
) -> tuple[Float[Tensor, " rows"], float]:
    """Make the steps of one rate; return the best sparsities met and their quality."""
    target = start.mean()
    sparsity = start
    rows, quality = problem.similarity(start)
    best = start
    for _ in range(_STEPS):
        low, high = rows.aminmax()
        moved = 2 * rate * (rows - low) / (high - low + 1e-6)
        sparsity = (sparsity + moved - moved.mean()).clamp(0, CEILING)
        sparsity = sparsity - sparsity.mean() + target
        rows, similarity = problem.similarity(sparsity)
        if similarity > quality:
            best, quality = sparsity, similarity
    return best, quality


@dataclass(frozen=True, eq=False)
class _Problem:
    """A layer, its Gram matrix, and the order in which Wanda prunes its weights."""

    weight: Float[Tensor, "rows cols"]
    gram: Float[Tensor, "cols cols"]
    place: Int[Tensor, "rows cols"]
    """Place of each weight in its row, the least salient first."""
    product: Float[Tensor, "rows cols"]
    """``W G``."""
    energy: Float[Tensor, " rows"]
    """Squared norm of each row's output."""

    @classmethod
    def of(cls, weight: Float[Tensor, "rows cols"], gram: Float[Tensor, "cols cols"]) -> "_Problem":
        saliency = weight.abs() * gram.diagonal().sqrt()
        order = saliency.sort(dim=-1, stable=True).indices
        place = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)
        places = torch.empty_like(order, dtype=torch.int32)
        places.scatter_(1, order, place.expand_as(places))
        product = weight @ gram
        wide = accumulator_dtype(weight.device)
        return cls(weight, gram, places, product, (product * weight).sum(1, dtype=wide))

    def similarity(self, sparsity: Float[Tensor, " rows"]) -> tuple[Float[Tensor, " rows"], float]:
        """Return the cosine similarity of each row's outputs, and that of all together."""
        count = (sparsity * self.weight.shape[1]).long()
        kept = self.weight.masked_fill(self.place < count[:, None], 0)
        wide = self.energy.dtype
        cross = (self.product * kept).sum(1, dtype=wide)
        energy = ((kept @ self.gram) * kept).sum(1, dtype=wide)
        rows = _cosine(cross, self.energy, energy)
        return rows, float(_cosine(cross.sum(), self.energy.sum(), energy.sum()))


def _cosine(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return ``cross / √(first · second)`` in [-1, 1]; 0 where an output vanishes."""
    norm = (first.clamp(min=0) * second.clamp(min=0)).sqrt()
    return torch.where(norm > 0, cross / norm, 0.0).clamp(-1, 1)


MODEL = "model"
"""Value of ``across`` that lets neurons of all layers compete."""


def erk(request: Request) -> Wish:
    """Give layers densities that are proportional to (rows + columns) / (rows · columns).

    The Erdős–Rényi rule: layers whose density would pass 1 are dense, and the others share what is
    left. No data and no weights are looked at.

    References
    ----------
    Evci et al., "Rigging the Lottery", arXiv 1911.11134, section 3.
    """
    rows = request.rows
    out, cols = rows.counts.astype(np.float64), rows.widths.astype(np.float64)
    weights, raw = out * cols, (out + cols) / (out * cols)
    budget = (1 - request.settings.sparsity) * weights.sum()
    dense = np.zeros(len(out), dtype=np.bool_)
    while True:
        free = ~dense
        left = budget - weights[dense].sum()
        factor = max(0.0, left) / max(float((raw * weights)[free].sum()), 1e-300)
        over = free & (factor * raw > 1)
        if not over.any():
            break
        dense |= over
    density = np.where(dense, 1.0, factor * raw)
    return request.wish(1 - density, gain=np.where(dense, 0.0, density))


def magnitude_global(request: Request) -> Wish:
    """Give rows the zeros that one threshold on |w| makes in all layers together.

    With the magnitude pruner that is global magnitude pruning, to the weight.

    References
    ----------
    Jaiswal et al., "The Emergence of Essential Sparsity in Large Pre-trained Models",
    arXiv 2306.03805.
    """
    measured = request.measurements()
    sizes = torch.cat([layer.weight.abs().float().flatten().cpu() for layer in measured.layers])
    zeros = round(request.settings.sparsity * len(sizes))
    if zeros == 0:
        return request.wish(np.zeros(len(request.rows.weights)))
    threshold = sizes.kthvalue(zeros).values
    below = [(layer.weight.abs().float().cpu() <= threshold).sum(1) for layer in measured.layers]
    wished = torch.cat(below).numpy() / request.rows.weights
    return request.wish(wished.astype(np.float64))


@dataclass(frozen=True, eq=False)
class Rule:
    """An allocation rule."""

    summary: str
    """One line for a listing."""
    wish: Callable[[Request], Wish]
    """Makes one wish a neuron, or one a layer for a rule of layers."""
    of_layers: bool = False
    """Whether it decides how sparse layers are, all neurons of one alike."""
    across: str = "uniform"
    """For a rule of neurons: the rule of layers that it keeps to by default, or ``model``."""
    strength: float = 0.0
    """Default of ``strength``; 0 for a rule without one."""
    calibrated: bool = False
    """Whether it needs the model and a calibration set."""
    weighed: bool = False
    """Whether it needs the model's weights."""
    scored: bool = True
    """Whether it reads columns of the scores."""


_OURS: dict[str, Rule] = {
    "uniform": Rule("the same sparsity everywhere", uniform, of_layers=True, scored=False),
    "layer": Rule(
        "layers with a larger mean score are less sparse", by_layer,
        of_layers=True, strength=0.08,
    ),
    "protect": Rule("the neurons with the largest scores stay (nearly) dense", protect),
    "linear": Rule("sparsity falls linearly with the z-score", linear, strength=0.05),
    "rank": Rule("sparsity falls linearly with the rank", rank, strength=0.1),
    "owl": Rule(
        "blocks with more outlying weights are less sparse (OWL)", owl,
        of_layers=True, strength=0.08, calibrated=True, scored=False,
    ),
    "alphapruning": Rule(
        "blocks with heavier-tailed spectra are less sparse (AlphaPruning)", alphapruning,
        of_layers=True, strength=0.3, weighed=True, scored=False,
    ),
    "trim": Rule(
        "rows whose pruned outputs keep their direction are sparser (TRIM)", trim,
        calibrated=True, scored=False,
    ),
    "neuroal": Rule(
        "the schedule that keeps inputs most alike, then rows that feed them (NeuroAL)", neuroal,
        across="neuroal-blocks", calibrated=True, scored=False,
    ),
    "neuroal-blocks": Rule(
        "sparsity grows with depth, as keeps inputs most alike (NeuroAL's first step)",
        neuroal_blocks, of_layers=True, calibrated=True, scored=False,
    ),
    "erk": Rule(
        "layers by (rows + columns) / (rows · columns) (Erdős–Rényi)", erk,
        of_layers=True, scored=False,
    ),
    "magnitude-global": Rule(
        "one threshold on |w| for all layers (essential sparsity)", magnitude_global,
        across=MODEL, weighed=True, scored=False,
    ),
    "loss": Rule(
        "the last zero of each row costs as much, weighed by the score", losses.loss,
        strength=0.3, calibrated=True,
    ),
    "sensitivity": Rule(
        "the same in units of the model's own loss, across layers", losses.sensitivity,
        across=MODEL, strength=0.3, calibrated=True,
    ),
    "depth": Rule(
        "layers by their mean score, rows by what their last zero costs", losses.depth,
        across="layer", strength=0.3, calibrated=True,
    ),
}  # fmt: skip


OwnRule = Callable[[Reals, float], Reals]
"""A rule of one's own: from a score a neuron and the overall sparsity, a sparsity a neuron."""


def as_rule(name: str, thing: object) -> Rule:
    """Return a rule: ``thing`` itself, or one made of an `OwnRule`.

    Raises
    ------
    InvalidInput
        If it is neither; when it is run, if it raises, or returns another shape or no shares.
    """
    if isinstance(thing, Rule):
        return thing
    if not callable(thing):
        raise InvalidInput(f"a rule must be a function; {name!r} is {type(thing).__name__}.")

    def wish(request: Request) -> Wish:
        score = request.score()
        try:
            found = np.asarray(thing(score.copy(), request.settings.sparsity), np.float64)
        except EntangleError:
            raise
        except Exception as error:
            raise InvalidInput(
                f"the rule {name!r} failed: {type(error).__name__}: {error}"
            ) from error
        if found.shape != score.shape or not ((found >= 0) & (found <= 1)).all():
            raise InvalidInput(
                f"the rule {name!r} must return {score.size} shares in [0, 1]; got shape "
                f"{found.shape} in [{found.min(initial=np.inf):g}, {found.max(initial=-np.inf):g}]."
            )
        return request.wish(found)

    return Rule(f"a rule of its own, {name}", wish)


RULES: Door[Rule] = Door("rules", as_rule)
"""Rules by name, in the order in which they are listed."""
for _name, _rule in _OURS.items():
    RULES.own(_name, _rule, source=_rule.summary)
