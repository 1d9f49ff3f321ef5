"""`compare`: pruning methods and expansions at several sparsities, on one text."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import pandas as pd

from entangle.activation import ACTIVATION_METHODS, FORMS, SCOPES, Masks
from entangle.allocation.allocate import allocate
from entangle.allocation.allocation import Allocation, even
from entangle.allocation.experts import mean_experts, nominal_sparsity, zeros_digest
from entangle.checks import choice, named, renamed, several, share, shown, whole
from entangle.doors import brought
from entangle.errors import InvalidInput
from entangle.evaluation import EvaluationText, as_evaluation, perplexity_ratio
from entangle.evaluation.measures import MEASURES, own_measures
from entangle.evaluation.perplexity import check_prefix, measure_perplexity
from entangle.experiments.experiment import WINDOW, Arm, Arrays, Evaluation, Experiment, numbered
from entangle.experiments.masked import (
    COSTS,
    DSNOT,
    GLOBAL,
    NUMBERS,
    Rivals,
    combined,
    made_by,
    nothing,
    one_thing,
)
from entangle.experts.build import check_experts
from entangle.experts.expand import expand
from entangle.experts.router import ROUTERS
from entangle.memory import check_memory, memory_for
from entangle.mixtures import MIXTURE_METHODS
from entangle.models.blocks import evaluating
from entangle.models.layers import find_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.pruning import PRUNERS
from entangle.results.comparison import (
    COMPARED_METHODS,
    DENSE,
    KEY,
    KIND,
    UNIFORM,
    Comparison,
    at_equal_nonzeros,
    load_comparison,
)
from entangle.runs.progress import tell
from entangle.runs.provenance import RunClock, claimed
from entangle.seeding import check_seed
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source

__all__ = [
    "COMPARED_METHODS", "KIND", "Comparison", "ComparisonArm", "Named", "arms",
    "at_equal_nonzeros", "compare", "load_comparison",
]  # fmt: skip

SPARSITIES, EXPERTS = (0.5, 0.7), (1, 16)
"""What is compared unless something else is asked for."""
_EVEN = ("uniform_ratio", "uniform_low", "uniform_high")

Named = tuple[str, Allocation]
"""What an allocation is called in the tables, and the allocation. Those of several sparsities may
have one name."""


@dataclass(frozen=True)
class ComparisonArm(Arm):
    """One model to build."""

    method: str
    """A key of `COMPARED_METHODS`, a pruner, or one of `ACTIVATION_METHODS`."""
    sparsity: float
    """Share of zeros: in every row, or of all layers together with an allocation. Of methods that
    mask activations, the share of the multiply-adds in scope that go; of those that prune experts,
    that of the experts' stored weights."""
    experts: int
    """Experts a layer (on average with an allocation that has its own); 1 without a router."""
    allocation: str = UNIFORM
    """Name of the allocation, or ``uniform``: ``sparsity`` in every row."""

    def describe(self) -> dict[str, object]:
        """Return what makes the arm, JSON-serialisable."""
        return asdict(self)

    @property
    def columns(self) -> dict[str, object]:
        """Columns of the tables that name the arm."""
        return {name: getattr(self, name) for name in KEY}

    @property
    def label(self) -> str:
        """A short line for messages."""
        allocated = "" if self.allocation == UNIFORM else f" {self.allocation}"
        return f"{self.method} {self.sparsity:g} k={self.experts}{allocated}"


@renamed(text="evaluation", chosen="methods", told="progress")
def compare(
    model: AnyModel,
    calibration: Source,
    evaluation: Source,
    methods: str | Iterable[str | ComparisonArm] = tuple(COMPARED_METHODS),
    *,
    sparsity: float | Iterable[float] | None = None,
    density: float | Iterable[float] | None = None,
    experts: int | Iterable[int] = EXPERTS,
    allocations: Named | Iterable[Named] = (),
    scope: str = "mlp",
    form: str | None = None,
    dense_prefix: int = 0,
    prefix: int = 0,
    measures: str | Iterable[str] = (),
    seed: int = 0,
    memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    extra: Callable[[Comparison, Path], object] | None = None,
    progress: bool | Callable[[str], None] | None = None,
) -> Comparison:
    """Build every arm from the dense weights and measure its perplexity; experts are not kept.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Dense, and left unchanged.
    calibration
        Text that the arms are fitted on, as in `entangle.expand`.
    evaluation
        Text to evaluate on, as in `entangle.expand`.
    methods
        Of ``magnitude``, ``wanda``, ``sparsegpt``, ``expansion`` and ``expansion-random``, and of
        the names of `entangle.activation`, which mask activations: ``teal``, ``column-norm``,
        ``wina``, ``cats``, ``chess``, ``chess+``, ``rsparse``, ``larosa``, ``griffin``,
        ``coreinfer``; and of `entangle.mixtures`, which prune the experts of a mixture. Any pruner
        by its name, and with ``dsnot:`` in front of it, DSnoT after it.
        ``teal:sparsegpt`` masks the activations of a model that SparseGPT has pruned, and
        ``teal:expansion`` those of an expansion, each expert's own columns counted: both keep the
        root of the density. ``expansion:NAME`` is an expansion by another router. `entangle list`
        shows all.
    sparsity
        Shares of zeros in [0, 1], the same in every row; by default 0.5 and 0.7, or those of the
        allocations where there are some. Methods that mask activations leave out that share of the
        multiply-adds in scope, everything charged, as expected from the calibration text; methods
        that prune experts leave out that share of the experts' stored weights.
    density
        One minus ``sparsity``, in its place.
    experts
        Numbers of experts a layer, of methods with a router. One expert is the plain method.
    allocations
        Pairs of a name and an allocation: every method is built with each of them too. All must be
        for the same layers, which all arms prune; the MLP linears without allocations. Uniform arms
        of an allocation's sparsity spread its very number of zeros evenly. One that has numbers of
        experts of its own is built with those, in place of ``experts``.
    scope, form
        As in `entangle.activation.fit`; ``scope`` is also what densities are counted in.
    dense_prefix, prefix
        First tokens of a window whose activations are not masked, and those that are not scored
        either; ``griffin`` and ``coreinfer`` choose neurons from all that are not masked.
    measures
        Of `entangle.evaluation.measures.MEASURES`, not ours: a column each, the mean over windows.
    seed
        Seed of the routers and of the bootstrap.
    memory
        As in `entangle.expand`.
    out
        Folder of the result. Arms are kept beside it as they finish.
    resume
        Skip the arms that an unfinished comparison of the same settings has finished; a finished
        one of the same settings is read.
    force
        Replace an existing result, or an unfinished comparison.
    extra
        Called with the result and its folder, before that takes the name ``out``, to add files,
        such as figures.
    progress
        Show a progress bar on standard error; by default if that is a terminal. A function is
        called with one line after each arm instead, for one release.

    Raises
    ------
    InvalidInput
        If a setting breaks a rule, or the result exists, or is unfinished and not to be resumed.
    EntangleError
        What the building of an arm raises; the message begins with the arm. With ``out``, the arms
        before it are kept.
    """
    clock, seed = RunClock(), check_seed(seed)
    with ExitStack() as held:
        held.enter_context(claimed(out))
        check_memory(memory)
        allocations = several_named(allocations)
        default = [nominal_sparsity(one) for _, one in allocations] or SPARSITIES
        shares = _shares(sparsity, density, default)
        planned = _former_arms(methods, sparsity=sparsity, experts=experts)
        planned = planned or arms(methods, shares, experts, allocations=allocations)
        told, bar = (progress, False) if callable(progress) else (None, progress)
        dense = as_language_model(model)
        held.enter_context(evaluating(dense.module))
        experiment = Comparing(
            dense, as_calibration(calibration, dense),
            Evaluation(
                as_evaluation(evaluation, dense), None, ("perplexity", *own_measures(measures)),
                whole("prefix", prefix, least=0),
            ),
            arms=planned, allocations=allocations, told=told, seed=seed,
            memory=memory_for(memory, dense.module),
            masks=Masks(choice("scope", scope, SCOPES),
                        None if form is None else choice("form", form, FORMS),
                        whole("dense_prefix", dense_prefix, least=0),
                        whole("prefix", prefix, least=0)),
        )  # fmt: skip
        experiment.check()
        found: Comparison = experiment.run(
            clock, out, resume=resume, force=force, extra=extra, progress=bar
        )
        return found


def _shares(sparsity: Any, density: Any, default: Any) -> Any:
    """Return the sparsities asked for, by either name."""
    if density is None:
        return default if sparsity is None else sparsity
    found = [1 - share("density", one) for one in several("density", density, empty=True)]
    if sparsity is not None:
        raise InvalidInput(
            f"`density` is 1 − `sparsity`, which is given already; got {shown(density)}: leave one "
            "of them out."
        )
    return found


def _former_arms(methods: object, **others: object) -> "list[ComparisonArm] | None":
    """Return a list of arms that is given in place of methods, as the version before took it."""
    listed = methods if isinstance(methods, list | tuple) else [methods]
    if not any(isinstance(one, ComparisonArm) for one in listed):
        return None
    note = "compare: give `methods`, `sparsity` and `experts` instead of a list of arms"
    warn(note, DeprecationWarning, stacklevel=4)
    for name, usual in (("sparsity", None), ("experts", EXPERTS)):
        if others[name] is not usual:
            raise InvalidInput(
                f"`{name}` makes arms, which are given already; got {shown(others[name])}: leave "
                "one of them out."
            )
    for arm in listed:
        if not isinstance(arm, ComparisonArm):
            raise InvalidInput(f"`methods` must be names of methods; got {shown(arm)} among arms.")
    return list(listed)


class Comparing(Experiment[ComparisonArm]):
    """Whole models that are built by several methods.

    Parameters
    ----------
    model, calibration, evaluation, seed, memory
        As in `Experiment`.
    arms, allocations
        What is built, and the allocations that it was made with.
    told
        Called with one line after each arm.
    """

    kind, ending = KIND, "comparing"
    result, load = Comparison, staticmethod(load_comparison)

    def __init__(
        self,
        model: LanguageModel,
        calibration: CalibrationSet,
        evaluation: Evaluation,
        *,
        arms: Sequence[ComparisonArm],
        allocations: Sequence[Named] = (),
        told: Callable[[str], None] | None = None,
        seed: int = 0,
        memory: int,
        masks: Masks | None = None,
    ) -> None:
        super().__init__(model, calibration, evaluation, seed=seed, memory=memory)
        self._masks = masks or Masks()
        self.arms, self._allocations, self._told = arms, allocations, told
        self._layers, self._by_name = common_layers(allocations), by_name(allocations)
        self._evenly = {sparsity: even(one) for (_, sparsity), one in self._by_name.items()}

    def check(self) -> None:
        """Refuse numbers of experts and allocations that do not fit, before anything is built."""
        for arm in self.arms:
            check_experts(arm.experts, tokens=self.calibration.n_tokens)
        check_prefix(self._masks.prefix, self._text)
        for _, one in self._allocations:
            layers = find_layers(self.model.module, list(one.zeros), None)
            one.check(layers, self.model.digest)

    def settings(self) -> dict[str, object]:
        """Return what a manifest records, JSON-serialisable."""
        settings: dict[str, object] = {
            "methods": list(dict.fromkeys(arm.method for arm in self.arms)),
            "arms": [[arm.method, arm.sparsity, arm.experts, arm.allocation] for arm in self.arms],
            "seed": self.seed,
            **self._masks.describe(),
            **self._plugins(),
        }
        if self._allocations:
            settings["allocations"] = [
                {"name": name, **one.manifest, "zeros_sha256": zeros_digest(one)}
                for name, one in self._allocations
            ]
        return settings

    def _plugins(self) -> dict[str, object]:
        """Return where methods that are not ours come from, by name."""
        found: dict[str, str] = {}
        names = [name for arm in self.arms for name in arm.method.split(":")]
        for door in (ACTIVATION_METHODS, MIXTURE_METHODS, PRUNERS, ROUTERS):
            found |= brought(door, names)
        found |= brought(MEASURES, self.evaluation.own)
        return {"plugins": found} if found else {}

    def evaluated(self) -> dict[str, object]:
        """Return what a manifest records of the evaluation: the text alone."""
        found: dict[str, object] = dict(self.evaluation.describe()["text"])  # type: ignore[call-overload]
        own = {"measures": self.evaluation.own} if self.evaluation.own else {}
        return found | own | ({"prefix": self._masks.prefix} if self._masks.prefix else {})

    def measure(self, arm: ComparisonArm) -> Arrays:
        """Build an arm and return its losses, costs, relative error, density and seconds."""
        rivals = self._rivals
        try:
            if arm.method in ACTIVATION_METHODS:
                return rivals.masked(arm.method, arm.sparsity)
            if arm.method in MIXTURE_METHODS:
                return rivals.mixtures(arm.method, arm.sparsity)
            if combined(arm.method):
                return rivals.combined(arm.method, arm.sparsity, arm.experts)
            if arm.method.startswith(DSNOT):
                return rivals.swapped(arm.method, arm.sparsity)
            allocation = self._allocation(arm)
        except InvalidInput as error:  # it does not apply, or not so sparsely: the table says so
            tell(f"{arm.label}: {error}")
            blank = {k: v * np.nan for k, v in self.dense.items() if k.startswith("own:")}
            return nothing(len(self.dense["loss"])) | blank
        pruner, router = made_by(arm.method)
        built = expand(
            self.model,
            self.calibration,
            experts=arm.experts,
            sparsity=arm.sparsity,
            pruner=pruner,
            layers="all" if self._layers is None else self._layers,
            proj="mlp" if self._layers is None else None,
            allocation=allocation,
            router=router,
            seed=self.seed,
            memory=self.memory,
            evaluation=None if self._masks.prefix else self.evaluation.text,
            keep=bool(self._masks.prefix or self.evaluation.own),
            progress=False,
        )
        found = built.perplexity
        if self._masks.prefix:
            assert built.model is not None  # noqa: S101
            found = measure_perplexity(built.model, self._text, prefix=self._masks.prefix)
        assert found is not None  # noqa: S101
        wrong, seconds = built.layers["relative_error"].mean(), float(str(built.run["seconds"]))
        numbers = {**built.costs, "relative_error": wrong, "seconds": seconds}
        numbers["density"] = rivals.density(float(built.costs["flops"]), self._layers)
        numbers["token_bytes"] = rivals.expanded(built)
        arrays = {name: np.array(numbers[name], np.float64) for name in NUMBERS}
        own = {} if built.model is None else self.evaluation.measured_own(built.model)
        return {"loss": found.window_losses, **arrays, **own}

    @cached_property
    def _rivals(self) -> Rivals:
        return Rivals(
            self.model, self.calibration, self._text, self._masks, self.seed, self.memory,
            self.evaluation.measured_own if self.evaluation.own else None,
        )  # fmt: skip

    @property
    def _text(self) -> EvaluationText:
        assert self.evaluation.text is not None  # noqa: S101
        return self.evaluation.text

    def _allocation(self, arm: ComparisonArm) -> Allocation | None:
        if arm.method == GLOBAL:
            layers = find_layers(self.model.module, self._layers or "all",
                                 "mlp" if self._layers is None else None)  # fmt: skip
            rows = [pd.DataFrame({"layer": x.name, "neuron": range(x.out_features)})
                    for x in layers]  # fmt: skip
            return allocate(
                pd.concat(rows), sparsity=arm.sparsity, rule=GLOBAL, model=self.model,
                progress=False,
            )  # fmt: skip
        key = arm.allocation, arm.sparsity
        allocation = self._by_name.get(key, self._evenly.get(arm.sparsity))
        if allocation is not None and _router(arm.method) == "single":
            return replace(allocation, experts=None)
        return allocation

    def done(self, arm: ComparisonArm | None, found: Arrays, *, known: bool = False) -> None:
        """Tell of an arm that is finished."""
        if self._told is not None:
            value = f"perplexity {self.evaluation.perplexity(found).value:.3f}"
            label = DENSE_ARM.label if arm is None else arm.label
            self._told(f"{label}: {value}{' (finished before)' if known else ''}")

    def prepare(
        self,
        held: ExitStack,  # noqa: ARG002
        *,
        progress: bool | None,
    ) -> Sequence[ComparisonArm]:
        """Measure the dense model."""
        told = (*COSTS, "density", "token_bytes")
        ones = {n: np.array(1.0 if n in told else np.nan) for n in NUMBERS}
        self.dense = self.evaluation.measure(self.model, progress=progress) | ones
        self.done(None, self.dense)
        return self.arms

    def tables(self, arms: Sequence[ComparisonArm], found: Sequence[Arrays]) -> dict[str, Any]:
        """Return one row an arm, and one an arm and window."""
        measured = {DENSE_ARM: self.dense, **dict(zip(arms, found, strict=True))}
        windows = [numbered("window", arm.columns, a, WINDOW) for arm, a in measured.items()]
        return {
            "frame": pd.DataFrame([self._row(arm, measured) for arm in measured]),
            "windows": pd.concat(windows, ignore_index=True)[["window", *KEY, "loss"]],
        }

    def _row(
        self, arm: ComparisonArm, measured: Mapping[ComparisonArm, Arrays]
    ) -> dict[str, object]:
        found, seed = measured[arm], self.seed
        result, dense = self.evaluation.perplexity(found), self.evaluation.perplexity(self.dense)
        ratio = perplexity_ratio(result, dense, seed=seed)
        row = {**arm.columns, "perplexity": result.value, "ratio": ratio.value}
        row |= {"ratio_low": ratio.low, "ratio_high": ratio.high}
        row |= {name: float(found[name]) for name in NUMBERS}
        row |= {name: float(found[f"own:{name}"].mean()) for name in self.evaluation.own}
        uniform = measured.get(replace(arm, allocation=UNIFORM))
        if arm.allocation != UNIFORM and uniform is not None:
            ratio = perplexity_ratio(result, self.evaluation.perplexity(uniform), seed=seed)
            row |= dict(zip(_EVEN, (ratio.value, ratio.low, ratio.high), strict=True))
        return row


DENSE_ARM = ComparisonArm(DENSE, 0.0, 1)
"""The dense model, as the tables name it."""


def arms(
    methods: str | Iterable[Any],
    sparsities: float | Iterable[float],
    experts: int | Iterable[int],
    *,
    allocations: Named | Iterable[Named] = (),
) -> list[ComparisonArm]:
    """Return the models to build: methods without a router once, others for every count above 1.

    What is listed twice is built once. One expert of a method with a router is the plain method.

    Parameters
    ----------
    methods
        Keys of `COMPARED_METHODS`, and names of `ACTIVATION_METHODS`.
    sparsities
        Shares of zeros in [0, 1], the same in every row.
    experts
        Numbers of experts a layer.
    allocations
        Every method is built with each of them too. One that has numbers of experts of its own is
        built with those, in place of ``experts``.

    Raises
    ------
    InvalidInput, UnknownName
        A method that does not exist, a number out of range, or nothing to build.
    """
    methods = [
        one_thing(
            one if isinstance(one, str) and _joined(one) else choice("method", one, known_methods())
        )
        for one in several("methods", methods, empty=True)
    ]
    sparsities = [share("sparsity", one) for one in several("sparsity", sparsities, empty=True)]
    experts = [whole("experts", k, least=1) for k in several("experts", experts, empty=True)]
    allocations = several_named(allocations)
    routed = {one for one in methods if _router(one) != "single"}
    own = (*ACTIVATION_METHODS, *MIXTURE_METHODS, GLOBAL)
    masked = {one for one in methods if one in own or ":" in one}
    levels: list[tuple[float, str, Allocation | None]]
    levels = [(sparsity, UNIFORM, None) for sparsity in sparsities]
    levels += [(sparsity, name, one) for (name, sparsity), one in by_name(allocations).items()]
    found = [
        ComparisonArm(method, sparsity, k, name)
        for sparsity, name, allocation in levels
        for method in methods
        if allocation is None or method not in masked
        for k in (_counts(allocation, experts) if method in routed else [1])
    ]
    if not found:
        raise InvalidInput(
            "there is nothing to build: name at least one method, one `sparsity` and, for methods "
            f"with a router, a number of `experts` above 1; got methods {list(methods)}, "
            f"sparsity {list(sparsities)} and experts {list(experts)}."
        )
    return list(dict.fromkeys(found))


def known_methods() -> tuple[str, ...]:
    """Return the names of everything that can be compared."""
    swapped = [DSNOT + name for name in PRUNERS]
    both = [f"teal:{name}" for name in dict.fromkeys([*COMPARED_METHODS, *PRUNERS])]
    own = (*COMPARED_METHODS, GLOBAL, *PRUNERS, *swapped, *ACTIVATION_METHODS, *MIXTURE_METHODS)
    return tuple(dict.fromkeys([*own, *both]))


def _joined(method: str) -> bool:
    """Tell whether a name is of masks on weights, or of an expansion by a named router."""
    parts = combined(method)
    weights = method if parts is None else parts[1]
    router = weights.removeprefix("expansion:")
    if router != weights:
        choice("router", router, ROUTERS)
        return True
    return parts is not None


def _router(method: str) -> str:
    parts = combined(method)
    return made_by(method if parts is None else parts[1])[1]


def several_named(allocations: Named | Iterable[Named]) -> list[Named]:
    """Return named allocations, or one, as a list."""
    if isinstance(allocations, tuple) and len(allocations) == 2:
        name, one = allocations
        if isinstance(name, str) and isinstance(one, Allocation):
            return [(name, one)]
    found = several("allocations", allocations, empty=True)
    for one in found:
        if not (isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Allocation)):
            raise InvalidInput(
                f"`allocations` must be pairs of a name and an Allocation; got {shown(one)}."
            )
    return [(named("allocations", name), one) for name, one in found]


def by_name(allocations: Sequence[Named]) -> dict[tuple[str, float], Allocation]:
    """Return allocations by name and sparsity, which must tell them apart."""
    found: dict[tuple[str, float], Allocation] = {}
    for name, allocation in allocations:
        key = name, nominal_sparsity(allocation)
        if name == UNIFORM:
            raise InvalidInput(f"an allocation must not be called {UNIFORM!r}; rename it.")
        if key in found:
            raise InvalidInput(
                f"two allocations of sparsity {key[1]:g} are called {name!r} and could not be told "
                "apart; rename one."
            )
        found[key] = allocation
    return found


def _counts(allocation: Allocation | None, experts: Sequence[int]) -> list[int]:
    if allocation is None or allocation.experts is None:
        return [k for k in experts if k > 1]
    return [round(mean_experts(allocation))]


def common_layers(allocations: Sequence[Named]) -> list[str] | None:
    """Return the layers of all allocations, None without any; they must have one pattern too."""
    first: tuple[str, list[str]] | None = None
    patterns = sorted({allocation.pattern for _, allocation in allocations})
    if len(patterns) > 1:
        raise InvalidInput(
            f"allocations that are compared must have one pattern; got {' and '.join(patterns)}."
        )
    for name, allocation in allocations:
        layers = list(allocation.zeros)
        first = first or (name, layers)
        if layers != first[1]:
            raise InvalidInput(
                f"allocations that are compared must be for the same layers; {first[0]!r} has "
                f"{len(first[1])} and {name!r} has {len(layers)}, or others."
            )
    return None if first is None else first[1]
