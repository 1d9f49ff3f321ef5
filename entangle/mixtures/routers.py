"""The router in front of a mixture: its logits, seen and changed before it chooses.

Found by its structure: beside the experts, the one module with a weight of a row an expert and a
column a feature. What it does with the logits (softmax or sigmoid, groups, renormalising) is its
own affair: logits are changed where ``torch.nn.functional.linear`` gives them, so that an expert
whose logit is -inf has no weight wherever the model renormalises, or does not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entangle.errors import InvalidInput
from entangle.models.blocks import uncompiled
from entangle.models.mixtures import ExpertBank, put_back

Logits = Float[Tensor, "*tokens experts"]

_NEVER = -1e4
"""Added to the bias by which some routers choose, of experts that go: finite, since a group of
experts is ranked by the sum of two of them."""


@dataclass(eq=False)
class Router:
    """What gives the logits of a mixture."""

    mixture: str
    """Name of the mixture."""
    holder: nn.Module
    """The module that has the weight."""
    n_experts: int
    biases: list[Tensor] = field(default_factory=list)
    """Numbers an expert that count for the choice alone (DeepSeek's correction); the last axis is
    that of the experts (Ernie's have one before it)."""
    scales: list[Tensor] = field(default_factory=list)
    """Other numbers an expert around the weight, (experts,), such as Gemma 4's factors."""

    @property
    def weight(self) -> Float[Tensor, "experts features"]:
        """The row of every expert, detached."""
        found = self.holder._parameters["weight"]
        assert found is not None  # noqa: S101
        return found.detach()


def find_router(module: nn.Module, bank: ExpertBank) -> Router:
    """Return the router of a mixture.

    Raises
    ------
    InvalidInput
        If there is none, or more than one module that could be it.
    """
    parent = module.get_submodule(bank.name.rpartition(".")[0])
    inside = {id(one) for part in (bank.home, *bank.runs) for one in part.modules()}
    shape = (bank.n_experts, bank.stacks["up_proj"].shape[1])
    outside = [one for one in parent.modules() if id(one) not in inside]
    found = [one for one in outside if _shape(one) == shape]
    if len(found) != 1:
        raise InvalidInput(
            f"the mixture {bank.name!r} must have one router, a weight of shape {shape} beside its "
            f"experts; it has {len(found)}: its experts cannot be pruned as a whole."
        )
    around = [one for one in outside if one is not parent and found[0] in one.modules()]
    biases = [one for name, one in _numbers(outside, bank.n_experts) if name.endswith("_bias")]
    scales = [one for name, one in _numbers(around, bank.n_experts) if not name.endswith("bias")]
    return Router(bank.name, found[0], bank.n_experts, biases, scales)


def _numbers(modules: Iterable[nn.Module], n_experts: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of what modules hold that is one number an expert."""
    for one in modules:
        for name, tensor in (*one._parameters.items(), *one._buffers.items()):
            if tensor is not None and tensor.shape[-1:] == (n_experts,) == (tensor.numel(),):
                yield name, tensor


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = module._parameters.get("weight")
    return None if weight is None else tuple(weight.shape)


class _Linear(TorchFunctionMode):
    """Hands the outputs of linears of as many features as there are experts to a function."""

    def __init__(self, n_experts: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.n_experts, self.change, self.runs = n_experts, change, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and found.shape[-1] == self.n_experts:
            self.runs += 1
            return self.change(found)
        return found


@contextmanager
def on_logits(changes: Mapping[Router, Callable[[Logits], Logits]]) -> Iterator[None]:
    """Have functions of their logits take the logits' place in routers, inside the ``with`` block.

    Raises
    ------
    InvalidInput
        When a router runs whose logits do not come from a linear.
    """
    with uncompiled(), ExitStack() as stack:
        for router, change in changes.items():
            own, forward = router.holder.__dict__, router.holder.forward
            stack.callback(put_back, router.holder, own.get("forward"))
            own["forward"] = partial(_run, router, change, forward)
        yield


def _run(
    router: Router, change: Callable[[Tensor], Tensor], forward: Any, *args: Any, **kwargs: Any
) -> Any:
    with _Linear(router.n_experts, change) as mode:
        found = forward(*args, **kwargs)
    if mode.runs != 1:
        raise InvalidInput(
            f"the router of {router.mixture!r} ({type(router.holder).__name__}) must make its "
            f"logits by one linear; it runs {mode.runs}: its experts cannot be pruned as a whole."
        )
    return found


@contextmanager
def never_chosen(routers: Mapping[Router, Bool[Tensor, " experts"]]) -> Iterator[None]:
    """Keep routers from choosing some experts, inside the ``with`` block.

    Their logits are -inf before the router chooses, and it renormalises as it ever does.
    """

    def without(dropped: Tensor, logits: Tensor) -> Tensor:
        return logits.masked_fill(dropped.to(logits.device), -torch.inf)

    with ExitStack() as stack:
        for router, dropped in routers.items():
            for bias in router.biases:
                stack.callback(bias.data.copy_, bias.detach().clone())
                bias.data.add_(_NEVER * dropped.to(bias))
        stack.enter_context(on_logits({r: partial(without, d) for r, d in routers.items()}))
        yield
