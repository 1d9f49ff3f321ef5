from dataclasses import replace

import pytest

from entangle.allocation.experts import nominal_sparsity, rule_label, zeros_digest
from entangle.allocation.rules import RULES
from entangle.results.allocation import SCORED
from tests.allocation.samples import made

ONE = made({"b.0.up": [1, 2], "b.1.up": [3]}, {"b.0.up": 4, "b.1.up": 4})


def test_the_rule_and_its_columns() -> None:
    assert rule_label(ONE) == "protect wd"
    several = replace(ONE, manifest={"settings": {"rule": "linear", "by": ["wd", "md"]}})
    assert rule_label(several) == "linear wd+md"
    assert rule_label(replace(ONE, manifest={"settings": {"rule": "imported"}})) == "imported"
    assert rule_label(replace(ONE, manifest={})) == "given"


@pytest.mark.parametrize(
    ("rule", "across", "label"),
    [
        ("uniform", None, "uniform"),
        ("owl", None, "owl"),
        ("trim", "uniform", "trim"),
        ("trim", "layer", "trim wd"),
        ("loss", "owl", "loss wd"),
        ("rank", "model", "rank wd"),
    ],
)
def test_columns_that_are_not_read_are_not_named(rule: str, across: str | None, label: str) -> None:
    settings = {"rule": rule, "by": ["wd"], "across": across}
    assert rule_label(replace(ONE, manifest={"settings": settings})) == label


def test_the_rules_that_read_scores() -> None:
    assert {name: rule.scored for name, rule in RULES.items()} == SCORED


def test_a_searched_rule_says_so() -> None:
    manifest = {"settings": {"rule": "linear", "by": ["wd"]}, "search": {"rule": "linear"}}
    assert rule_label(replace(ONE, manifest=manifest)) == "search: linear wd"


def test_the_sparsity_that_was_asked_for() -> None:
    thirds = made({"b.0.up": [33] * 10}, {"b.0.up": 47})
    assert nominal_sparsity(thirds) == 0.7021  # 0.70212…: the same 330 of 470
    many = made({"b.0.up": [99_999]}, {"b.0.up": 100_000})
    assert nominal_sparsity(many) == 0.99999
    assert nominal_sparsity(ONE) == 0.5


def test_the_digest_is_of_names_and_zeros() -> None:
    others = [
        made({"b.0.up": [2, 1], "b.1.up": [3]}, {"b.0.up": 4, "b.1.up": 4}),
        made({"b.0.up": [1, 2, 3]}, {"b.0.up": 4}),
        made({"b.0.up": [1], "b.1.up": [2, 3]}, {"b.0.up": 4, "b.1.up": 4}),
    ]
    digests = {zeros_digest(one) for one in [ONE, *others]}
    assert len(digests) == 4
    assert zeros_digest(replace(ONE, manifest={})) == zeros_digest(ONE)
    assert zeros_digest(replace(ONE, pattern="n:4")) not in digests
