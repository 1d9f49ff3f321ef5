"""Figures of the results that a tiny model's commands leave behind."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

from entangle.cli.figures import MAKERS, drawings_of, missing_lines, open_run
from entangle.results.drawings import FIGURES, text_of
from tests.cli.runs import Run, holds
from tests.saved import resealed

KINDS = (
    "scores", "ablation", "comparison", "decomposition", "allocation", "expansion", "difference",
    "study", "trace", "anchor",
)  # fmt: skip


def test_everything_is_drawn_and_the_rest_named_with_its_command(
    run: Run, made: Mapping[str, Path], tmp_path: Path
) -> None:
    done = run(
        "figures",
        *(made[kind] for kind in KINDS),
        "--out",
        tmp_path,
        "--format",
        "png",
        "--width",
        "single",
    )
    assert (done.status, done.err) == (0, "")
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert {path.stem for path in tmp_path.glob("*.csv")} == drawn
    names = {name for several in FIGURES.values() for name in several}
    skipped = {"ablation_accuracy", "density", "wd_by_layer", "routing"}
    assert names - drawn <= skipped | {"separated_pairs"}  # pairs that few tokens may lack
    assert (
        "ablation_accuracy: this ablation holds no accuracy; `entangle ablate --measure blimp`"
        in (done.out)
    )
    assert not list(tmp_path.glob("*.pdf"))


def test_each_figure_states_the_digest_of_its_manifest(made: Mapping[str, Path]) -> None:
    file = made["scores"] / "manifest.json"
    manifest = json.loads(file.read_text("utf-8"))
    digest = manifest.pop("digests")["manifest"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    assert open_run(str(made["scores"])).digest == digest


def test_vector_text_and_width(run: Run, made: Mapping[str, Path], tmp_path: Path) -> None:
    done = run(
        "figures", made["comparison"], "--out", tmp_path, "--width", "single", "--format", "pdf"
    )
    assert done.status == 0
    pdf = (tmp_path / "comparison.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType: font type 42
    assert b"/Type3" not in pdf
    assert b"/MediaBox [ 0 0 237.6 " in pdf  # 3.3 inches


def test_missing_results_are_named_with_the_command_that_makes_them(
    run: Run, made: Mapping[str, Path], tmp_path: Path
) -> None:
    done = run("figures", made["comparison"], "--out", tmp_path, "--format", "png")
    for kind in set(KINDS) - {"comparison"}:
        line = next(line for line in done.out.splitlines() if f"`{MAKERS[kind]}`" in line)
        assert all(name in line for name in FIGURES[kind])
    assert not list(missing_lines(set(KINDS)))


def test_results_of_one_kind_go_to_folders_of_their_own(
    run: Run, made: Mapping[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(made["comparison"], tmp_path / "other")
    runs = made["comparison"], tmp_path / "other"
    assert run("figures", *runs, "--out", tmp_path / "f", "--format", "png").status == 0
    assert sorted(str(p.relative_to(tmp_path / "f")) for p in tmp_path.glob("f/*/*.png")) == [
        "comparison/comparison.png",
        "other/comparison.png",
    ]
    same = run("figures", made["comparison"], made["comparison"], "--out", tmp_path / "g")
    assert same.status == 2
    assert holds(same.err, "two comparison 'comparison'"), same.err


def test_figures_are_replaced_only_by_force(
    run: Run, made: Mapping[str, Path], tmp_path: Path
) -> None:
    command = ("figures", made["comparison"], "--out", tmp_path, "--format", "png")
    assert run(*command).status == 0
    again = run(*command)
    assert again.status == 2
    assert holds(again.err, "comparison.png' exists --force"), again.err
    assert run(*command, "--force").status == 0


def test_a_layer_each_where_there_are_several(made: Mapping[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(made["decomposition"], folder)
    for file in folder.glob("*.parquet"):
        table = pd.read_parquet(file)
        pd.concat([table, table.assign(layer="other")]).to_parquet(file, index=False)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["settings"]["layers"].append("other")
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    resealed(folder)
    drawings = {
        one.name: one.draw for one in drawings_of(open_run(str(folder)), {"column": "single"})
    }
    assert list(drawings) == [
        f"{name}_{layer}"
        for layer in ("model.layers.1.mlp.gate_proj", "other")
        for name in FIGURES["decomposition"]
    ]
    (key,) = drawings["recovery_other"]().legends
    assert key.get_title().get_text().startswith("other, 90")


def test_a_result_that_lacks_something_is_drawn_as_far_as_it_goes(
    made: Mapping[str, Path], run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "scores"
    shutil.copytree(made["scores"], folder)
    frame = pd.read_parquet(folder / "scores.parquet")
    frame.assign(md=float("nan")).to_parquet(folder / "scores.parquet", index=False)
    resealed(folder)
    done = run("figures", folder, "--out", tmp_path / "f", "--format", "png")
    assert done.status == 0
    assert "Skipped: wd_against_md: `scores` must hold" in done.out
    assert "without --no-md" in done.out
    frame.assign(md=float("nan"), wd=float("nan")).to_parquet(
        folder / "scores.parquet", index=False
    )
    resealed(folder)
    nothing = run("figures", folder, "--out", tmp_path / "g", "--format", "png")
    assert nothing.status == 2
    assert "nothing" in nothing.err


def test_a_table_that_was_not_asked_for_is_named_with_its_option(
    made: Mapping[str, Path], run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "decomposition"
    shutil.copytree(made["decomposition"], folder)
    for name in ("pairs", "separated", "contexts", "router_map"):
        file = folder / f"{name}.parquet"
        pd.read_parquet(file).head(0).to_parquet(file, index=False)
    file = folder / "neurons.parquet"
    neurons = pd.read_parquet(file)
    neurons[neurons["experts"] == 1].to_parquet(file, index=False)
    resealed(folder)
    done = run("figures", folder, "--out", tmp_path / "f", "--format", "png")
    assert (done.status, done.err) == (0, "")
    said = {line.split(":")[1].strip(): line for line in done.out.splitlines() if "Skipped" in line}
    assert "holds no pairs of layer" in said["distances"]
    assert "`entangle decompose --pairs 2000` makes them." in said["distances"]
    assert "--separated 20" in said["separated_pairs"]
    assert "--contexts 8" in said["modes"]
    assert "--experts 1,4,16" in said["router_map"]
    for name in ("predictors", "disentanglement"):
        assert "2 experts or more; got 1; `entangle decompose --experts 1,4,16`" in said[name]


def test_a_figure_names_the_seed_of_its_run(made: Mapping[str, Path]) -> None:
    for kind, seed in (("decomposition", ", seed 0"), ("scores", ", seed 0"), ("allocation", "")):
        one = open_run(str(made[kind]))
        drawing = next(iter(drawings_of(one, {"column": "single"})))
        texts = [text.get_text() for text in drawing.draw().texts]
        assert f"run {one.digest[:12]}{seed}" in texts


def test_figures_say_what_was_measured_on() -> None:
    text = {"source": "wikitext2", "n_windows": 8, "seq_len": 512}
    pairs = {"source": "/data/blimp", "n_pairs": 1200, "paradigms": {"a": 600, "b": 600}}
    said = "wikitext2, 8 windows of 512 tokens"
    assert text_of({"evaluation": text}) == said
    assert text_of({"evaluation": {"text": text, "pairs": pairs}}) == said
    both = {"evaluation": {"text": text, "pairs": pairs}}
    assert text_of(both, pairs=True) == "blimp, 1,200 pairs of 2 paradigms"
    assert text_of({"evaluation": {"pairs": pairs}}) is None
    assert text_of({}) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no result"),
        ("{", "valid JSON"),
        ("[]", "'list'"),
        ("[" * 100_000, "cannot be read"),
        ('{"kind": "scores", "schema_version": 99}', "schema version 99"),
    ],
)
def test_what_is_no_result_is_one_line(
    run: Run, tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    done = run("figures", tmp_path, "--out", tmp_path / "f")
    assert (done.status, done.out) == (2, "")
    assert holds(done.err, said), done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "f").exists()


def test_a_manifest_that_is_a_pipe_is_not_waited_for(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    done = run("figures", tmp_path, "--out", tmp_path / "f")
    assert done.status == 2
    assert holds(done.err, "a pipe"), done.err


def test_results_of_an_unknown_kind_are_refused(
    run: Run, made: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "other", "schema_version": 1}')
    done = run("figures", made["comparison"], tmp_path, "--out", tmp_path / "f")
    assert done.status == 2
    assert holds(done.err, "kind of result"), done.err
    assert holds(done.err, "'other'"), done.err
    assert not (tmp_path / "f").exists()


def test_bad_options_are_refused_before_anything_is_read(run: Run, tmp_path: Path) -> None:
    assert "'svg'" in run("figures", tmp_path, "--format", "svg").err
    assert run("figures", tmp_path, "--width", "triple").status == 2
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"nothing")
    assert run("figures", file).status == 2


def test_figures_are_drawn_as_asked_for(run: Run, made: Mapping[str, Path], tmp_path: Path) -> None:
    done = run(
        "figures", made["scores"], "--out", tmp_path, "--format", "png", "--width", 5,
        "--height", 3, "--no-caption", "--palette", "top=#12ab34", "--label", "neurons per bin=N",
        "--only", "wd_distribution", "--only", "wd_against_md", "--title", "Mine",
    )  # fmt: skip
    assert (done.status, done.err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in ("wd_distribution", "wd_against_md")
        for ending in ("png", "csv")
    }  # fmt: skip
    picture = (tmp_path / "wd_distribution.png").read_bytes()
    assert (int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])) == (1500, 900)


def test_a_subset_of_layers_leaves_the_others_out(
    run: Run, made: Mapping[str, Path], tmp_path: Path
) -> None:
    layer = pd.read_parquet(made["scores"] / "scores.parquet")["layer"].iloc[-1]
    options = "--format", "png", "--subset", layer, "--out", tmp_path
    done = run("figures", made["scores"], made["comparison"], *options)
    assert (done.status, done.err) == (0, "")
    assert set(pd.read_csv(tmp_path / "wd_distribution.csv")["panel"]) == {layer}
    assert "Skipped: comparison: unknown subset" in done.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--palette", "tpo=red"), "'tpo' top"),
        (("--palette", "top=reddish"), "colour 'reddish'"),
        (("--palette", "Dark3"), "'Dark3' Dark2"),
        (("--label", "neurons per bn=N"), "neurons per bin"),
        (("--label", "N"), "--label NAME=VALUE"),
        (("--subset", "nobody"), "subset 'nobody'"),
        (("--order", "nobody"), "order 'nobody'"),
        (("--only", "wd_distributoin"), "figure 'wd_distributoin' wd_distribution"),
        (("--width", "triple"), "--width inches 'triple'"),
        (("--width", "800"), "width 60 inches"),
        (("--height", "0.1"), "height 1"),
    ],
)
def test_what_no_figure_knows_is_refused_and_nothing_written(
    run: Run, made: Mapping[str, Path], tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = run("figures", made["scores"], "--out", tmp_path / "f", "--format", "png", *options)
    assert done.status == 2
    assert holds(done.err, said), done.err
    assert not (tmp_path / "f").exists()
