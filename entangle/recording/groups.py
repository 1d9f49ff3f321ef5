"""Which layers read one input, such as gate and up."""

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor, nn

from entangle.models.layers import Layer
from entangle.recording.hooks import SeenTensor, forward, observe


class InputGroups:
    """Sorts layers into groups that read one input, as they run.

    A layer joins the group of the layer that ran just before it, if both saw the same tensor the
    first time.
    """

    def __init__(self) -> None:
        self.members: list[list[Layer]] = []
        """Layers of every group, in the order in which they first ran."""
        self._group_of: dict[str, int] = {}
        self._last: tuple[str, SeenTensor] | None = None

    def see(self, layer: Layer, inputs: Tensor) -> int:
        """Take note of a run of a layer, and return the index of its group."""
        if layer.name not in self._group_of:
            if self._last is not None and self._last[1].same_as(inputs):
                self._group_of[layer.name] = self._group_of[self._last[0]]
                self.members[self._group_of[layer.name]].append(layer)
            else:
                self._group_of[layer.name] = len(self.members)
                self.members.append([layer])
        self._last = layer.name, SeenTensor.of(inputs)
        return self._group_of[layer.name]


def shared_inputs(
    module: nn.Module, layers: Sequence[Layer], ids: Int[Tensor, "sequences tokens"]
) -> list[list[Layer]]:
    """Return groups of layers that read one input, found by one forward pass.

    Parameters
    ----------
    module
        The model.
    layers
        Layers to sort; those that do not run are in no group.
    ids
        Token ids; a few are enough.
    """
    groups = InputGroups()
    with observe(layers, lambda layer, inputs, _outputs: _ignore(groups.see(layer, inputs))):
        forward(module, ids)
    return groups.members


def _ignore(_value: object) -> None:
    return None
