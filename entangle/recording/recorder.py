"""The one recorder: what layers receive and give on the tokens of a text.

A layer may run on pieces of a sequence (tiled or chunked feed-forward), on rows that are no tokens
(tables of relative positions), with the sequences along another axis, or several times on every
token (weights shared by several depths). What is handed on is checked against the text: of every
pass, each layer's rows are the pass's tokens, sequence by sequence; pieces are joined, tables left
out; anything else is refused by the layer's name. The outputs are compared with what weight and
bias make of the inputs, so that nobody computes with a weight that is not what the layer does.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.memory import memory_for
from entangle.models.blocks import BlockRunner
from entangle.models.layers import Layer
from entangle.models.mixtures import ExpertBank, ExpertLinear
from entangle.models.streaming import comes_by_blocks, rehearsing
from entangle.ranks import Ranks
from entangle.recording.affine import TokenCheck, is_affine
from entangle.recording.hooks import Habits, SeenTensor, forward, joined, look_at, observe
from entangle.recording.states import HiddenStates
from entangle.recording.stream import ByteBudget
from entangle.recording.together import RecordedExperts, by_mixture, watched_together
from entangle.runs.progress import SharedReport
from entangle.texts.calibration_set import CalibrationSet

_LOG = logging.getLogger(__name__)

Batch = tuple[int, Tensor]
"""The group that all sequences of a batch belong to, and their ids (sequences, tokens)."""


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a text that are gone through once, or once for every block."""

    listed: Sequence[Batch]
    before: Callable[[int], None] = lambda _number: None
    """Called with the number of each batch before it, each time."""
    after: Callable[[int], None] = lambda _number: None
    """Called with the number of each batch after it, each time."""
    report: Callable[[int], None] = lambda _sequences: None
    """Called with the number of sequences that are done with, each once."""
    sample: Tensor | None = None
    """Ids to look at a model with (`entangle.recording.hooks.look_at`) in place of the first's."""

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.listed):
            self.before(number)
            yield batch
            self.after(number)
            self.report(batch[1].shape[0])


class _AllSeen(Exception):
    """Raised from a hook when nothing that was asked for is left to run."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one layer received and gave on the tokens of one pass."""

    layer: Layer
    """The layer."""
    inputs: Float[Tensor, "tokens in_features"]
    """Row s · T + t is token t of sequence s of the pass; in the model's dtype. Not to be changed.
    Where an expert sees some of the tokens only, those, in its own order."""
    outputs: Float[Tensor, "tokens out_features"]
    """The module's own outputs on these rows."""
    group: int
    """Group of the batch."""
    source: int
    """Number of the input: layers that read one input, such as gate and up, have the same."""
    leads: bool
    """Whether the layer is the first of those that read this input in this run. Who keeps inputs by
    ``source`` keeps these, and checks at the end (`Recorder.check_sources`)."""
    affine: bool
    """Whether `Layer.weight` and `Layer.bias` give the outputs, but for rounding; false if nobody
    compared."""
    at: Int[Tensor, " tokens"] | None = None
    """Which of the run's tokens an expert sees; None for all of the pass, or if nobody knows."""

    def check_affine(self, what: str) -> None:
        """Raise `InvalidInput` unless the layer is `affine`, which ``what`` needs."""
        if not self.affine:
            raise InvalidInput(
                f"{what} needs layers whose output is their weight times their input; "
                f"{self.layer.name!r} ({type(self.layer.module).__name__}) gives another one: "
                "leave it out."
            )


@dataclass(frozen=True, eq=False)
class _Piece:
    """One run of a layer on some of a pass's tokens."""

    seen: SeenTensor
    inputs: Tensor
    outputs: Tensor


@dataclass(eq=False)
class _Gathered:
    """What one layer has seen in a pass."""

    pieces: list[_Piece] = field(default_factory=list)
    """Of tokens that are not complete yet."""
    rows: int = 0
    runs: int = 0
    depths: int = 0  # how often all tokens of the pass have been seen


@dataclass(eq=False)
class _Pass:
    """One pass over tokens."""

    shape: tuple[int, int]
    group: int
    longest: bool  # whether its sequences are longer than any before
    start: int = 0  # tokens of the passes before
    stops: bool = False  # when all tokens have passed all layers
    gathered: dict[str, _Gathered] = field(default_factory=lambda: defaultdict(_Gathered))


class Recorder:
    """Watches layers while a model, or a part of it, runs on tokens.

    Parameters
    ----------
    layers
        Layers to watch.
    take
        Called with every layer's tokens of every pass, as soon as they are complete.
    once
        Refuse a layer that does not run once on every token.
    affine
        What needs the weights to be what the layer multiplies by, such as ``pruning``; a layer that
        does something else is refused. None hands it on with ``affine`` false.
    compared
        Compare outputs with weights, on every token; not where nobody reads the weights.
    lenient
        Leave out layers that see no token, or rows that are no tokens, instead of refusing them.
    habits, at_once
        From `look_at`, where a part of a model runs; what is called with what all experts of a
        mixture gave, in place of ``take`` for each.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        take: Callable[[Recorded], None],
        *,
        once: bool = False,
        affine: str | None = None,
        compared: bool = True,
        lenient: bool = False,
        habits: Mapping[str, Habits] | None = None,
        at_once: Callable[[RecordedExperts], None] | None = None,
    ) -> None:
        self.layers, self._take, self._at_once = tuple(layers), take, at_once
        self._once, self._need, self._lenient = once, affine, lenient
        self._mixtures = [] if at_once is None else by_mixture(layers)
        self._is_compared = compared
        self.sources: list[list[Layer]] = []
        """The layers that read one input, in the order in which they first ran."""
        self.tokens: dict[str, int] = dict.fromkeys((layer.name for layer in layers), 0)
        """Rows that every layer has been recorded on."""
        self.depths: dict[str, int] = {}
        """How often every token passes a layer, by name, where that is several times."""
        self.left_out: dict[str, str] = {}
        """Why layers were left out, by name."""
        self._habits: Mapping[str, Habits] = habits or {}
        self._source_of: dict[str, int] = {}
        self._led: Counter[int] = Counter()
        self._affine: dict[str, bool] = {}
        self._checks: dict[str, TokenCheck] = {}
        self._departs: dict[str, Tensor] = {}
        self._longest = self._start = 0
        self._last: tuple[str, list[SeenTensor]] | None = None
        self._pass: _Pass | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the ``with`` block."""
        at_once = watched_together(self.layers, self._mixtures, self._note_mixture)
        with at_once as alone, observe(alone, self._note):
            yield
        self._last = None

    @contextmanager
    def one_pass(
        self, shape: tuple[int, ...], group: int = 0, *, stops: bool = False
    ) -> Iterator[None]:
        """Take what runs inside the ``with`` block for one pass over tokens.

        Parameters
        ----------
        shape
            (sequences, tokens) of the pass.
        group
            Group of its sequences.
        stops
            Leave the block as soon as all tokens have passed all layers.

        Raises
        ------
        InvalidInput
            If rows that a layer received are not the pass's tokens, or the outputs are not its
            weight's on every token though they were at first.
        """
        n_seq, length = shape
        longest, self._longest = length > self._longest, max(self._longest, length)
        now = self._pass = _Pass((n_seq, length), group, longest, self._start, stops)
        self._start += n_seq * length
        try:
            with suppress(_AllSeen):
                yield
            self._complete(now)
            for name, departs in self._departs.items():
                if departs:
                    raise _differs(next(one for one in self.layers if one.name == name))
        finally:
            self._pass, self._last = None, None
            self._departs.clear()

    def run(
        self,
        module: nn.Module,
        batches: Iterable[Batch],
        *,
        memory: int | ByteBudget | None = None,
        whole: bool = True,
        after: Callable[[Sequence[Layer]], None] | None = None,
    ) -> None:
        """Run a model over batches of token ids.

        Each pass stops when all tokens have passed the layers that are watched, where a look at the
        model says that each runs once on every token. A model whose weights come from their shards
        runs block by block instead, all batches through one block after the other.

        Parameters
        ----------
        module
            The model.
        batches
            (group, ids of shape (sequences, tokens)): all of the text's tokens, no pads.
        memory
            Bytes for the hidden states of a model that runs block by block, or a budget shared with
            others; by default half of what is free.
        after
            Called with some of the layers when all batches have passed them, and with all others in
            the end. The weights of a block are there then.
        whole
            Check that all layers saw tokens; where the batches, or the layers, are a part of those
            that other ranks have too, who puts the parts together does (`join`).

        Raises
        ------
        InvalidInput
            If a layer sees no token, or rows that are not the text's tokens.
        """
        if comes_by_blocks(module):
            self._run_by_blocks(module, batches, memory, after)
        else:
            self._run_whole(module, batches)
            if after is not None:
                after(self.layers)
        if whole:
            self.check_all_seen()

    def _run_by_blocks(
        self,
        module: nn.Module,
        batches: Iterable[Batch],
        memory: int | ByteBudget | None,
        after: Callable[[Sequence[Layer]], None] | None,
    ) -> None:
        batches = batches if isinstance(batches, Batches) else Batches(list(batches))
        listed = [ids for _, ids in batches.listed]
        with rehearsing(module):
            runner = BlockRunner(module)
            sample = listed[0] if batches.sample is None else batches.sample
            self._habits = look_at(module, self.layers, sample)
        budget = memory if isinstance(memory, ByteBudget) else memory_for(memory, module)
        others = [layer for layer in self.layers if layer.block is None]
        blocks = max((one.block + 1 for one in self.layers if one.block is not None), default=0)
        blocks = runner.n_blocks if others else blocks
        bar = SharedReport(
            batches.report, sum(map(len, listed)), (blocks + bool(others)) * len(listed)
        )
        with closing(HiddenStates(listed, memory=budget, joined=False)) as states:
            states.enter(runner)
            for index in range(blocks):
                block = partial(runner.run, index)
                states.follow(self._passes(runner, batches, states, block, bar))
                own = [layer for layer in self.layers if layer.block == index]
                if after is not None and own:
                    after(own)
            if others:
                for _ in self._passes(runner, batches, states, None, bar):
                    pass
                if after is not None:
                    after(others)

    def _passes(
        self,
        runner: BlockRunner,
        batches: Batches,
        states: HiddenStates,
        block: Callable[..., Tensor] | None,
        bar: SharedReport,
    ) -> Iterator[Tensor]:
        """Yield what a block makes of every batch; with None, the model's logits."""
        self._longest = self._start = 0
        for number, ((group, ids), (_, hidden)) in enumerate(
            zip(batches.listed, states, strict=True)
        ):
            batches.before(number)
            inputs = None if block is None else runner.enter(ids)[1]
            with self.watching(), self.one_pass((ids.shape[0], ids.shape[1]), group):
                found = runner.leave(hidden, ids) if block is None else block(hidden, inputs)
            batches.after(number)
            yield found
            bar.step()

    def _run_whole(self, module: nn.Module, batches: Iterable[Batch]) -> None:
        all_logits = any(layer.block is None for layer in self.layers)
        begun, stops, self._start = False, False, 0
        sample = batches.sample if isinstance(batches, Batches) else None
        for group, ids in batches:
            if not begun:
                self._habits = look_at(module, self.layers, ids if sample is None else sample)
                once = all(habit.depths == 1 for habit in self._habits.values())
                begun, stops = True, once and not _is_dispatched(module)
            with self.watching(), self.one_pass(tuple(ids.shape), group, stops=stops):
                forward(module, ids, all_logits=all_logits)

    def take_over(self, other: "Recorder") -> None:
        """Take what another recorder counted of some of these layers for this one's."""
        self.tokens |= other.tokens
        self.depths |= other.depths
        self.left_out |= other.left_out

    def join(self, ranks: Ranks, *, seen: bool = True) -> None:
        """Put together what the recorders of all ranks counted of these layers, and check it.

        Parameters
        ----------
        ranks
            Who recorded.
        seen
            Whether to `check_all_seen`.

        Raises
        ------
        InvalidInput
            As `check_all_seen`, or for a layer that was left out on one rank and not on another.
        """
        found = ranks.exchange([self.tokens, self.depths, self.left_out])
        for name in self.tokens:
            self.tokens[name] = sum(tokens.get(name, 0) for tokens, _, _ in found)
        for _, depths, left_out in found:
            for name, times in depths.items():
                self.depths[name] = max(times, self.depths.get(name, 1))
            self.left_out |= left_out
        for name, why in self.left_out.items():
            if self.tokens[name]:
                raise InvalidInput(f"layer {name!r} {why}")
        if seen:
            self.check_all_seen()

    def check_all_seen(self) -> None:
        """Raise `InvalidInput` for a layer that saw no token; if lenient, if all are such.

        Also tells which layers' weights are used at several depths, whose outputs are pooled.
        """
        silent = [layer.name for layer in self.layers if not self.tokens[layer.name]]
        if silent and not (self._lenient and len(silent) < len(self.layers)):
            why = self.left_out.get(silent[0], "sees no token in a forward pass; leave it out.")
            raise InvalidInput(f"layer {silent[0]!r} {why}")
        for name in silent:
            self.left_out.setdefault(name, "sees no token in a forward pass; leave it out.")
        if self.depths:
            name, times = next(iter(self.depths.items()))
            more = f" and {len(self.depths) - 1} more" if len(self.depths) > 1 else ""
            _LOG.warning("layer %r%s: its outputs at %d depths are pooled", name, more, times)

    def check_sources(self) -> None:
        """Raise `InvalidInput` where layers read one input in some of their runs only.

        What is kept by `Recorded.source` is then no single layer's input.
        """
        for name, source in self._source_of.items():
            if self.tokens[name] != self._led[source]:
                raise InvalidInput(
                    f"layer {name!r} has the input of another layer in some of its runs only, so "
                    "they cannot be recorded together; take it alone, or score it by sketch."
                )

    def _note(self, layer: Layer, inputs: Tensor, outputs: Tensor) -> None:
        now, name = self._pass, layer.name
        if now is None or not inputs.numel() or name in self.left_out:
            return
        gathered, wanted = now.gathered[name], now.shape[0] * now.shape[1]
        gathered.runs += 1
        if isinstance(layer.module, ExpertLinear):
            self._note_expert(layer, layer.module, now, inputs, outputs)
            return
        if name in self._habits and self._habits[name].is_table(inputs, gathered.runs - 1):
            return
        rows, seen = inputs.shape[:-1].numel(), SeenTensor.of(inputs)
        if rows < wanted:  # kept until the others come, when the model may have written to it
            inputs, outputs = inputs.clone(), outputs.clone()
        gathered.pieces.append(_Piece(seen, inputs, outputs))
        gathered.rows += rows
        if gathered.rows >= wanted:
            found = self._joined(layer, now, gathered)
            if found is not None:
                affine = self._is_compared and self._compared(layer, now, *found)
                self._take(self._emitted(layer, now, gathered, *found, affine=affine))
        active = (one.name for one in self.layers if one.name not in self.left_out)
        if now.stops and all(now.gathered[one].depths for one in active):
            raise _AllSeen

    def _note_expert(
        self, layer: Layer, linear: ExpertLinear, now: _Pass, inputs: Tensor, outputs: Tensor
    ) -> None:
        """Hand on what an expert of a mixture gave on its tokens, all of which come at once."""
        gathered = now.gathered[layer.name]
        gathered.pieces = [_Piece(SeenTensor.of(inputs), inputs, outputs)]
        if self._once:
            linear.bank.check_told(layer.name)
        if not linear.bank.holds(now.shape[0] * now.shape[1]):
            self._refuse(layer, now, gathered)
            return
        found = self._emitted(layer, now, gathered, inputs, outputs, affine=self._is_compared)
        at = None if linear.bank.at is None else now.start + linear.bank.at
        self._take(replace(found, at=at))

    def _note_mixture(self, bank: ExpertBank, found: RecordedExperts) -> None:
        now, take = self._pass, self._at_once
        if now is None or take is None:
            return
        fits = bank.holds(now.shape[0] * now.shape[1])
        for key, layer, part in found.blocks():
            x, y = found.rows.inputs[key], found.rows.outputs[key]
            if fits:
                self.tokens[layer.name] += part.stop - part.start
            elif part.stop > part.start:
                self._refuse(layer, now, _Gathered([_Piece(SeenTensor.of(x), x[part], y[part])]))
        if fits:
            take(replace(found, group=now.group))

    def _joined(
        self, layer: Layer, now: _Pass, gathered: _Gathered
    ) -> tuple[Tensor, Tensor] | None:
        """Return the rows of a layer whose tokens are complete; None if it is left out."""
        habits = self._habits.get(layer.name)
        by_place = habits is not None and habits.by_place
        inputs = joined([one.inputs for one in gathered.pieces], now.shape, by_place=by_place)
        outputs = joined([one.outputs for one in gathered.pieces], now.shape, by_place=by_place)
        if inputs is None or outputs is None:
            self._refuse(layer, now, gathered)
            return None
        if self._once and habits is not None and not habits.in_order:
            raise InvalidInput(
                f"layer {layer.name!r} sees the tokens in another order than the text's, so its "
                "outputs have no known place in it; choose another layer."
            )
        gathered.depths += 1
        if gathered.depths > 1:
            if self._once:
                raise InvalidInput(
                    f"layer {layer.name!r} runs {gathered.depths} times on every token; choose "
                    "layers that run once on every token."
                )
            self.depths[layer.name] = max(gathered.depths, self.depths.get(layer.name, 1))
        return inputs, outputs

    def _emitted(
        self,
        layer: Layer,
        now: _Pass,
        gathered: _Gathered,
        inputs: Tensor,
        outputs: Tensor,
        *,
        affine: bool,
    ) -> Recorded:
        """Return what is handed on of a layer whose tokens are complete, and begin anew."""
        seen = [one.seen for one in gathered.pieces]
        gathered.pieces, gathered.rows = [], 0
        neighbour = self._last[0] if self._last is not None and _same(self._last[1], seen) else None
        source = self._source(layer, neighbour)
        leads = neighbour is None or self._source_of[neighbour] != source
        self.tokens[layer.name] += inputs.shape[0]
        self._led[source] += inputs.shape[0] if leads else 0
        self._last = layer.name, seen
        found = Recorded(layer, inputs, outputs, now.group, source, leads, affine)
        if self._need is not None:
            found.check_affine(self._need)
        return found

    def _source(self, layer: Layer, neighbour: str | None) -> int:
        """Return the number of a layer's input, that of the layer before it if it is the same."""
        if layer.name not in self._source_of:
            if neighbour is None:
                self.sources.append([])
            place = len(self.sources) - 1 if neighbour is None else self._source_of[neighbour]
            self._source_of[layer.name] = place
            self.sources[place].append(layer)
        return self._source_of[layer.name]

    def _compared(self, layer: Layer, now: _Pass, inputs: Tensor, outputs: Tensor) -> bool:
        """Tell whether weight and bias give a layer's outputs on every token, and keep it.

        A pass that is neither the first nor one of longer sequences is waited for at its end.
        """
        name, known = layer.name, self._affine.get(layer.name)
        if known and not now.longest:
            departs = self._checks[name].departs(inputs, outputs)
            self._departs[name] = departs | self._departs.get(name, departs)
        if known is not None and not now.longest:
            return known
        affine = is_affine(layer, inputs, outputs)
        if affine:
            check = self._checks.setdefault(name, TokenCheck(layer))
            affine = not check.departs(inputs, outputs)
        if self._affine.setdefault(name, affine) != affine:
            raise _differs(layer)
        return affine

    def _complete(self, now: _Pass) -> None:
        """Check what is left of the layers' pieces at the end of a pass."""
        for layer in self.layers:
            gathered = now.gathered.get(layer.name)
            if gathered is None or layer.name in self.left_out or not gathered.pieces:
                continue
            expert = all(one.inputs.ndim == 2 for one in gathered.pieces) and not gathered.depths
            if self._once or not expert:  # an expert of a mixture sees some of the tokens
                self._refuse(layer, now, gathered)
                continue
            inputs = torch.cat([one.inputs for one in gathered.pieces])
            outputs = torch.cat([one.outputs for one in gathered.pieces])
            affine = self._is_compared and self._compared(layer, now, inputs, outputs)
            self._take(self._emitted(layer, now, gathered, inputs, outputs, affine=affine))

    def _refuse(self, layer: Layer, now: _Pass, gathered: _Gathered) -> None:
        """Leave out a layer whose rows are not the text's tokens, or raise `InvalidInput`."""
        shapes = ", ".join(str(tuple(one.inputs.shape[:-1])) for one in gathered.pieces[:4])
        why = (
            f"received rows of shape {shapes} where the text has {now.shape[0]} × {now.shape[1]} "
            "tokens, so they are not the text's tokens; leave it out, or choose a `seq_len` that "
            "the model does not pad."
        )
        gathered.pieces, gathered.rows = [], 0
        if not self._lenient or self.tokens[layer.name]:
            raise InvalidInput(f"layer {layer.name!r} {why}")
        self.left_out[layer.name] = why
        _LOG.warning("left out: layer %r %s", layer.name, why)


def _differs(layer: Layer) -> InvalidInput:
    return InvalidInput(
        f"layer {layer.name!r} ({type(layer.module).__name__}) multiplies by its weight in some of "
        "its runs only; leave it out, take sequences of one length, or score it by sketch."
    )


def of_one_group(calibration: CalibrationSet) -> list[Batch]:
    """Return a calibration set's batches, all of group 0."""
    return [(0, ids) for _, ids in calibration.batches()]


def told(batches: Iterable[Batch], report: Callable[[int], None]) -> Batches:
    """Report the number of sequences of each batch when it is done with."""
    return Batches(list(batches), report=report)


def _same(before: Sequence[SeenTensor], after: Sequence[SeenTensor]) -> bool:
    """Tell whether two layers ran on the same pieces."""
    return len(before) == len(after) and all(
        a.same_as(b.tensor) and a.version == b.version for a, b in zip(before, after, strict=True)
    )


def _is_dispatched(module: nn.Module) -> bool:
    """Tell whether accelerate moves weights around a pass, which must then run to its end."""
    places = getattr(module, "hf_device_map", None)
    return isinstance(places, dict) and bool({"cpu", "disk"} & {str(p) for p in places.values()})
