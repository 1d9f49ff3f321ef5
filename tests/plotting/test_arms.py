"""Which arms a figure shows, what it calls them, and what it refuses."""

import numpy as np
import pandas as pd
import pytest

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting.arms import SEEDS, Panel, read_arms, series_name, split_panels
from tests.plotting.ablation_frames import ablation_frame

RATIO = "perplexity_ratio"


@pytest.fixture
def frame() -> pd.DataFrame:
    return ablation_frame()


def of_top(frame: pd.DataFrame) -> pd.Series:
    return frame["selection"].eq("top") & frame["by"].eq("wd")


def test_arms_are_those_of_one_measure_without_the_dense_model(frame: pd.DataFrame) -> None:
    arms = read_arms(frame, "perplexity")
    assert len(arms.rows) == 3 * (3 + 5)
    assert set(arms.rows["measure"]) == {"perplexity"}
    assert (arms.dense, arms.perplexity) == (20.0, 20.0)
    assert read_arms(frame, RATIO).dense == 1.0
    assert read_arms(frame[frame["selection"] != "dense"], RATIO).dense is None


@pytest.mark.parametrize(
    ("measure", "label", "unit"),
    [
        ("perplexity", "perplexity per token", 1.0),
        ("perplexity_ratio", "perplexity (× dense)", 1.0),
        ("kl", "KL from dense (nats per token)", 1.0),
        ("top1_agreement", "top-1 agreement with dense (%)", 100.0),
        ("accuracy", "accuracy on minimal pairs (%)", 100.0),
        ("accuracy:wh_island", "accuracy on wh_island (%)", 100.0),
        ("accuracy_difference", "accuracy − dense (% points)", 100.0),
    ],
)
def test_measures_have_units(frame: pd.DataFrame, measure: str, label: str, unit: float) -> None:
    own = frame[frame["measure"] == RATIO]
    arms = read_arms(own.assign(measure=measure), measure)
    assert arms.label == label
    assert arms.dense == unit
    names = ["value", "low", "high"]
    expected = unit * own.loc[own["selection"] != "dense", names].to_numpy()
    np.testing.assert_allclose(arms.rows[names].to_numpy(), expected)


@pytest.mark.parametrize(
    ("rule", "by", "name"),
    [
        ("top", "wd", "top WD"),
        ("bottom", "weight_norm", "bottom weight norm"),
        ("top", "abs_mean", "top |mean|"),
        ("random", "", "random"),
        ("random-norm", "weight_norm", "random, matched weight norm"),
        ("random-variance", "variance", "random, matched variance"),
        ("listed", "", "listed"),
        ("top", "mine", "top mine"),
        ("matched", "wd", "bottom WD, matched perplexity"),
    ],
)
def test_names_of_selections(rule: str, by: str, name: str) -> None:
    assert series_name(rule, by) == name
    assert series_name(rule, by, "kmeans") == name
    if rule != "matched":
        assert series_name(rule, by, "random") == f"{name}, random clusters"


def test_routers_tell_arms_apart() -> None:
    both = [
        ablation_frame(experts=(1,)).assign(router=""),
        *(ablation_frame(experts=(4,)).assign(router=name) for name in ("kmeans", "random")),
    ]
    table = pd.concat(both, ignore_index=True)
    series = read_arms(table, RATIO).series()
    assert series["top WD, random clusters"] == ("top", "wd")
    assert len(series) == 2 * len(read_arms(both[0], RATIO).series())
    with pytest.raises(InvalidInput, match=r"`frame`.*'top WD'"):
        read_arms(table.drop(columns="router"), RATIO)


def test_labels_count_seeds_and_unusual_numbers_of_neurons(frame: pd.DataFrame) -> None:
    assert read_arms(frame, RATIO).labels() == {
        "top WD": "top WD", "top variance": "top variance", "bottom WD": "bottom WD",
        "random": "random (5 seeds)",
    }  # fmt: skip
    frame.loc[frame["selection"] == "bottom", "n_rows"] = [1384] * 4 + [1500] * 2
    arms = read_arms(frame, RATIO)
    assert arms.labels()["bottom WD"] == "bottom WD (n = 1,384–1,500)"
    assert "n = 39 neurons in 9 layers" in arms.notes(None)


def test_notes_say_what_the_arms_are(frame: pd.DataFrame) -> None:
    assert read_arms(frame, RATIO).notes("WikiText-2") == [
        "model tiny",
        "evaluated on WikiText-2",
        "n = 39 neurons in 9 layers",
        "dense perplexity 20",
        "bars: 95 % paired bootstrap over windows",
        SEEDS,
    ]


def test_notes_say_no_more_than_they_know(frame: pd.DataFrame) -> None:
    rows = frame[of_top(frame)].assign(n_rows=1, layers="1 layers", measure="accuracy")
    rows = rows.drop_duplicates("strength")
    notes = ["model tiny", "n = 1 neuron in 1 layer", "bars: 95 % Wilson"]
    assert read_arms(rows, "accuracy").notes(None) == notes
    rows["layers"] = ["1 layers", "2 layers", "3 layers"]
    assert read_arms(rows, "accuracy").notes(None)[1] == "n = 1 neuron"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_arms_that_are_not_finite_are_left_out_and_named(frame: pd.DataFrame, value: float) -> None:
    frame.loc[of_top(frame) & frame["strength"].eq(0.99), "value"] = value
    frame.loc[frame["seed"].eq(2).fillna(False), "value"] = value
    frame.loc[of_top(frame) & frame["strength"].eq(0.9), "high"] = value
    arms = read_arms(frame, RATIO)
    assert np.isfinite(arms.rows["value"]).all()
    assert len(arms.rows) == 24 - 1 - 3
    assert arms.notes(None)[-2:] == [
        "left out, not finite: 3 of random, 1 of top WD", "1 without a finite interval",
    ]  # fmt: skip


def test_where_chooses_arms_and_names_what_there_is() -> None:
    arms = read_arms(ablation_frame(interventions=("prune", "zero"), experts=(1, 16)), RATIO)
    chosen = arms.where(intervention="zero", experts=16, strength=None)
    assert set(chosen.rows["intervention"]) == {"zero"}
    assert chosen.levels("experts") == [16]
    assert chosen.levels("strength") == [0.9, 0.95, 0.99]
    with pytest.raises(UnknownName, match=r"intervention.*'zeros'"):
        arms.where(intervention="zeros")
    with pytest.raises(InvalidInput, match=r"`experts`.*\b1\b.*\b16\b.*\b4\b"):
        arms.where(experts=4)
    with pytest.raises(InvalidInput, match=r"`strength`.*\b0\.9\b.*\b0\.95\b.*\b0\.99\b"):
        arms.where(strength=0.5)


def test_an_unknown_measure_is_refused_with_those_there_are(frame: pd.DataFrame) -> None:
    for measure in ("perplexty", "kl", "mine"):
        with pytest.raises(UnknownName, match=f"'{measure}'"):
            read_arms(frame.replace({"measure": {"perplexity_ratio": "mine"}}), measure)


def test_arms_that_cannot_be_told_apart_are_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match="'top WD'"):
        read_arms(pd.concat([frame, frame[of_top(frame)]]), RATIO)
    with pytest.raises(InvalidInput, match=r"several.*'random'"):
        read_arms(frame.assign(seed=frame["seed"].replace(4, 3)), RATIO)
    other = frame.assign(model="other")
    with pytest.raises(InvalidInput, match=r"`frame`.*\b2\b"):
        read_arms(pd.concat([frame, other]), RATIO)


def test_a_table_without_a_finite_arm_is_refused(frame: pd.DataFrame) -> None:
    for rows, n in ((frame[frame["selection"] == "dense"], 0), (frame.assign(value=np.inf), 24)):
        with pytest.raises(InvalidInput, match=rf"perplexity_ratio.*{n}"):
            read_arms(rows, RATIO)


def test_a_panel_knows_its_title_and_axis() -> None:
    arms = read_arms(ablation_frame(interventions=("prune", "zero"), experts=(1, 16)), RATIO)
    plain = Panel.of(arms.where(intervention="prune", experts=1))
    assert (plain.title, plain.xlabel) == ("SparseGPT", "zeros in each selected row (%)")
    assert plain.ticks() == {0.9: "90", 0.95: "95", 0.99: "99"}
    routed = Panel.of(arms.where(intervention="prune", experts=16))
    assert routed.title == "SparseGPT, 16 experts"
    across = Panel.of(arms.where(intervention="prune", strength=0.95))
    assert (across.title, across.xlabel) == ("SparseGPT, 95 % zeros", "number of experts")
    assert across.ticks() == {1: "1", 16: "16"}
    edit = Panel.of(arms.where(intervention="zero", experts=1))
    assert (edit.title, edit.xlabel) == ("Outputs set to 0", "share of the edit (%)")


def test_too_much_for_one_panel_is_refused() -> None:
    arms = read_arms(ablation_frame(interventions=("prune", "zero"), experts=(1, 16)), RATIO)
    with pytest.raises(InvalidInput, match=r"`intervention`.*\bNone\b"):
        Panel.of(arms)
    with pytest.raises(InvalidInput, match=r"`experts`.*\b1\b.*\b16\b.*`strength`"):
        Panel.of(arms.where(intervention="prune"))


def test_panels_are_interventions_and_strengths_where_experts_vary() -> None:
    routed, edited = ablation_frame(experts=(1, 4)), ablation_frame(interventions=("zero",))
    arms = read_arms(pd.concat([routed, edited[edited["selection"] != "dense"]]), RATIO)
    panels = split_panels(arms, most=4)
    assert [panel.title for panel in panels] == [
        "SparseGPT, 90 % zeros", "SparseGPT, 95 % zeros", "SparseGPT, 99 % zeros",
        "Outputs set to 0",
    ]  # fmt: skip
    assert [panel.x for panel in panels] == ["experts"] * 3 + ["strength"]
    assert sum(len(panel.arms.rows) for panel in panels) == len(arms.rows)
    with pytest.raises(InvalidInput, match=r"`frame`.*\b3\b.*\b4\b"):
        split_panels(arms, most=3)
