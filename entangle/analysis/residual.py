"""Which layers write to the residual stream, and how much each of its dimensions varies."""

from contextlib import closing

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.calibration import Source, as_calibration
from entangle.expansion.build import HiddenStates
from entangle.memory import memory_for
from entangle.models.blocks import BlockRunner
from entangle.models.evaluating import evaluates
from entangle.models.layers import Layer, list_layers
from entangle.models.loading import AnyModel, as_language_model
from entangle.progress import ProgressBar
from entangle.recording.hooks import edit
from entangle.seeding import torch_rng

_PROBE = 4, 16  # sequences and tokens
_AGREEMENT = 0.55  # share of equal signs, which is ½ ± 0.01 by chance at 2,048 values


@evaluates
def residual_variance(
    model: AnyModel,
    calibration: Source,
    *,
    seed: int = 0,
    memory: int | None = None,
    progress: bool | None = None,
) -> dict[str, Float[Tensor, " _"]]:
    """Measure how much every dimension of the residual stream varies after each block.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a causal language model, or a
        `LanguageModel`.
        It is run block by block (`entangle.models.blocks`).
    calibration
        As in `entangle.score`; all tokens count, first ones of a sequence too.
    seed
        Of the noise that finds the layers (`residual_writers`).
    memory
        Bytes of hidden states in memory, half of what is free by default; what is beyond spills
        (`entangle.recording.stream.TokenStore`).
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Returns
    -------
    dict
        By the name of each layer whose rows are dimensions of the residual stream, in module order:
        population variance over tokens of what leaves the layer's block, float64 of shape
        (dimensions,), on the CPU. Layers of a block share the tensor.
    """
    dense = as_language_model(model)
    calibration = as_calibration(calibration, dense)
    budget = memory_for(memory, dense.module)
    runner = BlockRunner(dense.module)
    writers = residual_writers(dense, next(calibration.batches(_PROBE[0]))[1], seed=seed)
    found: dict[int, Tensor] = {}
    batches = [ids for _, ids in calibration.batches()]
    with (
        ProgressBar("residual stream", enabled=progress) as bar,
        closing(HiddenStates(batches, memory=budget)) as states,
    ):
        bar.start(runner.n_blocks, "blocks")
        states.enter(runner)
        for block in range(runner.n_blocks):
            states.advance(runner, block)
            found[block] = _variance(states)
            bar.advance()
    return {layer.name: found[layer.block] for layer in writers if layer.block is not None}


@evaluates
def residual_writers(
    model: AnyModel, ids: Int64[Tensor, "sequences tokens"], *, seed: int = 0
) -> list[Layer]:
    """Find the layers whose outputs are added to the residual stream, row by dimension.

    Noise is added to a layer's outputs, and the signs of what it does to the output of the layer's
    block are compared with its own, dimension by dimension. They agree more often than not where
    the output is added (after a norm, if need be), and half of the time elsewhere. No names are
    looked at.

    Parameters
    ----------
    model
        As in `residual_variance`.
    ids
        Token ids, of which the first 16 of the first 4 sequences are run.
    seed
        Of the noise.

    Returns
    -------
    list of Layer
        In module order.
    """
    dense = as_language_model(model)
    runner = BlockRunner(dense.module)
    probe = ids[: _PROBE[0], : _PROBE[1]]
    hidden, inputs = runner.enter(probe)
    layers = [x for x in list_layers(dense.module) if x.out_features == hidden.shape[-1]]
    rng, writers = torch_rng(seed, "residual writers"), []
    noise = torch.randn(hidden.shape, generator=rng).to(hidden)
    for block in range(runner.n_blocks):
        after = runner.run(block, hidden, inputs)
        for layer in layers:
            if layer.block == block:
                with edit([(layer, lambda y: y + y.square().mean().sqrt() * noise.view_as(y))]):
                    moved = runner.run(block, hidden, inputs) - after
                signs = (moved.sign() * noise.sign())[moved != 0]
                if signs.numel() and float((signs > 0).float().mean()) > _AGREEMENT:
                    writers.append(layer)
        hidden = after
    order = [layer.name for layer in layers]
    return sorted(writers, key=lambda layer: order.index(layer.name))


def _variance(states: HiddenStates) -> Float[Tensor, " _"]:
    """Return the population variance of every dimension over all tokens, summed in float64."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for _, hidden in states:
        rows = hidden.flatten(0, -2).cpu().double()
        count += len(rows)
        total, squares = total + rows.sum(0), squares + rows.square().sum(0)
    return squares / count - (total / count).square()
