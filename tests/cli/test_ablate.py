import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from entangle import evaluation
from entangle.cli.ablate import _few_pairs
from entangle.errors import InvalidInput, Unavailable
from entangle.results.ablation import load_ablation
from tests.cli.runs import Run, holds

Folder = Callable[[str], Path]
SMALL = (
    "--layer", "all", "--n-seq", "6", "--seq-len", "32", "--eval-seq-len", "32",
    "--eval-windows", "4", "--fraction", "0.1", "--seeds", "2",
)  # fmt: skip


@pytest.fixture
def base(tiny_folder: Folder, text_file: Path) -> tuple[object, ...]:
    """The start of every command line: a tiny Llama and a text."""
    return (
        "ablate",
        tiny_folder("llama"),
        "--calibration",
        text_file,
        "--evaluation",
        text_file,
        *SMALL,
    )


def without(base: Sequence[object], *left_out: str) -> list[object]:
    """Return the arguments without some options and their values."""
    return [
        a
        for i, a in enumerate(base)
        if a not in left_out and (i == 0 or base[i - 1] not in left_out)
    ]


TEXT_OPTIONS = ("--evaluation", "--eval-seq-len", "--eval-windows")


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "agreement.jsonl"
    rows = [
        {"sentence_good": f"word{i} is 1{i}", "sentence_bad": f"word{i} are 1{i}"}
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tables_figures_and_folder(
    run: Run, base: tuple[object, ...], pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "result"
    status, printed, err = run(
        *base, "--strength", "0.5,0.9", "--measure", "perplexity,divergence,blimp",
        "--pairs", pairs_file, "--out", out,
    )  # fmt: skip
    assert status == 0, err
    result = load_ablation(out)
    arms = result.frame[["selection", "seed", "strength"]].drop_duplicates()
    assert len(arms) == 1 + 2 * 4  # dense; two strengths of top, bottom and two random draws
    assert {"perplexity", "kl", "top1_agreement", "accuracy"} <= set(result.frame["measure"])
    titles = (
        "perplexity", "perplexity ratio", "kl", "accuracy",
        "Perplexity after the top neurons ÷ after the others (paired bootstrap, 95 %)",
        "KL after the top neurons − after the others", "Accuracy after the top neurons − after",
        "Top-1 agreement after the top neurons − after",
    )  # fmt: skip
    for title in titles:
        assert title in printed
    figures = sorted(path.name for path in (out / "figures").iterdir())
    names = ("ablation_accuracy", "ablation_kl", "ablation_perplexity_ratio")
    assert figures == [
        f"{name}.{ending}" for name in names for ending in ("csv", "pdf", "png", "tex", "txt")
    ]
    assert f"Saved to {out}." in printed


def test_json_holds_everything(run: Run, base: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "result"
    status, printed, err = run(
        *base, "--strength", "0.5", "--match", "--experts", "1,2", "--router", "kmeans,random",
        "--json", "--out", out,
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(printed)
    assert sorted(found["figures"]) == sorted(map(str, (out / "figures").iterdir()))
    assert len(found["figures"]) == 5
    assert {row["router"] for row in found["results"]} == {"", "kmeans", "random"}
    assert {row["measure"] for row in found["results"]} == {"perplexity", "perplexity_ratio"}
    assert {row["experts"] for row in found["results"]} == {1, 2}
    assert found["contrasts"][0]["against"] == "bottom"
    assert found["matched"][0]["fraction"] == 1.0
    assert found["manifest"]["settings"]["fraction"] == 0.1
    assert found["manifest"]["command"] is None or "ablate" in found["manifest"]["command"]


def test_blanks_in_lists_do_not_matter(
    run: Run, base: tuple[object, ...], pairs_file: Path
) -> None:
    blanks = (
        "--select", "top, random", "--by", " wd , md", "--intervention", "prune , zero",
        "--strength", "0.5, 0.9", "--edit-strength", "1 ,0.5", "--experts", "1, 2",
        "--router", "kmeans , random", "--measure", "perplexity, blimp", "--pairs", pairs_file,
    )  # fmt: skip
    status, printed, err = run(*base, *blanks, "--json")
    assert status == 0, err
    found = json.loads(printed)
    settings = found["manifest"]["settings"]
    asked = {
        "by": ["wd", "md"], "interventions": ["prune", "zero"], "strengths": [0.5, 0.9],
        "edit_strengths": [1.0, 0.5], "experts": [1, 2], "router": ["kmeans", "random"],
    }  # fmt: skip
    assert {name: settings[name] for name in asked} == asked
    rows = found["results"]
    assert {row["selection"] for row in rows} == {"dense", "top", "random"}
    assert {"perplexity", "accuracy"} <= {row["measure"] for row in rows}


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ((), ("demo", "test", None)),
        (("--evaluation-split", "train"), ("demo", "train", None)),
        (("--evaluation", "wikitext2"), ("wikitext2", None, None)),
        (("--evaluation", "wikitext2", "--eval-seq-len", "64"), ("wikitext2", None, 64)),
    ],
)
def test_the_text_to_evaluate_on(
    run: Run,
    base: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str, ...],
    asked: tuple[object, ...],
) -> None:
    """By default the demo's held-back articles, in windows of the default size."""
    seen: list[tuple[object, ...]] = []

    def load(source: object, _tokenizer: object, **settings: object) -> None:
        seen.append((source, settings["split"], settings["seq_len"]))
        raise InvalidInput("enough.")

    monkeypatch.setattr(evaluation, "load_evaluation", load)
    assert run(*base[:4], *given, "--layer", "1", "--quiet").err == "entangle: error: enough.\n"
    assert seen == [asked]


def test_scores_and_a_list_of_neurons(
    run: Run, base: tuple[object, ...], tiny_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    scores, listed = tmp_path / "scores", tmp_path / "mine.CSV"
    status, _, err = run(
        "score", tiny_folder("llama"), "--layer", "all", "--proj", "mlp",
        "--calibration", text_file, "--n-seq", "6", "--seq-len", "32", "--out", scores,
    )  # fmt: skip
    assert status == 0, err
    layer = "model.layers.0.mlp.gate_proj"
    pd.DataFrame({"layer": [layer] * 2, "neuron": [3, 1]}).to_csv(listed, index=False)
    edit = ("--intervention", "zero", "--scores", scores, "--select", f"{listed},top,random")
    status, _, err = run(*base, *edit, "--out", tmp_path / "out")
    assert status == 0, err
    chosen = load_ablation(tmp_path / "out").selections
    mine = chosen[chosen["selection"] == "listed"]
    assert mine[["layer", "neuron"]].to_numpy().tolist() == [[layer, 1], [layer, 3]]
    block_2 = ["2" if a == "all" else a for a in base] + [*edit, "--quiet"]
    status, _, err = run(*block_2)
    assert (status, err.count("\n")) == (2, 1)
    assert "layer" in err
    status, _, err = run(*without(base, "--fraction", "--seeds"), "--select", listed)
    assert status == 2
    assert "--scores" in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--select", "best"), "selection"),
        (("--select", "all"), "--fraction meaning"),
        (("--measure", "blimp"), "--evaluation meaning"),
        (("--by", "beauty"), "column"),
        (("--intervention", "snip"), "intervention"),
        (("--strength", "2"), "`strength` [0, 1] 2.0"),
        (("--strength", ""), "list 0.5,0.7 ''"),
        (("--select", ""), "selection"),
        (("--select", "top, best"), "unknown selection 'best'"),
        (("--evaluation-config", "raw"), "`config` 'raw' meaning"),
        (("--evaluation-column", "body"), "`column` 'body'"),
        (("--strength", "much"), "list 0.5,0.7 'much'"),
        (("--edit-strength", "-1"), "`edit_strength` [0, 1] -1.0"),
        (("--experts", "0"), "1 0"),
        (("--experts", "1.5"), "list 1,16"),
        (("--fraction", "0"), "(0, 1]"),
        (("--fraction", "0.1", "--count", "3"), "exactly one"),
        (("--count", "99999"), "99999"),
        (("--by", "md", "--no-md"), "without --no-md"),
        (("--router", "nearest"), "unknown router 'nearest'"),
        (("--experts", "999"), "calibration 192 999"),
        (("--eval-seq-len", "999"), "context 128 999"),
        (("--seq-len", "999"), "context 128 999"),
        (("--select", "random-norm", "--fraction", "0.6"), "matched 29"),
        (("--damping", "-1"), "`damping` finite least 0"),
        (("--seeds", "0"), "`seeds` integer 1"),
        (("--measure", "taste"), "measure"),
        (("--measure", "perplexity,blimp", "--pairs", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--scores", "nowhere"), "nowhere"),
        (("--memory", "lots"), "512M 2G"),
        (("--evaluation", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, base: tuple[object, ...], tmp_path: Path, wrong: tuple[str, ...], message: str
) -> None:
    arguments = [a for a in base if not ("--count" in wrong and a in ("--fraction", "0.1"))]
    status, printed, err = run(*arguments, *wrong, "--out", tmp_path / "out", "--quiet")
    assert (status, printed) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("entangle: error: ")
    assert holds(err, message), err
    assert not list(tmp_path.glob("*out*"))


def test_an_encoder_is_one_line(
    run: Run, base: tuple[object, ...], tiny_folder: Folder, tmp_path: Path
) -> None:
    status, printed, err = run("ablate", tiny_folder("bert"), *base[2:], "--out", tmp_path / "out")
    assert (status, printed) == (2, "")
    assert "encoder" in err
    assert not list(tmp_path.glob("*out*"))


def test_differences_of_paradigms_are_in_the_json(
    run: Run, base: tuple[object, ...], pairs_file: Path
) -> None:
    status, printed, err = run(
        *without(base, *TEXT_OPTIONS), "--measure", "blimp", "--pairs", pairs_file,
        "--intervention", "zero", "--json",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(printed)
    assert found["contrasts"] == []
    assert any(one.endswith("ablation_accuracy.png") for one in found["figures"])
    assert all(Path(one).is_file() for one in found["figures"])
    seen = {(row["measure"], row["against"]) for row in found["differences"]}
    measures = ("accuracy", "accuracy:agreement", "accuracy:macro")
    assert seen == {(m, other) for m in measures for other in ("bottom", "random")}
    assert all(row["low"] <= row["difference"] <= row["high"] for row in found["differences"])


def test_resume_prints_a_finished_result_again(
    run: Run, base: tuple[object, ...], tmp_path: Path
) -> None:
    edit = (*base, "--intervention", "zero", "--out", tmp_path / "out", "--resume", "--quiet")
    first = run(*edit)
    assert first.status == 0, first.err
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert run(*edit)[:2] == first[:2]
    status, printed, err = run(*edit, "--seed", "1")
    assert (status, printed, err.count("\n")) == (2, "", 1)
    assert holds(err, "out' finished settings"), err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"kind": "scores"}')
    status, printed, err = run(*edit[:-4], "--out", tmp_path / "other", "--resume", "--quiet")
    assert (status, printed, err.count("\n")) == (2, "", 1)
    assert holds(err, "'ablation' 'scores'"), err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest


def test_a_result_has_its_name_once_its_figures_are_there(
    run: Run, base: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise Unavailable("the figure cannot be written: the disk is full.")

    edit = (*base, "--intervention", "zero", "--out", tmp_path / "out", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr("entangle.plotting.save_figure", full)
        assert run(*edit).status == 2
    assert [path.name for path in tmp_path.iterdir()] == [".out.ablating"]
    assert run(*edit, "--resume").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    figures = tmp_path / "out" / "figures"
    assert len(list(figures.iterdir())) == 5
    shutil.rmtree(figures)  # as of a result that was made by the function
    assert run(*edit, "--resume").status == 0
    assert len(list(figures.iterdir())) == 5


@pytest.mark.parametrize(("sizes", "said"), [((3, 4), "7 "), ((3, 9), "'a' has 3"), ((10, 10), "")])
def test_few_pairs_are_told(sizes: tuple[int, int], said: str) -> None:
    names = ["a"] * sizes[0] + ["b"] * sizes[1]
    pairs = pd.DataFrame({"pair": range(sum(sizes)), "paradigm": names})
    told = _few_pairs(SimpleNamespace(pairs=pd.concat([pairs, pairs])))  # type: ignore[arg-type]
    assert len(told) == bool(said)
    assert said in "".join(told)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence_good": "a b"}', "sentence_bad"),
        ('{"sentence_good": "a b", "sentence_bad": 7}', "sentence_bad"),
        ('{"sentence_good": "a', "line 1"),
    ],
)
def test_bad_pairs(
    run: Run, base: tuple[object, ...], tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    own = without(base, *TEXT_OPTIONS)
    status, _, err = run(*own, "--measure", "blimp", "--pairs", path, "--quiet")
    assert status == 2
    assert err.count("\n") == 1
    assert message in err


def test_scores_of_another_model(
    run: Run, base: tuple[object, ...], tiny_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "scores"
    status, _, err = run(
        "score", tiny_folder("gpt2"), "--calibration", text_file, "--n-seq", "6", "--seq-len", "32",
        "--out", scores,
    )  # fmt: skip
    assert status == 0, err
    status, _, err = run(*base, "--scores", scores, "--quiet")
    assert status == 2
    assert "digest" in err


def test_an_existing_result_is_kept(run: Run, base: tuple[object, ...], tmp_path: Path) -> None:
    edit = ("--intervention", "zero", "--select", "top,random", "--out", tmp_path / "out")
    assert run(*base, *edit)[0] == 0
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    status, _, err = run(*base, *edit)
    assert status == 2
    assert holds(err, "out' exists --force"), err
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert run(*base, *edit, "--force")[0] == 0
