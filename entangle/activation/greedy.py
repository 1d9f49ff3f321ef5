"""Levels of the layers of every block, found greedily by the error of the block's output (TEAL)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from entangle.activation.methods import (
    ACTIVATION_METHODS,
    InputMethod,
    Levels,
    Teal,
    Wina,
)
from entangle.activation.sparsity import ActivationSparsity
from entangle.models.blocks import BlockInputs, BlockRunner
from entangle.models.layers import Layer
from entangle.recording.recorder import of_one_group

STEP, MOST = 0.05, 0.9
"""What a layer of the size of the first gains a step; the mean level of a block to stop at."""
LAST = 0.25
"""Share of a sequence's tokens, the last ones, whose error counts."""
_SEQUENCES = 10


@dataclass(frozen=True)
class BlockPath:
    """What a block's search went through."""

    levels: tuple[Mapping[str, float], ...]
    """Of every step, a level for each layer by name; all 0 first."""
    means: tuple[float, ...]
    """Their means, weighted by the sizes of the layers."""
    errors: tuple[float, ...]
    """Error of the block's output: the mean over sequences and features of the 2-norm over tokens
    of the difference to the dense output."""

    def nearest(self, level: float) -> Mapping[str, float]:
        """Return the levels of the step whose mean is nearest."""
        place = min(range(len(self.means)), key=lambda i: abs(self.means[i] - level))
        return self.levels[place]


@dataclass(frozen=True, eq=False)
class _Block:
    """A block and its dense inputs and outputs on some sequences."""

    index: int
    layers: Sequence[Layer]
    runner: BlockRunner
    hidden: Sequence[Tensor]
    inputs: Sequence[BlockInputs]
    outputs: Sequence[Tensor]

    def error(self, made: ActivationSparsity) -> float:
        """Return the error of the block's output under rules for its layers."""
        names = {layer.name for layer in self.layers}
        own = replace(
            made,
            inputs={n: r for n, r in made.inputs.items() if n in names},
            rest={n: r for n, r in made.rest.items() if n in names},
        )
        total, count = 0.0, 0
        with own.applied():
            for states, inputs, dense in zip(self.hidden, self.inputs, self.outputs, strict=True):
                own.window.shape = tuple(states.shape[:2])
                wrong = self.runner.run(self.index, states, inputs).float() - dense.float()
                late = wrong[:, int((1 - LAST) * wrong.shape[1]) :]
                norms: Float[Tensor, "sequences features"] = late.norm(dim=1)
                total, count = total + float(norms.double().sum()), count + norms.numel()
        return total / count


def search_levels(
    method: InputMethod, *, step: float = STEP, most: float = MOST, sequences: int = _SEQUENCES
) -> dict[int, BlockPath]:
    """Search the levels of all blocks, each on the dense model's hidden states.

    In every step each layer of a block is tried with a level higher by ``step`` over its size (of
    the block's first layer), and the one that makes the smallest error is taken.

    Parameters
    ----------
    method
        Fitted; its rules at levels of one's own are tried.
    step, most
        As `STEP` and `MOST`.
    sequences
        Of the calibration text, the first ones.

    Returns
    -------
    dict
        Path of every block that has layers in scope, by its index.

    References
    ----------
    arXiv 2408.14690, section 4.3; github.com/FasterDecoding/TEAL ``teal/greedyopt.py``.
    """
    subject = method.subject
    runner = BlockRunner(subject.module)
    ids: list[Tensor] = []
    for _, batch in of_one_group(subject.calibration):
        ids.append(batch[: sequences - sum(map(len, ids))])
        if sum(map(len, ids)) >= sequences:
            break
    entered = [runner.enter(one) for one in ids]
    hidden, inputs = [h for h, _ in entered], [i for _, i in entered]
    found = {}
    for index in range(runner.n_blocks):
        outputs = [runner.run(index, h, i) for h, i in zip(hidden, inputs, strict=True)]
        layers = [layer for layer in subject.layers if layer.block == index]
        block = _Block(index, layers, runner, hidden, inputs, outputs)
        if layers:
            found[index] = _search(method, block, step=step, most=most)
        hidden = outputs
    return found


def _search(method: InputMethod, block: _Block, *, step: float, most: float) -> BlockPath:
    sizes = {layer.name: layer.weight.numel() for layer in block.layers}
    first = next(iter(sizes.values()))
    levels = dict.fromkeys(sizes, 0.0)
    path, means, errors = [dict(levels)], [0.0], [0.0]
    while means[-1] < most:
        tried = []
        for name, size in sizes.items():
            if levels[name] < 1:
                higher = min(1.0, levels[name] + step * first / size)
                made = method.plain_at({**levels, name: higher})
                tried.append((block.error(made), name, higher))
        error, name, level = min(tried)
        levels[name] = level
        path.append(dict(levels))
        errors.append(error)
        means.append(sum(levels[n] * size for n, size in sizes.items()) / sum(sizes.values()))
    return BlockPath(tuple(path), tuple(means), tuple(errors))


class _Searched(InputMethod):
    """A method whose levels are searched, block by block, when it is fitted."""

    step: float = STEP

    def fit(self) -> None:
        """Fit the method, and search."""
        super().fit()
        self.paths = search_levels(self, step=self.step)

    def at(self, level: Levels) -> ActivationSparsity:
        """Return the rules at the searched levels that are nearest, the same for all blocks."""
        if isinstance(level, Mapping):
            return self.plain_at(level)
        chosen: dict[str, Any] = {}
        for path in self.paths.values():
            chosen |= path.nearest(level)
        return replace(self.plain_at(chosen), level=float(level))


class TealGreedy(_Searched, Teal):
    """TEAL with levels that its greedy search finds for every block's layers."""

    routes = False
    name, source = "teal-greedy", "arXiv 2408.14690, section 4.3; github.com/FasterDecoding/TEAL"


class WinaGreedy(_Searched, Wina):
    """WINA with levels of TEAL's search, as published."""

    name, source = "wina-greedy", "arXiv 2505.19427; github.com/microsoft/wina"
    step = 0.025


for _one in (TealGreedy, WinaGreedy):
    ACTIVATION_METHODS.own(_one.name, _one, source=_one.source)
__all__ = ["BlockPath", "TealGreedy", "WinaGreedy", "search_levels"]
