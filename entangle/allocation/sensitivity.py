"""How much the model's own loss cares about each neuron's output."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entangle.allocation.measurements import Measurements, square_sum
from entangle.recording.hooks import Edit, edit
from entangle.seeding import torch_rng


class _Tap(torch.autograd.Function):
    """The identity, whose backward pass shows the gradient to ``sink``."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
        ctx.sink = sink
        return output.clone()  # a model may add to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.sink(grads[0])
        return grads[0], None


def output_sensitivity(measured: Measurements) -> dict[str, Float[Tensor, " _"]]:
    """Return the mean squared gradient of the loss with respect to each neuron's output.

    Times the mean squared error that pruning makes in that output, and halved, it estimates what
    the error adds to the loss of a token (empirical Fisher information, with gradients and errors
    taken as independent).

    One forward and backward pass, a sequence at a time. The loss is the summed cross-entropy of the
    next token; for a model without logits (an encoder) it is a random projection of its last
    hidden states, whose squared gradient is in expectation that of all of them together.

    Parameters
    ----------
    measured
        Model, layers and calibration set.

    Returns
    -------
    dict
        (out_features,) by layer name, float64 on the CPU.
    """
    module = measured.model.module
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        square = square_sum(gradient.detach().flatten(0, -2)).cpu().double()
        sums[name] = sums[name] + square if name in sums else square

    def tap(name: str, output: Tensor) -> Tensor:
        followed = output if output.requires_grad else output.detach().requires_grad_()
        tapped: Tensor = _Tap.apply(followed, partial(add, name))  # type: ignore[no-untyped-call]
        return tapped

    edits: list[Edit] = [(layer, partial(tap, layer.name)) for layer in measured.layers]
    measured.progress.start(measured.calibration.n_seq, "sequences")
    with torch.inference_mode(False), torch.enable_grad(), edit(edits):
        for index, ids in measured.calibration.batches(1):
            _loss(module, ids.to(measured.model.device), index).backward()
            measured.progress.advance()
    tokens = measured.calibration.n_tokens
    return {layer.name: sums[layer.name] / tokens for layer in measured.layers}


def _loss(module: nn.Module, ids: Int[Tensor, "sequences tokens"], index: int) -> Tensor:
    accepted = inspect.signature(module.forward).parameters
    found = module(ids, **({"use_cache": False} if "use_cache" in accepted else {}))
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        flat = logits[:, :-1].flatten(0, 1).float()
        return nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")
    hidden = found if isinstance(found, Tensor) else found[0]
    signs = torch.randint(2, hidden.shape, generator=torch_rng(0, "projection", index)) * 2 - 1
    return (hidden.float() * signs.to(hidden.device)).sum()
