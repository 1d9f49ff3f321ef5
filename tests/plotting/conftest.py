"""Frames as scoring writes them, small and made by hand-set generators."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib import rcParams
from numpy.typing import NDArray


def histogram_of(outputs: NDArray[np.float64], *, bins: int = 60) -> pd.DataFrame:
    counts, edges = np.histogram(outputs, bins)
    return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": counts})


@pytest.fixture
def outputs() -> NDArray[np.float64]:
    """Outputs (4000,) of a neuron with two modes, in its own units."""
    rng = np.random.default_rng(5)
    return np.where(rng.random(4000) < 0.3, rng.normal(-4.0, 0.5, 4000), rng.normal(1.0, 0.7, 4000))


@pytest.fixture
def histogram(outputs: NDArray[np.float64]) -> pd.DataFrame:
    return histogram_of(outputs)


def layer_scores(block: int, *, n: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(block)
    wd = rng.gamma(4.0, 0.02, n)
    return pd.DataFrame(
        {
            "model": "tiny",
            "layer": f"model.layers.{block}.mlp.gate_proj",
            "block": pd.array([block] * n, dtype="Int64"),
            "projection": "gate_proj",
            "neuron": np.arange(n),
            "wd": wd,
            "wd_se": 0.05 * wd,
            "mean": rng.normal(0.0, 0.3, n),
            "std": rng.gamma(9.0, 0.1, n),
            "md": 0.3 + wd + rng.normal(0.0, 0.03, n),
            "n_tokens": 4000,
            "flag": "",
        }
    )


@pytest.fixture
def scores() -> pd.DataFrame:
    """One layer of 200 neurons."""
    return layer_scores(1)


@pytest.fixture
def flagged(scores: pd.DataFrame) -> pd.DataFrame:
    """The same with two constant neurons and a NaN one."""
    scores.loc[[3, 7, 11], ["wd", "md", "mean", "std"]] = np.nan
    scores.loc[[3, 7, 11], "flag"] = ["constant", "nan", "constant"]
    return scores


@pytest.fixture
def many_scores() -> pd.DataFrame:
    """Four layers of 200 neurons."""
    return pd.concat([layer_scores(block) for block in range(4)], ignore_index=True)


@pytest.fixture
def layers(many_scores: pd.DataFrame) -> pd.DataFrame:
    names = many_scores["layer"].unique()
    return pd.DataFrame({"layer": names, "null_floor": 0.013, "null_floor_high": 0.019})


@pytest.fixture(autouse=True)
def untouched_globals() -> Iterator[None]:
    """Fail any test after which matplotlib's settings or pyplot's figures differ."""
    before, figures = dict(rcParams), plt.get_fignums()
    yield
    changed = {name for name, value in rcParams.items() if before[name] != value}
    left = plt.get_fignums()
    plt.close("all")
    assert not changed
    assert left == figures == []
