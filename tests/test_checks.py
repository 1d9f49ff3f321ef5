import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.checks import (
    bootstrap,
    choice,
    choices,
    different,
    finite,
    named,
    names,
    path_of,
    real,
    seed_of,
    several,
    share,
    shares,
    shown,
    tensor_of,
    whole,
    wholes,
)
from entangle.errors import InvalidInput, UnknownName


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), np.int32(3), torch.tensor(3), np.array(3)]
)
def test_integers_of_any_kind(value: object) -> None:
    found = whole("k", value, least=1, most=3)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize(
    "value",
    [0, -1, np.int8(-3), 2.0, 2.5, np.float64(2), True, np.True_, "2", None, [2], math.nan, pd.NA,
     torch.tensor(2.0), torch.tensor([2]), torch.tensor(True), np.array([2]),
     torch.tensor(2, device="meta"), Fraction(2), 2 + 0j],
)  # fmt: skip
def test_what_is_no_count(value: object) -> None:
    with pytest.raises(InvalidInput, match=r"`k`.*\b1\b"):
        whole("k", value, least=1)


def test_a_bound_above() -> None:
    for value in (0, 9):
        with pytest.raises(InvalidInput, match=rf"`bits`.*\[1, 8\].*{value}"):
            whole("bits", value, least=1, most=8)


@pytest.mark.parametrize("value", [0, 2**63 - 1, np.uint64(7), torch.tensor(7)])
def test_seeds(value: object) -> None:
    assert seed_of(value) == int(value)  # type: ignore[call-overload]


@pytest.mark.parametrize("value", [-1, 2**63, 1.0, "1", None, True])
def test_what_is_no_seed(value: object) -> None:
    with pytest.raises(InvalidInput, match=r"`draw`.*\b2\b.*\b63\b"):
        seed_of(value, "draw")


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind(value: object) -> None:
    for check in (real, share, finite):
        found = check("share", value)
        assert (found, type(found)) == (0.5, float)
    assert real("share", 1) == real("share", np.int8(1)) == real("share", torch.tensor(1)) == 1.0


@pytest.mark.parametrize(
    "value", [np.float32(0.95), np.array(0.95, "f4"), torch.tensor(0.95), np.float16(0.95)]
)
def test_a_narrow_float_is_the_decimal_that_it_is_written_as(value: object) -> None:
    assert share("share", value) == 0.95


@pytest.mark.parametrize("value", [True, "0.5", None, Decimal("0.5"), [0.5], np.array([0.5])])
def test_what_is_no_number(value: object) -> None:
    for check in (real, share, finite):
        with pytest.raises(InvalidInput, match="`share`"):
            check("share", value)


def test_shares_and_their_ends() -> None:
    assert [share("s", end) for end in (0, 1, 0.0, 1.0)] == [0.0, 1.0, 0.0, 1.0]
    for value, closed in ((0.0, "(0, 1]"), (1.0, "[0, 1)")):
        with pytest.raises(InvalidInput) as refused:
            share("s", value, zero=bool(value), one=not value)
        assert closed in str(refused.value)
    for outside in (-1e-9, 1 + 1e-9, math.nan, math.inf):
        with pytest.raises(InvalidInput, match=r"`s`.*\[0, 1\]"):
            share("s", outside)


def test_finite_numbers() -> None:
    assert finite("d", 0, least=0) == 0.0
    assert finite("d", -1e300) == -1e300
    for value in (math.inf, -math.inf, math.nan, 10**400, -(10**400)):
        with pytest.raises(InvalidInput, match="`d`"):
            finite("d", value)
    with pytest.raises(InvalidInput, match=r"`d`.*\b0\b.*-0\.1\b"):
        finite("d", -0.1, least=0)
    with pytest.raises(InvalidInput, match=r"`d`.*\b0\b.*\b0\b"):
        finite("d", 0, above=0)


def test_resampling() -> None:
    assert bootstrap(np.int64(10), np.float64(0.9)) == (10, 0.9)
    with pytest.raises(InvalidInput, match=r"n_boot.*\b0\b"):
        bootstrap(0, 0.9)
    with pytest.raises(InvalidInput, match=r"`level`.*\b1\.0\b"):
        bootstrap(10, 1.0)


def words() -> Iterator[str]:
    yield from ("b", "a")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("top", ["top"]),
        (np.str_("top"), ["top"]),
        (4, [4]),
        (np.int64(4), [4]),
        (0.5, [0.5]),
        (torch.tensor(4), [4]),
        (["b", "a", "b"], ["b", "a", "b"]),
        (("b", "a"), ["b", "a"]),
        (words(), ["b", "a"]),
        ({"b", "a"}, ["a", "b"]),
        (frozenset([3, 1, 2]), [1, 2, 3]),
        ({"b": 0, "a": 1}.keys(), ["b", "a"]),
        (range(3), [0, 1, 2]),
        (np.array([2, 0]), [2, 0]),
        (np.array(["b", "a"]), ["b", "a"]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([0.95]), [0.95]),
        (pd.Series([2, 0], index=[5, 6]), [2, 0]),
        (pd.Index(["b", "a"]), ["b", "a"]),
        (Path("a"), [Path("a")]),
    ],
)
def test_one_value_or_several(value: object, wanted: list[object]) -> None:
    found = several("x", value, Path)
    assert found == wanted
    assert [type(one) for one in found] == [type(one) for one in wanted]


@pytest.mark.parametrize(
    "value", [None, {"a": 1}, b"ab", object(), pd.DataFrame({"a": [1]}), np.ones((2, 2)), Path("a")]
)
def test_what_is_not_several_values(value: object) -> None:
    with pytest.raises(InvalidInput, match="`x`"):
        several("x", value)


def test_no_value_at_all() -> None:
    nothing: list[object] = [[], (), set(), np.array([]), pd.Series([], dtype=float)]
    for value in nothing:
        with pytest.raises(InvalidInput, match="`x`"):
            several("x", value)
        assert several("x", value, empty=True) == []


def test_several_checked_values() -> None:
    assert wholes("k", np.array([1, 4]), least=1) == [1, 4]
    assert shares("s", pd.Series([0.5, 1])) == [0.5, 1.0]
    assert names("n", ["b", "a", "b"]) == ["b", "a"]
    assert names("n", "name") == ["name"]
    assert choices("c", ["b", "a", "b"], ("a", "b")) == ["b", "a"]
    assert different("k", [1, 2]) == [1, 2]
    for check, value in ((wholes, [1, 0]), (wholes, "4")):
        with pytest.raises(InvalidInput, match=r"`k`.*\b1\b"):
            check("k", value, least=1)
    with pytest.raises(InvalidInput, match=r"`s`.*\b2\b"):
        shares("s", [0.5, 2])
    with pytest.raises(InvalidInput, match=r"`n`.*\b3\b"):
        names("n", ["a", 3])
    with pytest.raises(InvalidInput, match=r"`k`.*\[1, 1\]"):
        different("k", [1, 1])


def test_names_that_are_known() -> None:
    known = {"kmeans": 1, "random": 2}
    found = choice("router", np.str_("random"), known)
    assert (found, type(found)) == ("random", str)
    with pytest.raises(UnknownName, match="'means'"):
        choice("router", "means", known, kind="clustering")
    for value in (3, None, ["random"], {"a": 1}, b"random", np.array(["random"])):
        with pytest.raises(InvalidInput, match=r"`router`.*kmeans"):
            choice("router", value, known)
        with pytest.raises(InvalidInput, match="`router`"):
            named("router", value)


def test_paths() -> None:
    assert path_of("out", "runs/a") == path_of("out", Path("runs/a")) == Path("runs/a")
    assert path_of("out", np.str_("a")) == Path("a")
    for value in (3, None, "", "a\0b", b"a", ["a"], object(), "a\udcff", Path("\ud800")):
        with pytest.raises(InvalidInput, match="`out`"):
            path_of("out", value)


def test_values_in_messages_are_one_short_line() -> None:
    assert shown(np.float64(0.5)) == "0.5"
    assert shown(np.str_("a")) == "'a'"
    for long in (
        list(range(1000)),
        "x" * 1000,
        torch.zeros(50, 50),
        pd.DataFrame({"a": range(99)}),
    ):
        assert len(shown(long)) <= 80
        assert "\n" not in shown(long)


def test_tensors_of_numbers() -> None:
    given = torch.ones(3)
    assert tensor_of("share", given, torch.float64) is given
    for value in ([0.7, 0.1], (0.7, 0.1), np.array([0.7, 0.1])):
        found = tensor_of("share", value, torch.float64)
        assert found.tolist() == [0.7, 0.1]  # no digit is lost
    assert tensor_of("rows", [1, 2]).dtype == torch.int64
    assert tensor_of("rows", [True]).dtype == torch.bool
    for bad in ("x", None, ["a"], [[1], [1, 2]], object()):
        with pytest.raises(InvalidInput, match="`rows`"):
            tensor_of("rows", bad)
