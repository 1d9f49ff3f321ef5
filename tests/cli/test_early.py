"""What is told before torch is imported, and that it is the same as what is told after."""

import subprocess
import sys
from pathlib import Path

import pytest

from entangle.allocation.rules import RULES
from entangle.cli import main
from entangle.cli.ablate import MEASURES
from entangle.cli.main import build_parser
from entangle.experiments.arms import INTERVENTIONS, ROUTERS, SELECTIONS
from entangle.experiments.compare import known_methods
from entangle.experiments.selection import ALIKE

HEAVY = {"torch", "transformers", "pandas", "datasets", "scipy", "sklearn", "matplotlib"}
WRONG = [
    ["score", "./nowhere"],
    ["score", "empty"],
    ["score", "a/b/c"],
    ["score", "what is this"],
    ["score", "demo", "--dtype", "int3"],
    ["score", "demo", "--device", "abacus"],
    ["score", "demo", "--revision", "v1"],
    ["score", "demo", "--calibration", "nowhere.txt"],
    ["score", "demo", "--n-seq", "0"],
    ["score", "demo", "--seq-len", "-3"],
    ["score", "demo", "--memory", "1K"],
    ["ablate", "--memory", "1K"],
    ["compare", "--evaluation", "demo", "--memory", "1K"],
    ["expand", "--out", "x", "--memory", "1K"],
    ["score", "demo", "--join", "\\q"],
    ["score", "demo", "--batch-size", "0"],
    ["evaluate", "demo", "--evaluation", "./nowhere"],
    ["evaluate", "demo", "--eval-windows", "0"],
    ["ablate", "--intervention", "prun"],
    ["ablate", "--fraction", "0"],
    ["ablate", "--experts", "0"],
    ["ablate", "--router", "x"],
    ["ablate", "--scores", "nowhere"],
    ["ablate", "--strength", "1.5"],
    ["ablate", "--edit-strength", "-1"],
    ["ablate", "--select", "tops"],
    ["ablate", "--by", "wdd"],
    ["ablate", "--measure", "ppl"],
    ["ablate", "--allocation", "nowhere.safetensors"],
    ["ablate", "--out", "full"],
    ["compare", "--evaluation", "demo", "--sparsity", "7"],
    ["expand", "--out", "x", "--sparsity", "2.5"],
    ["expand", "--sparsity", "0.5", "--out", "full"],
    ["compare", "--evaluation", "demo", "--methods", "wand"],
    ["compare", "--evaluation", "nowhere.txt"],
    ["expand", "--out", "x", "--evaluation", "nowhere.jsonl"],
    ["decompose", "nowhere.gguf", "--layer", "1"],
    ["allocate", "nowhere", "--sparsity", "0.5"],
    ["figures", "nowhere"],
    ["report", "nowhere"],
    ["layers", "nowhere.gguf"],
]


def test_mistakes_are_told_in_one_line_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "manifest.json").write_text("{}")
    code = f"""
import sys
from entangle.cli.main import main
for arguments in {WRONG!r}:
    status = main(arguments)
    print(status, *sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == ["2"] * len(WRONG)
    lines = done.stderr.splitlines()
    assert len(lines) == len(WRONG)
    for line, arguments in zip(lines, WRONG, strict=True):
        assert line.startswith("entangle: error: ")
        value = arguments[-3] if arguments[-2] == "--layer" else arguments[-1]
        assert value in line or arguments[1] in line or "1024" in line, line


def test_the_names_are_those_that_exist() -> None:
    assert main.NAMES["intervention"][1] == INTERVENTIONS
    assert set(main.NAMES["methods"][1]) == set(known_methods())
    assert main.NAMES["router"][1] == ROUTERS
    assert main.NAMES["measure"][1] == tuple(MEASURES)
    assert set(main.SELECTIONS) == {*SELECTIONS, *ALIKE, "all"}
    assert set(main.NAMES["rule"][1]) == {*RULES, "search"}


@pytest.mark.parametrize(
    "command",
    [
        "score",
        "score demo --calibration demo",
        "evaluate --eval-seq-len 2",
        "ablate --select top,random --experts 1,16 --router kmeans,random",
        "compare --evaluation demo",
        "expand --out x --bits 4",
        "decompose --layer 1",
        "layers",
        "demo",
    ],
)
def test_what_is_right_passes(command: str) -> None:
    main.check_arguments(build_parser().parse_args(command.split()))
