"""The rooms stand on floors: a room imports only rooms on floors below."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "entangle"
FLOORS = (
    {"errors", "jupyter"},
    {"checks", "reading"},
    {"claims"},
    {
        "seeding",
        "precision",
        "provenance",
        "memory",
        "progress",
        "html_tables",
        "kernels",
        "affixes",
    },
    {"unfinished"},
    {"stats", "pruning", "routing"},
    {"models", "calibration", "plotting"},
    {"recording"},
    {"evaluation", "scoring"},
    {"allocation"},
    {"expansion", "modes"},
    {"ablation"},
    {"analysis", "decomposition"},
    {"explorer", "cli"},
    {"__main__"},
)
SIBLINGS = {("routing", "stats"), ("calibration", "models")}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "transformers", "matplotlib", "datasets", "pandas", "scipy", "sklearn"}


def imported_rooms(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            modules = names if module == "entangle" else [module]
        yield from (name.split(".")[1] for name in modules if name.startswith("entangle."))


def test_a_room_imports_only_from_floors_below() -> None:
    imports = [
        (file.relative_to(PACKAGE).parts[0].removesuffix(".py"), other)
        for file in PACKAGE.rglob("*.py")
        for other in imported_rooms(file)
        if file != PACKAGE / "__init__.py" and other != "__version__"
    ]
    assert len(imports) > 100
    upward = {(a, b) for a, b in imports if a != b and FLOOR[b] >= FLOOR[a]}
    assert upward == SIBLINGS


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import entangle; dir(entangle)", HEAVY),
        ("import entangle.plotting", {"torch", "transformers"}),
        ("import entangle.cli.main as m; m.build_parser().format_help()", HEAVY),
        ("import entangle.cli.main as m; m.main(['score', '--help'])", HEAVY),
    ],
)
def test_light_imports(code: str, absent: set[str]) -> None:
    check = f"import sys, atexit; atexit.register(lambda: print(*{absent} & set(sys.modules)))"
    command = [sys.executable, "-c", f"{check}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
