"""`entangle prune`: what it prints, writes, resumes and refuses."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as hf

import entangle
from entangle.evaluation import load_evaluation, perplexity
from entangle.models.layers import find_layers
from entangle.models.loading import load_model
from entangle.seeding import torch_rng
from tests.cli.expansions import N_SEQ, SEQ_LEN, check_one_line, content_of, listing
from tests.cli.runs import Run

pytestmark = pytest.mark.usefixtures("place")

PRUNE = (
    "prune", "model", "--device", "cpu", "--calibration", "text.txt", "--n-seq", N_SEQ,
    "--seq-len", SEQ_LEN, "--quiet",
)  # fmt: skip
EVALUATE = ("--evaluation", "text.txt", "--eval-seq-len", 64, "--eval-windows", 5)
REPORT = {"layers.parquet", "manifest.json", "model.parquet", "run.json"}


def test_the_folder_is_a_model_and_the_tables_compare_it_with_the_dense_one(run: Run) -> None:
    status, out, err = run(*PRUNE, "--sparsity", 0.5, *EVALUATE, "--out", "x")
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[0] == ["Pruned", "layers"]
    assert lines[1] == ["layer", "sparsity", "relative_error", "damping", "shrunk"]
    pruned = load_model("x", device="cpu")
    text = load_evaluation("text.txt", pruned.tokenizer, seq_len=64, n_windows=5)
    values = [
        perplexity(model, text).value for model in (load_model("model", device="cpu"), pruned)
    ]
    rows = {line[0]: line for line in lines if line[0] in ("dense", "pruned")}
    assert [rows[name][1] for name in ("dense", "pruned")] == [f"{one:.3f}" for one in values]
    assert set(content_of("x")) >= REPORT
    assert isinstance(hf.AutoModelForCausalLM.from_pretrained("x"), hf.LlamaForCausalLM)
    for layer in find_layers(pruned.module, "all", "mlp"):
        assert (layer.weight == 0).sum(1).eq(layer.in_features // 2).all()
    report = entangle.load_result("x")
    assert report.perplexity == pytest.approx(values[1], rel=1e-6)  # type: ignore[attr-defined]


def test_a_finished_pruning_is_resumed_and_force_replaces_it(run: Run) -> None:
    first = (*PRUNE, "--pruner", "wanda", "--out", "x", "--json")
    before = json.loads(run(*first).out)
    content = content_of("x")
    again = run(*first, "--resume")
    assert (again.status, again.err) == (0, "")
    assert json.loads(again.out)["layers"] == before["layers"]
    assert content_of("x") == content
    check_one_line(run(*first), "'x' --force")
    assert run(*first, "--force", "--sparsity", 0.6).status == 0
    assert content_of("x") != content


def test_bits_groups_patterns_and_allocations(run: Run) -> None:
    run("score", *PRUNE[1:], "--out", "scores")
    status, _, err = run(
        "allocate", "scores", "--sparsity", 0.5, "--rule", "uniform", "--out", "half.safetensors"
    )
    assert (status, err) == (0, ""), err
    for given in (
        ("--bits", 4, "--group-size", 128, "--sparsity", 0),
        ("--pattern", "5:16"),
        ("--allocation", "half.safetensors"),
    ):
        status, out, err = run(*PRUNE, *given, "--json")
        assert (status, err) == (0, "")
        share = pd.DataFrame(json.loads(out)["layers"])["sparsity"]
        wanted = {"--bits": 0.0, "--pattern": 0.6875, "--allocation": 0.5}[str(given[0])]
        assert share.to_numpy() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("--sparsity 1.01", "`sparsity` [0, 1] 1.01"),
        ("--bits 4 --group-size 64", "`group_size` 128 64"),
        ("--group-size 128", "--group-size --bits"),
        ("--bits 9 --group-size 128", "`group_size` `bits` [2, 8] 9"),
        ("--pruner wanda --damping 0.1", "--damping sparsegpt"),
        ("--allocation nowhere.safetensors", "nowhere.safetensors"),
        ("--layer lm_head --proj lm_head", "'lm_head' outside"),
        ("--eval-windows 2", "--eval-windows needs --evaluation SOURCE"),
        ("--out text.txt", "output 'text.txt' file"),
    ],
)
def test_mistakes_end_in_one_line(given: str, names: str, run: Run) -> None:
    before = listing()
    check_one_line(run(*PRUNE, *given.split()), names)
    assert listing() == before


@pytest.mark.parametrize(
    ("form", "given"),
    [("bitmap", ("--bits", 4, "--group-size", 128)), ("n16", ("--pattern", "5:16"))],
)
def test_packed_weights_are_those_of_the_ordinary_model(
    form: str, given: tuple[object, ...], run: Run
) -> None:
    assert run(*PRUNE, *given, "--out", "plain").status == 0
    status, _, err = run(*PRUNE, *given, "--packed", form, "--out", "packed")
    assert (status, err) == (0, "")
    ids = torch.randint(4, 112, (2, 20), generator=torch_rng(0, "packed"))
    packed, plain = (
        entangle.load_expanded("packed", device="cpu"),
        load_model("plain", device="cpu"),
    )
    torch.testing.assert_close(packed.module(ids).logits, plain.module(ids).logits)


def test_another_folder_is_not_replaced(run: Run, place: Path) -> None:
    check_one_line(run(*PRUNE, "--out", "model", "--force"), "'model' manifest.json")
    assert (place / "model" / "config.json").exists()
