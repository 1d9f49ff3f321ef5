"""The experts of a mixture, held in stacked parameters, as linears to be addressed one by one.

transformers keeps the experts of a layer as 3-D parameters of one module, which multiplies by them
without running a module per expert. Here they are found by their structure, and every projection of
every expert gets a stand-in: a module without parameters of its own, whose weight is a view of the
stacked one. The stand-ins hang in the model's tree under the names that checkpoints have on disk,
``model.layers.3.mlp.experts.17.gate_proj``; neither ``state_dict`` nor what the model computes
changes. While something watches or edits them (`one_by_one`), or another module has taken the place
of one, the experts run one by one; where all of a mixture are watched at once (`together`), each
projection of all experts is one product, and what it gives one array.
"""

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from entangle.errors import InvalidInput
from entangle.models.grouped import Blocks, RoutedRows, takes
from entangle.models.shards import present

_LOG = logging.getLogger(__name__)

Layout = Literal["routed", "repeated", "sorted"]
"""How a mixture's module gets its tokens: with the experts of each (``routed``), all of them once
for every expert (``repeated``, Llama 4), or in the order of the experts (``sorted``, JetMoE)."""

EXPERT = re.compile(r"(?<=\.experts)\.(\w*_)?\d+\.")
"""What stands between the name of a mixture and that of a part of one of its experts."""

_CHOSEN = ("top_k", "num_experts_per_tok", "moe_top_k", "num_selected_experts")
_CONFIGURED = (*_CHOSEN[1:], "top_k_experts")
_BANK = "entangle_bank"
_NAMES = ("hidden_states", "top_k_index|router_indices", "top_k_weights|routing_weights")


@dataclass(eq=False)
class Stack:
    """One projection of all experts of a mixture: rows of a stacked parameter."""

    holder: nn.Module
    """The module that has the parameter."""
    key: str
    """Name of the parameter in it."""
    n_experts: int
    transposed: bool = False
    """Whether an expert's matrix is stored as (in_features, out_features)."""
    rows: slice = field(default_factory=lambda: slice(None))
    """Which of an expert's output features are this projection's."""
    bias_key: str | None = None

    @property
    def stored(self) -> nn.Parameter:
        """The parameter itself."""
        return cast("nn.Parameter", self.holder._parameters[self.key])

    def view(self, stored: Tensor) -> Float[Tensor, "experts out_features in_features"]:
        """Return this projection's rows of a stacked tensor, as a view of it."""
        stacked = stored.detach()
        stacked = stacked if stacked.ndim == 3 else stacked.unflatten(0, (self.n_experts, -1))
        return (stacked.mT if self.transposed else stacked)[:, self.rows]

    @property
    def weight(self) -> Float[Tensor, "experts out_features in_features"]:
        """The weights of all experts, a view that writes through to the model."""
        return self.view(present(self.stored))

    @property
    def bias(self) -> Float[Tensor, "experts out_features"] | None:
        """The biases of all experts, a view; None without any."""
        stored = None if self.bias_key is None else self.holder._parameters[self.bias_key]
        return None if stored is None else present(stored).detach()[:, self.rows]

    @property
    def shape(self) -> tuple[int, int]:
        """The pair (out_features, in_features) of one expert."""
        shape = self.view(torch.empty(self.stored.shape, device="meta")).shape
        return shape[1], shape[2]

    def make_own(self) -> None:
        """Give the module a copy of the parameter, where other models share its memory."""
        copied = nn.Parameter(self.stored.detach().clone(), requires_grad=False)
        self.holder._parameters[self.key] = copied


class ExpertLinear(nn.Module):
    """One projection of one expert; it has no parameters of its own."""

    def __init__(self, bank: "ExpertBank", key: str, number: int) -> None:
        super().__init__()
        self.bank, self.stack, self.number = bank, bank.stacks[key], number
        self.out_features, self.in_features = self.stack.shape

    @property
    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The rows of this expert, a view of the stacked parameter."""
        return self.stack.weight[self.number]

    @property
    def bias(self) -> Float[Tensor, " out_features"] | None:
        """The bias of this expert, a view; None without one."""
        bias = self.stack.bias
        return None if bias is None else bias[self.number]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:  # noqa: ARG002
        """Yield the stacked parameter, which tells dtype and device."""
        yield self.stack.stored

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return what the expert makes of its tokens."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the shape for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(eq=False)
class ExpertBank:
    """All experts of one mixture."""

    name: str
    """Dotted name that the experts' numbers follow, such as ``model.layers.3.mlp.experts``."""
    home: nn.Module
    """The module of that name, whose children the experts are."""
    layout: Layout
    runs: tuple[nn.Module, ...]
    """The modules whose ``forward`` multiplies by the experts' weights: one, or the two halves of a
    ``sorted`` mixture."""
    stacks: dict[str, Stack]
    """By projection: gate_proj, up_proj and down_proj, of those that there are."""
    interleaved: bool = False
    """Whether `activate` wants the outputs of gate and up in turns."""
    tokens: int = field(default=0, init=False)
    """Rows that the module received in the run under way."""
    at: Tensor | None = field(default=None, init=False)
    """Which of them the expert under way sees; None where that is not known (``sorted``)."""
    watchers: list[Callable[[RoutedRows], None]] = field(default_factory=list, init=False)
    """Told of every run in which the experts run `together`."""

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return next(iter(self.stacks.values())).n_experts

    def linear(self, number: int, key: str) -> nn.Module:
        """Return what multiplies by one projection of an expert."""
        return self.home.get_submodule(f"{number}.{key}")

    def holds(self, n_tokens: int) -> bool:
        """Tell whether the run under way has all of a pass's tokens, equally often each."""
        if self.layout == "sorted":
            return self.tokens % n_tokens == 0
        return self.tokens == n_tokens

    def check_told(self, name: str) -> None:
        """Raise `InvalidInput`, naming a layer, where it is not known which tokens experts see."""
        if self.at is None:
            raise InvalidInput(
                f"layer {name!r} is of a mixture that does not tell which tokens an expert sees; "
                "choose another layer."
            )

    def activate(self, gate: Tensor | None, up: Tensor) -> Float[Tensor, "tokens width"]:
        """Return the input of down_proj, from the outputs of gate_proj, where there is one, and up.

        By the module's own function.
        """
        module: Any = self.runs[0]
        if gate is None:
            found: Tensor = module.act_fn(up)
        elif hasattr(module, "_apply_gate"):
            both = torch.stack([gate, up], -1).flatten(-2) if self.interleaved else None
            found = module._apply_gate(torch.cat([gate, up], -1) if both is None else both)
        else:  # Llama 4, and DBRX in a module inside
            own = module.act_fn if hasattr(module, "act_fn") else module.mlp.activation_fn
            found = own(gate) * up
        return found

    def expert(self, number: int, x: Float[Tensor, "tokens features"]) -> Tensor:
        """Return what a whole expert makes of tokens, before their routing weights."""
        gate = self.linear(number, "gate_proj")(x) if "gate_proj" in self.stacks else None
        z = self.activate(gate, self.linear(number, "up_proj")(x))
        return self.finished(self.linear(number, "down_proj")(z))

    @property
    def norms_outputs(self) -> bool:
        """Whether a norm follows ``down_proj``."""
        return bool(getattr(self.runs[0], "has_post_expert_norm", False))

    def finished(self, y: Tensor) -> Tensor:
        """Return what an expert makes of the outputs of its ``down_proj``."""
        module: Any = self.runs[0]
        return module.post_expert_norm(y) if self.norms_outputs else y

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Do what a module of `runs` does, expert by expert."""
        if self.layout == "routed":
            return self._run_routed(*self.given(args, kwargs))
        hidden = args[0] if args else next(iter(kwargs.values()))
        if self.layout == "repeated":
            return self._run_repeated(hidden)
        return self._run_sorted(module, hidden, args[1] if len(args) > 1 else kwargs["expert_size"])

    @staticmethod
    def given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return hidden states, expert numbers and routing weights, by position or name."""
        names = [next((key for key in kwargs if key in one.split("|")), "") for one in _NAMES]
        return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]

    def _run_routed(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows, device = hidden.flatten(0, -2), self.stacks["down_proj"].stored.device
        k = index.shape[-1]
        rows, index, weights = (one.to(device) for one in (rows, index.reshape(-1, k), weights))
        self.tokens = rows.shape[0]
        weights = weights.reshape(-1, 1)
        out = rows.new_zeros(
            rows.shape[0] * k, rows.shape[1], dtype=torch.promote_types(rows.dtype, weights.dtype)
        )
        if self.watchers:
            self._run_together(rows, index, weights, out)
        for number, places in () if self.watchers else self.routed(index):
            self.at = places // k
            y = self.expert(number, rows[self.at])
            out = out.index_copy(0, places, (y * weights[places]).to(out.dtype))
        summed: Tensor = out.unflatten(0, (-1, k)).sum(1).to(hidden.dtype)
        return summed.view_as(hidden).to(hidden.device)

    def _run_together(self, rows: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        """Put what the experts make of their tokens, weighted, into ``out``; tell who watches."""
        if not self.can_run_together:
            raise InvalidInput(
                f"an expert of {self.name!r} is hooked or replaced while all are watched at once."
            )
        flat = index.flatten()
        known = (flat >= 0) & (flat < self.n_experts)
        numbers, places = flat.masked_fill(~known, self.n_experts).sort(stable=True)
        blocks = Blocks.of(numbers, self.n_experts)
        x, last = rows[places // index.shape[-1]], self.stacks["down_proj"]
        first = {key: stack for key, stack in self.stacks.items() if stack is not last}
        outputs = _products(blocks, x, first)
        own = [outputs[key] for key in ("gate_proj", "up_proj") if key in outputs]
        z = blocks.each(lambda *one: self.activate(one[0] if one[1:] else None, one[-1]), own)
        outputs["down_proj"] = blocks.linear(z, last.weight, last.bias)
        inputs = dict.fromkeys(first, x) | {"down_proj": z}
        y, starts = self.finished(outputs["down_proj"]), blocks.fetch()
        n = starts[-1]  # rows behind are of no expert, and stay 0
        out[places[:n]] = (y[:n] * weights[places[:n]]).to(out.dtype)
        for tell in self.watchers:
            tell(RoutedRows(inputs, outputs, blocks.bounds, starts))

    @property
    def can_run_together(self) -> bool:
        """Whether nothing hooks or replaces a single expert, and the mixture tells their tokens."""
        if self.layout != "routed":
            return False
        units: Any = self.home._modules
        return all(
            isinstance(one, ExpertLinear) and not one._forward_hooks and not one._forward_pre_hooks
            for number in range(self.n_experts)
            for one in units[str(number)]._modules.values()
        )

    def routed(self, index: Int[Tensor, "tokens k"]) -> Iterator[tuple[int, Int[Tensor, " n"]]]:
        """Yield every expert that sees a token, and the places in ``index`` where it is named.

        Place p is that of token p // k. Numbers that no expert has are padding.
        """
        flat = index.flatten()
        known = (flat >= 0) & (flat < self.n_experts)
        order = flat.masked_fill(~known, self.n_experts).argsort(stable=True)
        counts = torch.bincount(flat[known], minlength=self.n_experts).tolist()
        for number, places in enumerate(order[: sum(counts)].split(counts)):
            if places.numel():
                yield number, places

    def _run_repeated(self, hidden: Tensor) -> Tensor:
        """Rows of tokens that are not an expert's are zero, and stay so."""
        blocks = hidden.unflatten(0, (self.n_experts, -1))
        self.tokens = blocks.shape[1]
        out = torch.zeros_like(blocks)
        for number, rows in enumerate(blocks):
            places = (rows != 0).any(-1).nonzero()[:, 0]
            if places.numel():
                self.at = places
                out[number] = out[number].index_copy(0, places, self.expert(number, rows[places]))
        return out.flatten(0, 1)

    def _run_sorted(self, module: nn.Module, inputs: Tensor, sizes: Sequence[int]) -> Tensor:
        own = [key for key, stack in self.stacks.items() if stack.holder is module]
        self.tokens = inputs.shape[0]
        parts = [
            torch.cat([self.linear(number, key)(rows) for key in own], -1)
            for number, rows in enumerate(inputs.split(list(sizes)))
            if rows.shape[0]
        ]
        return torch.cat(parts) if parts else inputs.new_zeros(0, 0)

    @property
    def is_changed(self) -> bool:
        """Whether another module has taken the place of some expert's projection."""
        units = (self.home.get_submodule(str(number)) for number in range(self.n_experts))
        return any(not isinstance(one, ExpertLinear) for unit in units for one in unit.children())


def _products(blocks: Blocks, x: Tensor, stacks: Mapping[str, Stack]) -> dict[str, Tensor]:
    """Return the outputs of projections; those of one parameter at once where a kernel does it."""
    whole = replace(next(iter(stacks.values())), rows=slice(None))
    if len({id(one.stored) for one in stacks.values()}) > 1 or not takes(x, whole.weight):
        return {key: blocks.linear(x, one.weight, one.bias) for key, one in stacks.items()}
    found = blocks.linear(x, whole.weight, whole.bias)
    parts = {key: found[:, one.rows] for key, one in stacks.items()}
    return {key: one if one.stride(1) == 1 else one.contiguous() for key, one in parts.items()}


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    bank: ExpertBank = getattr(module, _BANK)
    return bank.run(module, *args, **kwargs)


@contextmanager
def one_by_one(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have mixtures of which some of the ``modules`` are projections run expert by expert.

    Inside the ``with`` block. What the model computes is the same but for rounding.
    """
    banks = {id(one.bank): one.bank for one in modules if isinstance(one, ExpertLinear)}
    with ExitStack() as stack:
        for part in (part for bank in banks.values() for part in bank.runs):
            before = part.__dict__.get("forward")
            part.__dict__["forward"] = MethodType(_run, part)
            stack.callback(partial(put_back, part, before))
        yield


@contextmanager
def together(bank: ExpertBank, tell: Callable[[RoutedRows], None]) -> Iterator[None]:
    """Have all experts of a mixture run at once, and be told of it, inside the ``with`` block.

    Only where it `can_run_together`. What the model computes is the same but for rounding.
    """
    with one_by_one([bank.linear(0, "down_proj")]):
        bank.watchers.append(tell)
        try:
            yield
        finally:
            bank.watchers.remove(tell)


def put_back(part: nn.Module, before: object) -> None:
    """Give a module the ``forward`` of its own that it had before, None where it had none."""
    part.__dict__.pop("forward", None)
    part.__dict__.update({} if before is None else {"forward": before})


def put_layer(module: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put a module in the place of a layer, be it a projection of an expert.

    A mixture in which some expert is replaced runs expert by expert from then on.
    """
    parts = name.split(".")
    if len(parts) > 2 and parts[-2].isdigit():
        expose(module)
    module.set_submodule(name, replacement)
    home = module.get_submodule(".".join(parts[:-2]))
    _settle(getattr(home, _BANK, None))


def settle(module: nn.Module) -> None:
    """Have mixtures run expert by expert where others have put modules in the place of experts."""
    for bank in banks_of(module):
        _settle(bank)


def _settle(bank: ExpertBank | None) -> None:
    for part in () if bank is None else bank.runs:
        put_back(part, MethodType(_run, part) if bank is not None and bank.is_changed else None)


def expose(module: nn.Module) -> None:
    """Hang a stand-in for every projection of every stacked expert into a model's tree."""
    for bank in [bank for found in _searches(module) for bank in found]:
        for number in range(bank.n_experts):
            unit = nn.Module()
            for key in bank.stacks:
                unit.add_module(key, ExpertLinear(bank, key, number))
            bank.home.add_module(str(number), unit)
        for part in {id(one): one for one in (bank.home, *bank.runs)}.values():
            setattr(part, _BANK, bank)


def banks_of(module: nn.Module) -> list[ExpertBank]:
    """Return all mixtures of a model whose experts are stacked, in module order."""
    expose(module)
    found = (getattr(one, _BANK, None) for one in module.modules())
    return list({id(bank): bank for bank in found if bank is not None}.values())


def run_odd_widths(module: nn.Module) -> None:
    """Have mixtures run eagerly where transformers' own product of stacked experts cannot.

    That one (``grouped_mm``) wants rows of whole 16 bytes.
    """
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) != "grouped_mm":
        return
    stored = [
        one
        for part in module.modules() if hasattr(part, "is_transposed")
        for one in part._parameters.values() if one is not None and one.ndim == 3
    ]  # fmt: skip
    if any(size * one.element_size() % 16 for one in stored for size in one.shape[1:]):
        _LOG.info("experts run one by one: transformers' stacked product cannot do these widths")
        cast("Any", module).set_experts_implementation("eager")


def expert_shares(module: nn.Module) -> dict[str, float]:
    """Return k / n of every mixture that sends a token to k of its n experts, by its name.

    k is what the module around the experts, or its router, declares, or their configuration; NaN
    where none does, so that nothing is counted with a number that nobody knows.
    """
    found = {}
    for name, child in module.named_modules():
        keys = [key for key in child._modules if re.fullmatch(r"(\w*_)?\d+", key)]
        if name.rpartition(".")[2] == "experts" and keys:
            parent = module.get_submodule(name.rpartition(".")[0])
            around = (parent, *parent._modules.values(), child, *child._modules.values())
            declared = [getattr(one, key, None) for one in around for key in _CHOSEN]
            told = (getattr(one, "config", None) for one in around)
            declared += [getattr(one, key, None) for one in told for key in _CONFIGURED]
            k = next((one for one in declared if isinstance(one, int)), math.nan)
            found[name] = k / len(keys) if math.isnan(k) else min(1.0, k / len(keys))
    return found


def quantised_experts(module: nn.Module) -> dict[str, str]:
    """Return the parameters of a mixture's module that are packed, and a word on each."""
    if not isinstance(getattr(module, "num_experts", None), int):
        return {}
    kinds = {key: one for key, one in module._parameters.items() if one is not None}
    return {
        key: f"quantised form ({type(module).__name__}, {str(one.dtype).removeprefix('torch.')})"
        for key, one in kinds.items()
        if one.ndim > 1 and not _plain(one, one.ndim)
    }


def stored_name(module: nn.Module, name: str) -> str:
    """Return the name in the model of what a checkpoint calls ``name``; globs may be given.

    By the renamings that transformers itself gives the model; ``name`` where there are none.
    """
    if not banks_of(module) or not hasattr(module, "config"):
        return name
    known = get_model_conversion_mapping(cast("Any", module))
    for one in known:
        if not isinstance(one, WeightConverter):
            for source, target in zip(one.source_patterns, one.target_patterns, strict=False):
                if re.fullmatch(r"[\w.]+", source):  # a plain part of a name
                    name = name.replace(source, target)
    for one in known:
        if isinstance(one, WeightConverter):
            keys = ("gate_proj", "up_proj") if len(one.source_patterns) == 2 else ("down_proj",)
            for source, key in zip(one.source_patterns, keys, strict=False):
                found = re.search(r"experts\.\*\.([\w.]+)\.weight$", source)
                if found and ".experts." in f".{name}" and name.endswith(f".{found[1]}"):
                    return f"{name.removesuffix(found[1])}{key}"
    return name


def _searches(module: nn.Module) -> Iterator[list[ExpertBank]]:
    """Yield the mixtures that are not exposed yet."""
    for name, child in list(module.named_modules()):
        if _BANK in child.__dict__:
            continue
        yield [
            bank
            for find in (_stacked, _glued, _sorted_pair)
            if (bank := find(name, child)) is not None
        ]


def _plain(parameter: object, ndim: int) -> bool:
    """Tell whether a parameter holds numbers of at least 16 bits."""
    if not isinstance(parameter, Tensor) or parameter.ndim != ndim:
        return False
    return parameter.is_floating_point() and parameter.element_size() > 1


def _arguments(module: nn.Module) -> int:
    return len(inspect.signature(type(module).forward).parameters) - 1


def _stacked(name: str, module: nn.Module) -> ExpertBank | None:
    """Return the mixture whose module has stacked gate_up_proj (or up_proj) and down_proj."""
    first = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    up, down = module._parameters.get(first), module._parameters.get("down_proj")
    if up is None or down is None or not _plain(up, 3) or not _plain(down, 3):
        return None
    declared = all(hasattr(module, key) for key in ("is_transposed", "has_gate", "has_bias"))
    facts: Any = module
    if declared:
        turned, gated = bool(facts.is_transposed), bool(facts.has_gate)
        interleaved = gated and not facts.is_concatenated
    elif _arguments(module) == 1 and hasattr(module, "act_fn") and first == "gate_up_proj":
        turned, gated, interleaved = up.shape[1] == down.shape[2], True, False
    else:
        return None
    width = down.shape[1 if turned else 2]
    if gated != (first == "gate_up_proj") or up.shape[2 if turned else 1] != width * (1 + gated):
        return None
    biased = declared and bool(facts.has_bias)
    stack = partial(
        Stack, module, first, up.shape[0], turned, bias_key=f"{first}_bias" if biased else None
    )
    last = Stack(
        module, "down_proj", up.shape[0], turned, bias_key="down_proj_bias" if biased else None
    )
    gate, rest = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (
        slice(0, width), slice(width, None)
    )  # fmt: skip
    stacks = {"gate_proj": stack(gate), "up_proj": stack(rest)} if gated else {"up_proj": stack()}
    layout: Layout = "routed" if declared else "repeated"
    return ExpertBank(name, module, layout, (module,), {**stacks, "down_proj": last}, interleaved)


def _glued(name: str, module: nn.Module) -> ExpertBank | None:
    """Return the mixture of a module whose experts' rows follow each other in matrices (DBRX)."""
    count = getattr(module, "num_experts", None)
    inner = module._modules.get("mlp")
    if not isinstance(count, int) or inner is None or not hasattr(inner, "activation_fn"):
        return None
    own = inner._parameters
    if set(own) != {"w1", "v1", "w2"} or not all(_plain(one, 2) for one in own.values()):
        return None
    stacks = {
        key: Stack(inner, stored, count, transposed=stored == "w2")
        for key, stored in (("gate_proj", "w1"), ("up_proj", "v1"), ("down_proj", "w2"))
    }
    return ExpertBank(name, module, "routed", (module,), stacks)


def _sorted_pair(name: str, module: nn.Module) -> ExpertBank | None:
    """Return the mixture whose two stacked linears receive tokens in the experts' order."""
    pair: list[tuple[str, Any]] = [
        (key, child)
        for key, child in module._modules.items()
        if child is not None and _is_sorted_linear(child)
    ]
    if len(pair) != 2 or _BANK in pair[0][1].__dict__:
        return None
    (first, up), (last, down) = pair
    (n, rows, _), width = up._parameters["weight"].shape, down._parameters["weight"].shape[2]
    if rows not in (width, 2 * width):
        return None
    stack: Callable[..., Stack] = partial(Stack, up, "weight", n)
    stacks = {first: stack(), last: Stack(down, "weight", n)}
    if rows == 2 * width:
        gate, rest = stack(rows=slice(0, width)), stack(rows=slice(width, None))
        stacks = {"gate_proj": gate, "up_proj": rest, "down_proj": stacks[last]}
    home = module
    if name.rpartition(".")[2] != "experts":
        name, home = f"{name}.experts", nn.Module()
        module.add_module("experts", home)
    return ExpertBank(name, home, "sorted", (up, down), stacks)


def _is_sorted_linear(module: nn.Module) -> bool:
    weight, count = module._parameters.get("weight"), getattr(module, "num_experts", None)
    return _plain(weight, 3) and weight is not None and weight.shape[0] == count and (
        _arguments(module) == 2
    )  # fmt: skip
