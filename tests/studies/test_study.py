"""A study of tiny models, from the command line to its page."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wasserstein_distance

import entangle
from entangle.cli import composed
from entangle.cli.composed import Planned
from entangle.cli.main import main
from entangle.cli.trials import Counts, Measured, Spent
from entangle.errors import InvalidInput
from entangle.models.layers import find_layers
from entangle.results.scores import NeuronScores
from entangle.results.study import Study
from entangle.runs.claims import beside
from entangle.stats.intervals import Interval
from entangle.studies.claims import CLAIMS, Claim, negative_share, number, register
from entangle.studies.estimates import over_layers
from entangle.studies.joining import joined, united
from entangle.studies.page import page
from entangle.studies.rules import Bar
from entangle.studies.study import labelled, split_revision
from entangle.studies.subject import SIZES, Subject, first_layers, losses

Folder = Callable[[str], Path]


@pytest.fixture
def texts(text_file: Path) -> list[object]:
    return [
        "--calibration", text_file, "--n-seq", 6, "--seq-len", 48, "--evaluation", text_file,
        "--eval-seq-len", 32, "--eval-windows", 4, "--size", "small", "--quiet",
    ]  # fmt: skip


def run(*command: object) -> int:
    return main(["study", *map(str, command)])


def pairs_file(path: Path, wrong: str) -> Path:
    rows = [{"sentence_good": f"the {i} cats", "sentence_bad": f"the {i} {wrong}"}
            for i in range(8)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


EXPERIMENTS = {"scores", "pruning", "inside", "clamped", "syntax", "comparison", "allocated",
               "damage"}  # fmt: skip


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Subject, set[str]]]:
    """The subject of every claim that is measured, and the experiments that it alone asks for."""
    found: dict[str, tuple[Subject, set[str]]] = {}

    def watched(claim: Claim) -> Claim:
        def measure(subject: Subject) -> Sequence[dict[str, object]]:
            for name in EXPERIMENTS:  # those that are made are read again
                vars(subject).pop(name, None)
            subject._made.clear()
            numbers = claim.measure(subject)
            found[claim.id] = subject, EXPERIMENTS & vars(subject).keys()
            return numbers

        return replace(claim, measure=measure)

    for name, claim in list(CLAIMS.items()):
        monkeypatch.setitem(CLAIMS, name, watched(claim))
    return found


def check_told(subject: Subject) -> None:
    """What a dry run counts of experiments is what was made."""
    planned = Planned(subject, {"command": "study", "names": (), "claims": ()})

    def told(name: str) -> float:
        part = planned.part(name)
        assert not isinstance(part, str), part
        return float(part.counts.passes[1])

    arm = ["selection", "by", "seed", "strength", "experts", "router"]
    for name in ("pruning", "inside"):
        windows = entangle.load_ablation(subject.folder / name).windows
        assert told(name) == len(windows.drop_duplicates(arm))
    for name in ("comparison", "allocated"):
        frame = entangle.load_comparison(subject.folder / name).frame
        assert told(name) == len(frame.drop_duplicates(["method", "sparsity", "experts",
                                                        "allocation"]))  # fmt: skip
    clamped = entangle.load_ablation(subject.folder / "clamped")
    made = len(clamped.windows.drop_duplicates(arm)) + len(clamped.matched)
    assert made / 1.5 <= told("clamped") <= made * 1.5


def test_all_claims_on_one_model(
    tiny_folder: Folder, texts: list[object], tmp_path: Path,
    used: dict[str, tuple[Subject, set[str]]],
) -> None:  # fmt: skip
    out, model = tmp_path / "all", tiny_folder("llama")
    grammar, other = (pairs_file(tmp_path / f"{n}.jsonl", n) for n in ("catz", "dogs"))
    pairs = ("--blimp", grammar, "--other-pairs", other)
    assert run(model, *texts, *pairs, "--out", out) == 0
    found = entangle.load_result(out)
    assert isinstance(found, Study)
    assert found.frame["claim"].tolist() == list(CLAIMS)
    assert found.manifest["settings"]["seeds"] == 5  # type: ignore[index]
    numbers = found.numbers
    unmeasured = set(found.frame.loc[found.frame["verdict"] == "not measured", "claim"])
    assert unmeasured <= {"syntax"}  # where no low-WD rows cost as much
    assert set(CLAIMS) - unmeasured <= set(used)
    for claim, (_, names) in used.items():
        assert names == set(CLAIMS[claim].needs), claim
    subject = next(iter(used.values()))[0]
    check_told(replace(subject, folder=next((tmp_path / "all-runs").iterdir())))
    for claim in set(CLAIMS) - unmeasured:
        own = numbers[numbers["claim"] == claim]
        assert set(CLAIMS[claim].bars) <= set(own["number"]), claim
        table = pd.read_csv(out / "claims" / f"{claim}.csv")
        assert table["value"].to_numpy() == pytest.approx(own["value"].to_numpy(), nan_ok=True)
    settings = numbers[numbers["claim"] == "pruning"]["setting"].unique().tolist()
    assert settings == ["90 % zeros", "95 % zeros", "99 % zeros"]
    ablation = entangle.load_ablation(next((tmp_path / "all-runs").glob("*/pruning")))
    contrast = ablation.contrasts()
    at = (contrast["strength"] == 0.95) & (contrast["by"] == "wd")
    row = contrast[at & (contrast["against"] == "random")].iloc[0]
    own = numbers[(numbers["claim"] == "pruning") & (numbers["number"] == "random")]
    mine = own[own["setting"] == "95 % zeros"].iloc[0]
    for one, two in (("value", "ratio"), ("low", "low"), ("high", "high")):
        assert mine[one] == pytest.approx(row[two])


CHEAP = ("--claims", "non-gaussian,wd-md")


def test_models_side_by_side_and_studies_joined(
    tiny_folder: Folder, texts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tiny_folder("gpt2"), tiny_folder("gpt_neox")
    assert run(one, two, *texts, *CHEAP, "--out", tmp_path / "both") == 0
    for name, model in (("a", one), ("b", two)):
        assert run(model, *texts, *CHEAP, "--out", tmp_path / name) == 0
    assert run(tmp_path / "a", tmp_path / "b", *texts, *CHEAP, "--out", tmp_path / "joined") == 0
    both, joined = (entangle.load_result(tmp_path / name) for name in ("both", "joined"))
    assert isinstance(both, Study)
    assert isinstance(joined, Study)
    pd.testing.assert_frame_equal(both.frame, joined.frame)
    pd.testing.assert_frame_equal(both.numbers, joined.numbers)
    assert both.models["model"].tolist() == ["gpt2", "gpt_neox"]
    assert both.verdicts().columns.tolist() == ["claim", "gpt2", "gpt_neox"]
    assert len(list((tmp_path / "both-runs").iterdir())) == 2


def test_studies_of_one_model_become_one_and_are_adjusted_together(
    tiny_folder: Folder, texts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_folder("gpt2")
    a, b, whole, joined = (tmp_path / name for name in ("a", "b", "whole", "joined"))
    for name, claims in ((whole, "non-gaussian,wd-md"), (a, "wd-md"), (b, "non-gaussian")):
        assert run(model, *texts, "--claims", claims, "--out", name) == 0
    assert run(a, b, "--out", joined) == 0
    known, found = (entangle.load_result(name) for name in (whole, joined))
    assert isinstance(known, Study)
    assert isinstance(found, Study)
    pd.testing.assert_frame_equal(found.frame, known.frame)
    keys = ["claim", "setting", "number"]
    one, two = (part.numbers.sort_values(keys, ignore_index=True) for part in (found, known))
    pd.testing.assert_frame_equal(one, two)
    assert found.models["tests"].tolist() == known.models["tests"].tolist()
    assert found.manifest["settings"] == known.manifest["settings"]
    for key in ("model", "calibration", "evaluation"):
        assert found.manifest[key] == known.manifest[key]
    assert run(whole, a, "--out", tmp_path / "again") == 0  # what both hold is the same
    assert run(model, *texts, "--claims", "wd-md", "--seed", 1, "--out", tmp_path / "c") == 0
    capsys.readouterr()
    assert run(b, tmp_path / "c", "--out", tmp_path / "no") == 2
    assert "seed" in capsys.readouterr().err
    moved = entangle.load_result(a)
    assert isinstance(moved, Study)
    numbers = moved.numbers.assign(value=moved.numbers["value"] + 0.01)
    with pytest.raises(InvalidInput, match="wd-md"):
        united([moved, replace(moved, numbers=numbers)])


def test_what_only_some_studies_of_a_model_tell(made: Mapping[str, Path]) -> None:
    one = entangle.load_result(made["study"])
    assert isinstance(one, Study)
    told: Any = one.manifest
    assert told["model"]["computes"]

    def also(study: Study, computes: object = None, **settings: object) -> Study:
        model = told["model"] | {"computes": computes}  # None of those that were made before
        manifest = {**told, "model": model, "settings": told["settings"] | settings}
        return replace(study, manifest=manifest)

    pairs = {"digest": "p", "source": "a/pairs"}
    plain, first = also(one, grammar=None), also(one, "A", grammar=pairs)
    moved = also(one, "A", grammar=pairs | {"source": "b/pairs"})
    moved = replace(moved, models=one.models.assign(evaluation="b/text", source="hub"))
    for order in ((plain, first, moved), (first, moved, plain), (united([plain, first])[0], moved)):
        (found,) = united(order)
        pd.testing.assert_frame_equal(found.frame, one.frame)
        assert found.manifest["settings"]["grammar"]["digest"] == "p"  # type: ignore[index]
        assert found.manifest["model"]["computes"] == "A"  # type: ignore[index]
    for wrong, said in (
        (also(one, "B"), "configuration"), (also(one, grammar={"digest": "q"}), "grammar"),
    ):  # fmt: skip
        for order in ((plain, first, wrong), (wrong, plain, first)):
            with pytest.raises(InvalidInput, match=said):
                united(order)
    blank: Any = one.numbers["claim"] == "wd-md"
    numbers = one.numbers.assign(low=one.numbers["low"].mask(blank))
    frame = one.frame.assign(why="why not")
    frame.loc[frame["claim"] == "wd-md", ["verdict", "verdict_holm"]] = "not measured"
    for both in (
        (replace(one, numbers=numbers, frame=frame), one),
        (one, replace(one, frame=frame)),
    ):
        (found,) = united(both)  # a claim that was not measured is taken from where it was
        pd.testing.assert_frame_equal(found.numbers, one.numbers)
        pd.testing.assert_frame_equal(found.frame, one.frame)  # and no reason is left


def test_what_a_model_lacks_is_not_measured(
    tiny_folder: Folder, texts: list[object], tmp_path: Path
) -> None:
    asked = ("--claims", "clamp,syntax,negative-side,wd-md")
    assert run(tiny_folder("phi3"), *texts, *asked, "--out", tmp_path / "s") == 0
    found = entangle.load_result(tmp_path / "s")
    assert isinstance(found, Study)
    rows = found.frame.set_index("claim")
    for claim in ("clamp", "syntax", "negative-side"):
        assert rows["verdict"][claim] == rows["verdict_holm"][claim] == "not measured"
    assert "gate_up_proj" in rows["why"]["clamp"]
    assert rows["verdict"]["wd-md"] != "not measured"
    assert not (set(found.numbers["claim"]) - {"wd-md"})


def test_an_unfinished_study_is_gone_on_with(
    tiny_folder: Folder, texts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, model, times = tmp_path / "s", tiny_folder("gpt2"), []

    def measure(subject: object) -> Sequence[Mapping[str, object]]:
        times.append(subject)
        return [number("x", 1.0)]

    def stops(subject: object) -> Sequence[Mapping[str, object]]:
        raise KeyboardInterrupt

    bars = {"x": Bar("main", 0.0)}
    for name, function in (("counted", measure), ("stopping", stops)):
        monkeypatch.setitem(CLAIMS, name, Claim(name, name, "", function, bars))  # type: ignore[arg-type]
    asked = ("--claims", "counted,stopping,wd-md", "--out", out)
    assert run(model, *texts, *asked) == 130
    assert beside(out, "studying").is_dir()
    assert run(model, *texts, *asked) == 2  # there is unfinished work
    capsys.readouterr()
    known = Measured("cpu", [(Counts({}, {}, {}), Spent(1.0, 1.0, 1, 0, 1))], (), 0.0, 0, 0, 1.0)
    monkeypatch.setattr(composed, "measure", lambda *_, **__: (known, 0.0))
    assert run(model, *texts, *asked, "--resume", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["claim"] for one in told["claims"]] == ["stopping", "wd-md"]
    assert len(times) == 1
    assert run(model, *texts, "--seed", 1, *asked, "--resume") == 2  # of other settings
    monkeypatch.setitem(CLAIMS, "stopping", Claim("stopping", "", "", measure, bars))  # type: ignore[arg-type]
    assert run(model, *texts, *asked, "--resume") == 0
    assert len(times) == 2  # once each
    assert not beside(out, "studying").exists()
    assert run(model, *texts, *asked, "--resume") == 0  # finished: read
    assert len(times) == 2
    assert run(model, *texts, "--claims", "wd-md", "--out", out, "--resume") == 2


def test_mistakes_are_told_before_any_work(
    tiny_folder: Folder, texts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_folder("gpt2"), tmp_path / "s"
    wrong: list[tuple[Sequence[object], str]] = [
        (("--claims", "wd-mb"), "wd-md"), (("--seeds", 4), "4"), (("--seed", -1), "-1"),
    ]  # fmt: skip
    for options, said in wrong:
        assert run(model, *texts, *options, "--out", out) == 2
        assert said in capsys.readouterr().err
    assert run(model, tmp_path / "absent.gguf", *texts, *CHEAP, "--out", out) == 2
    assert "absent" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_claims_are_listed_though_nothing_is_left_to_do(
    made: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (made["study"], "--dry-run", "--out", tmp_path / "s")
    assert run(*asked, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["claim"] for one in told["listed"]] == list(CLAIMS)
    assert told["seconds"] == told["disk_bytes"] == 0
    assert run(*asked) == 0
    said = capsys.readouterr().out
    assert all(one in said for one in CLAIMS)


def test_claims_of_others_need_a_name_of_their_own_and_bars_that_decide() -> None:
    known = CLAIMS["pruning"]
    fresh, control = replace(known, id="new"), {"x": Bar("control", 0.0)}
    for wrong, said in (
        (known, "pruning"), (replace(known, id="a/b"), "a/b"), (replace(fresh, bars={}), "main"),
        (replace(fresh, bars=control), "new"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=said):
            register(wrong)
    with pytest.raises(InvalidInput, match="x"):
        number("x", Interval(1.0, 2.0, 0.5))


def test_numbers_that_are_missing_are_told(
    tiny_folder: Folder, texts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = Interval(2.0, 1.0, 3.0)

    def measure(subject: object) -> Sequence[Mapping[str, object]]:
        return [number("x", ends, setting="90 %"), number("x", 1.0, setting="99 %")]

    def twice(subject: object) -> Sequence[Mapping[str, object]]:
        return [number("x", ends), number("x", -1.0)]

    for name, function in (("partly", measure), ("twice", twice)):
        one = Claim(name, name, "", function, {"x": Bar("main", 0.0)})  # type: ignore[arg-type]
        monkeypatch.setitem(CLAIMS, name, one)
    model = tiny_folder("gpt2")
    assert run(model, *texts, "--claims", "partly,twice", "--out", tmp_path / "s") == 0
    found = entangle.load_result(tmp_path / "s")
    assert isinstance(found, Study)
    rows = found.frame.set_index("claim")
    assert rows["verdict"].to_dict() == {"partly": "holds", "twice": "not measured"}
    assert "x at 99 %" in rows["why"]["partly"]
    assert "twice" in rows["why"]["twice"]


def test_models_of_the_same_weights_that_differ_are_measured_each(
    tiny_folder: Folder, texts: list[object], tmp_path: Path
) -> None:
    one, two = tiny_folder("llama"), tmp_path / "relu"
    shutil.copytree(one, two)
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert run(one, two, *texts, "--claims", "wd-md", "--out", tmp_path / "s") == 0
    found = entangle.load_result(tmp_path / "s")
    assert isinstance(found, Study)
    assert found.models["digest"].nunique() == 1
    assert found.frame["value"].nunique() == 2
    assert not found.differing


def test_a_join_tells_where_settings_differ(
    tiny_folder: Folder, texts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, model, seeds in (("a", "gpt2", 5), ("b", "gpt_neox", 6)):
        assert run(tiny_folder(model), *texts, *CHEAP, "--seeds", seeds, "--out",
                   tmp_path / name) == 0  # fmt: skip
    together = (tmp_path / "a", tmp_path / "b", "--out", tmp_path / "j")
    with monkeypatch.context() as patched:  # killed after the last step: what is left is moved
        patched.setattr("entangle.studies.study.keep_runs", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*together)
    assert run(*together, "--resume") == 0
    assert not beside(tmp_path / "j", "studying").exists()
    found = entangle.load_result(tmp_path / "j")
    assert isinstance(found, Study)
    assert found.differing.endswith("seeds (5, 6).")
    assert found.differing in page(found)
    assert joined([found], {}).differing == found.differing  # also alone
    settings = found.manifest["settings"]
    assert isinstance(settings, dict)
    assert "seeds" not in settings
    assert (settings["size"], settings["n_seq"]) == ("small", 6)


def test_experts_that_a_few_tokens_miss_are_clamped_too() -> None:
    import torch

    from tests.mixtures import mixture

    model = entangle.load_model(mixture("Dbrx"))
    subject = object.__new__(Subject)
    vars(subject).update(model=model, calibration=SimpleNamespace(ids=torch.full((1, 8), 5)))
    assert len(subject.gates) == 3 * 4  # blocks and experts
    assert all(one.endswith("gate_proj") for one in subject.gates)


def test_losses_of_a_seed_that_failed_are_not_those_of_the_others() -> None:
    windows = pd.DataFrame({"selection": "random", "window": [0, 0, 1, 1],
                            "loss": [1.0, 3.0, 2.0, np.nan]})  # fmt: skip
    np.testing.assert_array_equal(losses(windows, selection="random"), [2.0, np.nan])


def test_intervals_over_layers() -> None:
    one = pd.Series([0.7], index=pd.MultiIndex.from_tuples([("a", 0)], names=["layer", "neuron"]))
    assert np.isnan(over_layers(one, 0).low)
    twice = pd.concat([one, one.rename(index={"a": "b"}) + 0.1])
    found = over_layers(twice, 0)
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.7, 0.8))


@pytest.mark.parametrize(("matched", "expected"), [(np.nan, np.nan), (0.19, 0.2)])
def test_where_the_search_matches_nothing_no_share_does(matched: float, expected: float) -> None:
    steps = pd.DataFrame({"fraction": [1.0, 0.2, 0.1], "loss": [9.0, 5.1, 4.0], "target": 5.0,
                          "matched": matched})  # fmt: skip
    subject = object.__new__(Subject)
    vars(subject)["clamped"] = SimpleNamespace(matched=steps)
    assert subject.matched == pytest.approx(expected, nan_ok=True)


def test_the_page_escapes_what_it_is_given(made: Mapping[str, Path]) -> None:
    found = entangle.load_result(made["study"])
    assert isinstance(found, Study)
    evil = "<script>alert(1)</script>\u202e"
    models = found.models.assign(model=evil)
    frame = found.frame.assign(model=evil, why=evil, lost=evil)
    text = page(Study(frame, found.numbers.assign(model=evil), models, {"model": {"name": evil}}))
    assert "<script>alert" not in text
    assert "\u202e" not in text
    assert len(re.findall(r"&lt;script&gt;alert", text)) >= 4
    for verdict in found.frame["verdict"]:
        assert verdict in text
    for known in ("http-equiv", "http://www.w3.org/2000/svg"):  # a name, nothing that is fetched
        text = text.replace(known, "")
    assert "http" not in text


@pytest.mark.parametrize(("high", "is_open"), [(0.9, False), (1.1, True)])
def test_what_fails_is_open_where_the_interval_includes_its_bar(
    made: Mapping[str, Path], high: float, is_open: bool
) -> None:
    found = entangle.load_result(made["study"])
    assert isinstance(found, Study)
    of: dict[str, Any] = {"claim": "own", "model": "a", "setting": "", "number": "random"}
    row = found.frame.head(1).assign(verdict="fails", **of)
    bar = found.numbers.head(1).assign(bar=1.0, low=0.8, high=high, **of)
    models = found.models.head(1).assign(model="a")
    assert ("includes its bar" in page(Study(row, bar, models, {}))) == is_open


def test_names(tmp_path: Path) -> None:
    assert split_revision("a/b@step3") == ("a/b", "step3")
    for plain in ("a/b", "@x", "a@"):
        assert split_revision(plain) == (plain, None)
    place = tmp_path / "x@y"
    place.mkdir()
    assert split_revision(str(place)) == (str(place), None)
    assert labelled([str(place), "a/b", "a/b"], ["x@y"]) == ["x@y (2)", "a/b", "a/b (2)"]


@pytest.mark.parametrize("inner", [16, 48])
def test_gate_and_up_are_taken_where_the_inner_side_is_narrow_too(inner: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": inner}
    heads: Any = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    found = first_layers(find_layers(model, "all", "mlp"), model)
    assert [one.projection for one in found] == ["gate_proj", "up_proj"] * 2
    square = LlamaForCausalLM(LlamaConfig(**(sizes | {"intermediate_size": 32}), **heads))
    mixed = [*find_layers(model, 0, "mlp"), *find_layers(square, 1, "mlp")]
    assert len(first_layers(mixed, model)) == 2 + 3  # no block is left out


def test_routers_and_bottlenecks_beside_a_wide_part_are_left_out() -> None:
    from tests.tiny_models import build_other

    model = build_other("gemma3n")
    found = first_layers(find_layers(model, "all", "mlp"), model)
    assert [one.projection for one in found] == ["gate_proj", "up_proj"] * 3


def test_layers_of_too_few_rows_are_not_the_least() -> None:
    rows = [{"layer": name, "neuron": i, "wd": wd, "wd_se": 0.0, "wd_bound": 0.0}
            for name, n, wd in (("a", 40, 0.3), ("b", 16, 0.1), ("c", 17, 0.2))
            for i in range(n)]  # fmt: skip
    scores: Any = SimpleNamespace(frame=pd.DataFrame(rows), layers=pd.DataFrame({
        "layer": list("abc"), "null_floor_high": 0.1}))  # fmt: skip
    subject: Any = SimpleNamespace(scores=scores, calibration=SimpleNamespace(n_seq=4))
    told = {one["number"]: one["value"] for one in CLAIMS["non-gaussian"].measure(subject)}
    assert told["top 3 % / null floor, least layer"] == pytest.approx(2.0)  # of c
    assert told["layers of too few rows for 3 %"] == 1
    assert told["layers without a WD"] == 0


def test_a_perplexity_without_bounds_is_infinitely_better_than_none() -> None:
    row = {"allocation": "layers by mean WD", "method": "sparsegpt", "sparsity": 0.7,
           "uniform_ratio": 0.0, "uniform_low": 0.0, "uniform_high": 4.0}  # fmt: skip
    subject: Any = SimpleNamespace(allocated=SimpleNamespace(frame=pd.DataFrame([row])),
                                   text=SimpleNamespace(n_windows=3))  # fmt: skip
    (told,) = CLAIMS["allocation"].measure(subject)
    assert [told[name] for name in ("value", "low", "high")] == [np.inf, 0.25, np.inf]


def test_rows_of_a_mixture_are_drawn_over_all_experts(tmp_path: Path) -> None:
    from tests.mixtures import mixture, text

    model = entangle.load_model(mixture("DeepseekV2"))  # block 0 dense, experts narrow, one shared
    ids, windows = text(48, 32), entangle.load_evaluation(text(4, 32))
    subject = Subject("a", model, entangle.CalibrationSet(ids, "random", {}), windows,
                      replace(SIZES["small"], rows=3), tmp_path, progress=False)  # fmt: skip
    assert {one.projection for one in subject.layers} == {"gate_proj", "up_proj"}
    assert len(subject.layers) == 2 * (1 + 2 * (4 + 1))
    names = [f"model.layers.1.mlp.experts.{i}.gate_proj" for i in range(4)]
    assert [[one.name for one in own] for own in subject.damaged_layers] == [names]
    frame = subject.frame.copy()
    frame.loc[frame["layer"] == names[2], "flag"] = "few_tokens"
    vars(subject)["frame"] = frame
    wd = frame[frame["layer"].isin([*names[:2], names[3]])].set_index(["layer", "neuron"])["wd"]
    rows = subject.damage.groupby("group")
    top = set(rows[["layer", "neuron"]].get_group("top").itertuples(index=False, name=None))
    assert top == set(wd.nlargest(3).index)
    drawn = rows.get_group("random")["layer"]
    assert len(drawn) == 12
    assert set(drawn) <= {*names[:2], names[3]}
    told = {str(one["number"]): one for one in CLAIMS["single-neuron"].measure(subject)}
    assert (told["experts drawn from"]["value"], told["experts drawn from"]["n"]) == (3.0, 4)


def outputs(values: np.ndarray) -> NeuronScores:
    """Scores of a layer that copies its inputs, which are given."""
    import torch
    from torch import nn

    from entangle.texts.calibration_set import CalibrationSet

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding.from_pretrained(torch.tensor(values[:, None]).float())
            self.layers = nn.ModuleList([nn.ModuleDict({"copy": nn.Linear(1, 1, bias=False)})])
            self.layers[0]["copy"].weight.data.fill_(1.0)  # type: ignore[index]

        def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            found: torch.Tensor = self.layers[0]["copy"](self.embed(input_ids))  # type: ignore[index]
            return found

        def get_input_embeddings(self) -> object:
            return self.embed

    ids = torch.arange(len(values)).reshape(8, -1)
    return entangle.score(
        Copies().eval(), CalibrationSet(ids, "x", {}), layers="layers.0.copy", md=False,
        progress=False,
    )  # fmt: skip


def test_the_share_of_the_negative_side() -> None:
    """Against a slow integral of the two distributions, and cases that are known."""
    rng = np.random.default_rng(0)
    tail = np.concatenate([rng.normal(1.0, 0.3, 3800), rng.normal(-3.0, 0.3, 200)])
    for values in (tail, -tail, rng.exponential(1.0, 4000), rng.gamma(0.5, 1.0, 4000) - 0.2):
        scores = outputs(values)
        z = (values - values.mean()) / values.std()
        zero = -values.mean() / values.std()
        grid = np.linspace(-10, 10, 200_001)
        below = np.searchsorted(np.sort(z), grid, side="right") / len(z)
        from scipy.special import ndtr

        gap = np.abs(below - ndtr(grid))
        assert gap.sum() * 1e-4 == pytest.approx(float(scores.frame["wd"].iloc[0]), rel=0.02)
        expected = gap[grid <= zero].sum() / gap.sum()
        found = negative_share(scores, "layers.0.copy", 0)
        assert found == pytest.approx(expected, abs=0.02)
    assert wasserstein_distance(tail, -tail) > 0  # the two first cases are unlike
    shifted = outputs(tail + 100.0)
    assert negative_share(shifted, "layers.0.copy", 0) == pytest.approx(0.0, abs=1e-3)


def test_a_page_can_be_copied_away(made: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["study"], tmp_path / "elsewhere")
    found = entangle.load_result(tmp_path / "elsewhere")
    assert isinstance(found, Study)
    assert (tmp_path / "elsewhere" / "index.html").read_text("utf-8") == page(found)
