"""`entangle compare`: mistakes end in one clear line, before any model is loaded where possible."""

import json
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from entangle.errors import NumericalError
from entangle.runs.provenance import read_manifest
from tests.cli.expansions import check_one_line, listing
from tests.cli.runs import Run, holds

pytestmark = pytest.mark.usefixtures("place")

SMALL = (
    "compare", "model", "--device", "cpu", "--calibration", "text.txt", "--n-seq", 4,
    "--seq-len", 32, "--methods", "magnitude,expansion", "--sparsity", "0.5", "--experts", "2",
    "--eval-seq-len", 64, "--eval-windows", 4, "--quiet",
)  # fmt: skip
DATA = ("--evaluation", "text.txt")


def test_a_small_comparison(run: Run) -> None:
    status, out, err = run(*SMALL, *DATA, "--out", "out", "--json")
    assert (status, err) == (0, "")
    content = json.loads(out)
    rows = [(row["method"], row["sparsity"], row["experts"]) for row in content["results"]]
    assert rows == [("dense", 0.0, 1), ("magnitude", 0.5, 1), ("expansion", 0.5, 2)]
    saved = pd.read_parquet("out/comparison.parquet")
    assert saved["method"].tolist() == [row["method"] for row in content["results"]]
    assert saved["perplexity"].tolist() == [row["perplexity"] for row in content["results"]]
    assert len(pd.read_parquet("out/windows.parquet")) == 3 * 4
    assert read_manifest("out", "comparison") == content["manifest"]
    assert saved["perplexity"].nunique() == 3


MISTAKES = {
    "--methods wandb": "unknown method 'wandb' wanda",
    "--methods=": "unknown method ''",
    "--sparsity 0.5,half": "list 0.5,0.7 '0.5,half'",
    "--sparsity 0.5;0.6": "list 0.5,0.7 '0.5;0.6'",
    "--sparsity=": "list 0.5,0.7 ''",
    "--sparsity 1.5": "`sparsity` [0, 1] 1.5",
    "--experts 2.5": "list 1,16 '2.5'",
    "--experts 4,": "list 1,16 '4,'",
    "--experts 0": "`experts` integer 1 0",
    "--experts 129": "`experts` 128",
    "--memory lots": "size 512M 2G 'lots'",
    "--evaluation nowhere.txt": "'nowhere.txt' exist",
    "--calibration nowhere.txt": "'nowhere.txt' exist",
    "--eval-seq-len 129": "`seq_len` context 128 129",
    "--eval-windows 0": "integer 1 0",
    "--evaluation-split test": "`split` 'test' meaning 'text.txt'",
    "--evaluation-config raw": "`config` 'raw' meaning 'text.txt'",
    "--evaluation-column body": "`column` 'body' 'text.txt'",
    "--seed -1": "`seed` integer [0, 2**63)",
    "--out text.txt": "output 'text.txt' file",
    "--out model": "output 'model' exists --force",
    "--out model --force": "manifest.json",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_clear_line(run: Run, case: str) -> None:
    options = [*DATA, *case.split()]
    if "--out" not in options:
        options += ["--out", "results/x"]
    before = listing()
    check_one_line(run(*SMALL, *options), MISTAKES[case])
    assert listing() == before


def test_blanks_in_lists_do_not_matter(run: Run) -> None:
    blanks = ("--methods", "magnitude, expansion", "--sparsity", " 0.5 , 0.8", "--experts", "1, 2")
    content = json.loads(run(*SMALL, *DATA, *blanks, "--json").out)
    assert [row["method"] for row in content["results"]] == [
        "dense",
        *["magnitude", "expansion"] * 2,
    ]
    assert content["manifest"]["settings"]["methods"] == ["magnitude", "expansion"]


def test_a_finished_comparison_is_printed_again(run: Run) -> None:
    first = run(*SMALL, *DATA, "--out", "out")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    again = run(*SMALL, *DATA, "--out", "out", "--resume")
    assert (again.status, again.out, again.err) == (0, first.out, "")
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    other = ("--sparsity", "0.6", "--out", "out", "--resume")
    check_one_line(run(*SMALL, *DATA, *other), "'out' comparison --force")


def test_an_arm_that_fails_is_named_and_the_finished_ones_stay(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("entangle.experts.solver")
    fit = module.fit_router_and_labels

    def fail(*arguments: object, kind: str, **settings: object) -> object:
        if kind == "single":
            return fit(*arguments, kind=kind, **settings)
        raise NumericalError("7 of 128 tokens hold NaN.")

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_router_and_labels", fail)
        ran = run(*SMALL, *DATA, "--out", "out")
    check_one_line(ran, "0.5 k=2 model.layers.0.mlp.gate_proj", status=1)
    assert holds(ran.err, "7 128 NaN"), ran.err
    assert not Path("out").exists()
    assert len(list(Path(".out.comparing").glob("arm-*.safetensors"))) == 1
    check_one_line(run(*SMALL, *DATA, "--out", "out"), "unfinished 'out'")
    message = "evaluation --force"
    check_one_line(run(*SMALL, *DATA, "--eval-windows", 3, "--out", "out", "--resume"), message)
    assert run(*SMALL, *DATA, "--out", "out", "--resume").status == 0
    assert not Path(".out.comparing").exists()


def test_force_begins_an_unfinished_comparison_anew(run: Run) -> None:
    Path(".out.comparing").mkdir()
    assert run(*SMALL, *DATA, "--out", "out", "--force").status == 0
    assert not Path(".out.comparing").exists()


def test_the_text_to_evaluate_on_must_be_named(run: Run) -> None:
    status, out, err = run(*SMALL)
    assert (status, out) == (2, "")
    assert "required: --evaluation" in err.splitlines()[-1]


@pytest.mark.parametrize("mistake", ["--out model", "--methods wandb", "--sparsity x"])
def test_options_are_checked_before_the_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    def load(*_args: object, **_kwargs: object) -> None:
        pytest.fail("the model must not be loaded")

    monkeypatch.setattr("entangle.models.loading.load_model", load)
    assert run(*SMALL, *DATA, *mistake.split()).status == 2
