import numpy as np
import pytest
import torch

from entangle.experts.rows import ClusterPairs
from entangle.modes import pairs
from entangle.modes.pairs import draw_all, near_pairs, separated_rows
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.words import TokenText
from tests.modes.stores import normal, store_of
from tests.reference import decomposition as reference

COLUMNS = [
    "neuron", "rank", "position_a", "token_a", "context_a", "start_a", "end_a", "output_a",
    "position_b", "token_b", "context_b", "start_b", "end_b", "output_b", "input_distance",
    "cosine", "output_distance",
]  # fmt: skip


@pytest.mark.parametrize("near", [0.02, 0.3, 1.0])
def test_near_pairs_against_plain_loops(near: float) -> None:
    tokens = normal(80, 4)
    tokens[1] = tokens[0]  # the same input: no pair
    drawn = draw_all(store_of(tokens), seed=0)
    found = near_pairs(store_of(tokens), drawn, near=near, seed=0)
    radius = float(np.quantile(drawn.distance.double(), near))
    expected = reference.near_pairs(tokens.double().numpy(), radius)
    assert [(int(a), int(b)) for a, b in found] == expected
    assert (0, 1) not in expected
    assert len(found) == pytest.approx(near * 80 * 79 / 2, rel=0.6, abs=60)


def test_a_long_text_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "PAIR_TOKENS", 50)
    tokens = normal(200, 4)
    drawn = draw_all(store_of(tokens), seed=0)
    found = near_pairs(store_of(tokens), drawn, near=0.5, seed=0)
    with store_of(tokens, memory=0) as spilled:
        again = near_pairs(spilled, drawn, near=0.5, seed=0)
    other = near_pairs(store_of(tokens), drawn, near=0.5, seed=1)
    assert len(np.unique(found)) == 50
    assert np.array_equal(found, again)
    assert not np.array_equal(found, other)


def test_no_pairs_of_one_input() -> None:
    tokens = torch.ones(10, 3)
    drawn = draw_all(store_of(tokens), seed=0)
    assert near_pairs(store_of(tokens), drawn, near=0.5, seed=0).shape == (0, 2)


def test_farthest_pairs_against_plain_loops() -> None:
    tokens, outputs = normal(60, 4), normal(2, 60, name="outputs")
    store = store_of(tokens)
    near = near_pairs(store, draw_all(store, seed=0), near=0.3, seed=0)
    ids = CalibrationSet(torch.arange(60).view(6, 10), "", {})
    rows = separated_rows(outputs, (5, 3), near, store, ids, TokenText(None), most=12, window=2)
    assert rows.columns.tolist() == COLUMNS
    x = tokens.double().numpy()
    for place, neuron in enumerate((5, 3)):
        y = outputs[place].double().numpy()
        own = rows[rows["neuron"] == neuron]
        pairs = list(zip(own["position_a"], own["position_b"], strict=True))
        assert pairs == reference.farthest(y.tolist(), [(int(a), int(b)) for a, b in near])[:12]
        assert own["rank"].tolist() == list(range(12))
        for row in own.to_dict("records"):
            a, b = row["position_a"], row["position_b"]
            assert row["output_a"] == y[a] < y[b] == row["output_b"]
            assert row["output_distance"] == pytest.approx((y[b] - y[a]) / y.std())
            assert row["input_distance"] == pytest.approx(np.linalg.norm(x[a] - x[b]))
            cosine = x[a] @ x[b] / np.linalg.norm(x[a]) / np.linalg.norm(x[b])
            assert row["cosine"] == pytest.approx(cosine)


def test_by_hand() -> None:
    """Tokens 2 and 3 are near and far apart; 0 and 1 near and a little apart; 4 is alone."""
    tokens = torch.tensor([[0.0, 1], [0.1, 1], [5, 1], [5.1, 1], [99, 1], [0, 50]])
    outputs = torch.tensor([[0.0, 1, 9, 2, 100, -40]])
    drawn = ClusterPairs(torch.tensor([[0], [1]]), torch.tensor([0.2]), (1,))
    near = near_pairs(store_of(tokens), drawn, near=1.0, seed=0)
    assert near.tolist() == [[0, 1], [2, 3]]
    ids = CalibrationSet(torch.tensor([[10, 11, 12], [13, 14, 15]]), "", {})
    rows = separated_rows(
        outputs, (8,), near, store_of(tokens), ids, TokenText(None), most=5, window=2
    ).to_dict("records")
    assert [(row["position_a"], row["position_b"]) for row in rows] == [(3, 2), (0, 1)]
    first = rows[0]
    assert (first["token_a"], first["context_a"], first["start_a"], first["end_a"]) == (
        "13", "13 14 15", 0, 2
    )  # fmt: skip
    assert (first["token_b"], first["context_b"], first["start_b"], first["end_b"]) == (
        "12", "10 11 12", 6, 8
    )  # fmt: skip


def test_equal_outputs_are_not_separated() -> None:
    tokens = normal(20, 3)
    near = np.array([[0, 1], [2, 3]])
    ids = CalibrationSet(torch.arange(20)[None], "", {})
    rows = separated_rows(
        torch.ones(1, 20), (0,), near, store_of(tokens), ids, TokenText(None),
        most=5, window=1,
    )  # fmt: skip
    assert len(rows) == 0
