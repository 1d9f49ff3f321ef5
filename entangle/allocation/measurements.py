"""What rules measure on a model: each quantity once, in one pass over the calibration set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.allocation.allocation import Reals
from entangle.errors import InvalidInput, NumericalError
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.precision import accumulator_dtype
from entangle.recording.groups import shared_inputs
from entangle.recording.recorder import Batch, Recorded, Recorder
from entangle.runs.progress import Progress
from entangle.stats.gram import Gram, GramResult
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source

_PROBE_TOKENS = 4

Shared = tuple[tuple[Layer, ...], GramResult]
"""Layers that share an input, and its ``XᵀX``."""


class Measurements:
    """Quantities of some layers of a model over a calibration set, measured when first asked for.

    Parameters
    ----------
    model
        Left unchanged.
    layers
        Layers to measure.
    calibration
        Text to measure on, as in `entangle.score`; None for quantities of the weights alone.
    memory
        Bytes of Gram matrices held at a time. Where all layers' fit they are kept, so that the text
        is read once for all rules and candidates; where they do not, several passes are made every
        time, each over the layers that do.
    progress
        Told of every sequence.
    """

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[Layer],
        calibration: Source | None,
        *,
        memory: int,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.layers, self.memory = model, tuple(layers), memory
        self._calibration = None if calibration is None else as_calibration(calibration, model)
        self.progress = Progress() if progress is None else progress
        self.names = tuple(layer.name for layer in self.layers)
        """Full names of the layers."""
        self._kept: dict[object, Reals] = {}
        self._grams: list[Shared] | None = None

    @property
    def calibration(self) -> CalibrationSet:
        """The calibration set; `InvalidInput` without one."""
        if self._calibration is None:
            raise InvalidInput("this rule needs a calibration set: give `calibration`.")
        return self._calibration

    @property
    def described(self) -> dict[str, object] | None:
        """What a manifest says about the calibration set; None without one."""
        return None if self._calibration is None else self._calibration.describe()

    @cached_property
    def groups(self) -> tuple[tuple[Layer, ...], ...]:
        """Layers that read the same input, together, in the order in which they run."""
        probe = self.calibration.rows.sequence(0)[None, :_PROBE_TOKENS]
        groups = shared_inputs(self.model.module, self.layers, probe)
        ran = {layer.name for group in groups for layer in group}
        for name in self.names:
            if name not in ran:
                raise InvalidInput(f"layer {name!r} sees no token in a forward pass; leave it out.")
        return tuple(map(tuple, groups))

    def grams(self) -> Iterator[Shared]:
        """Yield layers that share an input, and its ``XᵀX`` in float32 on the layers' device.

        Raises
        ------
        NumericalError
            If an input is not finite; the message names the layer.
        """
        parts = list(self._parts())
        if len(parts) > 1:
            for part in parts:
                yield from self._grams_of(part)
            return
        if self._grams is None:
            self._grams = list(self._grams_of(parts[0]))
        yield from self._grams

    def _grams_of(self, part: Sequence[tuple[Layer, ...]]) -> Iterator[Shared]:
        """Make one pass over the calibration set for some of the inputs."""
        grams = {
            group[0].name: Gram(group[0].in_features, device=group[0].device, dtype=torch.float32)
            for group in part
        }
        self._pass([group[0] for group in part], lambda name, rows: grams[name].update(rows))
        for group in part:
            yield group, grams.pop(group[0].name).result()

    def _parts(self) -> Iterator[list[tuple[Layer, ...]]]:
        """Cut the inputs into runs whose Gram matrices fit into the memory."""
        part: list[tuple[Layer, ...]] = []
        left = self.memory
        for group in self.groups:
            needed = 4 * group[0].in_features ** 2
            if part and needed > left:
                yield part
                part, left = [], self.memory
            part.append(group)
            left -= needed
        yield part

    def _pass(self, layers: Sequence[Layer], update: Callable[[str, Tensor], None]) -> None:
        def take(seen: Recorded) -> None:
            try:
                update(seen.layer.name, seen.inputs)
            except NumericalError as error:
                raise NumericalError(f"{seen.layer.name}: {error}") from error

        Recorder(layers, take, affine="pruning").run(self.model.module, self._batches())

    def _batches(self) -> Iterator[Batch]:
        self.progress.start(self.calibration.n_seq, "sequences")
        for _, ids in self.calibration.batches():
            yield 0, ids
            self.progress.advance(len(ids))

    @cached_property
    def input_norms(self) -> Mapping[str, Float[Tensor, " _"]]:
        """Norm ``‖X_j‖₂`` of each input over the calibration tokens, by layer name, float64.

        float32 where the device has no float64.
        """
        sums: dict[str, Tensor] = {}

        def add(name: str, rows: Tensor) -> None:
            square = square_sum(rows)
            sums[name] = sums[name] + square if name in sums else square

        self._pass([group[0] for group in self.groups], add)
        return {layer.name: sums[group[0].name].sqrt() for group in self.groups for layer in group}

    def once(self, key: object, measure: Callable[[], Reals]) -> Reals:
        """Return what was measured under this key before, or measure it."""
        if key not in self._kept:
            self._kept[key] = measure()
        return self._kept[key]


def square_sum(rows: Float[Tensor, "tokens features"]) -> Float[Tensor, " features"]:
    """Return the sum of squares over tokens, in float64 where the device has it."""
    return rows.float().square().sum(0, dtype=accumulator_dtype(rows.device))
