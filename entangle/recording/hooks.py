"""Hooks on layers: see their inputs and outputs, or replace the outputs.

The only place that registers hooks. Who observes a text goes through `entangle.recording.recorder`,
which knows which rows are the text's tokens.

New weights for rows of layers, which end, bit for bit, with a ``with`` block.

In which order a model shows its tokens to a layer, and which rows are no tokens.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.blocks import uncompiled
from entangle.models.layers import Layer, find_blocks
from entangle.models.mixtures import ExpertLinear, one_by_one
from entangle.models.shards import device_of, stored_of
from entangle.models.streaming import is_streamed, rehearsing

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
    meanwhile. Experts that are held together run one by one, which rounds differently.
    """
    with ExitStack() as stack:
        stack.enter_context(_as_modules(layers))
        for layer in layers:
            notify = partial(_notify, layer, callback)
            handle = layer.module.register_forward_hook(notify, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _as_modules(layers: Sequence[Layer]) -> Iterator[None]:
    """Have the model run layers as the modules that they are."""
    with uncompiled(), one_by_one(layer.module for layer in layers):
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
        stack.enter_context(_as_modules([layer for layer, _ in edits]))
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


@contextmanager
def edit_inputs(edits: Sequence[Edit]) -> Iterator[None]:
    """Replace the inputs of layers inside the ``with`` block.

    Parameters
    ----------
    edits
        Layers, and for each a function that receives the layer's input (..., in_features) and
        returns the tensor that takes its place, of the same shape, dtype and device.

    Raises
    ------
    InvalidInput
        During a forward pass, if a function returns anything else; at the end of the block, if a
        layer has not run. A block that ends by another error says nothing of that.
    """
    runs = dict.fromkeys(range(len(edits)), 0)
    with ExitStack() as stack:
        stack.enter_context(_as_modules([layer for layer, _ in edits]))
        for place, (layer, function) in enumerate(edits):
            hook = partial(_replace_input, layer, function, runs, place)
            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
    for (layer, _), count in zip(edits, runs.values(), strict=True):
        if not count:
            raise InvalidInput(
                f"the inputs of layer {layer.name!r} were to be edited, but it never ran, so "
                "nothing was changed; leave it out."
            )


def _replace_input(
    layer: Layer,
    function: Callable[[Tensor], Tensor],
    runs: dict[int, int],
    place: int,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = _first(args, kwargs)
    edited: object = function(given)
    if not isinstance(edited, Tensor) or _looks(edited) != _looks(given):
        found = _looks(edited) if isinstance(edited, Tensor) else type(edited).__name__
        raise InvalidInput(
            f"an edit must keep the shape, dtype and device of the input of {layer.name!r}, "
            f"{_looks(given)}; got {found}."
        )
    runs[place] += 1
    if args:
        return (edited, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): edited}


@contextmanager
def shape_told(module: nn.Module, told: Callable[[tuple[int, ...]], None]) -> Iterator[None]:
    """Call ``told`` with the shape of the token ids (sequences, tokens) before every pass."""

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", _first(args, kwargs))
        told(tuple(ids.shape[:2]))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
    device = device_of(module)
    with torch.inference_mode(False), torch.no_grad():
        return module(ids.to(device), **chosen)


Change = tuple[Layer, Tensor, Tensor]
"""A layer, indices of its rows, int64 of shape (rows,), and the weights that take their place, of
shape (rows, in_features)."""


@contextmanager
def changed_rows(changes: Sequence[Change]) -> Iterator[None]:
    """Put new weights into rows of layers inside the ``with`` block.

    Parameters
    ----------
    changes
        Rows and weights on any device, the weights in any dtype. Where two changes name one row,
        the later one holds.

    Raises
    ------
    InvalidInput
        At the end of the block, if a layer whose outputs were to be replaced has not run.

    Notes
    -----
    A layer's own weight is written to, and what was there is written back however the block ends.
    Where a weight is computed (a parametrisation, an adapter, a packed format) or is the memory of
    another module's parameter, nothing is written: the rows' outputs are computed from the new
    weights and put in the place of the old ones, so that this layer alone changes.
    """
    edits: list[InputEdit] = []
    with torch.no_grad(), ExitStack() as stack:
        for layer, rows, weight in changes:
            rows = rows.to(layer.device)
            if not layer.writable:
                bias = None if layer.bias is None else layer.bias[rows]
                edits.append((layer, partial(_replaced, rows, weight.to(layer.device), bias)))
                continue
            stored = stored_of(_parameter(layer))
            if stored is not None:  # it is brought anew, with the rows
                write = partial(_overlay, layer, rows, weight)
                stack.enter_context(stored.overlay(write))
                continue
            dense = layer.weight
            stack.callback(_write, dense, rows, dense[rows])
            _write(dense, rows, weight.to(dense))
        stack.enter_context(edit_with_inputs(edits))
        yield


def _parameter(layer: Layer) -> object:
    one = layer.module
    return one.stack.stored if isinstance(one, ExpertLinear) else one.weight


def _replaced(
    rows: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor, output: Tensor
) -> Tensor:
    """Return a layer's output with that of some rows computed from other weights."""
    chosen = nn.functional.linear(
        inputs.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
    )
    return output.index_copy(-1, rows, chosen.to(output.dtype))


def _overlay(layer: Layer, rows: Tensor, values: Tensor, stored: Tensor) -> None:
    weight = stored.T if layer.transposed else stored
    if isinstance(layer.module, ExpertLinear):
        weight = layer.module.stack.view(stored)[layer.module.number]
    _write(weight, rows.to(weight.device), values.to(weight))


def _write(weight: Tensor, rows: Tensor, values: Tensor) -> None:
    weight[rows] = values


_TOKENS = 7  # of each of two sequences


@dataclass(frozen=True, eq=False)
class Habits:
    """How a model shows tokens to a layer."""

    depths: int
    """How often every token passes the layer; 0 if it sees another number of rows."""
    tables: tuple[Tensor | None, ...]
    """For each of its runs the input, if it does not depend on the tokens (such as a table of
    relative positions), or None."""
    by_place: bool
    """Whether rows come place by place: all sequences' first tokens, then their second ones."""
    in_order: bool = True
    """Whether a sequence's rows are its tokens in their order, as far as it can be seen: where a
    change of the last token changes one row alone, it is the last one."""

    def is_table(self, inputs: Tensor, run: int) -> bool:
        """Tell whether an input, that of so many runs before it in a pass, is no token's."""
        tables = [table for table in self.tables if table is not None]
        if not tables:
            return False
        if len(tables) == len(self.tables):
            return True
        at_its_place = run < len(self.tables) and self.tables[run] is not None
        return at_its_place or any(
            table.shape == inputs.shape and torch.equal(table, inputs) for table in tables
        )


def look_at(
    module: nn.Module, layers: Sequence[Layer], ids: Int[Tensor, "sequences tokens"]
) -> dict[str, Habits]:
    """Learn from four short passes over two sequences how a model shows its tokens to layers.

    What is the same though all tokens are others does not depend on them. Where a layer's rows lie
    in one line, the pass with another second sequence shows which rows are its.

    Parameters
    ----------
    module
        The model.
    layers
        Layers to look at.
    ids
        Some of the text's ids.
    """
    with rehearsing(module):
        try:
            return _look(module, layers, ids, _TOKENS)
        except (RuntimeError, ValueError, AssertionError):  # some models take no sequence so short
            return _look(module, layers, ids, ids.shape[1])


def _look(module: nn.Module, layers: Sequence[Layer], ids: Tensor, most: int) -> dict[str, Habits]:
    found = {x.name: Habits(0, (), False) for x in layers if isinstance(x.module, ExpertLinear)}
    layers = [layer for layer in layers if layer.name not in found]
    if not layers:
        return found
    flat = ids.flatten()
    length = max(1, min(most, len(flat) // 2, ids.shape[1]))
    one, two = flat[:length], flat[-length:]
    known = flat.unique()
    told_apart = bool((known > 0).any())
    passes = [
        _inputs(module, layers, torch.stack([first, second]))
        for first, second in (
            (one, two),
            (one, _exchanged(two, known, 1)),
            (_exchanged(one, known, 2), _exchanged(two, known, 2)),
            (one, torch.cat([two[:-1], _exchanged(two[-1:], known, 1)])),
        )
    ]
    first, moved, others, ended = passes
    return found | {
        layer.name: _habits(
            first[layer.name],
            moved[layer.name] if told_apart else (),
            others[layer.name],
            length,
            ended[layer.name],
        )
        for layer in layers
    }


def _exchanged(ids: Tensor, known: Tensor, step: int) -> Tensor:
    """Return ids each of which is another one, of the text's own ids where it has several.

    Only a text of the id 0 alone comes back as it is: no other id is known to exist.
    """
    if len(known) == 1:
        return (ids - 1).clamp_min(0)
    place = torch.searchsorted(known, ids)
    return known[(place + 1 + (step - 1) % (len(known) - 1)) % len(known)]


def _in_line(inputs: Tensor, length: int) -> bool:
    return inputs.ndim == 2 and inputs.shape[0] == 2 * length


def _inputs(module: nn.Module, layers: Sequence[Layer], ids: Tensor) -> dict[str, list[Tensor]]:
    """Return the inputs of all runs of layers in one pass."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    all_logits = any(layer.block is None for layer in layers)
    note = partial(_append, seen)
    ends = nullcontext() if all_logits or not is_streamed(module) else _without_head(module)
    with observe(layers, note), ends:
        forward(module, ids, all_logits=all_logits)
    return seen


def _append(seen: dict[str, list[Tensor]], layer: Layer, inputs: Tensor, _outputs: Tensor) -> None:
    seen[layer.name].append(inputs.clone())


class _BlocksDone(Exception):
    """Raised after the last block."""


@contextmanager
def _without_head(module: nn.Module) -> Iterator[None]:
    """End a pass of a streamed model, whose blocks run once each in order, with its last block.

    Its head may be as large as several blocks, and would be read for nothing.
    """

    def end(*_: object) -> None:
        raise _BlocksDone

    handle = find_blocks(module)[1][-1].register_forward_hook(end)
    try:
        with suppress(_BlocksDone):
            yield
    finally:
        handle.remove()


def _habits(
    first: Sequence[Tensor],
    moved: Sequence[Tensor],
    others: Sequence[Tensor],
    length: int,
    ended: Sequence[Tensor] = (),
) -> Habits:
    """Compare a layer's inputs with those of another second sequence, other tokens, another end."""
    same = len(moved) == len(others) == len(first)
    tables = tuple(
        run if same and _is_fixed(run, (moved[i], others[i]), length) else None
        for i, run in enumerate(first)
    )
    tokens = [run for run, table in zip(first, tables, strict=True) if table is None]
    depths, rest = divmod(sum(run.shape[:-1].numel() for run in tokens), 2 * length)
    by_place = length > 1 and bool(tokens) and tokens[0].shape[:-1] == (length, 2) != (2, 2)
    if same:
        by_place |= any(
            _in_line(run, length) and _every_second(run, after)
            for run, after in zip(first, moved, strict=True)
        )
    in_order = all(
        _ends_change(run, after, length)
        for run, after, table in zip(first, ended, tables, strict=False)
        if table is None and len(ended) == len(first)
    )
    return Habits(0 if rest else depths, tables, by_place, in_order)


def _ends_change(before: Tensor, after: Tensor, length: int) -> bool:
    """Tell whether the one row that changes with the last token, if it is one, is the last."""
    if before.shape != after.shape or before.shape[:-1].numel() != 2 * length:
        return True
    changed = (before != after).any(-1).flatten()
    return int(changed.sum()) != 1 or bool(changed[-1])


def _is_fixed(run: Tensor, others: Sequence[Tensor], length: int) -> bool:
    """Tell whether an input is the same on other tokens, and no row a token."""
    lead = tuple(run.shape[:-1])
    shaped = lead in ((2, length), (length, 2), (2 * length,))  # a row a token, all the same ones
    return not shaped and all(
        run.shape == other.shape and torch.equal(run, other) for other in others
    )


def _every_second(before: Tensor, after: Tensor) -> bool:
    """Tell whether only every second row has changed."""
    if before.shape != after.shape:
        return False
    changed = (before != after).any(-1)
    return len(changed) > 2 and bool(changed.any()) and not bool(changed[::2].any())


def joined(
    pieces: Sequence[Float[Tensor, "..."]], shape: tuple[int, int], *, by_place: bool
) -> Float[Tensor, "tokens features"] | None:
    """Join pieces of all tokens of a pass, sequence by sequence; None if they are not that.

    Parameters
    ----------
    pieces
        (…, features), in the order in which they ran: the whole, or parts along the sequences or
        along the tokens.
    shape
        (sequences, tokens) of the pass.
    by_place
        As in `Habits`.
    """
    rows, columns = shape[::-1] if by_place else shape
    whole = _put_together(pieces, rows, columns)
    if whole is None or not by_place:
        return whole
    ordered: Tensor = whole.unflatten(0, (rows, columns)).transpose(0, 1).flatten(0, 1)
    return ordered


def _put_together(pieces: Sequence[Tensor], rows: int, columns: int) -> Tensor | None:
    leads = [tuple(piece.shape[:-1]) for piece in pieces]
    if len(pieces) == 1:
        plain = _without_ones(leads[0])
        fits = plain in (_without_ones((rows, columns)), _without_ones((rows * columns,)))
        return pieces[0].flatten(0, -2) if fits else None
    if all(len(lead) == 1 for lead in leads):
        return torch.cat(list(pieces)) if sum(n for (n,) in leads) == rows * columns else None
    if not all(len(lead) == 2 for lead in leads):
        return None
    for axis, (wanted, other) in ((1, (columns, rows)), (0, (rows, columns))):
        along = sum(lead[axis] for lead in leads) == wanted
        if along and all(lead[1 - axis] == other for lead in leads):
            return torch.cat(list(pieces), dim=axis).flatten(0, 1)
    return None


def _without_ones(lead: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in lead if size != 1)
