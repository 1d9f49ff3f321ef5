"""Arms of a comparison that mask activations or swap zeros, or do both to sparse weights.

Sparse weights with masked activations share what goes: both keep the root of the density, and the
masks' level is solved until the calibration text shows the density that was asked for.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entangle.activation import (
    ACTIVATION_METHODS,
    ActivationMethod,
    ActivationSparsity,
    Masks,
    fit,
    measure,
)
from entangle.activation.rules import Window
from entangle.activation.subject import Routed, Subject
from entangle.doors import Door
from entangle.errors import InvalidInput
from entangle.evaluation import EvaluationText
from entangle.evaluation.perplexity import measure_perplexity
from entangle.experiments.experiment import Arrays
from entangle.experts.dsnot import prune_dsnot
from entangle.experts.expand import Expansion, expand
from entangle.experts.linear import ExpandedLinear
from entangle.experts.router import ROUTERS
from entangle.mixtures import MIXTURE_METHODS, Statistics, gather, prune_mixtures
from entangle.models.layers import Layer, find_layers, list_layers
from entangle.models.loading import LanguageModel
from entangle.packed.formats import pack
from entangle.pruning import PRUNERS
from entangle.recording.recorder import of_one_group
from entangle.results.comparison import COMPARED_METHODS, DENSE, made_with
from entangle.texts.calibration_set import CalibrationSet

DSNOT = "dsnot:"
"""In front of a pruner's name: DSnoT swaps the zeros that it made."""
GLOBAL = "magnitude-global"
"""One threshold on |w| for all layers that are pruned: essential sparsity."""
COSTS = ("flops", "nonzeros", "bytes")
NUMBERS = (*COSTS, "relative_error", "seconds", "density", "token_bytes")
"""What is known of an arm beside its losses."""
_SOLVED, _ROUNDS, _SEQUENCES = 0.005, 4, 8


def combined(method: str) -> tuple[str, str] | None:
    """Return the method that masks and the one of the weights, of ``teal:sparsegpt``; else None."""
    masks, _, weights = method.partition(":")
    known = weights in PRUNERS or made_with(weights) is not None
    return (masks, weights) if masks in ACTIVATION_METHODS and known else None


def made_by(weights: str) -> tuple[str, str]:
    """Return pruner and router of a method of weights."""
    if weights == GLOBAL:
        return "magnitude", "single"
    return made_with(weights) or (weights, "single")


def one_thing(method: str) -> str:
    """Return a method's name; load what it stands for, and refuse it if that is two things.

    Raises
    ------
    InvalidInput
        If a pruner, a method of activations and one of mixtures have one name, if somebody's has
        one that means something else, or if an installed package's cannot be loaded.
    """
    doors: list[Door[Any]] = [PRUNERS, ACTIVATION_METHODS, MIXTURE_METHODS]
    homes = [door for door in doors if method in door]
    means_else = method in (DENSE, GLOBAL, *COMPARED_METHODS)
    if len(homes) > 1 or (means_else and not all(door.is_ours(method) for door in homes)):
        sources = ", ".join(f"{door.kind}: {door.source(method) or 'no source'}" for door in homes)
        raise InvalidInput(
            f"{method!r} means two things in a comparison ({sources}); register yours by another "
            "name."
        )
    for part in method.split(":"):
        for door in (*doors, ROUTERS):
            if part in door:
                door[part]
    return method


@dataclass(eq=False)
class Rivals:
    """A dense model, the text that methods are fitted on, and the one that scores them."""

    model: LanguageModel
    calibration: CalibrationSet
    text: EvaluationText
    masks: Masks
    seed: int
    memory: int
    also: Callable[[LanguageModel], dict[str, NDArray[np.float64]]] | None = None
    """Measures of one's own of an arm, as arrays."""
    _fitted: dict[str, ActivationMethod] = field(default_factory=dict)
    _mixtures: dict[bool, Statistics] = field(default_factory=dict)

    @property
    def everything(self) -> int:
        """Weights of all linear layers."""
        return sum(math.prod(x.shape) for x in list_layers(self.model.module))

    @property
    def active(self) -> float:
        """Weights of all linear layers that a token meets: of experts, those it is sent to."""
        return sum(math.prod(x.shape) * x.share for x in list_layers(self.model.module))

    def density(self, flops: float, layers: Sequence[str] | None = None) -> float:
        """Return the density in scope that FLOPs of the whole model amount to.

        NaN where other layers than those of the scope were pruned (``layers``).
        """
        module, proj = self.model.module, "mlp" if self.masks.scope == "mlp" else None
        inside = {
            x.name: math.prod(x.shape) * x.share
            for x in find_layers(module, "all", proj) if x.block is not None
        }  # fmt: skip
        if layers is not None and not {*layers} <= inside.keys():
            return math.nan
        return 1 - (1 - flops) * self.active / sum(inside.values())

    def expanded(self, built: Expansion) -> float:
        """Return the bytes of weights that a token reads of an expanded model, over the dense."""
        width = next(self.model.module.parameters()).element_size()
        shares = {x.name: x.share for x in list_layers(self.model.module)}
        table = built.layers.assign(share=built.layers["layer"].map(shares))
        routers = table.drop_duplicates(["block", "router"])
        others = self.active - float((table["dense_weights"] * table["share"]).sum())
        read = others * width + float((table["bytes"] / table["experts"] * table["share"]).sum())
        read += float((routers["router_bytes"] * routers["share"]).sum())
        return read / (self.active * width)

    def swapped(self, method: str, sparsity: float) -> Arrays:
        """Return the numbers of a pruner with DSnoT after it."""
        clock = time.perf_counter()
        built = prune_dsnot(
            self.model, self.calibration, pruner=method.removeprefix(DSNOT), sparsity=sparsity,
            seed=self.seed, memory=self.memory,
        )  # fmt: skip
        found = measure_perplexity(built, self.text, prefix=self.masks.prefix, progress=False)
        pruned = find_layers(built.module, "all", "mlp")
        width = pruned[0].weight.element_size()
        others = self.everything - sum(math.prod(x.shape) for x in pruned)
        packed = [t.nbytes for x in pruned for t in pack(x.weight[None], "bitmap")[1].values()]
        flops = 1 - sum(int((x.weight == 0).sum()) for x in pruned) / self.everything
        stored = (others * width + sum(packed)) / (self.everything * width)
        return _arrays(
            found.window_losses, clock, flops=flops, nonzeros=flops, bytes=stored,
            token_bytes=stored, density=self.density(flops),
        ) | ({} if self.also is None else self.also(built))  # fmt: skip

    def mixtures(self, method: str, sparsity: float) -> Arrays:
        """Return the numbers of a method that prunes the experts of a mixture.

        Raises
        ------
        InvalidInput
            If the model has none, or the method cannot do it.
        """
        clock, known = time.perf_counter(), MIXTURE_METHODS[method]
        seen = self._mixtures.get(True) or self._mixtures.get(known.gradients)
        if seen is None:
            seen = gather(self.model, self.calibration, gradients=known.gradients)
            self._mixtures[known.gradients] = seen
        pruned = prune_mixtures(seen, method, sparsity=sparsity)
        with pruned.applied():
            found = measure_perplexity(
                self.model, self.text, prefix=self.masks.prefix, progress=False
            )
            costs = pruned.costs()
            own = {} if self.also is None else self.also(self.model)
        density = self.density(costs["flops"])
        return _arrays(found.window_losses, clock, **costs, density=density) | own

    def masked(self, method: str, sparsity: float) -> Arrays:
        """Return the numbers of a method that masks activations.

        Raises
        ------
        InvalidInput
            If it does not apply to the model, or cannot be that sparse.
        """
        clock, masks = time.perf_counter(), self.masks
        if method not in self._fitted:
            self._fitted[method] = fit(
                self.model, self.calibration, method, scope=masks.scope, form=masks.form,
                dense_prefix=masks.first,
            )  # fmt: skip
        made = self._fitted[method].at_density(1 - sparsity)
        found = measure(made, self.text, prefix=masks.prefix, progress=False)
        more = 1 + made.stored / self.everything
        return _arrays(
            found.perplexity.window_losses, clock, flops=found.flops, density=found.density,
            nonzeros=more, bytes=more, token_bytes=made.token_bytes(),
        ) | self._also(made)  # fmt: skip

    def combined(self, method: str, sparsity: float, experts: int) -> Arrays:
        """Return the numbers of a method that masks activations of pruned or expanded weights.

        Raises
        ------
        InvalidInput
            As `masked`.
        """
        clock, parts = time.perf_counter(), combined(method)
        assert parts is not None  # noqa: S101
        built = expand(
            self.model, self.calibration, experts=experts, pruner=made_by(parts[1])[0],
            sparsity=1 - math.sqrt(1 - sparsity), router=made_by(parts[1])[1], proj="mlp",
            seed=self.seed, memory=self.memory, keep=True, progress=False,
        )  # fmt: skip
        fitted = self._on(built, parts[0], experts)
        made = self._solved(fitted, 1 - sparsity)
        found = measure(made, self.text, prefix=self.masks.prefix, progress=False)
        return _arrays(
            found.perplexity.window_losses, clock, flops=found.flops, density=found.density,
            nonzeros=built.costs["nonzeros"], bytes=built.costs["bytes"],
            token_bytes=made.token_bytes(),
        ) | self._also(made)  # fmt: skip

    def _also(self, made: ActivationSparsity) -> dict[str, NDArray[np.float64]]:
        if self.also is None:  # what runs no model under masks is refused
            return {}
        with made.applied():
            return dict(self.also(made.subject.model))

    def _on(self, built: Expansion, method: str, experts: int) -> ActivationMethod:
        """Return a method fitted to a model with sparse weights."""
        assert built.model is not None  # noqa: S101
        masks, first = self.masks, self.masks.first
        if experts == 1:
            return fit(
                self._plain(built.model), self.calibration, method, scope=masks.scope,
                form=masks.form, dense_prefix=first,
            )  # fmt: skip
        proj = "mlp" if masks.scope == "mlp" else None
        layers, routed = [], {}
        for layer in find_layers(self.model.module, "all", proj):
            if layer.block is None:
                continue
            module = built.model.module.get_submodule(layer.name)
            layers.append(Layer(layer.name, layer.block, layer.projection, module,
                                transposed=layer.transposed))  # fmt: skip
            if isinstance(module, ExpandedLinear):
                routed[layer.name] = _routed(module)
        subject = Subject(
            built.model, self.calibration, masks.scope, Window(dense=first), layers, routed
        )
        return ACTIVATION_METHODS[method](subject, masks.form)

    def _plain(self, built: LanguageModel) -> LanguageModel:
        """Return a copy of the dense model with the weights of a model of one expert."""
        found = replace(self.model, module=copy.deepcopy(self.model.module))
        for layer in find_layers(found.module, "all", "mlp"):
            module = built.module.get_submodule(layer.name)
            if isinstance(module, ExpandedLinear):
                with torch.no_grad():
                    layer.weight.copy_(module.weight[0])
        return found

    def _solved(self, fitted: ActivationMethod, density: float) -> ActivationSparsity:
        """Return the rules that have a density on the calibration text.

        Inputs that are kept often have columns with more weights, which an expectation over all
        inputs alike does not see.
        """
        ids = list[Tensor]()
        if density >= 1:
            return fitted.at(0.0)
        for _, some in of_one_group(self.calibration):  # of one length each
            ids.append(some[: _SEQUENCES - sum(map(len, ids))])
            if sum(map(len, ids)) >= _SEQUENCES:
                break
        wanted = density
        fitted.subject.window.uncounted = self.masks.prefix  # dense tokens would hide the others
        for _ in range(_ROUNDS):
            made = fitted.at_density(min(1.0, wanted))
            found = made.density_on(ids)
            if abs(found - density) <= _SOLVED * density or found == 0:
                break
            wanted *= density / found
        return made


def _routed(module: ExpandedLinear) -> Routed:
    """Return what the masks of an expanded layer have to know."""
    router = module.routing.router
    tokens = router.statistics.tokens_per_cluster.double().cpu()
    cost = router.features * router.k if router.centroids.shape[1] else 0
    nonzeros = (module.weight != 0).sum(1).double().cpu()
    return Routed(nonzeros, module.routing, tokens / max(1.0, float(tokens.sum())), cost)


def _arrays(losses: object, clock: float, **numbers: float) -> dict[str, NDArray[np.float64]]:
    given = {"relative_error": math.nan, "seconds": time.perf_counter() - clock, **numbers}
    return {"loss": np.asarray(losses)} | {n: np.array(given[n], np.float64) for n in NUMBERS}


def nothing(windows: int) -> dict[str, NDArray[np.float64]]:
    """Return the numbers of an arm that does not apply."""
    missing = {name: np.array(math.nan) for name in NUMBERS}
    return {"loss": np.full(windows, math.nan), **missing}


__all__ = [
    "COSTS",
    "DSNOT",
    "GLOBAL",
    "NUMBERS",
    "Rivals",
    "combined",
    "made_by",
    "nothing",
    "one_thing",
]
