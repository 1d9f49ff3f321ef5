"""Decompose the layers that read one input: every table's part."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from entangle.ablation.row_measures import output_errors
from entangle.ablation.row_solve import RowFit, RowGroup, RowSettings, fit_group, measure_group
from entangle.calibration import CalibrationSet
from entangle.decomposition.chosen import Chosen, choose, score_rows
from entangle.decomposition.components import components_needed, relative_errors
from entangle.decomposition.histograms import CommonBins, histogram_rows
from entangle.decomposition.pairs import draw_all, pair_rows
from entangle.decomposition.router_map import RouterMap
from entangle.decomposition.separated import near_pairs, separated_rows
from entangle.models.layers import Layer
from entangle.modes import TokenText, describe_modes
from entangle.recording.stream import TokenStore

Parts = dict[str, list[pd.DataFrame]]
"""Parts of the tables, by the table's name."""


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be done; the fields are explained at `decompose`."""

    rows: RowSettings
    neurons: Sequence[int] | None
    contexts: int
    pairs: int
    separated: int
    near: float
    memory: int
    """Bytes for outputs and weights that are worked on."""
    most_outputs: int
    """Bytes that the outputs of the neurons looked at closely may take."""


def decompose_group(
    layers: Sequence[Layer],
    inputs: TokenStore,
    calibration: CalibrationSet,
    tokenizer: PreTrainedTokenizerBase | None,
    request: Request,
    *,
    report: Callable[[int], None],
) -> Parts:
    """Make the tables of the layers that read one input.

    Parameters
    ----------
    layers
        The layers.
    inputs
        What they receive, (tokens, in_features), in the order of the calibration set.
    calibration, tokenizer
        The tokens and what writes them.
    request
        What to do.
    report
        Called with the number of (layer, number of experts) that have been dealt with.
    """
    rows = {layer.name: torch.arange(layer.out_features) for layer in layers}
    group = RowGroup.of(layers, rows)
    scored = score_rows(group, inputs, memory=request.memory)
    chosen = []
    for number, layer in enumerate(layers):
        own = scored[scored["layer"] == layer.name]
        wanted = choose(own) if request.neurons is None else list(request.neurons)
        chosen.append(Chosen.of(group, number, wanted, inputs, request.most_outputs))
    parts: Parts = defaultdict(list)
    _add_outputs(parts, group, scored, chosen, inputs, request, report)
    _add_tokens(parts, chosen, inputs, calibration, tokenizer, request)
    return parts


def _add_outputs(
    parts: Parts,
    group: RowGroup,
    scored: pd.DataFrame,
    chosen: Sequence[Chosen],
    inputs: TokenStore,
    request: Request,
    report: Callable[[int], None],
) -> None:
    """Add what depends on the experts: neurons, outputs, components, router_map."""
    device = group.weight.device
    on_map = RouterMap(inputs, device, seed=request.rows.seed)
    common = [CommonBins(one.outputs) for one in chosen]
    for settings in _runs(request.rows, group, request.memory):
        fits = dict(fit_group(group, inputs, settings))
        measured = measure_group(group, inputs, fits, settings, memory=request.memory)
        parts["neurons"].append(measured.merge(scored.drop(columns="wd"), on=["layer", "neuron"]))
        for fit in fits.values():
            needed = components_needed(inputs, fit.clusters, device)
            start = 0
            for one, bins in zip(chosen, common, strict=True):
                rows = slice(start, start + one.layer.out_features)
                start = rows.stop
                arm: dict[str, str | int | float] = {
                    "layer": one.layer.name,
                    "experts": fit.router.k,
                    "sparsity": settings.sparsities[0],
                }
                errors = relative_errors(
                    group.weight[rows], group.bias[rows], fit.weight[0][:, rows], inputs,
                    fit.clusters, memory=request.memory,
                )  # fmt: skip
                parts["router_map"].append(on_map.rows(fit.clusters).assign(**arm))
                parts["components"].append(_clusters(fit, needed, errors).assign(**arm))
                parts["outputs"] += [
                    histogram.assign(**arm)
                    for histogram in _histograms(group, one, bins, fit, inputs)
                ]
            report(len(chosen))


def _clusters(fit: RowFit, needed: Sequence[int], errors: NDArray[np.float64]) -> pd.DataFrame:
    """Return one row a cluster."""
    columns = {"tokens": fit.clusters.sizes, "components_90": needed, "error": errors}
    return pd.DataFrame({"cluster": range(fit.router.k), **columns})


def _histograms(
    group: RowGroup, chosen: Chosen, bins: CommonBins, fit: RowFit, inputs: TokenStore
) -> Iterator[pd.DataFrame]:
    """Yield the histograms of the chosen neurons for one number of experts."""
    change = fit.weight[0][:, chosen.place].float() - group.weight[chosen.place].float()
    sparse = output_errors(change, inputs, fit.clusters).add_(chosen.outputs)
    for kind, outputs in (("dense", chosen.outputs), ("sparse", sparse)):
        for rows in histogram_rows(bins, chosen.neurons, outputs, fit.clusters):
            yield rows.assign(kind=kind)


def _add_tokens(
    parts: Parts,
    chosen: Sequence[Chosen],
    inputs: TokenStore,
    calibration: CalibrationSet,
    tokenizer: PreTrainedTokenizerBase | None,
    request: Request,
) -> None:
    """Add what does not depend on the experts: pairs, separated, modes, contexts."""
    seed = request.rows.seed
    drawn = draw_all(inputs, seed=seed)
    near = near_pairs(inputs, drawn, near=request.near, seed=seed)
    text = TokenText(tokenizer)
    for one in chosen:
        found = {
            "pairs": pair_rows(one.outputs, one.neurons, drawn, most=request.pairs),
            "separated": separated_rows(
                one.outputs, one.neurons, near, inputs, calibration, text, most=request.separated
            ),
        }
        outputs = dict(zip(one.neurons, one.outputs.cpu().numpy(), strict=True))
        found["modes"], found["contexts"] = describe_modes(
            outputs, calibration, tokenizer, one.layer.name, per_mode=request.contexts, seed=seed
        )
        for name, rows in found.items():
            parts[name].append(rows.assign(layer=one.layer.name))


def _runs(settings: RowSettings, group: RowGroup, memory: int) -> Iterator[RowSettings]:
    """Part the numbers of experts so that the solved rows of a part fit into memory, if they can.

    Rows that are measured together share their dense outputs.
    """
    one_expert = group.weight.numel() * group.weight.element_size()
    run: list[int] = []
    for k in settings.experts:
        if run and (sum(run) + k) * one_expert > memory:
            yield replace(settings, experts=tuple(run))
            run = []
        run.append(k)
    yield replace(settings, experts=tuple(run))
