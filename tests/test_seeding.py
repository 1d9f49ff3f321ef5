import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.seeding import check_seed, numpy_rng, torch_rng

SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS, st.lists(st.text(max_size=5) | st.integers(), max_size=3))
def test_one_seed_and_name_is_one_stream(seed: int, names: list[str | int]) -> None:
    first, second = numpy_rng(seed, *names), numpy_rng(seed, *names)
    assert np.array_equal(first.integers(0, 2**32, 8), second.integers(0, 2**32, 8))
    drawn = [torch.rand(8, generator=torch_rng(seed, *names)) for _ in range(2)]
    assert torch.equal(*drawn)


@given(SEEDS, SEEDS)
def test_other_seeds_and_names_are_other_streams(seed: int, other: int) -> None:
    def draw(seed: int, *names: str | int) -> tuple[float, float]:
        drawn = float(torch.rand((), generator=torch_rng(seed, *names), dtype=torch.float64))
        return float(numpy_rng(seed, *names).random()), drawn

    base = draw(seed, "pairs", 1)
    assert all(a != b for a, b in zip(base, draw(seed, "pairs", 2), strict=True))
    assert all(a != b for a, b in zip(base, draw(seed, "pairs"), strict=True))
    assert all(a != b for a, b in zip(base, draw(seed, "pairs1"), strict=True))
    if seed != other:
        assert all(a != b for a, b in zip(base, draw(other, "pairs", 1), strict=True))


def test_the_streams_stay_what_they_are() -> None:
    assert numpy_rng(0, "calibration").integers(0, 1000, 4).tolist() == [391, 118, 660, 156]
    drawn = torch.randperm(6, generator=torch_rng(0, "mapping difficulty"))
    assert drawn.tolist() == [2, 5, 4, 0, 1, 3]


def test_global_generators_are_left_alone() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=True)  # noqa: NPY002
    numpy_rng(3, "a").random(5)
    torch.rand(5, generator=torch_rng(3, "a"))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert str(np.random.get_state(legacy=True)) == str(numpy_before)  # noqa: NPY002


@pytest.mark.parametrize("seed", [-1, 2**63, True])
def test_a_seed_is_in_range(seed: int) -> None:
    for use in (check_seed, numpy_rng, torch_rng):
        with pytest.raises(InvalidInput, match=r"`seed`.*\b0\b.*\b2\b.*\b63\b"):
            use(seed)


@pytest.mark.parametrize("seed", [1.0, "0", None])
def test_a_seed_is_an_integer(seed: object) -> None:
    with pytest.raises(InvalidInput, match=rf"`seed`.*{seed!r}"):
        inspect.unwrap(check_seed)(seed)


def test_the_largest_seed_works() -> None:
    assert check_seed(2**63 - 1) == 2**63 - 1
    assert check_seed(0) == 0
    torch_rng(2**63 - 1, "x")
