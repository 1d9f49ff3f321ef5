"""In which order a model shows its tokens to a layer, and which rows are no tokens."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entangle.models.layers import Layer
from entangle.recording.hooks import forward, observe

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
    try:
        return _look(module, layers, ids, _TOKENS)
    except (RuntimeError, ValueError, AssertionError):  # some models take no sequence so short
        return _look(module, layers, ids, ids.shape[1])


def _look(module: nn.Module, layers: Sequence[Layer], ids: Tensor, most: int) -> dict[str, Habits]:
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
    return {
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
    with observe(layers, lambda layer, inputs, _outputs: seen[layer.name].append(inputs.clone())):
        forward(module, ids, all_logits=all_logits)
    return seen


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
