"""pyproject.toml, environment.yml and constraints.txt speak of the same packages."""

import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch"}


def bounds(requirements: list[str]) -> dict[str, str]:
    """Return the lower bound of each requirement, all of which have one and nothing else."""
    matches = [re.fullmatch(r"([a-z0-9_-]+)>=([0-9.]+)", one) for one in requirements]
    assert None not in matches, requirements
    return {match[1]: match[2] for match in matches if match}


def pins() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def test_the_conda_environment_has_the_same_bounds() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    conda = [one for one in environment["dependencies"] if isinstance(one, str)]
    pip = [one["pip"] for one in environment["dependencies"] if isinstance(one, dict)]
    extras = PROJECT["optional-dependencies"]
    expected = bounds(PROJECT["dependencies"] + extras["notebook"] + extras["demo"])
    expected = {CONDA_NAMES.get(name, name): bound for name, bound in expected.items()}
    expected["python"] = PROJECT["requires-python"].removeprefix(">=")
    assert bounds(conda) == expected
    assert pip == [["--editable ."]]
    assert environment["name"] == "entangle"


def test_every_dependency_is_pinned_within_its_bound() -> None:
    pinned = {normal(name): version for name, version in pins().items()}
    extras = [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    wanted = bounds(PROJECT["dependencies"] + extras)
    del wanted["pip"]  # installs the others, in whatever version it is
    for name, bound in wanted.items():
        assert release(pinned[normal(name)]) >= release(bound), name


def test_constraints_name_each_package_once_and_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    names = [normal(line.split("==")[0]) for line in lines if not line.startswith("#")]
    assert len(names) == len(set(names)) > 50
    assert all(re.fullmatch(r"[0-9][0-9a-z.+]*", version) for version in pins().values())


def test_the_command_is_installed() -> None:
    found = entry_points(group="console_scripts", name="entangle")
    (command,) = (one for one in found if one.dist and one.dist.name == PROJECT["name"])
    assert command.value == PROJECT["scripts"]["entangle"] == "entangle.cli.main:main"
    assert callable(command.load())


def test_nothing_is_installed_by_a_name_that_is_another_projects() -> None:
    asked = re.compile(r"pip install (?:-U |--upgrade )?[\"'`]*entangle\b")
    texts = [*(ROOT / "entangle").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert [str(path) for path in texts if asked.search(path.read_text("utf-8"))] == []


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (cited["cff-version"], cited["version"]) == ("1.2.0", PROJECT["version"])
    assert cited["license"] == PROJECT["license"]
    paper = cited["preferred-citation"]
    assert cited["references"] == [paper]
    assert paper["url"] == PROJECT["urls"]["Paper"] == "https://arxiv.org/abs/2405.15756"
    assert [one["family-names"] for one in paper["authors"]] == [
        "Sawmya", "Kong", "Markov", "Alistarh", "Shavit"
    ]  # fmt: skip
