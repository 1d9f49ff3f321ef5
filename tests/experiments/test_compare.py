import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entangle.allocation.experts import nominal_sparsity
from entangle.errors import InvalidInput, NumericalError, UnknownName
from entangle.evaluation import EvaluationText, perplexity
from entangle.experiments.compare import (
    Comparison,
    ComparisonArm,
    arms,
    at_equal_nonzeros,
    common_layers,
    compare,
)
from entangle.experts.expand import Expansion, expand
from entangle.models.loading import LanguageModel
from entangle.plotting.style import METHOD_PALETTE
from entangle.results.comparison import COMPARED_METHODS
from entangle.texts.calibration_set import CalibrationSet
from tests.allocation.samples import random_allocation

Tiny = Callable[[str], LanguageModel]


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


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ({"chosen": [ComparisonArm("magnitude", 0.0, 1)]}, "methods"),
        ({"methods": [ComparisonArm("magnitude", 0.0, 1)]}, "methods"),
        ({"told": print, "methods": "magnitude", "sparsity": 0.0}, "progress"),
        ({"text": None, "methods": "magnitude", "sparsity": 0.0}, "evaluation"),
    ],
)
def test_the_former_names_are_accepted_with_a_note(
    former: dict[str, Any], now: str, tiny: Tiny, calibration: CalibrationSet,
    text: EvaluationText, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = {"text" if "text" in former else "evaluation": text}
    with pytest.warns(DeprecationWarning, match=f"`{now}`"):
        found = compare(tiny("gpt2"), calibration, **former | given)
    assert found.frame["ratio"].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    labels = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert labels == (["dense 0 k=1", "magnitude 0 k=1"] if "told" in former else [])


def test_what_says_one_thing_twice_is_refused(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    arm = ComparisonArm("magnitude", 0.0, 1)
    for twice in ({"sparsity": 0.5}, {"experts": 4}):
        with (
            pytest.warns(DeprecationWarning, match="arms"),
            pytest.raises(InvalidInput, match=next(iter(twice))),
        ):
            compare(tiny("gpt2"), calibration, text, [arm], **twice)
    with pytest.warns(DeprecationWarning, match="arms"), pytest.raises(InvalidInput, match="wanda"):
        compare(tiny("gpt2"), calibration, text, [arm, "wanda"])


@pytest.mark.parametrize("group", [None, 4])
def test_every_method_is_built_with_every_allocation_beside_uniform(
    group: int | None, tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    model = tiny("llama")
    first, second = (random_allocation(model, seed=seed, group=group) for seed in (0, 1))
    named = [("a", first), ("b", second)]
    shares = [nominal_sparsity(one) for one in (first, second)]
    found = compare(
        model, calibration, text, methods=["sparsegpt", "expansion"], experts=2, allocations=named
    )
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


def test_an_allocation_that_does_not_fit_is_told_before_anything_is_built(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path
) -> None:
    model = tiny("llama")
    allocation = random_allocation(model)
    name = next(iter(allocation.zeros))
    wide = replace(allocation, in_features={**allocation.in_features, name: 1000})
    with pytest.raises(InvalidInput, match=f"{name}.*1000"):
        compare(
            model, calibration, text, methods="wanda", sparsity=0.5, allocations=("a", wide),
            out=tmp_path / "c",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


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
    found = compare(
        model, calibration, text, methods=["sparsegpt", "expansion"], sparsity=[],
        experts=[4, 8], allocations=named,
    )  # fmt: skip
    sizes = found.frame.set_index("method")["nonzeros"]
    assert sizes["dense"] > sizes["sparsegpt"] < sizes["expansion"]


def tables(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every table that does not hold seconds."""
    files = folder.glob("*.parquet")
    return {path.name: path.read_bytes() for path in files if path.name != "seconds.parquet"}


class Counted:
    """Stands in for `expand`: counts the arms, and fails at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = import_module("entangle.experiments.compare")
        self.arms: list[object] = []
        self.fail_at, self.error = -1, KeyboardInterrupt("stopped")
        monkeypatch.setattr(self.module, "expand", self)

    def __call__(self, *texts: object, **settings: object) -> Expansion:
        if len(self.arms) == self.fail_at:
            raise self.error
        self.arms.append(settings["pruner"])
        return expand(*texts, **settings)  # type: ignore[arg-type]


def chosen(*methods: str, experts: int = 2) -> dict[str, Any]:
    return {"methods": methods, "sparsity": 0.5, "experts": experts}


CHOSEN = chosen("magnitude", "wanda", "sparsegpt", "expansion")


def test_an_interrupted_comparison_goes_on_to_the_same_tables(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, counted = tiny("llama"), Counted(monkeypatch)
    compare(model, calibration, text, **CHOSEN, out=tmp_path / "whole")
    counted.arms, counted.fail_at = [], 2
    with pytest.raises(KeyboardInterrupt):
        compare(model, calibration, text, **CHOSEN, out=tmp_path / "cut")
    kept = sorted(path.name for path in (tmp_path / ".cut.comparing").glob("arm-*"))
    assert len(kept) == 2
    assert not (tmp_path / "cut").exists()
    with pytest.raises(InvalidInput, match=r"cut'.*beside"):
        compare(model, calibration, text, **CHOSEN, out=tmp_path / "cut")
    for other in ({"seed": 1}, chosen("magnitude", "wanda", "sparsegpt")):
        settings = {**CHOSEN, **other}
        with pytest.raises(InvalidInput, match=r"cut'.*--force.*force=True.*--resume"):
            compare(model, calibration, text, out=tmp_path / "cut", resume=True, **settings)
    counted.arms, counted.fail_at = [], -1
    compare(
        model, calibration, text, **CHOSEN, out=tmp_path / "cut", resume=True,
        memory=2**22,  # what is no part of the plan
    )  # fmt: skip
    assert counted.arms == ["sparsegpt", "sparsegpt"]
    assert tables(tmp_path / "cut") == tables(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_finished_comparison_is_read_again(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, counted = tiny("llama"), Counted(monkeypatch)
    first = compare(model, calibration, text, **chosen("magnitude"), out=tmp_path / "c")
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    again = compare(
        model, calibration, text, **chosen("magnitude"), out=tmp_path / "c", resume=True
    )
    assert counted.arms == ["magnitude"]
    assert again.frame.equals(first.frame)
    assert again.manifest == first.manifest
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before
    for resume in (True, False):
        with pytest.raises(InvalidInput, match=r"c'.*--force.*force=True"):
            compare(model, calibration, text, **chosen("wanda"), out=tmp_path / "c", resume=resume)
    compare(model, calibration, text, **chosen("wanda"), out=tmp_path / "c", force=True)
    assert counted.arms == ["magnitude", "wanda"]


def test_an_arm_that_fails_is_named_and_the_others_stay(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    counted = Counted(monkeypatch)
    counted.fail_at, counted.error = 1, NumericalError("12 tokens hold NaN.")  # type: ignore[assignment]
    with pytest.raises(NumericalError, match=r"\b0\.5\b.*k=1.*\b12\b.*\bNaN\b"):
        compare(tiny("llama"), calibration, text, **CHOSEN, out=tmp_path / "c")
    assert len(list((tmp_path / ".c.comparing").glob("arm-*"))) == 1
    counted.fail_at = -1
    compare(tiny("llama"), calibration, text, **CHOSEN, out=tmp_path / "c", resume=True)
    assert counted.arms == ["magnitude", "wanda", "sparsegpt", "sparsegpt"]


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_an_arm_whose_file_was_damaged_is_refused(
    damage: str, tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, counted = tiny("llama"), Counted(monkeypatch)
    counted.fail_at, two = 1, chosen("magnitude", "wanda")
    with pytest.raises(KeyboardInterrupt):
        compare(model, calibration, text, **two, out=tmp_path / "c")
    counted.fail_at = -1
    file = tmp_path / ".c.comparing" / f"arm-{ComparisonArm('magnitude', 0.5, 1).key}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[:-8] if damage == "truncated" else content)
    with pytest.raises(InvalidInput, match=r"truncated.*--resume.*resume=True"):
        compare(
            model,
            calibration,
            text,
            **chosen("magnitude", "wanda"),
            out=tmp_path / "c",
            resume=True,
        )
    file.unlink()
    compare(model, calibration, text, **two, out=tmp_path / "c", resume=True)
    assert counted.arms == ["magnitude", "magnitude", "wanda"]


def test_too_many_experts_are_refused_before_any_work(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=r"`experts`.*calibrate.*\b192\b"):
        compare(
            tiny("llama"), calibration, text, **chosen("wanda", "expansion", experts=193),
            out=tmp_path / "c",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_plain_methods_are_built_once_and_routed_ones_for_every_count() -> None:
    found = arms(["wanda", "expansion", "expansion-random"], [0.5, 0.7], [1, 2, 4, 8, 16, 32])
    counts = [2, 4, 8, 16, 32]
    expected: list[ComparisonArm] = []
    for sparsity in (0.5, 0.7):
        expected.append(ComparisonArm("wanda", sparsity, 1))
        expected += [ComparisonArm("expansion", sparsity, k) for k in counts]
        expected += [ComparisonArm("expansion-random", sparsity, k) for k in counts]
    assert found == expected


def test_what_is_listed_twice_is_built_once() -> None:
    found = arms(["wanda", "expansion", "wanda"], [0.5, 0.5], [4, 4])
    assert found == [ComparisonArm("wanda", 0.5, 1), ComparisonArm("expansion", 0.5, 4)]


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
    assert set(METHOD_PALETTE) == set(COMPARED_METHODS)


def test_keys_tell_arms_apart_and_labels_name_them() -> None:
    made = [
        ComparisonArm("wanda", 0.5, 1),
        ComparisonArm("wanda", 0.7, 1),
        ComparisonArm("expansion", 0.5, 4),
    ]
    made += [ComparisonArm("expansion", 0.5, 8), ComparisonArm("expansion", 0.5, 8, "owl")]
    assert len({arm.key for arm in made}) == 5
    assert made[0].key == ComparisonArm("wanda", 0.5, 1).key
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
