"""A model whose activations are sparse: the rules of its layers, and what a token costs.

The masks are simulated: everything is multiplied, by zeros too. What is counted is what a kernel
that skips them would multiply; how fast that is belongs to `entangle.packed`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import linear

from entangle.activation.neurons import NeuronRule, PromptRule
from entangle.activation.rules import Rule, Window
from entangle.activation.subject import Subject
from entangle.errors import InvalidInput
from entangle.models.blocks import evaluating
from entangle.models.layers import Layer
from entangle.recording.hooks import (
    Edit,
    InputEdit,
    edit_inputs,
    edit_with_inputs,
    forward,
    observe,
    shape_told,
)
from entangle.recording.recorder import Recorded

LowRank = tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank cols"]]
"""Two factors whose product stands in for a weight on the inputs that go."""


@dataclass(eq=False)
class ActivationSparsity:
    """Rules for the layers of a model, from `entangle.activation.fit`."""

    method: str
    """Name of the method."""
    level: float
    """Share that goes, as the method counts it."""
    subject: Subject
    inputs: Mapping[str, Rule] = field(default_factory=dict)
    """Rules of the inputs of layers, by name; one rule may serve several layers."""
    neurons: Sequence[NeuronRule] = ()
    """Rules of the neurons of feed-forward parts."""
    rest: Mapping[str, LowRank] = field(default_factory=dict)
    """What the inputs that go are multiplied by, by the layer's name."""

    @property
    def window(self) -> Window:
        """Which tokens are sparse, and which are counted."""
        return self.subject.window

    @property
    def rules(self) -> list[Rule]:
        """Every rule once."""
        return list(dict.fromkeys([*self.inputs.values(), *self.neurons]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model run with sparse activations inside the ``with`` block.

        What was kept is counted anew.
        """
        layers = {layer.name: layer for layer in self.subject.layers}
        for rule in self.rules:
            rule.kept, rule.tokens, rule.joint = None, 0, None
        masked: list[Edit] = []
        added: list[InputEdit] = []
        for name, rule in self.inputs.items():
            if rule.dense:
                continue
            if name in self.rest:
                pair = _WithRest(rule, *self.rest[name])
                masked.append((layers[name], pair.before))
                added.append((layers[name], pair.after))
            else:
                masked.append((layers[name], _inputs_of(rule)))
        gates = []
        for neuron in self.neurons:
            assert neuron.part is not None  # noqa: S101
            if not neuron.dense or isinstance(neuron, PromptRule):
                masked.append((neuron.part.down, _inputs_of(neuron)))
            if neuron.part.gate is not None:
                gates.append((neuron, neuron.part.gate.layer))
        known = {layer.name: neuron for neuron, layer in gates}

        def note(layer: Layer, _inputs: Tensor, outputs: Tensor) -> None:
            known[layer.name].gates[layer.name] = outputs

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.subject.module))
            stack.enter_context(shape_told(self.subject.module, self._begin))
            stack.enter_context(observe([layer for _, layer in gates], note))
            stack.enter_context(edit_inputs(masked))
            stack.enter_context(edit_with_inputs(added))
            try:
                yield
            finally:
                for rule in self.rules:
                    rule.forget()
                    if isinstance(rule, NeuronRule):
                        rule.gates.clear()

    def _begin(self, shape: tuple[int, ...]) -> None:
        self.window.shape = shape

    def costs(self) -> pd.DataFrame:
        """Return one row a layer in scope: multiply-adds a token, dense and as measured.

        ``active`` counts the columns of inputs that were kept with their non-zero weights, rows and
        columns of neurons, low-rank rests, and a turn once for all layers that read its input.

        Raises
        ------
        InvalidInput
            If nothing has run inside `applied`.
        """
        rules = [rule for rule in self.rules if not rule.dense or isinstance(rule, PromptRule)]
        if any(rule.kept is None for rule in rules):
            raise InvalidInput("costs are counted while text runs inside `applied`; run some.")
        charged: set[int] = set()
        rows = []
        for layer in self.subject.layers:
            rule = self.inputs.get(layer.name)
            extra = 0.0
            routing = None if rule is None else rule.routing
            if routing is not None and id(routing) not in charged:
                charged.add(id(routing))
                extra += self.subject.routed[layer.name].router
            if layer.name in self.rest:
                left, right = self.rest[layer.name]
                extra += left.numel() + right.numel()
            turn = None if rule is None or rule.dense else rule.turn
            if turn is not None and id(turn) not in charged:
                charged.add(id(turn))
                extra += turn.basis.numel()
            rows.append(
                {"layer": layer.name, "block": layer.block, "projection": layer.projection,
                 "dense": math.prod(layer.shape), "active": self._active(layer), "extra": extra}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def _active(self, layer: Layer) -> float:
        """Return the multiply-adds of a token in one layer: non-zero weights of what was kept."""
        rule = self.inputs.get(layer.name)
        if rule is not None and not rule.dense:
            kept = rule.share_kept()
            assert kept is not None  # noqa: S101
            if rule.turn is not None:  # turned weights have no zeros
                return float(kept.sum()) * layer.out_features
            if rule.routing is not None:
                assert rule.joint is not None  # noqa: S101
                nonzeros = self.subject.routed[layer.name].nonzeros.to(rule.joint)
                return float((nonzeros * rule.joint).sum()) / max(1, rule.tokens)
            return float(self.subject.nonzeros[layer.name][0].to(kept.device) @ kept)
        columns, rows = self.subject.nonzeros[layer.name]
        for neuron in self.neurons:
            share = neuron.share_kept()
            part = neuron.part
            if share is None or part is None:
                continue
            if part.down.name == layer.name:
                return float(columns.to(share.device) @ share)
            known = isinstance(neuron, PromptRule)
            every = rows.to(share.device)
            early = part.gate is not None and neuron.spares_up
            spared = [
                every.narrow(0, piece.start, piece.size) @ (1 - share)
                for piece, thinned in ((part.up, early or known), (part.gate, known))
                if piece is not None and thinned and piece.layer.name == layer.name
            ]
            if spared:
                return float(every.sum() - sum(spared))
        return float(columns.sum())

    @property
    def stored(self) -> int:
        """Numbers that are stored beside the weights: turns and low-rank rests."""
        turns = {id(r.turn): r.turn for r in self.rules if r.turn and not r.dense}
        rests = (a.numel() + b.numel() for a, b in self.rest.values())
        return sum(turn.basis.numel() for turn in turns.values()) + sum(rests)

    def density(self) -> dict[str, float]:
        """Return multiply-adds a token as measured, as shares of the dense model's.

        ``density`` of the layers in scope, ``without_turns`` the same with nothing charged for
        turns, ``flops`` of all linear layers, the head included.
        """
        found = self.costs()
        everything = self.subject.everything
        dense, active = float(found["dense"].sum()), float(found["active"].sum())
        whole = active + float(found["extra"].sum())
        turns = sum(
            turn.basis.numel()
            for turn in {id(r.turn): r.turn for r in self.rules if r.turn and not r.dense}.values()
        )
        return {
            "density": whole / dense,
            "without_turns": (whole - turns) / dense,
            "flops": (everything - dense + whole) / everything,
        }

    def density_on(self, ids: Sequence[Int64[Tensor, "_ _"]]) -> float:
        """Return the density in scope, everything charged, as measured on token ids."""
        with self.applied():
            for batch in ids:
                forward(self.subject.module, batch)
            return self.density()["density"]

    def token_bytes(self) -> float:
        """Return the bytes of weights that a token reads, over the dense model's.

        As the layers would be packed: a column that an input is kept for is read with its
        non-zeros, and with a bit for every weight where some are zeros. Turns, low-rank rests and
        routers are read whole; everything out of scope too. Text as in `applied`.
        """
        width = next(self.subject.module.parameters()).element_size()
        costs, whole = self.costs(), self.subject.everything * width
        read = whole - width * float(costs["dense"].sum())
        for row in costs.to_dict("records"):
            name, active, dense = str(row["layer"]), float(row["active"]), float(row["dense"])
            read += width * (active + float(row["extra"]))
            routed = self.subject.routed.get(name)
            if routed is None:
                stored = float(self.subject.nonzeros[name][0].sum())
            else:
                stored = float(routed.nonzeros.sum(1) @ routed.share.to(routed.nonzeros))
            if 0 < stored < dense:
                read += dense / 8 * min(1.0, active / stored)
        return read / whole

    def row_errors(self) -> pd.DataFrame:
        """Return every neuron's relative error on the dense model's inputs of the calibration text.

        ``relative_error`` is Σ (y − ŷ)² / Σ (y − mean y)² over tokens: NaN for a constant neuron.
        Neurons of gates are as the rules leave their inputs; those of `up`, where a gate decides,
        count as 0 where they are not computed. What `applied` has counted is left as it is.
        """
        sums: dict[str, Tensor] = {}
        first: dict[str, int] = {}
        gates: dict[str, Tensor] = {}
        late = {p.part.down.name: p for p in self.neurons if p.part is not None}
        ups: dict[str, Tensor] = {}

        def add(name: str, exact: Tensor, found: Tensor) -> None:
            y, wrong = exact.double(), (exact.double() - found.double()).square().sum(0)
            part = torch.stack([wrong, y.sum(0), y.square().sum(0), torch.full_like(wrong, len(y))])
            sums[name] = part if name not in sums else sums[name] + part

        def take(seen: Recorded) -> None:
            layer, x, y = seen.layer, seen.inputs, seen.outputs
            rule = self.inputs.get(layer.name)
            if rule is not None and not rule.dense:
                add(layer.name, y, self._output(layer, rule, x))
                return
            if layer.name in late:
                neuron = late[layer.name]
                part = neuron.part
                assert part is not None  # noqa: S101
                if part.gate is not None:
                    neuron.gates[part.gate.layer.name] = gates[part.gate.layer.name]
                inputs, keep = neuron(x)
                add(layer.name, y, linear(inputs, layer.weight.to(x), _bias(layer, x)))
                if part.gate is not None and part.up is not None:
                    up = part.up.of(ups[part.up.layer.name])
                    first[part.up.layer.name] = part.up.start
                    add(part.up.layer.name, up, torch.where(keep, up, 0.0))
                return
            gates[layer.name] = ups[layer.name] = y

        if any(isinstance(rule, PromptRule) for rule in self.rules):
            raise _no_rows(self.method)
        counted = [(rule, rule.kept, rule.tokens, rule.joint) for rule in self.rules]
        uncounted, self.window.uncounted = self.window.uncounted, 0
        try:
            with shape_told(self.subject.module, self._begin):
                self.subject.watch(self.subject.layers, take)
        finally:
            self.window.uncounted = uncounted
            for rule, kept, tokens, joint in counted:
                rule.forget()
                rule.kept, rule.tokens, rule.joint = kept, tokens, joint
        found = [_errors(name, part, first.get(name, 0)) for name, part in sums.items()]
        return pd.concat(found, ignore_index=True)

    def _output(self, layer: Layer, rule: Rule, x: Tensor) -> Tensor:
        inputs, keep = rule(x)
        y = linear(inputs, layer.weight.to(x), _bias(layer, x))
        if layer.name in self.rest:
            left, right = self.rest[layer.name]
            y = y + torch.where(keep, 0.0, x.float()) @ right.T @ left.T
        return y


def _no_rows(method: str) -> Exception:
    return InvalidInput(f"{method} chooses neurons from a prompt; it has no errors of neurons.")


def _bias(layer: Layer, x: Tensor) -> Tensor | None:
    bias = layer.bias
    return None if bias is None else bias.to(x)


def _errors(name: str, part: Tensor, first: int) -> pd.DataFrame:
    wrong, total, squares, count = part.cpu()
    spread = squares - total.square() / count
    error = torch.where(spread > 0, wrong / spread, torch.nan)
    rows = range(first, first + len(wrong))
    return pd.DataFrame({"layer": name, "neuron": rows, "relative_error": error.numpy()})


def _inputs_of(rule: Rule):  # type: ignore[no-untyped-def]
    return lambda x: rule(x)[0]


class _WithRest:
    """A masked input, and the low-rank product of what was masked."""

    def __init__(self, rule: Rule, left: Tensor, right: Tensor) -> None:
        self._rule, self._left, self._right = rule, left, right
        self._rest: Tensor | None = None

    def before(self, x: Tensor) -> Tensor:
        """Return the input with what goes set to 0."""
        inputs, keep = self._rule(x)
        self._rest = torch.where(keep, 0.0, x).to(x.dtype)
        return inputs

    def after(self, _inputs: Tensor, output: Tensor) -> Tensor:
        """Return the output with the rest's product added."""
        assert self._rest is not None  # noqa: S101
        rest, self._rest = self._rest, None
        added = linear(linear(rest.to(self._right.dtype), self._right), self._left)
        return output + added.to(output.dtype)
