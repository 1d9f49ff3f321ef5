"""Frames as scoring writes them, small and made by hand-set generators."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib import rcParams
from numpy.typing import NDArray

from tests.plotting.decomposition_frames import Decomposed, decompose_made_up


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


DENSE = 20.0


def model(method: str, percent: int, experts: int, ratio: float) -> dict[str, object]:
    """A row of a comparison in which 60 % of all weights are pruned; a router takes 0.006."""
    kept, others = 0.6 * (1.0 - percent / 100.0), 0.4
    routed = method.startswith("expansion")
    return {
        "method": method,
        "sparsity": percent / 100.0,
        "experts": experts,
        "perplexity": DENSE * ratio,
        "ratio": ratio,
        "ratio_low": 0.9 * ratio if percent else 1.0,
        "ratio_high": 1.2 * ratio if percent else 1.0,
        "flops": others + kept + 0.007 * routed,
        "nonzeros": others + kept * experts,
        "bytes": others + kept * experts + 0.02,
        "relative_error": 0.1,
        "seconds": 50.0,
    }


@pytest.fixture
def comparison() -> pd.DataFrame:
    """Dense, three plain methods (one model infinite, three above 100 × dense) and an expansion."""
    rows = [model("dense", 0, 1, 1.0)]
    ratios = {
        ("magnitude", 1): (7.13, 45.4, 791.0, np.inf),
        ("wanda", 1): (1.6, 3.28, 29.9, 7041.0),
        ("sparsegpt", 1): (1.4, 2.15, 5.66, 134.4),
        ("expansion", 16): (1.3, 1.81, 3.78, 19.4),
    }
    for place, percent in enumerate((50, 60, 70, 80)):
        rows += [model(name, percent, k, r[place]) for (name, k), r in ratios.items()]
    return pd.DataFrame(rows)


@pytest.fixture
def many_experts(comparison: pd.DataFrame) -> pd.DataFrame:
    """The same and two routers at 2 to 32 experts."""
    rows = [
        model(method, percent, k, 1.0 + percent / 50.0 / (1.0 + k / 40.0))
        for percent in (50, 70)
        for method in ("expansion", "expansion-random")
        for k in (2, 4, 8, 16, 32)
    ]
    plain = comparison[comparison["experts"] == 1]
    return pd.concat([plain, pd.DataFrame(rows)], ignore_index=True)


@pytest.fixture
def decomposed() -> Decomposed:
    """Tables of a decomposition of one layer, two of whose neurons were looked at closely."""
    made = decompose_made_up()
    return Decomposed(**{name: table.copy() for name, table in vars(made).items()})


def allocated() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Layers and rows of an allocation, with experts."""
    layers = [
        {"layer": f"{block}.{name}", "block": block, "projection": name, "rows": 40,
         "in_features": 10, "zeros": 4 * (50 + 3 * block), "sparsity": 0.5 + 0.03 * block,
         "experts": 1 + block}
        for block in range(12)
        for name in ("gate_proj", "down_proj")
    ]  # fmt: skip
    return pd.DataFrame(layers), pd.DataFrame({"sparsity": [0.1, *[0.5] * 40, *[0.7] * 3000]})


def expanded() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Layers and costs of an expansion."""
    layers = allocated()[0].assign(relative_error=lambda one: 0.02 + 0.005 * one["block"])
    costs = {"flops": 0.43, "nonzeros": 5.2, "bytes": 6.1}
    return layers, pd.DataFrame(costs.items(), columns=["cost", "multiple"])


def studied() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of a study, and of a trace."""
    frame = pd.DataFrame(
        {"claim": ["a", "b", "c"] * 2, "model": ["one"] * 3 + ["two"] * 3,
         "verdict": ["holds", "weaker", "fails", "holds", "not measured", "fails"]}
    )  # fmt: skip
    step = np.array([1.0, 10.0, 100.0, 1000.0])
    trace = pd.DataFrame(
        {"revision": [f"step{one:g}" for one in step], "place": range(4), "step": step,
         "wd_median": step / 2e4, "wd_top": step / 1e4, "wd_largest": step / 5e3,
         "md_median": 0.7, "overlap": [0.1, 0.3, 0.6, 1.0], "chance": 0.03, "damage": step,
         "damage_random": 1.1, "ratio": step / 1.1, "ratio_low": step / 1.2, "ratio_high": step}
    )  # fmt: skip
    return frame, trace


def evidence() -> pd.DataFrame:
    """Numbers of a study: two models, a claim of ratios in two settings, and one of differences."""
    rows = [
        ("a", "one", "50 %", "random", "main", 1.0, 3.0, 2.0, 5.0),
        ("a", "one", "90 %", "random", "main", 1.0, 30.0, 20.0, 50.0),
        ("a", "one", "50 %", "norm", "control", 1.0, 0.9, 0.8, 1.1),
        ("a", "one", "50 %", "mean", "control", 1.0, 1.5, 1.2, 1.9),
        ("a", "two", "50 %", "random", "main", 1.0, 1.5, 1.4, 1.6),
        ("a", "two", "90 %", "random", "main", 1.0, 0.9, 0.7, 1.1),
        ("b", "one", "", "rank", "main", 0.0, 0.1, -0.1, 0.3),
        ("b", "one", "", "rank, given", "control", 0.5, 0.6, 0.55, 0.7),
        ("b", "two", "", "median", "shown", np.nan, 0.2, np.nan, np.nan),
    ]
    names = ["claim", "model", "setting", "number", "role", "bar", "value", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def differing() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Neurons and agreement of two runs of three blocks; some neurons moved."""
    rng = np.random.default_rng(5)
    a = rng.gamma(2.0, 0.05, 300)
    moved = np.array(["no", "up", "down", "untested"])[rng.integers(4, size=300)]
    frame = pd.DataFrame(
        {"layer": np.repeat([f"{block}.up" for block in range(3)], 100),
         "neuron": np.tile(np.arange(100), 3), "a": a, "b": a + rng.normal(0, 0.01, 300),
         "change": rng.normal(0, 0.01, 300), "change_se": 0.01, "moved": moved}
    )  # fmt: skip
    low = {f"{name}_low": 0.4 for name in ("spearman", "top_3")}
    high = {f"{name}_high": 0.8 for name in ("spearman", "top_3")}
    agreement = pd.DataFrame(
        {"layer": ["0.up", "1.up", "2.up", ""], "block": pd.array([0, 1, 2, None], dtype="Int64"),
         "projection": ["up", "up", "up", ""], "spearman": 0.6, "top_3": 0.5, "ceiling": 0.9,
         **low, **high}
    )  # fmt: skip
    return frame, agreement


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
