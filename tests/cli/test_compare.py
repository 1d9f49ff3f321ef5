"""`entangle compare`: mistakes end in one clear line, before any model is loaded where possible."""

import json

import pandas as pd
import pytest

from entangle.provenance import read_manifest
from tests.cli.expansions import check_one_line, listing
from tests.cli.runs import Run

pytestmark = pytest.mark.usefixtures("place")

SMALL = (
    "compare", "model", "--device", "cpu", "--calibration", "text.txt", "--n-seq", 4,
    "--seq-len", 32, "--methods", "magnitude,expansion", "--sparsity", "0.5", "--experts", "2",
    "--eval-seq-len", 64, "--eval-windows", 4, "--quiet",
)  # fmt: skip
DATA = ("--data", "text.txt")


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
    "--methods wandb": "unknown method 'wandb'. Closest: wanda, ",
    "--methods=": "unknown method ''",
    "--sparsity 0.5,half": "a list must look like 0.5,0.7; got '0.5,half'.",
    "--sparsity 0.5;0.6": "a list must look like 0.5,0.7; got '0.5;0.6'.",
    "--sparsity=": "a list must look like 0.5,0.7; got ''.",
    "--sparsity 1.5": "`sparsity` must be in [0, 1]; got 1.5.",
    "--experts 2.5": "a list must look like 1,16; got '2.5'.",
    "--experts 4,": "a list must look like 1,16; got '4,'.",
    "--experts 0": "`experts` must be at least 1; got 0.",
    "--experts 129": "`experts` must be at most the number of tokens to calibrate on, 128; got",
    "--memory lots": "a size must look like 512M or 2G; got 'lots'.",
    "--data nowhere.txt": "'nowhere.txt' does not exist",
    "--calibration nowhere.txt": "'nowhere.txt' does not exist",
    "--eval-seq-len 129": "`seq_len` must be at most the model's context, 128; got 129.",
    "--eval-windows 0": "`n_windows` must be an integer of at least 1; got 0.",
    "--out text.txt": "the output 'text.txt' is a file; name a folder.",
    "--out model": "the output folder 'model' exists; name another one or use --force",
    "--out model --force": "holds no manifest.json, so it is not a result of entangle",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_clear_line(run: Run, case: str) -> None:
    options = [*DATA, *case.split()]
    if "--out" not in options:
        options += ["--out", "results/x"]
    before = listing()
    check_one_line(run(*SMALL, *options), MISTAKES[case])
    assert listing() == before


def test_the_text_to_evaluate_on_must_be_named(run: Run) -> None:
    status, out, err = run(*SMALL)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].endswith("the following arguments are required: --data")


@pytest.mark.parametrize("mistake", ["--out model", "--methods wandb", "--sparsity x"])
def test_options_are_checked_before_the_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    def load(*_args: object, **_kwargs: object) -> None:
        pytest.fail("the model must not be loaded")

    monkeypatch.setattr("entangle.models.loading.load_model", load)
    assert run(*SMALL, *DATA, *mistake.split()).status == 2
