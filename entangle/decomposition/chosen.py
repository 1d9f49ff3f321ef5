"""Scores of all rows of a group of layers, and the neurons that are looked at closely."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.ablation.row_measures import dense_outputs
from entangle.ablation.row_solve import RowGroup
from entangle.errors import InvalidInput, MemoryLimit, NumericalError
from entangle.models.layers import Layer
from entangle.recording.stream import TokenStore
from entangle.stats.rounding import FeatureSizes, judge_products
from entangle.stats.tiles import row_parts
from entangle.stats.wasserstein import ShapeStatistics, shape_statistics

TOP = 3
"""Neurons of largest WD that are chosen of a layer, beside the typical one."""

_BYTES_A_TOKEN = 24  # of every neuron that is scored
_BYTES_CHOSEN = 48  # of every chosen neuron: dense, sparse, bins, differences
_SHARED = ("mean", "std", "skewness", "excess_kurtosis", "ks")


def score_rows(group: RowGroup, inputs: TokenStore, *, memory: int) -> pd.DataFrame:
    """Measure the shape of every row's outputs.

    Parameters
    ----------
    group
        All rows of some layers that read one input.
    inputs
        That input, (tokens, in_features).
    memory
        Bytes for outputs.

    Returns
    -------
    pandas.DataFrame
        One row a neuron: layer, neuron, wd, mean, std, skewness, excess_kurtosis, ks, weight_norm,
        flag, as in `entangle.scoring.NeuronScores`.

    Raises
    ------
    NumericalError
        If an output is NaN or infinite.
    """
    n_rows = group.weight.shape[0]
    sizes = FeatureSizes.of(inputs).rms()[None]
    at_once = memory // (_BYTES_A_TOKEN * inputs.n_tokens)
    parts = []
    for part in row_parts(n_rows, at_once):
        weight = group.weight[part].float()
        bias = group.bias[part]
        judge = judge_products(weight, bias, sizes)
        shape = judge(0, shape_statistics(dense_outputs(weight, bias, inputs)))
        _check_finite(shape)
        columns = {name: getattr(shape, name).cpu().numpy() for name in ("wd", *_SHARED)}
        columns["weight_norm"] = weight.norm(dim=1).cpu().double().numpy()
        columns["flag"] = np.where(shape.constant.cpu().numpy(), "constant", "")
        parts.append(pd.DataFrame(columns))
    names = group.columns()[["layer", "neuron"]]
    return pd.concat([names, pd.concat(parts, ignore_index=True)], axis=1)


def _check_finite(shape: ShapeStatistics) -> None:
    bad = int((shape.nan | shape.inf).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {len(shape.nan)} neurons have NaN or infinite outputs; run the model in "
            "float32 or check its weights."
        )


def choose(scored: pd.DataFrame) -> list[int]:
    """Return the neurons of one layer with the largest WD, then the median one.

    Of an even number, that is the lower of the two in the middle.

    Raises
    ------
    InvalidInput
        If no neuron's outputs vary.
    """
    known = scored[scored["wd"].notna()]
    if known.empty:
        raise InvalidInput(
            f"layer {scored['layer'].iloc[0]!r} has no neuron whose outputs vary; name neurons or "
            "choose another layer."
        )
    ordered = known.sort_values("wd", ascending=False, kind="stable")["neuron"].tolist()
    return list(dict.fromkeys([*ordered[:TOP], ordered[len(ordered) // 2]]))


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some neurons of one layer and what they put out."""

    layer: Layer
    neurons: tuple[int, ...]
    place: Int64[Tensor, " neurons"]
    """Their rows in the group."""
    outputs: Float[Tensor, "neurons tokens"]
    """Dense outputs on all tokens, float32."""

    @classmethod
    def of(
        cls, group: RowGroup, number: int, neurons: Sequence[int], inputs: TokenStore, memory: int
    ) -> "Chosen":
        """Compute the outputs of neurons of the group's layer ``number``.

        Raises
        ------
        MemoryLimit
            If the outputs of so many neurons do not fit into ``memory`` (bytes).
        """
        layer = group.layers[number]
        needed = _BYTES_CHOSEN * len(neurons) * inputs.n_tokens
        if needed > memory:
            raise MemoryLimit(
                f"{len(neurons)} neurons of {layer.name!r} on {inputs.n_tokens} tokens take "
                f"{needed / 2**20:.0f} MiB, more than {memory / 2**20:.0f} MiB; name fewer neurons "
                "(neurons) or raise --memory (memory)."
            )
        first = sum(one.out_features for one in group.layers[:number])
        place = first + torch.tensor(neurons, device=group.weight.device)
        outputs = dense_outputs(group.weight[place].float(), group.bias[place], inputs)
        return cls(layer, tuple(neurons), place, outputs)
