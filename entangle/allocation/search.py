"""Tune the strength of a rule on held-out calibration text.

Look for the smallest value of an expensive function on an interval.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from entangle.allocation.allocate import allocate
from entangle.allocation.allocation import Allocation
from entangle.allocation.measurements import Measurements
from entangle.allocation.request import InfeasibleBudget, find_subject
from entangle.allocation.rules import RULES
from entangle.checks import choice, finite, share, whole
from entangle.errors import InvalidInput, NumericalError
from entangle.evaluation import EvaluationText
from entangle.evaluation.perplexity import measure_perplexity
from entangle.memory import check_memory, memory_for
from entangle.models.blocks import evaluates
from entangle.models.layers import Layer, layer_specs, projections
from entangle.models.loading import AnyModel, as_language_model
from entangle.pruning import prune
from entangle.pruning.methods import PRUNERS
from entangle.recording.hooks import Change, changed_rows
from entangle.results.scores import NeuronScores
from entangle.runs.progress import ProgressBar
from entangle.runs.provenance import RunClock, around_each
from entangle.stats.gram import GramResult
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source

GRID = 5
_RATIO = (math.sqrt(5.0) - 1.0) / 2.0

Tried = list[tuple[float, float]]
"""Every (x, value), in the order of the evaluations."""


def minimise(
    function: Callable[[float], float], low: float, high: float, *, evaluations: int
) -> Tried:
    """Evaluate a grid with both ends, then close in on its best point by golden section.

    The grid has `GRID` points, or fewer if there are fewer evaluations. The rest go into the
    interval between the neighbours of the best point, where the function is taken to have one
    minimum; a NaN counts as infinite.

    Parameters
    ----------
    function
        What to minimise.
    low, high
        The interval.
    evaluations
        How often the function is called, at least 2.

    Returns
    -------
    list of (x, value)
        All evaluations; the minimum is the smallest of them.
    """
    tried: Tried = []

    def at(x: float) -> float:
        value = function(x)
        tried.append((x, math.inf if math.isnan(value) else value))
        return tried[-1][1]

    points = min(GRID, evaluations)
    grid = [low + (high - low) * i / (points - 1) for i in range(points)]
    values = [at(x) for x in grid]
    best = values.index(min(values))
    left, right = grid[max(0, best - 1)], grid[min(points - 1, best + 1)]
    inner: dict[float, float] = {}
    while len(tried) < evaluations:
        first, second = right - _RATIO * (right - left), left + _RATIO * (right - left)
        for x in (first, second):
            known = [value for other, value in inner.items() if math.isclose(other, x)]
            if known:
                inner[x] = known[0]
            elif len(tried) < evaluations:
                inner[x] = at(x)
        if first not in inner or second not in inner:
            break
        if inner[first] <= inner[second]:
            right = second
        else:
            left = first
    return tried


STAND_IN = "all layers pruned at once by one expert, on the inputs that the dense model gives them"
"""What is built of every candidate in place of an expansion."""

_WIDEST = 4.0  # times the rule's own strength
_MOST_PROTECTED = 0.2
_SHARED = ("layers", "proj")


@evaluates
def search(
    scores: NeuronScores | pd.DataFrame,
    *,
    model: AnyModel,
    calibration: Source,
    sparsity: float,
    tune: str = "linear",
    high: float | None = None,
    evaluations: int = 8,
    held_out: float = 0.25,
    pruner: str = "sparsegpt",
    damping: float = 0.01,
    memory: int | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Allocation:
    """Allocate by the strength of a rule that costs least on held-out calibration text.

    Every candidate is built in a cheap form: all layers are pruned at once, by one expert, with the
    Gram matrices of the dense model's inputs on the first sequences of the calibration set, and its
    loss is measured on the last ones. An expansion, in which each block sees what the pruned blocks
    before it put out and tokens are routed among experts, loses less; the search takes the order of
    the candidates to be the same. The model is left bit-identical.

    Parameters
    ----------
    scores, model, sparsity
        As in `entangle.allocation.allocate`.
    calibration
        As in `entangle.score`. Its last share of sequences is held out; rules and pruning see the
        others only. (Sequences drawn at random from a text may overlap; contiguous ones do not.)
    tune
        The rule; for ``protect`` the share ``protect`` is tuned, for all others ``spread``.
    high
        Largest value tried, the smallest being 0; by default four times the rule's own strength,
        or 0.2 of the neurons.
    evaluations
        Candidates to build, at least 2: five evenly spaced ones, then by golden section.
    held_out
        Share of the sequences in (0, 1) that the candidates are scored on, at least one.
    pruner, damping
        As in `entangle.pruning.prune` (``pruner`` is its ``method``).
    memory
        Bytes of Gram matrices that are kept, half of what is free by default; with more, they are
        made anew for every candidate.
    progress
        Show a progress bar on standard error; by default if that is a terminal.
    **settings
        The other arguments of `entangle.allocation.allocate`.

    Returns
    -------
    Allocation
        Of the best candidate. ``manifest["search"]`` has what was tuned, every value tried with its
        held-out perplexity, the number of evaluations, the seconds, and how candidates were built.

    Raises
    ------
    InvalidInput, UnknownName
        If a setting is out of range, or the rule has nothing to tune.
    NumericalError
        If no candidate has a finite loss.
    """
    clock = RunClock()
    parameter, high = _range(tune, high)
    name = "spread" if parameter == "strength" else parameter
    if settings.get(name) is not None:
        raise InvalidInput(
            f"`{name}` is what a search of rule {tune!r} tunes, up to `high`; got "
            f"{settings[name]!r}: leave it out."
        )
    check_memory(memory)
    evaluations = whole("evaluations", evaluations, least=2)
    held_out = share("held_out", held_out, zero=False, one=False)
    sparsity, damping = share("sparsity", sparsity), finite("damping", damping, least=0)
    pruner = choice("pruner", pruner, PRUNERS, kind="pruning method")
    dense = as_language_model(model)
    calibration = as_calibration(calibration, dense)
    _check(calibration)
    first, last = split(calibration, held_out)
    shared = {name: settings.pop(name, None) for name in _SHARED}
    if shared["layers"] is not None:  # they are read for every candidate
        shared["layers"] = layer_specs(shared["layers"])
    shared["proj"] = projections(shared["proj"])
    subject = find_subject(scores, model=dense, **shared, in_features=None)
    measured = Measurements(dense, subject.layers, first, memory=memory_for(memory, dense.module))
    stand_in = _StandIn(measured, last, pruner=pruner, damping=damping)
    made: dict[float, Allocation] = {}
    with ProgressBar(f"searching ({tune})", enabled=progress) as bar:
        bar.start(evaluations, "candidates")

        def loss(value: float) -> float:
            try:
                made[value] = allocate(
                    scores, sparsity=sparsity, rule=tune, model=dense, measured=measured,
                    progress=False, **shared, **{**settings, name: value},
                )  # fmt: skip
            except InfeasibleBudget:
                found = math.inf
            else:
                found = stand_in.loss(made[value])
            bar.advance()
            return found

        tried = minimise(loss, 0.0, high, evaluations=evaluations)
    best, value = min(tried, key=lambda one: one[1])
    if not math.isfinite(value):
        raise NumericalError(
            f"none of {len(tried)} candidates of rule {tune!r} has a finite loss; lower the "
            "sparsity, or `high`."
        )
    cost = {"evaluations": len(tried), **clock.read()}
    described = _describe(tried, best, tune=tune, parameter=parameter, pruner=pruner, text=last)
    return replace(made[best], manifest={**made[best].manifest, "search": described | cost})


def split(calibration: CalibrationSet, held_out: float) -> tuple[CalibrationSet, EvaluationText]:
    """Cut off the last share of a calibration set's sequences, at least one, to evaluate on."""
    count = max(1, round(held_out * calibration.n_seq))
    if calibration.n_seq < 2 or count >= calibration.n_seq:
        raise InvalidInput(
            f"`held_out` must leave sequences to calibrate on; got {held_out} of "
            f"{calibration.n_seq} sequence(s): give more sequences (--n-seq)."
        )
    origin = dict(calibration.settings)
    first = CalibrationSet(
        calibration.ids[:-count].clone(),
        calibration.source,
        origin | {"sequences": "first"},
        None if calibration.mask is None else calibration.mask[:-count],
    )
    settings = origin | {"sequences": f"last {count}"}
    pads = None if calibration.mask is None else calibration.mask[-count:]
    return first, EvaluationText(
        calibration.ids[-count:].clone(), calibration.source, settings, mask=pads,
        around=around_each(origin),
    )  # fmt: skip


class _StandIn:
    """Builds candidates in a cheap form, and measures them on held-out text."""

    def __init__(
        self, measured: Measurements, text: EvaluationText, *, pruner: str, damping: float
    ) -> None:
        self._measured, self._text = measured, text
        self._pruner, self._damping = pruner, damping

    def loss(self, allocation: Allocation) -> float:
        """Return the mean loss of a predicted token in nats; infinite where it is not finite."""
        with self._pruned(allocation):
            found = measure_perplexity(self._measured.model, self._text, progress=False)
        mean = float(found.window_losses.sum()) / found.n_tokens
        return mean if math.isfinite(mean) else math.inf

    @contextmanager
    def _pruned(self, allocation: Allocation) -> Iterator[None]:
        # all grams come from the dense model, so that none is made after the first write
        changes: list[Change] = []
        for group, gram in self._measured.grams():
            sizes = [layer.out_features for layer in group]
            parts = self._solve(group, gram, allocation).split(sizes)
            changes += [
                (layer, torch.arange(size), part)
                for layer, size, part in zip(group, sizes, parts, strict=True)
            ]
        with changed_rows(changes):
            yield

    def _solve(
        self, group: Sequence[Layer], gram: GramResult, allocation: Allocation
    ) -> torch.Tensor:
        names = [layer.name for layer in group]
        shares = torch.cat([allocation.sparsity[name] for name in names])
        weight = torch.cat([layer.weight for layer in group])
        try:
            return prune(
                weight, gram.gram, method=self._pruner, sparsity=shares,
                pattern=allocation.pattern, damping=self._damping,
            ).weight  # fmt: skip
        except NumericalError as error:
            raise NumericalError(f"{', '.join(names)}: {error}") from error


def _range(tune: str, high: float | None) -> tuple[str, float]:
    """Return the parameter of a rule that is tuned, and the largest value to try."""
    tune = choice("tune", tune, RULES, kind="allocation rule")
    parameter, widest = "strength", _WIDEST * RULES[tune].strength
    if tune == "protect":
        parameter, widest = "protect", _MOST_PROTECTED
    if widest == 0:
        raise InvalidInput(f"rule {tune!r} has no spread to tune; choose another (`tune`).")
    return parameter, widest if high is None else finite("high", high, above=0)


def _check(calibration: CalibrationSet) -> None:
    if calibration.seq_len < 2:
        raise InvalidInput(
            "`calibration` must have sequences of at least 2 tokens, to predict one; got 1."
        )


def _describe(
    tried: Tried, best: float, *, tune: str, parameter: str, pruner: str, text: EvaluationText
) -> dict[str, object]:
    return {
        "rule": tune,
        "parameter": parameter,
        "chosen": best,
        "tried": [
            {parameter: x, "perplexity": math.exp(y) if y < 700.0 else None} for x, y in tried
        ],
        "stand_in": f"{pruner}: {STAND_IN}",
        "held_out": text.describe(),
    }
