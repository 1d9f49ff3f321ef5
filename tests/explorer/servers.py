"""A private Jupyter server with one of its front ends, and a page of headless Chromium."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat

if TYPE_CHECKING:
    from playwright.sync_api import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = {
    "@jupyterlab/apputils-extension:notification": {
        "checkForUpdates": False,
        "doNotDisturbMode": True,
        "fetchNews": "false",
    },
}
_START_SECONDS = 60.0


@dataclass(frozen=True)
class FrontEnd:
    """What shows a notebook: how it is started, and what its page is made of (CSS selectors)."""

    module: str
    """Run as ``python -m``."""
    place: str
    """Path of the page of a notebook, before the notebook's name."""
    ready: str
    """There when the page can take a click."""
    prompt: str
    """The brackets beside a cell."""
    editor: str
    """Where a cell's code is typed."""


_LAB_CELL = ".jp-CodeCell .jp-InputArea-prompt", ".jp-CodeCell .cm-content"
FRONT_ENDS = {
    "lab": FrontEnd(
        "jupyterlab", "doc/tree/", ".jp-Notebook-ExecutionIndicator[data-status=idle]", *_LAB_CELL
    ),
    "notebook": FrontEnd("notebook", "notebooks/", ".jp-CodeCell .cm-content", *_LAB_CELL),
    "nbclassic": FrontEnd(
        "nbclassic",
        "nbclassic/notebooks/" if find_spec("notebook") else "notebooks/",  # beside notebook 7
        "#kernel_indicator_icon.kernel_idle_icon",
        ".code_cell .input_prompt",
        ".code_cell .CodeMirror",
    ),
}


def find_browser() -> str | None:
    """Return the path of a Chromium, None if there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def write_notebook(path: Path, *cells: str) -> Path:
    """Write a notebook of code cells."""
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=metadata), path)
    return path


@contextmanager
def jupyter_server(front: FrontEnd, folder: Path) -> Iterator[tuple[str, str]]:
    """Run a server on a free port, its files below ``folder``; yield its address and token."""
    token, runtime = secrets.token_hex(16), folder / "runtime"
    overrides = folder / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(QUIET))
    private = {
        "HOME": folder / "home",
        "IPYTHONDIR": folder / "ipython",
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": runtime,
        "MPLCONFIGDIR": folder / "matplotlib",
    }
    command = [sys.executable, "-m", front.module, "--no-browser", "--allow-root"]
    options = {"port": "0", "ip": "127.0.0.1", "root_dir": str(folder), "open_browser": "False"}
    command += [f"--ServerApp.{name}={value}" for name, value in options.items()]
    command += [f"--IdentityProvider.token={token}"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {name: str(path) for name, path in private.items()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield _address(server, runtime, folder / "server.log"), token
        finally:
            server.terminate()
            server.wait(timeout=30)


def _address(server: "subprocess.Popen[bytes]", runtime: Path, log: Path) -> str:
    """Wait until the server has written where it listens."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            text = file.read_text()
            if text.endswith("}"):
                return str(json.loads(text)["url"])
        time.sleep(0.1)
    raise RuntimeError(f"the Jupyter server did not start:\n{log.read_text()}")


@contextmanager
def chromium_page(browser: str) -> Iterator["Page"]:
    """Open a page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            yield chromium.new_page(viewport={"width": 1500, "height": 950})
        finally:
            chromium.close()
