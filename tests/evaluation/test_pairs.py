"""`MinimalPairs`: its counts, its digest, and what it refuses."""

import json
from typing import Any

import pytest

from entangle.errors import InvalidInput
from entangle.evaluation import MinimalPairs


def _pairs(**changes: Any) -> MinimalPairs:
    fields = {"good": ("a", "b", "c"), "bad": ("x", "y", "z"), "paradigms": ("q", "p", "q")}
    return MinimalPairs(**{**fields, "source": "here", "settings": {"n": 1}, **changes})


def test_description() -> None:
    pairs = _pairs()
    assert pairs.n_pairs == 3
    assert list(pairs.counts.items()) == [("q", 2), ("p", 1)]
    described = pairs.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["digest"] == pairs.digest
    assert described["paradigms"] == {"q": 2, "p": 1}


def test_digest_by_hand() -> None:
    import hashlib

    lines = '["q", "a", "x"]\n["p", "b", "y"]\n["q", "c", "z"]\n'
    assert _pairs().digest == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"good": ("a", "b", "C")},
        {"bad": ("x", "y", "zz")},
        {"paradigms": ("q", "p", "p")},
        {"good": ("b", "a", "c")},
        {"good": ("x", "b", "c"), "bad": ("a", "y", "z")},
    ],
)
def test_digest_tells_pairs_apart(changes: dict[str, Any]) -> None:
    assert _pairs(**changes).digest != _pairs().digest
    assert _pairs(source="there", settings={}).digest == _pairs().digest


def test_what_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"`good`.*\b3\b.*\b2\b.*\b3\b"):
        _pairs(bad=("x", "y"))
    with pytest.raises(InvalidInput, match=r"`good`.*\b1\b.*\b0\b.*\b0\b.*\b0\b"):
        _pairs(good=(), bad=(), paradigms=())
    with pytest.raises(InvalidInput, match=r"\b1\b.*'b'"):
        _pairs(bad=("x", "b", "z"))
    with pytest.raises(InvalidInput, match=r"\b2\b.*empty"):
        _pairs(bad=("x", "y", " "))


def test_settings_are_fixed() -> None:
    given = {"n": 1}
    pairs = _pairs(settings=given)
    given["n"] = 2
    assert pairs.settings["n"] == 1
    with pytest.raises(TypeError):
        pairs.settings["n"] = 2  # type: ignore[index]


@pytest.mark.parametrize("name", ["overall", "macro"])
def test_names_of_summary_rows_are_no_paradigms(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"'{name}'"):
        MinimalPairs(("a",), ("b",), (name,), "here", {})


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(InvalidInput, match=r"\b0\b.*surrogate"):
        MinimalPairs(("a \ud800",), ("b",), ("x",), "here", {})
