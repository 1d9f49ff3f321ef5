"""A sample of `benchmarks.kills`: commands that end at a write, and the runs that come after."""

import subprocess
import sys


def test_what_a_run_leaves_that_ends_at_a_write() -> None:
    sample = ["--commands", "evaluate", "--ends", "kill,term,full", "--first", "5", "--every", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", *sample],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("'made again'") == 6
