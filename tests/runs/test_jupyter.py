import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from entangle.runs.progress import in_browser, in_kernel


def pretend(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def kernel(header: dict[str, str]) -> SimpleNamespace:
    parent = {"header": header} if header else {}
    return SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda _channel: parent))


@pytest.mark.parametrize("shell", [None, SimpleNamespace(), SimpleNamespace(kernel=None)])
def test_no_kernel(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    pretend(monkeypatch, shell)
    assert not in_kernel()
    assert not in_browser()


def test_without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_kernel()
    assert "IPython" not in sys.modules


@pytest.mark.parametrize(
    ("header", "clicked"),
    [
        ({"msg_id": "1f2c9b70-6f5f-4c0a-8d4e-3f6f0e1a2b3c"}, True),  # JupyterLab
        ({"msg_id": "0a1b2c3d4e5f"}, True),
        ({"msg_id": "9d2e1c5b-0c1f6a2b3c4d5e6f7a8b_31337_12"}, False),  # jupyter_client
        ({}, True),
    ],
)
def test_pages_and_python_clients(
    monkeypatch: pytest.MonkeyPatch, header: dict[str, str], clicked: bool
) -> None:
    pretend(monkeypatch, kernel(header))
    assert in_kernel()
    assert in_browser() is clicked


def test_a_notebook_run_by_nbclient_cannot_be_clicked() -> None:
    code = "from entangle.runs.progress import in_browser, in_kernel\nin_kernel(), in_browser()"
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    executed = NotebookClient(document, timeout=120, kernel_name="python3").execute()
    assert executed.cells[0].outputs[0].data["text/plain"] == "(True, False)"
