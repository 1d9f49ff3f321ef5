"""What a model loses when a single neuron is changed, for many neurons one after the other.

Which layers write to the residual stream, and how much each of its dimensions varies.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.checks import choice, finite, share
from entangle.evaluation import EvaluationText, as_evaluation
from entangle.evaluation.logits import as_causal_model
from entangle.evaluation.perplexity import window_memory, windows_in_a_pass
from entangle.experiments.arms import INTERVENTIONS, PRUNERS
from entangle.experiments.interventions import RowEdit, edited_outputs, pruned_rows, swapped_rows
from entangle.experiments.selection import Selection
from entangle.experts.routed_rows import RowIndices, chosen_rows
from entangle.memory import memory_for
from entangle.models.blocks import BlockRunner, evaluates
from entangle.models.layers import Layer, list_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.models.mixtures import ExpertLinear
from entangle.recording.hooks import edit
from entangle.recording.states import HiddenStates
from entangle.runs.progress import Progress, ProgressBar
from entangle.seeding import check_seed, torch_rng
from entangle.stats.gram import GramResult
from entangle.stats.intervals import Interval, window_difference_interval
from entangle.texts.calibration import as_calibration
from entangle.texts.given import Source

Losses = NDArray[np.float64]
Chosen = tuple[Layer, Int64[Tensor, " _"]]

_DENSE = ("", -1)  # stands for the unchanged model among (layer, neuron)


@dataclass(frozen=True, eq=False)
class _Change:
    """How any single neuron is changed."""

    intervention: str
    strength: float
    means: Mapping[str, Tensor] | None
    """For edits with means."""
    pruned: Mapping[tuple[str, int], Tensor]
    """New weights (1, in_features) by layer name and neuron; empty where outputs are edited."""

    def applied(self, layer: Layer, neuron: int) -> AbstractContextManager[None]:
        """Return a context in which one neuron is changed, and restored after."""
        if self.intervention in PRUNERS:
            weight = self.pruned[layer.name, neuron]
            return swapped_rows([RowEdit(layer, torch.tensor([neuron]), weight)])
        alone = Selection("listed", None, None, {layer.name: np.array([neuron])})
        return edited_outputs(
            [layer], alone, self.intervention, strength=self.strength, means=self.means
        )


@evaluates
def single_neuron_damage(
    model: AnyModel,
    text: Source,
    rows: Mapping[str, RowIndices],
    *,
    intervention: str = "zero",
    strength: float | int = 1.0,
    grams: Mapping[str, GramResult] | None = None,
    means: Mapping[str, Float[Tensor, " _"]] | None = None,
    damping: float = 0.01,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    memory: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Measure how much the mean loss rises when one neuron alone is changed, for many neurons.

    The dense hidden states go through the model once, block by block. A neuron starts from those
    that enter its block, so that this block, later ones and the head run again: half a forward pass
    on average. Losses are bit for bit those of the whole model in batches of the same size, and the
    model is left bit-identical.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a causal language model, or a
        `LanguageModel`.
        It is run block by block (`entangle.models.blocks`).
    text
        From `entangle.load_evaluation`, or what that takes.
    rows
        Indices of neurons by the layer's full dotted name, such as the ``rows`` of a `Selection`.
    intervention
        ``zero``, ``mean``, ``clamp-negative``, ``clamp-positive`` or ``flip-negative`` edit the
        neuron's output; ``prune`` (SparseGPT), ``prune-wanda``, ``prune-magnitude`` and
        ``prune-random`` prune its weights.
    strength
        In [0, 1]: share of the edit that is mixed in, or share of weights that become zero.
    grams
        ``XᵀX`` of the layers' inputs by name, for pruners that need it
        (`entangle.experiments.interventions.layer_statistics`).
    means
        Mean outputs by layer name, for ``mean`` (`entangle.experiments.interventions.mean_outputs`
        of the scores).
    damping
        As in `entangle.pruning.prune`.
    n_boot, seed, level
        Of the intervals; ``seed`` also of random pruning.
    memory
        Bytes of hidden states in memory, half of what is free by default; what is beyond spills
        (`entangle.recording.stream.TokenStore`).
    batch_size
        Windows in one forward pass; by default as `entangle.evaluation.perplexity.perplexity`.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Returns
    -------
    pandas.DataFrame
        One row a neuron, in module order and by index: ``layer``, ``block``, ``projection``,
        ``neuron``, ``intervention``, ``strength``, ``damage`` (mean loss with the neuron changed
        minus that of the dense model, in nats a token) and ``damage_low``, ``damage_high``, its
        interval over windows, the same ones for both (NaN with one window).

    Raises
    ------
    UnknownName, InvalidInput
        If a name, index or setting does not fit, a layer lies outside the blocks, or grams or means
        are missing.
    NumericalError, MemoryLimit
        If a gram cannot be factorised, or memory runs out.
    """
    dense = as_causal_model(model)
    text = as_evaluation(text, dense)
    budget = memory_for(memory, dense.module)
    chosen = chosen_rows(dense.module, rows)
    seed, strength = check_seed(seed), share("strength", strength)
    intervention = choice("intervention", intervention, INTERVENTIONS)
    damping = finite("damping", damping, least=0)
    pruned = _pruned(chosen, grams or {}, intervention, strength, damping, seed)
    change = _Change(intervention, strength, means, pruned)
    per_pass = windows_in_a_pass(batch_size, dense, text)
    with ProgressBar("single neurons", enabled=progress) as bar, window_memory(per_pass):
        losses = _losses(dense, text, per_pass, chosen, change, budget, bar)
    boot = partial(window_difference_interval, n_boot=n_boot, seed=seed, level=level)
    return _table(chosen, change, losses, text, boot)


def _table(
    chosen: Sequence[Chosen],
    change: _Change,
    losses: Mapping[tuple[str, int], Losses],
    text: EvaluationText,
    interval: Callable[..., Interval],
) -> pd.DataFrame:
    counts, rows = text.window_tokens, []
    for layer, neuron in _neurons(chosen):
        gap = interval(losses[layer.name, neuron], losses[_DENSE], counts)
        rows.append(
            {
                "layer": layer.name, "block": layer.block, "projection": layer.projection,
                "neuron": neuron, "intervention": change.intervention, "strength": change.strength,
                "damage": gap.value, "damage_low": gap.low, "damage_high": gap.high,
            }
        )  # fmt: skip
    return pd.DataFrame(rows).astype({"block": "Int64"})


def _losses(
    model: LanguageModel,
    text: EvaluationText,
    per_pass: int,
    chosen: Sequence[Chosen],
    change: _Change,
    memory: int,
    bar: Progress,
) -> dict[tuple[str, int], Losses]:
    """Return the windows' losses of the dense model and with each neuron changed."""
    batches = [ids for _, ids in text.rows.batches(per_pass)]
    runner, found = BlockRunner(model.module), defaultdict[tuple[str, int], list[Tensor]](list)
    bar.start(len(batches) * len(list(_neurons(chosen))), "passes")
    with closing(HiddenStates(batches, memory=memory)) as states:
        states.enter(runner)
        for block in range(runner.n_blocks):
            here = [one for one in _neurons(chosen) if one[0].block == block]
            for ids, hidden in states if here else ():
                inputs, start = runner.enter(ids)[1], hidden.to(model.device)
                for layer, neuron in here:
                    with change.applied(layer, neuron):
                        end = start
                        for later in range(block, runner.n_blocks):
                            end = runner.run(later, end, inputs)
                        parts = runner.leave_in_parts(end, ids)
                        losses = text.losses_in_parts(parts, ids)
                    found[layer.name, neuron].append(losses)
                    bar.advance()
            states.advance(runner, block)
        for ids, hidden in states:
            parts = runner.leave_in_parts(hidden.to(model.device), ids)
            found[_DENSE].append(text.losses_in_parts(parts, ids))
    return {one: torch.cat(parts).numpy() for one, parts in found.items()}


def _neurons(chosen: Sequence[Chosen]) -> Iterator[tuple[Layer, int]]:
    return ((layer, neuron) for layer, index in chosen for neuron in index.tolist())


def _pruned(
    chosen: Sequence[Chosen],
    grams: Mapping[str, GramResult],
    intervention: str,
    strength: float | int,
    damping: float,
    seed: int,
) -> dict[tuple[str, int], Float[Tensor, "1 _"]]:
    """Return the new weights of all neurons, or none where outputs are edited."""
    found = {}
    for layer, index in chosen if intervention in PRUNERS else ():
        gram = grams[layer.name].gram if layer.name in grams else None
        weight = pruned_rows(
            layer, gram, index, strength,
            pruner=PRUNERS[intervention], damping=damping, seed=seed,
        ).weight  # fmt: skip
        for neuron, row in zip(index.tolist(), weight.split(1), strict=True):
            found[layer.name, neuron] = row
    return found


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
    layers = [
        layer for layer in list_layers(dense.module)
        if layer.out_features == hidden.shape[-1] and not isinstance(layer.module, ExpertLinear)
    ]  # fmt: skip
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
