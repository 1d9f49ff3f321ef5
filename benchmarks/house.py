"""The house in numbers: what there is to read, and how much of it one ablation walks through.

``python -m benchmarks.house [DIR ...]`` prints one column for each checkout of the package (here by
default; the former one first shows before and after): files, lines and docstrings of ``entangle/``
and lines of ``tests/``; the longest functions; floors of rooms that import one another; what one
ablation of a tiny model loads, calls and how deep its own frames are stacked; and what drawing its
saved folder loads. ``--stack`` prints the deepest stack as well.
"""

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

Functions = ast.FunctionDef | ast.AsyncFunctionDef

WALK = """
import json, os, sys, torch, entangle
from tests.tiny_models import TINY
from entangle.models.loading import as_language_model
package, out = os.path.dirname(entangle.__file__), sys.argv[1]
model = as_language_model(TINY["llama"]())
ids = torch.arange(8 * 24).reshape(8, 24) % 100 + 4
text = entangle.load_evaluation(torch.arange(5 * 12).reshape(5, 12) % 90 + 5)
stack, deepest, called = [], [], set()

def watch(frame, event, _):
    code = frame.f_code
    if not code.co_filename.startswith(package) or code.co_name == "<module>":
        return
    if event == "call":
        called.add((code.co_filename, code.co_firstlineno, code.co_qualname))
        stack.append(f"{os.path.relpath(code.co_filename, package)}: {code.co_qualname}")
        if len(stack) > len(deepest):
            deepest[:] = stack
    elif event == "return" and stack:
        stack.pop()

def run(folder):
    return entangle.ablate(
        model, ids, evaluation=text, layers="all", proj="mlp", seeds=2, fraction=0.1,
        selections=("top", "bottom", "random"), interventions=("prune", "zero"),
        strengths=(0.5, 0.9), experts=(1, 2), measures=("perplexity", "divergence"),
        match=True, memory=2**28, progress=False, out=folder)

run(out + "-warm")
sys.setprofile(watch)
run(out)
sys.setprofile(None)
files = [n for n in sys.modules if n.split(".")[0] == "entangle"]
named = {one for one in called if "<" not in one[2].rpartition(".")[2]}
print(json.dumps({"files": len(files), "functions": len(named), "depth": len(deepest),
                  "stack": deepest}))
"""
DRAW = """
import json, sys
from entangle.cli.main import main
main(["figures", sys.argv[1], "--out", sys.argv[1] + "-figures", "--format", "png"])
files = [n for n in sys.modules if n.split(".")[0] == "entangle"]
heavy = [n for n in ("torch", "transformers") if n in sys.modules]
print(json.dumps({"files": len(files), "heavy": heavy}))
"""


def documented(tree: ast.AST) -> int:
    """Return the lines of docstrings, those of attributes too."""
    strings = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    return sum(
        (s.end_lineno or s.lineno) - s.lineno + 1 for s in strings if isinstance(s.value, str)
    )


def read(package: Path) -> dict[str, object]:
    """Return what can be counted in the files of a package."""
    sources = {file: file.read_text("utf-8") for file in sorted(package.rglob("*.py"))}
    trees = {file: ast.parse(text) for file, text in sources.items()}
    lines = {file: len(text.splitlines()) for file, text in sources.items()}
    long = [
        (node.end_lineno or node.lineno) - node.lineno + 1 - documented(node)
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, Functions)
    ]
    total = sum(lines.values())
    return {
        "files": len(lines),
        "lines": total,
        "lines of the median file": int(statistics.median(lines.values())),
        "lines of the longest file": max(lines.values()),
        "docstrings, % of lines": round(100 * sum(map(documented, trees.values())) / total, 1),
        "functions": len(long),
        "lines of the median function": int(statistics.median(long)),
        "lines of the longest function": max(long),
        "rooms": len({room(file, package) for file in lines}),
        "floors": floors(trees, package),
    }


def room(file: Path, package: Path) -> str:
    """Return the folder of a file in the package, or the file's own name if it is in none."""
    return file.relative_to(package).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the rooms of the package that a file imports."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            home = node.module or ""
            names = [f"{home}.{one.name}" for one in node.names] if home == "entangle" else [home]
        yield from (name.split(".")[1] for name in names if name.startswith("entangle."))


def floors(trees: Mapping[Path, ast.AST], package: Path) -> int:
    """Return the length of the longest chain of rooms, each importing the next."""
    below: dict[str, set[str]] = {}
    for file, tree in trees.items():
        if file != package / "__init__.py":
            own = room(file, package)
            below.setdefault(own, set()).update(set(imported(tree)) - {own, "__version__"})
    known: dict[str, int] = {}

    def height(one: str, above: tuple[str, ...] = ()) -> int:
        if one not in known:
            others = (other for other in below.get(one, ()) if other not in (*above, one))
            known[one] = 1 + max((height(other, (*above, one)) for other in others), default=0)
        return known[one]

    return max(map(height, below))


def walked(checkout: Path, folder: Path) -> tuple[dict[str, object], list[str]]:
    """Run one ablation and draw it; return the counts, and the deepest stack."""
    found = []
    for code in (WALK, DRAW):
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / "run")],
            cwd=checkout, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    ran, drawn = found
    return {
        "ablate: files loaded": ran["files"],
        "ablate: functions called": ran["functions"],
        "ablate: depth of our frames": ran["depth"],
        "figures: files loaded": drawn["files"],
        "figures: heavy imports": " ".join(drawn["heavy"]) or "none",
    }, ran["stack"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()])
    parser.add_argument("--stack", action="store_true", help="print the deepest stack too")
    arguments = parser.parse_args()
    columns, stacks = [], []
    for checkout in (one.resolve() for one in arguments.checkouts):
        tests = (checkout / "tests").rglob("*.py")
        counts = read(checkout / "entangle")
        counts["lines of tests"] = sum(len(one.read_text("utf-8").splitlines()) for one in tests)
        with tempfile.TemporaryDirectory() as folder:
            walk, stack = walked(checkout, Path(folder))
        columns.append(counts | walk)
        stacks.append(stack)
    for name in columns[0]:
        print(f"{name:32}", *(f"{column[name]!s:>20}" for column in columns))
    for stack in stacks if arguments.stack else ():
        print("", *(f"{depth:3} {one}" for depth, one in enumerate(stack, 1)), sep="\n")


if __name__ == "__main__":
    main()
