import math
from collections.abc import Callable, Sequence

import pytest

from entangle.errors import InvalidInput, UnknownName
from entangle.experiments.compare_arms import Arm, arms, common_layers
from entangle.models.loading import LanguageModel
from entangle.plotting.style import METHOD_PALETTE
from entangle.results.comparison import METHODS
from tests.allocation.samples import random_allocation


def test_plain_methods_are_built_once_and_routed_ones_for_every_count() -> None:
    found = arms(["wanda", "expansion", "expansion-random"], [0.5, 0.7], [1, 2, 4, 8, 16, 32])
    counts = [2, 4, 8, 16, 32]
    expected: list[Arm] = []
    for sparsity in (0.5, 0.7):
        expected.append(Arm("wanda", sparsity, 1))
        expected += [Arm("expansion", sparsity, k) for k in counts]
        expected += [Arm("expansion-random", sparsity, k) for k in counts]
    assert found == expected


def test_what_is_listed_twice_is_built_once() -> None:
    found = arms(["wanda", "expansion", "wanda"], [0.5, 0.5], [4, 4])
    assert found == [Arm("wanda", 0.5, 1), Arm("expansion", 0.5, 4)]


@pytest.mark.parametrize(
    ("methods", "sparsities", "experts", "message"),
    [
        (["wanda"], [], [16], r"`sparsity`.*`experts`.*\b1\b"),
        ([], [0.5], [16], r"`sparsity`.*`experts`.*\b1\b"),
        (["expansion"], [0.5], [], r"`sparsity`.*`experts`.*\b1\b"),
        (["expansion"], [0.5], [1], r"`experts`.*\b1\b.*\[1\]"),
        (["wanda"], [0.5, 1.5], [1], r"`sparsity`.*\[0, 1\].*\b1\.5\b"),
        (["wanda"], [-0.1], [1], r"`sparsity`.*\[0, 1\]"),
        (["wanda"], [math.nan], [1], r"`sparsity`.*\[0, 1\]"),
        (["expansion"], [0.5], [4, 0], r"`experts`.*integer.*\b1\b.*\b0\b"),
    ],
)
def test_arms_are_checked_before_any_work(
    methods: Sequence[str], sparsities: Sequence[float], experts: Sequence[int], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        arms(methods, sparsities, experts)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(UnknownName, match="'wnda'"):
        arms(["wnda"], [0.5], [16])


def test_every_method_has_a_colour() -> None:
    assert set(METHOD_PALETTE) == set(METHODS)


def test_keys_tell_arms_apart_and_labels_name_them() -> None:
    made = [Arm("wanda", 0.5, 1), Arm("wanda", 0.7, 1), Arm("expansion", 0.5, 4)]
    made += [Arm("expansion", 0.5, 8), Arm("expansion", 0.5, 8, "owl")]
    assert len({arm.key for arm in made}) == 5
    assert made[0].key == Arm("wanda", 0.5, 1).key
    assert [arm.label for arm in made[2:]] == [
        "expansion 0.5 k=4", "expansion 0.5 k=8", "expansion 0.5 k=8 owl",
    ]  # fmt: skip


def test_allocations_that_cannot_be_told_apart_or_compared_are_refused(
    tiny: Callable[[str], LanguageModel],
) -> None:
    one = random_allocation(tiny("llama"))
    with pytest.raises(InvalidInput, match=r"called.*'uniform'"):
        arms(["wanda"], [0.5], [1], allocations=[("uniform", one)])
    with pytest.raises(InvalidInput, match=r"called.*'a'"):
        arms(["wanda"], [0.5], [1], allocations=[("a", one), ("a", one)])
    others = [("a", one), ("b", random_allocation(tiny("llama"), proj="up_proj"))]
    with pytest.raises(InvalidInput, match=r"'a'.*\b9\b.*'b'.*\b3\b"):
        common_layers(others)
    grouped = [("a", one), ("b", random_allocation(tiny("llama"), group=4))]
    with pytest.raises(InvalidInput, match=r"n:4.*row"):
        common_layers(grouped)
