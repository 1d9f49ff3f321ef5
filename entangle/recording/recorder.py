"""The one recorder: what layers receive and give on the tokens of a text.

A layer may run on pieces of a sequence (tiled or chunked feed-forward), on rows that are no tokens
(tables of relative positions), with the sequences along another axis, or several times on every
token (weights shared by several depths). What is handed on is checked against the text: of every
pass, each layer's rows are the pass's tokens, sequence by sequence; pieces are joined, tables left
out; anything else is refused by the layer's name. The outputs are compared with what weight and
bias make of the inputs, so that nobody computes with a weight that is not what the layer does.

Whether a layer does what its weight and bias say.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.layers import Layer
from entangle.precision import accumulator_dtype, full_precision
from entangle.ranks import Ranks
from entangle.recording.hooks import Habits, SeenTensor, forward, joined, look_at, observe
from entangle.texts.calibration_set import CalibrationSet

_TOKENS = 64
_TF32 = 2.0**-10
_SUMS = 32  # roundings of float32, at most, in a sum of products
_SIGMAS = 8.0  # a sum with random signs is further off once in 10^13 tokens
_CHUNK = 4096


def is_affine(
    layer: Layer,
    inputs: Float[Tensor, "tokens in_features"],
    outputs: Float[Tensor, "tokens out_features"],
) -> bool:
    """Tell whether a layer's outputs are its weight times its inputs, plus its bias.

    Compared on 64 tokens, spread evenly, for every neuron: the root mean square of the difference
    may be what rounding makes of outputs and products in their dtype.

    Parameters
    ----------
    layer
        The layer; weights that are offloaded cannot be read, and give False.
    inputs, outputs
        What it received and gave.
    """
    if layer.offloaded:
        return False
    weight, bias = layer.weight.to(outputs.device), layer.bias
    if weight.shape != (outputs.shape[1], inputs.shape[1]):
        return False
    place = torch.linspace(0, len(inputs) - 1, min(_TOKENS, len(inputs)), device=inputs.device)
    x, y = inputs[place.long()].float(), outputs[place.long()].float()
    w = weight.float()
    b = torch.zeros(len(w), device=w.device) if bias is None else bias.to(w.device).float()
    with full_precision(), torch.no_grad():
        expected = x @ w.T + b
        products = _lengths(x, w, b)
    bound = torch.finfo(outputs.dtype).max * 0.9
    both = (expected.abs() < bound) | y.isfinite()  # 16-bit outputs overflow where these do not
    both &= ~(expected.isnan() & y.isnan())
    off = (y - expected).masked_fill(~both, 0.0)
    allowed = _eps(outputs) * _rms(expected, both) + 2 * _product_eps(outputs) * _rms(
        products, both
    )
    return bool((_rms(off, both) <= allowed + torch.finfo(torch.float32).tiny).all())


class TokenCheck:
    """Compares a layer's outputs with its weight on every token, at the cost of two columns.

    The differences of a token's outputs are added up with random signs (Freivalds, 1977): the sum
    is ``y·r - x·(Wᵀr) - b·r``, and within 8 standard deviations of what rounding can make of it
    where every output is right. One output that is further off by as much is seen on any token,
    with float32 by 6·10⁻⁵ of the length of all the token's outputs, with bfloat16 by 0.2.

    Parameters
    ----------
    layer
        The layer, whose weight is read once, now.
    """

    def __init__(self, layer: Layer) -> None:
        with full_precision(), torch.no_grad():
            weight = layer.weight.float()
            signs = torch.randint(2, weight.shape[:1], generator=torch.Generator().manual_seed(0))
            self._signs = (2.0 * signs - 1.0).to(weight.device)
            self._summed = self._signs @ weight
            double = accumulator_dtype(weight.device)  # in which no square underflows
            bias = torch.zeros_like(self._signs) if layer.bias is None else layer.bias.float()
            self._shift = bias.to(weight.device) @ self._signs
            self._columns = torch.linalg.vector_norm(weight, dim=0, dtype=double).float()
            self._offset = torch.linalg.vector_norm(bias, dtype=double).float().to(weight.device)

    def departs(
        self,
        inputs: Float[Tensor, "tokens in_features"],
        outputs: Float[Tensor, "tokens out_features"],
    ) -> Bool[Tensor, ""]:
        """Tell whether some token's outputs are not weight times input plus bias, on the device.

        Tokens with an output that is not finite are not compared.
        """
        found = torch.zeros((), dtype=torch.bool, device=outputs.device)
        rounding, products = _eps(outputs), 2 * _product_eps(outputs)  # TF32 as it is set here
        signs, summed, columns, shift, offset = (
            one.to(outputs.device)
            for one in (self._signs, self._summed, self._columns, self._shift, self._offset)
        )
        with full_precision(), torch.no_grad():
            for x16, y16 in zip(inputs.split(_CHUNK), outputs.split(_CHUNK), strict=True):
                x, y = x16.float(), y16.float()
                off = (y @ signs - x @ summed - shift).abs()
                lengths = _lengths(x, columns[None], offset[None])[:, 0]
                unit = lengths.amax().clamp_min(torch.finfo(torch.float32).tiny)
                size = torch.linalg.vector_norm(y / unit, dim=1) * unit
                bound = rounding * size + products * lengths
                found |= (off > _SIGMAS * bound + torch.finfo(torch.float32).tiny).any()
        return found


def _lengths(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return about √(Σ (w x)² + b²), scaled so that no square overflows; NaN and infinity as 0."""
    x, w, b = (one.nan_to_num(0.0, 0.0, 0.0) for one in (x, w, b))
    wide, tall = (one.abs().amax().clamp_min(torch.finfo(one.dtype).tiny) for one in (x, w))
    return ((x / wide).square() @ (w / tall).square().T).sqrt() * wide * tall + b.abs()


def _eps(outputs: Tensor) -> float:
    return max(torch.finfo(outputs.dtype).eps, torch.finfo(torch.float32).eps)


def _product_eps(outputs: Tensor) -> float:
    """Return the relative rounding error of a sum of products, of typical size."""
    if outputs.element_size() == 2:
        return _eps(outputs)
    fast = outputs.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return _TF32 if fast else _SUMS * _eps(outputs)


def _rms(values: Tensor, counted: Tensor) -> Tensor:
    """Return each neuron's root mean square over the tokens that are counted."""
    values = values.masked_fill(~counted, 0.0).to(accumulator_dtype(values.device))
    return (values.square().sum(0) / counted.sum(0).clamp_min(1)).sqrt()


_LOG = logging.getLogger(__name__)

Batch = tuple[int, Tensor]
"""The group that all sequences of a batch belong to, and their ids (sequences, tokens)."""


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
    depths: int = 0
    """How often all tokens of the pass have been seen."""


@dataclass(eq=False)
class _Pass:
    """One pass over tokens."""

    shape: tuple[int, int]
    group: int
    longest: bool
    """Whether its sequences are longer than any before."""
    stops: bool = False
    """Whether to stop when all tokens have passed all layers."""
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
    habits
        From `look_at`, where a part of a model runs.
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
    ) -> None:
        self.layers, self._take = tuple(layers), take
        self._once, self._need, self._lenient = once, affine, lenient
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
        self._longest = 0
        self._last: tuple[str, list[SeenTensor]] | None = None
        self._pass: _Pass | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the ``with`` block."""
        with observe(self.layers, self._note):
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
        now = self._pass = _Pass((n_seq, length), group, length > self._longest, stops)
        self._longest = max(self._longest, length)
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

    def run(self, module: nn.Module, batches: Iterable[Batch], *, whole: bool = True) -> None:
        """Run a model over batches of token ids.

        Each pass stops when all tokens have passed the layers that are watched, where a look at the
        model says that each runs once on every token.

        Parameters
        ----------
        module
            The model.
        batches
            (group, ids of shape (sequences, tokens)): all of the text's tokens, no pads.
        whole
            Check that all layers saw tokens; where the batches, or the layers, are a part of those
            that other ranks have too, who puts the parts together does (`join`).

        Raises
        ------
        InvalidInput
            If a layer sees no token, or rows that are not the text's tokens.
        """
        all_logits = any(layer.block is None for layer in self.layers)
        begun, stops = False, False
        for group, ids in batches:
            if not begun:
                self._habits = look_at(module, self.layers, ids)
                once = all(habit.depths == 1 for habit in self._habits.values())
                begun, stops = True, once and not _is_dispatched(module)
            with self.watching(), self.one_pass(tuple(ids.shape), group, stops=stops):
                forward(module, ids, all_logits=all_logits)
        if whole:
            self.check_all_seen()

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
            gathered = now.gathered[layer.name]
            if layer.name in self.left_out or not gathered.pieces:
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


def of_one_group(calibration: CalibrationSet) -> Iterator[Batch]:
    """Yield a calibration set's batches, all of group 0."""
    return ((0, ids) for _, ids in calibration.batches())


def told(batches: Iterable[Batch], report: Callable[[int], None]) -> Iterator[Batch]:
    """Pass batches on, and report the number of sequences of each when it is done with."""
    for batch in batches:
        yield batch
        report(batch[1].shape[0])


def _same(before: Sequence[SeenTensor], after: Sequence[SeenTensor]) -> bool:
    """Tell whether two layers ran on the same pieces."""
    return len(before) == len(after) and all(
        a.same_as(b.tensor) and a.version == b.version for a, b in zip(before, after, strict=True)
    )


def _is_dispatched(module: nn.Module) -> bool:
    """Tell whether accelerate moves weights around a pass, which must then run to its end."""
    places = getattr(module, "hf_device_map", None)
    return isinstance(places, dict) and bool({"cpu", "disk"} & {str(p) for p in places.values()})


def shared_inputs(
    module: nn.Module, layers: Sequence[Layer], ids: Int[Tensor, "sequences tokens"]
) -> list[list[Layer]]:
    """Return groups of layers that read one input, found by one forward pass.

    Parameters
    ----------
    module
        The model.
    layers
        Layers to sort; those that see none of the tokens are in no group.
    ids
        Token ids; a few are enough.
    """
    recorder = Recorder(layers, lambda _found: None, compared=False, lenient=True)
    recorder.run(module, [(0, ids)])
    return recorder.sources
