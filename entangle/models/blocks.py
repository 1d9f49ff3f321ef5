"""Running a model block by block, each block with the arguments that the model itself gives it.

Nothing about a block's signature is written down here. The model's own forward runs with stand-ins
in place of its blocks: one kind notes what every block receives, another gives the hidden states
to end with, so that the model's own final norm, head and logit scaling follow.

A module is in eval mode and without gradients only while it is looked at.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from entangle.errors import InvalidInput
from entangle.models.layers import find_blocks
from entangle.models.loading import LanguageModel
from entangle.models.shards import device_of
from entangle.models.streaming import rehearsing

Hidden = Float[Tensor, "*batch features"]
Ids = Int[Tensor, "sequences tokens"]
Call = Callable[[nn.Module, Tensor], Tensor]

_TOLERANCE = 0.02  # of the largest logit: passes a GPU's reordered sums, not a missing term

MOST_LOGITS = 2**27
"""Up to so many logits are computed at once (0.5 GiB in float32); of more, `LOGITS_OF_A_PART`."""
LOGITS_OF_A_PART = 2**26


_TRYING: ContextVar[bool] = ContextVar("trying", default=False)


def is_trying() -> bool:
    """Tell whether a model runs on made-up tokens to see how it works, which nobody counts."""
    return _TRYING.get()


class _AllCaptured(Exception):
    """Raised in place of the last block, or after it, when nothing behind it is asked for."""


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What the blocks receive beside the hidden states, for the one batch it was captured on."""

    shape: torch.Size
    """Shape of the hidden states, in nearly every model (sequences, tokens, features)."""
    calls: tuple[Call, ...]
    """``calls[b](block, hidden)`` runs ``block`` as the model runs block b. They hold masks and
    rotary tables, but neither hidden states nor a key-value cache."""


class BlockRunner:
    """The blocks of a causal language model, run one at a time as the model itself runs them.

    ``hidden, inputs = enter(ids)``, then ``hidden = run(b, hidden, inputs)`` for every block b,
    then ``leave(hidden, ids)`` gives ``module(ids).logits`` bit for bit. A block runs with the
    weights it has at that time. Nothing is differentiated and no key-value cache is made.

    Parameters
    ----------
    module
        A transformers model with a language-model head, in eval mode. Its blocks' ``forward`` is
        replaced while `enter` and `leave` run, and put back however these end.

    Raises
    ------
    InvalidInput
        If the model has no list of blocks, is an encoder-decoder, gives no logits for each token,
        or, tried on four tokens, is not reproduced by running its blocks one at a time (as where a
        block reads keys and values that another has left).
    """

    def __init__(self, module: nn.Module) -> None:
        if module.training:
            raise InvalidInput("a model run block by block must be in eval mode; call `eval()`.")
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            raise _refusal(module, "it is an encoder-decoder")
        self._module, self._blocks = module, find_blocks(module)[1]
        self.n_blocks = len(self._blocks)
        """Number of transformer blocks."""
        self.widest = max(
            (max(p.shape[-2:]) for block in self._blocks for p in block.parameters() if p.ndim),
            default=1,
        )
        """Most inputs or outputs of a layer in the blocks."""
        trying = _TRYING.set(True)
        try:
            with rehearsing(module):
                self._probe(torch.arange(4)[None])
        finally:
            _TRYING.reset(trying)

    def enter(self, ids: Ids) -> tuple[Hidden, BlockInputs]:
        """Return the hidden states that enter block 0, and what the blocks receive beside them.

        Only what comes before the blocks runs (embeddings, masks, rotary tables). As that is cheap,
        nothing needs to be held while other batches run: enter a batch again for every block.
        ``ids`` has shape (sequences, tokens) and may be on any device.
        """
        captured: list[tuple[Any, Call]] = []

        def capture(index: int, _forward: object, *args: object, **kwargs: object) -> object:
            captured.append(_split(args, kwargs))
            if index == self.n_blocks - 1:
                raise _AllCaptured
            return self._output(index, captured[-1][0])

        with _replaced(self._blocks, capture), suppress(_AllCaptured):
            _forward(self._module, ids)
        hidden = captured[0][0]
        return hidden, BlockInputs(hidden.shape, tuple(call for _, call in captured))

    def run(self, index: int, hidden: Hidden, inputs: BlockInputs) -> Hidden:
        """Return what block ``index`` makes of ``hidden``, in the same shape.

        ``hidden`` is on the model's device, and ``inputs`` come from entering the same batch.
        """
        if not 0 <= index < self.n_blocks:
            raise InvalidInput(f"`index` must be in 0..{self.n_blocks - 1}; got {index}.")
        _check_shape(hidden, inputs.shape)
        with torch.inference_mode(False), torch.no_grad(), uncompiled():
            return inputs.calls[index](self._blocks[index], hidden)

    def leave(self, hidden: Hidden, ids: Ids) -> Float[Tensor, "sequences tokens vocabulary"]:
        """Return the logits that the model computes from ``hidden``, its last block's output.

        ``ids`` are the token ids of the same batch, of shape (sequences, tokens).
        """

        def inject(index: int, _forward: object, *args: object, **kwargs: object) -> object:
            _check_shape(hidden, _split(args, kwargs)[0].shape)
            return self._output(index, hidden)

        with _replaced(self._blocks, inject):
            return _logits(self._module, ids)

    def last(self, ids: Ids) -> Hidden:
        """Return what the last block gives in the model's own forward; nothing after it runs."""
        found: list[Tensor] = []

        def stop(index: int, forward: Callable[..., Any], *args: object, **kwargs: object) -> Any:
            output = forward(*args, **kwargs)
            if index < self.n_blocks - 1:
                return output
            found.append(output if isinstance(output, Tensor) else output[0])
            raise _AllCaptured

        with _replaced(self._blocks, stop), suppress(_AllCaptured):
            _forward(self._module, ids)
        return found[0]

    def leave_in_parts(
        self, hidden: Hidden, ids: Ids
    ) -> Iterator[tuple[int, Float[Tensor, "sequences part vocabulary"]]]:
        """Yield what `leave` returns, a part of each sequence's tokens after the other.

        How long a part is depends on the number of sequences and on the vocabulary alone. With each
        goes the place of its first token. It is one part up to `MOST_LOGITS`, where what comes
        after the blocks joins neighbouring tokens, and where hidden states have another form.
        """
        n_seq, tokens = ids.shape
        size = max(1, LOGITS_OF_A_PART // max(1, n_seq * self._vocabulary))
        size = size // 64 * 64 or size
        few = n_seq * tokens * self._vocabulary <= MOST_LOGITS or tokens < 4
        if few or hidden.shape[:-1] != ids.shape or not self._parts_alone(hidden, ids):
            yield 0, self.leave(hidden, ids)
            return
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            yield start, self.leave(hidden[:, part], ids[:, part])

    def _parts_alone(self, hidden: Tensor, ids: Tensor) -> bool:
        """Tell whether a token's logits are the same without the tokens before it."""
        few, first = (hidden[:1, :4], ids[:1, :4]), (hidden[:1, 2:4], ids[:1, 2:4])
        together, alone = self.leave(*few)[:, 2:], self.leave(*first)
        close = _TOLERANCE * float(together.nan_to_num().abs().max())
        return torch.allclose(together, alone, rtol=0, atol=close, equal_nan=True)

    def _output(self, index: int, hidden: Tensor) -> object:
        """Wrap hidden states as block ``index`` does."""
        extras = self._extras[index]
        return hidden if extras is None else (hidden, *[None] * extras)

    def _probe(self, ids: Tensor) -> None:
        """Learn the form of the blocks' outputs; refuse a model that `run` does not reproduce."""
        seen: list[tuple[int, Any]] = []

        def note(index: int, forward: Callable[..., Any], *args: object, **kwargs: object) -> Any:
            seen.append((index, forward(*args, **kwargs)))
            return seen[-1][1]

        with _replaced(self._blocks, note):
            logits = _logits(self._module, ids)
        self._vocabulary = logits.shape[-1]
        if (order := [index for index, _ in seen]) != list(range(self.n_blocks)):
            raise _refusal(self._module, f"its {self.n_blocks} blocks run in the order {order}")
        try:
            self._extras = [None if isinstance(o, Tensor) else len(o) - 1 for _, o in seen]
            hidden, _ = self.enter(ids)
            for index in range(self.n_blocks):
                hidden = self.run(index, hidden, self.enter(ids)[1])
            replayed = self.leave(hidden, ids)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise _refusal(self._module, f"a block cannot run on its own ({error!r})") from error
        close = _TOLERANCE * float(logits.nan_to_num().abs().max())
        if not torch.allclose(replayed, logits, rtol=0, atol=close, equal_nan=True):
            raise _refusal(self._module, "its logits come out differently")


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules as they were before `torch.compile`.

    A compiled module knows neither hooks nor a `forward` that is replaced for a while.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _replaced(blocks: nn.ModuleList, stand_in: Callable[..., object]) -> Iterator[None]:
    """Call ``stand_in(index, forward, *args, **kwargs)`` where a block's ``forward`` is called."""
    own = [block.__dict__.get("forward") for block in blocks]  # accelerate, for one, sets it
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = partial(stand_in, index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            block.__dict__.update({} if forward is None else {"forward": forward})


def _split(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Any, Call]:
    """Part a block's arguments into the hidden states, which come first, and a call with others."""
    hidden, *others = [None if isinstance(v, Cache) else v for v in (*args, *kwargs.values())]
    count, names = len(args), tuple(kwargs)

    def call(block: nn.Module, states: Tensor) -> Any:
        given = [states, *others]
        output = block(*given[:count], **dict(zip(names, given[count:], strict=True)))
        return output if isinstance(output, Tensor) else output[0]

    return hidden, call


def _check_shape(hidden: Tensor, shape: torch.Size) -> None:
    if hidden.shape != shape:
        raise InvalidInput(f"`hidden` must have shape {tuple(shape)}; got {tuple(hidden.shape)}.")


def _forward(module: nn.Module, ids: Tensor) -> object:
    accepted = inspect.signature(module.forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepted else {}
    device = device_of(module)
    with torch.inference_mode(False), torch.no_grad(), uncompiled():
        return module(ids.to(device), **extra)


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    """Run a model; return its logits (sequences, tokens, vocabulary)."""
    logits = getattr(_forward(module, ids), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise _refusal(module, "it gives no logits for each token (has it a language-model head?)")
    return logits


def _refusal(module: nn.Module, reason: str) -> InvalidInput:
    name = type(module).__name__
    return InvalidInput(f"{name} cannot be run block by block: {reason}; choose another model.")


P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval mode, and its parameters without gradients, while the block runs.

    Training mode of every submodule and ``requires_grad`` of every parameter come back however the
    block ends. Contexts may be nested. A module that is frozen already is not touched.
    """
    modes = [(child, child.training) for child in module.modules()]
    trained = [p for p in module.parameters() if p.requires_grad and not p.is_inference()]
    try:
        if any(training for _, training in modes):
            module.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        _restore(modes)


def evaluates(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function hold every module and `LanguageModel` among its arguments in `evaluating`."""

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for value in (*args, *kwargs.values()):
                module = value.module if isinstance(value, LanguageModel) else value
                if isinstance(module, nn.Module):
                    stack.enter_context(evaluating(module))
            return function(*args, **kwargs)

    return held


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    """Give every module its mode back, outer ones first.

    By ``train``, since some modules do more in it than set a flag (an adapter that is merged into
    its weight meanwhile); then flag by flag, since it also sets those of all modules inside.
    """
    for child, training in modes:
        if child.training != training:
            child.train(training)
    for child, training in modes:
        child.training = training
