"""Record the inputs of layers during one pass over the text, those that several read once."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Int
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.layers import Layer
from entangle.models.mixtures import ExpertLinear
from entangle.models.streaming import rehearsing
from entangle.recording.recorder import Recorded, Recorder, of_one_group, told
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.texts.calibration_set import CalibrationSet

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
    what: str = "decomposition",
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
    what
        What needs the weights to be what the layers multiply by.

    Raises
    ------
    InvalidInput
        If a layer does not run exactly once on every token, or does not multiply by its weight. An
        expert runs on some of them; which, is `TokenStore.at`.
    """
    budget, stores = ByteBudget(memory), dict[int, TokenStore]()
    places: dict[int, list[Tensor]] = defaultdict(list)

    def keep(found: Recorded) -> None:
        if found.source not in stores:
            stores[found.source] = stack.enter_context(TokenStore(budget))
        if found.leads:
            stores[found.source].append(found.inputs)
            places[found.source] += [] if found.at is None else [found.at.cpu()]

    recorder = Recorder(layers, keep, once=True, affine=what)
    recorder.run(module, told(of_one_group(calibration), report))
    recorder.check_sources()
    for source, own in places.items():
        stores[source].at = torch.cat(own) if own else None
    experts = {layer.name for layer in layers if isinstance(layer.module, ExpertLinear)}
    for name, count in recorder.tokens.items():
        if count != calibration.n_tokens and name not in experts:
            raise InvalidInput(
                f"layer {name!r} ran on {count} tokens where the text has {calibration.n_tokens}; "
                "choose layers that run once on every token."
            )
    return [(tuple(own), stores[source]) for source, own in enumerate(recorder.sources)]


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
    with rehearsing(module):
        recorder.run(module, [(0, ids)])
    return recorder.sources
