"""How far apart neurons put random pairs of tokens.

Pairs of tokens that come in close together and go out far apart.

Where tokens lie on the first two principal components of a layer's inputs.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.experts.pca import fit_pca
from entangle.experts.router import fixed_blocks
from entangle.experts.rows import ClusterPairs, Clusters, pair_tokens
from entangle.recording.stream import TokenStore
from entangle.seeding import numpy_rng
from entangle.stats.mapping_difficulty import mapping_difficulty
from entangle.texts.calibration_set import Tokens
from entangle.texts.words import TokenText


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


PAIR_TOKENS = 8192
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
    most = min(inputs.n_tokens, PAIR_TOKENS)
    rng = numpy_rng(seed, "separated pairs")
    sample = np.sort(rng.choice(inputs.n_tokens, size=most, replace=False))
    tokens = inputs.take(torch.from_numpy(sample)).float().cpu()
    found: NDArray[np.int64] = sample[_within(tokens, float(np.quantile(distance, near)))]
    return found


_ROWS, _NUMBERS = 1024, 2**22  # at a time: rows of products; numbers of rows that are subtracted


def _within(rows: Float[Tensor, "rows width"], radius: float) -> Int64[np.ndarray, "pairs two=2"]:
    """Return the pairs of different rows at most ``radius`` apart, the lower index first, in order.

    Products in float32 tell it where all that rounding can do to them leaves no doubt; elsewhere
    the differences in float64 do.
    """
    centred = rows - rows.mean(0)
    squares = centred.square().sum(1)
    slack = 4 * rows.shape[1] * torch.finfo(torch.float32).eps
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(rows), _ROWS):
        block, own = centred[start : start + _ROWS], squares[start : start + _ROWS]
        # |a − b|² ≤ r² + slack · (a² + b²) as ab − (1 − slack) b² / 2 ≥ ((1 − slack) a² − r²) / 2
        raised = torch.addmm((0.5 * slack - 0.5) * squares[start:], block, centred[start:].T)
        likely = raised >= (0.5 * ((1 - slack) * own - radius**2))[:, None]
        likely[:, : len(block)].triu_(1)
        pairs = torch.nonzero(likely)
        a, b = pairs.T
        doubted = slack * (own[a] + squares[start:][b])
        told = own[a] - 2 * raised[a, b] + slack * squares[start:][b]
        known = ((told > doubted) & (told < radius**2 - doubted)).numpy()
        near = pairs.numpy() + start
        known[~known] = _are_within(rows, near[~known], radius)
        found.append(near[known])
    return np.concatenate(found)


def _are_within(
    rows: Float[Tensor, "rows width"], pairs: Int64[np.ndarray, "pairs two=2"], radius: float
) -> NDArray[np.bool_]:
    """Tell of pairs whether their rows differ, by at most ``radius``."""
    step = max(_NUMBERS // rows.shape[1], 1)
    found = [np.empty(0, dtype=np.bool_)]
    for part in torch.from_numpy(pairs).split(step):
        apart = (rows[part[:, 0]].double() - rows[part[:, 1]].double()).norm(dim=1).numpy()
        found.append((apart > 0) & (apart <= radius))
    return np.concatenate(found)


def separated_rows(
    outputs: Float[Tensor, "neurons tokens"],
    neurons: tuple[int, ...],
    pairs: Int64[np.ndarray, "pairs two=2"],
    inputs: TokenStore,
    calibration: Tokens,
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
        best = farthest_pairs(own, pairs, most)
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


_LIKELY, _STRIDE = (256, 4096), 16


def farthest_pairs(
    outputs: NDArray[np.float64], pairs: NDArray[np.int64], most: int
) -> list[tuple[int, int]]:
    """Pick pairs by falling distance of their outputs, no token twice.

    Parameters
    ----------
    outputs
        Of one neuron, (tokens,).
    pairs
        Tokens, (pairs, 2), from `near_pairs`; of equally far ones the first is picked.
    most
        Number of pairs, fewer where there are fewer with different outputs.

    Returns
    -------
    list of (int, int)
        Tokens; the one with the lower output comes first.
    """
    moved = np.abs(outputs[pairs[:, 0]] - outputs[pairs[:, 1]])
    some = moved[::_STRIDE]
    bounds = [  # of about the 256 and the 4,096 farthest, by a part of the pairs
        float(np.partition(some, -many // _STRIDE)[-many // _STRIDE])
        for many in _LIKELY
        if len(moved) > 2 * many
    ]
    for bound in (*bounds, 0.0):  # a picked pair is never nearer than one that is not looked at
        among = np.flatnonzero(moved >= bound)
        order = among[np.argsort(-moved[among], kind="stable")]
        picked, taken = list[tuple[int, int]](), set[int]()
        for pair in order[moved[order] > 0].tolist() if most else ():
            a, b = pairs[pair].tolist()
            if a not in taken and b not in taken:
                picked.append((a, b) if outputs[a] < outputs[b] else (b, a))
                taken |= {a, b}
            if len(picked) == most:
                return picked
    return picked


def _described(
    side: str, position: int, outputs: NDArray[np.float64], calibration: Tokens,
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


MAP_TOKENS = 5000
"""Tokens on a map."""


class RouterMap:
    """A sample of tokens on two components.

    Parameters
    ----------
    inputs
        A layer's inputs, (tokens, in_features).
    device
        Where the components are computed.
    seed
        Of the sample.
    """

    def __init__(self, inputs: TokenStore, device: torch.device, *, seed: int) -> None:
        rng, n = numpy_rng(seed, "router map"), inputs.n_tokens
        drawn = rng.choice(n, size=min(n, MAP_TOKENS), replace=False)
        self._positions = torch.from_numpy(np.sort(drawn))
        features = inputs.span(0, 1).shape[1]
        pca = fit_pca(fixed_blocks(inputs, device=device), min(2, features))
        tokens = inputs.take(self._positions).to(device, torch.float32)
        places = pca.project(tokens).cpu().double().numpy()
        self._x = places[:, 0]
        self._y = places[:, 1] if features > 1 else np.zeros(len(places))

    def rows(self, clusters: Clusters) -> pd.DataFrame:
        """Return experts, position, x, y, cluster of every token on the map."""
        return pd.DataFrame(
            {
                "experts": len(clusters.sizes),
                "position": self._positions.numpy(),
                "x": self._x,
                "y": self._y,
                "cluster": clusters.labels.cpu()[self._positions].numpy(),
            }
        )
