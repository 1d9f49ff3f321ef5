"""The rooms stand on floors: a room imports only rooms on floors below."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from entangle.results.drawings import FIGURES

PACKAGE = Path(__file__).parent.parent / "entangle"
FLOORS = (
    {
        "_renamed",
        "errors",
        "checks",
        "seeding",
        "precision",
        "memory",
        "ranks",
        "kernels",
        "doors",
    },
    {"runs"},
    {"stats", "pruning", "packed"},
    {"plotting"},
    {"results", "models"},
    {"texts"},
    {"recording"},
    {"evaluation", "scoring"},
    {"allocation", "activation"},
    {"experts", "mixtures"},
    {"experiments", "modes"},
    {"report", "explorer"},
    {"studies"},
    {"cli", "testing", "__main__"},
)
"""The order on the ground floor is kept by the test of circles."""
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
    assert {(a, b) for a, b in upward if not {a, b} <= FLOORS[0]} == {("__main__", "cli")}


def imported_files(file: Path) -> Iterator[Path]:
    """Yield the files of the package that a file imports when it is itself imported."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entangle"):
            home = PACKAGE.parent.joinpath(*str(node.module).split("."))
            parts = [home / alias.name for alias in node.names] + [home]
            found = [part.with_suffix(".py") for part in parts if part.with_suffix(".py").exists()]
            yield from found or [home / "__init__.py"]


def test_no_file_imports_itself_through_others() -> None:
    imports = {file: set(imported_files(file)) for file in PACKAGE.rglob("*.py")}
    while free := [file for file, others in imports.items() if not others & set(imports)]:
        for file in free:
            del imports[file]
    assert not imports


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import entangle; dir(entangle)", HEAVY),
        ("import entangle.plotting", {"torch", "transformers"}),
        (
            "import entangle; entangle.load_scores, entangle.load_ablation",
            {"torch", "transformers"},
        ),
        (
            "import entangle; entangle.load_comparison, entangle.load_decomposition",
            {"torch", "transformers"},
        ),
        ("import entangle.cli.main as m; m.build_parser().format_help()", HEAVY),
        ("import entangle.cli.main as m; m.main(['score', '--help'])", HEAVY),
    ],
)
def test_light_imports(code: str, absent: set[str]) -> None:
    check = f"import sys, atexit; atexit.register(lambda: print(*{absent} & set(sys.modules)))"
    command = [sys.executable, "-c", f"{check}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


KINDS = (
    "scores", "ablation", "comparison", "decomposition", "allocation", "expansion", "pruning",
    "difference", "study", "trace", "anchor",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_read_and_drawn_without_a_model(
    kind: str, made: Mapping[str, Path], tmp_path: Path
) -> None:
    run = str(made[kind])
    loading = f"import entangle; entangle.load_result({run!r})"
    drawing = ["figures", run, "--out", str(tmp_path), "--format", "png"]
    absent = "import sys; print('modules', *sys.modules)"
    for code in (loading, f"import entangle.cli.main as m; m.main({drawing})"):
        command = [sys.executable, "-c", f"{code}\n{absent}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        modules = done.stdout.splitlines()[-1].split()[1:]
        assert not {"torch", "transformers"} & set(modules)
        if kind == "ablation":
            assert sum(name.partition(".")[0] == "entangle" for name in modules) <= 68
    assert bool(list(tmp_path.glob("*.png"))) == (kind in FIGURES)


UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load"}
CALLS |= {"read_pickle", "to_pickle", "yaml.load"}


def unsafe(file: Path) -> Iterator[str]:
    """Yield what in a module could unpickle, or run code that it reads."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [*origin, *(alias.name for alias in node.names)]
            yield from UNPICKLERS & {part for name in names for part in name.split(".")}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS or called.endswith((".read_pickle", ".to_pickle")):
                yield called
            settings = {one.arg: ast.unparse(one.value) for one in node.keywords}
            if called in ("np.load", "np.save") and settings.get("allow_pickle") != "False":
                yield called
            for setting, safe in (("allow_pickle", "False"), ("trust_remote_code", "False")):
                if settings.get(setting, safe) != safe:
                    yield setting


def test_no_module_unpickles() -> None:
    found = {
        file.relative_to(PACKAGE).as_posix(): names
        for file in PACKAGE.rglob("*.py")
        if (names := set(unsafe(file)))
    }
    assert found == {"runs/reading.py": {"pickle"}}  # which closes it


def test_what_unpickles_is_found(tmp_path: Path) -> None:
    lines = [
        "import pickle", "from pickle import load", "import joblib.numpy_pickle", "torch.load(x)",
        "np.load(x)", "np.load(x, allow_pickle=True)", "pandas.read_pickle(x)", "eval(x)",
        "f(trust_remote_code=True)", "import os, dill",
    ]  # fmt: skip
    for line in lines:
        (tmp_path / "x.py").write_text(line)
        assert list(unsafe(tmp_path / "x.py")), line
    (tmp_path / "x.py").write_text("re.compile(x)\nnp.load(x, allow_pickle=False)\nmodel.eval()")
    assert list(unsafe(tmp_path / "x.py")) == []
