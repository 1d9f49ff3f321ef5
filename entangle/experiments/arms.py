"""The arms of an ablation: who is touched, how, and how strongly; checked before any work.

The perplexity-matched control: how many unremarkable neurons cost as much as the top ones.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.allocation.allocation import Allocation, even
from entangle.allocation.experts import nominal_sparsity, rule_label, zeros_digest
from entangle.checks import choice, share, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.experiments.experiment import Arm, Arrays, Evaluation
from entangle.experiments.interventions import OUTPUT_EDITS
from entangle.experiments.selection import ALIKE, DERIVED, SCOPES, SCORED, Selection, column, select
from entangle.experts.routed_rows import Level
from entangle.experts.router import ROUTERS as DOOR
from entangle.models.layers import Layer
from entangle.runs.progress import Progress
from entangle.scoring.columns import COLUMNS as DOOR_COLUMNS

if TYPE_CHECKING:
    from entangle.experiments.ablate import Ablation


ROUTERS = ("kmeans", "random")
"""Routers of several experts; ``random`` is the control, whose clusters mean nothing."""

PRUNERS = {
    "prune": "sparsegpt",
    "prune-wanda": "wanda",
    "prune-magnitude": "magnitude",
    "prune-random": "random",
}
"""Interventions that prune rows, and the pruner of each."""

INTERVENTIONS = (*PRUNERS, *OUTPUT_EDITS)
"""All interventions: pruners of rows, and edits of outputs."""


SELECTIONS = ("top", "bottom", "random")
"""Selections of an ablation, unless others are asked for."""


@dataclass(frozen=True, eq=False)
class AblationArm(Arm):
    """Some neurons of the model, changed."""

    selection: Selection
    """Which neurons."""
    intervention: str
    """From `INTERVENTIONS`."""
    strength: float
    """Sparsity of a pruned row (of all rows together with an allocation), or share in [0, 1] of an
    edit of outputs."""
    experts: int = 1
    """Routed experts that hold the pruned rows; 1 without a router."""
    allocation: Allocation | None = None
    """Zeros of every row, in place of one sparsity for all."""
    router: str = ""
    """From `ROUTERS` where there are several experts, else empty."""

    @property
    def pruner(self) -> str | None:
        """The pruner of its rows; None where outputs are edited."""
        return PRUNERS.get(self.intervention)

    @property
    def level(self) -> Level:
        """How sparse its rows are."""
        return self.strength if self.allocation is None else self.allocation

    @property
    def columns(self) -> dict[str, object]:
        """Columns of the tables that name the arm."""
        return {
            "selection": self.selection.rule,
            "by": self.selection.by or "",
            "seed": self.selection.seed,
            "intervention": self.intervention,
            "strength": self.strength,
            "experts": self.experts,
            "router": self.router,
        }

    def describe(self) -> dict[str, object]:
        """Return what makes the arm, JSON-serialisable."""
        described: dict[str, object] = {
            "selection": self.selection.describe(),
            "intervention": self.intervention,
            "strength": self.strength,
            "experts": self.experts,
        }
        if self.allocation is not None:
            described["allocation"] = zeros_digest(self.allocation)
        if self.router:
            described["router"] = self.router
        return described

    @property
    def label(self) -> str:
        """A short line for messages."""
        seed = "" if self.selection.seed is None else f" (seed {self.selection.seed})"
        routed = "" if self.experts == 1 else f", {self.experts} experts"
        routed += " of random clusters" if self.router == "random" else ""
        return f"{self.intervention} {self.selection.name}{seed} at {self.strength:g}{routed}"


def check_settings(
    interventions: Sequence[str],
    *,
    strengths: Sequence[float],
    edit_strengths: Sequence[float],
    experts: Sequence[int],
    routers: Sequence[str] = ROUTERS[:1],
) -> None:
    """Check the settings of arms, before any work is done.

    Raises
    ------
    UnknownName, InvalidInput
        If an intervention or a router does not exist, a strength lies outside [0, 1], a number of
        experts is below 1, or one of the lists is empty.
    """
    for name in interventions:
        choice("interventions", name, INTERVENTIONS, kind="intervention")
    for name in routers:
        choice("router", name, DOOR)
    for name, values in (("strengths", strengths), ("edit_strengths", edit_strengths)):
        for value in values:
            share(name, value)
    for count in experts:
        whole("experts", count, least=1)
    if not (interventions and strengths and edit_strengths and experts and routers):
        raise InvalidInput(
            "there is no arm to run: give at least one intervention, strength, number of experts "
            "and router."
        )


@dataclass(frozen=True, eq=False)
class ArmPlan:
    """Which arms are asked for; the fields are explained at `entangle.ablate`."""

    wanted: Sequence[str | Selection]
    columns: Sequence[str]
    fraction: float | None
    count: int | None
    scope: str
    seeds: int
    seed: int
    interventions: Sequence[str]
    strengths: Sequence[float]
    edit_strengths: Sequence[float] = (1.0,)
    experts: Sequence[int] = (1,)
    routers: Sequence[str] = ROUTERS[:1]
    allocation: Allocation | None = None
    match: bool = False

    @property
    def prunes(self) -> bool:
        """Whether an arm prunes rows."""
        return bool(PRUNERS.keys() & set(self.interventions))

    def check(
        self,
        layers: Sequence[Layer],
        evaluation: Evaluation,
        *,
        md: bool = True,
        scores: pd.DataFrame | None = None,
    ) -> None:
        """Raise `UnknownName` or `InvalidInput` for what can be seen before neurons are scored.

        Parameters
        ----------
        layers
            Those whose neurons are changed.
        evaluation
            What arms are measured on.
        md
            Whether mapping difficulty will be computed.
        scores
            Table of scores made before, if there are some.
        """
        for one in self.wanted:
            if not isinstance(one, Selection):
                choice("selections", one, (*SELECTIONS, *ALIKE, "all"), kind="selection")
        if not self.wanted or not self.columns:
            raise InvalidInput("`selections` and `by` must name at least one; got none.")
        if (self.fraction is None) == (self.count is None):
            raise InvalidInput(
                "a selection takes exactly one of `fraction` and `count`; got "
                f"{self.fraction} and {self.count}: drop one of them."
            )
        choice("scope", self.scope, SCOPES)
        self._check_columns(md=md, scores=scores)
        sizes = {layer.name: layer.out_features for layer in layers}
        self._check_sizes(sizes)
        for one in self.wanted:
            if isinstance(one, Selection):
                _check_rows(one, sizes)
        if self.match:
            self._check_match(evaluation)
        if self.allocation is not None:
            self._check_alone()

    def _check_columns(self, *, md: bool, scores: pd.DataFrame | None) -> None:
        known = (*SCORED, *(name for name, (source, _) in DERIVED.items() if source in SCORED))
        known = tuple(dict.fromkeys([*known, *DOOR_COLUMNS]))
        for name in self.columns:
            if scores is None and name not in known:
                raise unknown_name("column", name, known, "Choose a column of the scores.")
            missing = not md if scores is None else column(scores, name).isna().all()
            if missing and scores is not None and (scores["flag"] == "few_tokens").all():
                raise InvalidInput(
                    f"`by` {name} needs scores, but the experts chosen saw too few tokens "
                    "(few_tokens); give more text, or score with a lower --min-tokens (min_tokens)."
                )
            if missing and (scores is not None or name == "md"):
                raise InvalidInput(
                    f"`by` {name} needs scores that hold it; compute it (for md: md=True, without "
                    "--no-md), or rank by another column."
                )

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Refuse more neurons than there are, with as many again for controls alike."""
        pools = {f"layer {name!r}": size for name, size in sizes.items()}
        if self.scope == "model":
            pools = {"the model": sum(sizes.values())}
        alike = any(isinstance(one, str) and one in ALIKE for one in self.wanted)
        if not alike and not {*SELECTIONS} & {one for one in self.wanted if isinstance(one, str)}:
            return
        for name, size in pools.items():
            count = self.count or max(1, round((self.fraction or 0.0) * size))
            if count > size:
                raise InvalidInput(
                    f"a selection of {count} neurons does not fit {name}, which has {size}; lower "
                    "`fraction` or `count`."
                )
            if alike and self.scope == "layer" and 2 * count > size:
                raise InvalidInput(
                    f"matched controls of {count} neurons do not fit {name} beside the top ones, "
                    f"as it has {size}; lower `fraction` or `count`."
                )

    def _check_match(self, evaluation: Evaluation) -> None:
        """Refuse a search for equal perplexity that would have nothing to match."""
        if not {"perplexity", "divergence"} & set(evaluation.measures):
            raise InvalidInput(
                "`match` compares perplexities; give `evaluation`, and measure perplexity."
            )
        first = self.columns[0]
        tops = [one for one in self.wanted if isinstance(one, Selection) and one.rule == "top"]
        if "top" not in self.wanted and first not in [one.by for one in tops]:
            raise InvalidInput(f"`match` needs the selection top {first}; add top to `selections`.")
        if 1 not in self.experts and set(self.interventions) <= set(PRUNERS):
            raise InvalidInput(
                f"`match` needs arms with 1 expert; got `experts` {list(self.experts)}."
            )

    def _check_alone(self) -> None:
        """Refuse what has no meaning beside an allocation, which says how sparse each row is."""
        if tuple(self.wanted) not in (SELECTIONS, ("all",)):
            raise InvalidInput(
                "with `allocation` all rows of its layers are pruned; leave `selections` out."
            )
        if self.match:
            raise InvalidInput(
                "`match` needs a top selection, which `allocation` has not; drop one."
            )

    def describe(self) -> dict[str, object]:
        """Return what a manifest records of it, JSON-serialisable."""
        settings: dict[str, object] = {
            "selections": [s if isinstance(s, str) else s.describe() for s in self.wanted],
            "by": list(self.columns),
            "fraction": self.fraction,
            "count": self.count,
            "scope": self.scope,
            "seeds": self.seeds,
            "interventions": list(self.interventions),
            "strengths": list(self.strengths),
            "edit_strengths": list(self.edit_strengths),
            "experts": list(self.experts),
            "router": self.routers[0] if len(self.routers) == 1 else list(self.routers),
        }
        if self.allocation is not None:
            settings["selections"] = ["all", "allocation"]
            settings["strengths"] = [self.allocation.overall]
        return settings

    def arms(self, scores: pd.DataFrame | None) -> list[AblationArm] | None:
        """Return the arms, each once; None while they wait for a table of scores."""
        if self.allocation is not None:
            return plan_allocated(self.allocation, self.interventions, experts=self.experts)
        if scores is None:
            return None
        return plan_arms(
            self.selections(scores), self.interventions, strengths=self.strengths,
            edit_strengths=self.edit_strengths, experts=self.experts, routers=self.routers,
        )  # fmt: skip

    def selections(self, frame: pd.DataFrame) -> list[Selection]:
        """Return every selection, random ones once a seed; no two may have one name."""
        found = list(self._each(frame))
        names = [(one.rule, one.by, one.seed) for one in found]
        for name, one in zip(names, found, strict=True):
            if names.count(name) > 1:
                raise InvalidInput(
                    f"two selections are called {one.name!r} and could not be told apart; ablate "
                    "them one after the other."
                )
        return found

    def _each(self, frame: pd.DataFrame) -> Iterator[Selection]:
        size: dict[str, Any] = {"fraction": self.fraction, "count": self.count, "scope": self.scope}
        for one in dict.fromkeys(self.wanted):
            if isinstance(one, Selection):
                yield one
            elif one == "all":
                yield select(frame, one)
            elif one in ("top", "bottom"):
                for column in self.columns:
                    yield select(frame, one, by=column, **size)
            else:
                like = None
                if one in ALIKE:
                    like = select(frame, "top", by=self.columns[0], **size)
                for draw in range(self.seed, self.seed + self.seeds):
                    options: dict[str, Any] = size if like is None else {"like": like}
                    yield select(frame, one, seed=draw, **options)


def _check_rows(selection: Selection, sizes: Mapping[str, int]) -> None:
    """Check that the rows of a selection are neurons of the chosen layers, given by their sizes."""
    if not selection.n_rows:
        raise InvalidInput(f"the selection {selection.name!r} must hold a neuron; got none.")
    for name, rows in selection.rows.items():
        if name not in sizes:
            raise unknown_name(
                f"layer of the selection {selection.name!r} among the chosen ones:", name, sizes,
                "Choose its layer too (`layers`, --layer).",
            )  # fmt: skip
        outside = [int(row) for row in rows if not 0 <= row < sizes[name]]
        if outside or len(set(rows.tolist())) < len(rows):
            raise InvalidInput(
                f"rows of layer {name!r} in the selection {selection.name!r} must be different "
                f"and in 0..{sizes[name] - 1}; got {outside[:1] or 'one twice'}: select from the "
                "scores of this model."
            )


def plan_arms(
    selections: Sequence[Selection],
    interventions: Sequence[str],
    *,
    strengths: Sequence[float],
    edit_strengths: Sequence[float],
    experts: Sequence[int],
    routers: Sequence[str] = ROUTERS[:1],
) -> list[AblationArm]:
    """Return every combination that makes sense, once.

    Several experts only where rows are pruned, and routers only where there are several experts.
    """
    return [
        AblationArm(selection, intervention, float(strength), count, router=router)
        for intervention in dict.fromkeys(interventions)
        for strength in dict.fromkeys(strengths if intervention in PRUNERS else edit_strengths)
        for count in (dict.fromkeys(experts) if intervention in PRUNERS else (1,))
        for router in (dict.fromkeys(routers) if count > 1 else ("",))
        for selection in selections
    ]


def plan_allocated(
    allocation: Allocation, interventions: Sequence[str], *, experts: Sequence[int]
) -> list[AblationArm]:
    """Return two arms an intervention: every row as the allocation says, and the same zeros evenly.

    Parameters
    ----------
    allocation
        Zeros of every row of its layers, all of which are pruned.
    interventions
        Pruners, from `PRUNERS`.
    experts
        Must be 1 alone.

    Raises
    ------
    UnknownName, InvalidInput
        If an intervention does not exist or prunes nothing, or experts are asked for.
    """
    check_settings(interventions, strengths=(0.0,), edit_strengths=(0.0,), experts=experts)
    for name in interventions:
        if name not in PRUNERS:
            raise InvalidInput(
                f"an allocation says how rows are pruned; the intervention {name!r} prunes none: "
                "leave it out."
            )
    if set(experts) != {1}:
        raise InvalidInput(
            f"with an allocation `experts` must be 1; got {list(experts)}: `entangle.expand` "
            "(`entangle expand --allocation`) builds experts from it."
        )
    rows = {name: np.arange(len(zeros)) for name, zeros in allocation.zeros.items()}
    for index in rows.values():
        index.flags.writeable = False
    selections = (
        Selection("all", None, None, rows),
        Selection("allocation", rule_label(allocation), None, rows),
    )
    return [
        AblationArm(selection, intervention, nominal_sparsity(allocation), 1, level)
        for intervention in dict.fromkeys(interventions)
        for selection, level in zip(selections, (even(allocation), allocation), strict=True)
    ]


STEPS = 6
MOST_STEPS = STEPS + 1
"""Evaluations of one search, at most."""
COLUMNS = ["intervention", "strength", "by", "fraction", "loss", "target", "matched", "low", "high"]


class _Step(NamedTuple):
    """An evaluation of a search."""

    arm: AblationArm
    found: Arrays
    loss: float


@dataclass(frozen=True, eq=False)
class Matched:
    """What the searches for matched controls found."""

    steps: pd.DataFrame
    """One row an evaluation; see `search_matched`."""
    arms: tuple[AblationArm, ...]
    """Of every search that reached the target, the arm that came closest; rule ``matched``."""
    found: tuple[Arrays, ...]
    """Their raw numbers."""


def to_match(arms: Sequence[AblationArm], by: str) -> list[int]:
    """Return the places of the arms that are matched: top neurons by a column, one expert."""
    chosen = [(arm.selection.rule, arm.selection.by, arm.experts) for arm in arms]
    return [place for place, one in enumerate(chosen) if one == ("top", by, 1)]


def search_matched(
    experiment: "Ablation",
    arms: Sequence[AblationArm],
    results: Sequence[Arrays],
    *,
    by: str,
    bar: Progress,
) -> Matched:
    """Find the share of neurons, lowest in ``by`` first, that costs as much as the top selection.

    Parameters
    ----------
    experiment
        Measures arms, or reads those that are kept. The rows of a step are solved with all others
        of their layers, which random pruning depends on, and it is kept by itself.
    arms, results
        Arms that were measured and their raw numbers; those of `to_match` are matched.
    by
        Column that is ranked.
    bar
        Counts `MOST_STEPS` a search: `STEPS` evaluations, the first of them with all neurons, and
        one more where all of them cost as much as the top ones.

    Returns
    -------
    Matched
        ``steps`` has one row an evaluation: ``fraction`` of each layer's neurons and the mean
        ``loss`` (nats a window) that it gave, next to the ``target``; ``matched`` is the fraction
        at which the loss reaches the target, interpolated in the logarithm of the fraction between
        ``low`` and ``high``, which bracket it. NaN where all neurons together cost less than the
        top ones, and where as many neurons as the top ones cost no less than these (``low`` is 0
        then).

    References
    ----------
    arXiv 2509.24198: 35 to 50 % of the neurons with a low WD cost as much as 2 % with a high one.
    """
    rows: list[tuple[object, ...]] = []
    closest: list[_Step] = []
    for place in to_match(arms, by):
        arm, target = arms[place], mean_loss(results[place]["loss"])
        experiment.nested(arm)
        seen: list[_Step] = []
        tried: list[tuple[float, float]] = []

        def loss(fraction: float, arm: AblationArm = arm, seen: list[_Step] = seen) -> float:
            nested = experiment.bottom(arm, by=by, fraction=fraction)
            found = experiment.measured(nested, bar, key=f"step-{nested.key}")
            seen.append(_Step(nested, found, mean_loss(found["loss"])))
            return seen[-1].loss

        share = arm.selection.n_rows / experiment.n_neurons
        matched, low, high = bisect_fraction(loss, target, low=share, steps=STEPS, tried=tried)
        bar.advance(STEPS + 1 - len(tried))
        rows += [
            (arm.intervention, arm.strength, by, fraction, value, target, matched, low, high)
            for fraction, value in tried
        ]
        if math.isfinite(matched) and math.isfinite(target):
            gaps = [abs(one.loss - target) for one in seen]
            closest.append(seen[int(np.argmin(gaps))])
    return Matched(
        pd.DataFrame(rows, columns=COLUMNS),
        tuple(_named(one.arm) for one in closest),
        tuple(one.found for one in closest),
    )


def _named(arm: AblationArm) -> AblationArm:
    return replace(arm, selection=replace(arm.selection, rule="matched"))


def bisect_fraction(
    loss: Callable[[float], float],
    target: float,
    *,
    low: float,
    steps: int,
    tried: list[tuple[float, float]],
) -> tuple[float, float, float]:
    """Return where a rising loss reaches ``target`` on [low, 1], and the bracket around it.

    The bracket is halved on a log scale. ``tried`` takes every (fraction, loss) in order. All is
    NaN if the loss at 1 stays below the target. Where no loss below the target was seen, that at
    ``low`` is measured too; if it reaches the target, the answer is NaN and the bracket (0, low).
    """
    top, bottom = (1.0, loss(1.0)), (low, -math.inf)
    tried.append(top)
    if not top[1] >= target:
        return math.nan, math.nan, math.nan
    for _ in range(steps - 1):
        middle = math.sqrt(bottom[0] * top[0])
        tried.append((middle, loss(middle)))
        if tried[-1][1] >= target:
            top = tried[-1]
        else:
            bottom = tried[-1]
    if bottom[1] == -math.inf and low < 1.0:
        bottom = low, loss(low)
        tried.append(bottom)
        if bottom[1] >= target:
            return math.nan, 0.0, low
    share = 0.5
    if math.isfinite(bottom[1]) and math.isfinite(top[1]) and top[1] > bottom[1]:
        share = (target - bottom[1]) / (top[1] - bottom[1])
    found = bottom[0] * (top[0] / bottom[0]) ** share
    return min(max(found, bottom[0]), top[0]), bottom[0], top[0]


def mean_loss(losses: NDArray[np.float64]) -> float:
    """Return the mean loss of a window in nats; infinite where a loss is not finite."""
    return float(losses.mean()) if np.isfinite(losses).all() else math.inf
