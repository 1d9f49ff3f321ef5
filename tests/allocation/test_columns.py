import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from entangle.allocation.allocation import LayerRows
from entangle.allocation.request import Columns, gather
from entangle.errors import InvalidInput, UnknownName

ROWS = LayerRows(("a", "b"), (0, None), np.array([3, 2]), np.array([4, 10]))


def frame(**columns: object) -> pd.DataFrame:
    base = {"layer": ["a", "a", "a", "b", "b"], "neuron": [0, 1, 2, 0, 1], "block": [0, 0, 0, 1, 1]}
    return pd.DataFrame(base | columns)


def columns(**given: object) -> Columns:
    return gather(frame(**given), ROWS)


def test_rows_by_hand() -> None:
    assert ROWS.starts.tolist() == [0, 3]
    assert ROWS.weights.tolist() == [4, 4, 4, 10, 10]
    assert ROWS.layer.tolist() == [0, 0, 0, 1, 1]
    assert ROWS.n_weights == 32
    assert ROWS.groups.tolist() == [0, 1]
    assert ROWS.mean(np.array([1.0, 2, 3, 4, 6])).tolist() == [2, 5]
    assert ROWS.spread(np.array([1.0, 2])).tolist() == [1, 1, 1, 2, 2]
    parts = ROWS.split(np.arange(5))
    assert parts["a"].tolist() == [0, 1, 2]
    assert parts["b"].tolist() == [3, 4]
    assert ROWS.join(ROWS.split_reals(np.arange(5.0))).tolist() == [0, 1, 2, 3, 4]


def test_layers_of_one_block_are_a_group_and_others_stand_alone() -> None:
    sizes = np.ones(5, dtype=np.int64)
    rows = LayerRows(tuple("abcde"), (0, 0, None, 3, None), sizes, sizes)
    assert rows.groups.tolist() == [0, 0, 1, 2, 3]


def test_order_of_the_scores_does_not_matter() -> None:
    wd = [1.0, 2, 3, 4, 5]
    shuffled = frame(wd=wd).sample(frac=1, random_state=0)
    other = pd.DataFrame({"layer": ["z"], "neuron": [0], "wd": [9.0]})
    found = gather(pd.concat([other, shuffled]), ROWS)
    assert found.values("wd").tolist() == wd


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (frame().iloc[:-1], r"\b2\b.*'b'.*\b1\b"),
        (frame().iloc[:3], r"\b2\b.*'b'"),
        (pd.concat([frame(), frame().iloc[:1]]), r"'a'.*\b4\b.*row"),
        (frame().assign(neuron=[0, 1, 1, 0, 1]), r"\b3\b.*'a'"),
        (frame().assign(neuron=[0, 1, 3, 0, 1]), r"\b3\b.*'a'"),
        (frame().drop(columns="neuron"), r"'neuron'.*missing"),
        (frame().drop(columns="layer"), r"'layer'.*missing"),
    ],
)
def test_scores_of_another_shape(wrong: pd.DataFrame, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        gather(wrong, ROWS)


def test_a_missing_value_becomes_its_layers_mean() -> None:
    found = columns(wd=[1.0, np.nan, 3, np.inf, 8])
    assert found.values("wd").tolist() == [1, 2, 3, 8, 8]
    assert found.missing("wd") == 2
    empty = columns(wd=[1.0, 2, 6, np.nan, np.nan])
    assert empty.values("wd").tolist() == [1, 2, 6, 3, 3]
    with pytest.raises(InvalidInput, match=r"'wd'.*\b5\b"):
        columns(wd=[np.nan] * 5).values("wd")


def test_columns_that_cannot_be_used() -> None:
    found = columns(wd=[1.0, 2, 3, 4, 5], flag=["", "nan", "", "", ""])
    for name in ("weight", "flag", "layer", "neuron", "block"):
        with pytest.raises(UnknownName, match=f"'{name}'"):
            found.values(name)
    with pytest.raises(InvalidInput, match=r"combine 'sum'.*zscore"):
        found.combined(["wd"], combine="sum", across_layers=True)
    with pytest.raises(InvalidInput, match=r"`by`.*column"):
        found.combined([], combine="rank", across_layers=True)


def test_combinations_against_scipy_layer_by_layer() -> None:
    rng = np.random.default_rng(0)
    wd, md = rng.normal(size=5), rng.integers(3, size=5).astype(float)
    found = columns(wd=wd, md=md)
    assert found.combined(["wd"], combine="rank", across_layers=True).tolist() == wd.tolist()
    for across, parts in ((True, [slice(0, 5)]), (False, [slice(0, 3), slice(3, 5)])):
        z = found.combined(["wd", "md"], combine="zscore", across_layers=across)
        ranks = found.combined(["wd", "md"], combine="rank", across_layers=across)
        for part in parts:
            scaled = [
                (one[part] - one[part].mean()) / (one[part].std() or np.inf) for one in (wd, md)
            ]
            assert z[part] == pytest.approx(np.mean(scaled, axis=0))
            ranked = [(rankdata(one[part]) - 0.5) / len(one[part]) for one in (wd, md)]
            assert ranks[part] == pytest.approx(np.mean(ranked, axis=0))


def test_z_scores_do_not_depend_on_units() -> None:
    rng = np.random.default_rng(1)
    wd = rng.lognormal(size=5)
    first = columns(wd=wd).zscores(wd, across_layers=False)
    again = columns(wd=wd).zscores(1e6 * wd + 3e6, across_layers=False)
    assert first == pytest.approx(again, rel=1e-6)


def test_equal_values_have_no_z_score() -> None:
    found = columns(wd=[0.1] * 5)
    for across in (True, False):
        assert found.zscores(found.values("wd"), across_layers=across).tolist() == [0] * 5
