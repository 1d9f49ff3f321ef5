import numpy as np
import pandas as pd
import pytest
import torch

from entangle.experts.rows import Clusters
from entangle.modes.groups import CommonBins, histogram_rows, output_histogram
from tests.modes.stores import normal
from tests.reference.decomposition import count_between


def whole(outputs: torch.Tensor) -> Clusters:
    return Clusters.of(torch.zeros(outputs.shape[1], dtype=torch.int64), 1)


def test_against_plain_counting() -> None:
    dense = normal(2, 300) * torch.tensor([[1.0], [30.0]]) + torch.tensor([[0.0], [5.0]])
    sparse = dense + 0.7 * normal(2, 300, name="noise")
    labels = torch.arange(300) % 3
    clusters = Clusters.of(labels, 3)
    common = CommonBins(dense)
    for outputs in (dense, sparse):
        rows = pd.concat(histogram_rows(common, (4, 9), outputs, clusters))
        for place, neuron in enumerate((4, 9)):
            for cluster in (-1, 0, 1, 2):
                own = rows.query(f"neuron == {neuron} and cluster == {cluster}")
                values = outputs[place][labels == cluster] if cluster >= 0 else outputs[place]
                assert own["count"].sum() == len(values)
                for bin_ in own.to_dict("records"):
                    edge = 1e-5 * (bin_["right"] - bin_["left"])
                    low = count_between(values.tolist(), bin_["left"] + edge, bin_["right"] - edge)
                    high = count_between(values.tolist(), bin_["left"] - edge, bin_["right"] + edge)
                    assert low <= bin_["count"] <= high


def test_by_hand() -> None:
    """Outputs 0…8: the median is 4 and the unit 4; 16 bins a unit around the median."""
    outputs = torch.arange(9.0)[None]
    (all_tokens, only) = histogram_rows(CommonBins(outputs), (0,), outputs, whole(outputs))
    assert all_tokens.drop(columns="cluster").equals(only.drop(columns="cluster"))
    assert (all_tokens["cluster"].iloc[0], only["cluster"].iloc[0]) == (-1, 0)
    filled = only[only["count"] > 0]
    assert filled["left"].tolist()[4:8] == [4.0, 5.0, 6.0, 7.0]
    assert (filled["right"] - filled["left"]).tolist()[4:8] == [0.25] * 4
    assert filled["left"].iloc[8] == 8.0
    assert filled["right"].iloc[8] == 8.5  # beyond one unit the bins are twice as wide
    assert only["left"].tolist()[1:] == only["right"].tolist()[:-1]


def test_edges_do_not_depend_on_what_is_counted() -> None:
    dense = normal(1, 200)
    common, clusters = CommonBins(dense), whole(dense)
    near, far = (next(histogram_rows(common, (0,), dense * s, clusters)) for s in (1.0, 5.0))
    inside = far["left"].isin(near["left"])
    assert inside.sum() > 10
    between = far[(far["left"] >= near["left"].min()) & (far["right"] <= near["right"].max())]
    assert between["left"].isin(near["left"]).all()


def test_an_empty_cluster_has_no_histogram() -> None:
    outputs = normal(1, 20)
    rows = list(
        histogram_rows(CommonBins(outputs), (0,), outputs, Clusters.of(torch.ones(20).long(), 3))
    )
    assert [int(one["cluster"].iloc[0]) for one in rows] == [-1, 1]


@pytest.mark.parametrize(
    "values", [torch.full((1, 30), 2.5), torch.zeros(1, 1), torch.tensor([[0.0] * 29 + [7.0]])]
)
def test_outputs_that_hardly_vary(values: torch.Tensor) -> None:
    rows = next(histogram_rows(CommonBins(values), (0,), values, whole(values)))
    assert rows["count"].sum() == values.shape[1]
    assert np.isfinite(rows[["left", "right"]]).all().all()
    first = rows.iloc[0]
    assert first["left"] <= float(values.min()) < first["right"]


def test_the_histogram_of_one_neuron_is_that_of_all_its_tokens() -> None:
    outputs = (3.0 * normal(1, 500) - 2.0).to(torch.float32)
    alone = output_histogram(outputs[0].numpy())
    assert list(alone.columns) == ["left", "right", "count"]
    assert alone["count"].sum() == 500
    assert np.array_equal(alone["right"][:-1], alone["left"][1:])
    values = outputs[0].double().tolist()
    inside = [count_between(values, a, b) for a, b in zip(alone.left, alone.right, strict=True)]
    assert np.abs(alone["count"] - inside).max() <= 1  # a token on a border


@pytest.mark.parametrize("n", [1, 7])
def test_the_histogram_of_a_constant_neuron_is_one_bin(n: int) -> None:
    alone = output_histogram(np.full(n, 0.25, dtype=np.float32))
    assert alone["count"].tolist() == [n]
