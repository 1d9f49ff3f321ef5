"""Every public function takes the same things; `tests.entrances` calls them without type checks."""

import json
import subprocess
import sys


def test_every_entrance_takes_the_same_things_and_refuses_others_by_name() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.entrances"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
