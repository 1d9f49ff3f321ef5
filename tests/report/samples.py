"""Scores made by hand, without a model, and the other way round of what a page packs."""

import base64
import html
import json
import re
import zlib
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.results.scores import N_SAVED, LayerHistograms, NeuronScores
from entangle.stats.edges import SAVED_FOLD, signed_edges

MODEL = {"name": "by hand", "digest": "0" * 64, "source": "ids"}
TEXT = {"source": "a text", "n_seq": 2, "seq_len": 32, "n_tokens": 64, "digest": "1" * 64}


def histograms(outputs: NDArray[np.float64]) -> LayerHistograms:
    """Count outputs, (neurons, tokens), in the bins that scores keep."""
    location = np.median(outputs, axis=1)
    scale = np.subtract(*np.quantile(outputs, [0.75, 0.25], axis=1))
    scale = np.where(scale > 0, scale, 1.0)
    place = (outputs - location[:, None]) / scale[:, None]
    index = np.searchsorted(signed_edges(SAVED_FOLD), place, side="right") - 1
    counts = np.zeros((len(outputs), N_SAVED), dtype=np.int32)
    np.add.at(counts, (np.arange(len(outputs))[:, None], index.clip(0, N_SAVED - 1)), 1)
    return LayerHistograms(counts, 0, location, scale, outputs.min(1), outputs.max(1))


def by_hand(sizes: dict[str, int], *, tokens: int = 64, seed: int = 0) -> NeuronScores:
    """Return scores of random outputs: so many neurons of every layer, WD falling."""
    rng = np.random.default_rng(seed)
    frames, rows, kept = [], [], {}
    for block, (name, size) in enumerate(sizes.items()):
        outputs = rng.normal(size=(size, tokens)) * np.linspace(1, 2, size)[:, None] + 0.5
        kept[name] = histograms(outputs)
        common = {"layer": name, "block": block, "projection": f"p{block}"}
        frame = pd.DataFrame(
            {
                "model": MODEL["name"], **common, "neuron": np.arange(size),
                "wd": np.linspace(0.9, 0.1, size), "wd_se": 0.01, "wd_bound": 0.0, "ks": 0.2,
                "mean": outputs.mean(1), "std": outputs.std(1), "skewness": 0.0,
                "excess_kurtosis": 0.0, "weight_norm": 1.0, "md": np.nan, "n_tokens": tokens,
                "flag": "",
            }
        )  # fmt: skip
        frames.append(frame)
        numbers = {
            "null_floor": 0.05, "null_floor_high": 0.06, "split_half": 0.9, "n_pairs": 0,
            "n_identical_pairs": 0, "md_rank_agreement_mean": np.nan,
            "md_rank_agreement_max": np.nan,
        }  # fmt: skip
        rows.append({**common, "n_neurons": size, "n_tokens": tokens, "method": "exact", **numbers})
    layers = pd.DataFrame(rows).astype({"block": "Int64"})
    manifest = {
        "kind": "scores", "schema_version": 1, "model": MODEL,
        "calibration": {**TEXT, "settings": {}}, "settings": {"seed": 0},
    }  # fmt: skip
    return NeuronScores(pd.concat(frames, ignore_index=True), layers, kept, manifest)


def unpacked(packed: Any) -> Any:
    """Return what `entangle.report.packing` packed, by plain means."""
    if "texts" in packed:
        return [packed["texts"][code] for code in unpacked(packed["codes"])]
    planes = zlib.decompress(base64.b64decode(packed["d"]))
    n, kind = packed["n"], packed["t"]
    if n == 0:
        return np.empty(0)
    rows = np.frombuffer(planes, np.uint8).reshape(-1, n).T
    if kind == "f3":
        rows = np.concatenate([np.zeros((n, 1), np.uint8), rows], axis=1)
    types = {"u1": "u1", "u2": "<u2", "u4": "<u4", "i1": "i1", "f3": "<f4", "f8": "<f8"}
    return np.ascontiguousarray(rows).view(types[kind]).reshape(-1)


def data_of(page: str) -> Any:
    """Return the data that a page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def text_of(page: str) -> str:
    """Return a page without its data, scripts and tags, as it is read."""
    bare = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S)
    return html.unescape(re.sub(r"<[^>]*>", " ", bare))
