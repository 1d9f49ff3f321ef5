"""What a model loses when a single neuron is changed, for many neurons one after the other."""

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

from entangle.ablation.arms import INTERVENTIONS, PRUNERS
from entangle.ablation.interventions import RowEdit, edited_outputs, pruned_rows, swapped_rows
from entangle.ablation.routed_rows import RowIndices, chosen_rows
from entangle.ablation.selection import Selection
from entangle.calibration import Source
from entangle.checks import choice, finite, share
from entangle.evaluation import EvaluationText, as_evaluation
from entangle.evaluation.forward import as_causal_model
from entangle.evaluation.perplexity import window_memory, windows_in_a_pass
from entangle.expansion.build import HiddenStates
from entangle.memory import memory_for
from entangle.models.blocks import BlockRunner
from entangle.models.evaluating import evaluates
from entangle.models.layers import Layer
from entangle.models.loading import AnyModel, LanguageModel
from entangle.progress import Progress, ProgressBar
from entangle.seeding import check_seed
from entangle.stats.gram import GramResult
from entangle.stats.intervals import Interval, window_difference_interval

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
        (`entangle.ablation.statistics.layer_statistics`).
    means
        Mean outputs by layer name, for ``mean`` (`entangle.ablation.mean_outputs` of the scores).
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
                        logits = runner.leave(end, ids)
                    found[layer.name, neuron].append(text.losses(logits, ids))
                    bar.advance()
            states.advance(runner, block)
        for ids, hidden in states:
            logits = runner.leave(hidden.to(model.device), ids)
            found[_DENSE].append(text.losses(logits, ids))
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
