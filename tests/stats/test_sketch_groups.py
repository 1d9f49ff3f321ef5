import numpy as np
import pytest
import torch

from entangle.stats.sketch import OutputSketch
from entangle.stats.wasserstein import shape_statistics
from tests.reference.wasserstein import jackknife
from tests.stats.outputs import SMOOTH, assert_same, columns, grouped


def test_groups_may_come_interleaved_unordered_and_leave_some_empty() -> None:
    y = columns(SMOOTH, 4096)
    parts = y.tensor_split(8)
    in_order = OutputSketch(y.shape[1], n_groups=8)
    for i in (0, 4, 1, 5, 2, 6):
        in_order.update(parts[i], group=i % 4)
    mixed = OutputSketch(y.shape[1], n_groups=8)
    for i in (0, 1, 2, 4, 5, 6):
        mixed.update(parts[i], group=(7, 0, 5)[i % 4])  # the same three groups by other names
    one, two = in_order.result(), mixed.result()
    assert torch.equal(one.counts, two.counts)
    torch.testing.assert_close(one.wd_se, two.wd_se, rtol=1e-9, atol=0)


def test_the_first_group_need_not_be_zero() -> None:
    y = columns(SMOOTH, 2000)
    one = grouped(y, [0, 0, 1, 1]).result()
    two = grouped(y, [5, 5, 6, 6]).result()
    assert_same(one, two, tol=1e-12)


def test_standard_error_agrees_with_leaving_groups_out_exactly() -> None:
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(8), 3))  # 24 chunks of 500 tokens
    shapes = {k: SMOOTH[k] for k in ("t3", "skewed", "bimodal")}
    y = columns(shapes, 12_000)
    shift = np.repeat(0.5 * rng.standard_normal(8)[labels], 500)
    y[:, 1:] += torch.from_numpy(shift).float()[:, None]  # groups that differ, like real texts
    found = grouped(y, labels.tolist()).result()
    groups = np.repeat(labels, 500)
    exact = [jackknife(column, groups) for column in y.T.double().numpy()]
    # Each leave-one-out WD is off by the error of bins of an eighth of the core width, nearly the
    # same for all of them. The core of the bimodal one is as wide as the gap between its modes, so
    # its bins are six times as wide as a mode needs. (Eight groups leave a relative standard
    # deviation of 1/√14 = 0.27 in any jackknife.)
    np.testing.assert_allclose(found.wd_se.numpy()[:2], exact[:2], rtol=0.05)
    np.testing.assert_allclose(found.wd_se.numpy()[2], exact[2], rtol=0.25)
    without = [shape_statistics(y[groups != group].T).wd for group in range(8)]
    assert (found.wd_without - torch.stack(without)).abs().max() < 1e-2


def test_halves_agree_with_the_exact_distance() -> None:
    labels = [3, 1, 6, 3, 4, 1]  # groups in use: 1, 3, 4, 6; the first half is 1 and 4
    y = columns({k: SMOOTH[k] for k in ("t3", "skewed", "bimodal")}, 12_000)
    found = grouped(y, labels).result()
    groups = np.repeat(labels, 2000)
    for half, members in enumerate(([1, 4], [3, 6])):
        exact = shape_statistics(y[np.isin(groups, members)].T).wd
        error = (found.wd_halves[half] - exact).abs()
        assert (error < torch.tensor([3e-3, 3e-3, 1e-2])).all()  # bins of an eighth of the core


@pytest.mark.parametrize("shared", [False, True])
def test_standard_error_agrees_with_the_spread_over_data_sets(shared: bool) -> None:
    # 300 columns are 300 independent data sets of one skewed distribution: the spread of their WD
    # is the truth that the jackknife estimates, on 8 groups with a relative noise of about a
    # quarter a column. Grouped: tokens of a group share a shift, which independent tokens miss.
    rng = np.random.default_rng(2)
    y = rng.exponential(size=(8, 500, 300))
    if shared:
        y = y + 0.5 * rng.standard_normal((8, 1, 300))
    outputs = torch.from_numpy(y.reshape(4000, 300)).float()
    found = grouped(outputs, list(range(8))).result()
    truth = float(found.shape.wd.std())
    estimate = float(found.wd_se.square().mean().sqrt())
    assert 0.8 < estimate / truth < 1.3, (estimate, truth)


def test_a_group_without_spread_gives_no_error_rather_than_a_wrong_one() -> None:
    y = torch.zeros(2000, 1)
    y[:1000] = torch.from_numpy(np.random.default_rng(0).standard_normal((1000, 1))).float()
    found = grouped(y, [0, 1]).result()
    assert found.shape.wd.isfinite().all()
    assert found.wd_halves.isfinite().tolist() == [[True], [False]]
    assert found.wd_se.isnan().all()
