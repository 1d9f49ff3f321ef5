import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entangle.errors import InvalidInput
from entangle.modes.modes import PROMINENCE, find_modes, kernel_density, mode_of
from entangle.seeding import numpy_rng
from tests.reference.modes import joined_peaks

Floats = NDArray[np.float64]


def normal(n: int, *, seed: int = 0) -> Floats:
    return numpy_rng(seed, "modes", n).standard_normal(n)


def mixture(n: int, centers: list[float], shares: list[float], *, seed: int = 0) -> Floats:
    rng = numpy_rng(seed, "mixture", n)
    values: Floats = rng.standard_normal(n) + rng.choice(centers, size=n, p=shares)
    return values


@pytest.mark.parametrize(("n", "seeds"), [(1000, 200), (10_000, 60), (100_000, 8)])
def test_one_gaussian_is_one_mode(n: int, seeds: int) -> None:
    found = [len(find_modes(normal(n, seed=seed))) for seed in range(seeds)]
    assert found == [1] * seeds


ONE_MODE = {
    "laplace": lambda rng, n: rng.laplace(size=n),
    "student": lambda rng, n: rng.standard_t(2, size=n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "uniform": lambda rng, n: rng.random(n),
    "lognormal": lambda rng, n: rng.lognormal(size=n),
    "narrow core": lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 0.5, 1, 0.05),
    "rectified": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
}


@pytest.mark.parametrize("name", ONE_MODE)
@pytest.mark.parametrize("n", [1000, 30_000])
def test_heavy_tails_and_edges_are_one_mode(name: str, n: int) -> None:
    for seed in range(10):
        values = ONE_MODE[name](numpy_rng(seed, name), n)
        assert len(find_modes(values)) == 1


@pytest.mark.parametrize(
    ("centers", "shares"),
    [([-4, 4], [0.5, 0.5]), ([0, 6], [0.9, 0.1]), ([-7, 0, 7], [0.3, 0.4, 0.3])],
)
@pytest.mark.parametrize("n", [1000, 100_000])
def test_separated_groups(centers: list[float], shares: list[float], n: int) -> None:
    for seed in range(3):
        found = find_modes(mixture(n, centers, shares, seed=seed))
        assert len(found) == len(centers)
        np.testing.assert_allclose(found["center"], centers, atol=0.8)
        np.testing.assert_allclose(found["share"], shares, atol=0.05)


@pytest.mark.parametrize(("place", "width"), [(8, 0.3), (-60, 5), (-300, 30), (1e4, 1000)])
def test_a_far_group_of_half_a_percent_is_a_mode(place: float, width: float) -> None:
    values = normal(20_000)
    values[:120] = place + width * values[:120]
    found = find_modes(values)
    assert len(found) == 2
    small = found["share"].to_numpy().argmin()
    assert found["tokens"].iloc[small] == 120
    assert found["center"].iloc[small] == pytest.approx(place, rel=0.3)


def test_a_far_group_of_less_is_none() -> None:
    values = normal(20_000)
    values[:80] = 50 + values[:80]
    assert len(find_modes(values)) == 1


def test_borders_by_hand() -> None:
    """Two tight groups: the border lies in the empty gap, and every value has its mode."""
    values = np.concatenate([np.linspace(0, 1, 50), np.linspace(9, 10, 150)])
    found = find_modes(values)
    assert found.columns.tolist() == ["mode", "center", "left", "right", "tokens", "share"]
    assert found["mode"].tolist() == [0, 1]
    assert found["tokens"].tolist() == [50, 150]
    assert found["share"].tolist() == [0.25, 0.75]
    assert found["left"].iloc[0] == -np.inf
    assert found["right"].iloc[1] == np.inf
    assert 1 < found["right"].iloc[0] < 9
    assert found["left"].iloc[1] == found["right"].iloc[0]
    assert mode_of(values, found).tolist() == [0] * 50 + [1] * 150


def test_discrete_outputs() -> None:
    values = numpy_rng(0, "discrete").choice([-1.0, 0.0, 5.0], size=3000, p=[0.3, 0.5, 0.2])
    found = find_modes(values)
    np.testing.assert_allclose(found["center"], [-1, 0, 5], atol=0.3)
    assert found["tokens"].tolist() == [int((values == v).sum()) for v in (-1, 0, 5)]


@pytest.mark.parametrize("values", [np.full(100, 3.0), np.array([2.5]), np.full(5, -0.0)])
def test_a_constant_is_one_mode(values: Floats) -> None:
    found = find_modes(values)
    assert found.to_dict("records") == [
        {"mode": 0, "center": values[0], "left": -np.inf, "right": np.inf,
         "tokens": len(values), "share": 1.0}
    ]  # fmt: skip


def test_rounding_is_no_mode() -> None:
    values = np.float32(1000) + np.array([0, 6.1e-5] * 500, dtype=np.float32)
    assert len(np.unique(values)) == 2
    assert len(find_modes(values)) == 1
    assert len(find_modes(values - np.float32(1000))) == 2


@pytest.mark.parametrize(("dip", "modes"), [(0.05, 1), (0.2, 2)])
def test_a_shallow_valley_parts_nothing(dip: float, modes: int) -> None:
    """Two plateaus with a flat valley between, of so many values that noise explains neither."""
    steps = [
        np.linspace(i, i + 1, int(200_000 * height)) for i, height in enumerate((1, 1 - dip, 1))
    ]
    assert len(find_modes(np.concatenate(steps))) == modes


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_at_most_so_many(most: int) -> None:
    values = mixture(5000, [0, 8, 16, 40, 60], [0.2] * 5)
    assert len(find_modes(values, max_modes=most)) == most
    assert len(find_modes(values)) == 4


def test_the_far_groups_stay_when_there_are_too_many() -> None:
    values = mixture(5000, [0, 5, 40], [0.4, 0.4, 0.2])
    found, mirrored = (find_modes(sign * values, max_modes=2) for sign in (1, -1))
    np.testing.assert_allclose(found["share"], [0.8, 0.2], atol=0.03)
    np.testing.assert_allclose(mirrored["share"], [0.2, 0.8], atol=0.03)


def test_a_value_on_a_border_belongs_to_the_right() -> None:
    modes = pd.DataFrame({"left": [-np.inf, 2.0, 5.0]})
    assert mode_of(np.array([1.9, 2.0, 2.1, 5.0, 9.0]), modes).tolist() == [0, 1, 1, 2, 2]


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.integers(0, 3))
def test_affine_maps_and_order_change_nothing(factor: float, shift: float, seed: int) -> None:
    values = mixture(800, [0, 6], [0.7, 0.3], seed=seed)
    found = find_modes(values)
    moved = find_modes(numpy_rng(seed, "order").permutation(factor * values + shift))
    pd.testing.assert_series_equal(moved["tokens"], found["tokens"])
    np.testing.assert_allclose(moved["center"], factor * found["center"] + shift, rtol=1e-6)


def test_mirrored_values_have_mirrored_modes() -> None:
    values = mixture(3000, [0, 6], [0.8, 0.2])
    found, mirrored = find_modes(values), find_modes(-values)
    np.testing.assert_allclose(mirrored["center"][::-1], -found["center"], atol=0.05)
    assert abs(mirrored["tokens"][::-1].to_numpy() - found["tokens"].to_numpy()).max() <= 3


@pytest.mark.parametrize("seed", range(5))
def test_peaks_against_plain_loops(seed: int) -> None:
    values = np.sort(mixture(2000, [0, 3.4, 9], [0.6, 0.3, 0.1], seed=seed))
    density = kernel_density(values)
    peaks = joined_peaks(density.height.tolist(), density.noise.tolist(), PROMINENCE)
    found = find_modes(values)
    np.testing.assert_allclose(found["center"], density.x[peaks])


def test_every_value_lies_in_its_mode() -> None:
    values = mixture(2000, [-6, 0, 6], [0.2, 0.6, 0.2])
    found = find_modes(values)
    member = mode_of(values, found)
    assert np.bincount(member).tolist() == found["tokens"].tolist()
    for row in found.to_dict("records"):
        own = values[member == row["mode"]]
        assert row["left"] <= own.min() <= row["center"] <= own.max() < row["right"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.empty(0), r"`outputs`.*none"),
        (np.array([1.0, np.nan, np.inf]), r"`outputs`.*\b2\b.*\b3\b.*\bNaN\b"),
    ],
)
def test_what_has_no_modes(values: Floats, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        find_modes(values)


@pytest.mark.parametrize("most", [0, -1, True])
def test_max_modes_is_at_least_one(most: int) -> None:
    with pytest.raises(InvalidInput, match=r"max_modes.*\b1\b"):
        find_modes(np.arange(5.0), max_modes=most)
