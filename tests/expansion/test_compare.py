import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.allocation.labels import nominal_sparsity
from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import EvaluationText, perplexity
from entangle.expansion import expand
from entangle.expansion.compare import (
    KIND,
    METHODS,
    Arm,
    Comparison,
    arms,
    at_equal_nonzeros,
    compare,
    load_comparison,
)
from entangle.models.loading import LanguageModel
from entangle.plotting import figure_comparison
from entangle.plotting.style import METHOD_PALETTE
from entangle.provenance import make_manifest, write_json
from entangle.seeding import torch_rng
from tests.allocation.samples import random_allocation

Tiny = Callable[[str], LanguageModel]
MEMORY = 1 << 28


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    ids = torch.randint(4, 90, (5, 16), generator=torch_rng(1, "evaluation"))
    return EvaluationText(ids, "random ids", {})


@pytest.fixture(scope="module")
def found(tiny: Tiny, calibration: CalibrationSet, text: EvaluationText) -> Comparison:
    """Magnitude, SparseGPT and both routers at two sparsities, on a tiny model."""
    chosen = arms(["magnitude", "sparsegpt", "expansion", "expansion-random"], [0.5, 0.8], [1, 3])
    return compare(tiny("llama"), calibration, text, chosen, memory=MEMORY)


def table(*rows: tuple[str, int, float, float]) -> pd.DataFrame:
    """Method, experts, non-zeros and perplexity of some models, at made-up sparsities."""
    frame = pd.DataFrame(list(rows), columns=["method", "experts", "nonzeros", "perplexity"])
    return frame.assign(sparsity=np.arange(len(frame)) / 10)


PLAIN = (
    ("dense", 1, 1.0, 10.0),
    ("sparsegpt", 1, 0.7, 20.0),
    ("sparsegpt", 1, 0.52, 80.0),
    ("magnitude", 1, 0.7, 1000.0),
)


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
        (["wanda"], [], [16], "nothing to build"),
        ([], [0.5], [16], "nothing to build"),
        (["expansion"], [0.5], [], "nothing to build"),
        (["expansion"], [0.5], [1], r"a number of `experts` above 1; got .* experts \[1\]"),
        (["wanda"], [0.5, 1.5], [1], r"`sparsity` must be in \[0, 1\]; got 1.5"),
        (["wanda"], [-0.1], [1], r"`sparsity` must be in \[0, 1\]"),
        (["wanda"], [math.nan], [1], r"`sparsity` must be in \[0, 1\]"),
        (["expansion"], [0.5], [4, 0], "`experts` must be at least 1; got 0"),
    ],
)
def test_arms_are_checked_before_any_work(
    methods: Sequence[str], sparsities: Sequence[float], experts: Sequence[int], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        arms(methods, sparsities, experts)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(UnknownName, match=r"unknown method 'wnda'\. Closest: wanda"):
        arms(["wnda"], [0.5], [16])


def test_every_method_has_a_colour() -> None:
    assert set(METHOD_PALETTE) == set(METHODS)


def test_every_arm_is_a_row_and_the_first_is_dense(found: Comparison) -> None:
    keys = found.frame[["method", "sparsity", "experts"]].to_numpy().tolist()
    expected = [["dense", 0.0, 1]]
    for sparsity in (0.5, 0.8):
        expected += [["magnitude", sparsity, 1], ["sparsegpt", sparsity, 1]]
        expected += [["expansion", sparsity, 3], ["expansion-random", sparsity, 3]]
    assert keys == expected
    dense = found.frame.iloc[0]
    assert dense[["ratio", "ratio_low", "ratio_high", "flops", "nonzeros"]].tolist() == [1.0] * 5
    assert found.frame["relative_error"].notna().tolist() == [False] + [True] * 8


def test_perplexities_are_those_of_the_windows_and_of_a_build(
    found: Comparison, tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    key = ["method", "sparsity", "experts"]
    means = np.exp(found.windows.groupby(key)["loss"].mean() / (text.seq_len - 1))
    values = found.frame.set_index(key)["perplexity"]
    np.testing.assert_allclose(means.loc[values.index], values, rtol=1e-6)
    assert found.windows["window"].tolist() == [*range(5)] * 9
    ratios = found.frame["perplexity"] / perplexity(tiny("llama"), text).value
    np.testing.assert_allclose(found.frame["ratio"], ratios, rtol=1e-5)
    built = expand(
        tiny("llama"), calibration, experts=3, sparsity=0.8, evaluation=text, progress=False
    )
    assert built.perplexity is not None
    assert values["expansion", 0.8, 3] == pytest.approx(built.perplexity.value, rel=1e-6)


def test_progress_is_told_after_each_arm(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    lines: list[str] = []
    chosen = arms(["magnitude"], [0.0], [1])
    found = compare(tiny("gpt2"), calibration, text, chosen, memory=MEMORY, told=lines.append)
    assert [line.split(":")[0] for line in lines] == ["dense 0 k=1", "magnitude 0 k=1"]
    assert found.frame["ratio"].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_equal_nonzeros_by_hand() -> None:
    frame = table(
        *PLAIN,
        ("expansion", 2, 0.61, 50.0),
        ("expansion", 4, 0.85, 60.0),
        ("expansion-random", 2, 0.7, 30.0),
    )
    equal = at_equal_nonzeros(frame)
    assert equal["competitor"].tolist() == ["sparsegpt"] * 3
    expected = [math.sqrt(20 * 80), math.sqrt(10 * 20), 20.0]
    assert equal["competitor_perplexity"].tolist() == pytest.approx(expected)
    assert equal["ratio"].tolist() == pytest.approx([50 / 40, 60 / math.sqrt(200), 1.5])
    kept = ["method", "sparsity", "experts", "nonzeros", "perplexity"]
    pd.testing.assert_frame_equal(
        equal[kept], frame.loc[4:, kept].reset_index(drop=True), check_dtype=False
    )


@pytest.mark.parametrize("nonzeros", [1.0, 1.4, 3.25])
def test_an_expansion_as_large_as_dense_competes_with_dense(nonzeros: float) -> None:
    row = at_equal_nonzeros(table(*PLAIN, ("expansion", 16, nonzeros, 25.0))).iloc[0]
    assert row[["competitor", "competitor_perplexity", "ratio"]].tolist() == ["dense", 10.0, 2.5]


def test_nothing_is_extrapolated() -> None:
    rows = at_equal_nonzeros(table(*PLAIN, ("expansion", 2, 0.5199, 90.0), PLAIN[1]))
    assert rows["competitor"].tolist() == ["outside the range"]
    assert rows[["competitor_perplexity", "ratio"]].isna().all(axis=None)


def test_infinite_perplexities_end_the_range_of_the_plain_method() -> None:
    rows = [*PLAIN[:2], ("sparsegpt", 1, 0.52, math.inf), ("expansion", 2, 0.6, 30.0)]
    assert at_equal_nonzeros(table(*rows))["competitor"].tolist() == ["outside the range"]


def test_without_its_plain_method_an_expansion_has_only_dense_to_compete_with() -> None:
    rows = [PLAIN[0], PLAIN[3], ("expansion", 2, 0.8, 30.0), ("expansion", 4, 1.1, 30.0)]
    equal = at_equal_nonzeros(table(*rows))
    assert equal["competitor"].tolist() == ["outside the range", "dense"]


def test_the_order_of_the_rows_does_not_matter() -> None:
    frame = table(*PLAIN, ("expansion", 2, 0.61, 50.0))
    pd.testing.assert_frame_equal(at_equal_nonzeros(frame[::-1]), at_equal_nonzeros(frame))


def test_no_expansion_makes_an_empty_table_of_the_same_columns() -> None:
    empty = at_equal_nonzeros(table(*PLAIN))
    full = at_equal_nonzeros(table(*PLAIN, ("expansion", 2, 0.61, 50.0)))
    assert empty.empty
    assert empty.dtypes.equals(full.dtypes)


def test_tables_that_are_no_comparison_are_refused() -> None:
    frame = table(*PLAIN)
    with pytest.raises(InvalidInput, match="without 'nonzeros'"):
        at_equal_nonzeros(frame.drop(columns="nonzeros"))
    with pytest.raises(InvalidInput, match="one row of the dense model; got 0"):
        at_equal_nonzeros(frame[1:])
    with pytest.raises(UnknownName, match="unknown method 'mine'"):
        at_equal_nonzeros(table(*PLAIN, ("mine", 2, 0.61, 50.0)))


def save(found: Comparison, folder: Path, *, kind: str = KIND) -> Path:
    folder.mkdir()
    found.frame.to_parquet(folder / "comparison.parquet", index=False)
    found.windows.to_parquet(folder / "windows.parquet", index=False)
    write_json(folder / "manifest.json", make_manifest(kind))
    return folder


def test_a_loaded_comparison_is_the_saved_one_and_draws(found: Comparison, tmp_path: Path) -> None:
    loaded = load_comparison(save(found, tmp_path / "c"))
    pd.testing.assert_frame_equal(loaded.frame, found.frame, check_dtype=False)
    pd.testing.assert_frame_equal(loaded.windows, found.windows, check_dtype=False)
    assert len(figure_comparison(loaded.frame).axes) == 2


def test_folders_that_hold_no_comparison_are_refused(found: Comparison, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no result folder"):
        load_comparison(tmp_path / "missing")
    with pytest.raises(InvalidInput, match="of kind 'comparison'; got 'scores'"):
        load_comparison(save(found, tmp_path / "other", kind="scores"))
    folder = save(found, tmp_path / "c")
    found.frame.drop(columns="ratio").to_parquet(folder / "comparison.parquet")
    with pytest.raises(InvalidInput, match="must have the column 'ratio'"):
        load_comparison(folder)
    (folder / "comparison.parquet").write_bytes(b"no table")
    with pytest.raises(InvalidInput, match=r"comparison\.parquet' cannot be read"):
        load_comparison(folder)


def test_every_method_is_built_with_every_allocation_beside_uniform(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    model = tiny("llama")
    first, second = random_allocation(model), random_allocation(model, seed=1)
    named = [("a", first), ("b", second)]
    shares = [nominal_sparsity(one) for one in (first, second)]
    chosen = arms(["sparsegpt", "expansion"], shares, [2], allocations=named)
    found = compare(model, calibration, text, chosen, allocations=named, memory=MEMORY)
    keys = found.frame[["method", "sparsity", "experts", "allocation"]].to_numpy().tolist()
    assert keys == [
        ["dense", 0.0, 1, "uniform"],
        *[[m, s, k, "uniform"] for s in shares for m, k in (("sparsegpt", 1), ("expansion", 2))],
        *[[m, s, k, name] for s, name in zip(shares, "ab", strict=True)
          for m, k in (("sparsegpt", 1), ("expansion", 2))],
    ]  # fmt: skip
    index = found.frame.set_index(["method", "allocation", "sparsity"]).to_dict("index")
    for (name, allocation), share in zip(named, shares, strict=True):
        for method, k in (("sparsegpt", 1), ("expansion", 2)):
            alone = expand(
                model, calibration, experts=k, allocation=allocation, evaluation=text,
                progress=False,
            )  # fmt: skip
            assert alone.perplexity is not None
            row, even = index[method, name, share], index[method, "uniform", share]
            assert row["perplexity"] == pytest.approx(alone.perplexity.value, rel=1e-6)
            assert row["nonzeros"] == pytest.approx(even["nonzeros"], rel=1e-12)
            assert row["uniform_ratio"] == pytest.approx(row["perplexity"] / even["perplexity"])
            assert row["uniform_low"] <= row["uniform_ratio"] <= row["uniform_high"]
    assert found.frame["uniform_ratio"].isna().tolist() == [True] * 5 + [False] * 4
    assert set(found.windows["allocation"]) == {"uniform", "a", "b"}
    equal = at_equal_nonzeros(found.frame)
    assert equal["allocation"].tolist() == ["uniform", "uniform", "a", "b"]


def test_an_allocation_with_experts_is_built_with_them(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    model = tiny("llama")
    plain = random_allocation(model)
    numbers = [3 if ".layers.0." in name else 1 for name in plain.zeros]
    routed = replace(plain, experts=dict(zip(plain.zeros, numbers, strict=True)))
    named = [("routed", routed)]
    chosen = arms(["sparsegpt", "expansion"], [], [4, 8], allocations=named)
    assert [(arm.method, arm.experts) for arm in chosen] == [("sparsegpt", 1), ("expansion", 2)]
    found = compare(model, calibration, text, chosen, allocations=named, memory=MEMORY)
    sizes = found.frame.set_index("method")["nonzeros"]
    assert sizes["dense"] > sizes["sparsegpt"] < sizes["expansion"]


def test_allocations_that_cannot_be_told_apart_or_compared_are_refused(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    one = random_allocation(tiny("llama"))
    with pytest.raises(InvalidInput, match="must not be called 'uniform'"):
        arms(["wanda"], [0.5], [1], allocations=[("uniform", one)])
    with pytest.raises(InvalidInput, match="are called 'a' and could not be told apart"):
        arms(["wanda"], [0.5], [1], allocations=[("a", one), ("a", one)])
    others = [("a", one), ("b", random_allocation(tiny("llama"), proj="up_proj"))]
    chosen = arms(["magnitude"], [0.5], [1], allocations=others)
    with pytest.raises(InvalidInput, match="must be for the same layers; 'a' has 9 and 'b' has 3"):
        compare(tiny("llama"), calibration, text, chosen, allocations=others, memory=MEMORY)


def test_tables_without_allocations_are_uniform(found: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    found.frame.drop(columns="allocation").to_parquet(folder / "comparison.parquet")
    found.windows.drop(columns="allocation").to_parquet(folder / "windows.parquet")
    write_json(folder / "manifest.json", make_manifest(KIND))
    loaded = load_comparison(folder)
    assert set(loaded.frame["allocation"]) == set(loaded.windows["allocation"]) == {"uniform"}
