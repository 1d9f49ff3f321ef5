"""The modes of neurons, and the tokens and contexts that fall into each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entangle.calibration import CalibrationSet, Source, as_calibration
from entangle.checks import different, shown, whole, wholes
from entangle.errors import InvalidInput
from entangle.models.evaluating import evaluates
from entangle.models.layers import Layer, LayerSpec, find_layers
from entangle.models.loading import AnyModel, as_language_model
from entangle.modes.find import find_modes, mode_of
from entangle.modes.text import TokenText
from entangle.precision import full_precision
from entangle.progress import ProgressBar
from entangle.recording.recorder import Recorded, Recorder, of_one_group, told
from entangle.seeding import check_seed, numpy_rng

Neurons = int | Iterable[int] | np.ndarray
"""Indices of neurons of one layer, or one index."""

Outputs = Float32[np.ndarray, " tokens"]

TOP_TOKENS = 10
"""Most frequent tokens that are kept of a mode."""

_MODE_TYPES = {
    "layer": "str", "neuron": "int64", "mode": "int64", "center": "float64", "left": "float64",
    "right": "float64", "tokens": "int64", "share": "float64", "top_tokens": "str",
}  # fmt: skip
_CONTEXT_TYPES = {
    "layer": "str", "neuron": "int64", "mode": "int64", "rank": "int64", "position": "int64",
    "output": "float64", "token": "str", "before": "str", "after": "str",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class NeuronModes:
    """Modes of some neurons of one layer, and what lies in them."""

    modes: pd.DataFrame
    """One row a mode: ``layer``, ``neuron``, the columns of `entangle.modes.find_modes`, and
    ``top_tokens``: JSON, a list of [token, count, share of the mode], the most frequent first."""
    contexts: pd.DataFrame
    """One row an example: ``layer``, ``neuron``, ``mode``, ``rank`` (0 is nearest to the mode's
    center), ``position`` (index of the token in the calibration set, sequence by sequence),
    ``output`` (in its own units), ``token``, and the text ``before`` and ``after`` it."""
    outputs: Mapping[int, Outputs] = field(repr=False)
    """Outputs on all tokens, float32 of shape (tokens,), by neuron."""


@evaluates
def neuron_modes(
    model: AnyModel,
    calibration: Source,
    layer: LayerSpec,
    neurons: Neurons,
    *,
    per_mode: int = 8,
    window: int = 12,
    seed: int = 0,
    progress: bool | None = None,
) -> NeuronModes:
    """Find the modes of some neurons of a layer, with frequent tokens and example contexts.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Tokens of a module are written as their ids.
    calibration
        Text that the model runs on, once, up to the layer: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings.
    layer
        Full dotted name of a layer, the `Layer` itself, or anything else that names it alone.
    neurons
        Indices of neurons, each once.
    per_mode
        Contexts drawn of every mode, fewer where it holds fewer tokens.
    window
        Tokens of context on either side, within the sequence.
    seed
        Of the draws. A neuron's contexts do not depend on the other neurons.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If the layer or a neuron does not exist, the text does not fit the model, the layer does not
        run exactly once on every token, or an output is not finite.
    """
    language_model = as_language_model(model)
    chosen = _one_layer(language_model.module, layer)
    index = check_neurons(chosen, neurons)
    calibration = as_calibration(calibration, language_model)
    per_mode, window, seed = _counts(per_mode, window, seed)
    outputs = _outputs(language_model.module, calibration, chosen, index, progress)
    by_neuron = dict(zip(index, outputs, strict=True))
    modes, contexts = describe_modes(
        by_neuron, calibration, language_model.tokenizer, chosen.name,
        per_mode=per_mode, window=window, seed=seed,
    )  # fmt: skip
    return NeuronModes(modes, contexts, by_neuron)


def describe_modes(
    outputs: Mapping[int, Outputs],
    calibration: CalibrationSet,
    tokenizer: PreTrainedTokenizerBase | None,
    layer: str,
    *,
    per_mode: int = 8,
    window: int = 12,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Describe modes from recorded outputs: the tables ``modes`` and ``contexts`` of `NeuronModes`.

    Parameters
    ----------
    outputs
        Outputs on all tokens of the calibration set, in its order, by neuron.
    calibration, layer, per_mode, window, seed
        As in `neuron_modes`.
    tokenizer
        Writes tokens as text; None writes their ids.

    Raises
    ------
    InvalidInput
        If a neuron has not one finite output for every token.
    """
    per_mode, window, seed = _counts(per_mode, window, seed)
    text, ids = TokenText(tokenizer), calibration.rows.flat().numpy()
    modes, contexts = [], []
    for neuron, values in outputs.items():
        _check_outputs(values, neuron, layer, ids.size)
        found = find_modes(values)
        member = mode_of(values, found)
        top = [_top_tokens(ids[member == mode], text) for mode in found["mode"]]
        modes.append(found.assign(layer=layer, neuron=neuron, top_tokens=top))
        for mode, center in enumerate(found["center"].tolist()):
            rng = numpy_rng(seed, "modes", layer, neuron, mode)
            inside = np.flatnonzero(member == mode)
            drawn = rng.choice(inside, size=min(per_mode, len(inside)), replace=False)
            drawn = drawn[np.lexsort((drawn, np.abs(values[drawn] - center)))]
            contexts += [
                (layer, neuron, mode, rank, position, float(values[position]),
                 *_context(text, calibration, position, window))
                for rank, position in enumerate(drawn.tolist())
            ]  # fmt: skip
    table = pd.concat(modes) if modes else pd.DataFrame(columns=list(_MODE_TYPES))
    return (
        table[list(_MODE_TYPES)].astype(_MODE_TYPES).reset_index(drop=True),
        pd.DataFrame(contexts, columns=list(_CONTEXT_TYPES)).astype(_CONTEXT_TYPES),
    )


def _check_outputs(values: np.ndarray, neuron: int, layer: str, n_tokens: int) -> None:
    if values.shape != (n_tokens,):
        raise InvalidInput(
            f"neuron {neuron} of layer {layer!r} must have one output for each of the "
            f"{n_tokens} tokens; got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise InvalidInput(
            f"neuron {neuron} of layer {layer!r} has outputs that are NaN or infinite, so it "
            "has no modes; leave it out or run the model in float32."
        )


def check_neurons(layer: Layer, neurons: Neurons) -> list[int]:
    """Return indices of different neurons of a layer, or raise `InvalidInput`."""
    index = wholes("neurons", neurons, least=0)
    for neuron in index:
        if neuron >= layer.out_features:
            raise InvalidInput(
                f"`neurons` of layer {layer.name!r} must lie in 0..{layer.out_features - 1}; "
                f"got {neuron}."
            )
    return different("neurons", index)


def _one_layer(module: nn.Module, name: LayerSpec) -> Layer:
    found = find_layers(module, name)
    if len(found) > 1:
        names = ", ".join(layer.name for layer in found[:3])
        raise InvalidInput(
            f"`layer` must name one layer; {shown(name)} names {len(found)} ({names}, …): give one "
            "full name."
        )
    return found[0]


def _counts(per_mode: int, window: int, seed: int) -> tuple[int, int, int]:
    """Check the settings of contexts."""
    counts = whole("per_mode", per_mode, least=0), whole("window", window, least=0)
    return *counts, check_seed(seed)


def _outputs(
    module: nn.Module,
    calibration: CalibrationSet,
    layer: Layer,
    neurons: Sequence[int],
    progress: bool | None,
) -> Float32[np.ndarray, "neurons tokens"]:
    """Run the model once; compute the neurons' outputs in float32 from the layer's inputs.

    Where the layer does not multiply by its weight, they are its own.
    """
    chosen = list(neurons)
    weight = layer.weight[chosen].float()
    bias = None if layer.bias is None else layer.bias[chosen].float()
    parts: list[Tensor] = []

    def keep(seen: Recorded) -> None:
        with full_precision():
            computed = nn.functional.linear(seen.inputs.float(), weight, bias)
        parts.append((computed if seen.affine else seen.outputs[:, chosen].float()).cpu())

    with ProgressBar("modes", enabled=progress) as bar:
        bar.start(calibration.n_seq, "sequences")
        Recorder([layer], keep, once=True).run(module, told(of_one_group(calibration), bar.advance))
    outputs = torch.cat(parts)
    if outputs.shape[0] != calibration.n_tokens:
        raise InvalidInput(
            f"layer {layer.name!r} ran on {outputs.shape[0]} tokens where the text has "
            f"{calibration.n_tokens}, so its outputs have no place in it; choose another layer."
        )
    return np.ascontiguousarray(outputs.numpy().T)


def _context(
    text: TokenText, calibration: CalibrationSet, position: int, window: int
) -> tuple[str, str, str]:
    sequence, place = calibration.place(position)
    ids = calibration.rows.sequence(sequence).tolist()
    before, token, after = text.context(ids, place, window)
    return token, before, after


def _top_tokens(token_ids: np.ndarray, text: TokenText) -> str:
    """Return the most frequent tokens as JSON; of equal counts the lower id first."""
    tokens, counts = np.unique(token_ids, return_counts=True)
    best = np.argsort(-counts, kind="stable")[:TOP_TOKENS]
    rows = [
        [text.token(int(tokens[i])), int(counts[i]), float(counts[i] / len(token_ids))]
        for i in best
    ]
    return json.dumps(rows, ensure_ascii=False)
