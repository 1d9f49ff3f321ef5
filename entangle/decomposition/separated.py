"""Pairs of tokens that come in close together and go out far apart."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from entangle.ablation.row_measures import ClusterPairs
from entangle.calibration import CalibrationSet
from entangle.modes import TokenText
from entangle.recording.stream import TokenStore
from entangle.seeding import numpy_rng

MOST_TOKENS = 8192
"""Tokens among which near pairs are looked for."""


def near_pairs(
    inputs: TokenStore, drawn: ClusterPairs, *, near: float, seed: int
) -> Int64[np.ndarray, "pairs two=2"]:
    """Find the nearest pairs of tokens, exactly, among a random sample of at most 8,192.

    Parameters
    ----------
    inputs
        A layer's inputs, (tokens, in_features).
    drawn
        Random pairs of tokens: near is what is nearer than the share ``near`` of those with
        different inputs.
    near
        Share of all pairs.
    seed
        Of the sample.

    Returns
    -------
    ndarray of shape (pairs, 2)
        Positions, the lower first; pairs whose inputs are the same are left out.
    """
    distance = drawn.distance[drawn.distance > 0].double().numpy()
    if len(distance) == 0:
        return np.empty((0, 2), dtype=np.int64)
    most = min(inputs.n_tokens, MOST_TOKENS)
    rng = numpy_rng(seed, "separated pairs")
    sample = np.sort(rng.choice(inputs.n_tokens, size=most, replace=False))
    tokens = inputs.take(torch.from_numpy(sample)).float().cpu().numpy()
    search = NearestNeighbors(radius=float(np.quantile(distance, near)), algorithm="brute")
    found = search.fit(tokens).radius_neighbors_graph(mode="distance").tocoo()
    wanted = (found.row < found.col) & (found.data > 0)
    pairs = np.stack([sample[found.row[wanted]], sample[found.col[wanted]]], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].astype(np.int64)


def separated_rows(
    outputs: Float[Tensor, "neurons tokens"],
    neurons: tuple[int, ...],
    pairs: Int64[np.ndarray, "pairs two=2"],
    inputs: TokenStore,
    calibration: CalibrationSet,
    text: TokenText,
    *,
    most: int,
    window: int = 12,
) -> pd.DataFrame:
    """Describe the near pairs that every neuron puts farthest apart, no token twice.

    Parameters
    ----------
    outputs, neurons
        Dense outputs and the neurons' indices in the layer.
    pairs
        From `near_pairs`.
    inputs
        The layer's inputs.
    calibration, text
        The tokens and what writes them.
    most
        Number of pairs, fewer where there are fewer.
    window
        Tokens of context on either side.
    """
    rows: list[dict[str, object]] = []
    for place, neuron in enumerate(neurons):
        own = outputs[place].cpu().double().numpy()
        spread = own.std()
        best = _farthest(own, pairs, most)
        tokens = inputs.take(torch.tensor(best, dtype=torch.int64).flatten()).cpu().double()
        for rank, (a, b) in enumerate(best):
            x, y = tokens[2 * rank : 2 * rank + 2]
            rows.append(
                {
                    "neuron": neuron,
                    "rank": rank,
                    **dict(_described("a", a, own, calibration, text, window)),
                    **dict(_described("b", b, own, calibration, text, window)),
                    "input_distance": float((x - y).norm()),
                    "cosine": float(torch.nn.functional.cosine_similarity(x, y, dim=0)),
                    "output_distance": float((own[b] - own[a]) / spread),
                }
            )
    return pd.DataFrame(rows)


def _farthest(
    outputs: NDArray[np.float64], pairs: NDArray[np.int64], most: int
) -> list[tuple[int, int]]:
    """Pick pairs by falling distance of their outputs; the lower output comes first."""
    moved = np.abs(outputs[pairs[:, 0]] - outputs[pairs[:, 1]])
    free, picked = moved > 0, list[tuple[int, int]]()
    while len(picked) < most and free.any():
        a, b = pairs[np.argmax(np.where(free, moved, -1.0))].tolist()
        picked.append((a, b) if outputs[a] < outputs[b] else (b, a))
        free &= ~np.isin(pairs, (a, b)).any(axis=1)
    return picked


def _described(
    side: str, position: int, outputs: NDArray[np.float64], calibration: CalibrationSet,
    text: TokenText, window: int,
) -> Iterator[tuple[str, object]]:  # fmt: skip
    sequence, place = calibration.place(position)
    ids = calibration.rows.sequence(sequence).tolist()
    before, token, after = text.context(ids, place, window)
    yield f"position_{side}", position
    yield f"token_{side}", token
    yield f"context_{side}", before + token + after
    yield f"start_{side}", len(before)
    yield f"end_{side}", len(before) + len(token)
    yield f"output_{side}", float(outputs[position])
