"""Processes that claim a result, for tests of who may write."""

import subprocess
import sys
from pathlib import Path

_DRIVER = """
import sys, time
from pathlib import Path
from entangle.errors import EntangleError
from entangle.runs.provenance import claimed

target, seconds = Path(sys.argv[1]), float(sys.argv[2])
try:
    with claimed(target):
        print("claimed", flush=True)
        time.sleep(seconds)
except EntangleError as error:
    print(error, flush=True)
"""


def claimer(target: Path, *, seconds: float = 60.0) -> "subprocess.Popen[str]":
    """Start a process that claims ``target``, says so or why not, and keeps it for a while."""
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(target), str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: "subprocess.Popen[str]") -> str:
    """Return the next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
