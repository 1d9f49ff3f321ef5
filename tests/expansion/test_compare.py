from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from entangle.allocation.labels import nominal_sparsity
from entangle.calibration import CalibrationSet
from entangle.errors import InvalidInput, NumericalError
from entangle.evaluation import EvaluationText, perplexity
from entangle.expansion import Expansion, expand
from entangle.expansion.compare import Comparison, arms, at_equal_nonzeros, compare
from entangle.models.loading import LanguageModel
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


def test_progress_is_told_after_each_arm(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    lines: list[str] = []
    chosen = arms(["magnitude"], [0.0], [1])
    found = compare(tiny("gpt2"), calibration, text, chosen, told=lines.append)
    assert [line.split(":")[0] for line in lines] == ["dense 0 k=1", "magnitude 0 k=1"]
    assert found.frame["ratio"].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("group", [None, 4])
def test_every_method_is_built_with_every_allocation_beside_uniform(
    group: int | None, tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    model = tiny("llama")
    first, second = (random_allocation(model, seed=seed, group=group) for seed in (0, 1))
    named = [("a", first), ("b", second)]
    shares = [nominal_sparsity(one) for one in (first, second)]
    chosen = arms(["sparsegpt", "expansion"], shares, [2], allocations=named)
    found = compare(model, calibration, text, chosen, allocations=named)
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
    model, lines = tiny("llama"), list[str]()
    allocation = random_allocation(model)
    name = next(iter(allocation.zeros))
    wide = replace(allocation, in_features={**allocation.in_features, name: 1000})
    with pytest.raises(InvalidInput, match=f"{name}.*1000"):
        compare(
            model, calibration, text, methods="wanda", sparsity=0.5, allocations=("a", wide),
            out=tmp_path / "c", told=lines.append,
        )  # fmt: skip
    assert lines == []
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
    found = compare(model, calibration, text, chosen, allocations=named)
    sizes = found.frame.set_index("method")["nonzeros"]
    assert sizes["dense"] > sizes["sparsegpt"] < sizes["expansion"]


def tables(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every table that does not hold seconds."""
    files = folder.glob("*.parquet")
    return {path.name: path.read_bytes() for path in files if path.name != "seconds.parquet"}


class Counted:
    """Stands in for `expand`: counts the arms, and fails at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = import_module("entangle.expansion.compare")
        self.arms: list[object] = []
        self.fail_at, self.error = -1, KeyboardInterrupt("stopped")
        monkeypatch.setattr(self.module, "expand", self)

    def __call__(self, *texts: object, **settings: object) -> Expansion:
        if len(self.arms) == self.fail_at:
            raise self.error
        self.arms.append(settings["pruner"])
        return expand(*texts, **settings)  # type: ignore[arg-type]


CHOSEN = arms(["magnitude", "wanda", "sparsegpt", "expansion"], [0.5], [2])


def test_an_interrupted_comparison_goes_on_to_the_same_tables(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, counted = tiny("llama"), Counted(monkeypatch)
    compare(model, calibration, text, CHOSEN, out=tmp_path / "whole")
    counted.arms, counted.fail_at = [], 2
    with pytest.raises(KeyboardInterrupt):
        compare(model, calibration, text, CHOSEN, out=tmp_path / "cut")
    kept = sorted(path.name for path in (tmp_path / ".cut.comparing").glob("arm-*"))
    assert len(kept) == 3  # the dense model and two arms
    assert not (tmp_path / "cut").exists()
    with pytest.raises(InvalidInput, match=r"cut'.*beside"):
        compare(model, calibration, text, CHOSEN, out=tmp_path / "cut")
    for other in ({"seed": 1}, {"chosen": CHOSEN[:3]}):
        settings = {"chosen": CHOSEN, **other}
        with pytest.raises(InvalidInput, match=r"cut'.*--force.*force=True.*--resume"):
            compare(model, calibration, text, out=tmp_path / "cut", resume=True, **settings)  # type: ignore[arg-type]
    counted.arms, counted.fail_at = [], -1
    lines: list[str] = []
    compare(
        model, calibration, text, CHOSEN, out=tmp_path / "cut", resume=True, told=lines.append,
        memory=2**22,  # what is no part of the plan
    )  # fmt: skip
    assert counted.arms == ["sparsegpt", "sparsegpt"]
    assert [line.endswith("(finished before)") for line in lines] == [True] * 3 + [False] * 2
    assert tables(tmp_path / "cut") == tables(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_finished_comparison_is_read_again(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, counted = tiny("llama"), Counted(monkeypatch)
    first = compare(model, calibration, text, CHOSEN[:1], out=tmp_path / "c")
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    again = compare(model, calibration, text, CHOSEN[:1], out=tmp_path / "c", resume=True)
    assert counted.arms == ["magnitude"]
    assert again.frame.equals(first.frame)
    assert again.manifest == first.manifest
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before
    for resume in (True, False):
        with pytest.raises(InvalidInput, match=r"c'.*--force.*force=True"):
            compare(model, calibration, text, CHOSEN[1:2], out=tmp_path / "c", resume=resume)
    compare(model, calibration, text, CHOSEN[1:2], out=tmp_path / "c", force=True)
    assert counted.arms == ["magnitude", "wanda"]


def test_an_arm_that_fails_is_named_and_the_others_stay(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    counted = Counted(monkeypatch)
    counted.fail_at, counted.error = 1, NumericalError("12 tokens hold NaN.")  # type: ignore[assignment]
    with pytest.raises(NumericalError, match=r"\b0\.5\b.*k=1.*\b12\b.*\bNaN\b"):
        compare(tiny("llama"), calibration, text, CHOSEN, out=tmp_path / "c")
    assert len(list((tmp_path / ".c.comparing").glob("arm-*"))) == 2
    counted.fail_at = -1
    compare(tiny("llama"), calibration, text, CHOSEN, out=tmp_path / "c", resume=True)
    assert counted.arms == ["magnitude", "wanda", "sparsegpt", "sparsegpt"]


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_an_arm_whose_file_was_damaged_is_refused(
    damage: str, tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, counted = tiny("llama"), Counted(monkeypatch)
    counted.fail_at = 1
    with pytest.raises(KeyboardInterrupt):
        compare(model, calibration, text, CHOSEN[:2], out=tmp_path / "c")
    counted.fail_at = -1
    file = tmp_path / ".c.comparing" / f"arm-{CHOSEN[0].key}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[:-8] if damage == "truncated" else content)
    with pytest.raises(InvalidInput, match=r"truncated.*--resume.*resume=True"):
        compare(model, calibration, text, CHOSEN[:2], out=tmp_path / "c", resume=True)
    file.unlink()
    compare(model, calibration, text, CHOSEN[:2], out=tmp_path / "c", resume=True)
    assert counted.arms == ["magnitude", "magnitude", "wanda"]


def test_too_many_experts_are_refused_before_any_work(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path
) -> None:
    chosen = arms(["wanda", "expansion"], [0.5], [193])
    with pytest.raises(InvalidInput, match=r"`experts`.*calibrate.*\b192\b"):
        compare(tiny("llama"), calibration, text, chosen, out=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
