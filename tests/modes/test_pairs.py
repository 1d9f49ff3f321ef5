import numpy as np
import pytest
import torch

from entangle.modes.pairs import draw_all, pair_rows
from entangle.stats.mapping_difficulty import mapping_difficulty
from tests.modes.stores import normal, store_of


def test_distances_against_plain_loops() -> None:
    tokens, outputs = normal(60, 5), normal(2, 60, name="outputs")
    rows = pair_rows(outputs, (7, 1), draw_all(store_of(tokens), seed=0), most=30)
    assert rows["neuron"].tolist() == [7] * 30 + [1] * 30
    x, y = tokens.double().numpy(), outputs.double().numpy()
    for place, neuron in enumerate((7, 1)):
        own = rows[rows["neuron"] == neuron]
        used = own[["token_a", "token_b"]].to_numpy()
        assert np.unique(used).size == 60
        for row in own.to_dict("records"):
            a, b = row["token_a"], row["token_b"]
            assert row["input_distance"] == pytest.approx(np.linalg.norm(x[a] - x[b]), rel=1e-5)
            assert row["output_distance"] == pytest.approx(abs(y[place, a] - y[place, b]), rel=1e-4)
        assert own["input_normalised"].max() == 1
        assert own["output_normalised"].median() == pytest.approx(1)


def test_the_mean_ratio_is_the_mapping_difficulty() -> None:
    tokens, outputs = normal(200, 5), normal(1, 200, name="outputs")
    drawn = draw_all(store_of(tokens), seed=3)
    rows = pair_rows(outputs, (0,), drawn, most=100)
    ratio = (rows["output_normalised"] / rows["input_normalised"]).mean()
    md = mapping_difficulty(outputs, drawn.pairs, drawn.distance).md()
    assert ratio == pytest.approx(float(md[0]), rel=1e-5)


def test_fewer_pairs_are_the_first_ones_with_the_same_normalisers() -> None:
    tokens, outputs = normal(60, 5), normal(1, 60, name="outputs")
    drawn = draw_all(store_of(tokens), seed=0)
    some, every = (pair_rows(outputs, (0,), drawn, most=most) for most in (8, 500))
    assert len(every) == 30
    assert some.equals(every.head(8))


def test_identical_inputs_are_left_out() -> None:
    tokens = torch.ones(40, 3)
    tokens[:4] = normal(4, 3)
    rows = pair_rows(normal(1, 40), (0,), draw_all(store_of(tokens), seed=0), most=50)
    assert 2 <= len(rows) <= 4
    assert (rows["input_distance"] > 0).all()


def test_nothing_to_pair() -> None:
    for tokens in (torch.ones(1, 3), torch.ones(10, 3)):
        drawn = draw_all(store_of(tokens), seed=0)
        assert len(pair_rows(normal(1, len(tokens)), (0,), drawn, most=5)) == 0


def test_equal_outputs_have_no_normaliser() -> None:
    drawn = draw_all(store_of(normal(40, 3)), seed=0)
    rows = pair_rows(torch.ones(1, 40), (0,), drawn, most=5)
    assert (rows["output_distance"] == 0).all()
    assert rows["output_normalised"].isna().all()
