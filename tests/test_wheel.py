"""The built wheel: what is in it, the same bytes every time, and that it installs and runs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest

from tests.test_packaging import PROJECT, ROOT
from tests.tiny_models import save_tiny

EPOCH = "1750000000"
BUILT = ("entangle", "LICENSE", "README.md", "pyproject.toml", ".gitignore", "CITATION.cff")
IGNORED = shutil.ignore_patterns("__pycache__", ".*_cache")


def build(source: Path, to: Path, *targets: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(to)]
    kinds = [word for target in targets for word in ("-t", target)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": EPOCH}
    subprocess.run([*command, *kinds], cwd=source, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Copy what is built, with the time of the copy on every file."""

    def copy(name: str) -> Path:
        to = tmp_path_factory.mktemp(name)
        for one in BUILT:
            if (ROOT / one).is_dir():
                shutil.copytree(ROOT / one, to / one, ignore=IGNORED, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(ROOT / one, to / one)
        return to

    return copy


@pytest.fixture(scope="session")
def dist(copied: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the source distribution."""
    to = tmp_path_factory.mktemp("dist")
    build(copied("source"), to, "wheel", "sdist")
    return to


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    """Return the wheel."""
    (found,) = dist.glob("*.whl")
    return found


def test_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    source = ROOT / "entangle"
    files = {
        path.relative_to(ROOT).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        packed = {name: archive.read(name) for name in files & names}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == files
    assert all(content == (ROOT / name).read_bytes() for name, content in packed.items())
    kinds = {Path(name).suffix for name in files}
    assert {".py", ".typed", ".cu", ".cuh", ".css"} <= kinds
    assert "entangle/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        read = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        said = Parser().parsestr(archive.read(read["METADATA"]).decode())
        command = archive.read(read["entry_points.txt"]).decode()
    assert said["Name"] == PROJECT["name"] == "neuron-entanglement"
    assert said["Version"] == PROJECT["version"]
    assert set(said.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert {"demo", "docs", "gpu", "harness", "notebook"} <= set(PROJECT["optional-dependencies"])
    assert "entangle = entangle.cli.main:main" in command


def test_two_builds_are_the_same_bytes(
    dist: Path, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    source = copied("again")
    for path in source.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    build(source, tmp_path, "wheel", "sdist")
    built = {path.name: path.read_bytes() for path in dist.iterdir()}
    assert len(built) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == built


def test_a_wheel_of_the_source_distribution_is_the_same(dist: Path, tmp_path: Path) -> None:
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    build(unpacked, tmp_path, "wheel")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.read_bytes() == (dist / wheel.name).read_bytes()


LOOK = """
import entangle, importlib.resources as files, sys
from entangle.kernels.dispatch import source_text
from entangle.runs.provenance import package_versions
print(entangle.__file__, entangle.__version__, package_versions()["entangle"])
assert "__global__" in source_text("sketch") and "#include" not in source_text("sparse")
assert files.files("entangle.explorer").joinpath("style.css").read_text()
"""


def test_is_found_where_pip_has_put_it(wheel: Path, tmp_path: Path) -> None:
    to = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--target", str(to), str(wheel)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(to)}
    for start in ([sys.executable, "-m", "entangle"], [str(to / "bin" / "entangle")]):
        done = subprocess.run(
            [*start, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        assert done.stdout == f"entangle {PROJECT['version']}\n"
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, version, written = done.stdout.split()
    assert Path(file).is_relative_to(to)
    assert version == written == PROJECT["version"]


@pytest.mark.slow
def test_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    model, text = save_tiny("llama", tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over 13 lazy dogs. " * 60)
    python, pins = tmp_path / "venv" / "bin" / "python", str(ROOT / "constraints.txt")
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", pins]
    score = [
        str(python.with_name("entangle")), "score", str(model), "--layer", "1",
        "--calibration", str(text), "--n-seq", "4", "--seq-len", "32", "--out", "scores",
    ]  # fmt: skip
    environment = {name: one for name, one in os.environ.items() if name != "PYTHONPATH"}
    for command in (
        [sys.executable, "-m", "venv", str(tmp_path / "venv")],
        [*install, "torch"],  # alone, as the Makefile does
        [*install, str(wheel)],
        [str(python), "-m", "pip", "check"],
        score,
        [str(python.with_name("entangle")), "figures", "scores", "--out", "drawn"],
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "scores" / "manifest.json").is_file()
    assert list((tmp_path / "drawn").glob("*.pdf"))
