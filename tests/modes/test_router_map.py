import numpy as np
import pytest
import torch

from entangle.experts.row_measures import Clusters
from entangle.modes import pairs
from entangle.modes.pairs import RouterMap
from tests.modes.stores import normal, store_of

CPU = torch.device("cpu")


def test_places_against_singular_vectors() -> None:
    tokens = normal(70, 6) * torch.tensor([5.0, 2, 1, 0.5, 0.2, 0.1]) + 3
    labels = torch.arange(70) % 4
    rows = RouterMap(store_of(tokens), CPU, seed=0).rows(Clusters.of(labels, 4))
    assert rows["position"].tolist() == list(range(70))
    assert rows["cluster"].tolist() == labels.tolist()
    assert (rows["experts"] == 4).all()
    centred = (tokens - tokens.mean(0)).double().numpy()
    _, _, directions = np.linalg.svd(centred)
    for column, direction in zip(("x", "y"), directions, strict=False):
        sign = np.sign(direction[np.abs(direction).argmax()])
        np.testing.assert_allclose(rows[column], sign * centred @ direction, atol=1e-4)


def test_a_sample_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAP_TOKENS", 20)
    tokens, clusters = normal(70, 3), Clusters.of(torch.arange(70) % 2, 2)
    one, again, other = (
        RouterMap(store_of(tokens), CPU, seed=seed).rows(clusters) for seed in (0, 0, 1)
    )
    assert len(one) == 20
    assert one["position"].is_monotonic_increasing
    assert one["position"].is_unique
    assert (one["cluster"] == one["position"] % 2).all()
    assert one.equals(again)
    assert not one["position"].equals(other["position"])


def test_one_feature_has_no_second_component() -> None:
    tokens = normal(9, 1)
    clusters = Clusters.of(torch.zeros(9, dtype=torch.int64), 1)
    rows = RouterMap(store_of(tokens), CPU, seed=0).rows(clusters)
    np.testing.assert_allclose(rows["x"], (tokens - tokens.mean())[:, 0], atol=1e-6)
    assert (rows["y"] == 0).all()
