"""The notebooks run from top to bottom, and are stored without what they print."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent.parent / "notebooks"
NAMES = [
    "01_explore_a_layer",
    "02_ablate",
    "03_expand_and_decompose",
    "04_allocate",
    "05_the_papers_figures",
]
SIZE = "ENTANGLE_NOTEBOOK_SIZE"


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def test_all_notebooks_are_known() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_output_is_stored(name: str) -> None:
    nbformat.validate(read(name))
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 100_000
    for cell in code_cells(name):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_one_variable_makes_it_small(name: str) -> None:
    first, *others = code_cells(name)
    assert f'os.environ.get("{SIZE}", "full") == "small"' in first.source
    assert all("environ" not in cell.source for cell in others)


@pytest.mark.parametrize("name", NAMES)
def test_only_public_names_are_used(name: str) -> None:
    tree = ast.parse("\n".join(cell.source for cell in code_cells(name)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("entangle"):
            assert node.module.count(".") <= 2
            assert not any(alias.name.startswith("_") for alias in node.names)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """Return a kernel whose modules are loaded once; every notebook finds it without names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SIZE, "small")
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.demo
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_small_settings(name: str, tmp_path: Path, kernel: KernelManager) -> None:
    book = read(name)
    book.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}"))
    client = NotebookClient(book, km=kernel, timeout=600)
    try:
        client.execute()
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
    for cell in book.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.get("text")
