"""Columns of scores of one's own: a number for every neuron of a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from entangle.doors import Door
from entangle.errors import EntangleError, InvalidInput
from entangle.models.blocks import BlockRunner, evaluating
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.recording.hooks import observe
from entangle.recording.recorder import of_one_group
from entangle.texts.calibration_set import CalibrationSet

MAX_TOKENS = 2**13
"""Tokens of the calibration text that a function is given: the first ones, whole sequences."""
OwnColumn = Callable[
    [Float[Tensor, "tokens features"], Float[Tensor, "tokens neurons"],
     Float[Tensor, "neurons features"]], Any,
]  # fmt: skip
"""From a layer's inputs, outputs and weight, float32: a number for every neuron, (neurons,)."""


TAKEN = (
    "model", "layer", "block", "projection", "neuron", "n_tokens", "flag", "variance", "abs_mean",
    "abs_skewness",
)  # fmt: skip
"""Columns of scores that are no scores, or computed from them."""


@dataclass(frozen=True)
class Ours:
    """A column of this package, which every table of scores has."""

    name: str


def as_column(name: str, thing: Any) -> "OwnColumn | Ours":
    """Return a function that is checked whenever it is called.

    Raises
    ------
    InvalidInput
        If it is no function; when it is run, if it raises, or returns another shape or NaN.
    """
    if isinstance(thing, Ours):
        return thing
    if name in TAKEN:
        raise InvalidInput(f"a column must not be called {name!r}, which scores have already.")
    if not callable(thing):
        raise InvalidInput(f"a column must be a function; {name!r} is {type(thing).__name__}.")

    def column(inputs: Tensor, outputs: Tensor, weight: Tensor) -> NDArray[np.float64]:
        try:
            found: Any = thing(inputs, outputs, weight)
            if isinstance(found, Tensor):
                found = found.detach().cpu().double().numpy()
            values = np.asarray(found, np.float64)
        except EntangleError:
            raise
        except Exception as error:
            raise InvalidInput(
                f"the column {name!r} failed: {type(error).__name__}: {error}"
            ) from error
        if values.shape != (len(weight),):
            raise InvalidInput(
                f"the column {name!r} must have a number for each of {len(weight)} neurons; got "
                f"shape {values.shape}."
            )
        if not np.isfinite(values).all():
            raise InvalidInput(f"the column {name!r} has NaN or infinity.")
        return values

    return column


COLUMNS: Door["OwnColumn | Ours"] = Door("columns", as_column)
"""Numeric columns of scores by name."""
for _name, _source in (
    ("wd", "Wasserstein distance of a neuron's outputs from a Gaussian, arXiv 2405.15756"),
    ("wd_se", "standard error of wd"), ("wd_bound", "largest error of wd through the method"),
    ("ks", "Kolmogorov–Smirnov distance from a Gaussian"), ("mean", "mean output"),
    ("std", "standard deviation of the outputs"), ("skewness", "third standardised moment"),
    ("excess_kurtosis", "fourth standardised moment − 3"),
    ("weight_norm", "Euclidean norm of the weights"),
    ("md", "mapping difficulty, arXiv 2405.15756"),
):  # fmt: skip
    COLUMNS.own(_name, Ours(_name), source=_source)


def is_own(name: str) -> bool:
    """Tell whether a column is not one of this package's."""
    return name in COLUMNS and not COLUMNS.is_ours(name)


def with_columns(
    frame: pd.DataFrame,
    model: LanguageModel,
    calibration: CalibrationSet,
    layers: Sequence[Layer],
    names: Sequence[str],
) -> pd.DataFrame:
    """Return a table of scores with columns of one's own, NaN outside the blocks.

    Parameters
    ----------
    frame
        A row a neuron, with ``layer`` and ``neuron``.
    model, calibration
        What the layers see: the first `MAX_TOKENS` tokens, block by block.
    layers
        Those of the table.
    names
        Of `COLUMNS`; ours are there already.
    """
    functions: dict[str, Any] = {name: COLUMNS[name] for name in names if is_own(name)}
    if not functions:
        return frame
    found: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in functions}
    for layer, inputs, outputs in _seen(model, calibration, layers):
        weight = layer.weight.float()
        for name, function in functions.items():
            found[name][layer.name] = function(inputs, outputs, weight)
    parts = {
        name: np.concatenate([
            by_layer[str(layer)][rows["neuron"].to_numpy(np.int64)] if layer in by_layer
            else np.full(len(rows), np.nan)
            for layer, rows in frame.groupby("layer", sort=False)
        ])
        for name, by_layer in found.items()
    }  # fmt: skip
    order = np.concatenate([rows.index for _, rows in frame.groupby("layer", sort=False)])
    made = pd.DataFrame(parts, index=order)
    return frame.assign(**{name: made[name] for name in parts})


def _seen(model: LanguageModel, calibration: CalibrationSet, layers: Sequence[Layer]) -> Any:
    """Yield every layer of the blocks with what it reads and gives, float32."""
    batches, count = [], 0
    for _, ids in of_one_group(calibration):
        most = max(1, (MAX_TOKENS - count) // ids.shape[1])
        batches.append(ids[:most])
        count += batches[-1].numel()
        if count >= MAX_TOKENS:
            break
    with evaluating(model.module), torch.no_grad():
        runner = BlockRunner(model.module)
        entered = [runner.enter(ids) for ids in batches]
        hidden = [states for states, _ in entered]
        for index in range(runner.n_blocks):
            own = [layer for layer in layers if layer.block == index]
            kept: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in own}

            def keep(layer: Layer, x: Tensor, y: Tensor, kept: Any = kept) -> None:
                kept[layer.name].append((x.flatten(0, -2).float(), y.flatten(0, -2).float()))

            with observe(own, keep):
                for place, (_, inputs) in enumerate(entered):
                    hidden[place] = runner.run(index, hidden[place], inputs)
            for layer in own:
                if kept[layer.name]:
                    x, y = zip(*kept.pop(layer.name), strict=True)
                    yield layer, torch.cat(x), torch.cat(y)
