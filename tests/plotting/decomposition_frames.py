"""Tables as `entangle decompose` writes them, of a made-up layer in which clusters help."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

LAYER = "model.layers.1.mlp.gate_proj"
EXPERTS = (1, 2, 4, 8, 16)
SPARSITY = 0.9
N_TOKENS, N_NEURONS = 4000, 60
TOP, TYPICAL = 7, 21

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Decomposed:
    """The frames of `entangle.results.decomposition.Decomposition` by their names."""

    neurons: pd.DataFrame
    outputs: pd.DataFrame
    pairs: pd.DataFrame
    separated: pd.DataFrame
    router_map: pd.DataFrame
    components: pd.DataFrame
    modes: pd.DataFrame
    contexts: pd.DataFrame


@cache
def decompose_made_up(*, layer: str = LAYER, seed: int = 0) -> Decomposed:
    """Make the tables; copy them before changing them."""
    rng = np.random.default_rng(seed)
    neurons = _neurons(rng, layer)
    dense = {
        TOP: np.where(rng.random(N_TOKENS) < 0.12, rng.normal(-6, 1, N_TOKENS), 0.0)
        + rng.normal(0.5, 0.9, N_TOKENS),
        TYPICAL: rng.normal(0.1, 1.0, N_TOKENS),
    }
    for neuron, outputs in dense.items():
        of = neurons["neuron"] == neuron
        neurons.loc[of, ["mean", "std"]] = outputs.mean(), outputs.std()
    return Decomposed(
        neurons=neurons,
        outputs=pd.concat([_outputs(rng, layer, n, y) for n, y in dense.items()]),
        pairs=pd.concat([_pairs(rng, layer, n, y) for n, y in dense.items()]),
        separated=_separated(layer, dense[TOP]),
        router_map=_router_map(rng, layer),
        components=_components(rng, layer),
        modes=_modes(layer),
        contexts=_contexts(layer),
    )


def _neurons(rng: np.random.Generator, layer: str) -> pd.DataFrame:
    wd = rng.gamma(4.0, 0.02, N_NEURONS)
    wd[TOP], wd[TYPICAL] = 0.45, float(np.median(wd))
    mean, std = rng.normal(0.0, 0.3, N_NEURONS), rng.gamma(9.0, 0.1, N_NEURONS)
    md, norm = 0.3 + wd + rng.normal(0.0, 0.03, N_NEURONS), rng.gamma(40.0, 0.02, N_NEURONS)
    skewness = rng.normal(0.0, 5.0 * wd)
    noise, rows = rng.normal(0.0, 0.05, N_NEURONS), list[pd.DataFrame]()
    for k in EXPERTS:
        ri = 1.0 + np.log2(k) * (0.02 + wd / 2) * (1.0 + noise)
        weighted = wd * (1.0 - np.log2(k) * (0.08 + noise))
        rows.append(
            pd.DataFrame(
                {
                    "layer": layer, "block": 1, "projection": "gate_proj",
                    "neuron": np.arange(N_NEURONS), "experts": k, "sparsity": SPARSITY,
                    "rmse": 0.4 / ri, "ri": ri, "output_wd": 0.5 * (0.05 + wd) / ri, "wd": wd,
                    "md": md, "weighted_wd": weighted,
                    "weighted_md": md * (1.0 - np.log2(k) * (0.01 + noise / 9)),
                    "smallest_cluster": N_TOKENS // k, "realised_sparsity": SPARSITY,
                    "mean": mean, "std": std,
                    "skewness": skewness, "excess_kurtosis": 3 * skewness**2,
                    "ks": wd / 2, "weight_norm": norm,
                }
            )
        )  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def _clusters(rng: np.random.Generator, y: Floats, k: int) -> NDArray[np.int64]:
    order = np.argsort(np.argsort(y + rng.normal(0.0, y.std(), len(y))))
    return np.asarray(rng.permutation(k)[order * k // len(y)], dtype=np.int64)


def _outputs(rng: np.random.Generator, layer: str, neuron: int, y: Floats) -> pd.DataFrame:
    edges, rows = np.linspace(y.min() - 1.0, y.max() + 1.0, 81), []
    for k in EXPERTS:
        share = 0.5 + 0.1 * np.log2(k)
        sparse = share * y + rng.normal(0.0, 0.1, len(y))
        cluster = _clusters(rng, y, k)
        for kind, values in (("dense", y), ("sparse", sparse)):
            for c in range(-1, k):
                inside = values if c < 0 else values[cluster == c]
                key = {"layer": layer, "neuron": neuron, "experts": k, "sparsity": SPARSITY}
                counts = np.histogram(inside, edges)[0]
                used = np.flatnonzero(counts)
                span = slice(used[0], used[-1] + 1)  # as `entangle decompose` leaves out the ends
                bins = {"left": edges[:-1][span], "right": edges[1:][span], "count": counts[span]}
                rows.append(pd.DataFrame({**key, "kind": kind, "cluster": c, **bins}))
    return pd.concat(rows, ignore_index=True)


def _pairs(rng: np.random.Generator, layer: str, neuron: int, y: Floats) -> pd.DataFrame:
    a, b = rng.permutation(len(y))[:1200].reshape(2, -1)
    distance, gap = rng.gamma(20.0, 1.5, 600), np.abs(y[a] - y[b])
    return pd.DataFrame(
        {
            "layer": layer, "neuron": neuron, "input_distance": distance, "output_distance": gap,
            "input_normalised": distance / distance.max(),
            "output_normalised": gap / np.median(gap), "token_a": a, "token_b": b,
        }
    )  # fmt: skip


_TEXTS = (
    ("The river rose in the", " north", " of the country and ran to the sea near the old town."),
    ("He was born in", " 19", "52 in the north of the city,\nand moved to\tthe capital"),
    ("In the work of the poet, 中国", " 国", " and Привет, мир are words; \u200bthe rest is not"),
    ("\x1b[31m", "\n", "a line of its own costs $5 and 100 % of $x_1$ \U0001f600"),
)


def _separated(layer: str, y: Floats) -> pd.DataFrame:
    low, high = np.argsort(y)[: len(_TEXTS) * 2], np.argsort(-y)[: len(_TEXTS) * 2]
    rows = []
    for rank in range(6):
        one, other = _TEXTS[rank % len(_TEXTS)], _TEXTS[(rank + 1) % len(_TEXTS)]
        row: dict[str, object] = {"layer": layer, "neuron": TOP, "rank": rank}
        for side, (before, token, after), position in (("a", one, low), ("b", other, high)):
            row[f"position_{side}"] = int(position[rank])
            row[f"output_{side}"] = y[position[rank]]
            row[f"token_{side}"], row[f"context_{side}"] = token, before + token + after
            row[f"start_{side}"], row[f"end_{side}"] = len(before), len(before + token)
        distances = {"input_distance": 3.0 + rank, "cosine": 0.98 - 0.01 * rank}
        row |= distances | {"output_distance": abs(row["output_a"] - row["output_b"]) / y.std()}  # type: ignore[operator]
        rows.append(row)
    return pd.DataFrame(rows)


def _router_map(rng: np.random.Generator, layer: str) -> pd.DataFrame:
    parts = []
    points = rng.normal(0.0, 1.0, (600, 2)) + rng.choice([-3.0, 0.0, 3.0], (600, 2))
    for k in EXPERTS[1:]:
        centers = points[:k]
        cluster = np.argmin(((points[:, None] - centers) ** 2).sum(2), axis=1)
        parts.append(
            pd.DataFrame(
                {
                    "layer": layer, "experts": k, "position": np.arange(600), "x": points[:, 0],
                    "y": points[:, 1], "cluster": cluster,
                }
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def _components(rng: np.random.Generator, layer: str) -> pd.DataFrame:
    rows = []
    for k in EXPERTS:
        for cluster in range(k):
            tokens = int(rng.integers(100, 2 * N_TOKENS // k))
            components = int(np.clip(rng.normal(280 - 12 * np.log2(k) - 4000 / tokens, 20), 5, 500))
            error = 0.002 * components**0.8 * (1.0 + rng.gamma(2.0, 0.1))
            row = {"layer": layer, "experts": k, "cluster": cluster, "tokens": tokens}
            rows.append(row | {"components_90": components, "error": error})
    return pd.DataFrame(rows)


def _modes(layer: str) -> pd.DataFrame:
    tops = (
        '[[" the", 420, 0.875], ["\\u56fd", 30, 0.0625], ["\\n", 5, 0.01]]',
        '[[" of", 900, 0.26], [",", 400, 0.11], [" and", 300, 0.085], [" a", 90, 0.02]]',
    )
    return pd.DataFrame(
        {
            "layer": layer, "neuron": TOP, "mode": [0, 1], "center": [-5.5, 0.5],
            "left": [-np.inf, -2.5], "right": [-2.5, np.inf], "tokens": [480, 3520],
            "share": [0.12, 0.88], "top_tokens": tops,
        }
    )  # fmt: skip


def _contexts(layer: str) -> pd.DataFrame:
    rows = []
    for mode, output in ((0, -6.1), (1, 0.6)):
        for rank, (before, token, after) in enumerate((*_TEXTS, *_TEXTS)):
            row = {"layer": layer, "neuron": TOP, "mode": mode, "rank": rank, "position": 40 * rank}
            words = {"token": token, "before": before * 3, "after": after * 2}
            rows.append({**row, "output": output + 0.1 * rank, **words})
    return pd.DataFrame(rows)
