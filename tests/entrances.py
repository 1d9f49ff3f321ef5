"""Every public function, called with settings of other types, without the tests' type checks.

``python -m tests.entrances`` prints what is wrong, one JSON list. A function's parameters are known
by their annotations; what is written here is only how each function is called at its smallest.
"""

import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import entangle
from entangle import plotting
from entangle.allocation import expert_budget, search
from entangle.errors import InvalidInput
from entangle.evaluation import EvaluationText
from entangle.experiments.outliers import gmm_components
from entangle.experiments.predictors import predictor_table
from entangle.experiments.selection import select
from entangle.models.layers import find_layers
from entangle.models.loading import as_language_model
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY, tiny_tokenizer

MODEL = as_language_model(TINY["llama"]())
WITH_TOKENS = replace(MODEL, tokenizer=tiny_tokenizer())
IDS = torch.randint(4, 112, (6, 16), generator=torch_rng(0, "entrances"))
TEXT, EVALUATION = CalibrationSet(IDS, "ids", {}), EvaluationText(IDS[:4], "ids", {})
GATE = "model.layers.0.mlp.gate_proj"
SCORES = entangle.score(MODEL, TEXT, layers=GATE, progress=False)
ALLOCATION = entangle.allocate(SCORES, sparsity=0.5, rule="uniform", model=MODEL)

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "score": (entangle.score, {"model": MODEL, "calibration": TEXT, "layers": GATE}),
    "perplexity": (entangle.perplexity, {"model": MODEL, "text": EVALUATION}),
    "ablate": (
        entangle.ablate,
        {"model": MODEL, "calibration": TEXT, "evaluation": EVALUATION, "layers": GATE,
         "selections": "top", "interventions": "zero", "edit_strengths": 0.5, "strengths": 0.5,
         "experts": 1, "count": 2, "seeds": 1, "measures": "perplexity"},
    ),
    "expand": (
        entangle.expand,
        {"model": MODEL, "calibration": TEXT, "experts": 2, "restarts": 1, "layers": GATE,
         "proj": None, "sparsity": 0.5},
    ),
    "prune": (
        entangle.prune,
        {"model": MODEL, "calibration": TEXT, "layers": GATE, "proj": None, "sparsity": 0.5},
    ),
    "compare": (
        entangle.compare,
        {"model": MODEL, "calibration": TEXT, "evaluation": EVALUATION, "methods": "wanda",
         "sparsity": 0.5, "experts": 2},
    ),
    "decompose": (
        entangle.decompose,
        {"model": MODEL, "calibration": TEXT, "layers": GATE, "experts": 1, "neurons": 5,
         "sparsity": 0.5, "token_pairs": 20, "contexts": 2, "separated": 2},
    ),
    "anchor": (
        entangle.anchor,
        {"model": MODEL, "calibration": TEXT, "layers": GATE, "atoms": 8, "active": 2,
         "controls": "variance", "n_boot": 20},
    ),
    "neuron_modes": (
        entangle.neuron_modes,
        {"model": MODEL, "calibration": TEXT, "layer": GATE, "neurons": 5},
    ),
    "allocate": (
        entangle.allocate,
        {"scores": SCORES, "sparsity": 0.5, "rule": "linear", "model": MODEL},
    ),
    "search": (
        search,
        {"scores": SCORES, "model": MODEL, "calibration": TEXT, "sparsity": 0.5,
         "evaluations": 2},
    ),
    "expert_budget": (expert_budget, {"allocation": ALLOCATION, "scores": SCORES, "experts": 2}),
    "diff": (entangle.diff, {"a": SCORES, "b": SCORES, "tops": 0.1, "n_boot": 20}),
    "probe": (
        entangle.probe,
        {"model": WITH_TOKENS, "layer": GATE, "neuron": 3, "text": "hello",
         "special_tokens": "none"},
    ),
    "explore": (
        entangle.explore,
        {"source": MODEL, "calibration": TEXT, "layers": GATE, "proj": None, "experts": 1},
    ),
    "select": (select, {"scores": SCORES.frame, "rule": "top", "count": 3}),
    "gmm_components": (gmm_components, {"scores": SCORES, "rows": {GATE: 5}, "points": 40}),
    "predictor_table": (
        predictor_table,
        {"frame": SCORES.frame, "target": "wd", "predictors": "md", "n_boot": 20},
    ),
    "top": (SCORES.top, {"k": 3}),
    "histogram": (SCORES.histogram, {"layer": GATE, "neuron": 3}),
    "plot_wd_distribution": (plotting.plot_wd_distribution, {"scores": SCORES.frame}),
    "plot_wd_against_md": (
        plotting.plot_wd_against_md,
        {"scores": SCORES.frame, "n_boot": 20},
    ),
    "figure_wd_by_layer": (plotting.figure_wd_by_layer, {"scores": SCORES.frame}),
}  # fmt: skip
"""By name: a public function, and the arguments of its smallest call, scalars wherever possible."""

ELSEWHERE = {
    "load_ablation", "load_allocation", "load_comparison", "load_decomposition", "load_difference",
    "load_expanded", "load_result", "load_scores",  # see `unlike_paths`
    "load_calibration", "load_evaluation", "load_minimal_pairs", "load_model",  # tests of their own
    "study", "trace",  # likewise
}  # fmt: skip

NOT_COUNTED = {"memory", "progress", "quiet", "bins", "text"}
"""Settings that are no plain numbers everywhere, or any words."""

CALLED = {"pruner": "pruning method", "by": "column", "rule": "allocation rule|rule",
          "tune": "allocation rule", "across": "rule of layers", "predictors": "column",
          "given": "column", "target": "column", "layer": "layer", "proj": "projection",
          "selections": "selection", "interventions": "intervention", "measures": "measure",
          "methods": "method", "experts": "experts"}  # fmt: skip
"""What a message calls a setting where it does not give its name."""

WRONG: dict[str, tuple[Any, ...]] = {
    "int": (2.5, 3.0, "many", True, np.True_, np.float64(2.0), -1, [[1]], math.nan),
    "float": ("much", True, math.nan, {"a": 0.5}, object()),
    "str": (3, 2.5, ["a"], {"a": 1}, "no such name"),
}


def kind_of(parameter: inspect.Parameter) -> str | None:
    """Return which of `WRONG` a parameter refuses, from its annotation; None for other classes."""
    words = str(parameter.annotation).replace("<class '", "").replace("'>", "")
    if parameter.name in NOT_COUNTED or "typing.Literal" in words:
        return None
    parts = {part.strip() for part in words.split("|")} - {"None"}
    parts = {part.removeprefix("collections.abc.Iterable[").removesuffix("]") for part in parts}
    for kind, allowed in (("int", {"int"}), ("float", {"float", "int"}), ("str", {"str"})):
        if parts and parts <= allowed:
            return kind
    return None


def unlike_plain() -> Iterator[str]:
    """Tell of calls whose result differs when every number is NumPy's and every scalar a list."""
    for name, (function, settings) in CALLS.items():
        plain = outcome(function(**settings, **silent(function)))
        for change in (as_numpy, as_listed):
            changed = {
                key: change(value, inspect.signature(function).parameters[key])
                for key, value in settings.items()
            }
            try:
                found = outcome(function(**changed, **silent(function)))
            except Exception as error:
                yield f"{name} {change.__name__}: {type(error).__name__}: {error}"
                continue
            if found != plain:
                yield f"{name} {change.__name__}: {found[:300]} is not {plain[:300]}"


def silent(function: Callable[..., Any]) -> dict[str, Any]:
    return {"progress": False} if "progress" in inspect.signature(function).parameters else {}


def as_numpy(value: Any, _parameter: inspect.Parameter) -> Any:
    """Return a number or string as NumPy's, of the narrowest kind that is usual."""
    if isinstance(value, bool):
        return value
    kinds = {int: np.int64, float: np.float32, str: np.str_}
    return kinds[type(value)](value) if type(value) in kinds else value


def as_listed(value: Any, parameter: inspect.Parameter) -> Any:
    """Return a scalar as an array or a generator where several values are taken."""
    takes_several = "Iterable" in str(parameter.annotation)
    if not takes_several or type(value) not in (int, float, str):
        return value
    return (one for one in [value]) if isinstance(value, str) else np.array([value])


def outcome(result: Any) -> str:
    """Return what tells two results apart: the tables, and the settings of the manifest."""
    frames = [
        part
        for part in (result, *(getattr(result, "__dict__", {}) or {}).values())
        if isinstance(part, pd.DataFrame)
    ]
    tables = [frame.drop(columns="seconds", errors="ignore").to_csv() for frame in frames]
    manifest = getattr(result, "manifest", None) or {}
    return json.dumps([tables, manifest.get("settings")], sort_keys=True)


def unrefused() -> Iterator[str]:
    """Tell of wrong settings that are taken, or refused without their name and value."""
    for name, (function, settings) in CALLS.items():
        for parameter in inspect.signature(function).parameters.values():
            for value in WRONG.get(kind_of(parameter) or "", ()):
                problem = refusal(function, settings, parameter.name, value)
                if problem:
                    yield f"{name}({parameter.name}={value!r}): {problem}"


def refusal(
    function: Callable[..., Any], settings: dict[str, Any], name: str, value: object
) -> str:
    """Return what is wrong with how a function refuses a value; empty if nothing is."""
    try:
        function(**{**silent(function), **settings, name: value})
    except InvalidInput as error:
        words = [name, *CALLED.get(name, "").split("|")]
        said = str(error)
        if not any(word and word in said for word in words):
            return f"does not name the setting: {said}"
        while isinstance(value, list):  # of several values, the wrong one is shown
            value = value[0]
        shown = repr(value.item() if isinstance(value, np.generic) else value)
        return "" if shown[:60] in said or str(value) in said else f"does not show it: {said}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "is taken"


def unlike_layers() -> Iterator[str]:
    """Tell of ways to name the same layers that do not lead to them."""
    module = MODEL.module
    layers = find_layers(module, [0, 2])
    first = find_layers(module, 0)
    ways: list[Any] = [
        [0, 2], (0, 2), {2, 0}, np.array([0, 2]), torch.tensor([2, 0]), pd.Series([0, 2]),
        pd.Index([0, 2]), range(0, 3, 2), (one for one in (0, 2)), ["0", "2"], [np.int64(0), 2],
        layers, set(layers), {0: "", 2: ""}.keys(), [0, *find_layers(module, 2)],
        pd.Series([layer.name for layer in layers]), [np.str_(layer.name) for layer in layers],
    ]  # fmt: skip
    alone: list[Any] = [0, np.int64(0), torch.tensor(0), "0", np.str_("0"), [0], range(1)]
    for way, wanted in [*((way, layers) for way in ways), *((way, first) for way in alone)]:
        shown = repr(way)
        try:
            found = find_layers(module, way)
        except Exception as error:
            yield f"layers={shown}: {type(error).__name__}: {error}"
            continue
        if [layer.name for layer in found] != [layer.name for layer in wanted]:
            yield f"layers={shown}: found {[layer.name for layer in found]}"
    others: list[Any] = [-1, "-1", 3, 0.0, True, None, [], {}, {0: 1}, b"0", SCORES.frame, MODEL]
    for wrong in others:
        try:
            find_layers(module, wrong)
        except InvalidInput:
            continue
        except Exception as error:
            yield f"layers={wrong!r}: {type(error).__name__}: {error}"
        else:
            yield f"layers={wrong!r} is taken"


def unlike_paths() -> Iterator[str]:
    """Tell of readers that take what is no path, or do not say so."""
    readers = [name for name in entangle.__all__ if name in ELSEWHERE and name[5:] in (
        "ablation", "allocation", "comparison", "decomposition", "difference", "expanded",
        "scores")]  # fmt: skip
    for name, value in itertools.product(readers, (3, None, "", b"x", ["x"], "nowhere", "a\0b")):
        problem = refusal(getattr(entangle, name), {}, "path", value)
        if problem and not (value == "nowhere" and problem.startswith("does not name")):
            yield f"{name}({value!r}): {problem}"


def uncalled() -> Iterator[str]:
    """Tell of public functions that no call here reaches."""
    for name in entangle.__all__:
        known = name in CALLS or name in ELSEWHERE
        if inspect.isfunction(getattr(entangle, name)) and not known:
            yield f"{name} is not called"


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        os.chdir(Path(place))
        checks = (uncalled, unlike_layers, unlike_paths, unlike_plain, unrefused)
        print(json.dumps([problem for check in checks for problem in check()]))
