from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import InvalidInput, UnknownName
from entangle.results.contrasts import Compared
from entangle.seeding import numpy_rng
from entangle.stats.intervals import FEW, pairs_interval

TEXT = {"digest": "d", "n_tokens": 40, "n_windows": 4}
LOSSES: dict[tuple[str, int | None], list[float]] = {
    ("dense", None): [10.0, 20.0, 10.0, 20.0],
    ("top", None): [20.0, 30.0, 30.0, 40.0],
    ("random", 0): [12.0, 20.0, 11.0, 21.0],
    ("random", 1): [10.0, 22.0, 13.0, 23.0],
}
RIGHT: dict[tuple[str, int | None], list[int]] = {  # pairs 0 to 3 are of paradigm x, 4 and 5 of y
    ("dense", None): [1, 1, 1, 1, 1, 0],
    ("top", None): [0, 1, 0, 0, 0, 1],
    ("random", 0): [1, 1, 1, 0, 1, 0],
    ("random", 1): [1, 1, 0, 1, 1, 1],
}


def _key(selection: str, seed: int | None, strength: float = 0.5) -> dict[str, Any]:
    dense = selection == "dense"
    return {
        "selection": selection, "by": "wd" if selection == "top" else "", "seed": seed,
        "intervention": "dense" if dense else "prune", "strength": 0.0 if dense else strength,
        "experts": 1, "router": "",
    }  # fmt: skip


@pytest.fixture
def windows() -> pd.DataFrame:
    parts = [
        pd.DataFrame({
            "window": range(4), "loss": loss, "kl": [value - 10.0 for value in loss],
            "agreement": [value // 10 for value in loss],
        }).assign(**_key(*arm))
        for arm, loss in LOSSES.items()
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True).astype({"seed": "Int64"})


@pytest.fixture
def pairs() -> pd.DataFrame:
    parts = [
        pd.DataFrame({
            "pair": range(6), "good": [float(value) for value in right], "bad": 0.5,
            "paradigm": list("xxxxyy"),
        }).assign(**_key(*arm))
        for arm, right in RIGHT.items()
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True).astype({"seed": "Int64"})


def _compare(
    windows: pd.DataFrame, pairs: pd.DataFrame, measure: str, a: Any, b: Any, **options: Any
) -> tuple[float, float, float]:
    compared = Compared.of(measure, windows, pairs, TEXT)
    found = compared.interval(
        compared.arm(a), compared.arm(b), **{"level": 0.95, "seed": 0, **options}
    )
    return found.value, found.low, found.high


def test_by_hand(windows: pd.DataFrame, pairs: pd.DataFrame) -> None:
    def value(measure: str, a: Any = "top", b: Any = "random") -> float:
        return _compare(windows, pairs, measure, a, b)[0]

    # losses of top: 120 over 40 tokens; of the random seeds 64 and 68, on average 66
    assert value("perplexity") == pytest.approx(np.exp((120 - 66) / 40))
    assert value("perplexity_ratio", "top", "dense") == pytest.approx(np.exp(60 / 40))
    one = {"selection": "random", "seed": 1}
    assert value("perplexity", "top", one) == pytest.approx(np.exp((120 - 68) / 40))
    assert value("kl") == pytest.approx((80 - 26) / 40)
    assert value("top1_agreement") == pytest.approx(((2 + 3 + 3 + 4) - 6) / 40)
    # correct of six: top 2, random 4 and 5
    assert value("accuracy") == pytest.approx((2 - 4.5) / 6)
    assert value("accuracy", "top", "dense") == pytest.approx((2 - 5) / 6)
    assert value("accuracy:x") == pytest.approx((1 - 3) / 4)
    assert value("accuracy:y") == pytest.approx((1 - 1.5) / 2)
    assert value("accuracy:macro") == pytest.approx(((1 - 3) / 4 + (1 - 1.5) / 2) / 2)


@pytest.mark.parametrize(
    "measure", ["perplexity", "kl", "top1_agreement", "accuracy", "accuracy:x", "accuracy:macro"]
)
def test_the_interval_is_paired(windows: pd.DataFrame, pairs: pd.DataFrame, measure: str) -> None:
    pairs = pd.concat([pairs.assign(pair=pairs["pair"] + 6 * i) for i in range(5)])
    same = 1.0 if measure == "perplexity" else 0.0
    assert _compare(windows, pairs, measure, "top", "top") == (same, same, same)
    value, low, high = _compare(windows, pairs, measure, "top", "dense")
    back = _compare(windows, pairs, measure, "dense", "top")
    assert low < value < high
    turned = [1 / x for x in back] if measure == "perplexity" else [-x for x in back]
    assert turned[0] == pytest.approx(value)
    assert turned[2] < value < turned[1]
    narrow = _compare(windows, pairs, measure, "top", "dense", level=0.5)
    assert low <= narrow[1] <= value <= narrow[2] <= high
    assert narrow[2] - narrow[1] < high - low


def _slow_bootstrap(gaps: list[float], strata: list[str], macro: bool) -> list[float]:
    """Resample pair by pair."""
    rng, draws = np.random.default_rng(5), []
    names = sorted(set(strata))
    for _ in range(4000):
        picked = {
            name: [gaps[i] for i in rng.choice([j for j, s in enumerate(strata) if s == name],
                                               size=strata.count(name))]
            for name in names
        }  # fmt: skip
        means = [sum(own) / len(own) for own in picked.values()]
        everything = [value for own in picked.values() for value in own]
        draws.append(sum(means) / len(means) if macro else sum(everything) / len(everything))
    return draws


@pytest.mark.parametrize("macro", [False, True])
def test_against_resampling_pair_by_pair(macro: bool) -> None:
    rng = numpy_rng(0, "gaps")
    gaps = rng.choice([-1.0, -0.6, 0.0, 0.2, 1.0], size=60, p=[0.3, 0.1, 0.3, 0.2, 0.1])
    strata = ["a"] * 40 + ["b"] * 20
    found = pairs_interval(gaps, np.array(strata), macro=macro, n_boot=4000)
    slow = _slow_bootstrap(gaps.tolist(), strata, macro)
    low, high = np.percentile(slow, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    by_hand = (gaps[:40].mean() + gaps[40:].mean()) / 2 if macro else gaps.mean()
    assert found.value == pytest.approx(by_hand)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=20), st.booleans())
def test_paradigms_of_few_pairs_are_resampled_together(gaps: list[float], macro: bool) -> None:
    """Each by itself, pairs of paradigms of one would leave nothing to resample."""
    values = np.array(gaps)
    found = pairs_interval(values, np.arange(len(gaps)), macro=macro, n_boot=20)
    together = pairs_interval(values, np.zeros(len(gaps)), n_boot=20)
    for one in ("value", "low", "high"):
        assert getattr(found, one) == pytest.approx(getattr(together, one), nan_ok=True, abs=1e-12)
    assert np.isnan(found.low) == np.isnan(found.high) == (len(gaps) < FEW)


def test_a_macro_mean_over_a_paradigm_of_few_pairs() -> None:
    """Against drawing pairs one by one, each weighted by one over its paradigm's size."""
    rng = numpy_rng(1, "gaps")
    gaps, names = rng.choice([0.0, 1.0], size=45), np.array(["a"] * 40 + ["b"] * 5)
    found = pairs_interval(gaps, names, macro=True, n_boot=4000)
    weight = np.where(names == "a", 1 / 40, 1 / 5)
    drawn = rng.integers(45, size=(4000, 45))
    slow = (gaps * weight)[drawn].sum(1) / weight[drawn].sum(1)
    assert (found.low, found.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.03)
    fewer = pairs_interval(gaps[:44], names[:44], macro=True)
    assert np.isnan([fewer.low, fewer.high]).all()
    assert np.isfinite(pairs_interval(gaps[:44], names[:44]).low)


@pytest.mark.parametrize(
    ("measure", "arm", "error", "message"),
    [
        ("taste", "top", UnknownName, r"compare.*'taste'"),
        ("accuracy:z", "top", UnknownName, "'z'"),
        ("perplexity", "bottom", InvalidInput, r"`selection`.*'dense'.*'top'.*'random'"),
        ("perplexity", {"rule": "top"}, UnknownName, "'rule'"),
        ("perplexity", {"selection": "random", "seed": 7}, InvalidInput, r"`seed`.*\[0, 1\]"),
        ("perplexity", {"strength": 0.5}, InvalidInput, r"'strength'.*`selection`"),
    ],
)
def test_what_cannot_be_compared(
    windows: pd.DataFrame, pairs: pd.DataFrame, measure: str, arm: Any, error: type[Exception],
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        _compare(windows, pairs, measure, arm, "dense")


def test_what_was_not_measured_is_named(windows: pd.DataFrame, pairs: pd.DataFrame) -> None:
    nothing = pd.DataFrame({"window": pd.Series(dtype="int64")})
    with pytest.raises(InvalidInput, match=r"measured.*kl"):
        Compared.of("kl", windows.drop(columns="kl"), pairs, TEXT)
    with pytest.raises(InvalidInput, match="no accuracy"):
        Compared.of("accuracy:x", windows, nothing, TEXT)
    old = pairs.drop(columns="paradigm")  # as earlier versions saved them
    assert _compare(windows, old, "accuracy", "top", "dense")[0] == pytest.approx(-0.5)
    with pytest.raises(InvalidInput, match=r"paradigms.*`accuracy`"):
        _compare(windows, old, "accuracy:x", "top", "dense")
    assert [Compared.can(m, windows, old) for m in ("kl", "accuracy", "accuracy:x")] == [
        True, True, False,
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match=r"n_boot.*\b1\b.*\b0\b"):
        _compare(windows, pairs, "accuracy", "top", "dense", n_boot=0)


def test_several_strengths_must_be_told_apart(windows: pd.DataFrame, pairs: pd.DataFrame) -> None:
    weaker = windows[windows["selection"] == "top"].assign(strength=0.9)
    both = pd.concat([windows, weaker], ignore_index=True)
    with pytest.raises(InvalidInput, match=r"`strength`.*\[0\.5, 0\.9\]"):
        _compare(both, pairs, "perplexity", "top", "dense")
    chosen = {"selection": "top", "strength": 0.9}
    assert _compare(both, pairs, "kl", chosen, "dense") == _compare(
        windows, pairs, "kl", "top", "dense"
    )
