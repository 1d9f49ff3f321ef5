"""``python -m entangle``."""

import subprocess
import sys

import entangle


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "entangle", "--version"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-1] == entangle.__version__
    assert ran.stderr == ""
