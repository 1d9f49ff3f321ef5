"""Options that would change nothing are refused, by name, before anything is loaded."""

import argparse
from pathlib import Path

import pytest

from entangle.allocation.rules import RULES
from entangle.cli import meaning
from entangle.cli.main import build_parser, main
from entangle.runs.provenance import write_json
from tests.saved import resealed

ALLOCATE = "allocate nowhere --sparsity 0.5"
COMPARE = "compare --evaluation demo"
IGNORED = {
    "score --json --wide": "--wide --json",
    "score --json --table layers": "--table --json",
    "score --calibration ids.safetensors --join x": "--join token ids",
    "evaluate --evaluation ids.safetensors --join x": "--join token ids",
    "decompose --layer 1 --experts 1 --router random": "--router one expert",
    "ablate --select all --fraction 0.1": "--fraction",
    "ablate --select rows.csv --count 3": "--count",
    "ablate --select all --scope model": "--scope",
    "ablate --select random --by md": "--by top bottom",
    "ablate --select top,bottom --seeds 3": "--seeds random",
    "ablate --intervention zero,mean --strength 0.9": "--strength prunes",
    "ablate --intervention zero --experts 2": "--experts prunes",
    "ablate --router kmeans": "--router one expert",
    "ablate --intervention prune-wanda --damping 0.1": "--damping prune",
    "ablate --edit-strength 0.5": "--edit-strength",
    "ablate --measure blimp --evaluation-column x": "--evaluation-column perplexity",
    "ablate --measure blimp --eval-windows 3": "--eval-windows perplexity",
    "ablate --pairs pairs.jsonl": "--pairs blimp",
    "ablate --pairs-per-paradigm 3": "--pairs-per-paradigm blimp",
    "ablate --allocation a.safetensors --by md": "--by",
    "ablate --allocation a.safetensors --fraction 0.1": "--fraction",
    "ablate --allocation a.safetensors --seeds 3": "--seeds",
    f"{COMPARE} --methods wanda,sparsegpt --experts 4": "--experts expansion",
    "expand --experts 1 --router random": "--router one expert",
    "expand --pruner wanda --damping 0.1": "--damping sparsegpt",
    "expand --no-baseline": "--no-baseline --evaluation",
    f"{ALLOCATE} --rule uniform --by md": "--by",
    f"{ALLOCATE} --rule owl --by md": "--by",
    f"{ALLOCATE} --combine rank": "--combine --by",
    f"{ALLOCATE} --rule linear --calibration text.txt": "--calibration",
    f"{ALLOCATE} --rule linear --n-seq 3": "--n-seq",
    f"{ALLOCATE} --rule linear --seed 3": "--seed",
}
MEANT = (
    "ablate --select random-norm --by md --seeds 2 --count 3 --scope model",
    "ablate --experts 1,4 --router random --damping 0.1 --strength 0.9",
    "ablate --intervention prune,zero --edit-strength 0.5 --out x --force",
    "ablate --measure perplexity,blimp --pairs p.jsonl --evaluation t.txt",
    f"{COMPARE} --methods expansion-random --experts 4",
    "expand --router random --damping 0.1 --evaluation demo --no-baseline",
    f"{ALLOCATE} --rule uniform --by md --experts 4",
    f"{ALLOCATE} --rule owl --n-seq 3 --seed 1 --plot x --force",
    f"{ALLOCATE} --rule linear --across owl --calibration text.txt --by wd+md --combine rank",
    f"{ALLOCATE} --rule search --tune linear --seed 3 --by md",
)


@pytest.mark.parametrize("line", IGNORED)
def test_an_option_that_changes_nothing_is_refused(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no meaning" in said
    assert all(word in said for word in IGNORED[line].split()), said


@pytest.mark.parametrize("option", ["--plot /", "--plot ..", "--out /"])
def test_what_is_written_needs_a_name(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "manifest.json", {"kind": "scores", "schema_version": 1})
    resealed(tmp_path)
    assert main(["allocate", str(tmp_path), "--sparsity", "0.5", *option.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "name" in said
    assert f"got {option.split()[1]!r}" in said


@pytest.mark.parametrize("line", MEANT)
def test_options_with_a_meaning_are_taken(line: str) -> None:
    arguments = _parsed(line)
    meaning.check_meaning(arguments)
    assert arguments.given >= {word[2:].replace("-", "_") for word in line.split() if "--" in word}


def _parsed(line: str) -> argparse.Namespace:
    parser, argv = build_parser(), line.split()
    arguments = parser.parse_args(argv)
    commands = next(one.choices for one in parser._actions if isinstance(one.choices, dict))
    arguments.given = meaning.given_options(commands[argv[0]], argv[1:], arguments)
    return arguments


def test_defaults_are_not_given() -> None:
    line = "score demo --layer 1 --layer 2 --special-tokens=none --json"
    assert _parsed(line).given == {"model", "layer", "special_tokens", "json"}
    assert _parsed("score").given == set()


def test_the_rules_are_those_of_the_registry() -> None:
    assert {name for name, rule in RULES.items() if rule.calibrated} == set(meaning.CALIBRATED)
    assert {name for name, rule in RULES.items() if not rule.scored} == set(meaning.UNSCORED)
