"""Commands that are killed in the middle, for tests of how they go on."""

import signal
import subprocess
import sys
from collections.abc import Sequence

_DRIVER = """
import os, signal, sys
from entangle.cli.main import main

prefix, left = sys.argv[1], [None] * int(sys.argv[2])

def counted(rename):
    def killed(source, target):
        if os.path.basename(target).startswith(prefix):
            left.pop()
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
    return killed

os.replace, os.rename = counted(os.replace), counted(os.rename)
main(sys.argv[3:])
"""


def killed_before(prefix: str, last: int, command: Sequence[str]) -> None:
    """Run a command line in a process that ends in ``kill -9``.

    Parameters
    ----------
    prefix
        Of the names of the files and folders that are counted.
    last
        The process dies before this many of them have their names.
    command
        Arguments of the command line.

    Raises
    ------
    AssertionError
        If the process ended in another way; the message is its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, prefix, str(last), *command],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
