import numpy as np
import pytest

from entangle.plotting.style import PaperFigure, log_locator, plain_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (20.0, "20"),
        (10_000.0, "10,000"),
        (200_000.0, "200,000"),
        (2e6, "2e6"),
        (1e10, "1e10"),
        (1e-4, "0.0001"),
        (2e-5, "2e−5"),
        (-3.0, "−3"),
    ],
)
def test_numbers_are_on_one_line(value: float, text: str) -> None:
    assert plain_number(value) == text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.05, 1.45, [1.1, 1.2, 1.3, 1.4]),
        (0.9, 12.0, [1, 2, 5, 10]),
        (0.9, 120.0, [1, 3, 10, 30, 100]),
        (0.9, 1100.0, [1, 10, 100, 1000]),
    ],
)
def test_ticks_are_sparser_the_longer_the_axis(
    low: float, high: float, expected: list[float]
) -> None:
    ax = PaperFigure(figsize=(3.3, 3.0)).subplots()
    ax.set(yscale="log", ylim=(low, high))
    ax.yaxis.set_major_locator(log_locator(high / low))
    found = [tick for tick in ax.get_yticks() if low <= tick <= high]
    np.testing.assert_allclose(found, expected)
