"""Compare pruning methods and expansions at several sparsities, on one text."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors
from torch import tensor

from entangle.allocation.allocation import Allocation, even
from entangle.allocation.experts import nominal_sparsity, zeros_digest
from entangle.checks import several, shown
from entangle.errors import EntangleError, InvalidInput
from entangle.evaluation import EvaluationText, Perplexity, as_evaluation, perplexity_ratio
from entangle.evaluation.perplexity import measure_perplexity
from entangle.experiments.compare_arms import (
    Arm,
    Named,
    arms,
    by_name,
    common_layers,
    several_named,
)
from entangle.experts.build import check_experts
from entangle.experts.expand import expand
from entangle.memory import check_memory, memory_for
from entangle.models.blocks import evaluates
from entangle.models.layers import find_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.results.comparison import (
    DENSE,
    KEY,
    KIND,
    METHODS,
    UNIFORM,
    Comparison,
    at_equal_nonzeros,
    load_comparison,
)
from entangle.runs.provenance import RunClock, claims_out, make_manifest
from entangle.runs.reading import READ_ERRORS
from entangle.runs.unfinished import Unfinished, is_made
from entangle.seeding import check_seed
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source

__all__ = [
    "KIND", "METHODS", "Arm", "Comparison", "Named", "arms", "at_equal_nonzeros", "compare",
    "load_comparison",
]  # fmt: skip

SPARSITIES, EXPERTS = (0.5, 0.7), 16
"""What is compared unless something else is asked for."""
_ENDING = "comparing"
_EVEN = ("uniform_ratio", "uniform_low", "uniform_high")
_COSTS = ("flops", "nonzeros", "bytes")
_NUMBERS = (*_COSTS, "relative_error", "seconds")


@dataclass(frozen=True, eq=False)
class _Measured:
    """What one arm came to."""

    losses: NDArray[np.float64]
    """Of every window, (n_windows,), nats."""
    numbers: Mapping[str, float]
    """Values of `_NUMBERS`."""

    def perplexity(self, text: EvaluationText) -> Perplexity:
        return Perplexity.of(tensor(self.losses), text)

    def write(self, path: Path) -> None:
        arrays = {name: np.array(self.numbers[name], np.float64) for name in _NUMBERS}
        path.write_bytes(to_safetensors({"losses": self.losses, **arrays}))

    @classmethod
    def read(cls, path: Path, text: EvaluationText) -> "_Measured":
        try:
            found = load_file(path)
            losses = found["losses"]
            if losses.shape != (text.n_windows,) or losses.dtype != np.float64:
                raise ValueError(f"losses of shape {losses.shape} for {text.n_windows} windows")
            return cls(losses, {name: float(found[name]) for name in _NUMBERS})
        except READ_ERRORS as error:
            raise InvalidInput(
                f"{str(path)!r} is damaged ({error}); remove it and go on with --resume "
                "(resume=True)."
            ) from error


@claims_out
@evaluates
def compare(
    model: AnyModel,
    calibration: Source,
    text: Source,
    chosen: Arm | Iterable[Arm] | None = None,
    *,
    methods: str | Iterable[str] | None = None,
    sparsity: float | Iterable[float] | None = None,
    experts: int | Iterable[int] | None = None,
    allocations: Named | Iterable[Named] = (),
    seed: int = 0,
    memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    extra: Callable[[Comparison, Path], object] | None = None,
    told: Callable[[str], None] = lambda _line: None,
) -> Comparison:
    """Build every arm from the dense weights and measure its perplexity; experts are not kept.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Dense, and left unchanged.
    calibration
        Text that the arms are fitted on, as in `entangle.expand`.
    text
        Text to evaluate on, as ``evaluation`` in `entangle.expand`.
    chosen
        From `arms`; in place of ``methods``, ``sparsity`` and ``experts``.
    methods, sparsity, experts
        What `arms` makes arms of: by default all `METHODS`, 0.5 and 0.7 (the allocations' own where
        there are some), and 16.
    allocations
        Those that the arms were made with. All must be for the same layers, which all arms prune;
        the MLP linears without allocations. Uniform arms of an allocation's sparsity spread its
        very number of zeros evenly.
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
    told
        Called with one line after each arm.

    Raises
    ------
    InvalidInput
        If a setting breaks a rule, or the result exists, or is unfinished and not to be resumed.
    EntangleError
        What the building of an arm raises; the message begins with the arm. With ``out``, the arms
        before it are kept.
    """
    clock, seed = RunClock(), check_seed(seed)
    check_memory(memory)
    allocations = several_named(allocations)
    chosen = _chosen(chosen, methods, sparsity, experts, allocations)
    dense = as_language_model(model)
    calibration, text = as_calibration(calibration, dense), as_evaluation(text, dense)
    budget = memory_for(memory, dense.module)
    for arm in chosen:
        check_experts(arm.experts, tokens=calibration.n_tokens)
    bench = _Bench(dense, calibration, text, allocations, seed=seed, memory=budget)
    for _, one in allocations:  # told before anything is built
        one.check(find_layers(dense.module, list(one.zeros), None), dense.digest)
    manifest = make_manifest(
        KIND,
        model=dense.describe(),
        calibration=calibration.describe(),
        evaluation=text.describe(),
        settings=_settings(chosen, allocations, seed),
    )
    kept = None
    if out is not None:
        if resume and not force and is_made(out, KIND, manifest, ending=_ENDING):
            return load_comparison(out)
        kept = Unfinished(
            out, manifest, what="comparison", ending=_ENDING, resume=resume, force=force
        )
    results: dict[Arm, _Measured] = {}
    for arm in (Arm(DENSE, 0.0, 1), *chosen):
        results[arm], before = _measured(bench, arm, kept)
        value = f"perplexity {results[arm].perplexity(text).value:.3f}"
        told(f"{arm.label}: {value}{' (finished before)' if before else ''}")
    frame, windows = _tables(results, text, seed=seed)
    found = Comparison(frame, windows, manifest | clock.read(budget))
    if kept is not None and out is not None:
        found.save(out, force=force, extra=None if extra is None else partial(extra, found))
        kept.remove()
    return found


def _chosen(
    chosen: Arm | Iterable[Arm] | None,
    methods: str | Iterable[str] | None,
    sparsity: float | Iterable[float] | None,
    experts: int | Iterable[int] | None,
    allocations: Sequence[Named],
) -> list[Arm]:
    """Return the arms given, or those that methods, sparsities and numbers of experts make."""
    if chosen is None:
        return arms(
            METHODS if methods is None else methods,
            _sparsities(allocations) if sparsity is None else sparsity,
            EXPERTS if experts is None else experts,
            allocations=allocations,
        )
    for name, value in (("methods", methods), ("sparsity", sparsity), ("experts", experts)):
        if value is not None:
            raise InvalidInput(
                f"`{name}` makes arms, which `chosen` has already; got {shown(value)}: leave one "
                "of them out."
            )
    found = several("chosen", chosen, Arm)
    for arm in found:
        if not isinstance(arm, Arm):
            raise InvalidInput(f"`chosen` must be arms, from `arms`; got {shown(arm)}.")
    return found


def _sparsities(allocations: Sequence[Named]) -> Sequence[float]:
    """Return the sparsities of allocations, the usual ones where there are none."""
    return [nominal_sparsity(one) for _, one in allocations] or SPARSITIES


def _settings(chosen: Sequence[Arm], allocations: Sequence[Named], seed: int) -> dict[str, object]:
    settings: dict[str, object] = {
        "methods": list(dict.fromkeys(arm.method for arm in chosen)),
        "arms": [[arm.method, arm.sparsity, arm.experts, arm.allocation] for arm in chosen],
        "seed": seed,
    }
    if allocations:
        settings["allocations"] = [
            {"name": name, **one.manifest, "zeros_sha256": zeros_digest(one)}
            for name, one in allocations
        ]
    return settings


class _Bench:
    """Builds and measures arms, each from the dense weights."""

    def __init__(
        self,
        model: LanguageModel,
        calibration: CalibrationSet,
        text: EvaluationText,
        allocations: Sequence[Named],
        *,
        seed: int,
        memory: int,
    ) -> None:
        self._model, self._calibration, self.text = model, calibration, text
        self._seed, self._memory = seed, memory
        self._layers, self._by_name = common_layers(allocations), by_name(allocations)
        self._evenly = {sparsity: even(one) for (_, sparsity), one in self._by_name.items()}

    def measure(self, arm: Arm) -> _Measured:
        """Build an arm, unless it is the dense model, and measure it."""
        if arm.method == DENSE:
            losses = measure_perplexity(self._model, self.text, progress=False).window_losses
            costs = dict.fromkeys(_COSTS, 1.0)
            return _Measured(losses, costs | dict.fromkeys(_NUMBERS[3:], float("nan")))
        pruner, router = METHODS[arm.method]
        everywhere = self._layers is None
        expanded = expand(
            self._model,
            self._calibration,
            experts=arm.experts,
            sparsity=arm.sparsity,
            pruner=pruner,
            layers="all" if self._layers is None else self._layers,
            proj="mlp" if everywhere else None,
            allocation=self._allocation(arm),
            router=router,
            seed=self._seed,
            memory=self._memory,
            evaluation=self.text,
            keep=False,
            progress=False,
        )
        assert expanded.perplexity is not None  # noqa: S101
        error = float(expanded.layers["relative_error"].mean())
        seconds = float(str(expanded.run["seconds"]))
        numbers = {**expanded.costs, "relative_error": error, "seconds": seconds}
        return _Measured(expanded.perplexity.window_losses, numbers)

    def _allocation(self, arm: Arm) -> Allocation | None:
        key = arm.allocation, arm.sparsity
        allocation = self._by_name.get(key, self._evenly.get(arm.sparsity))
        if allocation is not None and METHODS[arm.method][1] == "single":
            return replace(allocation, experts=None)
        return allocation


def _measured(bench: _Bench, arm: Arm, kept: Unfinished | None) -> tuple[_Measured, bool]:
    """Return what an arm came to, and whether an earlier run had finished it."""
    name = f"arm-{arm.key}.safetensors"
    path = None if kept is None else kept.find(name)
    if path is not None:
        return _Measured.read(path, bench.text), True
    try:
        found = bench.measure(arm)
    except EntangleError as error:
        raise type(error)(f"{arm.label}: {error}") from error
    if kept is not None:
        kept.keep(name, found.write)
    return found, False


def _tables(
    measured: Mapping[Arm, _Measured], text: EvaluationText, *, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row an arm, and one an arm and window."""
    rows, losses = [], []
    known = {arm: one.perplexity(text) for arm, one in measured.items()}
    dense = next(iter(known.values()))
    for arm, one in measured.items():
        result = known[arm]
        ratio = perplexity_ratio(result, dense, seed=seed)
        key = dict(zip(KEY, (arm.method, arm.sparsity, arm.experts, arm.allocation), strict=True))
        row: dict[str, object] = {**key, "perplexity": result.value, "ratio": ratio.value}
        row |= {"ratio_low": ratio.low, "ratio_high": ratio.high, **one.numbers}
        uniform = known.get(replace(arm, allocation=UNIFORM))
        if arm.allocation != UNIFORM and uniform is not None:
            ratio = perplexity_ratio(result, uniform, seed=seed)
            row |= dict(zip(_EVEN, (ratio.value, ratio.low, ratio.high), strict=True))
        rows.append(row)
        window = pd.DataFrame({**key, "loss": result.window_losses})
        losses.append(window.rename_axis("window").reset_index())
    return pd.DataFrame(rows), pd.concat(losses, ignore_index=True)
