"""Hooks on layers: see their inputs and outputs, or replace the outputs.

The only place that registers hooks. Who observes a text goes through `entangle.recording.recorder`,
which knows which rows are the text's tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.blocks import uncompiled
from entangle.models.layers import Layer

Callback = Callable[[Layer, Tensor, Tensor], None]
"""Called as ``callback(layer, inputs, outputs)`` each time a layer has run."""

Edit = tuple[Layer, Callable[[Tensor], Tensor]]
"""A layer, and the function of its output that takes the output's place."""

InputEdit = tuple[Layer, Callable[[Tensor, Tensor], Tensor]]
"""A layer, and the function of its input and output that takes the output's place."""


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
    are removed however the block ends. Blocks may be nested. Compiled modules run uncompiled
    meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for layer in layers:
            notify = partial(_notify, layer, callback)
            handle = layer.module.register_forward_hook(notify, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _notify(
    layer: Layer,
    callback: Callback,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    inputs: Any = _first(args, kwargs)
    if not isinstance(output, Tensor) or not isinstance(inputs, Tensor):
        return  # a router, say, which only inherits from a linear layer
    with torch.inference_mode(False), torch.no_grad():
        if output.is_inference():  # its own forward runs under inference_mode
            inputs, output = inputs.clone(), output.clone()
        callback(layer, inputs.detach(), output.detach())


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


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
        During a forward pass, if a function returns anything else; at the end of the block, if a
        layer has not run, so that its edit changed nothing.

    Notes
    -----
    Hooks of a layer run in the order in which they were registered, each on what the one before
    it left. Inside ``with edit(...), observe(...)`` the callback therefore receives the edited
    output, inside ``with observe(...), edit(...)`` the original one; layers further on see the
    edited output either way. The hooks are removed however the block ends. Blocks may be nested.
    Compiled modules run uncompiled meanwhile.
    """
    with edit_with_inputs([(layer, partial(_of_output, change)) for layer, change in edits]):
        yield


def _of_output(change: Callable[[Tensor], Any], _inputs: Tensor, output: Tensor) -> Any:
    return change(output)


@contextmanager
def edit_with_inputs(edits: Sequence[InputEdit]) -> Iterator[None]:
    """As `edit`, by functions of the layer's input (..., in_features) and its output."""
    runs = [0] * len(edits)

    def count(place: int) -> None:
        runs[place] += 1

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for place, (layer, function) in enumerate(edits):
            hook = partial(_replace, layer, function, partial(count, place))
            handle = layer.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
    for (layer, _), count_of in zip(edits, runs, strict=True):
        if not count_of:
            raise InvalidInput(
                f"the outputs of layer {layer.name!r} were to be edited, but it never ran, so "
                "nothing was changed (an expert that sees no token, or weights that the model "
                "uses without running the layer); leave it out."
            )


def _replace(
    layer: Layer,
    function: Callable[[Tensor, Tensor], Tensor],
    count: Callable[[], None],
    _module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
) -> Tensor:
    edited: object = function(_first(args, kwargs), output)
    wanted = _looks(output)
    if not isinstance(edited, Tensor) or _looks(edited) != wanted:
        found = _looks(edited) if isinstance(edited, Tensor) else type(edited).__name__
        raise InvalidInput(
            f"an edit must keep the shape, dtype and device of the output of {layer.name!r}, "
            f"{wanted}; got {found}."
        )
    count()
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
        return cls(tensor, _version(tensor))

    def same_as(self, tensor: Tensor) -> bool:
        """Tell whether ``tensor`` is in the same memory, not written to since."""
        return (
            self.tensor.data_ptr() == tensor.data_ptr()
            and self.tensor.shape == tensor.shape
            and self.tensor.stride() == tensor.stride()
            and self.version == _version(tensor)
        )


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version


def forward(
    module: nn.Module, ids: Int[Tensor, "sequences tokens"], *, all_logits: bool = False
) -> object:
    """Run a model on token ids of shape (sequences, tokens), without a key-value cache.

    Where the model can, its head runs on the last token of a sequence only, unless ``all_logits``.
    Whatever mode the caller is in, nothing is differentiated, and writes to tensors are counted.
    """
    accepted = inspect.signature(module.forward).parameters
    extra = {"use_cache": False} if all_logits else {"use_cache": False, "logits_to_keep": 1}
    chosen = {name: value for name, value in extra.items() if name in accepted}
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad():
        return module(ids.to(device), **chosen)
