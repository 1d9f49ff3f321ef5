"""Two runs compared: made by hand, against slow references, and end to end."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import entangle
from entangle.cli.main import main
from entangle.errors import InvalidInput, UnknownName
from entangle.results.diff import diff, match_layers
from entangle.results.difference import Difference, with_intervals
from entangle.runs.differing import causes, what_differs
from entangle.stats.agreement import pair_balance, rank_agreement
from entangle.stats.intervals import jackknife
from entangle.stats.sketch import OutputSketch

if TYPE_CHECKING:
    from entangle.models.loading import LanguageModel
    from entangle.results.scores import NeuronScores
    from entangle.scoring.score import Method
    from entangle.texts.calibration_set import CalibrationSet

    Scored = Callable[[str, Method], NeuronScores]


@pytest.fixture(scope="module")
def first(tiny: "Callable[[str], LanguageModel]", calibration: "CalibrationSet") -> "NeuronScores":
    return entangle.score(tiny("llama"), calibration, layers=1, proj="mlp", progress=False)


def loose(scores: "NeuronScores") -> "NeuronScores":
    """Return scores as an earlier version saved them, without WD without a group."""
    bare = {name: replace(one, wd_without=None) for name, one in scores.histograms.items()}
    return replace(scores, histograms=bare)


def moved_by(
    scores: "NeuronScores", neurons: list[int], sigmas: float, **columns: Any
) -> "NeuronScores":
    """Return scores in which some neurons' WD is so many of their standard errors larger."""
    frame = scores.frame.copy()
    frame.loc[neurons, "wd"] += sigmas * frame.loc[neurons, "wd_se"]
    return replace(scores, frame=frame.assign(**columns))


@pytest.mark.parametrize("n", [3, 20, 101])
def test_agreement_is_that_of_slow_references(n: int, global_rng: np.random.Generator) -> None:
    x = global_rng.normal(size=n).round(1)
    y = (x + global_rng.normal(size=n)).round(1)
    found = rank_agreement(x, y, n_boot=20, tops=(0.1, 1.0))
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.kendall.value == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    signs = np.sign(np.subtract.outer(x, x)) * np.sign(np.subtract.outer(y, y))
    ranks = [np.unique(one, return_inverse=True)[1] for one in (x, y)]
    assert pair_balance(ranks[0], ranks[1]).tolist() == signs.sum(1).tolist()
    assert found.overlaps[1.0].value == 1.0
    k = max(1, round(0.1 * n))
    both = set(np.argsort(-x, kind="stable")[:k]) & set(np.argsort(-y, kind="stable")[:k])
    assert found.overlaps[0.1].value == len(both) / k
    for one in (found.spearman, found.kendall, *found.overlaps.values()):
        assert one.low <= one.value <= one.high
    assert rank_agreement(x, y, n_boot=20, tops=(0.1, 1.0)) == found


@pytest.fixture
def global_rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_intervals_are_those_of_plain_resampling(global_rng: np.random.Generator) -> None:
    x = global_rng.normal(size=400)
    y = x + global_rng.normal(size=400)
    found = rank_agreement(x, y, n_boot=400)
    draws = []
    for _ in range(400):
        some = global_rng.integers(400, size=400)
        draws.append(stats.kendalltau(x[some], y[some]).statistic)
    width = np.subtract(*np.percentile(draws, [97.5, 2.5]))
    assert found.kendall.high - found.kendall.low == pytest.approx(width, rel=0.2)


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0, 3.0, 3.0], []])
def test_too_few_or_equal_values_have_no_ranks(values: list[float]) -> None:
    found = rank_agreement(np.array(values), np.array(values), n_boot=5)
    assert np.isnan([found.spearman.value, found.kendall.value, found.overlaps[0.1].value]).all()


def test_nothing_moves_where_nothing_changed(first: "NeuronScores") -> None:
    found = first.compare_with(first)
    assert set(found.frame["moved"]) <= {"no", "untested"}
    assert found.causes == []
    assert found.differs.empty
    assert (found.agreement["spearman"] == 1.0).all()
    assert any("equal" in note for note in found.notes)


def test_what_moved_is_found_and_nothing_else(first: "NeuronScores") -> None:
    wide = {"wd_bound": 0.0, "wd_se": 0.01}
    base = replace(loose(first), frame=first.frame.assign(wd=0.3 + first.frame["wd"], **wide))
    found = diff(base, moved_by(base, [3, 50], +20.0))
    assert found.moved().index.tolist() == [3, 50]
    assert set(found.moved()["moved"]) == {"up"}
    row = found.frame.loc[3]
    groups = first.manifest["settings"]["n_groups"]  # type: ignore[index]
    t = 20.0 / np.sqrt(2.0)
    assert row["t"] == pytest.approx(t)
    assert row["p"] == pytest.approx(2 * stats.t.sf(t, 2 * (groups - 1)), rel=1e-9)
    back = diff(moved_by(base, [3, 50], +20.0), base)
    assert set(back.moved()["moved"]) == {"down"}
    np.testing.assert_allclose(back.frame["p"], found.frame["p"])
    adjusted = stats.false_discovery_control(found.frame["p"])
    np.testing.assert_allclose(found.frame["p_adjusted"], adjusted)


def test_what_method_and_floor_may_do_is_no_change(first: "NeuronScores") -> None:
    base = replace(first, frame=first.frame.assign(wd=0.5, wd_se=0.001, wd_bound=0.02))
    other = replace(base, frame=base.frame.assign(wd=0.5 + 0.039))
    assert diff(base, other).moved().empty
    floors = replace(base, layers=base.layers.assign(null_floor=base.layers["null_floor"] + 0.04))
    other = replace(floors, frame=base.frame.assign(wd=0.5 + 0.079))
    assert diff(base, other).moved().empty
    far = replace(base, frame=base.frame.assign(wd=0.6))
    assert len(diff(base, far).moved()) == len(base.frame)


def test_two_gaussians_did_not_move(first: "NeuronScores") -> None:
    low = first.layers.assign(null_floor=0.1, null_floor_high=0.2)
    base = replace(first, layers=low, frame=first.frame.assign(wd=0.01, wd_se=1e-4, wd_bound=0.0))
    assert diff(base, replace(base, frame=base.frame.assign(wd=0.19))).moved().empty
    assert len(diff(base, replace(base, frame=base.frame.assign(wd=0.21))).moved())


def test_neurons_without_scores_are_untested(first: "NeuronScores") -> None:
    frame = first.frame.copy()
    frame.loc[0, ["wd", "wd_se"]], frame.loc[0, "flag"] = np.nan, "constant"
    row = diff(first, replace(first, frame=frame)).frame.loc[0]
    assert (row["moved"], row["flag"]) == ("untested", "constant in B")
    bare = replace(first, frame=first.frame.assign(wd_se=np.nan))
    assert set(diff(bare, bare).frame["moved"]) == {"untested"}


def test_other_columns_are_ranked_and_not_tested(first: "NeuronScores") -> None:
    found = diff(first, first, by="weight_norm")
    assert set(found.frame["moved"]) == {"untested"}
    assert found.agreement["kendall"].iloc[0] == 1.0
    assert any("weight_norm" in note for note in found.notes)
    with pytest.raises(UnknownName, match="weight_norms"):
        diff(first, first, by="weight_norms")


def test_changes_on_the_same_tokens_have_errors_of_their_own(
    tiny: "Callable[[str], LanguageModel]", calibration: "CalibrationSet", first: "NeuronScores"
) -> None:
    llama = tiny("llama")
    noisy = replace(llama, module=copy.deepcopy(llama.module))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in noisy.module.parameters():
            weight.add_(0.02 * weight.std() * torch.randn(weight.shape, generator=rng))
    options: dict[str, Any] = {"layers": 1, "proj": "mlp", "progress": False}
    second = entangle.score(noisy, calibration, **options)
    found, apart = diff(first, second), diff(loose(first), second)
    assert set(found.agreement["errors"]) == {"paired"}
    assert set(apart.agreement["errors"]) == {"unpaired"}
    assert any("unpaired" in note for note in apart.notes)
    assert not any("paired" in note for note in found.notes)
    sums = np.hypot(apart.frame["a_se"], apart.frame["b_se"])
    np.testing.assert_array_equal(apart.frame["change_se"], sums)
    assert np.median(found.frame["change_se"].to_numpy() / np.asarray(sums)) < 0.5
    for name in first.histograms:
        rows = found.frame[found.frame["layer"] == name]
        parts: list[Any] = [one.histograms[name].wd_without for one in (first, second)]
        own = [[float(b[i]) - float(a[i]) for a, b in zip(*parts, strict=True)]
               for i in range(len(rows))]  # fmt: skip
        n = len(own[0])
        slow = [((n - 1) / n * sum((d - sum(one) / n) ** 2 for d in one)) ** 0.5 for one in own]
        np.testing.assert_allclose(rows["change_se"], slow, rtol=1e-9, atol=1e-12)
        p = 2 * stats.t.sf(rows["t"].abs(), n - 1)
        np.testing.assert_allclose(rows["p"][rows["p"] < 1], p[rows["p"] < 1], rtol=1e-9)
    other = entangle.CalibrationSet(calibration.ids.roll(1, 1), **{
        key: getattr(calibration, key) for key in ("source", "settings")
    })  # fmt: skip
    assert set(diff(first, entangle.score(noisy, other, **options)).agreement["errors"]) == {
        "unpaired"
    }


def test_groups_without_tokens_are_paired_with_their_like_only(first: "NeuronScores") -> None:
    def lacking(group: int) -> "NeuronScores":
        parts = {}
        for name, one in first.histograms.items():
            assert one.wd_without is not None
            without = one.wd_without.copy()
            without[group] = np.nan
            parts[name] = replace(one, wd_without=without)
        return replace(first, histograms=parts)

    assert set(diff(lacking(1), lacking(1)).agreement["errors"]) == {"paired"}
    assert set(diff(lacking(1), lacking(2)).agreement["errors"]) == {"unpaired"}
    assert set(diff(lacking(1), first).agreement["errors"]) == {"unpaired"}


@pytest.mark.parametrize("same", [True, False])
def test_errors_of_changes_cover_the_change(same: bool) -> None:
    """Each neuron is a draw of its own of the same two distributions, 8 groups of 200 tokens."""
    rng, shape = np.random.default_rng(3), (8, 200, 400)

    def outputs() -> tuple[Any, Any]:
        x = rng.exponential(size=shape) + 0.3 * rng.normal(size=(8, 1, 400))  # groups differ
        return x, x + 0.05 * x**2

    def wds(y: Any) -> tuple[Any, Any]:
        sketch = OutputSketch(400, n_groups=8)
        for group, rows in enumerate(torch.from_numpy(y).float()):
            sketch.update(rows, group=group)
        found = sketch.result()
        return found.shape.wd.numpy(), found.wd_without.numpy()

    truth, _ = (np.stack([wds(one)[0] for one in outputs()]).mean(1) for _ in range(2))
    x, y = outputs()
    if not same:
        _, y = outputs()
    (a, a_each), (b, b_each) = wds(x), wds(y)
    summed = np.hypot(jackknife(a_each), jackknife(b_each))
    error = jackknife(b_each - a_each) if same else summed
    freedom = 7 if same else 14
    inside = np.abs((b - a) - (truth[1] - truth[0])) <= stats.t.ppf(0.95, freedom) * error
    assert 0.85 < inside.mean() < 0.95
    if same:
        assert np.median(error / summed) < 0.5
        loosely = np.abs((b - a) - (truth[1] - truth[0])) <= stats.t.ppf(0.95, 14) * summed
        assert loosely.mean() > 0.99


@pytest.mark.parametrize(
    "options", [{"fdr": 0.0}, {"fdr": 1.0}, {"tops": 2.0}, {"n_boot": 0}, {"level": 1.0}]
)
def test_options_out_of_range(first: "NeuronScores", options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(options))):
        diff(first, first, **options)


def layers(names: list[str], blocks: list[int], widths: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        {"layer": names, "block": pd.array(blocks, dtype="Int64"), "n_neurons": widths,
         "projection": [name.rpartition(".")[2] for name in names], "null_floor": 0.1,
         "null_floor_high": 0.2, "split_half": 0.5}
    )  # fmt: skip


def test_layers_are_matched_by_what_is_common() -> None:
    a = layers(["m.0.up", "m.1.up", "m.2.up"], [0, 1, 2], [4, 4, 4])
    same, notes = match_layers(a, layers(["m.2.up", "m.1.up", "x.up"], [2, 1, 9], [4, 5, 4]))
    assert same["layer"].tolist() == ["m.2.up"]
    assert [note.split()[0] for note in notes] == ["1", "1", "1"]
    same, notes = match_layers(a, layers(["h.1.up", "h.0.up"], [1, 0], [4, 4]))
    pairs = list(zip(same["layer"], same["layer_b"], strict=True))
    assert pairs == [("m.0.up", "h.0.up"), ("m.1.up", "h.1.up")]
    assert "block and projection" in notes[0]
    with pytest.raises(InvalidInput, match="in common"):
        match_layers(a, layers(["h.0.down"], [0], [4]))
    with pytest.raises(InvalidInput, match="4 and 6"):
        match_layers(a, layers(["m.0.up"], [0], [6]))


def test_models_of_other_names_and_widths(scored: "Scored") -> None:
    with pytest.raises(InvalidInput):
        diff(scored("llama", "exact"), scored("gpt2", "exact"))
    found = diff(scored("llama", "exact"), scored("mistral", "exact"))
    assert "model" in found.causes
    assert any("index" in note or "neuron i" in note for note in found.notes)


def test_the_cause_of_a_difference() -> None:
    text = {"source": "x", "digest": "1", "n_seq": 2, "settings": {"seed": 0, "n_seq": 2}}
    a = {"model": {"name": "m", "digest": "1", "dtype": "float32"}, "calibration": text,
         "settings": {"seed": 0, "method": "exact"}, "seconds": 1,
         "packages": {"torch": "2"}}  # fmt: skip
    changed: dict[str, tuple[dict[str, object], list[str]]] = {
        "dtype": ({"model": {"name": "m", "digest": "2", "dtype": "bfloat16"}}, ["dtype"]),
        "weights": ({"model": {"name": "m", "digest": "2", "dtype": "float32"}}, ["model"]),
        "name": ({"model": {"name": "n", "digest": "1", "dtype": "float32"}}, []),
        "file": ({"calibration": {**text, "digest": "2"}}, ["text"]),
        "seed": (
            {"calibration": {**text, "digest": "2", "settings": {"seed": 1, "n_seq": 2}},
             "settings": {"seed": 1, "method": "exact"}}, ["seed"],
        ),
        "path": ({"calibration": {**text, "source": "y"}}, []),
        "versions": ({"packages": {"torch": "3"}}, []),
        "time": ({"seconds": 9}, []),
        "two": ({"settings": {"seed": 0, "method": "sketch"}, "model": {"digest": "2"}},
                ["model", "dtype", "method"]),
        "unknown": ({"more": 1}, ["other"]),
    }  # fmt: skip
    for name, (part, expected) in changed.items():
        found = what_differs(a, {**a, **part})
        assert causes(found) == expected, name
        assert bool(found) == (name != "time"), name


def test_long_lists_that_differ_at_their_end_differ() -> None:
    many = [f"layer {i}" for i in range(50)]
    found = what_differs(
        {"settings": {"layers": many}}, {"settings": {"layers": [*many[:-1], "x"]}}
    )
    assert [one.cause for one in found] == ["layers"]


def test_saved_loaded_and_shown(first: "NeuronScores", tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>\x1b[31m\u202e"
    manifest = {**first.manifest, "model": {**first.manifest["model"], "name": hostile}}  # type: ignore[dict-item]
    other = replace(first, manifest=manifest)
    found = diff(first, other)
    found.save(tmp_path / "x")
    again = entangle.load_result(tmp_path / "x")
    assert isinstance(again, Difference)
    for page in (again.html(), again._repr_html_()):
        assert "<img src=x" not in page
        assert "\x1b" not in page
        assert "\u202e" not in page
    shown = with_intervals(again.summary())
    assert not [name for name in map(str, shown) if name.endswith(("_low", "_high"))]
    value, low, high = (again.summary()[f"spearman{end}"][0] for end in ("", "_low", "_high"))
    assert shown["spearman"][0] == f"{value:.2f} [{low:.2f}, {high:.2f}]"
    place = again.save_html(tmp_path / "page.html")
    assert "http" not in place.read_text("utf-8").replace("http-equiv", "")
    with pytest.raises(InvalidInput, match="force"):
        again.save_html(place)
    assert r"\toprule" in again.to_latex()


@pytest.mark.parametrize("n", [1, 2])
def test_very_few_neurons(first: "NeuronScores", n: int) -> None:
    few = replace(
        loose(first), frame=first.frame.head(n), layers=first.layers.head(1).assign(n_neurons=n)
    )
    found = diff(few, few)
    assert found.agreement["spearman"].isna().all()
    assert len(found.plot().axes) == 2
    assert "nan" not in found._repr_html_()


def test_no_display_and_no_fonts_but_matplotlibs(made: Mapping[str, Path], tmp_path: Path) -> None:
    page, scores = tmp_path / "page.html", str(made["scores"])
    code = f"""
import sys
from matplotlib import font_manager, get_data_path
manager = font_manager.fontManager
manager.ttflist = [one for one in manager.ttflist if one.fname.startswith(get_data_path())]
from entangle.cli.main import main
sys.exit(main(["diff", {scores!r}, {scores!r}, "--html", {str(page)!r}, "--out",
               {str(tmp_path / "diff")!r}, "--quiet"]))
"""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("DISPLAY", "MPLBACKEND", "WAYLAND_DISPLAY")}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "glyph" not in done.stderr.lower()
    assert "font" not in done.stderr.lower()
    assert "data:image/png;base64,iVBOR" in page.read_text("utf-8")


def test_the_command(made: Mapping[str, Path], tmp_path: Path, capsys: Any) -> None:
    scores = str(made["scores"])
    page = tmp_path / "page.html"
    assert main(["diff", scores, scores, "--json", "--html", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["causes"], told["html"], told["out"]) == ([], str(page), told["out"])
    assert page.is_file()
    assert main(["diff", scores, scores, "--html", str(page)]) == 2
    assert main(["diff", scores, str(made["ablation"])]) == 2
    assert main(["diff", scores, str(tmp_path / "gone")]) == 2
    assert main(["diff", scores, scores, "--fdr", "2"]) == 2
    assert main(["diff", scores, scores]) == 0
    assert "ρ" in capsys.readouterr().out
