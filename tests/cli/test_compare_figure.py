"""What `entangle compare --out` draws and writes beside its first table."""

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from entangle import plotting
from entangle.errors import Unavailable
from entangle.experiments.compare import at_equal_nonzeros, load_comparison
from tests.cli.runs import Run, holds


@pytest.fixture
def command(tiny_folder: Callable[[str], Path], text_file: Path) -> Sequence[object]:
    """Arguments that compare SparseGPT and an expansion of a tiny model, quietly."""
    return (
        "compare", tiny_folder("llama"), "--calibration", text_file, "--n-seq", 4, "--seq-len", 32,
        "--evaluation", text_file, "--eval-seq-len", 32, "--eval-windows", 3, "--device", "cpu",
        "--methods", "sparsegpt,expansion", "--sparsity", "0.5,0.8", "--experts", "1,2,2",
        "--quiet",
    )  # fmt: skip


def test_the_folder_holds_the_figure_and_both_tables(
    run: Run, command: Sequence[object], text_file: Path, tmp_path: Path
) -> None:
    done = run(*command, "--out", tmp_path / "c")
    assert (done.status, done.err) == (0, "")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "c/comparison.parquet", "c/equal_nonzeros.parquet", "c/figures/perplexity.csv",
        "c/figures/perplexity.pdf", "c/figures/perplexity.png", "c/figures/perplexity.tex",
        "c/figures/perplexity.txt", "c/manifest.json",
        "c/seconds.parquet", "c/windows.parquet",
    ]  # fmt: skip
    frame = load_comparison(tmp_path / "c").frame
    assert frame["experts"].tolist() == [1, 1, 2, 1, 2]
    equal = pd.read_parquet(tmp_path / "c" / "equal_nonzeros.parquet")
    pd.testing.assert_frame_equal(equal, at_equal_nonzeros(frame), check_dtype=False)
    drawn = pd.read_csv(tmp_path / "c" / "figures" / "perplexity.csv")
    rows = drawn[drawn["series"] == "expansion, k = 2"]
    shown = rows[rows["panel"] == "sparsity"]["perplexity"].tolist()
    assert shown == pytest.approx(frame.loc[frame["experts"] == 2, "perplexity"].tolist())


def test_the_second_table_is_printed_where_there_is_an_expansion(
    run: Run, command: Sequence[object]
) -> None:
    printed = run(*command).out
    first, second = printed.split("At equal stored non-zeros")
    assert "competitor" not in first
    assert [line.split()[0] for line in second.splitlines() if "expansion" in line] == [
        "expansion",
        "expansion",
    ]
    without_experts = [one for one in command if one not in ("--experts", "1,2,2")]
    plain = run(*without_experts, "--methods", "magnitude")
    assert plain.status == 0
    assert "At equal stored non-zeros" not in plain.out


def test_json_holds_both_tables(run: Run, command: Sequence[object]) -> None:
    content = json.loads(run(*command, "--json").out)
    assert [row["method"] for row in content["equal_nonzeros"]] == ["expansion", "expansion"]
    assert len(content["results"]) == 5


def test_a_figure_that_cannot_be_written_is_drawn_by_resume(
    run: Run, command: Sequence[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise Unavailable("the figure cannot be written: the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr("entangle.plotting.save_figure", full)
        done = run(*command, "--out", tmp_path / "c")
    assert done.status == 2
    assert holds(done.err, "disk full"), done.err
    assert [path.name for path in tmp_path.iterdir()] == [".c.comparing"]
    assert run(*command, "--out", tmp_path / "c", "--resume").status == 0
    assert len(list((tmp_path / "c" / "figures").iterdir())) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_result_that_was_made_without_its_figure_gets_one(
    run: Run, command: Sequence[object], tmp_path: Path
) -> None:
    assert run(*command, "--out", tmp_path / "c").status == 0
    shutil.rmtree(tmp_path / "c" / "figures")
    assert run(*command, "--out", tmp_path / "c", "--resume").status == 0
    assert len(list((tmp_path / "c" / "figures").iterdir())) == 5


def test_a_disk_that_refuses_the_tables_keeps_the_arms(
    run: Run, command: Sequence[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        done = run(*command, "--out", tmp_path / "c")
    assert done.status == 2
    assert holds(done.err, "disk full"), done.err
    assert [path.name for path in tmp_path.iterdir()] == [".c.comparing"]
    assert run(*command, "--out", tmp_path / "c", "--resume").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_tables_are_kept_where_nothing_can_be_drawn(
    run: Run, command: Sequence[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plotting.figure_comparison

    def hopeless(frame: pd.DataFrame, **settings: str) -> Figure:
        worse = frame["method"] != "dense"
        return whole(frame.assign(ratio=frame["ratio"].mask(worse, float("inf"))), **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(plotting, "figure_comparison", hopeless)
    done = run(*command, "--out", tmp_path / "c")
    assert done.status == 0
    assert holds(done.err, "no figure `comparison` 2"), done.err
    assert done.err.count("no figure") == 1
    assert len(load_comparison(tmp_path / "c").frame) == 5
    assert not (tmp_path / "c" / "figures").exists()
