"""A model pruned block by block with DSnoT after each layer's pruner."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from entangle.models.blocks import BlockInputs, BlockRunner, evaluates
from entangle.models.layers import Layer, LayerSpec, Projections, find_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.pruning import prune
from entangle.pruning.dsnot import InputStatistics, dsnot
from entangle.recording.hooks import observe
from entangle.recording.recorder import of_one_group
from entangle.texts.calibration import as_calibration
from entangle.texts.given import Source


@evaluates
def prune_dsnot(
    model: AnyModel,
    calibration: Source,
    *,
    pruner: str = "wanda",
    sparsity: float = 0.6,
    layers: LayerSpec = "all",
    proj: Projections = "mlp",
    keep_sign: bool = False,
    seed: int = 0,
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
        Share of zeros in every row.
    layers, proj
        Layers to prune, as in `entangle.prune`.
    keep_sign
        As in `entangle.pruning.dsnot.dsnot`.
    seed
        Of a pruner that draws.

    Returns
    -------
    LanguageModel
        The pruned copy.
    """
    dense = as_language_model(model)
    found = replace(dense, module=copy.deepcopy(dense.module))
    chosen = find_layers(found.module, layers, proj)
    for layer in chosen:
        layer.check_writable("pruning")
    text = as_calibration(calibration, found)
    runner = BlockRunner(found.module)
    entered = [runner.enter(ids) for _, ids in of_one_group(text)]
    states, inputs = [h for h, _ in entered], [i for _, i in entered]
    for index in range(runner.n_blocks):
        own = [layer for layer in chosen if layer.block == index]
        grams, statistics = _watched(runner, index, own, states, inputs)
        for layer in own:
            weight = layer.weight.clone()
            gram = grams[layer.name].to(torch.float32)
            made = prune(weight, gram, method=pruner, sparsity=sparsity, seed=seed, loss=False)
            final = dsnot(weight, made.weight, statistics[layer.name], keep_sign=keep_sign)
            with torch.no_grad():
                layer.weight.copy_(final)
        states = [runner.run(index, h, i) for h, i in zip(states, inputs, strict=True)]
    return found


def _watched(
    runner: BlockRunner,
    index: int,
    layers: list[Layer],
    states: list[Tensor],
    inputs: list[BlockInputs],
) -> tuple[dict[str, Tensor], dict[str, InputStatistics]]:
    """Return grams and statistics of the inputs of a block's layers."""
    grams: dict[str, Tensor] = {}
    found = {x.name: InputStatistics.empty(x.in_features, x.device) for x in layers}
    shape: list[torch.Size] = []

    def take(layer: Layer, x: Tensor, _outputs: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        gram = (rows.T @ rows).double()
        grams[layer.name] = grams[layer.name] + gram if layer.name in grams else gram
        found[layer.name].update(x.reshape(*shape[-1], -1))

    with observe(layers, take):
        for hidden, one in zip(states, inputs, strict=True):
            shape.append(hidden.shape[:2])
            runner.run(index, hidden, one)
    return grams, found
