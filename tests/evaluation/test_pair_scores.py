"""Accuracies of minimal pairs: by hand, against resampling one by one, and on edges."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.evaluation import MinimalPairs, PairScores, accuracy_difference
from tests.reference import minimal_pairs as reference


def _scores(margins: Sequence[float], paradigms: Sequence[str]) -> PairScores:
    n = len(margins)
    texts = [tuple(f"{kind} {i}" for i in range(n)) for kind in ("good", "bad")]
    pairs = MinimalPairs(texts[0], texts[1], tuple(paradigms), "here", {})
    return PairScores(np.array(margins) - 5.0, np.full(n, -5.0), pairs, {"rule": "test"})


def _random(seed: int, shares: Sequence[float], sizes: Sequence[int]) -> PairScores:
    rng = np.random.default_rng(seed)
    signs = [
        np.where(rng.random(n) < share, 1.0, -1.0) for share, n in zip(shares, sizes, strict=True)
    ]
    names = [name for name, n in zip("pqrst", sizes, strict=False) for _ in range(n)]
    return _scores(np.concatenate(signs).tolist(), names)


def _rows(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index("paradigm")


def test_table_by_hand() -> None:
    # q: margins 1, -2, 0 (a tie is wrong); p: 3
    got = _scores([1.0, 3.0, -2.0, 0.0], ["q", "p", "q", "q"])
    assert got.correct.tolist() == [True, True, False, False]
    assert (got.accuracy, got.n_ties, got.flag) == (0.5, 1, "")
    table = got.table()
    assert table["paradigm"].tolist() == ["q", "p", "overall", "macro"]
    assert table["n_pairs"].tolist() == [3, 1, 4, 4]
    assert table["n_ties"].tolist() == [1, 0, 1, 1]
    assert table["accuracy"].tolist() == pytest.approx([1 / 3, 1.0, 0.5, 2 / 3])
    assert table["mean_margin"].tolist() == pytest.approx([-1 / 3, 3.0, 0.5, 4 / 3])


def test_wilson_intervals() -> None:
    got = _random(0, [0.9, 0.3], [50, 20])
    table = got.table(level=0.9)
    for row, part in enumerate((got.correct[:50], got.correct[50:], got.correct)):
        ends = reference.wilson(int(part.sum()), len(part), 1.6448536269514722)
        assert (table["low"][row], table["high"][row]) == pytest.approx(ends)


def test_wilson_by_hand() -> None:
    # 10 of 10: the lower end is 1 / (1 + z²/n)
    table = _scores([1.0] * 10, ["p"] * 10).table()
    assert table["low"][0] == pytest.approx(1 / (1 + 1.959963984540054**2 / 10))
    assert table["high"][0] == pytest.approx(1.0)


def test_macro_interval_against_resampling() -> None:
    got = _random(1, [0.5, 0.8, 0.95], [10, 40, 200])
    table = _rows(got.table(n_boot=20000, level=0.8))
    strata = [got.correct[:10], got.correct[10:50], got.correct[50:]]
    values = [part.astype(float).tolist() for part in strata]
    draws = reference.resampled(values, 4000, macro=True)
    low, high = np.quantile(draws, [0.1, 0.9])
    spread = float(np.std(draws))
    assert table.loc["macro", "low"] == pytest.approx(low, abs=0.1 * spread)
    assert table.loc["macro", "high"] == pytest.approx(high, abs=0.1 * spread)
    assert table.loc["macro", "accuracy"] == pytest.approx(np.mean([np.mean(v) for v in values]))


def test_difference_against_resampling() -> None:
    a, b = _random(2, [0.5, 0.8], [15, 150]), _random(3, [0.7, 0.75], [15, 150])
    got = accuracy_difference(a, b, n_boot=20000, level=0.8)
    gaps = a.correct.astype(float) - b.correct
    draws = reference.resampled([gaps[:15].tolist(), gaps[15:].tolist()], 4000, macro=False)
    low, high = np.quantile(draws, [0.1, 0.9])
    assert (got.low, got.high) == pytest.approx((low, high), abs=1.01 / 165)  # a pair
    assert got.value == pytest.approx(a.accuracy - b.accuracy)


def test_resampling_stays_within_paradigms() -> None:
    """Without strata, two paradigms of opposite differences would spread; with them, not."""
    paradigms = ["p"] * 20 + ["q"] * 20
    a, b = (_scores([s] * 20 + [-s] * 20, paradigms) for s in (1.0, -1.0))
    got = accuracy_difference(a, b)
    assert (got.value, got.low, got.high) == (0.0, 0.0, 0.0)


def test_pairing_cancels_what_both_models_find_hard() -> None:
    a = _random(4, [0.5], [300])
    same = accuracy_difference(a, a)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.sampled_from("pqr")), min_size=10),
    st.integers(0, 1000),
)
def test_difference_turns_its_sign(rows: list[tuple[float, float, str]], seed: int) -> None:
    names = [name for *_, name in rows]
    a, b = _scores([x for x, *_ in rows], names), _scores([y for _, y, _ in rows], names)
    plain, turned = (accuracy_difference(x, y, n_boot=2000, seed=seed) for x, y in ((a, b), (b, a)))
    assert turned.value == -plain.value
    assert plain.low <= plain.value + 1e-9
    assert plain.value <= plain.high + 1e-9
    table = a.table(n_boot=50)
    assert not (table["low"] > table["accuracy"] + 1e-9).any()  # NaN where there is no interval
    assert not (table["accuracy"] > table["high"] + 1e-9).any()


def test_difference_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        hard = rng.random(400)
        noise = rng.random((2, 400))
        names = ["p"] * 200 + ["q"] * 200
        a = _scores(np.where(noise[0] < 0.5 * hard + 0.4, 1.0, -1.0).tolist(), names)
        b = _scores(np.where(noise[1] < 0.5 * hard + 0.3, 1.0, -1.0).tolist(), names)
        got = accuracy_difference(a, b, n_boot=200, seed=trial)
        hits += got.low <= 0.1 <= got.high
    assert 0.87 * 100 <= hits <= 100


def test_the_seed_decides() -> None:
    a, b = _random(5, [0.5, 0.6], [40, 40]), _random(6, [0.5, 0.6], [40, 40])
    first = accuracy_difference(a, b, seed=1, n_boot=99)
    assert first == accuracy_difference(a, b, seed=1, n_boot=99)
    assert first != accuracy_difference(a, b, seed=2, n_boot=99)
    pd.testing.assert_frame_equal(a.table(seed=1), a.table(seed=1))
    ends = [_rows(a.table(seed=seed, n_boot=99)).loc["macro", "low"] for seed in range(4)]
    assert len(set(ends)) > 1


@pytest.mark.filterwarnings("error")
def test_impossible_and_nan_sentences() -> None:
    pairs = MinimalPairs(("a", "b", "c"), ("x", "y", "z"), ("p",) * 3, "here", {})
    good, bad = np.array([-math.inf, -1.0, math.nan]), np.array([-math.inf, -math.inf, -1.0])
    got = PairScores(good, bad, pairs, {})
    assert got.correct.tolist() == [False, True, False]
    assert (got.n_ties, got.flag) == (1, "nan")
    table = got.table()
    assert table["accuracy"].tolist() == pytest.approx([1 / 3] * 3)
    assert table["mean_margin"].isna().all()


def test_one_pair() -> None:
    one = _scores([2.0], ["p"])
    table, difference = one.table(), accuracy_difference(one, one)
    assert np.isnan([table["low"][2], table["high"][2], difference.low, difference.high]).all()
    assert difference.value == 0.0
    assert table["accuracy"].tolist() == [1.0] * 3
    assert table["low"][0] < 0.5


def test_description_and_immutability() -> None:
    good = np.array([-1.0])
    pairs = MinimalPairs(("a",), ("b",), ("p",), "here", {})
    got = PairScores(good, np.array([-2.0]), pairs, {"rule": "test"})
    good[0] = -9.0
    assert got.good.tolist() == [-1.0]
    with pytest.raises(ValueError, match="read-only"):
        got.good[0] = 0.0
    described = got.describe()
    assert described == {"pairs": pairs.describe(), "scoring": {"rule": "test"}}
    assert json.loads(json.dumps(described)) == described


def test_what_is_refused() -> None:
    a, b = _scores([1.0], ["p"]), _scores([1.0], ["q"])
    with pytest.raises(InvalidInput, match=r"same pairs.*digests"):
        accuracy_difference(a, b)
    with pytest.raises(InvalidInput, match=r"`good`.*\b1\b.*\(2,\)"):
        PairScores(np.zeros(2), np.zeros(1), a.pairs, {})
    for options in ({"n_boot": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(InvalidInput, match=r"`(n_boot|level)`"):
            accuracy_difference(a, a, **options)
        with pytest.raises(InvalidInput, match=r"`(n_boot|level)`"):
            a.table(**options)
