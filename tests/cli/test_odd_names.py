"""Names from outside reach a terminal as text: nothing in them acts on it or breaks a line."""

import json
import os
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from entangle.errors import is_unseen
from tests.cli.runs import Ran, Run

if TYPE_CHECKING:
    from entangle.texts.calibration_set import CalibrationSet

ODD = "\x1b[31m\n[bold]\x07\u202e\x85$a_{\\foo$<script>"
"""Colours a terminal, ends a line, rings, turns text around, is markup of rich, TeX and HTML."""
SPELLED = r"\x1b[31m"
"""What is shown of each: libraries that are quoted leave out some of the rest."""
BYTES = os.fsdecode(b"\xff") + ODD
"""The same after a byte that no text has."""
DATA = "--n-seq 2 --seq-len 16 --quiet"
EVALUATED = "--eval-seq-len 16 --eval-windows 2 --quiet"


def check(ran: Ran, status: int, spelled: str = SPELLED) -> None:
    """Check that a name was shown, spelled out, and a mistake told in one line."""
    said = ran.out + ran.err
    assert ran.status == status, said
    assert not {character for character in said if is_unseen(character)} - {"\n"}
    assert spelled in said.replace("\\\\", "\\"), said
    if status:
        assert ran.out == ""
        assert ran.err.startswith("entangle: error: ")
        assert ran.err.count("\n") == 1


def edited(name: str, file: str, **entries: object) -> None:
    """Copy the model and change its config, or its tokenizer's."""
    path = Path(shutil.copytree("model", name), file)
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def odd(place: Path) -> None:
    """Files with odd names, and files that hold odd names, in the current folder."""
    for name in (ODD, BYTES):
        shutil.copy("text.txt", f"{name}.txt")
        shutil.copytree("model", name)
    edited("type", "config.json", model_type=BYTES)
    edited("act", "config.json", hidden_act=BYTES)
    edited("quantised", "config.json", quantization_config={"quant_method": BYTES})
    weights = load_file(Path(shutil.copytree("model", "tensor"), "model.safetensors"))
    weights |= {ODD: torch.zeros(2, dtype=torch.float64), "lm_head.weight": torch.zeros(3, 3)}
    save_file(weights, "tensor/model.safetensors", {"format": "pt"})
    Path("broken.jsonl").write_text("{")
    Path("broken.jsonl").rename(f"{BYTES}.jsonl")
    Path("columns.jsonl").write_text(json.dumps({BYTES: "a text", "other": "another"}) + "\n")
    pd.DataFrame({ODD: ["a text"], "other": ["another"]}).to_parquet("columns.parquet")
    save_file({ODD: torch.zeros(2, 2)}, "tensor.safetensors")
    Path("manifest").mkdir()
    Path("manifest", "manifest.json").write_text(
        json.dumps({"kind": "scores", "schema_version": BYTES})
    )


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize(
    ("before", "name", "after"),
    [
        ("layers ", BYTES, ""),
        ("layers ./", BYTES, "/nowhere"),
        ("layers type", "", ""),
        ("layers act", "", ""),
        ("layers quantised", "", ""),
        ("layers model --dtype ", BYTES, ""),
        ("layers model --device ", BYTES, ""),
        ("layers model --revision ", BYTES, ""),
        ("score model --layer ", BYTES, ""),
        ("score model --proj ", BYTES, ""),
        ("score model --memory ", BYTES, ""),
        ("score model --calibration ./", BYTES, ".nowhere.txt"),
        ("score model --calibration ", BYTES, ".jsonl"),
        ("score model --calibration columns.jsonl", "", ""),
        ("score model --calibration columns.parquet", "", ""),
        ("score model --calibration columns.parquet --column ", BYTES, ""),
        ("score model --calibration tensor.safetensors", "", ""),
        ("score model --calibration text.txt --out ", BYTES, ""),
        ("score model --calibration text.txt --out ./\ud800", BYTES, ""),
        ("ablate model --select ", BYTES, ""),
        ("ablate model --intervention ", BYTES, ""),
        ("allocate --sparsity 0.5 ", BYTES, ""),
        ("figures ", BYTES, ""),
        ("figures manifest", "", ""),
        ("evaluate model --evaluation ./", BYTES, ".nowhere.txt"),
        ("compare model --evaluation text.txt --methods ", BYTES, ""),
    ],
)
def test_a_mistake_is_one_line(run: Run, before: str, name: str, after: str) -> None:
    *head, last = before.split(" ")
    check(run(*head, last + name + after), 2)


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize("unknown", ["--\x1b[31m\n[bold]\x07\u202e\x85$a_{", "\x1b[31m"])
def test_an_unknown_argument_is_one_line(run: Run, unknown: str) -> None:
    status, _, err = run(*(["layers", "model", unknown] if unknown[0] == "-" else [unknown]))
    assert status == 2
    assert r"\x1b[31m" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["./" + "x" * 300, "xx/" * 3000])
@pytest.mark.parametrize(
    "command",
    ["layers", "figures", "allocate --sparsity 0.5", "score model --calibration", "demo --out"],
)
def test_names_that_are_too_long_are_one_line(
    run: Run, place: Path, command: str, name: str
) -> None:
    check(run(*command.split(), name), 2, "xx")


@pytest.mark.usefixtures("odd")
def test_tables_and_lines_show_names_spelled_out(run: Run) -> None:
    check(run("layers", ODD), 0)
    check(run("score", ODD, "--layer", 1, "--calibration", f"{BYTES}.txt", *DATA.split(),
              "--out", f"{ODD}-scores"), 0)  # fmt: skip
    check(run("evaluate", ODD, "--evaluation", f"{BYTES}.txt", *EVALUATED.split()), 0)
    check(run("figures", f"{ODD}-scores", "--out", f"{ODD}-figures"), 0)
    manifest = json.loads(Path(f"{ODD}-scores", "manifest.json").read_text())
    assert manifest["calibration"]["source"].startswith(BYTES)


@pytest.mark.usefixtures("odd")
def test_json_holds_names_as_they_are(run: Run) -> None:
    ran = run("evaluate", ODD, "--evaluation", f"{BYTES}.txt", *EVALUATED.split(), "--json")
    check(ran, 0, r"\u001b[31m\n[bold]")
    assert ran.out.isascii()
    assert json.dumps(BYTES)[1:-1] in json.dumps(json.loads(ran.out))


def test_layers_of_odd_names_are_drawn_and_shown(
    run: Run, place: Path, calibration: "CalibrationSet"
) -> None:
    from torch import nn

    from entangle.cli.figures import drawings_of, open_run
    from entangle.models.loading import as_language_model
    from entangle.modes.decompose import decompose
    from entangle.scoring.score import score
    from tests.tiny_models import TINY

    module = TINY["llama"]()
    mlp = module.get_submodule("model.layers.1.mlp")
    assert isinstance(mlp.down_proj, nn.Module)
    mlp.down_proj = nn.Sequential(OrderedDict({f"{ODD}/x": mlp.down_proj}))
    model = as_language_model(module)
    layers = [f"model.layers.1.mlp.down_proj.{ODD}/x", "model.layers.0.mlp.down_proj"]
    scores = score(model, calibration, layers=layers)
    named = scores.frame.assign(model=ODD)
    manifest = dict(scores.manifest) | {"model": {"name": ODD}}
    replace(scores, frame=named, manifest=manifest).save("scores")
    check(run("figures", "scores", "--out", "drawn"), 0, "Figure: drawn/")
    check(run("allocate", "scores", "--sparsity", 0.5, "--model", ODD), 2)

    made = decompose(
        model,
        calibration,
        layers=layers,
        neurons=[3],
        experts=1,
        token_pairs=0,
        contexts=0,
        separated=0,
    )
    made.save("made")
    names = [drawing.name for drawing in drawings_of(open_run("made"), {"column": "single"})]
    assert len(names) == len(set(names)) == 20
    assert not any("/" in name or any(map(is_unseen, name)) for name in names)
