"""``entangle show``: results of every kind, unfinished work, folders of several, and odd ones."""

import json
import os
import shutil
from pathlib import Path

import pytest

from entangle.runs.claims import beside, claim
from entangle.runs.unfinished import PLAN
from tests.cli.runs import Run, holds

KINDS = (
    "scores", "ablation", "comparison", "decomposition", "expansion", "pruning", "allocation",
    "anchor",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_of_every_kind(run: Run, made: dict[str, Path], kind: str) -> None:
    status, out, err = run("show", made[kind])
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{made[kind]}: {kind}"
    facts = {line.split()[0]: line for line in lines[1 : lines.index("")]}
    assert facts["state"].endswith("finished")
    assert "llama" in facts["model"]
    assert "torch" in facts["versions"]
    assert any(line.startswith("Next: entangle ") and str(made[kind]) in line for line in lines)
    content = json.loads(run("show", made[kind], "--json").out)
    assert content["kind"] == kind
    assert content["head"]
    sizes = {one["file"]: one["bytes"] for one in content["files"]}
    if made[kind].is_dir():
        assert sizes["manifest.json"] == (made[kind] / "manifest.json").stat().st_size


def test_every_kind_of_result_has_a_next_step() -> None:
    from entangle.cli.show import NEXT
    from entangle.results import CLASSES

    assert set(NEXT) == set(CLASSES) == {*KINDS, "difference", "study", "trace"}


def test_a_folder_of_several(run: Run, made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    (tmp_path / "loop").symlink_to(tmp_path)
    shutil.copytree(made["scores"], tmp_path / "below" / "odd\x1b[31m<b>")
    shutil.copy(made["allocation"], tmp_path / "a.safetensors")
    plan = beside(tmp_path / "half", "comparing")
    plan.mkdir()
    (plan / PLAN).write_text(json.dumps({"model": {"name": "m"}}))
    status, out, err = run("show", tmp_path)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    rows = {one["run"]: one for one in json.loads(run("show", tmp_path, "--json").out)["results"]}
    assert {name: one["kind"] for name, one in rows.items()} == {
        "a.safetensors": "allocation",
        "broken": "damaged",
        "half": "comparing (unfinished)",
        "below/odd\x1b[31m<b>": "scores",
    }
    assert rows["half"]["model"] == "m"
    assert run("show", tmp_path, "--csv").out.count("\n") == 5


def test_unfinished_work_by_the_result_s_name(run: Run, tmp_path: Path) -> None:
    plan = beside(tmp_path / "half", "ablating")
    plan.mkdir()
    (plan / PLAN).write_text(json.dumps({"model": {"name": "m"}, "settings": {}}))
    (plan / "arm-1.safetensors").touch()
    with claim(tmp_path / "half"):
        status, out, err = run("show", tmp_path / "half")
    assert (status, err) == (0, "")
    assert holds(" ".join(out.split()), "unfinished process 1 --resume"), out
    assert f"process {os.getpid()}" in out
    (plan / PLAN).write_text("{")
    assert run("show", tmp_path / "half").status == 0


def test_results_inside_a_result(run: Run, made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["scores"], tmp_path / "demo")
    shutil.copytree(made["ablation"], tmp_path / "demo" / "ablation")
    out = run("show", tmp_path / "demo").out
    assert holds(" ".join(out.split()), "also ablation (ablation)")


@pytest.mark.parametrize("what", ["table", "manifest", "missing", "kind"])
def test_a_damaged_result_is_shown_as_far_as_it_can_be(
    run: Run, made: dict[str, Path], tmp_path: Path, what: str
) -> None:
    place = tmp_path / "run"
    shutil.copytree(made["scores"], place)
    manifest = json.loads((place / "manifest.json").read_text())
    if what == "table":
        (place / "scores.parquet").write_bytes(b"PAR1")
    elif what == "missing":
        (place / "layers.parquet").unlink()
    elif what == "manifest":
        manifest["model"]["name"] = "another"
        (place / "manifest.json").write_text(json.dumps(manifest))
    else:
        (place / "manifest.json").write_text(json.dumps({"kind": ["x"], "model": 3}))
    status, out, err = run("show", place)
    assert status == 0
    assert "manifest.json" in out
    assert "Traceback" not in err
    told = {"table": "damaged: scores.parquet", "missing": "damaged: layers.parquet",
            "manifest": "altered", "kind": "['x']"}  # fmt: skip
    assert holds(" ".join(out.split()), told[what]), out


@pytest.mark.parametrize("path", ["nowhere", "empty", "file.txt"])
def test_what_is_no_result(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    status, out, err = run("show", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"'{path}'" in err


@pytest.mark.parametrize("path", [".", "..", "a/.."])
def test_the_folder_one_stands_in(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    here = tmp_path / "b"
    (here / "a").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(here)
    status, out, err = run("show", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"'{path}'" in err
    plan = beside(Path(path), "comparing")
    place = tmp_path if path == ".." else here
    assert plan.resolve() == place.parent / f".{place.name}.comparing"


def test_evaluations(run: Run, text_file: Path, tmp_path: Path) -> None:
    import pandas as pd

    from entangle.runs.provenance import make_manifest, output_folder, write_json

    with output_folder(tmp_path / "e") as folder:
        model = {"name": "m", "dtype": "float32", "digest": "abc"}
        text = {"source": "t", "n_windows": 3, "seq_len": 4}
        made = make_manifest("evaluation", models={"dense": model}, evaluation=text)
        write_json(folder / "manifest.json", made)
        pd.DataFrame({"model": ["dense"], "perplexity": [3.5]}).to_parquet(
            folder / "perplexity.parquet"
        )
    out = run("show", tmp_path / "e").out
    assert holds(" ".join(out.split()), "evaluation m float32 abc t, 3 × 4 perplexity 3.5"), out
