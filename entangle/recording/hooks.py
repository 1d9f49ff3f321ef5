"""Observe the inputs and outputs of layers during forward passes, or replace the outputs."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.layers import Layer

Callback = Callable[[Layer, Tensor, Tensor], None]
"""Called as ``callback(layer, inputs, outputs)`` each time a layer has run."""

Edit = tuple[Layer, Callable[[Tensor], Tensor]]
"""A layer, and the function of its output that takes the output's place."""

Batch = tuple[int, Tensor]
"""The group that all sequences of a batch belong to, and their ids (sequences, tokens)."""

_PROBE_TOKENS = 4


class _LastLayerReached(Exception):
    """Raised from a hook when nothing that was asked for is left to run."""


@contextmanager
def observe(layers: Sequence[Layer], callback: Callback) -> Iterator[None]:
    """Call ``callback`` after every run of a layer inside the ``with`` block.

    Parameters
    ----------
    layers
        Layers to watch, from `entangle.models.layers.find_layers` (which resolves names first).
    callback
        Receives the layer, its input (..., in_features) and its output (..., out_features), both
        detached and in the model's dtype. It must not modify them.

    Notes
    -----
    The hooks return nothing, so the output is the very tensor that it would be without them. They
    are removed however the block ends. Blocks may be nested.
    """
    with ExitStack() as stack:
        for layer in layers:
            notify = partial(_notify, layer, callback)
            handle = layer.module.register_forward_hook(notify, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _notify(
    layer: Layer,
    callback: Callback,
    _module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
) -> None:
    inputs = args[0] if args else next(iter(kwargs.values()))
    callback(layer, inputs.detach(), output.detach())


@contextmanager
def edit(edits: Sequence[Edit]) -> Iterator[None]:
    """Replace the outputs of layers inside the ``with`` block.

    Parameters
    ----------
    edits
        Layers, from `entangle.models.layers.find_layers` (which resolves names first), and for each
        a function that receives the layer's output (..., out_features) and returns the tensor that
        takes its place, of the same shape, dtype and device. It must not write to what it receives.
        A layer may be named several times: its functions run one after the other.

    Raises
    ------
    InvalidInput
        During a forward pass, if a function returns anything else.

    Notes
    -----
    Hooks of a layer run in the order in which they were registered, each on what the one before
    it left. Inside ``with edit(...), observe(...)`` the callback therefore receives the edited
    output, inside ``with observe(...), edit(...)`` the original one; layers further on see the
    edited output either way. The hooks are removed however the block ends. Blocks may be nested.
    """
    with ExitStack() as stack:
        for layer, function in edits:
            handle = layer.module.register_forward_hook(partial(_replace, layer, function))
            stack.callback(handle.remove)
        yield


def _replace(
    layer: Layer,
    function: Callable[[Tensor], Tensor],
    _module: nn.Module,
    _args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    edited: object = function(output)
    wanted = _looks(output)
    if not isinstance(edited, Tensor) or _looks(edited) != wanted:
        found = _looks(edited) if isinstance(edited, Tensor) else type(edited).__name__
        raise InvalidInput(
            f"an edit must keep the shape, dtype and device of the output of {layer.name!r}, "
            f"{wanted}; got {found}."
        )
    return edited


def _looks(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"


@dataclass(frozen=True, eq=False)
class SeenTensor:
    """A tensor as it was when it was seen, to tell whether another one has the same values."""

    tensor: Tensor
    """Kept alive, so that its memory is not given to another tensor."""
    version: int
    """How often its memory had been written to when it was seen."""

    @classmethod
    def of(cls, tensor: Tensor) -> "SeenTensor":
        """See a tensor."""
        return cls(tensor, tensor._version)

    def same_as(self, tensor: Tensor) -> bool:
        """Tell whether ``tensor`` is in the same memory, not written to since."""
        return (
            self.tensor.data_ptr() == tensor.data_ptr()
            and self.tensor.shape == tensor.shape
            and self.tensor.stride() == tensor.stride()
            and self.version == tensor._version
        )


def forward(
    module: nn.Module, ids: Int[Tensor, "sequences tokens"], *, all_logits: bool = False
) -> object:
    """Run a model on token ids of shape (sequences, tokens), without a key-value cache.

    Where the model can, its head runs on the last token of a sequence only, unless ``all_logits``.
    """
    accepted = inspect.signature(module.forward).parameters
    extra = {"use_cache": False} if all_logits else {"use_cache": False, "logits_to_keep": 1}
    chosen = {name: value for name, value in extra.items() if name in accepted}
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad():
        return module(ids.to(device), **chosen)


def run_observed(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    callback: Callable[[int, Layer, Tensor, Tensor], None],
    *,
    may_be_silent: bool = False,
) -> None:
    """Run ``module`` over ``batches`` and report every run of ``layers`` to ``callback``.

    The callback is called as ``callback(group, layer, inputs, outputs)``.

    Each forward pass stops after the last layer that is watched. How often each layer runs is
    found beforehand on a few tokens; passes run to their end where that is not certain.

    Raises
    ------
    InvalidInput
        If a layer sees no token at all (for example an unused part of the model), unless it
        ``may_be_silent``; if all layers do in any case.
    """
    all_logits = any(layer.block is None for layer in layers)
    expected: Counter[str] | None = None
    calls: Counter[str] = Counter()
    seen: Counter[str] = Counter()

    def count(layer: Layer, inputs: Tensor, outputs: Tensor) -> None:
        callback(group, layer, inputs, outputs)
        seen[layer.name] += inputs.numel()
        calls[layer.name] += 1
        if expected is not None and calls == expected:
            raise _LastLayerReached

    for batch in batches:
        group, ids = batch
        if expected is None:
            expected = _calls_in_one_pass(module, layers, ids[:1, :_PROBE_TOKENS])
            certain = all(expected[layer.name] == 1 for layer in layers)
            expected = expected if certain and not _is_dispatched(module) else Counter({"": -1})
        calls.clear()
        with observe(layers, count), suppress(_LastLayerReached):
            forward(module, ids, all_logits=all_logits)
    silent = [layer.name for layer in layers if seen[layer.name] == 0]
    if silent and not (may_be_silent and len(silent) < len(layers)):
        raise InvalidInput(f"layer {silent[0]!r} sees no token in a forward pass; leave it out.")


def _calls_in_one_pass(module: nn.Module, layers: Sequence[Layer], ids: Tensor) -> Counter[str]:
    calls: Counter[str] = Counter()
    with observe(layers, lambda layer, _inputs, _outputs: calls.update([layer.name])):
        forward(module, ids)
    return calls


def _is_dispatched(module: nn.Module) -> bool:
    """Tell whether accelerate moves weights around a pass, which must then run to its end."""
    places = getattr(module, "hf_device_map", None)
    return isinstance(places, dict) and bool({"cpu", "disk"} & {str(p) for p in places.values()})
