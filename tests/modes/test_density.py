import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle.modes.modes import bandwidth_scale, kernel_density
from entangle.seeding import numpy_rng
from tests.reference.modes import density_at


def sample(n: int, name: str = "") -> np.ndarray:
    rng = numpy_rng(0, "density", name)
    return np.sort(np.where(rng.random(n) < 0.1, 9 + 3 * rng.standard_normal(n), rng.random(n)))


@pytest.mark.parametrize("n", [4, 40, 400])
def test_against_a_sum_of_gaussians(n: int) -> None:
    values = sample(n)
    density = kernel_density(values)
    center, scale = float(np.median(values)), bandwidth_scale(values)
    exact = [density_at(x, values.tolist(), center=center, scale=scale) for x in density.x]
    np.testing.assert_allclose(density.height, exact, atol=0.02 * max(exact))


def test_scale_by_hand() -> None:
    ten = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 8.5])
    assert bandwidth_scale(ten) == pytest.approx(0.5 / 0.2513226937)  # the shortest step of ten
    sharper = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 8.001])
    core = (6.75 - 2.25) / 1.3489795
    assert bandwidth_scale(sharper) == pytest.approx(core / 4)
    assert bandwidth_scale(ten * 1e-3) == pytest.approx(bandwidth_scale(ten) * 1e-3)


@pytest.mark.parametrize("n", [300, 100_000])
def test_scale_of_a_gaussian(n: int) -> None:
    values = np.sort(numpy_rng(0, "scale").standard_normal(n))
    assert bandwidth_scale(values) == pytest.approx(1, abs=0.25 if n == 300 else 0.03)


def test_two_values_by_hand() -> None:
    """At 0 and 2: median 1, quartiles 0.5 and 1.5, so that the scale is 1/1.349."""
    density = kernel_density(np.array([0.0, 2.0]))
    scale = 1 / 1.3489795003921634
    width = 0.9 * scale * 2**-0.2
    unit = 2 * scale
    stretch = np.sqrt(1 + (1 / unit) ** 2)  # of the axis at both values
    apart = 2 * np.arcsinh(1 / unit) * unit / width  # in bandwidths
    peak = (1 + np.exp(-(apart**2) / 2)) / (2 * np.sqrt(2 * np.pi) * width * stretch)
    assert density.height[np.abs(density.x).argmin()] == pytest.approx(peak, rel=0.01)


@given(st.integers(2, 300), st.sampled_from(["", "a", "b"]))
def test_integrates_to_one(n: int, name: str) -> None:
    density = kernel_density(sample(n, name))
    assert np.trapezoid(density.height, density.x) == pytest.approx(1, abs=0.02)


@given(st.floats(0.01, 100), st.floats(-50, 50))
def test_moves_and_stretches_with_the_values(factor: float, shift: float) -> None:
    values = sample(200)
    before, after = kernel_density(values), kernel_density(factor * values + shift)
    np.testing.assert_allclose(after.x, factor * before.x + shift, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(after.height * factor, before.height, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(after.noise**2 * factor, before.noise**2, rtol=1e-6)


def test_noise_is_that_of_repeated_samples() -> None:
    rng = numpy_rng(0, "noise")
    roots, expected = [], []
    for _ in range(300):
        density = kernel_density(np.sort(rng.standard_normal(500)))
        at = [np.abs(density.x - x).argmin() for x in (-1.0, 0.0, 1.5)]
        roots.append(np.sqrt(density.height[at]))
        expected.append(density.noise[at])
    np.testing.assert_allclose(np.std(roots, axis=0), np.mean(expected, axis=0), rtol=0.2)


def test_mostly_one_value() -> None:
    """Where the quartiles are equal, the standard deviation sets the bandwidth."""
    density = kernel_density(np.array([0.0] * 9 + [1.0]))
    assert np.trapezoid(density.height, density.x) == pytest.approx(1, abs=0.02)
    assert density.x[density.height.argmax()] == pytest.approx(0, abs=0.05)
