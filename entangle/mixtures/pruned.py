"""Mixtures with fewer experts, or smaller ones: made for a while, counted, and undone.

Nothing is copied but the weights that are written to (merged, or zeroed one by one), whose
originals wait in the host's memory. An expert that goes is kept from being chosen, a constant is
put in the place of one's output, and neurons are masked where they enter ``down_proj``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.mixtures.routers import never_chosen
from entangle.mixtures.statistics import Mixture, Statistics, routing_of
from entangle.models.blocks import is_trying
from entangle.models.layers import list_layers
from entangle.models.mixtures import ExpertBank, one_by_one
from entangle.packed.formats import pack
from entangle.pruning import prune
from entangle.recording.calls import first_given, on_calls, with_first


@dataclass(eq=False)
class Change:
    """What becomes of one mixture; nothing until its fields are set."""

    mixture: Mixture
    """As it was on the calibration text."""
    dropped: Bool[Tensor, " experts"] = field(init=False)
    """Experts that routers never choose."""
    novices: Bool[Tensor, " experts"] = field(init=False)
    """Experts whose mean output takes their place."""
    neurons: Bool[Tensor, "experts neurons"] = field(init=False)
    """Neurons that stay."""
    groups: Int64[Tensor, " experts"] = field(init=False)
    """The expert into which each is merged; itself where it is not."""
    sparsity: float = 0.0
    """Share of zeros that Wanda puts into every row of the experts that are left."""
    powers: Mixture | None = None
    """Of the calibration text once experts are dropped, for Wanda."""
    calls: Float64[Tensor, " experts"] = field(init=False)
    """Tokens sent to each expert meanwhile."""
    zeros: int = 0
    """Zeros that Wanda put in."""
    packed: int = 0
    """Bytes of the sparse experts, as bitmaps and values."""

    def __post_init__(self) -> None:
        n = self.mixture.n_experts
        self.dropped, self.novices = torch.zeros(n).bool(), torch.zeros(n).bool()
        self.neurons = torch.ones(n, self.mixture.width).bool()
        self.groups = torch.arange(n)
        self.calls = torch.zeros(n).double()

    @property
    def merged(self) -> bool:
        """Whether experts share weights."""
        return not torch.equal(self.groups, torch.arange(len(self.groups)))

    @property
    def changes(self) -> bool:
        """Whether anything is to be done."""
        some = bool(self.dropped.any() or self.novices.any() or not self.neurons.all())
        return some or self.merged or self.sparsity > 0

    @property
    def costs(self) -> Float64[Tensor, " experts"]:
        """Multiply-adds of a token in each expert, before zeros in single weights."""
        whole = self.mixture.weights * self.neurons.double().mean(1)
        features = float(self.mixture.bank.stacks["down_proj"].shape[0])
        found = torch.where(self.novices, features, whole)
        return found.masked_fill(self.dropped, 0.0)

    @property
    def stored(self) -> float:
        """Weights that are left."""
        own = torch.zeros(len(self.groups)).bool()
        own[self.groups] = True
        return float(self.costs[own].sum()) - self.zeros

    @property
    def stored_before(self) -> int:
        """Weights that there were."""
        return self.mixture.weights * self.mixture.n_experts

    @property
    def kept(self) -> int:
        """Experts that are left whole or in part."""
        left = ~self.dropped & ~self.novices & self.neurons.any(1)
        return int((left & (self.groups == torch.arange(len(left)))).sum())

    def active(self, tokens: int) -> float:
        """Return multiply-adds a token, as counted over ``tokens``."""
        total = float((self.calls * self.costs).sum()) / tokens
        left = self.stored + self.zeros
        return total * (self.stored / left if left else 0.0)


@dataclass(eq=False)
class PrunedMixtures:
    """All mixtures of a model, pruned by one method to one sparsity."""

    statistics: Statistics
    changes: Sequence[Change]
    name: str = ""
    """Of the method."""
    sparsity: float = 0.0
    """Share of the experts' weights that was to go."""
    tokens: int = field(default=0, init=False)
    """Tokens that the model ran on under `applied`."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the model be pruned inside the ``with`` block; as it was, to the bit, after it.

        Raises
        ------
        InvalidInput
            While the model runs, if a router chose an expert that went.
        """
        module = self.statistics.model.module
        changed = [one for one in self.changes if one.changes]
        with ExitStack() as held:
            for one in changed:
                one.calls.zero_()
                self._enter(held, one)
            dropped = {one.mixture.router: one.dropped for one in changed if one.dropped.any()}
            held.enter_context(never_chosen(dropped))
            self.tokens = 0
            first = changed[0].mixture.bank if changed else None
            if first is not None:
                held.enter_context(on_calls({_parent(module, first): self._count}, {}))
            yield

    def _count(self, args: Any, kwargs: Any) -> None:
        if not is_trying():
            self.tokens += first_given(args, kwargs)[..., 0].numel()

    @staticmethod
    def _enter(held: ExitStack, change: Change) -> None:
        bank = change.mixture.bank
        before: dict[nn.Module, Callable[..., Any]] = {bank.runs[0]: partial(_tally, change)}
        after: dict[nn.Module, Callable[..., Any]] = {}
        downs = [bank.linear(number, "down_proj") for number in range(bank.n_experts)]
        for number, down in enumerate(downs):
            if change.novices[number]:
                after[down] = partial(_constant, _mean_output(change.mixture, number))
            elif not change.neurons[number].all():
                before[down] = partial(_masked, change.neurons[number])
        held.enter_context(on_calls(before, after))
        held.enter_context(one_by_one([*after, *(one for one in before if one in downs)]))
        if change.merged:
            _merge(held, change)
        if change.sparsity > 0:
            _sparsen(held, change)

    @property
    def layers(self) -> pd.DataFrame:
        """One row a mixture: layer, experts and neurons before and after, stored and active.

        ``stored`` and ``active`` are weights: those held, and those that a token meets (as counted
        over the tokens that ran under `applied`; NaN before any did).
        """
        rows = []
        for one in self.changes:
            own, before = one.mixture, one.mixture.chosen * one.mixture.weights
            active = float(before)
            if one.changes:
                active = one.active(self.tokens) if self.tokens else math.nan
            rows.append(
                {
                    "layer": own.name, "experts_before": own.n_experts, "experts": one.kept,
                    "neurons_before": own.n_experts * own.width,
                    "neurons": int(one.neurons[~one.dropped & ~one.novices].sum()),
                    "stored_before": one.stored_before, "stored": one.stored,
                    "active_before": before, "active": active,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def costs(self) -> dict[str, float]:
        """Return multiples of the dense model's costs, all linear layers counted.

        ``flops`` for a token, as counted under `applied`; stored ``nonzeros`` and ``bytes``; and
        ``token_bytes``, of the weights that a token meets.

        Raises
        ------
        InvalidInput
            If nothing has run under `applied`.
        """
        layers, table = list_layers(self.statistics.model.module), self.layers
        if table["active"].isna().any():
            raise InvalidInput("costs are counted while the model runs under `applied`; run it.")
        everything = sum(math.prod(x.shape) for x in layers)
        active = sum(math.prod(x.shape) * x.share for x in layers)
        width = next(self.statistics.model.module.parameters()).element_size()
        gone = float((table["stored_before"] - table["stored"]).sum())
        saved = float((table["active_before"] - table["active"]).sum())
        sparse = [one for one in self.changes if one.sparsity > 0]
        more = sum(one.packed / width - one.stored for one in sparse)
        read = sum(
            (one.packed / width / max(one.stored, 1) - 1) * one.active(self.tokens)
            for one in sparse
        )
        return {
            "flops": 1 - saved / active,
            "nonzeros": 1 - gone / everything,
            "bytes": 1 - (gone - more) / everything,
            "token_bytes": 1 - (saved - read) / active,
        }


def _parent(module: nn.Module, bank: ExpertBank) -> nn.Module:
    return module.get_submodule(bank.name.rpartition(".")[0])


def _mean_output(mixture: Mixture, number: int) -> Tensor:
    return mixture.outputs[number] / mixture.counts[number].clamp_min(1)


def _constant(vector: Tensor, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
    return vector.to(output).expand_as(output)


def _masked(keep: Tensor, args: Any, kwargs: Any) -> Any:
    z = first_given(args, kwargs)
    return with_first(z.masked_fill(~keep.to(z.device), 0), args, kwargs)


def _tally(change: Change, args: Any, kwargs: Any) -> None:
    """Count the tokens of every expert; refuse those of experts that went."""
    bank, n = change.mixture.bank, change.mixture.n_experts
    routing = routing_of(bank, args, kwargs)
    if routing is not None:
        index, weights = routing
        real = (index >= 0) & (index < n) & (weights != 0)
        found = torch.bincount(index[real].flatten(), minlength=n)
    elif bank.layout == "repeated":
        found = (first_given(args, kwargs).unflatten(0, (n, -1)) != 0).any(-1).sum(1)
    else:
        sizes = args[1] if len(args) > 1 else kwargs["expert_size"]
        found = torch.as_tensor(list(sizes))
    found = found.double().cpu()
    if bool(found[change.dropped].any()):
        raise InvalidInput(
            f"the router of {change.mixture.name!r} chose an expert that was pruned; experts of "
            "this model cannot be pruned as a whole."
        )
    if not is_trying():
        change.calls += found


def _write(held: ExitStack, target: Tensor, value: Tensor) -> None:
    """Put values into a part of the model; what was there comes back at the end."""
    held.callback(target.copy_, target.detach().cpu().clone())
    target.copy_(value)


def _merge(held: ExitStack, change: Change) -> None:
    """Put the weighted mean of a group's experts into the place of each of them."""
    share = change.mixture.counts
    with torch.no_grad():
        for stack in change.mixture.bank.stacks.values():
            for part in filter(lambda one: one is not None, (stack.weight, stack.bias)):
                assert part is not None  # noqa: S101
                for first in change.groups.unique().tolist():
                    own = (change.groups == first).nonzero()[:, 0].tolist()
                    if len(own) == 1:
                        continue
                    weight = share[own] if bool(share[own].any()) else torch.ones(len(own)).double()
                    total: Any = sum(
                        part[i].double() * (w / weight.sum())
                        for i, w in zip(own, weight.tolist(), strict=True)
                    )
                    for i in own:
                        _write(held, part[i], total.to(part.dtype))


def _sparsen(held: ExitStack, change: Change) -> None:
    """Zero weights of the experts that are left, by Wanda on what they see."""
    assert change.powers is not None  # noqa: S101
    change.zeros = change.packed = 0
    with torch.no_grad():
        for key, stack in change.mixture.bank.stacks.items():
            power = change.powers.neurons if key == "down_proj" else change.powers.inputs
            for number in (~change.dropped).nonzero()[:, 0].tolist():
                part = stack.weight[number]
                gram = power[number].diag().to(part.device, torch.float32)
                found = prune(
                    part.float(), gram, method="wanda", sparsity=change.sparsity, loss=False
                ).weight.to(part.dtype)
                change.zeros += int((found == 0).sum())
                change.packed += sum(one.nbytes for one in pack(found[None], "bitmap")[1].values())
                _write(held, part, found)
