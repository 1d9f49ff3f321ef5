import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.errors import InvalidInput, Unavailable, UnknownName
from entangle.experiments.selection import (
    DERIVED,
    Selection,
    check_scores_fit,
    read_selection,
    select,
    select_listed,
)
from entangle.models.loading import LanguageModel, as_language_model
from entangle.results.scores import NeuronScores
from entangle.scoring.score import score
from entangle.seeding import numpy_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.experiments.frames import as_lists, frame_of
from tests.tiny_models import TINY

RANKED = ("top", "bottom", "random")

few = settings(max_examples=30, deadline=None)
tables = st.tuples(
    st.lists(st.integers(2, 12), min_size=1, max_size=3).map(tuple),
    st.integers(0, 2**32),
    st.sampled_from([1, 3, 1000]),  # all equal, many ties, few ties
)


def drawn_frame(table: tuple[tuple[int, ...], int, int]) -> pd.DataFrame:
    sizes, seed, levels = table
    values = numpy_rng(seed, "wd").integers(0, levels, sum(sizes))
    return frame_of({"wd": values.astype(np.float64)}, sizes)


def test_a_case_by_hand() -> None:
    frame = frame_of({"wd": [0.3, 0.1, 0.5, 0.5, np.nan, 0.2], "flag": [*[""] * 4, "constant", ""]})
    assert as_lists(select(frame, "top", count=2)) == {"l0": [2, 3]}
    assert as_lists(select(frame, "top", count=1)) == {"l0": [2]}
    assert as_lists(select(frame, "bottom", count=2)) == {"l0": [1, 5]}
    assert as_lists(select(frame, "top", fraction=0.4)) == {"l0": [2, 3]}
    assert as_lists(select(frame, "top", fraction=0.01)) == {"l0": [2]}
    assert as_lists(select(frame, "all")) == {"l0": [0, 1, 2, 3, 4, 5]}
    assert as_lists(select(frame, "random", count=5)) == {"l0": [0, 1, 2, 3, 5]}


def test_one_order_for_the_whole_model() -> None:
    frame = frame_of({"wd": [0.1, 0.9, 0.2, 0.3, 0.8, 0.7]}, (3, 3))
    assert as_lists(select(frame, "top", count=3, scope="model")) == {"l0": [1], "l1": [1, 2]}
    assert as_lists(select(frame, "top", fraction=0.2, scope="model")) == {"l0": [1]}
    assert as_lists(select(frame, "top", count=1)) == {"l0": [1], "l1": [1]}
    drawn = select(frame, "random", count=6, scope="model")
    assert as_lists(drawn) == {"l0": [0, 1, 2], "l1": [0, 1, 2]}


@pytest.mark.parametrize(
    ("by", "values"),
    [
        ("variance", {"std": [1, 5, 2, 3, 4, 0]}),
        ("abs_mean", {"mean": [1, -5, 2, -3, 4, 0]}),
        ("abs_skewness", {"skewness": [1, -5, 2, -3, 4, 0]}),
        ("md", {"md": [1, 5, 2, 3, 4, 0]}),
    ],
)
def test_columns_that_are_derived(by: str, values: dict[str, list[float]]) -> None:
    assert as_lists(select(frame_of(values), "top", by=by, count=2)) == {"l0": [1, 4]}
    assert set(DERIVED) == {"variance", "abs_mean", "abs_skewness"}


@few
@given(tables, st.integers(1, 6), st.sampled_from(["layer", "model"]))
def test_top_and_bottom_are_apart_and_of_the_size_asked_for(
    table: tuple[tuple[int, ...], int, int], count: int, scope: str
) -> None:
    frame = drawn_frame(table)
    sizes = frame.groupby("layer").size() if scope == "layer" else pd.Series({"": len(frame)})
    if count > sizes.min():
        with pytest.raises(InvalidInput, match=r"fit.*`fraction`"):
            select(frame, "top", count=count, scope=scope)
        return
    top, bottom, drawn = (select(frame, r, count=count, scope=scope) for r in RANKED)
    for one in (top, bottom, drawn):
        assert one.n_rows == count * len(sizes)
        assert all(np.array_equal(rows, np.unique(rows)) for rows in one.rows.values())
    values = frame.set_index(["layer", "neuron"])["wd"]
    for layer, rows in top.rows.items() if scope == "layer" else ():
        others = values[layer].drop(rows)
        assert others.empty or values[layer][rows].min() >= others.max()
    if 2 * count <= sizes.min():
        common = [np.intersect1d(top.rows[name], bottom.rows.get(name, [])) for name in top.rows]
        assert sum(map(len, common)) == 0


@few
@given(tables, st.sampled_from(RANKED), st.sampled_from(["layer", "model"]), st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(
    table: tuple[tuple[int, ...], int, int], rule: str, scope: str, seed: int
) -> None:
    frame = drawn_frame(table)
    shuffled = frame.iloc[numpy_rng(seed, "shuffle").permutation(len(frame))]
    one, other = (select(f, rule, fraction=0.3, scope=scope, seed=seed) for f in (frame, shuffled))
    assert one.describe() == other.describe()
    like = [select(f, "top", count=1) for f in (frame, shuffled)]
    for matched in ("random-norm", "random-variance"):
        one, other = (
            select(f, matched, seed=seed, like=top)
            for f, top in zip((frame, shuffled), like, strict=True)
        )
        assert one.describe() == other.describe()


@few
@given(st.floats(0.01, 1), st.integers(1, 300))
def test_a_fraction_is_rounded_to_whole_neurons(fraction: float, size: int) -> None:
    found = select(frame_of({}, (size, 7)), "random", fraction=fraction)
    expected = {"l0": max(1, round(fraction * size)), "l1": max(1, round(fraction * 7))}
    assert found.describe()["layers"] == expected


def test_seeds_reproduce_differ_and_grow() -> None:
    frame = frame_of({}, (200, 200))
    first = select(frame, "random", count=20, seed=3)
    assert as_lists(first) == as_lists(select(frame, "random", count=20, seed=3))
    assert as_lists(first) != as_lists(select(frame, "random", count=20, seed=4))
    assert first.rows["l0"].tolist() != first.rows["l1"].tolist()
    larger = select(frame, "random", count=50, seed=3)
    assert all(set(first.rows[name]) <= set(larger.rows[name]) for name in first.rows)


def test_a_random_draw_is_even() -> None:
    frame, counts = frame_of({}, (20,)), np.zeros(20)
    for seed in range(200):
        counts[select(frame, "random", count=5, seed=seed).rows["l0"]] += 1
    assert counts.sum() == 1000
    assert np.abs(counts - 50).max() < 5 * np.sqrt(200 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("rule", "options", "error"),
    [
        ("topp", {"count": 1}, "'topp'"),
        ("listed", {"count": 1}, r"'listed'.*select_listed"),
        ("top", {}, r"`fraction`.*`count`.*\bNone\b.*\bNone\b"),
        ("top", {"count": 1, "fraction": 0.5}, r"'top'.*\b0\.5\b.*\b1\b"),
        ("all", {"count": 1}, r"`fraction`.*`count`.*\bNone\b.*\b1\b"),
        ("top", {"fraction": 0.0}, r"`fraction`.*\(0, 1\].*\b0\.0\b"),
        ("top", {"fraction": 1.01}, r"`fraction`.*\(0, 1\].*\b1\.01\b"),
        ("top", {"fraction": float("nan")}, r"`fraction`.*\bnan\b"),
        ("top", {"count": 0}, r"`count`.*\b1\b.*\b0\b"),
        ("top", {"count": True}, r"`count`.*\b1\b.*\bTrue\b"),
        ("top", {"count": 7}, r"\b7\b.*'l0'.*\b6\b"),
        ("random", {"count": 7}, r"'l0'.*\b6\b.*without"),
        ("top", {"count": 7, "scope": "model"}, r"fit.*\b6\b.*`fraction`"),
        ("top", {"count": 1, "by": "wdd"}, "'wdd'"),
        ("top", {"count": 1, "by": "layer"}, "'layer'"),
        ("top", {"count": 1, "scope": "block"}, r"scope.*'block'"),
        ("top", {"count": 1, "seed": -1}, r"`seed`.*-1\b"),
        ("random-norm", {}, r"`like`.*\bNone\b.*'random-norm'"),
    ],
)
def test_what_is_refused(rule: str, options: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidInput, match=error):
        select(frame_of({}), rule, **options)


def test_what_is_refused_of_a_matched_rule() -> None:
    frame = frame_of({}, (6, 6))
    top = select(frame, "top", count=4)
    with pytest.raises(InvalidInput, match=r"'top wd'.*'top'"):
        select(frame, "top", count=1, like=top)
    with pytest.raises(InvalidInput, match=r"'random-norm'.*\bNone\b"):
        select(frame, "random-norm", count=4, like=top)
    with pytest.raises(InvalidInput, match=r"\b4\b.*'l0'.*\b4\b.*\b2\b"):
        select(frame, "random-norm", like=top)
    with pytest.raises(UnknownName, match=r"'l1'.*l0"):
        select(frame[frame["layer"] == "l0"], "random-norm", like=select(frame, "top", count=1))
    flagged = frame.assign(flag=["nan", *[""] * 11])
    with pytest.raises(InvalidInput, match=r"\b1\b.*'l0'.*\b0\b.*\b5\b"):
        select(flagged, "random-norm", like=select_listed({"l0": [0]}, frame))


def test_a_table_that_is_no_frame_of_scores() -> None:
    frame = frame_of({})
    with pytest.raises(InvalidInput, match="'flag'"):
        select(frame.drop(columns="flag"), "all")
    with pytest.raises(InvalidInput, match=r"\b0\b.*'l0'"):
        select(pd.concat([frame, frame]), "top", count=1)
    with pytest.raises(InvalidInput, match=r"`scores`.*neuron"):
        select(frame.iloc[:0], "top", fraction=0.5)
    with pytest.raises(UnknownName, match="'variance'"):
        select(frame.drop(columns="std"), "top", by="variance", count=1)


def test_blocks_keep_the_order_of_the_model() -> None:
    frame = frame_of({}, (2,) * 12)
    frame["layer"] = [f"layers.{block}.up" for block in frame["block"]]
    head = frame.iloc[:2].assign(layer="a_head", block=pd.array([None] * 2, dtype="Int64"))
    found = select(pd.concat([head, frame.iloc[::-1]]), "top", count=1)
    assert list(found.rows) == [*(f"layers.{i}.up" for i in range(12)), "a_head"]


def test_names_and_manifest() -> None:
    frame = frame_of({}, (40, 20))
    top = select(frame, "top", fraction=0.1)
    like = {"like": top, "seed": 1}
    rules: list[tuple[Selection, str]] = [
        (top, "top wd"),
        (select(frame, "bottom", by="abs_mean", count=1), "bottom abs mean"),
        (select(frame, "random", count=1), "random"),
        (select(frame, "random-norm", **like), "random matched in weight norm"),  # type: ignore[arg-type]
        (select(frame, "random-variance", **like), "random matched in variance"),  # type: ignore[arg-type]
        (select(frame, "all"), "all"),
        (select_listed({"l1": [3, 1]}, frame), "listed"),
    ]
    for selection, name in rules:
        described = selection.describe()
        assert (selection.name, described["name"]) == (name, name)
        assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert top.describe() | {"sha256": None} == {
        "name": "top wd", "rule": "top", "by": "wd", "seed": None, "n_rows": 6,
        "layers": {"l0": 4, "l1": 2}, "sha256": None, "match": None,
    }  # fmt: skip
    assert len({str(selection.describe()["sha256"]) for selection, _ in rules}) == len(rules)
    assert rules[2][0].seed == 0
    assert rules[3][0].seed == 1


def test_a_selection_cannot_be_changed() -> None:
    top = select(frame_of({}), "top", count=2)
    with pytest.raises(ValueError, match="read-only"):
        top.rows["l0"][0] = 5
    with pytest.raises(FrozenInstanceError):
        top.rule = "all"  # type: ignore[misc]


def test_listed_rows() -> None:
    frame = frame_of({}, (6, 3))
    found = select_listed({"l1": (2, 0), "l0": []}, frame)
    assert as_lists(found) == {"l1": [0, 2]}
    assert found.n_rows == 2
    refused: list[tuple[dict[str, list[int]], str]] = [
        ({"l0": [0, 6]}, r"'l0'.*\b6\b.*\b0\b.*\b5\b.*\b6\b"),
        ({"l0": [-1]}, r"`rows\['l0'\]`.*-1\b"),
        ({"l0": [3, 1, 3]}, r"\b3\b.*'l0'.*\b2\b"),
        ({"l2": [0]}, r"'l2'.*l1"),
        ({"l0": []}, r"neuron.*'listed'"),
        ({}, r"neuron.*'listed'"),
    ]
    for rows, error in refused:
        with pytest.raises(InvalidInput, match=error):
            select_listed(rows, frame)
    floats: Any = {"l0": iter([1.5])}
    with pytest.raises(InvalidInput, match=r"l0.*\b1\.5\b"):
        select_listed(floats, frame)


def test_a_selection_can_be_written_and_read(tmp_path: Path) -> None:
    frame = frame_of({}, (30, 20))
    top = select(frame, "top", count=4)
    top.frame.assign(note="x").to_csv(tmp_path / "rows.csv", index=False)
    top.frame.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        found = read_selection(tmp_path / name, frame)
        assert (found.rule, as_lists(found)) == ("listed", as_lists(top))
        assert found.describe()["sha256"] == top.describe()["sha256"]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.txt", "layer,neuron\n", r"parquet.*a\.txt"),
        ("a.csv", "", r"a\.csv'.*read"),
        ("a.parquet", "layer,neuron\n", r"a\.parquet'.*read"),
        ("a.csv", "layer,row\nl0,1\n", "'neuron'"),
        ("a.csv", "layer,neuron\nl0,1.5\n", r"a\.csv'.*integer neuron"),
        ("a.csv", "layer,neuron\n,1\n", r"a\.csv'.*integer neuron"),
        ("a.csv", "layer,neuron\nl0,9\n", "got 9"),
        ("a.csv", "layer,neuron\n7,1\n", "'7'"),
    ],
)
def test_files_that_are_refused(name: str, content: str | None, error: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=error):
        read_selection(tmp_path / name, frame_of({}))


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"none\.csv"):
        read_selection(tmp_path / "none.csv", frame_of({}))


@pytest.fixture(scope="module")
def scores(tiny: Callable[[str], LanguageModel], calibration: CalibrationSet) -> NeuronScores:
    return score(tiny("llama"), calibration, layers=1, proj=None)


def test_real_scores_fit_their_model(
    scores: NeuronScores, tiny: Callable[[str], LanguageModel]
) -> None:
    check_scores_fit(scores, tiny("llama"))
    top = select(scores.frame, "top", fraction=0.1)
    best = scores.layer("model.layers.1.mlp.gate_proj").top(5)["neuron"]
    assert top.rows["model.layers.1.mlp.gate_proj"].tolist() == sorted(best)


def test_scores_of_another_model(
    scores: NeuronScores, tiny: Callable[[str], LanguageModel]
) -> None:
    module = TINY["llama"]()
    next(module.parameters())[0, 0] += 1
    changed = as_language_model(module)
    one, other = tiny("llama").digest[:12], changed.digest[:12]
    with pytest.raises(InvalidInput, match=rf"digest.*{other}.*{one}"):
        check_scores_fit(scores, changed)
    with pytest.raises(InvalidInput, match=r"digest.*none"):
        check_scores_fit(replace(scores, manifest={}), tiny("llama"))


def test_scores_whose_table_was_altered(
    scores: NeuronScores, tiny: Callable[[str], LanguageModel]
) -> None:
    frame = scores.frame
    with pytest.raises(UnknownName, match=r"'model\.layers\.7\.mlp\.up_proj'"):
        check_scores_fit(
            replace(
                scores,
                frame=frame.replace("model.layers.1.mlp.up_proj", "model.layers.7.mlp.up_proj"),
            ),
            tiny("llama"),
        )
    with pytest.raises(InvalidInput, match=r"scores.*\b1\b"):
        check_scores_fit(replace(scores, frame=frame.drop(index=0)), tiny("llama"))
