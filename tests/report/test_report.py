"""What a page holds, and what is refused."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from entangle.cli.main import main
from entangle.errors import InvalidInput
from entangle.report import write_report
from entangle.report.content import check_neurons, content_of
from entangle.report.page import render
from entangle.report.runs import Run, open_runs, together
from entangle.results.decomposition import COLUMNS, Decomposition
from entangle.results.diff import diff
from entangle.results.scores import NeuronScores
from tests.report.samples import MODEL, TEXT, by_hand, data_of, text_of, unpacked

HOSTILE = [
    "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "\x1b[31mred\x1b[0m",
    "[red]rich[/red]", "\u202eright to left", "שלום", "😀\u200d🔥", "a\nb\tc\x00",
    "&amp;{{ 7 * 7 }}",
]  # fmt: skip
SEEN = [
    HOSTILE[0], HOSTILE[1], "\\x1b[31mred\\x1b[0m", HOSTILE[3], "\\u202eright to left", HOSTILE[5],
    HOSTILE[6], "a\\nb\\tc\\x00", HOSTILE[8],
]  # fmt: skip


def decomposed(
    neurons: int = 10, tokens: list[str] | None = None, **manifest: object
) -> Decomposition:
    """Neuron 7 of layer ``a`` has a mode whose tokens are given, a context and a pair."""
    tokens = tokens or ["the"]
    at = {"layer": "a", "neuron": 7}
    context = {"before": "x ", "after": " y", "token": tokens[0]}
    rows: dict[str, list[dict[str, object]]] = {name: [] for name in COLUMNS}
    for neuron in range(neurons):
        rows["neurons"].append(
            {"layer": "a", "neuron": neuron, "experts": 2, "sparsity": 0.5, "ri": 1.5, "wd": 0.2,
             "mean": 1.0, "std": 2.0, "flag": "", "projection": "p0", "wd_skipped": 0,
             "md_skipped": 0, "smallest_cluster": 3, "shrunk": 0}
        )  # fmt: skip
    top = json.dumps([[token, 3, 0.1] for token in tokens])
    rows["modes"] = [{**at, "mode": 0, "center": 3.0, "left": -np.inf, "right": np.inf,
                      "tokens": 64, "share": 1.0, "top_tokens": top}]  # fmt: skip
    rows["contexts"] = [{**at, "mode": 0, "rank": 0, "position": 5, "output": 5.0, **context}]
    rows["separated"] = [
        {**at, "rank": 0, "position_a": 1, "position_b": 2, "token_a": "t", "token_b": "t",
         "context_a": "abcd", "context_b": "abcd", "start_a": 1, "end_a": 2, "start_b": 3,
         "end_b": 4, "output_a": -1.0, "output_b": 3.0, "input_distance": 0.1, "cosine": 0.9,
         "output_distance": 2.0}
    ]  # fmt: skip
    tables = {
        name: pd.DataFrame(own, columns=list(COLUMNS[name])).astype(dict(COLUMNS[name]))
        for name, own in rows.items()
    }
    told = {"kind": "decomposition", "model": MODEL, "calibration": {**TEXT, "settings": {}}}
    return Decomposition(**tables, manifest={**told, **manifest})


@pytest.fixture(scope="module")
def scores() -> NeuronScores:
    return by_hand({"a": 100, "b": 40, "c/d": 3})


@pytest.fixture(scope="module")
def page(scores: NeuronScores, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    scores.report(out)
    return out.read_text("utf-8")


def test_all_neurons_are_on_the_page_with_their_numbers(scores: NeuronScores, page: str) -> None:
    data = data_of(page)
    assert [(one["name"], one["n"]) for one in data["layers"]] == [
        ("a", 100),
        ("b", 40),
        ("c/d", 3),
    ]
    columns = {one["name"]: unpacked(one["data"]) for one in data["columns"]}
    assert "md" not in columns  # which is not known of any
    for name in ("wd", "mean", "std"):
        np.testing.assert_allclose(columns[name], scores.frame[name], rtol=2.0**-16)
    assert len(unpacked(data["bars"]["levels"])) == data["bars"]["n"] * 143


def test_three_percent_of_every_layer_have_a_page(page: str) -> None:
    assert unpacked(data_of(page)["pages"]).tolist() == [0, 1, 2, 100, 101, 140]


@pytest.mark.parametrize(
    ("neurons", "count"),
    [("all", 143), (2, 6), ("2", 6), (0, 0), (0.5, 72), ("50%", 72), (1.0, 143)],
)
def test_how_many_have_a_page(neurons: Any, count: int, scores: NeuronScores) -> None:
    content = content_of(together(scores, []), neurons=check_neurons(neurons))
    assert content.n_pages == count


@pytest.mark.parametrize("neurons", ["few", "", "-3", "0.0", 1.5, -1, "200%", "nan", True])
def test_what_is_no_number_of_neurons(neurons: Any) -> None:
    with pytest.raises(InvalidInput, match=r"neurons.*got"):
        check_neurons(neurons)


def test_exact_histograms_count_all_tokens(page: str) -> None:
    exact = {name: unpacked(one) for name, one in data_of(page)["exact"].items()}
    sums = np.add.reduceat(exact["counts"], exact["starts"][:-1])
    assert sums.tolist() == [64] * 6


def test_the_page_loads_nothing_and_runs_its_own_script_only(page: str) -> None:
    assert re.findall(r'\b(?:src|href|action)="(?!#|data:,")', page) == []
    assert "@import" not in page
    assert "url(" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "innerHTML" not in script
    assert "default-src 'none'" in page


def test_what_is_missing_is_said(page: str, scores: NeuronScores) -> None:
    missing = data_of(page)["missing"]
    for section in ("modes", "contexts", "pairs"):
        assert "--model" in missing[section]
        assert "entangle decompose" in missing[section]
    assert "entangle ablate" in missing["ablation"]
    assert "entangle report RUN --model MODEL" in text_of(page)
    gone = replace(scores, manifest={**scores.manifest, "model": {**MODEL, "source": "/no/model"}})
    told = content_of(together(gone, [])).shown["notes"]
    assert any("/no/model" in note for note in told)  # type: ignore[attr-defined]


def test_hostile_names_and_tokens_are_text(tmp_path: Path) -> None:
    scores = by_hand({"a": 10, **dict.fromkeys(HOSTILE, 1)})
    found = decomposed(tokens=HOSTILE)
    manifest = {**scores.manifest, "model": {**MODEL, "name": HOSTILE[1]}}
    report = replace(scores, manifest=manifest).report(tmp_path / "page.html", runs=[found])
    page = report.path.read_text("utf-8")
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    data = data_of(page)
    assert [one["name"] for one in data["layers"]][1:] == SEEN
    (top,) = unpacked(data["tables"]["modes"]["columns"]["top_tokens"])
    assert [token for token, *_ in json.loads(top)] == SEEN
    assert "{{ 7 * 7 }}" in text_of(page)


def test_a_decomposition_fills_pages_in_sigma(scores: NeuronScores) -> None:
    content = content_of(together(scores, [Run("looked", "decomposition", decomposed())]))
    tables: Any = content.data["tables"]
    place = unpacked(content.data["pages"]).tolist().index(7)  # which is not among the top
    modes, contexts, pairs = (tables[name] for name in ("modes", "contexts", "pairs"))
    starts = unpacked(modes["starts"])
    assert (starts[place], starts[place + 1]) == (0, 1)
    assert unpacked(modes["columns"]["center"]).tolist() == [1.0]  # (3 − 1) / 2
    assert unpacked(modes["columns"]["left"]).tolist() == [-np.inf]
    assert unpacked(contexts["columns"]["output"]).tolist() == [2.0]
    cut = [unpacked(pairs["columns"][f"{part}_b"]) for part in ("before", "token", "after")]
    assert cut == [["abc"], ["d"], [""]]
    assert unpacked(tables["experts"]["columns"]["ri"]).tolist() == [1.5] * 4
    assert "other" not in str(content.shown["notes"])


def test_a_decomposition_on_another_text_is_told(scores: NeuronScores) -> None:
    other = decomposed(calibration={**TEXT, "digest": "2" * 64, "source": "poems"})
    notes: Any = content_of(together(scores, [Run("looked", "decomposition", other)])).shown[
        "notes"
    ]
    assert any("looked" in note and "poems" in note for note in notes)


def test_runs_of_another_model_or_of_other_layers_are_refused(scores: NeuronScores) -> None:
    other = decomposed(model={"name": "other", "digest": "f" * 64})
    with pytest.raises(InvalidInput, match=r"'x'.*'other'.*ffffffffffff.*'by hand'.*000000000000"):
        together(scores, [Run("x", "decomposition", other)])
    with pytest.raises(InvalidInput, match=r"'x'.*holds a, none of which"):
        together(by_hand({"b": 2}), [Run("x", "decomposition", decomposed())])
    with pytest.raises(InvalidInput, match=r"'x'.*neuron 9 of layer 'a'.*hold 5"):
        together(by_hand({"a": 5}), [Run("x", "decomposition", decomposed())])
    assert together(scores, [Run("x", "decomposition", decomposed(model={}))]).notes


def test_one_neuron_and_none_with_a_score(tmp_path: Path) -> None:
    one = by_hand({"only": 1})
    assert one.report(tmp_path / "one.html").n_pages == 1
    flat = one.frame.assign(wd=np.nan, wd_se=np.nan, std=0.0, flag="constant")
    flat_scores = replace(one, frame=flat)
    report = flat_scores.report(tmp_path / "flat.html", neurons="all")
    data = data_of(report.path.read_text("utf-8"))
    assert unpacked(data["flags"]) == ["constant"]
    assert np.isnan(unpacked(data["columns"][0]["data"])).all()
    nothing = replace(one, frame=one.frame[:0], layers=one.layers[:0], histograms={})
    with pytest.raises(InvalidInput, match="at least one neuron"):
        nothing.report(tmp_path / "nothing.html")


@pytest.mark.slow
def test_a_million_neurons(tmp_path: Path) -> None:
    scores = by_hand({f"l{block}": 50_000 for block in range(20)}, tokens=32)
    report = scores.report(tmp_path / "page.html", neurons=2)
    assert (report.n_neurons, report.n_pages) == (1_000_000, 40)
    assert report.n_bytes < 60e6
    assert scores.summary()["n_neurons"].sum() == 1_000_000
    found = diff(scores, scores, n_boot=2)
    assert found.agreement["compared"].iloc[-1] == 1_000_000
    assert found.moved().empty


def test_the_same_runs_give_the_same_page(scores: NeuronScores, page: str, tmp_path: Path) -> None:
    again = scores.report(tmp_path / "page.html")
    assert again.path.read_text("utf-8") == page
    assert again.n_bytes == again.path.stat().st_size
    assert again.address.startswith("file:///")


def test_files_are_not_replaced_unasked(scores: NeuronScores, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    scores.report(out)
    with pytest.raises(InvalidInput, match=r"page\.html.*exists.*force"):
        scores.report(out)
    scores.report(out, force=True)
    with pytest.raises(InvalidInput, match="folder"):
        scores.report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(InvalidInput, match=r"`model` and `calibration`"):
        scores.report(tmp_path / "other.html", model="demo")


def test_the_users_home_is_left_out(
    scores: NeuronScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    known = {**scores.manifest, "command": "entangle score /home/somebody/model"}
    report = replace(scores, manifest=known).report(tmp_path / "page.html")
    page = report.path.read_text("utf-8")
    assert "somebody" not in page
    assert "entangle score ~/model" in text_of(page)


def test_folders_of_runs(
    made: Mapping[str, Path], tmp_path: Path, scores: NeuronScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_runs([made["scores"].parent])  # all kinds but the file of the allocation
    assert opened.runs[0].kind == "scores"
    assert {one.kind for one in opened.runs} == set(made) - {"allocation"}
    assert [one.kind for one in open_runs([made["ablation"]]).runs] == ["scores", "ablation"]
    report = write_report([*made.values()], tmp_path / "page.html")
    text = text_of(report.path.read_text("utf-8"))
    assert all(f"{kind}:" in text for kind in made)
    data = data_of(report.path.read_text("utf-8"))
    assert {arm["selection"] for arm in data["arms"]} >= {"top", "random"}
    chosen = data["tables"]["ablated"]["columns"]
    assert set(unpacked(chosen["selection"])) >= {"top"}
    with pytest.raises(InvalidInput, match=r"one result.*got none"):
        open_runs([made["decomposition"]])
    with pytest.raises(InvalidInput, match=r"one result.*got 2"):
        open_runs([made["scores"], made["scores"]])
    scores.save(tmp_path / "mixed" / "hand")
    (tmp_path / "mixed" / "other").mkdir()
    (tmp_path / "mixed" / "other" / "manifest.json").write_text('{"kind": "evaluation"}')
    assert any("mixed/other" in note for note in open_runs([tmp_path / "mixed"]).notes)
    shutil.copytree(made["ablation"], tmp_path / "mixed" / "hand" / "ablation")
    scores.save(tmp_path / "mixed" / "deep" / "hand")
    deeper = [note.split()[0] for note in open_runs([tmp_path / "mixed"]).notes if "deep" in note]
    assert deeper == ["deep/hand", "hand/ablation"]
    (note,) = open_runs([tmp_path / "mixed" / "hand"]).notes
    assert "hand/ablation" in note
    with pytest.raises(InvalidInput, match=r"comparison.*is of the model.*'by hand'"):
        open_runs([tmp_path / "mixed", made["comparison"]])


def test_no_torch_is_needed(made: Mapping[str, Path], tmp_path: Path) -> None:
    arguments = [*map(str, made.values()), "--out", str(tmp_path / "page.html")]
    code = f"import sys, entangle.cli.main as m; print(m.main(['report', *{arguments!r}]))"
    check = "print({'torch', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", f"{code}\n{check}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["0", "set()"]
    assert lines[-3] == f"Report: {(tmp_path / 'page.html').resolve().as_uri()}"
    assert any("--model MODEL" in line for line in lines)


def test_a_page_without_a_name_is_found_again(
    made: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENTANGLE_HOME")
    scores = str(made["scores"])
    assert main(["report", scores]) == 0
    first = capsys.readouterr().out
    (page,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"report-[0-9a-f]{12}\.html", page.name)
    assert first.splitlines()[-1] == f"Report: {page.resolve().as_uri()}"
    stamp = page.stat().st_mtime_ns
    assert main(["report", scores, "--json"]) == 0
    again = capsys.readouterr()
    told = json.loads(again.out)
    assert (told["path"], told["bytes"]) == (str(page.resolve()), page.stat().st_size)
    assert f"runs/{page.name}" in again.err
    assert main(["report", scores, "--neurons", "1"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert page.stat().st_mtime_ns == stamp


def test_what_is_gone_or_mixed_up_is_refused_in_one_line(
    made: Mapping[str, Path], tmp_path: Path, capsys: Any
) -> None:
    runs, page = str(made["scores"].parent), str(tmp_path / "page.html")
    gone = str(tmp_path / "gone")
    for words in (
        ["report", str(made["scores"]), "--out", page, "--model", gone],
        ["report", gone, "--out", page], ["report", str(tmp_path), "--out", page],
        ["diff", runs, runs],
    ):  # fmt: skip
        assert main(words) == 2, words
        told = capsys.readouterr().err
        assert (told.count("\n"), told[:17]) == (1, "entangle: error: "), words
    assert not Path(page).exists()


def test_one_neuron_from_the_shell(tmp_path: Path, capsys: Any) -> None:
    run, page = str(tmp_path / "one"), tmp_path / "page.html"
    by_hand({"only": 1}).save(run)
    for words in (["show", run], ["diff", run, run, "--out", str(tmp_path / "diff")],
                  ["report", run, "--out", str(page)]):  # fmt: skip
        assert main(words) == 0, words
        assert "nan" not in capsys.readouterr().out.lower()
    assert data_of(page.read_text("utf-8"))["layers"][0]["n"] == 1


def test_pages_of_ones_own(tmp_path: Path) -> None:
    page = render("base.html", title="<b>", data={"x": "<"}, content={})
    assert "<b>" not in page
    assert data_of(page) == {"x": "<"}
