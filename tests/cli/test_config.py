"""Options from a file: they count as written, those of the command line win."""

import argparse
import sys
from pathlib import Path

import pytest

from entangle.cli import config
from entangle.cli.main import _parsers, _written
from entangle.errors import InvalidInput
from entangle.runs.provenance import command_line, runs_as
from tests.cli.runs import Run, holds

SCORE = """
model: tiny            # an argument
layer: [0, "*.up_proj"]
n-seq: 4
seq_len: 32
no_md: true
quiet: off
join: '\\n'
"""


def written(text: str, *rest: str, command: str = "score") -> list[str]:
    Path("c.yaml").write_text(text)
    return _written([command, "--config", "c.yaml", *rest])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(arguments: list[str]) -> argparse.Namespace:
    return _parsers()[0].parse_args(arguments)


def test_a_file_by_hand() -> None:
    assert written(SCORE) == [
        "score", "tiny", "--layer=0,*.up_proj", "--n-seq=4", "--seq-len=32", "--join=\\n",
        "--no-md",
    ]  # fmt: skip


def test_the_command_line_wins_also_over_lists() -> None:
    found = parsed(written(SCORE, "other", "--layer", "2", "--n-seq=9", "--json"))
    assert (found.model, found.layer, found.n_seq, found.seq_len) == ("other", ["2"], 9, 32)
    assert (found.no_md, found.json, found.quiet) == (True, True, False)


def test_what_a_command_needs_may_come_from_the_file() -> None:
    text = "scores: some/where\nsparsity: 0.5\nexport: [csv:a.csv, csv:b.csv]\npattern: 2:4\n"
    found = parsed(written(text, command="allocate"))
    assert (found.scores, found.sparsity, found.pattern) == ("some/where", 0.5, "2:4")
    assert found.export == ["csv:a.csv", "csv:b.csv"]


@pytest.mark.parametrize(
    "flag", [["--config", "c.yaml"], ["--config=c.yaml"], ["--conf", "c.yaml"]]
)
def test_the_file_s_own_option_goes(flag: list[str]) -> None:
    Path("c.yaml").write_text("n_seq: 3\n")
    assert _written(["score", "m", *flag, "--top", "2"]) == [
        "score", "--n-seq=3", "m", "--top", "2",
    ]  # fmt: skip


def test_arguments_keep_their_order() -> None:
    parser = argparse.ArgumentParser()
    for name in ("first", "second"):
        parser.add_argument(name)
    parser.add_argument("--config")
    Path("c.yaml").write_text("second: b\nfirst: a\n")
    for given, expected in (([], ["a", "b"]), (["A"], ["A", "b"]), (["A", "B"], ["A", "B"])):
        found = config.with_file(_copy(parser), ["c", *given, "--config", "c.yaml"])
        assert [one for one in found[1:] if one] == expected


def _copy(_parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for name in ("first", "second"):
        parser.add_argument(name)
    parser.add_argument("--config")
    return parser


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_sequences: 3", "'n_sequences' n-seq"),
        ("fraction: 0.1", "entangle score 'fraction'"),
        ("config: other.yaml", "'config'"),
        ("n_seq: 3\nn-seq: 4", "line 2 'n-seq' once"),
        ("n_seq:\n", "line 1 'n_seq' value"),
        ("n_seq: {a: 1}", "line 1 'n_seq' list"),
        ("layer: [[1]]", "line 1 'layer'"),
        ("no_md: maybe", "line 1 'no_md' true false maybe"),
        ("no_md: [true, true]", "'no_md' true, true"),
        ("? [a]\n: 3", "line 1 key"),
        ("- n_seq", "'c.yaml' map"),
        ("", "'c.yaml' map"),
        ("n_seq: [3", "'c.yaml' YAML"),
        ("a: &a [*a]", "'a'"),
        ("!!python/object/apply:os.system ['x']", "'c.yaml' map"),
        ("n_seq: 3\x00", "'c.yaml'"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(run: Run, text: str, said: str) -> None:
    Path("c.yaml").write_text(text)
    status, out, err = run("score", "nowhere", "--config", "c.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert holds(err, said), err


@pytest.mark.parametrize("name", ["nowhere.yaml", ".", "binary.yaml"])
def test_what_is_no_file_of_text(run: Run, name: str) -> None:
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    status, out, err = run("score", "--config", name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert name in err


def test_values_are_checked_as_if_written(run: Run) -> None:
    Path("c.yaml").write_text("sampling: odd\n")
    ran = run("score", "--config", "c.yaml")
    assert ran.status == 2
    assert holds(ran.err, "--sampling 'odd'")
    Path("c.yaml").write_text("experts: 1\nrouter: random\nlayer: 1\n")
    ran = run("decompose", "--config", "c.yaml")
    assert ran.status == 2
    assert "--router has no meaning" in ran.err


def test_a_deep_file_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"c\.yaml"):
        written("[" * 5_000)


def test_the_manifest_names_the_effective_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/entangle", "score", "--config", "c.yaml"])
    assert command_line() == "entangle score --config c.yaml"
    with runs_as(written("n_seq: 3\njoin: ' '\n")):
        assert command_line() == "entangle score --n-seq=3 '--join= '"
