"""A model pruned block by block with DSnoT after each layer's pruner."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.memory import memory_for
from entangle.models.blocks import BlockRunner, evaluates
from entangle.models.layers import Layer, LayerSpec, Projections, find_layers, refuse_experts
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.models.streaming import comes_by_blocks
from entangle.pruning import PRUNERS, prune
from entangle.pruning.dsnot import InputStatistics, dsnot
from entangle.pruning.masks import parse_pattern
from entangle.recording.hooks import Habits, look_at
from entangle.recording.recorder import Recorded, Recorder, of_one_group
from entangle.recording.states import HiddenStates
from entangle.texts.calibration import as_calibration
from entangle.texts.given import Source


@evaluates
def prune_dsnot(
    model: AnyModel,
    calibration: Source,
    *,
    pruner: str = "wanda",
    sparsity: float | None = None,
    pattern: str = "row",
    layers: LayerSpec = "all",
    proj: Projections = "mlp",
    keep_sign: bool = False,
    seed: int = 0,
    memory: int | None = None,
) -> LanguageModel:
    """Prune a copy of a model: each block on what the pruned ones before it give, then DSnoT.

    Parameters
    ----------
    model
        Dense; left unchanged.
    calibration
        Text that layers are pruned on.
    pruner
        Of `entangle.pruning.PRUNERS`.
    sparsity
        Share of zeros in every row, 0.6 by default; with ``pattern`` n:m that says it.
    pattern
        As in `entangle.pruning.prune`; of n:m, zeros are swapped within their groups of m.
    layers, proj
        Layers to prune, as in `entangle.prune`.
    keep_sign
        As in `entangle.pruning.dsnot.dsnot`.
    seed
        Of a pruner that draws.
    memory
        Bytes of hidden states, as in `entangle.prune`.

    Returns
    -------
    LanguageModel
        The pruned copy.
    """
    dense, parsed = as_language_model(model), parse_pattern(pattern)
    if sparsity is None and parsed.kind != "n:m":
        sparsity = 0.6
    choice("pruner", pruner, PRUNERS)
    if comes_by_blocks(dense.module):
        raise InvalidInput(
            "DSnoT needs the model's weights in memory; this one's come block by block: load it "
            "with --no-stream (stream=False)."
        )
    found = replace(dense, module=copy.deepcopy(dense.module))
    chosen = find_layers(found.module, layers, proj)
    refuse_experts(chosen, "DSnoT")
    for layer in chosen:
        layer.check_writable("pruning")
    batches = [ids for _, ids in of_one_group(as_calibration(calibration, found))]
    runner = BlockRunner(found.module)
    habits = look_at(found.module, chosen, batches[0])
    bytes_of = memory_for(memory, found.module)
    with closing(HiddenStates(batches, memory=bytes_of)) as states:
        states.enter(runner)
        for index in range(runner.n_blocks):
            own = [layer for layer in chosen if layer.block == index]
            seen = _Watched(own, habits)
            for ids, hidden in states.passes() if own else ():
                seen.run(runner, index, ids, hidden)
            for layer in own:
                weight, gram = layer.weight.clone(), seen.grams[layer.name].float()
                made = prune(
                    weight, gram, method=pruner, sparsity=sparsity, pattern=pattern, seed=seed,
                    loss=False,
                )  # fmt: skip
                swapped = dsnot(
                    weight, made.weight, seen.found[layer.name], keep_sign=keep_sign,
                    group=parsed.group if parsed.kind == "n:m" else None,
                )  # fmt: skip
                with torch.no_grad():
                    layer.weight.copy_(swapped)
            states.advance(runner, index)
    return found


class _Watched:
    """Grams and statistics of the inputs of a block's layers."""

    def __init__(self, layers: Sequence[Layer], habits: Mapping[str, Habits]) -> None:
        self.grams: dict[str, Tensor] = {}
        self.found = {x.name: InputStatistics.empty(x.in_features, x.device) for x in layers}
        self._recorder = Recorder(layers, self._take, once=True, affine="pruning", habits=habits)
        self._shape: tuple[int, ...] = ()

    def run(self, runner: BlockRunner, index: int, ids: Tensor, hidden: Tensor) -> None:
        """Run the block on a pass and count what its layers read."""
        self._shape = tuple(ids.shape)
        with self._recorder.watching(), self._recorder.one_pass(self._shape):
            runner.run(index, hidden, runner.enter(ids)[1])

    def _take(self, seen: Recorded) -> None:
        name, rows = seen.layer.name, seen.inputs.float()
        gram = (rows.T @ rows).double()
        self.grams[name] = self.grams[name] + gram if name in self.grams else gram
        self.found[name].update(rows.unflatten(0, self._shape))
