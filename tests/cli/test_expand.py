"""`entangle expand`: what it prints, writes and resumes, called in this process."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from entangle.evaluation import load_evaluation, perplexity
from entangle.experts import build
from entangle.experts.checkpoint import load_expanded
from entangle.models.loading import load_model
from tests.cli.expansions import (
    BLOCKS,
    BUILDS,
    FILES,
    SMALL,
    WIDE,
    check_one_line,
    content_of,
    experts_of,
    in_memory,
    listing,
    without_run,
)
from tests.cli.runs import Run

pytestmark = pytest.mark.usefixtures("place")

COLUMNS = [
    "layer", "sparsity", "relative_error", "damping", "smallest_cluster", "effective_clusters",
    "shrunk",
]  # fmt: skip
MLP = ("gate_proj", "up_proj", "down_proj")
LAYERS = [f"model.layers.{block}.mlp.{name}" for block in range(3) for name in MLP]
UP = LAYERS[1::3]
EVALUATE = ("--evaluation", "text.txt", "--eval-seq-len", 64, "--eval-windows", 5)


def rows_of(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.strip()]


def test_the_tables(run: Run) -> None:
    status, out, err = run(*WIDE)
    assert (status, err) == (0, "")
    expected = in_memory(proj="mlp")
    rows, layers = rows_of(out), expected.layers
    assert rows[:2] == [["Expanded", "layers"], COLUMNS]
    assert [row[0] for row in rows[3:12]] == LAYERS
    for row, (_, layer) in zip(rows[3:12], layers.iterrows(), strict=True):
        assert row[1:3] == [f"{layer[name]:.4f}" for name in ("sparsity", "relative_error")]
        assert row[4:] == [
            str(layer["smallest_cluster"]), f"{layer['effective_clusters']:.1f}",
            str(layer["shrunk"]),
        ]  # fmt: skip
    assert rows[12][:4] == ["Model,", "pruned", "by", "sparsegpt"]
    assert rows[13][:5] == ["model", "perplexity", "flops", "nonzeros", "bytes"]
    costs = [f"{value:.3f}" for value in expected.costs.values()]
    assert [row[:8] for row in rows[15:-1]] == [["expansion", "(k", "=", "3)", "–", *costs]]


def test_json_is_the_expansion_made_in_memory(run: Run) -> None:
    before = listing()
    status, out, err = run(*SMALL, "--sparsity", 0.5, "--json")
    assert (status, err) == (0, "")
    content, expected = json.loads(out), in_memory(sparsity=0.5)
    assert content.keys() == {"out", "model", "layers", "manifest"}
    assert "/runs/expand-" in content["out"]
    pd.testing.assert_frame_equal(pd.DataFrame(content["layers"]), expected.layers, rtol=1e-12)
    same = ("model", "calibration", "settings", "costs")
    wanted = json.loads(json.dumps(dict(expected.manifest)))
    assert {key: content["manifest"][key] for key in same} == {key: wanted[key] for key in same}
    [row] = content["model"]
    assert (row["model"], row["perplexity"]) == ("expansion (k = 3)", None)
    assert listing() == before


def test_evaluate_measures_dense_plain_and_expansion(run: Run) -> None:
    content = json.loads(run(*SMALL, *EVALUATE, "--json").out)
    model = load_model("model", device="cpu")
    text = load_evaluation("text.txt", model.tokenizer, seq_len=64, n_windows=5)
    plain, expanded = in_memory(experts=1), in_memory()
    assert plain.model is not None
    assert expanded.model is not None
    rows = {row["model"]: row for row in content["model"]}
    assert list(rows) == ["dense", "plain pruning (k = 1)", "expansion (k = 3)"]
    for row, made in zip(rows.values(), (model, plain.model, expanded.model), strict=True):
        assert row["perplexity"] == pytest.approx(perplexity(made, text).value, rel=1e-5)
    values = {round(row["perplexity"], 3) for row in rows.values()}
    assert len(values) == 3
    assert [rows["dense"][name] for name in ("flops", "nonzeros", "bytes")] == [1.0, 1.0, 1.0]
    for row, made_costs in zip(list(rows.values())[1:], (plain, expanded), strict=True):
        assert row["flops"] == pytest.approx(made_costs.costs["flops"])
    protocol = content["manifest"]["evaluation"]
    assert (protocol["seq_len"], protocol["n_windows"]) == (64, 5)


def test_no_baseline_leaves_plain_pruning_out(run: Run) -> None:
    content = json.loads(run(*SMALL, *EVALUATE, "--no-baseline", "--json").out)
    assert [row["model"] for row in content["model"]] == ["dense", "expansion (k = 3)"]


def test_one_expert_is_plain_pruning_and_has_no_second_baseline(run: Run) -> None:
    content = json.loads(run(*SMALL, "--experts", 1, *EVALUATE, "--json").out)
    assert [row["model"] for row in content["model"]] == ["dense", "expansion (k = 1)"]
    assert content["manifest"]["settings"]["router"] == "single"


def test_the_checkpoint_is_the_expansion_made_in_memory(run: Run) -> None:
    status, out, err = run(*SMALL, "--out", "runs/x")
    assert (status, err) == (0, "")
    assert out.endswith("Saved to runs/x.\n")
    assert sorted(content_of("runs/x")) == FILES
    assert [path.name for path in Path("runs").iterdir()] == ["x"]
    expected, loaded = in_memory(), experts_of(load_expanded("runs/x", device="cpu"))
    assert list(loaded) == UP
    for name, weight in experts_of(expected.model).items():
        assert torch.equal(loaded[name], weight)
    pd.testing.assert_frame_equal(pd.read_parquet("runs/x/layers.parquet"), expected.layers)


def test_the_closing_table_is_kept_beside_the_checkpoint(run: Run) -> None:
    content = json.loads(run(*SMALL, *EVALUATE, "--out", "x", "--json").out)
    kept = pd.read_parquet("x/model.parquet")
    assert kept["perplexity"].tolist() == [row["perplexity"] for row in content["model"]]
    assert kept["model"].tolist() == ["dense", "plain pruning (k = 1)", "expansion (k = 3)"]


def test_a_checkpoint_has_its_name_once_its_closing_table_is_there(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = listing()
    with monkeypatch.context() as patch:
        patch.setattr("entangle.evaluation.perplexity", interrupted)
        assert run(*SMALL, *EVALUATE, "--out", "x").status == 130
    assert sorted(content_of(".x.building")) == sorted(
        [*BLOCKS, *BUILDS, "digests.json", "plan.json"]
    )
    assert not Path("x").exists()
    assert run(*SMALL, *EVALUATE, "--out", "x", "--resume").status == 0
    assert sorted(content_of("x")) == sorted([*FILES, "model.parquet"])
    assert {one for one in listing() if not one.startswith("x")} == set(before)


def test_the_control_router(run: Run) -> None:
    content = json.loads(run(*SMALL, "--router", "random", "--json").out)
    layers = pd.DataFrame(content["layers"])
    assert content["manifest"]["settings"]["router"] == "random"
    layers = layers.astype({"inertia": float})  # null for a router without centroids
    pd.testing.assert_frame_equal(layers, in_memory(router="random").layers, rtol=1e-12)
    assert not layers["relative_error"].equals(in_memory().layers["relative_error"])


def test_two_of_four(run: Run) -> None:
    assert run(*SMALL, "--pattern", "2:4", "--out", "x").status == 0
    for weight in experts_of(load_expanded("x", device="cpu")).values():
        assert (weight.unflatten(-1, (-1, 4)) == 0).sum(-1).eq(2).all()
    assert (pd.read_parquet("x/layers.parquet")["sparsity"] == 0.5).all()


def test_chosen_layers(run: Run) -> None:
    options = ("--layer", 1, "--layer", "model.layers.2.mlp.up_proj", "--json")
    content = json.loads(run(*WIDE, *options).out)
    assert [row["layer"] for row in content["layers"]] == [*LAYERS[3:6], LAYERS[7]]


def test_an_existing_checkpoint_needs_force(run: Run) -> None:
    assert run(*SMALL, "--out", "x").status == 0
    before = without_run("x")
    options = (*SMALL, "--sparsity", 0.5, "--out", "x")
    for more in ((), ("--resume",)):
        check_one_line(run(*options, *more), "output 'x' exists")
    assert without_run("x") == before
    assert run(*options, "--force").status == 0
    assert without_run("x").keys() == before.keys()
    assert without_run("x") != before
    assert not Path(".x.building.old").exists()


def test_a_mistake_with_force_leaves_the_old_checkpoint(run: Run) -> None:
    assert run(*SMALL, "--out", "x").status == 0
    before, files = content_of("x"), listing()
    check_one_line(run(*SMALL, "--out", "x", "--force", "--sparsity", 2), "[0, 1] 2.0")
    assert (content_of("x"), listing()) == (before, files)


@pytest.fixture
def unfinished(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of ``x`` that ended by Ctrl-C in its third block."""
    plain, calls = build._expand_block, []

    def interrupted(*arguments: Any) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build, "_expand_block", interrupted)
        assert run(*SMALL, "--out", "x") == (130, "", "entangle: interrupted\n")
    assert not Path("x").exists()
    assert sorted(content_of(".x.building")) == sorted(
        [*BLOCKS[:2], *BUILDS[:2], "digests.json", "plan.json"]
    )


@pytest.mark.usefixtures("unfinished")
def test_an_interrupted_build_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*SMALL, "--out", "whole").status == 0
    before = listing()
    check_one_line(
        run(*SMALL, "--out", "x"),
        "unfinished 'x' --resume",
    )
    for other, name in (
        (("--sparsity", 0.5), "settings"),
        (("--seed", 1), "calibration"),
        (EVALUATE, "evaluation"),
    ):
        message = f"{name} --force"
        check_one_line(run(*SMALL, "--out", "x", "--resume", *other), message)
    assert listing() == before
    plain, made = build._expand_block, []

    def counted(*arguments: Any) -> object:
        made.append(arguments[2])
        return plain(*arguments)

    monkeypatch.setattr(build, "_expand_block", counted)
    status, _, err = run(*SMALL, "--out", "x", "--resume")
    assert (status, err) == (0, "")
    assert made == [2]  # the blocks that were there are not made again
    assert without_run("x") == without_run("whole")
    assert not Path(".x.building").exists()


@pytest.mark.usefixtures("unfinished")
def test_force_begins_an_unfinished_build_anew(run: Run) -> None:
    assert run(*SMALL, "--out", "x", "--force", "--sparsity", 0.5).status == 0
    assert run(*SMALL, "--out", "whole", "--sparsity", 0.5).status == 0
    assert without_run("x") == without_run("whole")


@pytest.mark.usefixtures("unfinished")
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("plan.json", "/x' plan.json"),
        ("digests.json", "/x' digests.json"),
        ("block-0000.safetensors", "/.x.building/block-0000.safetensors' truncated altered"),
    ],
)
def test_an_unfinished_build_that_is_truncated(run: Run, file: str, message: str) -> None:
    os.truncate(Path(".x.building", file), 20)
    check_one_line(run(*SMALL, "--out", "x", "--resume"), message)


@pytest.mark.usefixtures("unfinished")
def test_an_unfinished_block_that_was_altered_is_made_anew_once_it_is_removed(run: Run) -> None:
    assert run(*SMALL, "--out", "whole").status == 0
    block = Path(".x.building", BLOCKS[0])
    content = bytearray(block.read_bytes())
    content[-1] ^= 1  # a single bit of a weight
    block.write_bytes(content)
    message = "truncated altered --resume"
    check_one_line(run(*SMALL, "--out", "x", "--resume"), message)
    block.unlink()
    assert run(*SMALL, "--out", "x", "--resume").status == 0
    assert without_run("x") == without_run("whole")


def test_a_finished_build_is_printed_again(run: Run) -> None:
    command = (*SMALL, *EVALUATE, "--no-baseline", "--out", "x")
    first, before = run(*command), content_of("x")
    again = run(*command, "--resume")
    assert (again.status, again.out, again.err) == (0, first.out, "")
    assert content_of("x") == before
    Path("x", "run.json").write_text("[]")  # its seconds are those of the reading
    assert run(*command, "--resume").status == 0


def test_a_finished_build_that_was_altered_is_not_read(run: Run) -> None:
    assert run(*SMALL, "--out", "x").status == 0
    block = Path("x", BLOCKS[1])
    block.write_bytes(block.read_bytes()[:-1] + b"!")
    message = "block-0001.safetensors' missing truncated altered --force"
    check_one_line(run(*SMALL, "--out", "x", "--resume"), message)
    block.unlink()
    check_one_line(run(*SMALL, "--out", "x", "--resume"), message)


def test_resume_without_an_unfinished_build_begins_one(run: Run) -> None:
    assert run(*SMALL, "--out", "x", "--resume").status == 0
    assert sorted(content_of("x")) == FILES
