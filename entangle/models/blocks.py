"""Running a model block by block, each block with the arguments that the model itself gives it.

Nothing about a block's signature is written down here. The model's own forward runs with stand-ins
in place of its blocks: one kind notes what every block receives, another gives back the hidden
states to end with, so that the model's own final norm, head and logit scaling follow.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from entangle.errors import InvalidInput
from entangle.models.layers import find_blocks

Call = Callable[[Callable[..., Any], Tensor], Any]

_PROBE_TOKENS = 4
_TOLERANCE = 0.02  # of the largest logit: passes a GPU's reordered sums, not a missing term


class _AllCaptured(Exception):
    """Raised in place of the last block when only the blocks' arguments are asked for."""


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What the blocks receive beside the hidden states, for the one batch it was captured on."""

    shape: torch.Size
    """Shape of the hidden states, in nearly every model (sequences, tokens, features)."""
    calls: tuple[Call, ...]
    """One for each block: ``calls[b](forward, hidden)`` calls ``forward`` as the model calls block
    b. They hold masks and rotary tables, but neither hidden states nor a key-value cache."""


class BlockRunner:
    """The blocks of a causal language model, run one at a time as the model itself runs them.

    ``hidden, inputs = enter(ids)``, then ``hidden = run(b, hidden, inputs)`` for every block b, then
    ``leave(hidden, ids)`` gives ``module(ids).logits`` bit for bit. A block runs with the weights
    it has at that time. Nothing is differentiated and no key-value cache is made.

    Parameters
    ----------
    module
        A transformers model with a language-model head, in eval mode. Its blocks are replaced
        while `enter` and `leave` run, and put back however these end.

    Raises
    ------
    InvalidInput
        If the model has no list of blocks, is an encoder-decoder, gives no logits for each token,
        or is not reproduced by running its blocks one at a time (for example where a block reads
        keys and values that another has left). The last is tried on four tokens.
    """

    def __init__(self, module: nn.Module) -> None:
        if module.training:
            raise InvalidInput(
                "the model must be in eval mode to run block by block; call `eval()`."
            )
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            raise _refusal(module, "it is an encoder-decoder")
        self._module, self._blocks = module, find_blocks(module)[1]
        ids = torch.arange(_PROBE_TOKENS)[None]
        outputs, logits = self._watch(ids)
        self._extras = [_count_extras(module, output) for output in outputs]
        self._check(ids, logits)

    @property
    def n_blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self._blocks)

    def enter(
        self, ids: Int[Tensor, "sequences tokens"]
    ) -> tuple[Float[Tensor, "*batch features"], BlockInputs]:
        """Return the hidden states that enter block 0, and what the blocks receive beside them.

        Parameters
        ----------
        ids
            Token ids of shape (sequences, tokens), on any device.

        Notes
        -----
        Only what comes before the blocks runs (embeddings, masks, rotary tables). As that is cheap,
        nothing needs to be held while other batches run: enter a batch again for every block.
        """
        entering: list[Tensor] = []
        calls: list[Call] = []

        def capture(index: int, _forward: object, *args: object, **kwargs: object) -> object:
            hidden, call = _split(self._module, args, kwargs)
            entering[:] = entering or [hidden]
            calls.append(call)
            if len(calls) == self.n_blocks:
                raise _AllCaptured
            return self._output(index, hidden)

        with _replaced(self._blocks, capture), suppress(_AllCaptured):
            _forward(self._module, ids)
        return entering[0], BlockInputs(entering[0].shape, tuple(calls))

    def run(
        self, index: int, hidden: Float[Tensor, "*batch features"], inputs: BlockInputs
    ) -> Float[Tensor, "*batch features"]:
        """Return what block ``index`` makes of ``hidden``, in the same shape.

        Parameters
        ----------
        index
            Index of the block.
        hidden
            Hidden states that enter the block, on the model's device.
        inputs
            From `enter`, for the batch that ``hidden`` comes from.
        """
        if not 0 <= index < self.n_blocks:
            raise InvalidInput(f"`index` must be in 0..{self.n_blocks - 1}; got {index}.")
        _check_shape(hidden, inputs.shape)
        with torch.inference_mode(False), torch.no_grad():
            output = inputs.calls[index](self._blocks[index], hidden)
        return output if isinstance(output, Tensor) else output[0]

    def leave(
        self, hidden: Float[Tensor, "*batch features"], ids: Int[Tensor, "sequences tokens"]
    ) -> Float[Tensor, "sequences tokens vocabulary"]:
        """Return the logits that the model computes from the output of its last block.

        Parameters
        ----------
        hidden
            Output of the last block, on the model's device.
        ids
            Token ids of shape (sequences, tokens) of the same batch.
        """

        def pass_on(index: int, _forward: object, *args: object, **kwargs: object) -> object:
            passing, _ = _split(self._module, args, kwargs)
            _check_shape(hidden, passing.shape)
            return self._output(index, hidden if index == self.n_blocks - 1 else passing)

        with _replaced(self._blocks, pass_on):
            return _logits(self._module, ids)

    def _output(self, index: int, hidden: Tensor) -> object:
        """Wrap hidden states as block ``index`` does."""
        extras = self._extras[index]
        return hidden if extras is None else (hidden, *[None] * extras)

    def _watch(self, ids: Tensor) -> tuple[list[object], Tensor]:
        """Run the model; return its blocks' outputs and its logits."""
        seen: list[tuple[int, object]] = []

        def note(
            index: int, forward: Callable[..., object], *args: object, **kwargs: object
        ) -> object:
            seen.append((index, forward(*args, **kwargs)))
            return seen[-1][1]

        with _replaced(self._blocks, note):
            logits = _logits(self._module, ids)
        if (order := [index for index, _ in seen]) != list(range(self.n_blocks)):
            raise _refusal(self._module, f"its {self.n_blocks} blocks run in the order {order}")
        return [output for _, output in seen], logits

    def _check(self, ids: Tensor, expected: Tensor) -> None:
        """Refuse a model whose logits are not ``expected`` when its blocks run one at a time."""
        try:
            hidden, _ = self.enter(ids)
            for index in range(self.n_blocks):
                hidden = self.run(index, hidden, self.enter(ids)[1])
            logits = self.leave(hidden, ids).float()
        except (AttributeError, LookupError, TypeError) as error:
            raise _refusal(self._module, f"a block needs what another left ({error!r})") from error
        close = _TOLERANCE * float(expected.float().nan_to_num().abs().max())
        if not torch.allclose(logits, expected.float(), rtol=0, atol=close, equal_nan=True):
            raise _refusal(self._module, "its logits come out differently")


@contextmanager
def _replaced(blocks: nn.ModuleList, stand_in: Callable[..., object]) -> Iterator[None]:
    """Call ``stand_in(index, forward, *args, **kwargs)`` where a block's ``forward`` is called."""
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(_put_back, block, block.__dict__.get("forward"))
            block.__dict__["forward"] = partial(stand_in, index, block.forward)
        yield


def _put_back(block: nn.Module, own: object) -> None:
    """Undo a replacement; ``own`` is a forward that the block had on its own account, if any."""
    if own is None:
        block.__dict__.pop("forward", None)
    else:
        block.__dict__["forward"] = own


def _split(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor, Call]:
    """Part a block's arguments into its hidden states and a call with all the others."""
    keyword = None if args else next(iter(kwargs), None)
    hidden = args[0] if args else kwargs.get(str(keyword))
    if not isinstance(hidden, Tensor):
        raise _refusal(module, "the first argument of a block is not a tensor")
    rest = [None if isinstance(value, Cache) else value for value in args[1:]]
    named = {
        key: None if isinstance(value, Cache) else value
        for key, value in kwargs.items()
        if key != keyword
    }
    if keyword is None:
        return hidden, lambda forward, states: forward(states, *rest, **named)
    return hidden, lambda forward, states: forward(**{keyword: states}, **named)


def _count_extras(module: nn.Module, output: object) -> int | None:
    """Return how many values follow the hidden states in a block's output, None if it is bare."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return len(output) - 1
    raise _refusal(module, f"a block gives a {type(output).__name__}, not hidden states")


def _check_shape(hidden: Tensor, shape: torch.Size) -> None:
    if hidden.shape != shape:
        raise InvalidInput(
            f"hidden states of this batch must have shape {tuple(shape)}; got {tuple(hidden.shape)}."
        )


def _forward(module: nn.Module, ids: Tensor) -> object:
    accepted = inspect.signature(module.forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepted else {}
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad():
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
