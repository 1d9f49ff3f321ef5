import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from entangle.errors import InvalidInput, NumericalError
from entangle.stats.gram import PANEL, ClusterGrams, Gram, require_finite, sum_grams
from tests.reference import routing as reference


def tokens(count: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [1, 7, PANEL, PANEL + 44])
def test_gram_equals_the_sum_of_outer_products(features: int, dtype: torch.dtype) -> None:
    x = tokens(50, features) + 1.0
    gram = Gram(features, dtype=dtype)
    for batch in x.split(17):
        gram.update(batch)
    result = gram.result()
    expected = reference.gram(x.double().numpy())
    np.testing.assert_allclose(result.gram.double().numpy(), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(result.total, x.double().sum(0), rtol=1e-12)
    np.testing.assert_allclose(result.mean, x.double().mean(0), rtol=1e-12)
    assert result.count == 50
    assert result.gram.dtype == dtype
    assert torch.equal(result.gram, result.gram.mT)


def test_by_hand() -> None:
    gram = Gram(2)
    gram.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    result = gram.result()
    assert result.gram.tolist() == [[10.0, 14.0], [14.0, 20.0]]
    assert result.mean.tolist() == [2.0, 3.0]


def test_clusters_by_hand() -> None:
    grams = ClusterGrams(3, 2)
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
    grams.update(x, torch.tensor([2, 0, 2]))
    result = grams.result()
    assert result.gram[0].tolist() == [[4.0, 2.0], [2.0, 1.0]]
    assert result.gram[1].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert result.gram[2].tolist() == [[1.0, 0.0], [0.0, 9.0]]
    assert result.total.tolist() == [[2.0, 1.0], [0.0, 0.0], [1.0, 3.0]]
    assert result.count.tolist() == [1, 0, 2]
    assert result.overall().gram.tolist() == [[5.0, 2.0], [2.0, 10.0]]
    assert result.overall().count == 3


def test_sets_of_tokens_are_summed_by_themselves() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
    grams = sum_grams([[x[1:2]], [], iter([x[:1], x[2:]])], 2, device=torch.device("cpu"))
    assert grams.tolist() == [[[4.0, 2.0], [2.0, 1.0]], [[0.0] * 2] * 2, [[1.0, 0.0], [0.0, 9.0]]]
    wide = tokens(50, PANEL + 44)
    (found,) = sum_grams([wide.split(17)], PANEL + 44, device=torch.device("cpu"))
    np.testing.assert_allclose(found, reference.gram(wide.double().numpy()), rtol=1e-5, atol=1e-4)
    assert torch.equal(found, found.mT)
    with pytest.raises(NumericalError, match=r"\b1\b.*\b50\b.*float32"):
        sum_grams(
            [[wide.index_fill(0, torch.tensor(3), torch.inf)]], PANEL + 44, device=wide.device
        )


@given(seed=st.integers(0, 1000), k=st.integers(1, 6), size=st.integers(1, 40))
def test_clusters_equal_one_gram_per_cluster(seed: int, k: int, size: int) -> None:
    x = tokens(40, 5, seed)
    labels = torch.randint(0, k, (40,), generator=torch.Generator().manual_seed(seed))
    grams = ClusterGrams(k, 5)
    for batch, part in zip(x.split(size), labels.split(size), strict=True):
        grams.update(batch, part)
    result = grams.result()
    for cluster in range(k):
        members = x[labels == cluster].double().numpy()
        np.testing.assert_allclose(
            result.gram[cluster].numpy(), reference.gram(members), rtol=1e-5, atol=1e-5
        )
        assert result.count[cluster] == len(members)
    np.testing.assert_allclose(result.total, [x[labels == c].double().sum(0) for c in range(k)])


def test_integers_are_exact_in_any_chunking_and_order() -> None:
    x = torch.randint(-9, 10, (64, 300), generator=torch.Generator().manual_seed(0)).float()
    expected = (x.double().mT @ x.double()).tolist()
    for size, order in ((1, slice(None)), (13, torch.randperm(64)), (64, slice(None))):
        gram = Gram(300)
        for batch in x[order].split(size):
            gram.update(batch)
        assert gram.result().gram.tolist() == expected


def test_merge_equals_both_at_once() -> None:
    x, labels = tokens(60, 9), torch.arange(60) % 4
    both, one, two = (ClusterGrams(4, 9, dtype=torch.float64) for _ in range(3))
    both.update(x[:25], labels[:25])
    both.update(x[25:], labels[25:])
    one.update(x[:25], labels[:25])
    two.update(x[25:], labels[25:])
    one.merge(two)
    for name in ("gram", "total", "count"):
        assert torch.equal(getattr(one.result(), name), getattr(both.result(), name)), name


def test_merge_of_single_grams() -> None:
    one, two = Gram(3), Gram(3)
    one.update(torch.eye(3))
    two.update(2 * torch.eye(3))
    one.merge(two)
    assert one.result().gram.tolist() == (5 * torch.eye(3)).tolist()
    assert one.result().count == 6


def test_a_result_never_changes() -> None:
    gram = Gram(2)
    gram.update(torch.ones(3, 2))
    before = gram.result()
    gram.update(torch.ones(1, 2))
    other = Gram(2)
    other.merge(gram)
    assert before.gram.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert gram.result().gram.tolist() == other.result().gram.tolist() == [[4.0, 4.0], [4.0, 4.0]]
    assert (before.count, before.total.tolist()) == (3, [3.0, 3.0])


def test_inputs_are_left_alone_and_half_precision_is_widened() -> None:
    x = tokens(8, 4).bfloat16()
    before = x.clone()
    gram = Gram(4)
    gram.update(x)
    assert torch.equal(x, before)
    wide = Gram(4)
    wide.update(x.float())
    assert torch.equal(gram.result().gram, wide.result().gram)


def test_no_tokens() -> None:
    gram = Gram(3)
    gram.update(torch.empty(0, 3))
    result = gram.result()
    assert result.count == 0
    assert result.gram.tolist() == torch.zeros(3, 3).tolist()
    assert result.mean.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tokens_are_counted_and_refused(value: float) -> None:
    x = torch.ones(5, 3)
    x[1, 2] = x[4, 0] = x[4, 1] = value
    gram = Gram(3)
    gram.update(torch.ones(2, 3))
    with pytest.raises(NumericalError, match=r"\b2\b.*\b5\b.*\bNaN\b.*float32"):
        gram.update(x)
    assert gram.result().count == 2
    assert gram.result().gram.tolist() == torch.full((3, 3), 2.0).tolist()


def test_overflowing_squares_are_refused() -> None:
    with pytest.raises(NumericalError, match=r"\b1e\+30\b.*float32"):
        require_finite(torch.full((2, 2), 1e30))


def test_wrong_shapes_and_clusters_are_refused() -> None:
    grams = ClusterGrams(2, 3)
    with pytest.raises(InvalidInput, match=r"`batch`.*\b3\b.*\(4, 2\)"):
        grams.update(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    for label in (-1, 2):
        with pytest.raises(InvalidInput, match=r"`assignment`.*\[0, 2\)"):
            grams.update(torch.ones(1, 3), torch.tensor([label]))
    with pytest.raises(InvalidInput, match=r"\(2, 3, 3\).*\(2, 4, 4\)"):
        grams.merge(ClusterGrams(2, 4))
    with pytest.raises(InvalidInput, match=r"`k`.*\b1\b.*\b0\b.*\b3\b"):
        ClusterGrams(0, 3)
    assert grams.result().count.tolist() == [0, 0]
