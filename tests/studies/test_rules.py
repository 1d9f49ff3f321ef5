"""Verdicts: from intervals and bars, worked out by hand."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from entangle.studies.claims import CLAIMS
from entangle.studies.rules import (
    CONTROL,
    MAIN,
    THRESHOLDS,
    Bar,
    decided,
    holm,
    p_value,
    verdict,
)

BARS: Mapping[str, Bar] = {
    "random": Bar(MAIN, 1.0, True), "norm": Bar(CONTROL, 1.0, True),
    "variance": Bar(CONTROL, 1.0, True),
}  # fmt: skip
ABOVE, BELOW, NONE = (2.0, 1.5, 2.7), (1.1, 0.9, 1.3), (1.2, math.nan, math.nan)
Ends = tuple[float, float, float]


def rows(setting: str = "", **ends: Ends) -> list[dict[str, object]]:
    return [
        {"claim": "c", "setting": setting, "number": name, "value": v, "low": low, "high": high}
        for name, (v, low, high) in ends.items()
    ]


def judged(*several: list[dict[str, object]], passes: str = "passes") -> str:
    table = pd.DataFrame([row for one in several for row in one])
    return verdict(decided(table, {"c": BARS}), BARS, passes)


@pytest.mark.parametrize(
    ("random", "norm_", "variance", "said"),
    [
        (ABOVE, ABOVE, ABOVE, "holds"),
        (ABOVE, BELOW, ABOVE, "weaker"),
        (ABOVE, ABOVE, NONE, "weaker"),
        (BELOW, ABOVE, ABOVE, "fails"),
        (NONE, ABOVE, ABOVE, "not measured"),
    ],
)
def test_what_each_verdict_needs(random: Ends, norm_: Ends, variance: Ends, said: str) -> None:
    assert judged(rows(random=random, norm=norm_, variance=variance)) == said


def test_a_control_that_is_missing_is_no_control_that_is_passed() -> None:
    assert judged(rows(random=ABOVE, norm=ABOVE)) == "weaker"
    assert judged(rows(norm=ABOVE, variance=ABOVE)) == "not measured"


def test_the_worst_setting_that_was_measured_counts() -> None:
    good = rows("90 %", random=ABOVE, norm=ABOVE, variance=ABOVE)
    weak = rows("95 %", random=ABOVE, norm=BELOW, variance=ABOVE)
    silent = rows("99 %", random=NONE, norm=NONE, variance=NONE)
    assert judged(good, weak, silent) == "weaker"
    assert judged(good, silent) == "holds"
    assert judged(silent) == "not measured"


def test_an_end_on_the_bar_does_not_pass() -> None:
    exact = (1.5, 1.0, 2.0)
    assert judged(rows(random=exact, norm=ABOVE, variance=ABOVE)) == "fails"


def test_p_values_are_those_of_the_interval() -> None:
    """An interval that ends on the bar has the p-value of its tail, on either scale."""
    plain, ratio = Bar(MAIN, 0.5), Bar(MAIN, 1.0, True)
    assert p_value(1.0, 0.5, 1.5, plain) == pytest.approx(0.025)
    assert p_value(2.0, 1.0, 4.0, ratio) == pytest.approx(0.025)
    assert p_value(0.5, 0.0, 1.0, plain) == pytest.approx(0.5)
    half = math.log(2.0) / norm.ppf(0.975)
    assert p_value(3.0, 1.5, 6.0, ratio) == pytest.approx(norm.sf(math.log(3.0) / half))
    assert math.isnan(p_value(1.0, math.nan, math.nan, plain))
    assert math.isnan(p_value(1.0, 1.0, 1.0, plain))
    assert math.isnan(p_value(1.0, -0.5, 2.0, ratio))  # no logarithm


def test_holm_by_hand() -> None:
    p = pd.Series([0.01, 0.04, math.nan, 0.03, 0.5], index=[3, 1, 4, 0, 2])
    found = holm(p)
    # 0.01 · 4, 0.03 · 3, then 0.04 · 2 = 0.08 raised to 0.09, and 0.5
    np.testing.assert_allclose(found.loc[[3, 0, 1, 2]], [0.04, 0.09, 0.09, 0.5])
    assert math.isnan(found.loc[4])


def test_adjustment_can_turn_a_verdict() -> None:
    near = (1.5, 1.02, 2.2)
    several = rows(random=near, norm=near, variance=near)
    assert judged(several) == "holds"
    assert judged(several, passes="passes_holm") == "fails"


def test_adjustment_never_makes_a_verdict_better() -> None:
    skewed, flat = (1.5, 0.99, 1.6), (1.0, 1.0, 1.0)  # the first passes by its p-value alone
    for one, said in ((skewed, "fails"), (flat, "fails")):
        several = rows(random=one, norm=ABOVE, variance=ABOVE)
        assert judged(several) == judged(several, passes="passes_holm") == said
    assert p_value(*skewed, BARS["random"]) < 0.005


def test_nothing_holds_without_a_main_comparison() -> None:
    table = decided(pd.DataFrame(rows(random=ABOVE)), {"c": {}})
    assert verdict(table, {}) == verdict(table, {"random": Bar(CONTROL, 1.0)}) == "not measured"


def test_numbers_without_a_bar_decide_nothing() -> None:
    table = decided(pd.DataFrame(rows(random=ABOVE, other=BELOW)), {"c": BARS})
    assert table["role"].tolist() == [MAIN, "shown"]
    assert table["passes"].tolist() == ["yes", ""]
    assert table["p"].notna().tolist() == [True, False]


def test_every_claim_has_a_main_comparison_and_a_control() -> None:
    assert set(THRESHOLDS) <= set(CLAIMS)
    for claim in CLAIMS.values():
        roles = [bar.role for bar in claim.bars.values()]
        assert roles.count(MAIN) >= 1
        assert roles.count(CONTROL) >= 1
