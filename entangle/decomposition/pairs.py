"""How far apart neurons put random pairs of tokens."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from entangle.ablation.row_measures import ClusterPairs, Clusters, pair_tokens
from entangle.recording.stream import TokenStore
from entangle.stats.mapping_difficulty import mapping_difficulty


def draw_all(inputs: TokenStore, *, seed: int) -> ClusterPairs:
    """Draw the pairs of tokens that mapping difficulty is measured on, with their distances."""
    everything = Clusters.of(torch.zeros(inputs.n_tokens, dtype=torch.int64), 1)
    return pair_tokens(everything, inputs, seed=seed)


def pair_rows(
    outputs: Float[Tensor, "neurons tokens"],
    neurons: tuple[int, ...],
    drawn: ClusterPairs,
    *,
    most: int,
) -> pd.DataFrame:
    """Return the distances of the first pairs with different inputs, of every neuron.

    Parameters
    ----------
    outputs
        Dense outputs.
    neurons
        Their indices in the layer.
    drawn
        From `draw_all`.
    most
        Number of pairs, fewer where there are fewer.

    Returns
    -------
    pandas.DataFrame
        Columns neuron, input_distance, output_distance, input_normalised, output_normalised,
        token_a, token_b. The normalisers are those of mapping difficulty, over all pairs drawn;
        output_normalised is NaN where most pairs have equal outputs.
    """
    statistics = mapping_difficulty(outputs, drawn.pairs, drawn.distance.to(outputs.device))
    shown = torch.nonzero(drawn.distance > 0)[:most, 0]
    a, b = drawn.pairs[:, shown].to(outputs.device)
    moved = (outputs[:, a] - outputs[:, b]).abs().cpu().double().numpy()
    distance = drawn.distance[shown].double().numpy()
    frames = []
    for place, neuron in enumerate(neurons):
        median = float(statistics.dy_median[place])
        frames.append(
            pd.DataFrame(
                {
                    "neuron": neuron,
                    "input_distance": distance,
                    "output_distance": moved[place],
                    "input_normalised": distance / statistics.dx_max,
                    "output_normalised": moved[place] / (median if median > 0 else np.nan),
                    "token_a": a.cpu().numpy(),
                    "token_b": b.cpu().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
