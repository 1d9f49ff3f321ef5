"""`allocate`: from scores to zeros per neuron under one budget.

From a rule to whole zeros: layers first where a rule asks for it, then their neurons.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from entangle.allocation.allocation import Allocation, Counts, LayerRows, Reals, step_sizes
from entangle.allocation.measurements import Measurements
from entangle.allocation.request import (
    Columns,
    Request,
    Settings,
    Subject,
    Wish,
    check_reachable,
    fill,
    find_subject,
    gather,
    round_zeros,
    whole_bounds,
)
from entangle.allocation.rules import MODEL, RULES
from entangle.checks import choice, finite, named, names, renamed, share
from entangle.errors import InvalidInput
from entangle.memory import check_memory, memory_for
from entangle.models.blocks import evaluates
from entangle.models.layers import LayerSpec, Projections
from entangle.models.loading import AnyModel
from entangle.results.allocation import KIND
from entangle.results.scores import NeuronScores
from entangle.runs.progress import Progress, ProgressBar
from entangle.runs.provenance import RunClock, make_manifest
from entangle.texts.given import Source


def meet_budget(request: Request) -> tuple[Counts, int]:
    """Ask the rule and meet the budget.

    Returns
    -------
    zeros : ndarray
        Zeros of each neuron.
    remainder : int
        Zeros that the pattern's steps leave over; 0 with pattern ``row``.

    Raises
    ------
    InfeasibleBudget
        If the clips do not allow it.
    """
    rows, settings = request.rows, request.settings
    budget = round(settings.sparsity * rows.n_weights)
    steps = step_sizes(rows, settings.pattern)
    rule = RULES[settings.rule]
    layered: Wish | None = None
    if rule.of_layers:
        wish = _spread(rule.wish(request), rows)
    elif settings.across == MODEL:
        wish = rule.wish(request)
    else:
        layered = RULES[str(settings.across)].wish(_as_layer_rule(request))
        totals = _fill_layers(layered, rows, layered.low, layered.high, budget)
        layered = replace(layered, sparsity=totals / rows.layer_weights)
        wish = rule.wish(replace(request, target=layered.sparsity))
    low, high = whole_bounds(wish, rows.weights // steps)
    least, most = (low * steps).astype(np.float64), (high * steps).astype(np.float64)
    check_reachable(int(least.sum()), int(most.sum()), budget, rows.n_weights, _described(request))
    starts, totals = np.zeros(1, dtype=np.int64), np.array([float(budget)])
    if layered is not None:
        share = rows.layer_weights
        starts = rows.starts
        totals = _fill_layers(
            layered, rows, rows.total(least) / share, rows.total(most) / share, budget
        )
    zeros = fill(wish, rows.weights, least, most, starts=starts, totals=totals)
    return round_zeros(zeros, low, high, steps=steps, budget=budget)


def _as_layer_rule(request: Request) -> Request:
    """Ask a rule of layers, with its own default strength, on behalf of a rule of neurons."""
    across = str(request.settings.across)
    settings = replace(request.settings, rule=across, strength=RULES[across].strength)
    return replace(request, settings=settings)


def _spread(wish: Wish, rows: LayerRows) -> Wish:
    """Turn a wish for layers into one for their neurons."""
    return Wish(*(rows.spread(getattr(wish, f)) for f in ("sparsity", "gain", "low", "high")))


def _fill_layers(wish: Wish, rows: LayerRows, low: Reals, high: Reals, budget: int) -> Reals:
    """Return zeros of each layer, not whole, that add up to the budget within shares of zeros."""
    weights = rows.layer_weights
    start, total = np.zeros(1, dtype=np.int64), np.array([float(budget)])
    return fill(wish, weights, low * weights, high * weights, starts=start, totals=total)


def _described(request: Request) -> str:
    settings = request.settings
    parts = [
        f"rule {settings.rule!r}, neurons between {settings.lowest:g} and {settings.highest:g}"
    ]
    if settings.rule == "protect":
        parts.append(f"{settings.protect:g} of them at {settings.protect_sparsity:g}")
    if settings.pattern != "row":
        parts.append(f"pattern {settings.pattern}")
    return ", ".join(parts)


@renamed(strength="spread")
@evaluates
def allocate(
    scores: NeuronScores | pd.DataFrame,
    *,
    sparsity: float | int,
    rule: str = "protect",
    by: str | Iterable[str] = "wd",
    combine: str = "zscore",
    protect: float | int = 0.03,
    protect_sparsity: float | int = 0.0,
    spread: float | int | None = None,
    across: str | None = None,
    lowest: float | int = 0.0,
    highest: float | int = 1.0,
    pattern: str = "row",
    model: AnyModel | None = None,
    calibration: Source | None = None,
    layers: LayerSpec | None = None,
    proj: Projections = None,
    in_features: Mapping[str, int] | None = None,
    measured: Measurements | None = None,
    memory: int | None = None,
    progress: bool | None = None,
) -> Allocation:
    """Decide how many weights of every neuron are to be zero.

    The total over all layers is exactly ``round(sparsity * weights)``, to the single weight.

    Parameters
    ----------
    scores
        Scores of the neurons, all neurons of each layer; or their frame, with columns layer, neuron
        and those named in ``by``.
    sparsity
        Share of zeros over all layers together, in [0, 1].
    rule
        One of `RULES`.
    by
        Column of the scores, or several (a sequence, or one string joined by ``+``), that rules
        read: the larger, the more is kept. A neuron without a value (flagged) gets the mean of its
        layer; how many there were is noted in the manifest.
    combine
        ``zscore`` or ``rank``: how several columns become one.
    protect, protect_sparsity
        For rule ``protect``: the share of the neurons that is protected, and the sparsity that they
        get.
    spread
        How far a rule departs from uniform; every rule that has one has its own default and unit.
    across
        For rules of neurons: a rule of layers that gives each layer its sparsity, within which its
        neurons compete (``uniform`` leaves every layer at ``sparsity``), or ``model``, where
        neurons of all layers compete. Each rule has its own default.
    lowest, highest
        Clips of a neuron's sparsity; what a clipped neuron cannot take goes to the others.
    pattern
        ``row``: any number of zeros. ``n:m`` with a number for m, such as ``n:4``: a neuron's
        zeros are a multiple of ``in_features / m``, so that each group of m neighbouring weights
        can lose equally many, 0 to m. The total is then met to within half of the smallest such
        step, and the rest noted in the manifest as ``remainder``.
    model
        The model that was scored, as in `entangle.score`. Rules that measure need it, and it tells
        ``in_features``.
    calibration
        Text for rules that measure: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings.
    layers, proj
        Layers to allocate to, as in `entangle.models.layers.find_layers`; by default all that the
        scores hold.
    in_features
        Weights of a neuron, by layer name, where no ``model`` is given.
    measured
        Measurements of the same model and layers to use again, in place of ``calibration``.
    memory
        Bytes of Gram matrices held at a time, half of what is free by default; with less, more
        passes over the text are made.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InfeasibleBudget
        If no choice within the clips meets the budget; the message says what can be met.
    UnknownName
        For a rule, column or layer that does not exist.
    InvalidInput
        If a setting is out of range, or scores, model and layers do not belong together.
    """
    clock = RunClock()
    rule, across = _check_names(rule, across)
    check_memory(memory)
    if spread is not None and RULES[rule].strength == 0:
        raise InvalidInput(f"rule {rule!r} has no spread; leave it out (got {spread!r}).")
    settings = Settings(
        rule=rule, sparsity=share("sparsity", sparsity), by=_names(by), combine=combine,
        protect=share("protect", protect),
        protect_sparsity=share("protect_sparsity", protect_sparsity),
        strength=finite("spread", RULES[rule].strength if spread is None else spread),
        across=None if RULES[rule].of_layers else across or RULES[rule].across,
        lowest=share("lowest", lowest), highest=share("highest", highest),
        pattern=named("pattern", pattern),
    )  # fmt: skip
    subject = find_subject(scores, model=model, layers=layers, proj=proj, in_features=in_features)
    frame = scores.frame if isinstance(scores, NeuronScores) else scores
    columns = gather(frame, subject.rows)
    with ProgressBar(f"allocating ({rule})", enabled=progress) as bar:
        source = measured or _measurements(subject, calibration, memory, bar)
        _check_measurable(settings, subject, source)
        request = Request(settings, columns, source)
        zeros, remainder = meet_budget(request)
    manifest = make_manifest(
        KIND,
        model=subject.described,
        calibration=None if source is None else source.described,
        scores=_provenance(scores),
        settings={**asdict(settings), "filled": _filled(columns, settings)},
        budget={
            "sparsity": settings.sparsity,
            "zeros": int(zeros.sum()),
            "weights": subject.rows.n_weights,
            "remainder": remainder,
        },
        **clock.read(None if source is None else source.memory),
    )
    rows = subject.rows
    return Allocation(
        zeros=rows.split(zeros),
        in_features=dict(zip(rows.names, rows.widths.tolist(), strict=True)),
        experts=None,
        manifest=manifest,
        blocks={n: b for n, b in zip(rows.names, rows.blocks, strict=True) if b is not None},
        pattern=settings.pattern,
    )


def _names(by: str | Iterable[str]) -> tuple[str, ...]:
    found = names("by", by)
    return tuple(part.strip() for part in found[0].split("+")) if len(found) == 1 else tuple(found)


def _check_names(rule: str, across: str | None) -> tuple[str, str | None]:
    rule = choice("rule", rule, RULES, kind="allocation rule")
    if across is None:
        return rule, None
    known = [name for name, one in RULES.items() if one.of_layers]
    if RULES[rule].of_layers:
        raise InvalidInput(
            f"`across` must be left out with rule {rule!r}, which is itself a rule of layers; got "
            f"{across!r}."
        )
    return rule, choice("across", across, [*known, MODEL], kind="rule of layers (`across`)")


def _measurements(
    subject: Subject, calibration: Source | None, memory: int | None, progress: Progress
) -> Measurements | None:
    if subject.model is None:
        return None
    return Measurements(
        subject.model,
        subject.layers,
        calibration,
        memory=memory_for(memory, subject.model.module),
        progress=progress,
    )


def _check_measurable(settings: Settings, subject: Subject, measured: Measurements | None) -> None:
    """Refuse before any work what a rule would have to measure and cannot."""
    used = [settings.rule, *([settings.across] if settings.across not in (None, MODEL) else [])]
    for name in used:
        rule = RULES[str(name)]
        if measured is None and (rule.calibrated or rule.weighed):
            raise InvalidInput(f"rule {name!r} measures the model: give `model`.")
        if measured is not None and rule.calibrated and measured.described is None:
            raise InvalidInput(f"rule {name!r} measures on text: give `calibration`.")
    if measured is not None and measured.names != subject.rows.names:
        raise InvalidInput(
            f"`measured` must be of the {len(subject.rows.names)} layer(s) to allocate to; got "
            f"{len(measured.names)} layer(s), or others: measure these layers."
        )


def _provenance(scores: NeuronScores | pd.DataFrame) -> object:
    if not isinstance(scores, NeuronScores):
        return None
    return {key: scores.manifest.get(key) for key in ("calibration", "settings", "packages")}


def _filled(columns: Columns, settings: Settings) -> dict[str, int]:
    """Count the neurons whose missing score was replaced by their layer's mean."""
    if not any(RULES[n].scored for n in (settings.rule, settings.across) if n and n in RULES):
        return {}
    return {name: columns.missing(name) for name in settings.by}
