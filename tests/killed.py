"""Commands that are killed in the middle, for tests of how they go on."""

import signal
import subprocess
import sys
from collections.abc import Sequence

_DRIVER = """
import os, signal, sys
from entangle.cli.main import main

replace, named = os.replace, []
prefix, last = sys.argv[1], int(sys.argv[2])

def killed(source, target):
    named.append(target)
    if sum(prefix in str(path) for path in named) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = killed
main(sys.argv[3:])
"""


def killed_before(prefix: str, last: int, command: Sequence[str]) -> None:
    """Run a command line in a process that ends in ``kill -9``.

    Parameters
    ----------
    prefix
        Of the names of the files that are counted.
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
