"""What the experts of a model's mixtures do on a text, gathered in one pass.

Everything that methods of pruning ask for: how many tokens an expert gets and with which routing
weights, how long its outputs are and what they are on average, what enters it and its neurons, and,
where the loss is differentiated too, how much the loss cares about every neuron.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from entangle.allocation.losses import tapped, text_loss
from entangle.errors import InvalidInput
from entangle.mixtures.routers import Router, find_router, on_logits
from entangle.models.blocks import evaluating
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.models.mixtures import ExpertBank, banks_of, one_by_one
from entangle.models.streaming import comes_by_blocks
from entangle.precision import accumulator_dtype, full_precision
from entangle.recording.calls import first_given, on_calls, with_first
from entangle.recording.hooks import forward
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source

PerExpert = Float64[Tensor, " experts"]


@dataclass(eq=False)
class Mixture:
    """The experts of one mixture on a text; sums are over the tokens that an expert is sent."""

    bank: ExpertBank
    router: Router
    tokens: int = 0
    """Tokens of the text."""
    counts: PerExpert = field(init=False)
    """Tokens of each expert."""
    gates: PerExpert = field(init=False)
    """Sum of routing weights, as the model applies them."""
    norms: PerExpert = field(init=False)
    """Sum of the outputs' Euclidean norms, before routing weights."""
    squares: PerExpert = field(init=False)
    """Sum of their squares."""
    gated: PerExpert = field(init=False)
    """Sum of the norms times the routing weights."""
    turning: PerExpert = field(init=False)
    """Sum of the same times max(0, 1 - cos(h, h + r)): how far all experts together (r) turn the
    residual state (h)."""
    peak: PerExpert = field(init=False)
    """Largest absolute output of ``down_proj``."""
    outputs: Float64[Tensor, "experts features"] = field(init=False)
    """Sum of the outputs."""
    outputs_squared: Float64[Tensor, "experts features"] = field(init=False)
    """Sum of the squared outputs."""
    inputs: Float64[Tensor, "experts features"] = field(init=False)
    """Sum of squares of what enters an expert."""
    neurons: Float64[Tensor, "experts neurons"] = field(init=False)
    """Sum of squares of what enters its ``down_proj``."""
    sensitivity: Float64[Tensor, "experts neurons"] = field(init=False)
    """Sum of squared derivatives of the loss by what enters ``down_proj``; without gradients 0."""
    logits: Float64[Tensor, "experts experts"] = field(init=False)
    """Sum over all tokens of products of the router's logits."""
    gates_known: bool = True
    """Whether the mixture tells which token an expert sees, and with which weight."""
    turning_known: bool = True
    """Whether the residual state in front of the mixture was found."""

    def __post_init__(self) -> None:
        n, up = self.bank.n_experts, self.bank.stacks["up_proj"]
        sizes = {"inputs": up.shape[1], "outputs": up.shape[1], "outputs_squared": up.shape[1],
                 "neurons": up.shape[0], "sensitivity": up.shape[0], "logits": n}  # fmt: skip
        for name in _SUMS:
            shape = (n, sizes[name]) if name in sizes else (n,)
            setattr(self, name, torch.zeros(shape, dtype=torch.float64))
        self.gates_known = self.bank.layout != "sorted"

    @property
    def name(self) -> str:
        """Dotted name that the experts' numbers follow."""
        return self.bank.name

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.bank.n_experts

    @property
    def width(self) -> int:
        """Neurons of an expert, each a row of gate and up with a column of down."""
        return self.bank.stacks["up_proj"].shape[0]

    @property
    def weights(self) -> int:
        """Weights of an expert."""
        return sum(stack.shape[0] * stack.shape[1] for stack in self.bank.stacks.values())

    @property
    def chosen(self) -> int:
        """To how many experts a token is sent."""
        return -int(-float(self.counts.sum()) // max(1, self.tokens))

    def mean(self, total: Tensor) -> Tensor:
        """Return a sum over an expert's tokens divided by their number; -1 where it sees none."""
        counts = self.counts.view(-1, *[1] * (total.ndim - 1))
        return torch.where(counts > 0, total / counts.clamp_min(1), -1.0)

    def need_gates(self, what: str) -> None:
        """Raise `InvalidInput` where routing weights are not known, which ``what`` needs."""
        if not self.gates_known:
            raise InvalidInput(
                f"{what} needs the routing weight of every token, which the mixture {self.name!r} "
                "does not tell its experts; choose another method."
            )

    def need_turning(self, what: str) -> None:
        """Raise `InvalidInput` where the residual state is not known, which ``what`` needs."""
        self.need_gates(what)
        if not self.turning_known:
            raise InvalidInput(
                f"{what} needs the residual state in front of the mixture {self.name!r}, but no "
                "norm's output enters it; choose another method."
            )


_SUMS = ("counts", "gates", "norms", "squares", "gated", "turning", "peak", "outputs",
         "outputs_squared", "inputs", "neurons", "sensitivity", "logits")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Statistics:
    """All mixtures of a model on a text."""

    model: LanguageModel
    calibration: CalibrationSet
    mixtures: Sequence[Mixture]
    gradients: bool
    """Whether the loss was differentiated."""


def gather(model: AnyModel, calibration: Source, *, gradients: bool = False) -> Statistics:
    """Run a text once and see what every expert does.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Left unchanged.
    calibration
        Text, as in `entangle.expand`.
    gradients
        Also differentiate the loss of the text, for `Mixture.sensitivity`: a backward pass of one
        sequence at a time.

    Raises
    ------
    InvalidInput
        If the model has no experts in stacked parameters, its weights come block by block, or a
        mixture has no router that can be found.
    """
    known = as_language_model(model)
    text = as_calibration(calibration, known)
    mixtures = find_mixtures(known.module)
    with evaluating(known.module), full_precision(), ExitStack() as held:
        watches = [_Watch(one, gradients) for one in mixtures]
        for watch in watches:
            watch.enter(held, known.module)
        held.enter_context(on_logits({w.mixture.router: w.see_logits for w in watches}))
        if gradients:
            held.enter_context(torch.inference_mode(False))
            held.enter_context(torch.enable_grad())
        for index, ids in text.batches(1 if gradients else None):
            if gradients:
                text_loss(known.module, ids.to(known.device), index).backward()
            else:
                forward(known.module, ids)
            for one in mixtures:
                one.tokens += ids.numel()
    return Statistics(known, text, mixtures, gradients)


def find_mixtures(module: nn.Module) -> list[Mixture]:
    """Return the mixtures of feed-forward experts of a model, with nothing seen yet.

    Raises
    ------
    InvalidInput
        As `gather`.
    """
    if comes_by_blocks(module):
        raise InvalidInput(
            "pruning of experts needs the model's weights in memory; this one's come block by "
            "block: load it with --no-stream (stream=False)."
        )
    banks = [bank for bank in banks_of(module) if {"up_proj", "down_proj"} <= bank.stacks.keys()]
    if not banks:
        raise InvalidInput(
            f"pruning of experts needs a mixture whose experts are stacked; "
            f"{type(module).__name__} has none: choose methods of weights or activations."
        )
    return [Mixture(bank, find_router(module, bank)) for bank in banks]


def routing_of(
    bank: ExpertBank, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return index and weights (tokens, k) of a call of a ``routed`` mixture; else None."""
    if bank.layout != "routed":
        return None
    _, index, weights = bank.given(args, kwargs)
    return index.reshape(-1, index.shape[-1]), weights.reshape(-1, index.shape[-1])


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(accumulator_dtype(values.device))


class _Watch:
    """Adds up what one mixture does."""

    def __init__(self, mixture: Mixture, gradients: bool) -> None:
        self.mixture, self.bank, self.gradients = mixture, mixture.bank, gradients
        self.gate: Tensor | None = None
        self.lengths: Tensor | None = None
        self.norms: dict[int, tuple[Tensor, Tensor]] = {}
        self.residual: Tensor | None = None

    def enter(self, held: ExitStack, module: nn.Module) -> None:
        """Watch the mixture, its experts, what stands in front, until ``held`` ends."""
        bank = self.bank
        parent, _, _ = bank.name.rpartition(".")
        block = module.get_submodule(parent.rpartition(".")[0])
        before: dict[nn.Module, Callable[..., Any]] = {
            module.get_submodule(parent): self.see_state, bank.runs[0]: self.begin,
        }  # fmt: skip
        after: dict[nn.Module, Callable[..., Any]] = {
            one: partial(self.see_norm, number)
            for number, one in enumerate(block.modules())
            if "norm" in type(one).__name__.lower() and not list(one.children())
        }
        after[bank.runs[-1]] = self.end
        for number in range(bank.n_experts):
            up, down = (bank.linear(number, key) for key in ("up_proj", "down_proj"))
            after |= {up: partial(self.see_inputs, number), down: partial(self.see_expert, number)}
            if self.gradients:
                before[down] = partial(self.tap, number)
        held.enter_context(on_calls(before, after))
        held.enter_context(one_by_one([bank.linear(0, "down_proj")]))

    def see_norm(self, number: int, args: Any, kwargs: Any, output: Any) -> None:
        """Keep what a norm was given and gave."""
        given = first_given(args, kwargs)
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            self.norms[number] = given.detach(), output.detach()

    def see_state(self, args: Any, kwargs: Any) -> None:
        """Take the residual state: what the norm was given whose output enters the mixture."""
        entering = first_given(args, kwargs)
        found = [
            before for before, after in self.norms.values()
            if after.data_ptr() == entering.data_ptr() and after.shape == entering.shape
        ]  # fmt: skip
        self.residual = found[-1].flatten(0, -2) if found else None
        self.norms.clear()

    def see_logits(self, logits: Tensor) -> Tensor:
        """Add up products of the logits."""
        rows = _wide(logits).flatten(0, -2)
        self.mixture.logits += (rows.T @ rows).double().cpu()
        return logits

    def begin(self, args: Any, kwargs: Any) -> None:
        """Note the routing weights of a pass, (tokens, experts)."""
        n = self.bank.n_experts
        routing = routing_of(self.bank, args, kwargs)
        if routing is not None:
            index, weights = routing
            known = (index >= 0) & (index < n)
            full = weights.new_zeros(len(index), n + 1)
            full.scatter_add_(1, index.masked_fill(~known, n).long(), weights.detach())
            self.gate = full[:, :n].double().cpu()
        elif self.bank.layout == "repeated":
            rows = first_given(args, kwargs).unflatten(0, (n, -1))
            self.gate = (rows != 0).any(-1).T.double().cpu()
        self.lengths = None if self.gate is None else torch.zeros_like(self.gate)

    def see_inputs(self, number: int, args: Any, kwargs: Any, _output: Any) -> None:
        """Add up what enters an expert."""
        x = _wide(first_given(args, kwargs))
        self.mixture.inputs[number] += x.square().sum(0).double().cpu()

    def see_expert(self, number: int, args: Any, kwargs: Any, output: Tensor) -> None:
        """Add up what an expert's ``down_proj`` received, and what the expert made of it."""
        own, z, y = self.mixture, _wide(first_given(args, kwargs)), output.detach()
        with torch.no_grad():
            made = _wide(self.bank.finished(y))
        size = made.norm(dim=1).double().cpu()
        own.counts[number] += len(size)
        own.norms[number] += size.sum()
        own.squares[number] += size.square().sum()
        if len(size):
            own.peak[number] = torch.maximum(own.peak[number], y.abs().max().double().cpu())
        own.outputs[number] += made.sum(0).double().cpu()
        own.outputs_squared[number] += made.square().sum(0).double().cpu()
        own.neurons[number] += z.square().sum(0).double().cpu()
        if self.gate is not None and self.lengths is not None and self.bank.at is not None:
            at = self.bank.at.cpu()
            self.lengths[at, number] += self.gate[at, number] * size

    def tap(self, number: int, args: Any, kwargs: Any) -> Any:
        """See the derivative of the loss by what enters an expert's ``down_proj``."""

        def add(gradient: Tensor) -> None:
            self.mixture.sensitivity[number] += _wide(gradient).square().sum(0).double().cpu()

        return with_first(tapped(first_given(args, kwargs), add), args, kwargs)

    def end(self, _args: Any, _kwargs: Any, output: Any) -> None:
        """Add up what needs all experts of a pass."""
        if self.gate is None or self.lengths is None:
            return
        own = self.mixture
        own.gates += self.gate.sum(0)
        own.gated += self.lengths.sum(0)
        made = output.detach()
        if self.bank.layout == "repeated":
            made = made.unflatten(0, (self.bank.n_experts, -1)).sum(0)
        state = self.residual
        if state is None or state.shape != made.flatten(0, -2).shape:
            own.turning_known = False
            return
        state, made = _wide(state), _wide(made.flatten(0, -2)).to(state.device)
        turned = 1 - nn.functional.cosine_similarity(state, state + made, dim=1)
        own.turning += (turned.clamp_min(0).double().cpu()[:, None] * self.lengths).sum(0)
