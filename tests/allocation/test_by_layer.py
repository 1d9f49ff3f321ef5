"""AlphaPruning's array and EvoPress' levels, against what those programs do with them."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from entangle.allocation import Allocation
from entangle.allocation.by_row import (
    EVOPRESS_LEVELS,
    alphapruning_usage,
    evopress_step,
    evopress_usage,
    read_alphapruning,
    read_evopress,
    write_alphapruning,
    write_evopress,
)
from entangle.errors import InvalidInput
from tests.allocation.samples import allocations, made

BY_HAND = made({"b.0.up": [0, 2], "b.0.down": [4], "b.1.up": [3, 3]},
               {"b.0.up": 4, "b.0.down": 8, "b.1.up": 4})  # fmt: skip


def order_of(allocation: Allocation) -> list[tuple[str, int]]:
    widths = allocation.in_features
    return [(name, len(zeros) * widths[name]) for name, zeros in allocation.zeros.items()]


def shares_of(allocation: Allocation) -> dict[str, float]:
    frame = allocation.layers
    return dict(zip(frame["layer"], frame["sparsity"], strict=True))


def as_alphapruning_maps(
    metrics: NDArray[np.float64], weights: NDArray[np.float64], *, epsilon: float, sparsity: float
) -> NDArray[np.float64]:
    """Its mapping: linear onto [1 − ε, 1 + ε], then scaled to the mean over all weights."""
    low, high = metrics.min(), metrics.max()
    ratios = (metrics - low) / (high - low) * 2 * epsilon + 1 - epsilon
    scaled: NDArray[np.float64] = ratios * sparsity * weights.sum() / (weights * ratios).sum()
    return scaled


def test_alphapruning_by_hand() -> None:
    values = np.load(io.BytesIO(write_alphapruning(BY_HAND, order_of(BY_HAND))))
    assert values.tolist() == [0.25, 0.5, 0.75]
    order = [("b.0.q", 16), *order_of(BY_HAND)]
    assert np.load(io.BytesIO(write_alphapruning(BY_HAND, order))).tolist() == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("others", [[], [("b.9.q", 7)]])
@settings(max_examples=60, deadline=None)
@given(allocation=allocations())
def test_with_the_settings_told_alphapruning_makes_these_sparsities(
    others: list[tuple[str, int]], allocation: Allocation
) -> None:
    order = [*others, *order_of(allocation)]
    told = alphapruning_usage(allocation, order)
    numbers = dict(re.findall(r"--(\w+) ([0-9.e-]+[0-9])", told))
    values = np.load(io.BytesIO(write_alphapruning(allocation, order)))
    if "epsilon" not in numbers:
        assert len(set(values)) == 1
        return
    mapped = as_alphapruning_maps(
        values, np.array([weights for _, weights in order], dtype=np.float64),
        epsilon=float(numbers["epsilon"]), sparsity=float(numbers["sparsity_ratio"]),
    )  # fmt: skip
    np.testing.assert_allclose(mapped, values, atol=1e-12)


def test_alphapruning_cannot_take_equal_sparsities() -> None:
    even = made({"b.0.up": [1, 1], "b.1.up": [1]}, {"b.0.up": 4, "b.1.up": 4})
    assert "divides by 0" in alphapruning_usage(even, order_of(even))


def test_alphapruning_is_read(tmp_path: Path) -> None:
    order = [("b.0.q", 16), *order_of(BY_HAND)]
    (tmp_path / "x.npy").write_bytes(write_alphapruning(BY_HAND, order))
    assert read_alphapruning(tmp_path / "x.npy", order) == {"b.0.q": 0.0, **shares_of(BY_HAND)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(2), r"\b3\b.*\(2,\).*float64"),
        (np.zeros(3, dtype=np.int64), r"x\.npy'.*\b3\b.*int64"),
        (np.array([0.0, 4.1, 2.2]), r"x\.npy'.*\b0\b.*\b4\.1\b"),
        (np.array([0.0, np.nan, 0.2]), r"x\.npy'.*\bnan\b"),
    ],
)
def test_other_arrays_are_refused(
    values: NDArray[np.float64], message: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(InvalidInput, match=message):
        read_alphapruning(tmp_path / "x.npy", order_of(BY_HAND))


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"model: 3\n"):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(InvalidInput, match=r"x\.npy'.*array"):
            read_alphapruning(tmp_path / "x.npy", order_of(BY_HAND))


def test_evopress_by_hand() -> None:
    # 24 weights, 12 zeros: the layers of 8 differ by -2, 0 and +2 zeros, one step each
    assert evopress_step(BY_HAND) == 1
    assert write_evopress(BY_HAND).decode() == "b.0.up: -2\nb.0.down: 0\nb.1.up: 2"
    told = evopress_usage(BY_HAND)
    assert "--sparsity 0.5 --weights_diff 1 --num_levels 8" in told
    assert "all zeros by 0." in told


@settings(max_examples=100, deadline=None)
@given(allocation=allocations())
def test_levels_exist_in_the_data_base_and_are_the_nearest(allocation: Allocation) -> None:
    step, share = evopress_step(allocation), allocation.overall
    levels = {}
    for line in write_evopress(allocation).decode().split("\n"):
        name, level = line.split(":")  # as its loader does
        levels[name.strip()] = int(level)
    assert list(levels) == list(allocation.zeros)
    for name, weights in order_of(allocation):
        # `min_level` and `max_level` of its pruner
        assert -levels[name] <= min(share * weights / step + 1e-9, EVOPRESS_LEVELS)
        assert levels[name] <= min((1 - share) * weights / step + 1e-9, EVOPRESS_LEVELS)
        exact = (int(allocation.zeros[name].sum()) - share * weights) / step
        assert abs(levels[name] - exact) < 1 + 1e-9
    if step == 1 and all(weights > 2 * EVOPRESS_LEVELS for _, weights in order_of(allocation)):
        assert sum(levels.values()) == 0


def test_evopress_is_read(tmp_path: Path) -> None:
    weights = dict(order_of(BY_HAND))
    (tmp_path / "x.txt").write_bytes(write_evopress(BY_HAND))
    found = read_evopress(tmp_path / "x.txt", weights, sparsity=0.5, step=1)
    assert found == shares_of(BY_HAND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b.0.up 3", r"\b1\b.*`module: level`.*'b\.0\.up 3'"),
        ("b.0.up: 1\nb.0.up: half", r"\b2\b.*x\.txt'"),
        ("b.0.gate: 1", r"\b1\b.*'b\.0\.gate'.*\b3\b"),
        ("b.0.up: 7", r"\b7\b.*'b\.0\.up'.*\b1\.375\b"),
        ("b.0.up: -7", r"'b\.0\.up'.*-0\.375\b"),
    ],
)
def test_lines_that_do_not_fit_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_evopress(tmp_path / "x.txt", dict(order_of(BY_HAND)), sparsity=0.5, step=1)


def test_bytes_are_no_levels(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"x\.txt'"):
        read_evopress(tmp_path / "x.txt", {}, sparsity=0.5, step=1)
