"""Record the inputs of layers during one pass over the text."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput
from entangle.models.layers import Layer
from entangle.recording.hooks import Batch, SeenTensor, run_observed
from entangle.recording.stream import ByteBudget, TokenStore

Group = tuple[tuple[Layer, ...], TokenStore]
"""Layers that read one input, and that input, (tokens, in_features)."""


def record_groups(
    module: nn.Module,
    layers: Sequence[Layer],
    calibration: CalibrationSet,
    *,
    memory: int,
    stack: ExitStack,
    report: Callable[[int], None],
) -> list[Group]:
    """Run the model once, up to the last of the layers, and record what they receive.

    Parameters
    ----------
    module, calibration
        The model and the token ids.
    layers
        Layers to watch; those that run one after the other on one input, such as gate and up, share
        a record.
    memory
        Bytes for the records; what is beyond goes to a temporary file.
    stack
        Closes the records when it is closed.
    report
        Called with the number of sequences that have passed.

    Raises
    ------
    InvalidInput
        If a layer does not run exactly once on every token.
    """
    recorder = _Recorder(ByteBudget(memory), stack)
    run_observed(module, layers, _told(calibration, report), recorder)
    for name, owner in recorder.owner.items():
        count = recorder.seen[name]
        if count != calibration.n_tokens or recorder.stores[owner].n_tokens != count:
            raise InvalidInput(
                f"layer {name!r} ran on {count} tokens where the text has {calibration.n_tokens}; "
                "choose layers that run once on every token."
            )
    return [(tuple(own), recorder.stores[name]) for name, own in recorder.members.items()]


class _Recorder:
    """Keeps the inputs of layers; a layer with the input of the one before it shares its record."""

    def __init__(self, budget: ByteBudget, stack: ExitStack) -> None:
        self._budget, self._stack = budget, stack
        self._last: tuple[str, SeenTensor] | None = None
        self.owner: dict[str, str] = {}
        """The layer whose record a layer shares, by name; itself if it has one."""
        self.members: dict[str, list[Layer]] = {}
        self.stores: dict[str, TokenStore] = {}
        self.seen: Counter[str] = Counter()

    def __call__(self, _group: int, layer: Layer, inputs: Tensor, _outputs: Tensor) -> None:
        name, rows, last = layer.name, inputs.flatten(0, -2), self._last
        if name not in self.owner:
            shared = last is not None and last[1].same_as(inputs)
            self.owner[name] = self.owner[last[0]] if last is not None and shared else name
            self.members.setdefault(self.owner[name], []).append(layer)
        if self.owner[name] == name:
            if name not in self.stores:
                self.stores[name] = self._stack.enter_context(TokenStore(self._budget))
            self.stores[name].append(rows)
        self.seen[name] += rows.shape[0]
        self._last = name, SeenTensor.of(inputs)


def _told(calibration: CalibrationSet, report: Callable[[int], None]) -> Iterator[Batch]:
    """Pass batches on, and report the number of sequences of each when it is done with."""
    for _, ids in calibration.batches():
        yield 0, ids
        report(ids.shape[0])
