"""`entangle decompose`: what it prints and writes, and mistakes that end in one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from entangle.results.decomposition import load_decomposition
from entangle.runs.provenance import read_manifest
from tests.cli.expansions import check_one_line, listing
from tests.cli.runs import Run
from tests.tiny_models import TINY

pytestmark = pytest.mark.usefixtures("place")

BASE = ("decompose", "model", "--device", "cpu", "--calibration", "text.txt", "--n-seq", 4,
        "--seq-len", 32, "--experts", "1,2", "--quiet")  # fmt: skip
UP = ("--layer", 1, "--proj", "up_proj")


def test_json_and_folder(run: Run) -> None:
    status, out, err = run(*BASE, *UP, "--neurons", "3,17", "--out", "out", "--json")
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert [row["neuron"] for row in content["neurons"]] == [3, 17]
    assert set(content["neurons"][0]) == {
        "layer", "neuron", "wd", "modes", "ri_1", "ri_2", "weighted_wd_change"
    }  # fmt: skip
    assert content["out"] == "out"
    assert content["modes"][0]["left"] is None
    found = load_decomposition("out")
    assert read_manifest("out", "decomposition") == content["manifest"] == found.manifest
    assert found.neurons["sparsity"].unique().tolist() == [0.9]
    assert len(found.neurons) == 2 * 48
    assert json.loads(found.modes["top_tokens"][0])[0][0].isprintable()
    assert content["separated"][0]["token_a"] == found.separated["token_a"][0]


def test_table(run: Run) -> None:
    status, out, err = run(*BASE, *UP, "--out", "out", "--sparsity", 0.5)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Neurons pruned to 50% inside k experts (RI: RMSE of one expert / of k)"
    assert [name in lines[2] for name in ("wd", "modes", "RI k=1", "RI k=2", "weighted WD, k=2")]
    rows = [line for line in lines if "mlp.up_proj" in line]
    neurons = load_decomposition("out").summary()
    assert [line.split()[1] for line in rows] == [str(neuron) for neuron in neurons["neuron"]]
    assert f"{neurons['wd'][0]:.4f}" in rows[0]
    assert f"{neurons['ri_2'][0]:.3f}" in rows[0]
    assert f"{neurons['weighted_wd_change'][0]:+.0%}" in rows[0]
    assert lines[-1] == "Saved to out."


def test_several_layers_and_the_control(run: Run) -> None:
    status, out, _ = run(
        *BASE, "--layer", 0, "--layer", 2, "--proj", "mlp", "--router", "random", "--json",
        "--pruner", "magnitude", "--contexts", 1, "--token-pairs", 5, "--separated", 2,
        "--memory", "64M",
    )  # fmt: skip
    assert status == 0
    settings = json.loads(out)["manifest"]["settings"]
    assert len(settings["layers"]) == 6
    assert (settings["router"], settings["pruner"], settings["pairs"]) == ("random", "magnitude", 5)


def test_the_same_command_gives_the_same_tables(run: Run) -> None:
    for name in ("a", "b"):
        assert run(*BASE, *UP, "--out", name, "--seed", 3).status == 0
    for path in sorted(Path("a").glob("*.parquet")):
        assert path.read_bytes() == (Path("b") / path.name).read_bytes()


def test_without_a_tokenizer_text_cannot_be_read_but_ids_can(run: Run) -> None:
    for path in Path("model").glob("*token*"):
        path.unlink()
    check_one_line(run(*BASE, *UP), "'text.txt' text needs tokenizer")
    import torch
    from safetensors.torch import save_file

    save_file({"ids": torch.arange(4, 104).repeat(2).view(4, 50)}, "ids.safetensors")
    arguments = [*BASE[:5], "ids.safetensors", "--experts", "1,2", "--quiet", *UP, "--out", "out"]
    assert run(*arguments).status == 0
    assert load_decomposition("out").contexts["token"].str.fullmatch(r"\d+").all()


MISTAKES = {
    "": "`--layer`",
    "--layer 7": "index 0..2 7",
    "--layer model.layers.1.mlp.upproj": "unknown layer 'model.layers.1.mlp.upproj'",
    "--layer 1 --proj upp": "unknown projection 'upp'",
    "--layer 1 --proj up_proj --neurons 3,48": "lie 0..47 48",
    "--layer 1 --proj up_proj --neurons 3,x": "list '3,x'",
    "--layer 1 --proj up_proj --experts 2,129": "128 129",
    "--layer 1 --experts 0,2": "got 0",
    "--layer 1 --experts two": "list 'two'",
    "--layer 1 --sparsity 1.3": "[0, 1] 1.3",
    "--layer 1 --sparsity nan": "[0, 1] nan",
    "--layer 1 --token-pairs -1": "`token_pairs` integer 0 -1",
    "--layer 1 --memory lots": "size 512M 2G 'lots'",
    "--layer 1 --seed -1": "`seed` integer -1",
    "--layer 1 --out text.txt": "output 'text.txt' file",
    "--layer 1 --out model": "output 'model' exists --force",
    "--layer 1 --out model --force": "manifest.json",
    "--layer 1 --calibration nowhere.txt": "'nowhere.txt' exist",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_clear_line(run: Run, case: str) -> None:
    options = case.split()
    if "--out" not in options:
        options += ["--out", "results/x"]
    before = listing()
    check_one_line(run(*BASE, *options), MISTAKES[case])
    assert listing() == before


def test_options_are_checked_before_the_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_args: object, **_kwargs: object) -> None:
        pytest.fail("the model must not be loaded")

    monkeypatch.setattr("entangle.models.loading.load_model", load)
    for mistake in ("--sparsity 2", "--experts 0", "--neurons x", "--out model", "--seed -1"):
        assert run(*BASE, *UP, *mistake.split()).status == 2


def test_layers_are_checked_before_the_text_is_read(run: Run) -> None:
    Path("broken.jsonl").write_text("{")
    ran = run(*BASE, "--layer", 9, "--calibration", "broken.jsonl")
    check_one_line(ran, "index 0..2")


def test_an_existing_result_is_replaced_with_force(run: Run) -> None:
    assert run(*BASE, *UP, "--out", "out").status == 0
    check_one_line(run(*BASE, *UP, "--out", "out"), "output 'out' exists")
    assert run(*BASE, *UP, "--out", "out", "--force", "--sparsity", 0.5).status == 0
    assert pd.read_parquet("out/neurons.parquet")["sparsity"].unique().tolist() == [0.5]


def test_a_layer_that_never_varies(run: Run, tiny_folder: Callable[[str], Path]) -> None:
    module = TINY["gpt2"]()
    module.get_parameter("transformer.h.1.mlp.c_fc.weight").zero_()
    shutil.rmtree("model")
    shutil.copytree(tiny_folder("gpt2"), "model")
    module.save_pretrained("model")  # type: ignore[operator]
    check_one_line(run(*BASE, "--layer", 1, "--proj", "c_fc"), "no neuron vary")
