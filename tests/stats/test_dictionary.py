"""Pursuit, ITDA and what neurons read, against slow references, hand-made cases and properties."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from sklearn.decomposition import PCA
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.seeding import torch_rng
from entangle.stats.dictionary import (
    PursuitDictionary,
    entropy,
    fit_itda,
    measure_coding,
    participation,
    principal_atoms,
    pursue,
    random_tokens,
    shares_read,
)


def normal(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(*shape, generator=torch_rng(0, name), dtype=torch.float64)


def unit(rows: Tensor) -> Tensor:
    found: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return found


def slow_pursuit(point: np.ndarray, atoms: np.ndarray, active: int) -> np.ndarray:
    """One point, one step after the other, the residual itself."""
    left, codes = point.copy(), np.zeros(len(atoms))
    for _ in range(active):
        along = [float(np.dot(left, atom)) for atom in atoms]
        best = int(np.argmax(along))
        if along[best] <= 0:
            break
        codes[best] += along[best]
        left = left - along[best] * atoms[best]
    return codes


@pytest.mark.parametrize("active", [1, 3, 30])
def test_pursuit_against_a_slow_one(active: int) -> None:
    points, atoms = normal(20, 6), unit(normal(9, 6, name="atoms"))
    found = pursue(points, atoms, active).numpy()
    expected = [slow_pursuit(point, atoms.numpy(), active) for point in points.numpy()]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_pursuit_by_hand() -> None:
    """(3, -4) on the axes: 3 of the first; the second points against what is left."""
    axes = torch.eye(2, dtype=torch.float64)
    point = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    assert pursue(point, axes, 5).tolist() == [[3.0, 0.0]]
    assert pursue(point, torch.cat([axes, -axes]), 5).tolist() == [[3.0, 0.0, 0.0, 4.0]]
    assert pursue(point, torch.cat([axes, -axes]), 1).tolist() == [[0.0, 0.0, 0.0, 4.0]]


def test_pursuit_scales_and_loses_less_with_more_atoms() -> None:
    points, atoms = normal(30, 8), unit(normal(40, 8, name="atoms"))
    torch.testing.assert_close(pursue(7 * points, atoms, 6), 7 * pursue(points, atoms, 6))
    errors = [
        float((points - pursue(points, atoms, k) @ atoms).square().sum()) for k in (1, 2, 5, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_pursuit_with_nothing() -> None:
    assert pursue(normal(3, 4), normal(0, 4), 5).shape == (3, 0)
    atoms = unit(normal(5, 4))
    assert not pursue(torch.zeros(2, 4, dtype=torch.float64), atoms, 5).any()


def test_itda_of_clusters_takes_one_token_of_each() -> None:
    """Four directions with a little noise: four atoms, whatever the size allowed."""
    directions = torch.cat([torch.eye(5)[:4]]).double()
    labels = torch.arange(400) % 4
    points = directions[labels] * (1 + labels[:, None]) + 0.01 * normal(400, 5)
    found = fit_itda(points, atoms=50, active=3, threshold=0.1)
    assert sorted(labels[found.rows].tolist()) == [0, 1, 2, 3]
    assert found.seen == 400


def test_itda_against_a_slow_one() -> None:
    """Every token is coded with the atoms of the batches before, and with those of its own."""
    points = normal(300, 7)
    found = fit_itda(points, atoms=300, active=4, threshold=0.25, seed=3)
    order = torch.randperm(300, generator=torch_rng(3, "itda")).tolist()
    kept: list[int] = []
    for start in range(0, 300, 64):
        before, fresh = unit(points[kept]).numpy() if kept else np.empty((0, 7)), list[int]()
        for row in order[start : start + 64]:
            x = (points[row] / points[row].norm()).numpy()
            codes = slow_pursuit(x, before, 4) if len(before) else np.empty(0)
            lost = np.square(x - codes @ before).sum()
            alone = [max(float(x @ (points[o] / points[o].norm()).numpy()), 0) for o in fresh]
            if lost > 0.25 and all(1 - one**2 > 0.25 for one in alone):
                fresh.append(row)
        kept += fresh
    assert found.rows.tolist() == kept
    assert 20 < len(kept) < 300


def test_itda_leaves_no_token_of_the_text_unwritten() -> None:
    """Of what it has gone through, all but what came within one batch is under the threshold."""
    points = unit(normal(500, 6))
    found = fit_itda(points, atoms=500, active=6, threshold=0.3)
    codes = pursue(points, points[found.rows], 6)
    lost = (points - codes @ points[found.rows]).square().sum(1)
    assert (lost > 0.3 + 1e-9).double().mean() < 0.05


def test_itda_edges() -> None:
    points = normal(100, 4)
    few = fit_itda(points, atoms=3, active=2, threshold=0.1)
    assert (len(few.rows), few.seen) == (3, 64)
    scaled = fit_itda(points * torch.arange(1, 101)[:, None], atoms=30, active=2, threshold=0.1)
    assert torch.equal(scaled.rows, fit_itda(points, atoms=30, active=2, threshold=0.1).rows)
    points[::2] = 0
    assert (fit_itda(points, atoms=100, active=2, threshold=0.1).rows % 2 == 1).all()
    for wrong in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InvalidInput, match="threshold"):
            fit_itda(points, atoms=3, active=2, threshold=wrong)
    with pytest.raises(InvalidInput, match="mean"):
        fit_itda(torch.zeros(9, 4), atoms=3, active=2, threshold=0.5)


def test_principal_atoms_against_sklearn() -> None:
    points = normal(200, 5) * torch.tensor([5.0, 1, 2, 4, 3])
    points = points - points.mean(0)
    found = principal_atoms(points, atoms=6)
    expected = PCA(3).fit(points.numpy()).components_
    np.testing.assert_allclose(found[::2].abs(), np.abs(expected), atol=1e-9)
    assert torch.equal(found[1::2], -found[::2])
    assert principal_atoms(points, atoms=99).shape == (10, 5)
    assert principal_atoms(points, atoms=3).shape == (3, 5)


def test_random_tokens_are_different_and_have_a_length() -> None:
    points = normal(50, 3)
    points[:10] = 0
    rows = random_tokens(points, atoms=99).rows
    assert sorted(rows.tolist()) == list(range(10, 50))
    assert len(random_tokens(points, atoms=7).rows) == 7


def test_coding_by_hand_and_in_blocks() -> None:
    """(2, 0) and (0, 1) with the first axis alone: the second is missed, 1 of a spread of 2.5."""
    points = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    axis = PursuitDictionary(torch.eye(2).double()[:1], torch.zeros(2).double(), 1)
    for blocks in ([points], points.split(1)):
        found = measure_coding(axis, blocks)
        assert found.energy.tolist() == [2.0]
        assert found.unexplained == pytest.approx(1 / 2.5)
        assert (found.active, found.used) == (0.5, 1)
    with pytest.raises(InvalidInput, match="2 inputs"):
        measure_coding(axis, [points[:1]])


def test_unexplained_does_not_cancel_far_from_zero() -> None:
    points = normal(400, 6)
    centre = points.mean(0)
    near = PursuitDictionary(unit(normal(9, 6, name="a")), centre, 3)
    far = PursuitDictionary(near.atoms.float(), (centre + 1e4).float(), 3)
    expected = measure_coding(near, [points]).unexplained
    assert measure_coding(far, [(points + 1e4).float()]).unexplained == pytest.approx(
        expected, rel=0.02
    )


def test_what_neurons_read_against_sums() -> None:
    atoms, weight, points = unit(normal(12, 5)), normal(4, 5, name="w"), normal(60, 5, name="p")
    dictionary = PursuitDictionary(atoms, points.mean(0), 4)
    coding = measure_coding(dictionary, [points])
    shares = shares_read(weight, dictionary, coding)
    codes = dictionary.codes(points).numpy()
    for neuron, w in enumerate(weight.numpy()):
        q = np.array(
            [np.mean(codes[:, a] ** 2) * np.dot(w, atoms[a].numpy()) ** 2 for a in range(12)]
        )
        np.testing.assert_allclose(shares[neuron], q / q.sum(), rtol=1e-9)
        assert participation(shares)[neuron] == pytest.approx(q.sum() ** 2 / np.square(q).sum())
        assert entropy(shares)[neuron] == pytest.approx(scipy_entropy(q))
    torch.testing.assert_close(shares_read(-3 * weight, dictionary, coding), shares)


def test_participation_by_hand_and_its_bounds() -> None:
    shares = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    assert participation(shares).tolist() == [1.0, 4.0, 2.0]
    assert entropy(shares).exp().tolist() == pytest.approx([1.0, 4.0, 2.0])


def test_a_neuron_that_reads_nothing() -> None:
    dictionary = PursuitDictionary(torch.eye(3).double(), torch.zeros(3).double(), 2)
    coding = measure_coding(dictionary, [normal(9, 3)])
    shares = shares_read(torch.zeros(1, 3), dictionary, coding)
    assert shares.isnan().all()
    assert participation(shares).isnan().all()


def test_a_planted_polysemantic_neuron_has_more_atoms() -> None:
    """Tokens of ten directions; a neuron along one reads one, one along all reads ten."""
    directions = torch.eye(12).double()[:10]
    points = directions[torch.arange(1000) % 10] * 4 + 0.01 * normal(1000, 12)
    centre = points.mean(0)
    chosen = fit_itda(points - centre, atoms=24, active=3, threshold=0.3)
    dictionary = PursuitDictionary(unit((points - centre)[chosen.rows]), centre, 3)
    coding = measure_coding(dictionary, [points])
    weight = torch.stack([directions[0], directions.sum(0) * torch.tensor([1.0, -1] * 6).double()])
    one, all_of_them = participation(shares_read(weight, dictionary, coding)).tolist()
    assert one < 2
    assert all_of_them > 5
