"""More experts for layers with more entangled neurons, at equal stored non-zeros."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.allocation import Allocation, expert_budget
from entangle.allocation.experts import mean_experts
from entangle.errors import InvalidInput, UnknownName
from entangle.results.scores import NeuronScores
from tests.allocation.samples import made, random_allocation

EVEN = made({"b.0.up": [2] * 4, "b.1.up": [2] * 4}, {"b.0.up": 4, "b.1.up": 4})


def scores_of(wd: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    rows = [(name, i, value) for name, values in wd.items() for i, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["layer", "neuron", "wd"])


def stored(allocation: Allocation, experts: Mapping[str, int]) -> int:
    """Non-zeros of all experts, counted row by row."""
    return sum(
        experts[name] * (allocation.in_features[name] - zeros)
        for name, column in allocation.zeros.items()
        for zeros in column.tolist()
    )


FIRST = scores_of({"b.0.up": [9, 8, 1, 1], "b.1.up": [1, 1, 1, 1]})


@pytest.mark.parametrize(
    ("highest", "expected"), [(None, [7, 1]), (6, [6, 2]), (4, [4, 4]), (20, [7, 1])]
)
def test_by_hand(highest: int | None, expected: list[int]) -> None:
    # both layers store 8 non-zeros an expert; 2 of 8 neurons are entangled, both in the first
    found = expert_budget(EVEN, FIRST, experts=4, fraction=0.25, highest=highest)
    assert found.experts is not None
    assert list(found.experts.values()) == expected
    assert found.manifest["expert_budget"] == {
        "experts": 4, "by": "wd", "fraction": 0.25, "lowest": 1, "highest": highest or 8,
        "stored_nonzeros": 64, "equal_numbers_store": 64,
    }  # fmt: skip
    assert found.zeros == EVEN.zeros


def test_a_layer_of_twice_the_size_costs_twice_as_much() -> None:
    uneven = made({"b.0.up": [0] * 4, "b.1.up": [2] * 4}, {"b.0.up": 4, "b.1.up": 4})
    found = expert_budget(uneven, FIRST, experts=4, fraction=0.25)
    # 96 non-zeros: 16 for every expert of the first, 8 for one of the second
    assert found.experts == {"b.0.up": 5, "b.1.up": 2}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Allocation, pd.DataFrame, int]:
    names = [f"b.{i}.up" for i in range(draw(st.integers(1, 5)))]
    zeros = {n: draw(st.lists(st.integers(0, 3), min_size=1, max_size=5)) for n in names}
    wd = {n: draw(st.lists(st.floats(0, 1), min_size=len(zeros[n]), max_size=len(zeros[n])))
          for n in names}  # fmt: skip
    return made(zeros, dict.fromkeys(names, 4)), scores_of(wd), draw(st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(problem=problems(), fraction=st.floats(0.05, 1.0), lowest=st.integers(1, 3))
def test_never_above_the_budget_and_short_by_less_than_one_more_expert(
    problem: tuple[Allocation, pd.DataFrame, int], fraction: float, lowest: int
) -> None:
    allocation, scores, experts = problem
    lowest = min(lowest, experts)
    found = expert_budget(allocation, scores, experts=experts, fraction=fraction, lowest=lowest)
    assert found.experts is not None
    counts = found.experts
    assert all(lowest <= count <= 2 * experts for count in counts.values())
    left = stored(allocation, dict.fromkeys(counts, experts)) - stored(allocation, counts)
    assert left >= 0
    for name, count in counts.items():
        if count < 2 * experts:
            assert stored(allocation, {n: int(n == name) for n in counts}) > left
    assert mean_experts(found) <= experts + 1e-9


def test_more_entangled_groups_get_more() -> None:
    rng = np.random.default_rng(0)
    names = [f"b.{i}.up" for i in range(6)]
    allocation = made({n: [3] * 50 for n in names}, dict.fromkeys(names, 10))
    wd = {n: (rng.random(50) + 0.2 * i).tolist() for i, n in enumerate(names)}
    found = expert_budget(allocation, scores_of(wd), experts=8, fraction=0.3)
    assert found.experts is not None
    counts = list(found.experts.values())
    assert counts == sorted(counts)
    assert counts[0] < 8 < counts[-1]


def test_layers_of_a_group_have_one_number() -> None:
    names = ["b.0.gate", "b.0.up", "b.0.down", "b.1.gate", "b.1.up", "b.1.down"]
    allocation = made({n: [1] * 3 for n in names}, dict.fromkeys(names, 4))
    scores = scores_of({n: [float(n == "b.0.up")] * 3 for n in names})
    by_block = expert_budget(allocation, scores, experts=4, fraction=0.1).experts
    assert by_block is not None
    assert len({by_block[n] for n in names[:3]}) == len({by_block[n] for n in names[3:]}) == 1
    groups = [["b.0.gate", "b.0.up"], ["b.0.down"], ["b.1.gate", "b.1.up"], ["b.1.down"]]
    found = expert_budget(allocation, scores, experts=4, fraction=0.1, groups=groups).experts
    assert found is not None
    assert found["b.0.gate"] == found["b.0.up"] == 8
    assert found["b.0.down"] < 8


def test_neurons_without_a_value_are_not_entangled() -> None:
    scores = scores_of({"b.0.up": [np.nan, np.inf, 0.1, 0.1], "b.1.up": [0.5, 0.5, 0.1, 0.1]})
    found = expert_budget(EVEN, scores, experts=4, fraction=0.25)
    assert found.experts == {"b.0.up": 1, "b.1.up": 7}


def test_nobody_entangled_means_equal_numbers() -> None:
    scores = scores_of({name: [np.nan] * 4 for name in EVEN.zeros})
    assert expert_budget(EVEN, scores, experts=4).experts == {"b.0.up": 4, "b.1.up": 4}


def test_empty_layers_store_nothing() -> None:
    empty = made({"b.0.up": [4] * 4, "b.1.up": [4] * 4}, {"b.0.up": 4, "b.1.up": 4})
    found = expert_budget(empty, FIRST, experts=4, fraction=0.25)
    assert found.experts is not None
    assert mean_experts(found) >= 1


def test_scores_of_a_model(scored: Callable[[str], NeuronScores], tiny: Callable) -> None:  # type: ignore[type-arg]
    allocation = random_allocation(tiny("llama"))
    found = expert_budget(allocation, scored("llama"), experts=6, fraction=0.1)
    assert found.experts is not None
    assert stored(allocation, found.experts) <= stored(
        allocation, dict.fromkeys(allocation.zeros, 6)
    )
    assert "experts" in found.layers.columns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, r"`experts`.*integer.*\b1\b.*\b0\b"),
        ({"lowest": True}, r"`lowest`.*\b1\b.*\bTrue\b"),
        ({"experts": 4, "lowest": 5}, r"`experts`.*\b4\b.*\[5, 8\]"),
        ({"experts": 4, "highest": 3}, r"`experts`.*\[1, 3\]"),
        ({"fraction": 0.0}, r"`fraction`.*\(0, 1\].*\b0\.0\b"),
        ({"fraction": float("nan")}, r"`fraction`.*\(0, 1\].*\bnan\b"),
        ({"groups": [["b.0.up"]]}, r"allocation.*'b\.1\.up'"),
        ({"groups": [["b.0.up"], ["b.1.up", "x"]]}, r"`groups`.*'x'"),
        ({"groups": [["b.0.up"], ["b.1.up", "b.0.up"]]}, r"'b\.0\.up'"),
    ],
)
def test_mistakes_are_one_clear_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        expert_budget(EVEN, FIRST, **changes)  # type: ignore[arg-type]


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"\b4\b.*'b\.1\.up'.*\b0\b"):
        expert_budget(EVEN, FIRST[FIRST["layer"] == "b.0.up"])
    with pytest.raises(UnknownName, match="'dw'"):
        expert_budget(EVEN, FIRST, by="dw")
    with pytest.raises(InvalidInput, match=r"allocation.*experts"):
        mean_experts(EVEN)
